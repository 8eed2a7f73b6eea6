"""When what engines hold is compared with the ledger."""

from __future__ import annotations

import pytest

from worker.protocol.messages import Acquire, Declare, State, TenantSpec, Way
from worker.supervisor.lender import SETTLED_S, Lender
from worker.vram.broker import Broker


def state(held: int, active: int = 0) -> State:
    return State(
        name="media", pid=1, started_at=0.0, status="ready", active=active,
        gauges={"device_bytes_held": held},
    )  # fmt: skip


@pytest.fixture
def lender() -> Lender:
    """An engine that was granted 50 of 100 bytes, and rests."""
    broker = Broker(100)
    lender = Lender(broker, 0, lambda name, message: None)
    epoch = lender.began("media")
    spec = TenantSpec(id="a.b", model="a", size_bytes=50, floor_bytes=50, host_copy=True)
    way = Way(name="whole", tenants=("a.b",), peak_bytes=0)
    ask = Acquire(epoch=epoch, number=1, request_id="r", phase="p", ways=(way,))
    lender.tick([("media", Declare(epoch=epoch, model="a", tenants=(spec,))), ("media", ask)], 0.0)
    broker.finish_all()
    return lender


@pytest.mark.parametrize(("held", "alarms"), [(50, 0), (51, 0), (53, 1), (40, 1)])
def test_more_than_two_percent_apart_is_one_alarm(lender: Lender, held: int, alarms: int) -> None:
    for now in (1.0, 1.0 + SETTLED_S, 2.0 + SETTLED_S):
        lender.reconcile([state(held)], now)

    report = lender.report("r", 9.0)
    assert report.counters["drift_alarms"] == alarms
    assert report.drift == pytest.approx((held - 50) / 100)


def test_an_engine_that_works_or_has_just_worked_is_not_compared(lender: Lender) -> None:
    lender.reconcile([state(0, active=1)], 1.0)
    lender.reconcile([state(0, active=1)], 1.0 + 2 * SETTLED_S)
    lender.reconcile([state(0)], 1.1 + 2 * SETTLED_S)

    assert lender.report("r", 9.0).drift == 0.0

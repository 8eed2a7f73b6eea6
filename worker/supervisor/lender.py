"""The broker's place in the orchestrator: messages to it and from it, deaths, and reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from worker.protocol.messages import LedgerReport, Message, Planned, PlanQuery, State
from worker.vram.broker import Broker, Order
from worker.vram.dryrun import dry_run

log = logging.getLogger(__name__)

DRIFT_ALARM = 0.02  # of the budget
DRIVER = "the driver"
SETTLED_S = 2.0  # after its last work, before what an engine holds is compared with the ledger


class Lender:
    """Owner of the broker. Orchestrator thread only."""

    def __init__(self, broker: Broker, process_bytes: int, send: Callable[[str, Message], None]):
        """process_bytes: that each engine takes for itself before the first tensor."""
        self._broker = broker
        self._process_bytes = process_bytes
        self._send = send
        self._holders: set[str] = set()
        self._quiet_since: dict[str, float] = {}
        self._drifts: dict[str, float] = {}
        self._alarms = 0

    def began(self, name: str) -> int:
        """An engine has been started; returns its epoch."""
        self._holders.add(name)
        return self._broker.join(name, self._process_bytes)

    def ended(self, name: str, now: float) -> None:
        """An engine has been reaped: its leases are void from now on."""
        self._drifts.pop(name, None)
        self._pass_on(self._broker.leave(name, now))

    def tick(self, asked: Sequence[tuple[str, Message]], now: float) -> None:
        """Take what engines said, and do what is due."""
        for name, message in asked:
            self._pass_on(self._broker.take(name, message, now))
        self._pass_on(self._broker.tick(now))

    def reconcile(self, states: Sequence[State], now: float) -> None:
        """Compare what engines hold, as they measure it, with the ledger, when it is quiet."""
        for state in states:
            measured = state.gauges.get("device_bytes_held")
            if measured is None:
                continue
            # In the middle of a job an engine's report is the one of its beginning.
            if state.active or not self._broker.is_quiet(state.name):
                self._quiet_since.pop(state.name, None)
                continue
            if now - self._quiet_since.setdefault(state.name, now) < SETTLED_S:
                continue  # the state may have been made before the last message
            self._compare(state.name, measured, self._broker.ledger.held_by(state.name))

    def reconcile_driver(self, states: Sequence[State], used_bytes: int, now: float) -> None:
        """Compare what the driver says is used, by every process on the card, with the ledger.
        What is reserved for passes is not used while it is quiet."""
        ledger = self._broker.ledger
        names = [name for name in self._holders if self._broker.knows(name)]
        busy = any(state.active for state in states)
        if busy or not all(self._broker.is_quiet(name) for name in names):
            self._quiet_since.pop(DRIVER, None)
        elif now - self._quiet_since.setdefault(DRIVER, now) >= SETTLED_S:
            idle = sum(state.gauges.get("device_bytes_reserved", 0) for state in states)
            self._compare(DRIVER, used_bytes, ledger.budget_bytes - ledger.free_bytes - idle)

    def _compare(self, name: str, measured: int, granted: int) -> None:
        drift = (measured - granted) / max(1, self._broker.ledger.budget_bytes)
        if abs(drift) > DRIFT_ALARM >= abs(self._drifts.get(name, 0.0)):
            self._alarms += 1
            log.error(
                "%s: %d bytes are used and %d were granted, %.1f %% of the budget apart",
                name, measured, granted, 100 * drift,
            )  # fmt: skip
        self._drifts[name] = drift

    def explain(self, about: str) -> list[dict[str, object]] | None:
        return self._broker.explain(about)

    def plan(self, query: PlanQuery, now: float) -> Planned:
        """What would happen to a job; nothing does."""
        phases = dry_run(self._broker, query.holder, query.tenants, query.phases, now)
        return Planned(request_id=query.request_id, phases=tuple(phases))

    def report(self, request_id: str, now: float) -> LedgerReport:
        broker = self._broker
        return LedgerReport(
            request_id=request_id,
            budget_bytes=broker.ledger.budget_bytes,
            free_bytes=broker.ledger.free_bytes,
            tenants=tuple(broker.tenants()),
            leases=tuple(broker.leases(now)),
            waiting=tuple(broker.waiting(now)),
            counters={
                **broker.counters, "waited_s": broker.waited_s, "drift_alarms": self._alarms,
            },
            drift=max(self._drifts.values(), key=abs, default=0.0),
        )  # fmt: skip

    def _pass_on(self, orders: Sequence[Order]) -> None:
        for name, message in orders:
            self._send(name, message)

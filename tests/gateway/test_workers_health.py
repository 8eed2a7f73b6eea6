"""Health: what a probe means, who is due, and that a worker is probed once at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from gateway.store.database import Database
from gateway.store.tables import workers as table
from gateway.workers.client import Answer, CallFailed, Keys, WorkerClient
from gateway.workers.health import (
    HEALTHY_EVERY_S,
    STORE_EVERY_S,
    UNHEALTHY_EVERY_S,
    Health,
    HealthLoop,
    HealthMonitor,
    due,
    judge,
)
from gateway.workers.registry import CHAT, WorkerRegistry
from gateway.workers.urls import AddressPolicy
from tests.gateway.conftest import MakeDatabase
from tests.gateway.fake_worker import CAPABILITIES, ENDPOINTS, FakeWorker, closed_port_url

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def probed(status: int, body: bytes) -> Health:
    return judge("http://w", Answer(status=status, body=body, ms=1.26), at=NOW, now=5.0)


def health(url: str, checked_at: float, *, is_healthy: bool = True) -> Health:
    return Health(
        worker_url=url,
        is_healthy=is_healthy,
        last_checked=NOW,
        response_time_ms=1.0,
        checked_at=checked_at,
    )


@pytest.mark.parametrize(
    ("status", "body", "is_healthy"),
    [
        (200, b"{}", True),
        (200, b"ok", True),
        (204, b"", False),
        (200, b"  \n", False),
        (302, b"x", False),
        (404, b"x", False),
        (503, b'{"success": false}', False),
    ],
)
def test_healthy_is_2xx_with_a_body(status: int, body: bytes, is_healthy: bool) -> None:
    found = probed(status, body)

    assert found.is_healthy is is_healthy
    assert (found.health_error is None) is is_healthy


def test_endpoints_count_only_as_an_array_of_texts() -> None:
    good = probed(200, json.dumps({"endpoints": ["/chat", 7], "capabilities": {"a": 1}}).encode())
    other = probed(200, json.dumps({"endpoints": {"/chat": "x"}, "capabilities": []}).encode())

    assert (good.endpoints, good.capabilities) == (("/chat",), {"a": 1})
    assert (other.endpoints, other.capabilities) == ((), {})


def test_an_entry_always_has_the_workers_url() -> None:
    failure = CallFailed("unreachable", "no connection within 2 s", may_have_run=False, ms=2000)

    entry = judge("http://w", failure, at=NOW, now=5.0).to_json()

    assert entry == {
        "isHealthy": False,
        "lastChecked": "2026-11-26T12:00:00.000Z",
        "responseTimeMs": 2000,
        "healthError": "no answer from /health: no connection within 2 s",
        "workerUrl": "http://w",
    }


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0, 100), st.booleans())))
def test_who_is_due_is_exactly_who_waits_longer_than_its_interval(
    known: dict[str, tuple[float, bool]],
) -> None:
    states = {url: health(url, at, is_healthy=ok) for url, (at, ok) in known.items()}

    found = due("abcdef", states, 100.0)

    assert set(found) == {
        url
        for url in "abcdef"
        if url not in known
        or 100.0 - known[url][0] >= (HEALTHY_EVERY_S if known[url][1] else UNHEALTHY_EVERY_S)
    }
    assert all(url not in known for url in found[: 6 - len(known)])


@pytest.fixture
def database(make_database: MakeDatabase) -> Database:
    """One engine is enough here: the statements are tested with the registry."""
    return make_database("sqlite")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def client() -> Iterator[WorkerClient]:
    made = WorkerClient(AddressPolicy(private_allowed=True), Keys("s3cret"))
    yield made
    made.close()


def at_once(probe: Callable[[], object]) -> object:
    return probe()


def registered(database: Database, *urls: str) -> WorkerRegistry:
    registry = WorkerRegistry(database)
    for url in urls:
        registry.register(url, (CHAT,), auto_registered=True, registration_method="test", now=NOW)
    return registry


def row(database: Database) -> Any:
    with database.engine.connect() as connection:
        return connection.execute(select(table)).one()


def test_a_round_probes_who_is_due_and_the_next_one_nobody(
    database: Database, client: WorkerClient
) -> None:
    gone = closed_port_url()
    with FakeWorker(key="other") as worker:
        monitor = HealthMonitor(registered(database, worker.url, gone), client)

        first = monitor.tick(0.0, at_once)
        known = monitor.known()
        again = monitor.tick(known[gone].checked_at + 1.0, at_once)

    assert set(first) == {worker.url, gone}
    assert again == ()
    assert known[worker.url].is_healthy
    assert known[worker.url].endpoints == tuple(ENDPOINTS)
    assert known[worker.url].capabilities == CAPABILITIES
    assert not known[gone].is_healthy
    assert "Authorization" not in worker.gets("/health")[0].headers


def test_a_suspect_is_probed_at_the_next_round(database: Database, client: WorkerClient) -> None:
    with FakeWorker() as worker:
        monitor = HealthMonitor(registered(database, worker.url), client)
        monitor.tick(0.0, at_once)
        soon = monitor.known()[worker.url].checked_at + 1.0
        worker.health_status = 503

        monitor.suspect(worker.url)
        found = monitor.tick(soon, at_once)

        assert found == (worker.url,)
        assert not monitor.known()[worker.url].is_healthy


def test_a_probe_that_waits_for_its_turn_is_not_submitted_again(
    database: Database, client: WorkerClient
) -> None:
    monitor = HealthMonitor(registered(database, "http://127.0.0.1:1"), client)
    waiting: list[Callable[[], object]] = []

    first = monitor.tick(0.0, waiting.append)
    second = monitor.tick(100.0, waiting.append)

    assert (first, second) == (("http://127.0.0.1:1",), ())


def test_a_worker_is_probed_once_at_a_time(database: Database, client: WorkerClient) -> None:
    with FakeWorker(health_delay_s=0.3) as worker:
        monitor = HealthMonitor(registered(database, worker.url), client)

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(monitor.probe, [worker.url] * 8))

    assert len({id(one) for one in found}) == len(worker.gets("/health"))
    assert len(worker.gets("/health")) < 8
    assert all(one.is_healthy for one in found)


def test_a_value_that_is_young_enough_is_given_without_a_probe(
    database: Database, client: WorkerClient
) -> None:
    clock = Clock()
    probes = WorkerClient(AddressPolicy(private_allowed=True), Keys(), clock=clock)
    with FakeWorker() as worker:
        monitor = HealthMonitor(registered(database, worker.url), probes, clock=clock)
        monitor.health(worker.url, max_age_s=15.0)
        clock.now = 15.0
        monitor.health(worker.url, max_age_s=15.0)
        young = len(worker.gets("/health"))
        clock.now = 15.1
        monitor.health(worker.url, max_age_s=15.0)

        assert young == 1
        assert len(worker.gets("/health")) == 2
    probes.close()


def test_the_table_is_written_at_a_change_and_seldom_otherwise(database: Database) -> None:
    clock = Clock()
    probes = WorkerClient(AddressPolicy(private_allowed=True), Keys(), clock=clock)
    times = iter([NOW.replace(minute=minute) for minute in range(10)])
    with FakeWorker() as worker:
        registry = registered(database, worker.url)
        monitor = HealthMonitor(registry, probes, clock=clock, wall=lambda: next(times))
        written = []
        late = 2.0 + STORE_EVERY_S
        steps = ((0.0, 200), (1.0, 200), (2.0, 503), (3.0, 503), (late, 503))
        for now, status in steps:
            clock.now, worker.health_status = now, status
            monitor.suspect(worker.url)
            monitor.tick(now, at_once)
            written.append((row(database).last_checked.minute, row(database).is_healthy))
    probes.close()

    assert written == [(0, True), (0, True), (2, False), (2, False), (4, False)]
    assert row(database).health_error == "/health answered 503"


def test_a_worker_that_was_removed_is_forgotten(database: Database, client: WorkerClient) -> None:
    with FakeWorker() as worker:
        registry = registered(database, worker.url)
        monitor = HealthMonitor(registry, client)
        monitor.tick(0.0, at_once)

        registry.remove(worker.url)
        monitor.tick(100.0, at_once)

        assert monitor.known() == {}


def test_the_loop_goes_on_after_a_round_that_failed_and_stops_when_told() -> None:
    class Rounds:
        def __init__(self) -> None:
            self.count = 0
            self.second = Event()

        def tick(self, now: float, submit: object) -> None:
            self.count += 1
            if self.count == 1:
                raise RuntimeError("broken")
            self.second.set()

    rounds = Rounds()
    loop = HealthLoop(rounds, tick_s=0.0)

    loop.start()
    went_on = rounds.second.wait(10)
    loop.stop()

    assert went_on

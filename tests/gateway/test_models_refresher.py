"""Who refreshes and when: a lease, a schedule, and what happens after failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, update

from gateway.errors import Conflict
from gateway.models import faults
from gateway.models.faults import ProviderError
from gateway.models.listing import BUILT_IN, Listing, read_rows
from gateway.models.refresher import LEASE_S, RETRY_S, Refresher
from gateway.store import leases
from gateway.store.database import Database
from gateway.store.tables import providers
from gateway.values.rows import Provider

START = datetime(2026, 3, 1, tzinfo=UTC)
DAY_S = 86400.0


class Source:
    """A list that counts how often it is asked for."""

    def __init__(self, then: Callable[[], Listing] = lambda: BUILT_IN):
        self.then = then
        self.asked = 0

    def __call__(self, provider: Provider) -> Listing:
        self.asked += 1
        return self.then()


@pytest.fixture
def filled(database: Database) -> Database:
    with database.transaction() as connection:
        for name, kind in (("matcha", "catalogue"), ("openrouter", "openai"), ("own", "worker")):
            connection.execute(insert(providers).values(name=name, kind=kind))
    return database


def refresher(
    database: Database, source: Source, name: str = "one", every_s: float = DAY_S
) -> Refresher:
    return Refresher(
        database,
        source,
        instance_id=name,
        every_s=every_s,
        started=START,
        random01=lambda: 0.5,
    )


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_the_catalogue_is_refreshed_soon_after_the_start_and_then_each_period(
    filled: Database,
) -> None:
    source = Source()
    one = refresher(filled, source)

    ran = [len(one.tick(after(at))) for at in (0, 149, 150, 151, DAY_S, DAY_S + 151)]

    assert ran == [0, 0, 1, 0, 0, 1]
    assert source.asked == 2


def test_a_period_of_zero_means_never_by_itself(filled: Database) -> None:
    source = Source()

    ran = refresher(filled, source, every_s=0.0).tick(after(DAY_S * 10))

    assert (ran, source.asked) == ((), 0)


def test_a_provider_that_is_switched_off_is_not_asked(filled: Database) -> None:
    with filled.transaction() as connection:
        connection.execute(update(providers).values(is_active=False))
    source = Source()

    refresher(filled, source).tick(after(DAY_S))

    assert source.asked == 0


def test_another_replica_that_was_faster_is_enough(filled: Database) -> None:
    source = Source()
    one, two = refresher(filled, source, "one"), refresher(filled, source, "two")

    one.tick(after(200))
    two.tick(after(200))

    assert source.asked == 1


def test_replicas_that_start_at_once_ask_the_provider_once(filled: Database) -> None:
    together = threading.Barrier(4)
    source = Source()

    def tick(name: str) -> None:
        one = refresher(filled, source, name)
        together.wait(10)
        one.tick(after(200))

    threads = [threading.Thread(target=tick, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert source.asked == 1


def test_a_failure_is_tried_again_later_and_not_at_each_tick(filled: Database) -> None:
    def fail() -> Listing:
        raise ProviderError(faults.SERVER_ERROR, "the provider failed (status 500)")

    source = Source(fail)
    one = refresher(filled, source)
    for at in (200, 230, 200 + RETRY_S - 1):
        one.tick(after(at))
    failed = source.asked

    source.then = lambda: BUILT_IN
    ran = one.tick(after(200 + RETRY_S))

    assert (failed, len(ran)) == (1, 1)


def test_a_list_that_shrank_is_not_taken_by_the_schedule(filled: Database) -> None:
    source = Source(lambda: read_rows([{"id": "a"}, {"id": "b"}], keys_are_ids=True))
    one = refresher(filled, source)
    one.tick(after(200))

    source.then = lambda: read_rows([], keys_are_ids=True)
    ran = one.tick(after(3 * DAY_S))

    assert (ran, source.asked) == ((), 2)


def test_while_another_replica_refreshes_a_request_is_refused(filled: Database) -> None:
    leases.take(filled, "refresh:matcha", "other", START, LEASE_S)
    source = Source()
    one = refresher(filled, source)

    with pytest.raises(Conflict):
        one.refresh_now("matcha", after(LEASE_S - 1), actor="anna")
    results = one.refresh_now("matcha", after(LEASE_S + 1), actor="anna")

    assert (results.added, source.asked) == (5, 1)


def test_while_the_same_process_refreshes_a_request_is_refused(filled: Database) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow() -> Listing:
        inside.set()
        leave.wait(10)
        return BUILT_IN

    one = refresher(filled, Source(slow))
    thread = threading.Thread(target=lambda: one.refresh_now("matcha", START, actor="anna"))
    thread.start()
    inside.wait(10)

    with pytest.raises(Conflict):
        one.refresh_now("matcha", START, actor="bert")
    leave.set()
    thread.join(10)

    assert one.refresh_now("matcha", START, actor="bert").added == 0


def test_the_lease_is_given_back_after_a_failure(filled: Database) -> None:
    def fail() -> Listing:
        raise ProviderError(faults.TIMEOUT, "no answer")

    source = Source(fail)
    with pytest.raises(ProviderError):
        refresher(filled, source, "one").refresh_now("matcha", START, actor="anna")

    source.then = lambda: BUILT_IN
    results = refresher(filled, source, "two").refresh_now("matcha", START, actor="anna")

    assert results.added == 5


def test_the_loop_ends_when_it_is_told(filled: Database) -> None:
    stop = threading.Event()
    stop.set()
    source = Source()

    refresher(filled, source).run(stop)

    assert source.asked == 0

"""PostgreSQL, one round at a time: the thread is not started, and time is an argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway.cache.holder import EMERGENCY, Holder, State
from gateway.cache.record import Record
from gateway.cache.replica import BACKOFF_S, BOUND_S, READ_TIMEOUT_S, WAIT_S, Replica
from gateway.store.database import Database
from gateway.store.loading import load_snapshot
from gateway.values.rows import Snapshot
from tests.gateway.cache_parts import PostgresPlace, edit, postgres_place, small_snapshot
from tests.gateway.postgres import Server


class World:
    """A replica whose loads can be broken or slow, on a clock that stands still."""

    def __init__(self, place: PostgresPlace, database: Database):
        self.place = place
        self.database = database
        self.now = 1000.0
        self.loads = 0
        self.broken: Exception | None = None
        self.record = Record()
        self.holder = Holder(State(snapshot=small_snapshot(0), source=EMERGENCY))
        self.replica = self.make()

    def make(self, **more: Any) -> Replica:
        engine = self.database.engine
        _, connect = engine.dialect.create_connect_args(engine.url)
        return Replica(
            self.holder,
            {**connect, "application_name": "gateway-listener"},
            self.load,
            self.record,
            reset=self.database.dispose,
            clock=lambda: self.now,
            **more,
        )

    def load(self) -> Snapshot:
        self.loads += 1
        if self.broken is not None:
            raise self.broken
        with self.database.reading() as connection:
            return load_snapshot(connection)

    @property
    def revision(self) -> int:
        return self.holder.state.snapshot.revision

    def level_0(self) -> bool:
        return self.replica.look(self.now).is_verified


@pytest.fixture
def world(postgres: Server, migrated_postgres: str) -> Iterator[World]:
    with postgres_place(postgres, migrated_postgres) as place, place.opened() as database:
        world = World(place, database)
        yield world
        close(world.replica)


def close(replica: Replica) -> None:
    replica._thread.start()  # it ends at once
    replica.stop()


def test_a_wait_a_read_and_a_load_fit_into_the_bound() -> None:
    assert WAIT_S + READ_TIMEOUT_S <= BOUND_S
    assert WAIT_S <= 1.0


def test_a_round_loads_once_and_then_only_when_the_database_moves(world: World) -> None:
    for _ in range(3):
        world.replica.step(world.now)
    loads = world.loads
    revision = edit(world.database, "one")
    world.replica.step(world.now)

    assert (loads, world.loads) == (1, 2)
    assert world.revision == revision
    assert world.holder.state.snapshot.negatives[0].negative_prompt == "one"


def test_what_is_held_counts_as_verified_for_the_bound_and_no_longer(world: World) -> None:
    world.replica.step(world.now)
    fresh = world.level_0()
    world.now += BOUND_S
    still = world.level_0()
    world.now += 0.001
    after = world.level_0()
    world.replica.step(world.now)

    assert (fresh, still, after, world.level_0()) == (True, True, False, True)


def test_an_edit_before_the_first_read_but_after_listening_is_not_lost(world: World) -> None:
    connection = world.replica._connect()
    revision = edit(world.database, "between")
    world.replica.step(world.now)

    assert connection.execute("SELECT 1").fetchone() == (1,)
    assert world.revision == revision


def test_a_notification_ends_the_wait(world: World) -> None:
    world.replica.step(world.now)
    edit(world.database, "told")

    world.replica._wait(60.0)  # a minute, were it not told

    assert world.record.status()["counts"]["notified"] == 1


def test_a_notification_that_came_with_a_read_ends_the_wait(world: World) -> None:
    world.replica.step(world.now)
    edit(world.database, "told")
    world.replica.step(world.now)  # its read takes the notification off the socket

    world.replica._wait(60.0)

    assert world.record.status()["counts"]["notified"] == 1


def test_a_wake_ends_the_wait_with_and_without_a_connection(world: World) -> None:
    world.replica.wake()
    world.replica._wait(60.0)
    world.replica.step(world.now)
    for _ in range(2000):  # more than a socket holds
        world.replica.wake()

    world.replica._wait(60.0)


def test_without_the_push_path_nothing_is_told_and_all_is_seen(world: World) -> None:
    close(world.replica)
    world.replica = world.make(listen=False)
    world.replica.step(world.now)
    revision = edit(world.database, "deaf")
    world.replica._wait(0.05)
    world.replica.step(world.now)

    assert "notified" not in world.record.status()["counts"]
    assert world.revision == revision


def test_a_killed_listener_connects_again_at_once_and_misses_nothing(world: World) -> None:
    world.replica.step(world.now)
    assert world.place.kill_listeners() == 1
    revision = edit(world.database, "while it was away")

    delay_s = world.replica.step(world.now)
    world.replica.step(world.now)

    assert delay_s == BACKOFF_S[0] == 0.0
    assert world.revision == revision
    assert world.record.status()["counts"]["connected"] == 2


def test_tries_are_backed_off_and_the_count_ends_with_success(world: World) -> None:
    world.replica.step(world.now)
    world.place.take_away()

    delays = [world.replica.step(world.now) for _ in range(len(BACKOFF_S) + 2)]
    world.place.bring_back()
    world.replica.step(world.now)
    after = world.replica._failures

    assert delays == [*BACKOFF_S, BACKOFF_S[-1], BACKOFF_S[-1]]
    assert after == 0
    assert world.record.status()["failing"] == {}


def test_a_reconnect_loads_again_since_the_database_may_be_another_one(world: World) -> None:
    world.replica.step(world.now)
    world.place.kill_listeners()
    world.replica.step(world.now)
    world.replica.step(world.now)

    assert world.loads == 2


def test_a_restored_database_is_served_at_its_older_revision(world: World) -> None:
    for word in "abc":
        newest = edit(world.database, word)
    world.replica.step(world.now)
    with world.database.transaction() as connection:
        # As a restored backup has it; a trigger refuses it to everybody else.
        connection.exec_driver_sql("ALTER TABLE config_state DISABLE TRIGGER USER")
        connection.exec_driver_sql("UPDATE config_state SET revision = revision - 2")
    world.replica.step(world.now)

    assert world.revision == newest - 2
    assert world.record.status()["counts"]["restored"] == 1


def test_rows_that_cannot_be_loaded_leave_what_is_held_and_the_connection(world: World) -> None:
    world.replica.step(world.now)
    before = world.revision
    world.broken = ValueError("a row is odd")
    revision = edit(world.database, "odd")

    world.replica.step(world.now)
    kept = world.revision
    world.broken = None
    world.replica.step(world.now)

    assert kept == before
    assert world.revision == revision
    assert world.record.status()["counts"]["connected"] == 1


def test_a_standby_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.database.transaction() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION public.pg_is_in_recovery() RETURNS boolean LANGUAGE sql "
            "AS 'SELECT true'"
        )
        connection.exec_driver_sql(
            f"ALTER DATABASE {world.place.name} SET search_path = public, pg_catalog"
        )

    world.replica.step(world.now)

    assert not world.level_0()
    assert "standby" in world.record.status()["last_error"]["error"]
    assert world.loads == 0

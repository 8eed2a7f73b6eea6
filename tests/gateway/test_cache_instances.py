"""Who serves what, on both engines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from gateway.cache.instances import (
    DEAD,
    DEAD_S,
    FORGET_S,
    REACHED,
    WAITING,
    Instance,
    Instances,
    new_instance_id,
    report,
)
from gateway.store.database import Database
from gateway.store.loading import read_revision
from gateway.store.tables import gateway_instances


def named(database: Database, name: str) -> Instances:
    return Instances(lambda: database, name)


def grow_old(database: Database, name: str, seconds: float) -> None:
    with database.transaction() as connection:
        connection.execute(
            update(gateway_instances)
            .where(gateway_instances.c.instance_id == name)
            .values(last_seen=datetime.now(UTC) - timedelta(seconds=seconds))
        )


class Clock:
    """Moves when somebody sleeps, and lets something happen then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: dict[int, object] = {}
        self.sleeps = 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        act = self.then.get(self.sleeps)
        if callable(act):
            act()


def test_an_instance_says_what_it_serves_and_leaves(database: Database) -> None:
    one, two = named(database, "one"), named(database, "two")
    one.beat(3)
    one.beat(3)
    one.beat(4)
    two.beat(2)
    found = one.all()
    two.leave()

    assert [(row.instance_id, row.applied_revision) for row in found] == [("one", 4), ("two", 2)]
    assert all(row.is_live and row.seen_s < 5 for row in found)
    assert [row.instance_id for row in one.all()] == ["one"]


def test_a_row_that_nobody_speaks_for_is_forgotten_after_a_day(database: Database) -> None:
    named(database, "old").beat(1)
    named(database, "tired").beat(1)
    grow_old(database, "old", FORGET_S + 60)
    grow_old(database, "tired", FORGET_S - 60)

    named(database, "new").beat(1)

    assert [row.instance_id for row in named(database, "new").all()] == ["new", "tired"]


def test_signs_of_life_do_not_raise_the_revision_and_a_bump_does(database: Database) -> None:
    with database.reading() as connection:
        before = read_revision(connection)
    instances = named(database, "one")
    instances.beat(before)
    bumped = instances.bump()

    assert bumped == before + 1
    with database.reading() as connection:
        assert read_revision(connection) == bumped


def test_a_refresh_waits_for_every_live_instance_and_names_the_slowest(
    database: Database,
) -> None:
    quick, slow, dead = (named(database, name) for name in ("quick", "slow", "dead"))
    quick.beat(7)
    slow.beat(6)
    dead.beat(5)
    grow_old(database, "dead", DEAD_S + 1)
    clock = Clock()
    clock.then[3] = lambda: slow.beat(7)

    found = quick.wait_for_all(7, 5.0, clock=clock, sleep=clock.sleep)

    assert found.reached
    assert found.slowest == "slow"
    assert found.slowest_ms == pytest.approx(clock.now * 1000)
    assert [(one.instance_id, one.state) for one in found.instances] == [
        ("dead", DEAD),
        ("quick", REACHED),
        ("slow", REACHED),
    ]


def test_a_refresh_that_runs_out_of_time_names_who_is_late(database: Database) -> None:
    quick, slow = named(database, "quick"), named(database, "slow")
    quick.beat(7)
    slow.beat(6)
    clock = Clock()

    found = quick.wait_for_all(7, 0.5, clock=clock, sleep=clock.sleep)

    assert not found.reached
    assert (found.slowest, found.slowest_ms) == ("slow", None)
    assert clock.now == pytest.approx(0.5)


def test_a_refresh_without_instances_has_nobody_to_wait_for(database: Database) -> None:
    found = named(database, "one").wait_for_all(7, 5.0)

    assert found.reached
    assert found.slowest is None


def test_among_late_instances_the_one_furthest_behind_is_named() -> None:
    rows = tuple(
        Instance(instance_id=name, applied_revision=revision, seen_s=1.0)
        for name, revision in (("a", 5), ("b", 3), ("c", 9))
    )

    found = report(9, rows, {"c": 10.0})

    assert found.slowest == "b"
    assert [one.state for one in found.instances] == [WAITING, WAITING, REACHED]


def test_two_starts_of_a_process_have_two_names() -> None:
    names = {new_instance_id() for _ in range(100)}

    assert len(names) == 100
    assert all(len(name) <= 64 for name in names)

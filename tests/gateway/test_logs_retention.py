"""What goes and what stays, at every age and number."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Logs
from gateway.logs import retention as retention_module
from gateway.logs.retention import Limits, Place, Removed, Retention, limits
from gateway.store.database import Database
from gateway.store.leases import take
from gateway.store.tables import (
    config_objects,
    prompt_log_bodies,
    prompt_log_flags,
    prompt_logs,
)
from tests.gateway.log_parts import NOW, body, config_object, rows, with_body, write

DAY_S = 86400.0


def fill(database: Database, ages_days: list[float]) -> None:
    """A row with texts for each age, and in each an object of its own, used then."""
    for number, days in enumerate(ages_days):
        one = with_body(
            f"r{number}",
            days * DAY_S,
            body=body(objects=(config_object(id=number),)),
            flags=("model_fallback",),
        )
        write(database, one)
    with database.transaction() as connection:
        for number, days in enumerate(ages_days):
            connection.execute(
                config_objects.update()
                .where(config_objects.c.content_hash == config_object(id=number).content_hash)
                .values(created_at=NOW - timedelta(days=days))
            )


def left(database: Database) -> tuple[list[str], list[str], int]:
    """Request ids of rows, of bodies, and the number of objects."""
    return (
        [row["request_id"] for row in rows(database, prompt_logs)],
        [row["request_id"] for row in rows(database, prompt_log_bodies)],
        len(rows(database, config_objects)),
    )


def run(database: Database, logs: Logs) -> Removed:
    return Retention(database, logs, wall=lambda: NOW).tick(NOW)


def test_texts_go_before_their_rows(database: Database) -> None:
    fill(database, [40, 20, 8.5, 6.9, 0])

    removed = run(database, Logs(body_days=7, row_days=30))

    names, bodies, objects = left(database)
    assert names == ["r1", "r2", "r3", "r4"]
    assert bodies == ["r3", "r4"]
    assert objects == 2
    assert removed == Removed(bodies=3, rows=1, objects=3)


def test_a_second_round_finds_nothing(database: Database) -> None:
    fill(database, [40, 0])
    logs = Logs(body_days=7, row_days=30)

    run(database, logs)

    assert run(database, logs) == Removed()


def test_an_object_in_use_stays_however_old_it_is(database: Database) -> None:
    shared = body(objects=(config_object(id=1),))
    write(database, with_body("old", 20 * DAY_S, body=shared), with_body("new", body=shared))

    run(database, Logs(body_days=7))

    assert left(database) == (["old", "new"], ["new"], 1)


def test_above_the_number_of_rows_the_oldest_go(database: Database) -> None:
    # Written in another order than that of their times, two of them at the same time.
    fill(database, [3, 5, 1, 1, 4])

    for most, kept in ((4, ["r0", "r2", "r3", "r4"]), (2, ["r2", "r3"]), (1, ["r3"])):
        run(database, Logs.model_construct(body_days=7.0, row_days=90.0, max_rows=most))

        assert left(database)[0] == kept
        assert left(database)[1] == kept


def test_no_body_outlives_its_row(database: Database) -> None:
    fill(database, [4, 2])

    run(database, Logs(body_days=7, row_days=3))

    assert left(database)[:2] == (["r1"], ["r1"])


def test_flags_go_with_their_rows(database: Database) -> None:
    fill(database, [40, 0])

    run(database, Logs(body_days=7, row_days=30))

    kept = rows(database, prompt_logs)
    assert [one["log_id"] for one in rows(database, prompt_log_flags)] == [kept[0]["id"]]


def test_more_than_a_chunk_goes_in_several(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "CHUNK", 3)
    monkeypatch.setattr(retention_module, "PAUSE_S", 0.0)
    write(database, *(with_body(f"r{n}", 40 * DAY_S + n) for n in range(10)))
    write(database, with_body("new"))

    removed = run(database, Logs(body_days=30, row_days=30))

    assert (removed.bodies, removed.rows) == (10, 10)
    assert left(database) == (["new"], ["new"], 1)


def test_a_stop_ends_it_between_chunks(database: Database) -> None:
    fill(database, [40])
    stop = threading.Event()
    stop.set()

    removed = Retention(database, Logs(body_days=1, row_days=1), stop=stop).tick(NOW)

    assert removed == Removed()
    assert left(database)[0] == ["r0"]


def test_a_replica_without_the_lease_removes_nothing(database: Database) -> None:
    fill(database, [40])
    stop = threading.Event()
    retention = Retention(
        database, Logs(body_days=1, row_days=1), wall=lambda: NOW, stop=stop, holder="other"
    )
    assert take(database, retention_module.LEASE, "first", NOW, 60.0)

    retention.round()
    assert left(database)[0] == ["r0"]

    assert take(database, retention_module.LEASE, "first", NOW, -1.0)
    retention.round()
    assert left(database)[0] == []


@given(body_days=st.floats(0, 400), row_days=st.floats(0, 400), over=st.none() | st.integers(1, 9))
def test_objects_stay_longer_than_bodies_and_bodies_no_longer_than_rows(
    body_days: float, row_days: float, over: int | None
) -> None:
    place = None if over is None else Place(NOW - timedelta(days=over), over)

    due = limits(Logs(body_days=body_days, row_days=row_days), NOW, place)

    assert isinstance(due, Limits)
    assert due.objects_before < due.bodies_before
    assert due.rows_before <= due.bodies_before <= NOW
    assert due.newest_over == place

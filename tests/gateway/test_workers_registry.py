"""The list of workers, on both engines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from gateway.errors import Forbidden, InvalidRequest, NotFound, StoreUnavailable
from gateway.store.database import Database, open_database
from gateway.store.tables import workers as table
from gateway.workers.registry import CHAT, MAX_REGISTERED, MEDIA_TYPES, WorkerRegistry

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def register(
    registry: WorkerRegistry, url: str, *types: str, now: datetime = NOW, automatic: bool = True
) -> None:
    registry.register(
        url, types or (CHAT,), auto_registered=automatic, registration_method="test", now=now
    )


def urls(registry: WorkerRegistry, *types: str) -> list[str]:
    return [worker.url for worker in registry.workers(*types)]


def test_static_workers_come_first_and_registered_ones_after_them(database: Database) -> None:
    registry = WorkerRegistry(database, ["http://a:1/"], ["http://m:1"])

    register(registry, "http://b:1")
    register(registry, "http://m:2", *MEDIA_TYPES)

    assert urls(registry, CHAT) == ["http://a:1", "http://b:1"]
    assert urls(registry, "sdxl") == urls(registry, "wan") == ["http://m:1", "http://m:2"]


def test_registering_again_is_an_update(database: Database) -> None:
    registry = WorkerRegistry(database)
    register(registry, "http://b:1")

    register(registry, "http://b:1", now=NOW + timedelta(hours=1), automatic=False)

    (worker,) = registry.workers(CHAT)
    assert worker.registered_at == NOW + timedelta(hours=1)
    assert not worker.auto_registered


def test_another_process_sees_a_registration_when_it_reads_again(database: Database) -> None:
    one, other = WorkerRegistry(database), WorkerRegistry(database, ["http://a:1"])
    other.refresh()

    register(one, "http://b:1")
    before = urls(other, CHAT)
    other.refresh()

    assert before == ["http://a:1"]
    assert urls(other, CHAT) == ["http://a:1", "http://b:1"]


def test_where_nobody_is_known_the_table_is_read_at_most_once_a_second(
    database: Database,
) -> None:
    times = iter([0.0, 0.5, 1.5, 1.5])
    one = WorkerRegistry(database)
    other = WorkerRegistry(database, clock=lambda: next(times))
    first = urls(other, CHAT)
    register(one, "http://b:1")

    soon, later = urls(other, CHAT), urls(other, CHAT)

    assert (first, soon, later) == ([], [], ["http://b:1"])


def test_a_static_worker_that_registers_is_there_once(database: Database) -> None:
    registry = WorkerRegistry(database, ["http://a:1"])

    register(registry, "http://a:1")

    (worker,) = registry.workers(CHAT)
    assert worker.is_static


def test_a_registered_worker_can_be_removed_and_a_static_one_cannot(database: Database) -> None:
    registry = WorkerRegistry(database, ["http://a:1"])
    register(registry, "http://b:1", *MEDIA_TYPES)

    gone = registry.remove("http://b:1/")

    assert gone == 2
    assert urls(registry) == ["http://a:1"]
    with pytest.raises(Forbidden):
        registry.remove("http://a:1")
    with pytest.raises(NotFound):
        registry.remove("http://b:1")


def test_old_pods_make_room_and_those_that_are_well_stay(database: Database) -> None:
    registry = WorkerRegistry(database)
    for index in range(MAX_REGISTERED):
        register(registry, f"http://pod-{index}:1", now=NOW + timedelta(minutes=index))
    with database.engine.begin() as connection:
        healthy = update(table).where(table.c.url == "http://pod-0:1").values(is_healthy=True)
        connection.execute(healthy)

    register(registry, "http://newest:1", now=NOW)

    left = urls(registry, CHAT)
    assert len(left) == MAX_REGISTERED
    assert "http://pod-1:1" not in left
    assert {"http://pod-0:1", "http://newest:1"} <= set(left)


def test_health_is_written_down_and_read_by_others(database: Database) -> None:
    registry = WorkerRegistry(database)
    register(registry, "http://b:1")

    registry.record_health(
        "http://b:1",
        is_healthy=False,
        last_checked=NOW,
        response_time_ms=3.5,
        health_error="/health answered 503",
        capabilities={"chat": True},
        endpoints=["/chat"],
    )
    registry.refresh()

    assert registry.workers(CHAT)[0].was_healthy is False


def test_without_the_database_the_last_list_counts(tmp_path: Path) -> None:
    broken = open_database(f"sqlite:///{tmp_path / 'empty.sqlite3'}")  # no tables in it
    registry = WorkerRegistry(broken, ["http://a:1"])

    assert not registry.try_refresh()
    assert urls(registry, CHAT) == ["http://a:1"]
    assert urls(registry, "sdxl") == []
    with pytest.raises(StoreUnavailable):
        register(registry, "http://b:1")
    with pytest.raises(StoreUnavailable):
        registry.remove("http://b:1")
    broken.dispose()


def test_a_static_url_that_is_none_is_refused_at_the_start(database: Database) -> None:
    with pytest.raises(InvalidRequest):
        WorkerRegistry(database, ["localhost:7861"])

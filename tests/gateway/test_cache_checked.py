"""SQLite: every look compares, whoever edited and whatever happened to the file."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.cache.checked import PAUSE_S, CheckedSource
from gateway.cache.holder import EMERGENCY, Holder, Mark, State
from gateway.cache.record import Record
from gateway.cache.sqlite import SqliteMarks
from gateway.values.rows import Snapshot
from tests.gateway.cache_parts import small_snapshot


class World:
    """A file with a revision, and a source whose loads are counted."""

    def __init__(self, folder: Path):
        self.path = folder / "gateway.sqlite3"
        self.now = 1000.0
        self.loads = 0
        self.resets = 0
        self.broken: Exception | None = None
        self.record = Record()
        self.holder = Holder(State(snapshot=small_snapshot(0), source=EMERGENCY))
        make(self.path)
        self.source = CheckedSource(
            self.holder,
            SqliteMarks(self.path),
            self.load,
            self.record,
            reset=self.reset,
            clock=lambda: self.now,
        )

    def load(self) -> Snapshot:
        self.loads += 1
        if self.broken is not None:
            raise self.broken
        with closing(sqlite3.connect(self.path)) as connection:
            return small_snapshot(
                connection.execute("SELECT revision FROM config_state").fetchone()[0]
            )

    def reset(self) -> None:
        self.resets += 1

    def look(self) -> tuple[int, bool]:
        look = self.source.look(self.now)
        return look.state.snapshot.revision, look.is_verified

    def run(self, statement: str) -> None:
        run(self.path, statement)


def make(path: Path, revision: int = 1) -> None:
    run(path, "PRAGMA journal_mode = WAL")
    run(path, "CREATE TABLE config_state (id INTEGER, revision INTEGER, changed_at TEXT)")
    run(path, f"INSERT INTO config_state VALUES (1, {revision}, 'then')")


def run(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.source.stop()


def test_an_edit_by_any_other_connection_is_seen_by_the_next_look(world: World) -> None:
    seen = [world.look()]
    for revision in (2, 3, 9):
        world.run(f"UPDATE config_state SET revision = {revision}")
        seen.append(world.look())

    assert seen == [(1, True), (2, True), (3, True), (9, True)]


def test_nothing_is_loaded_while_nothing_changes(world: World) -> None:
    for _ in range(20):
        world.look()

    assert world.loads == 1


def test_an_edit_that_is_rolled_back_or_not_committed_yet_is_not_seen(world: World) -> None:
    world.look()
    with closing(sqlite3.connect(world.path)) as writer:
        writer.execute("UPDATE config_state SET revision = 2")
        while_open = world.look()
        writer.rollback()

    assert while_open == world.look() == (1, True)
    assert world.loads == 1


def test_a_restored_database_is_noticed_at_its_older_revision(world: World) -> None:
    world.run("UPDATE config_state SET revision = 9")
    world.look()

    world.run("UPDATE config_state SET revision = 4")

    assert world.look() == (4, True)
    assert world.record.status()["counts"]["restored"] == 1


def test_a_restored_database_is_noticed_at_the_same_revision(world: World) -> None:
    world.look()

    world.run("UPDATE config_state SET changed_at = 'later'")

    assert world.look() == (1, True)
    assert world.loads == 2


def test_another_file_in_its_place_is_noticed(world: World, tmp_path: Path) -> None:
    world.look()
    make(tmp_path / "backup.sqlite3")

    (tmp_path / "backup.sqlite3").replace(world.path)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"gateway.sqlite3{suffix}").unlink(missing_ok=True)

    assert world.look() == (1, True)
    assert world.loads == 2
    assert world.resets == 2  # connections that were open would read the file that is gone


def test_a_file_that_is_gone_is_not_verified_and_is_found_again(
    world: World, tmp_path: Path
) -> None:
    before = world.look()
    world.path.rename(tmp_path / "away")
    gone = world.look()
    was_made = world.path.exists()
    (tmp_path / "away").rename(world.path)

    assert (before, gone, world.look()) == ((1, True), (1, False), (1, True))
    assert not was_made
    assert "FileNotFoundError" in world.record.status()["last_error"]["error"]


def test_a_database_without_its_tables_is_not_verified(world: World) -> None:
    world.look()
    world.run("DROP TABLE config_state")

    assert world.look() == (1, False)


def test_a_file_that_is_no_database_is_not_verified(world: World) -> None:
    world.source.stop()
    for suffix in ("-wal", "-shm"):
        Path(f"{world.path}{suffix}").unlink(missing_ok=True)
    world.path.write_bytes(b"no database" * 1000)

    assert world.look() == (0, False)
    assert world.loads == 0


def test_rows_that_cannot_be_loaded_leave_what_is_held_and_are_tried_again_later(
    world: World,
) -> None:
    world.look()
    world.broken = ValueError("a row is odd")
    world.run("UPDATE config_state SET revision = 2")

    seen = [world.look(), world.look(), world.look()]
    loads = world.loads
    world.broken = None
    world.now += PAUSE_S

    assert seen == [(1, False)] * 3
    assert loads == 2  # not again for each request
    assert world.look() == (2, True)


def test_an_edit_that_repairs_the_rows_is_loaded_at_once(world: World) -> None:
    world.look()
    world.broken = ValueError("a row is odd")
    world.run("UPDATE config_state SET revision = 2")
    world.look()

    world.broken = None
    world.run("UPDATE config_state SET revision = 3")

    assert world.look() == (3, True)


def test_a_locked_file_is_not_waited_for_by_every_request(world: World) -> None:
    class Locked:
        reads = 0

        def read(self) -> Mark:
            self.reads += 1
            world.now += 0.25
            raise sqlite3.OperationalError("database is locked")

        def close(self) -> None:
            raise AssertionError("nothing is open")

    locked = Locked()
    source = CheckedSource(world.holder, locked, world.load, world.record, clock=lambda: world.now)

    looks = [source.look(world.now) for _ in range(5)]
    reads = locked.reads
    world.now += PAUSE_S
    source.look(world.now)

    assert not any(one.is_verified for one in looks)
    assert (reads, locked.reads) == (1, 2)


def test_threads_that_see_an_edit_together_load_it_once(world: World) -> None:
    world.look()
    world.run("UPDATE config_state SET revision = 2")
    barrier = threading.Barrier(8)
    seen: list[tuple[int, bool]] = []

    def look() -> None:
        barrier.wait()
        seen.append(world.look())

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [(2, True)] * 8
    assert world.loads == 2

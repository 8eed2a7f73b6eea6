"""The file of SQLite: when it is made, and what happens when it is moved away or replaced."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import event, text

from gateway.cache.lazy import LazyDatabase
from gateway.config import read_settings
from gateway.errors import StoreUnavailable
from gateway.server import THREADS
from gateway.store.database import OVERFLOW, POOL, Database, open_database
from gateway.store.migration import is_current, migrate
from gateway.wsgi import prepare

SUFFIXES = ("", "-wal", "-shm")
CHANGED = text("SELECT changed_at FROM config_state")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "gateway.sqlite3"


@pytest.fixture
def running(path: Path, migrated_sqlite: Path) -> Iterator[Database]:
    """A migrated database with three connections in its pool."""
    path.parent.mkdir()
    shutil.copy(migrated_sqlite, path)
    database = open_database(f"sqlite:///{path}")
    migrate(database)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(database.reading()).execute(CHANGED)
    yield database
    database.dispose()


def _write(database: Database, word: str) -> None:
    with database.transaction() as connection:
        connection.execute(text("UPDATE config_state SET changed_at = :word"), {"word": word})


def _written(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("SELECT changed_at FROM config_state").fetchone()
    return str(found)


def _move(path: Path, to: Path) -> None:
    """With its log, as an operator should."""
    to.mkdir(exist_ok=True)
    for suffix in SUFFIXES:
        one = path.with_name(path.name + suffix)
        if one.exists():
            one.rename(to / one.name)


# --- the start --------------------------------------------------------------------------------


def test_opening_a_database_touches_nothing(path: Path) -> None:
    open_database(f"sqlite:///{path}")
    open_database("sqlite:////proc/none/gateway.sqlite3")

    assert not path.parent.exists()


def test_the_first_migration_makes_a_file_for_its_owner_only(path: Path) -> None:
    database = open_database(f"sqlite:///{path}")

    migrate(database)
    modes = {one.stat().st_mode & 0o777 for one in path.parent.iterdir()}
    database.dispose()

    assert modes == {0o600}


def test_a_start_in_a_folder_that_cannot_be_used_waits_for_it(path: Path) -> None:
    path.parent.write_text("no folder")
    settings = read_settings(
        None, {"GATEWAY_DATABASE_URL": f"sqlite:///{path}", "GATEWAY_STATE_DIR": str(path.parent)}
    )
    database = open_database(settings.database_url)

    refused = prepare(settings, database)
    path.parent.unlink()
    taken = prepare(settings, database)

    assert not refused
    assert taken
    assert is_current(database)
    database.dispose()


def test_a_folder_that_cannot_be_made_is_named_by_the_migration() -> None:
    database = open_database("sqlite:////proc/none/gateway.sqlite3")

    with pytest.raises(StoreUnavailable, match=r"/proc/none/gateway\.sqlite3 cannot be opened"):
        migrate(database)


def test_looking_whether_a_database_is_current_makes_none(path: Path) -> None:
    database = open_database(f"sqlite:///{path}")

    current = is_current(database)

    assert not current
    assert not path.parent.exists()


def test_a_database_that_could_not_be_made_is_not_said_to_come(path: Path) -> None:
    path.parent.write_text("no folder")

    with pytest.raises(StoreUnavailable, match="takes no new files"):
        is_current(open_database(f"sqlite:///{path}"))


def test_a_process_that_starts_without_the_file_makes_a_new_one(
    running: Database, path: Path, tmp_path: Path
) -> None:
    running.dispose()
    _move(path, tmp_path / "away")

    restarted = open_database(f"sqlite:///{path}")
    migrate(restarted)

    assert is_current(restarted)
    restarted.dispose()


def test_a_file_name_is_taken_as_it_is(tmp_path: Path) -> None:
    name = "50%41 #1&mode=ro ä.sqlite3"
    database = open_database(f"sqlite:///{tmp_path / name}")

    migrate(database)
    database.dispose()

    assert [one.name for one in tmp_path.iterdir()] == [name]


# --- moved away -------------------------------------------------------------------------------


def test_without_its_file_nothing_is_written_and_no_file_is_made(
    running: Database, path: Path, tmp_path: Path
) -> None:
    _move(path, tmp_path / "away")

    with pytest.raises(StoreUnavailable, match="moved away") as caught:
        _write(running, "lost")
    with pytest.raises(StoreUnavailable), running.reading():
        pass
    with pytest.raises(StoreUnavailable):
        migrate(running)

    assert caught.value.retry_after_s
    assert str(tmp_path) not in str(caught.value)
    assert list(path.parent.iterdir()) == []
    assert _written(tmp_path / "away" / path.name) != "lost"


def test_a_file_that_comes_back_is_used_again_however_often_it_was_asked_for(
    running: Database, path: Path, tmp_path: Path
) -> None:
    _move(path, tmp_path / "away")

    for _ in range(POOL + OVERFLOW + 1):
        with pytest.raises(StoreUnavailable, match="moved away"):
            _write(running, "lost")
    _move(tmp_path / "away" / path.name, path.parent)
    _write(running, "kept")

    assert _written(path) == "kept"
    assert running.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_no_connection_makes_a_file_that_never_was_there(path: Path) -> None:
    path.parent.mkdir()
    lazy = LazyDatabase(f"sqlite:///{path}")  # the cache's

    with pytest.raises(StoreUnavailable, match="no file yet"), lazy.get().reading():
        pass

    assert list(path.parent.iterdir()) == []


def test_a_file_that_goes_while_a_connection_opens_is_not_made(
    running: Database, path: Path, tmp_path: Path
) -> None:
    running.dispose()
    # Runs after the look at the file.
    event.listen(running.engine, "do_connect", lambda *_: _move(path, tmp_path / "away"))

    with pytest.raises(StoreUnavailable, match="unable to open"):
        _write(running, "lost")

    assert list(path.parent.iterdir()) == []


# --- replaced ---------------------------------------------------------------------------------


def test_after_a_restore_every_connection_works_with_the_restored_file(
    running: Database, path: Path, migrated_sqlite: Path, tmp_path: Path
) -> None:
    _write(running, "before")
    _move(path, tmp_path / "old")
    shutil.copy(migrated_sqlite, path)

    with ExitStack() as stack:
        for _ in range(3):
            reading = stack.enter_context(running.reading())
            assert reading.execute(CHANGED).scalar_one() != "before"
            assert reading.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    _write(running, "after")

    assert _written(path) == "after"
    assert _written(tmp_path / "old" / path.name) == "before"


def test_a_file_that_is_replaced_while_a_connection_opens_gets_what_is_written(
    running: Database, path: Path, migrated_sqlite: Path, tmp_path: Path
) -> None:
    running.dispose()

    def replace(*_: object) -> None:
        if not (tmp_path / "old").exists():
            _move(path, tmp_path / "old")
            shutil.copy(migrated_sqlite, path)

    event.listen(running.engine, "do_connect", replace)
    _write(running, "after")

    assert _written(path) == "after"


def test_closing_the_connections_of_the_old_file_leaves_the_new_file_its_log(
    running: Database, path: Path, migrated_sqlite: Path, tmp_path: Path
) -> None:
    _write(running, "before")
    _move(path, tmp_path / "old")
    shutil.copy(migrated_sqlite, path)
    other = open_database(f"sqlite:///{path}")
    _write(other, "after")

    with running.reading() as reading:
        seen = reading.execute(CHANGED).scalar_one()
    running.dispose()

    assert seen == "after"
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0
    _write(other, "later")
    assert _written(path) == "later"
    other.dispose()


# --- the pool ---------------------------------------------------------------------------------


def test_every_thread_of_the_server_can_have_a_connection(running: Database) -> None:
    with ExitStack() as stack:
        for _ in range(THREADS):
            stack.enter_context(running.reading())

        assert running.engine.pool.checkedout() == THREADS  # type: ignore[attr-defined]


def test_both_engines_have_a_pool_of_the_same_size(running: Database) -> None:
    # Without connecting: a server that other tests use has not as many to give.
    postgres = open_database("postgresql://someone@127.0.0.1:1/none")

    sizes = [
        (one.engine.pool.size(), one.engine.pool._max_overflow)  # type: ignore[attr-defined]
        for one in (running, postgres)
    ]

    assert sizes == [(POOL, OVERFLOW)] * 2

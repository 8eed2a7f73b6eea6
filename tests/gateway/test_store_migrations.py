"""The schema's history: up, down and up again on both engines, and nothing that tables.py lacks."""

from __future__ import annotations

import multiprocessing
import sqlite3
from multiprocessing.queues import SimpleQueue

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from gateway.errors import ConfigError, StoreUnavailable
from gateway.store.database import Database, open_database
from gateway.store.loading import read_revision
from gateway.store.migration import current_revision, downgrade, is_current, migrate
from gateway.store.tables import metadata
from tests.gateway.conftest import MakeDatabase


def _schema(database: Database) -> dict[str, str]:
    """Every object of the schema with its text, as the engine itself tells it."""
    with database.engine.connect() as connection:
        if not database.is_postgres:
            rows = connection.exec_driver_sql(
                "SELECT type || ' ' || name, sql FROM sqlite_master WHERE sql IS NOT NULL"
                " AND tbl_name <> 'alembic_version'"
            )
        else:
            rows = connection.exec_driver_sql(
                "SELECT 'constraint ' || conrelid::regclass || ' ' || conname,"
                " pg_get_constraintdef(oid) FROM pg_constraint"
                " WHERE conrelid::regclass::text <> 'alembic_version' AND contype <> 't'"
                " AND connamespace = 'public'::regnamespace"
                " UNION ALL SELECT 'index ' || indexname, indexdef FROM pg_indexes"
                " WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
                " UNION ALL SELECT 'column ' || table_name || '.' || column_name,"
                " data_type || coalesce(' ' || character_maximum_length, '') || ' ' || is_nullable"
                " || coalesce(' ' || column_default, '') FROM information_schema.columns"
                " WHERE table_schema = 'public' AND table_name <> 'alembic_version'"
                " AND table_name NOT IN (SELECT viewname FROM pg_views)"
                " UNION ALL SELECT 'trigger ' || tgname, pg_get_triggerdef(oid) FROM pg_trigger"
                " WHERE NOT tgisinternal"
                " UNION ALL SELECT 'function ' || proname, prosrc FROM pg_proc"
                " WHERE pronamespace = 'public'::regnamespace"
                " UNION ALL SELECT 'view ' || viewname, definition FROM pg_views"
                " WHERE schemaname = 'public'"
            )
        return {name: " ".join(text.split()) for name, text in rows}


def test_the_migrated_schema_is_the_one_of_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})

        drift = compare_metadata(context, metadata)

    assert drift == []


def test_every_constraint_and_default_is_the_one_of_tables(
    database: Database, make_database: MakeDatabase, engine_name: str
) -> None:
    plain = make_database(engine_name, "blank")
    metadata.create_all(plain.engine)

    migrated = {
        name: text
        for name, text in _schema(database).items()
        if name.split()[0] not in ("trigger", "function", "view")
    }

    assert migrated == _schema(plain)


def test_up_down_and_up_gives_the_same_schema(blank_database: Database) -> None:
    migrate(blank_database)
    first = _schema(blank_database)

    downgrade(blank_database, "base")
    left = _schema(blank_database)
    names = inspect(blank_database.engine).get_table_names()
    migrate(blank_database)

    assert left == {}
    assert names == ["alembic_version"]
    assert _schema(blank_database) == first
    assert len([name for name in first if name.startswith("trigger")]) >= 18


def test_a_second_migration_changes_nothing(database: Database) -> None:
    before = _schema(database)

    migrate(database)

    assert _schema(database) == before
    assert is_current(database)
    with database.reading() as connection:
        assert read_revision(connection) == 1


def test_a_database_without_tables_is_not_current_and_says_what_to_do(
    blank_database: Database,
) -> None:
    assert not is_current(blank_database)

    with (
        pytest.raises(StoreUnavailable, match="migrations first"),
        blank_database.reading() as connection,
    ):
        read_revision(connection)


def test_a_database_of_a_newer_program_is_refused(database: Database) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(ConfigError, match="9999"):
        migrate(database)


def test_a_migration_that_fails_leaves_nothing_behind(
    blank_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.migrations import initial_postgresql, initial_sqlite

    for module in (initial_postgresql, initial_sqlite):
        monkeypatch.setattr(module, "UP", [*module.UP, "SELECT no_such_column"])

    with pytest.raises(Exception, match="no_such_column"):
        migrate(blank_database)

    assert inspect(blank_database.engine).get_table_names() == []


def _migrate_in_a_process(url: str, answers: SimpleQueue[str]) -> None:
    try:
        database = open_database(url)
        migrate(database)
        with database.reading() as connection:
            answers.put(str(current_revision(connection)))
        database.dispose()
    except Exception as exc:
        answers.put(repr(exc))


def test_processes_that_migrate_at_once_all_find_the_newest_schema(
    blank_database: Database,
) -> None:
    url = blank_database.engine.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")
    answers: SimpleQueue[str] = spawn.SimpleQueue()
    processes = [spawn.Process(target=_migrate_in_a_process, args=(url, answers)) for _ in range(3)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    with blank_database.reading() as connection:
        newest = str(current_revision(connection))
    assert [answers.get() for _ in processes] == [newest] * 3
    assert is_current(blank_database)


def test_plain_drivers_open_the_migrated_database(database: Database) -> None:
    url = database.engine.url
    connection: sqlite3.Connection | psycopg.Connection
    if database.is_postgres:
        connection = psycopg.connect(
            url.set(drivername="postgresql").render_as_string(hide_password=False)
        )
    else:
        connection = sqlite3.connect(str(url.database))

    rows = connection.execute("SELECT revision FROM config_state").fetchall()
    connection.close()

    assert rows == [(1,)]

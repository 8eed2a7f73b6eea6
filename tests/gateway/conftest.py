"""Databases of the gateway's tests. Each test that asks for `database` runs on both engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.store.database import Database, open_database
from gateway.store.migration import migrate
from tests.gateway.postgres import Server, find_server
from tests.gateway.store_rows import fill

NO_SERVER = (
    "NO POSTGRESQL: the gateway's store is tested on SQLite only. Set TEST_POSTGRES_URL or install "
    "a server (initdb and pg_ctl)."
)
_skipped: set[str] = set()

MakeDatabase = Callable[..., Database]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server; tests that need it are skipped where there is none."""
    with find_server() as server:
        if server is None:
            _skipped.add("postgres")
            pytest.skip(NO_SERVER)
        yield server


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Server) -> Iterator[str]:
    """Name of a migrated database that nobody is connected to; others are copied from it."""
    name = postgres.create()
    database = open_database(postgres.url_of(name))
    migrate(database)
    database.dispose()
    yield name
    postgres.drop(name)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file that nobody has open; others are copied from it."""
    path = tmp_path_factory.mktemp("migrated") / "gateway.sqlite3"
    database = open_database(f"sqlite:///{path}")
    migrate(database)
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.dispose()
    return path


@pytest.fixture(scope="session")
def filled_postgres(postgres: Server, migrated_postgres: str) -> Iterator[str]:
    """As migrated_postgres, with the rows of tests/gateway/store_rows.py."""
    name = postgres.create(migrated_postgres)
    database = fill(open_database(postgres.url_of(name)))
    database.dispose()
    yield name
    postgres.drop(name)


@pytest.fixture(scope="session")
def filled_sqlite(migrated_sqlite: Path) -> Path:
    path = migrated_sqlite.with_name("filled.sqlite3")
    shutil.copy(migrated_sqlite, path)
    database = fill(open_database(f"sqlite:///{path}"))
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.dispose()
    return path


@pytest.fixture
def make_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeDatabase]:
    """Makes databases: `make_database("sqlite", "filled")`; or "migrated", or "blank"."""
    opened: list[tuple[Database, str | None]] = []

    def make(engine: str, state: str = "migrated") -> Database:
        if engine == "sqlite":
            path = tmp_path / f"{len(opened)}.sqlite3"
            if state != "blank":
                shutil.copy(request.getfixturevalue(f"{state}_sqlite"), path)
            database, name = open_database(f"sqlite:///{path}"), None
            database.make()
        else:
            server: Server = request.getfixturevalue("postgres")
            template = None if state == "blank" else request.getfixturevalue(f"{state}_postgres")
            name = server.create(template)
            database = open_database(server.url_of(name))
        opened.append((database, name))
        return database

    yield make
    for database, name in opened:
        database.dispose()
        if name is not None:
            request.getfixturevalue("postgres").drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(engine_name: str, make_database: MakeDatabase) -> Database:
    """A migrated, empty database of this test alone."""
    return make_database(engine_name)


@pytest.fixture
def blank_database(engine_name: str, make_database: MakeDatabase) -> Database:
    """A database without tables."""
    return make_database(engine_name, "blank")


@pytest.fixture
def filled(engine_name: str, make_database: MakeDatabase) -> Database:
    """A database with the rows of tests/gateway/store_rows.py."""
    return make_database(engine_name, "filled")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.write_line(NO_SERVER, red=True, bold=True)

"""Opening the database, and its transactions.

A connection's errors become StoreUnavailable here, once, with the kind of the error and never with
a statement, its values or the URL. What breaks a rule of the schema stays an IntegrityError of
SQLAlchemy; gateway/store/editing.py turns it into a Conflict.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gateway.errors import ConfigError, StoreUnavailable
from gateway.store.canonical import canonical_json
from gateway.store.sqlite_file import SqliteFile

BUSY_MS = 5000  # how long a writer waits for another one
STATEMENT_MS = 15_000
IDLE_IN_TRANSACTION_MS = 60_000
POOL = 8  # connections that stay open, in each process
# More of them under load: one for each of the 64 threads of gateway/server.py and for the loops
# beside them, so that writers that wait for a lock keep no reader out. A PostgreSQL server for
# several replicas needs as many (max_connections); what it refuses is StoreUnavailable.
OVERFLOW = 64
POOL_WAIT_S = 5.0
RETRY_AFTER_S = 2.0

_WRITES = "gateway_writes"


class Database:
    """An engine with the gateway's transactions. Safe for threads; not for forks: open it after."""

    def __init__(self, engine: Engine, file: SqliteFile | None = None):
        self.engine = engine
        self._file = file  # None: PostgreSQL

    def __repr__(self) -> str:
        return f"Database({self.engine.url.render_as_string(hide_password=True)})"

    @property
    def is_postgres(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    def make(self) -> None:
        """Make SQLite's file and folder, unless this object ever found one: a file that was moved
        away stays missing. migrate calls this; connections make no file. Raises StoreUnavailable.
        """
        if self._file is not None:
            self._file.make()

    def is_made(self) -> bool:
        """False: `make` comes first. Raises StoreUnavailable where that could not write."""
        return self._file is None or self._file.is_made()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end, rolled back by an exception.

        SQLite has one writer, and the lock is taken at the begin: a reader that became a writer
        later could be refused without a wait (SQLITE_BUSY_SNAPSHOT).
        """
        with self._connect(**{_WRITES: True}) as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent, read-only view of everything, however many statements read it."""
        with self._connect() as connection, connection.begin():
            begin_consistent_read(connection)
            yield connection

    @contextmanager
    def _connect(self, **options: Any) -> Iterator[Connection]:
        try:
            connection = self.engine.connect()
        except PoolTimeout as exc:
            raise StoreUnavailable(
                f"All {POOL + OVERFLOW} database connections are in use for {POOL_WAIT_S:g} s; "
                "try again",
                retry_after_s=RETRY_AFTER_S,
            ) from exc
        with connection:
            yield connection.execution_options(**options)

    def dispose(self) -> None:
        """Close the connections that are not in use."""
        self.engine.dispose()


def begin_consistent_read(connection: Connection) -> None:
    """Make the transaction that has just begun read one state; first statement of it."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def open_database(url: str) -> Database:
    """The database of a SQLAlchemy URL; `sqlite:///path` or `postgresql://…`.

    Connects to nothing and does not touch the disk: migrate makes SQLite's file and the tables.
    Raises ConfigError for other URLs.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        # The text may hold a password, and so may the library's message.
        raise ConfigError(
            "GATEWAY_DATABASE_URL is no URL of SQLAlchemy's form: sqlite:///FILE or "
            "postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from exc
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _open_sqlite(parsed)
    if backend in ("postgresql", "postgres"):
        return Database(_open_postgres(parsed))
    raise ConfigError(f"the database is {backend}; the gateway takes sqlite and postgresql")


# --- SQLite -----------------------------------------------------------------------------------


def _open_sqlite(url: URL) -> Database:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ConfigError("the SQLite database needs a file: sqlite:///relative or sqlite:////full")
    file = SqliteFile(url.database)
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"),
        pool_size=POOL,
        max_overflow=OVERFLOW,
        pool_timeout=POOL_WAIT_S,
        json_serializer=_json_text,
        hide_parameters=True,
    )
    file.guard(engine)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "handle_error", _translate)
    return Database(engine, file)


def _json_text(value: Any) -> str:
    # One spelling, so that plain SQL can compare two versions of a template.
    return canonical_json(value).decode()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the module's own BEGIN comes too late; _begin_sqlite's
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            _switch_to_wal(cursor)
        cursor.execute("PRAGMA foreign_keys = ON")
        # With WAL, NORMAL cannot corrupt the file; a power cut may take the last commits back,
        # never a part of one. Each commit would else wait for the disk.
        cursor.execute("PRAGMA synchronous = NORMAL")
    finally:
        cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    # The switch does not wait for locks by itself where two processes open a new file at once.
    for attempt in range(50):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except Exception as exc:
            if "locked" not in str(exc) or attempt == 49:
                raise
            time.sleep(0.1)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# --- PostgreSQL -------------------------------------------------------------------------------


def _open_postgres(url: URL) -> Engine:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=POOL,
        max_overflow=OVERFLOW,
        pool_timeout=POOL_WAIT_S,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={"connect_timeout": 5, "application_name": "gateway"},
        json_serializer=_json_text,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _prepare_postgres)
    event.listen(engine, "handle_error", _translate)
    return engine


def _prepare_postgres(connection: Any, _record: Any) -> None:
    # Not as startup options: poolers refuse those.
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {STATEMENT_MS}")
        cursor.execute(f"SET lock_timeout = {BUSY_MS}")
        cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}")
    connection.commit()


# --- errors -----------------------------------------------------------------------------------


def _translate(context: ExceptionContext) -> None:
    if context.is_pre_ping:
        return  # the pool opens a new connection by itself
    error = context.sqlalchemy_exception
    if isinstance(error, IntegrityError) or not isinstance(error, DatabaseError | InterfaceError):
        return
    original = context.original_exception
    state = getattr(original, "sqlstate", None) or ""
    text = str(original)
    if "no such table" in text or state == "42P01":
        raise StoreUnavailable(
            "The database has not the gateway's tables; run its migrations first"
        ) from original
    lost = context.is_disconnect or isinstance(error, OperationalError | InterfaceError)
    # A full disk or a read-only file is an error of another class in each driver.
    if not lost and (isinstance(error, ProgrammingError) or not _is_machine(state, text)):
        return
    kind = state or (text if context.dialect.name == "sqlite" else type(original).__name__)
    raise StoreUnavailable(
        f"The database does not do what it should ({context.dialect.name}: {kind}); try again",
        retry_after_s=RETRY_AFTER_S,
    ) from original


def _is_machine(state: str, text: str) -> bool:
    # PostgreSQL: 25006 read-only, 53… resources, 57… operator, 58… system, XX… internal.
    return (
        state == "25006"
        or state[:2] in ("53", "57", "58", "XX")
        or ("malformed" in text or "not a database" in text)
    )

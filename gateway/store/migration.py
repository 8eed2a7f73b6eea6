"""Bringing a database to a revision of the schema. Several replicas may try at once.

All of it is one transaction: a migration that fails leaves the schema as it was. One process
migrates; the others wait for it and then find nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

import gateway
from gateway.errors import ConfigError
from gateway.store.database import Database

MIGRATIONS = Path(gateway.__file__).parent / "migrations"
LOCK = 0x6761_7465  # "gate": key of the advisory lock
WAIT_MS = 120_000  # for another process that migrates, and for one statement of a migration


def migrate(database: Database, revision: str = "head") -> None:
    """Upgrade to `revision`; first makes the file of SQLite, where there never was one. Raises
    ConfigError where the database is of a newer program, StoreUnavailable without a database."""
    database.make()
    with _migrating(database) as connection:
        current = current_revision(connection)
        known = {script.revision for script in _scripts().walk_revisions()}
        if current is not None and current not in known:
            raise ConfigError(
                f"the database has schema revision {current}, which this program does not know; "
                f"its newest is {_scripts().get_current_head()}: use the newer program"
            )
        command.upgrade(_config(connection), revision)


def downgrade(database: Database, revision: str) -> None:
    """Take the schema back to `revision`, or to nothing with "base". Data of what goes is lost."""
    with _migrating(database) as connection:
        command.downgrade(_config(connection), revision)


def is_current(database: Database) -> bool:
    """Whether the schema is the newest this program knows. Makes nothing."""
    if not database.is_made():
        return False
    with database.reading() as connection:
        return current_revision(connection) == _scripts().get_current_head()


def current_revision(connection: Connection) -> str | None:
    """The schema's revision; None: nothing was migrated yet."""
    return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def _migrating(database: Database) -> Iterator[Connection]:
    # SQLite's lock is the writing transaction itself.
    with database.transaction() as connection:
        if database.is_postgres:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {WAIT_MS}")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {WAIT_MS}")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        yield connection


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))


def _config(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config

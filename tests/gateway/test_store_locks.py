"""Locks that SQLite has on its files; a descriptor closed anywhere in the process drops them."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from sqlalchemy import text

from gateway.store.database import open_database
from gateway.store.migration import migrate

LOOK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT revision FROM config_state").fetchone()[0])
connection.close()
"""


def test_opening_the_database_again_leaves_the_log_to_the_connections_that_use_it(
    tmp_path: Path,
) -> None:
    """A command beside a running gateway took the write-ahead log away, and the gateway fell to
    level 1 with "disk I/O error": opening the database a second time had closed a descriptor of
    the file, and with it dropped the locks of all connections."""
    path = tmp_path / "gateway.sqlite3"
    first = open_database(f"sqlite:///{path}")
    migrate(first)
    with closing(sqlite3.connect(path)) as kept:
        kept.execute("SELECT revision FROM config_state").fetchall()
        second = open_database(f"sqlite:///{path}")

        done = subprocess.run(
            [sys.executable, "-c", LOOK, str(path)], capture_output=True, text=True, check=True
        )

        assert int(done.stdout) >= 1
        assert path.with_name("gateway.sqlite3-wal").exists()
        with second.transaction() as connection:
            connection.execute(text("UPDATE config_state SET revision = revision + 1"))
        (seen,) = kept.execute("SELECT revision FROM config_state").fetchone()
        assert seen == int(done.stdout) + 1
    first.dispose()
    second.dispose()

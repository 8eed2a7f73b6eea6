"""The mark of a SQLite database, in a few microseconds: a kept connection for each thread."""

from __future__ import annotations

import os
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from gateway.cache.holder import Mark

MARK = "SELECT revision, changed_at FROM config_state WHERE id = 1"
BUSY_S = 0.25  # a reader waits only while a journal is rolled back or the file is locked as a whole


@dataclass(frozen=True, slots=True)
class _Kept:
    connection: sqlite3.Connection
    file: tuple[int, int]


class SqliteMarks:
    """Reads marks. Any thread; each has its own connection. Made after a fork: SQLite's
    connections must not be carried over one."""

    def __init__(self, path: Path):
        self._path = path
        self._local = threading.local()

    def read(self) -> Mark:
        """Raises OSError where the file is gone, sqlite3.Error where it cannot be read."""
        # An open connection goes on reading a file that was moved away or replaced.
        found = os.stat(self._path)
        file = (found.st_dev, found.st_ino)
        kept: _Kept | None = getattr(self._local, "kept", None)
        if kept is None or kept.file != file:
            kept = self._open(file)
        try:
            rows = kept.connection.execute(MARK).fetchall()
        except sqlite3.Error:
            self.close()
            raise
        if not rows:
            raise sqlite3.DatabaseError("config_state has no row: the database is not migrated")
        revision, changed_at = rows[0]
        return Mark(f"{file[0]}:{file[1]}", int(revision), str(changed_at))

    def close(self) -> None:
        """Close this thread's connection. Those of other threads close when their thread ends."""
        kept: _Kept | None = getattr(self._local, "kept", None)
        self._local.kept = None
        if kept is not None:
            kept.connection.close()

    def _open(self, file: tuple[int, int]) -> _Kept:
        self.close()
        # mode=rw: a missing file is an error here and never an empty new database.
        connection = sqlite3.connect(
            f"{self._path.resolve().as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
        )
        kept = _Kept(connection, file)
        self._local.kept = kept
        return kept

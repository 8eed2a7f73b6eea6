"""The journal's SQLite file: who opens it, how it is written, what is said when it fails."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.errors import JournalUnavailable
from worker.jobs.bell import Bell
from worker.jobs.schema import migrate

JOBS_FOLDER = "jobs"  # in the state folder
LOCK_S = 10.0  # how long a write waits for another process's
SWITCH_RETRY_S = 0.02


class Database:
    """Two connections, each under its lock: a reader never waits for another thread's fsync.

    Any thread; several processes may have one each on the same file.
    """

    def __init__(self, path: Path, bell: Bell):
        """path: its folder is for the database alone and is made, for this user only, at the first
        use. bell: rung after every change."""
        self._path = path
        self._bell = bell
        self._locks = {"read": threading.RLock(), "write": threading.RLock()}
        self._connections: dict[str, sqlite3.Connection] = {}

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._locks["read"], self._explained():
            yield self._connection("read")

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on the disk when the block ends, undone when it raises."""
        with self._locks["write"], self._explained():
            database = self._connection("write")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
        self._bell.ring()

    def check(self) -> None:
        """Look whether it is whole. Raises JournalUnavailable with what to do."""
        with self.reading() as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise JournalUnavailable(
                f"the journal of jobs ({JOBS_FOLDER}/{self._path.name} in the state folder) is "
                f"damaged ({verdict}); stop the daemon, keep a copy, and try: sqlite3 "
                f"{self._path.name} .recover, or move it away to begin a new one"
            )

    def close(self) -> None:
        for lock in self._locks.values():
            lock.acquire()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        for lock in self._locks.values():
            lock.release()

    def _connection(self, name: str) -> sqlite3.Connection:
        if name not in self._connections:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._create()
            database = sqlite3.connect(
                self._path, timeout=LOCK_S, isolation_level=None, check_same_thread=False
            )
            try:
                database.row_factory = sqlite3.Row
                _write_ahead(database)
                database.execute("PRAGMA synchronous = FULL")
                database.execute("PRAGMA foreign_keys = ON")
                migrate(database)
            except BaseException:
                database.close()
                raise
            self._connections[name] = database
        return self._connections[name]

    def _create(self) -> None:
        """Make the file for this user only: bodies and secrets of webhooks are in it. SQLite gives
        its other files the same mode.

        One that is there is left closed: to close a file gives up every lock that this process
        holds on it (POSIX), and then another process, ending, would take itself for the last one
        and remove the log that this one still writes to.
        """
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            return

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            raise JournalUnavailable(
                f"the journal of jobs ({JOBS_FOLDER}/{self._path.name} in the state folder) cannot "
                f"be used ({_reason(exc)}); {_cure(exc)}",
                retry_after_s=5,
            ) from exc


def _write_ahead(database: sqlite3.Connection) -> None:
    """SQLite does not wait for locks when a file changes to WAL: of two that open a new one at
    once, be they threads or processes, one is told at once that it is locked."""
    give_up_at = time.monotonic() + LOCK_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
        time.sleep(SWITCH_RETRY_S)


_AS_SQLITE_SAYS: dict[int | None, int] = {
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EDQUOT: sqlite3.SQLITE_FULL,
    errno.EACCES: sqlite3.SQLITE_PERM,
    errno.EPERM: sqlite3.SQLITE_PERM,
    errno.EROFS: sqlite3.SQLITE_READONLY,
}


def _reason(exc: Exception) -> str:
    """Without paths, which are nobody's business who asks over HTTP."""
    return (exc.strerror or "no access") if isinstance(exc, OSError) else str(exc)


def _cure(exc: Exception) -> str:
    code = getattr(exc, "sqlite_errorcode", None)
    match code & 0xFF if code is not None else _AS_SQLITE_SAYS.get(getattr(exc, "errno", None)):
        case sqlite3.SQLITE_FULL:
            return "its disk is full: make room there, nothing that was accepted is lost"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "its folder must be writable for the daemon's user"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                "it is damaged: stop the daemon, keep a copy, recover it with sqlite3's .recover "
                "or move it away to begin a new one"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "something else holds it; try again"
    return "look at its disk and at the folder's permissions"

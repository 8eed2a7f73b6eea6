"""The source on SQLite: every request compares the mark and loads when it differs. Staleness is 0:
what was committed before a request began is in its answer."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Protocol

from gateway.cache.holder import Holder, Mark
from gateway.cache.record import LOAD_FAILED, Record
from gateway.cache.source import Load, Look, load_marked, serve
from gateway.errors import GatewayError

SLOW_S = 0.05  # a failure that took longer (a locked file) is not tried again by every request
PAUSE_S = 1.0  # but only after this time


class Marks(Protocol):
    """SqliteMarks: raises OSError or sqlite3.Error."""

    def read(self) -> Mark: ...

    def close(self) -> None: ...


class CheckedSource:
    """Reads by any thread; `_lock` is held while one of them loads, and the others wait for it."""

    retry_s = 0.02

    def __init__(
        self,
        holder: Holder,
        marks: Marks,
        load: Load,
        record: Record,
        *,
        reset: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """reset: drops the connections that `load` keeps open."""
        self._holder = holder
        self._marks = marks
        self._load = load
        self._record = record
        self._reset = reset
        self._clock = clock
        self._lock = threading.Lock()
        self._not_before = 0.0  # no look at the file before; after a slow failure
        self._bad: Mark | None = None  # its rows could not be read
        self._bad_until = 0.0

    def start(self) -> None:
        self.look(self._clock())

    def look(self, now: float) -> Look:
        if now < self._not_before:
            return Look(self._holder.state, is_verified=False)
        try:
            return self._compare(now)
        except (OSError, sqlite3.Error) as exc:
            self._record.fault("reading the revision", exc)
        if self._clock() - now > SLOW_S:
            self._not_before = self._clock() + PAUSE_S
        return Look(self._holder.state, is_verified=False)

    def wake(self) -> None:
        """Nothing to do: the next request looks by itself."""

    def stop(self) -> None:
        self._marks.close()

    def _compare(self, now: float) -> Look:
        mark = self._marks.read()
        self._record.fine("reading the revision")
        state = self._holder.state
        if state.mark is not None and state.mark.agrees(mark):
            self._holder.verify(state, now, mark)
            return Look(state, is_verified=True)
        with self._lock:
            return self._reload()

    def _reload(self) -> Look:
        # Another thread may have loaded, or the database moved on, while this one waited.
        now = self._clock()
        mark = self._marks.read()
        state = self._holder.state
        if state.mark is not None and state.mark.agrees(mark):
            self._holder.verify(state, now, mark)
            return Look(state, is_verified=True)
        if mark == self._bad and now < self._bad_until:
            return Look(state, is_verified=False)
        if state.mark is None or state.mark.database != mark.database:
            self._reset()  # kept connections would go on reading the file that was there before
        try:
            snapshot, mark = load_marked(self._marks.read, self._load)
        except Exception as exc:
            # Whatever a row or the disk did: what is held is served, flagged, and tried again.
            is_ours = isinstance(exc, GatewayError)
            self._record.fault("loading the configuration", exc, traceback=not is_ours)
            self._record.count(LOAD_FAILED, mark.revision)
            self._bad, self._bad_until = mark, now + PAUSE_S
            return Look(state, is_verified=False)
        self._record.fine("loading the configuration")
        state = serve(self._holder, self._record, snapshot, mark, now)
        return Look(state, is_verified=True, loaded=True)

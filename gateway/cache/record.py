"""What happened to the cache: counters, the last error, and one log line per change of state."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger(__name__)

# Names of events; the second argument of an observer is the revision that was reached, where the
# event has one.
LOADED, LOAD_FAILED = "loaded", "load_failed"  # a configuration was swapped in, or could not be
CONNECTED, DISCONNECTED = "connected", "disconnected"  # the listening connection
NOTIFIED = "notified"
RESTORED = "restored"  # the database went back to an older revision
SAVED, SAVE_FAILED = "saved", "save_failed"  # snapshot.json
LEVEL = ("level_0", "level_1", "level_2")  # the level changed to this one

Observer = Callable[[str, int | None], None]


def ignore(event: str, revision: int | None) -> None:
    """The observer that nobody asked for."""


class Record:
    """Written by every thread of the cache, under `_lock`. An observer must be quick and must not
    raise: it is called where the event happens."""

    def __init__(self, observe: Observer = ignore):
        self._observe = observe
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._open: dict[str, str] = {}  # what is failing now → how
        self._last_error: dict[str, Any] | None = None

    def count(self, event: str, revision: int | None = None) -> None:
        with self._lock:
            self._counts[event] += 1
        self._observe(event, revision)

    def fault(self, what: str, error: Exception, *, traceback: bool = False) -> None:
        """`what` failed. Logged when it begins and when its reason changes, not each time."""
        text = describe(error)
        with self._lock:
            is_new = self._open.get(what) != text
            self._open[what] = text
            at = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
            self._last_error = {"at": at, "what": what, "error": text}
        if is_new:
            logger.error("%s fails: %s", what, text, exc_info=error if traceback else None)

    def fine(self, what: str) -> None:
        """`what` works. Logged once after a fault."""
        if what not in self._open:  # read without the lock: this is on the path of every request
            return
        with self._lock:
            was_open = self._open.pop(what, None)
        if was_open is not None:
            logger.info("%s works again", what)

    def status(self) -> dict[str, Any]:
        with self._lock:
            return {
                "counts": dict(sorted(self._counts.items())),
                "failing": dict(sorted(self._open.items())),
                "last_error": dict(self._last_error) if self._last_error else None,
            }


def describe(error: BaseException) -> str:
    """Type and first line; statements and parameters, which SQLAlchemy adds, may hold texts."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__

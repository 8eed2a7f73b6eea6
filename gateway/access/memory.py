"""What was read lately, so that callers are known while the database is away.

Prompts are served from memory or disk when the database is gone. That would be worth nothing if
the key of the caller could not be checked, so rows that were seen are kept and used until it is
back. A row is read again after FRESH_S: so long another process's revocation may go unseen.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from gateway.errors import StoreUnavailable

log = logging.getLogger(__name__)

FRESH_S = 5.0
RETRY_S = 2.0  # after a failure; so at most one request in that time waits for a dead database
KEEP_S = 86_400.0  # a row that was not confirmed for so long is used no more
MAX_ROWS = 4096
_NEVER = float("-inf")

Row = TypeVar("Row")


class Memory(Generic[Row]):
    """Rows by key, the least recently used ones going first. Any thread; its lock owns the dict."""

    def __init__(self, what: str) -> None:
        """what: the name of the rows in log lines."""
        self._what = what
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, tuple[Row, float]] = OrderedDict()  # row, when it was read
        self._retry_at = _NEVER

    def find(self, key: str, read: Callable[[], Row | None], now: float) -> Row | None:
        """The row of `key`: remembered, or by `read`, which raises StoreUnavailable without a
        database; then the remembered row counts. None: there is none. Raises StoreUnavailable
        where none is remembered either. now: monotonic seconds."""
        with self._lock:
            held = self._rows.get(key)
            is_away = now < self._retry_at
            if not is_away and self._retry_at > _NEVER:
                self._retry_at = now + RETRY_S  # this thread tries, the others go on without
        if held is not None and now - held[1] < FRESH_S:
            return held[0]
        if is_away:
            return self._last_known(held, now, None)
        try:
            row = read()
        except StoreUnavailable as exc:
            with self._lock:
                self._retry_at = now + RETRY_S
            log.warning("%s cannot be read; those seen before are used: %s", self._what, exc)
            return self._last_known(held, now, exc)
        with self._lock:
            self._retry_at = _NEVER
        if row is None:
            self.forget(key)  # not remembered: anybody can send keys that do not exist
        else:
            self.put(key, row, now)
        return row

    def put(self, key: str, row: Row, now: float) -> None:
        with self._lock:
            self._rows[key] = (row, now)
            self._rows.move_to_end(key)
            while len(self._rows) > MAX_ROWS:
                self._rows.popitem(last=False)

    def amend(self, key: str, row: Row) -> None:
        """Replace what is remembered, which gets no fresher by that."""
        with self._lock:
            held = self._rows.get(key)
            if held is not None:
                self._rows[key] = (row, held[1])

    def forget(self, key: str) -> None:
        """Read it again at its next use; called after an edit in this process."""
        with self._lock:
            self._rows.pop(key, None)

    def _last_known(
        self, held: tuple[Row, float] | None, now: float, cause: Exception | None
    ) -> Row:
        if held is None or now - held[1] > KEEP_S:
            raise StoreUnavailable(
                f"{self._what} cannot be read from the database", retry_after_s=RETRY_S
            ) from cause
        return held[0]

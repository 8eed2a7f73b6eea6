"""How many requests may be on their way to an engine, and when the next one may come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from worker.errors import Busy

# Requests that wait for an engine without being generations (render, load, unload), per route.
MAX_ASKING = 4


class Admission:
    """A bounded number of places. Any thread; the lock guards two numbers."""

    class Slot:
        """One place, taken until `leave`."""

        def __init__(self, owner: Admission):
            self._owner = owner
            self._since = time.monotonic()
            self._left = False

        def leave(self, *, served: bool) -> None:
            """Free the place once; `served` requests teach how long one takes."""
            if not self._left:
                self._left = True
                self._owner._leave(time.monotonic() - self._since if served else None)

    def __init__(self, places: int):
        self._places = places
        self._lock = threading.Lock()
        self._taken = 0
        self._last_leave = time.monotonic()
        self._between_s = 2.0  # moving average between two answers; a guess until the first

    @property
    def taken(self) -> int:
        return self._taken

    def enter(self, free_in_s: float | None = None) -> Slot:
        """Take a place. Raises Busy with when one should be free.

        free_in_s: when the caller expects it; None: as long as it took of late between two answers.
        """
        with self._lock:
            if self._taken >= self._places:
                raise Busy(
                    f"{self._taken} requests are running or waiting, at most {self._places} may",
                    retry_after_s=self._between_s if free_in_s is None else free_in_s,
                )
            self._taken += 1
        return Admission.Slot(self)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for the length of a block. Raises Busy."""
        slot = self.enter()
        try:
            yield
        finally:
            slot.leave(served=False)

    def _leave(self, served_s: float | None) -> None:
        now = time.monotonic()
        with self._lock:
            self._taken -= 1
            if served_s is not None:
                self._between_s += 0.3 * (min(served_s, now - self._last_leave) - self._between_s)
                self._last_leave = now

"""Wakes whoever waits for something about jobs to change."""

from __future__ import annotations

import threading


class Bell:
    """A count of changes that threads can wait on. Any thread."""

    def __init__(self) -> None:
        self._rung = threading.Condition()
        self._count = 0

    def ring(self) -> None:
        with self._rung:
            self._count += 1
            self._rung.notify_all()

    def wait(self, seen: int, timeout_s: float) -> int:
        """Wait until it was rung after count `seen`; returns the count now."""
        with self._rung:
            self._rung.wait_for(lambda: self._count != seen, timeout_s)
            return self._count

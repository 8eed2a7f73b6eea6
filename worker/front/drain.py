"""Whether this front still takes new work. Changed by the control thread, read by all."""

from __future__ import annotations

import time

from worker.errors import Draining


class Drainer:
    """One flag and when it was set; only `begin` changes them."""

    def __init__(self) -> None:
        self._ends: float | None = None

    @property
    def draining(self) -> bool:
        return self._ends is not None

    @property
    def retry_after_s(self) -> float:
        """Seconds until this process is gone and another may answer on the port."""
        return 1.0 if self._ends is None else max(1.0, self._ends - time.monotonic())

    def begin(self, grace_s: float) -> None:
        if self._ends is None:
            self._ends = time.monotonic() + grace_s

    def refuse_new_work(self) -> None:
        """Raise Draining once draining has begun."""
        if self.draining:
            raise Draining(
                "the daemon is stopping and takes no new work", retry_after_s=self.retry_after_s
            )

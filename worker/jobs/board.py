"""Where running jobs are: what is too quick and too small for the journal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from worker.jobs.bell import Bell
from worker.protocol.messages import JobNews


@dataclass(frozen=True, slots=True)
class Live:
    """One running job at one moment."""

    phase: str
    step: int = 0
    steps: int = 0
    left_s: float | None = None  # until its files are there, as far as is known
    image: int = 0  # which of its pictures is being made
    preview: bytes = b""  # the last one, WebP; empty: there was none yet
    previews: int = 0  # how many there were


class Board:
    """The last word of every running job. Any thread; the lock is held for dictionary work only.

    The runner process writes it and tells every front, whose own board repeats it.
    """

    def __init__(self, bell: Bell, tell: Callable[[JobNews], None] = lambda news: None):
        self._bell = bell
        self._tell = tell
        self._lock = threading.Lock()
        self._live: dict[str, Live] = {}

    def get(self, job_id: str) -> Live | None:
        with self._lock:
            return self._live.get(job_id)

    def take(self, news: JobNews) -> None:
        """What happened to a job; without a phase, it runs no more and its row has changed."""
        with self._lock:
            before = self._live.get(news.request_id, Live(""))
            if news.phase is None:
                self._live.pop(news.request_id, None)
            else:
                self._live[news.request_id] = replace(
                    before,
                    phase=news.phase,
                    step=news.step,
                    steps=news.steps,
                    left_s=news.left_s,
                    image=news.image,
                    preview=news.preview or before.preview,
                    previews=before.previews + bool(news.preview),
                )
        self._bell.ring()
        self._tell(news)

    def clear(self) -> None:
        """The runner is gone; nothing is known of running jobs."""
        with self._lock:
            self._live.clear()
        self._bell.ring()

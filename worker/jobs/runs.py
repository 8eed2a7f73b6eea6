"""The jobs that are under way, and which of them has the engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from enum import Enum

from worker.jobs.job import Job

FETCHING, READY, RENDERING, SAVING = "fetching", "ready", "rendering", "saving"
BEFORE_RENDER = (FETCHING, READY)


class Turn(Enum):
    """What a job that is ready for the engine is told."""

    NOW = "now"
    LATER = "later"
    CANCELLED = "cancelled"
    """It is not to be rendered any more."""
    NOT_HERE = "not here"
    """The runner drains, and begins no render."""


class Run:
    """One job that is under way, on a thread of its own. `Runs` changes it; `job` and `was_sent`
    are its thread's."""

    def __init__(self, job: Job):
        self.job = job
        has_pictures = job.request is not None and bool(job.request.references)
        self.stage = FETCHING if has_pictures else READY
        self.cancelled = False
        self.has_company = False  # another one was rendered while its files were written
        self.companions: list[Run] = []  # that share its batch, if they are there in time
        self.leader: Run | None = None  # whose batch it shares; None once that is not to be
        self.was_sent = threading.Event()  # to the engine, or never will be


class Runs:
    """Every run, in the order in which they began, and what they are all to do. Any thread; runs
    change under the lock, which is held for nothing but that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self.draining = False  # no render is begun any more
        self.stopping = False  # nothing goes on; the process ends

    def __len__(self) -> int:
        with self._lock:
            return len(self._runs)

    def stages(self) -> dict[str, str]:
        """Where each job is, by its id."""
        with self._lock:
            return {job_id: run.stage for job_id, run in self._runs.items()}

    def add(self, leader: Run, companions: Sequence[Run]) -> None:
        """Runs that begin, the leader of a batch before those that share it."""
        with self._lock:
            leader.companions = list(companions)
            for one in companions:
                one.leader = leader
            self._runs |= {one.job.id: one for one in (leader, *companions)}

    def remove(self, run: Run) -> None:
        """It has ended. Whoever waits to share its batch waits no longer."""
        with self._lock:
            del self._runs[run.job.id]
            for one in run.companions:
                one.leader = None
        run.was_sent.set()

    def find(self, job_id: str) -> Run | None:
        with self._lock:
            return self._runs.get(job_id)

    def cancel(self, run: Run) -> bool:
        """It is to end. False when that was known."""
        with self._lock:
            was, run.cancelled = run.cancelled, True
        return not was

    def is_wanted(self, run: Run) -> bool:
        """Whether it makes sense to go on with what comes before its render."""
        return not (run.cancelled or self.draining or self.stopping)

    def turn(self, run: Run) -> Turn:
        """Whether the engine is this run's now; the one before lets go of it when it saves. Those
        that wait for it get it in the order in which they began, companions with their leader."""
        with self._lock:
            if run.stage == RENDERING:  # its leader took it along
                return Turn.NOW
            if run.cancelled:
                return Turn.CANCELLED
            run.stage = READY
            if self.draining:
                return Turn.NOT_HERE
            if not self._is_next(run):
                return Turn.LATER
            run.companions = [one for one in run.companions if not one.cancelled]
            for one in (run, *run.companions):
                one.stage = RENDERING
            for other in self._runs.values():
                other.has_company = other.has_company or other.stage == SAVING
            return Turn.NOW

    def saves(self, run: Run) -> None:
        """Its files are written, or it has ended: the engine is free for the next one."""
        with self._lock:
            run.stage = SAVING
            if any(one.stage == RENDERING for one in self._runs.values()):
                run.has_company = True

    def is_beside_a_render(self, run: Run) -> bool:
        """Whether another job was rendered while this one's files were written."""
        with self._lock:
            return run.stage == SAVING and run.has_company

    def model_ahead(self) -> str | None:
        """Of the first run that waits for the engine."""
        with self._lock:
            ahead = [one.job.request for one in self._runs.values() if one.stage in BEFORE_RENDER]
        return next((request.model for request in ahead if request is not None), None)

    def _is_next(self, run: Run) -> bool:
        """Under the lock."""
        if any(one.stage == RENDERING for one in self._runs.values()):
            return False
        if run.leader is not None:
            return False
        waiting = (one for one in self._runs.values() if one.leader is None)
        return run is next(one for one in waiting if one.stage == READY)

"""Jobs in memory. They end with the process; a durable journal takes this place later."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from worker.errors import Busy, Conflict, NotFound
from worker.jobs.decode import JobRequest
from worker.jobs.job import Job, Status


class JobTable:
    """Every job of this process, oldest first. All methods may be called from any thread.

    The lock is held for dictionary work only, never while something waits.
    """

    def __init__(
        self,
        max_waiting: int,
        keep_finished: int,
        forget: Callable[[Job], None],
        clock: Callable[[], float] = time.time,
    ):
        """max_waiting: queued jobs; more are refused. keep_finished: the oldest above it go.

        forget: called with each finished job that is dropped, to remove its files.
        """
        self._max_waiting = max_waiting
        self._keep_finished = keep_finished
        self._forget = forget
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._keys: dict[str, str] = {}  # Idempotency-Key -> job id
        self._changed = threading.Condition()
        self._version = 0
        self._job_s = 20.0  # moving average of a job's run time; a guess until the first one

    def add(self, request: JobRequest, key: str | None = None) -> tuple[Job, bool]:
        """Accept a job, or find the one that the same id or key has made before.

        Returns the job and whether it is new. Raises Conflict when the id or key came with
        another body, Busy when the queue is full.
        """
        with self._changed:
            known = self._jobs.get(request.job_id or "") or self._jobs.get(
                self._keys.get(key or "", "")
            )
            if known is not None:
                if known.request.body != request.body:
                    raise Conflict("this id or Idempotency-Key was used with another body")
                if key:
                    self._keys.setdefault(key, known.id)
                return known, False
            waiting = self._waiting()
            if len(waiting) >= max(1, self._max_waiting):
                raise Busy(
                    f"{len(waiting)} jobs are waiting, at most {self._max_waiting} may",
                    retry_after_s=self._job_s,
                )
            job = Job(
                id=request.job_id or uuid.uuid4().hex,
                request=request,
                created_at=self._clock(),
                steps=request.params.steps * request.params.num_images,
            )
            self._jobs[job.id] = job
            if key:
                self._keys[key] = job.id
            self._touch()
            return job, True

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        with self._changed:
            job = self._jobs.get(job_id)
        if job is None:
            raise NotFound("there is no job with this id")
        return job

    def position(self, job: Job) -> int | None:
        """How many queued jobs run before this one; None when it is not queued."""
        with self._changed:
            waiting = [one.id for one in self._waiting()]
        return waiting.index(job.id) if job.id in waiting else None

    def counts(self) -> dict[str, int]:
        """Number of jobs per status."""
        with self._changed:
            jobs = list(self._jobs.values())
        return {status.value: sum(job.status is status for job in jobs) for status in Status}

    def update(self, job_id: str, **changes: Any) -> Job:
        """Change a job that is not final; a final one stays as it is."""
        with self._changed:
            job = self._jobs[job_id]
            if job.status.is_final:
                return job
            job = job.evolve(**changes)
            if job.status.is_final:
                job = job.evolve(finished_at=self._clock(), phase=None)
                self._learn(job)
            self._jobs[job_id] = job
            dropped = self._over_the_bound()
            self._touch()
        for old in dropped:
            self._forget(old)
        return job

    def ask_to_cancel(self, job_id: str) -> Job:
        """A queued job is cancelled now; a running one when its engine has stopped it."""
        with self._changed:  # so that the runner does not claim it between look and change
            if self.get(job_id).status is not Status.QUEUED:
                return self.update(job_id, cancel_requested=True)
            return self.update(
                job_id,
                status=Status.CANCELLED,
                cancel_requested=True,
                error="cancelled before it began",
                error_code="cancelled",
            )

    def next_queued(self) -> Job | None:
        """The oldest queued job."""
        with self._changed:
            return next(iter(self._waiting()), None)

    def wait_for_change(self, seen: int, timeout_s: float) -> int:
        """Wait until anything changed after version `seen`; returns the version now."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout_s)
            return self._version

    def _waiting(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.status is Status.QUEUED]

    def _learn(self, job: Job) -> None:
        if job.status is Status.COMPLETED and job.started_at and job.finished_at:
            self._job_s += 0.3 * (job.finished_at - job.started_at - self._job_s)

    def _over_the_bound(self) -> list[Job]:
        finished = sorted(
            (job for job in self._jobs.values() if job.status.is_final),
            key=lambda job: job.finished_at or 0.0,
        )
        dropped = finished[: max(0, len(finished) - self._keep_finished)]
        for job in dropped:
            del self._jobs[job.id]
        gone = {job.id for job in dropped}
        self._keys = {key: job_id for key, job_id in self._keys.items() if job_id not in gone}
        return dropped

    def _touch(self) -> None:
        self._version += 1
        self._changed.notify_all()

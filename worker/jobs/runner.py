"""Takes queued jobs one after the other, has the engine render them, keeps the results."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

from worker.errors import EngineLost, EngineUnavailable
from worker.jobs.job import Job, Status
from worker.jobs.table import JobTable
from worker.log import request_scope
from worker.protocol.link import Link, Mailbox
from worker.protocol.messages import Failed, JobRendered, Progress, RenderJob

log = logging.getLogger(__name__)

# An engine that died twice over the same job would die a third time.
MAX_ATTEMPTS = 2
# How long the runner sleeps at most before it looks whether it should stop.
LOOK_EVERY_S = 0.25


class JobRunner:
    """The one writer of jobs after their creation; a thread of its own."""

    def __init__(self, table: JobTable, link: Link, state_dir: Path):
        """state_dir: results are kept in its folder `results`, one folder per job."""
        self._table = table
        self._link = link
        self._results = state_dir / "results"
        self._staging = state_dir / "staging"
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="job runner", daemon=True)

    def start(self) -> None:
        """Begin. Files of an earlier process go: the jobs they belong to ended with it."""
        for folder in (self._results, self._staging):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping = True
        self._thread.join(timeout=5)

    def cancel(self, job_id: str) -> Job:
        """Ask for the end of a job; the engine is told at once. Any thread. Raises NotFound."""
        job = self._table.ask_to_cancel(job_id)
        if job.status is Status.PROCESSING:
            self._link.cancel(job_id)
        return job

    def file(self, job: Job, name: str) -> Path:
        """Path of a finished job's file."""
        return self._results / job.id / name

    def forget(self, job: Job) -> None:
        """Remove a job's files."""
        shutil.rmtree(self._results / job.id, ignore_errors=True)

    # --- the runner's thread -------------------------------------------------------------------

    def _run(self) -> None:
        seen = 0
        while not self._stopping:
            job = self._table.next_queued()
            if job is None or self._link.view.state is None:
                seen = self._table.wait_for_change(seen, LOOK_EVERY_S)
                continue
            with request_scope(job.id):
                try:
                    self._do(job)
                except Exception:
                    log.exception("the runner failed on this job")
                    self._table.update(
                        job.id,
                        status=Status.FAILED,
                        error="unexpected error in the runner; the log has the details",
                        error_code="internal_error",
                    )

    def _do(self, job: Job) -> None:
        staging = self._staging / job.id
        job = self._table.update(
            job.id,
            status=Status.PROCESSING,
            started_at=time.time(),
            attempts=job.attempts + 1,
            phase="load",
            step=0,
        )
        if job.status.is_final:  # cancelled between the look and the claim
            return
        following = self._table.next_queued()
        mailbox = self._link.submit(
            RenderJob(
                request_id=job.id,
                model=job.request.model,
                output=job.request.output,
                params=job.request.params,
                staging_dir=str(staging),
                exactness=job.request.exactness,
                priority=job.request.priority,
                keep_alive_s=job.request.keep_alive_s,
                next_model=following.request.model if following is not None else None,
            )
        )
        try:
            self._follow(job, mailbox)
        finally:
            self._link.release(mailbox)
            shutil.rmtree(staging, ignore_errors=True)

    def _follow(self, job: Job, mailbox: Mailbox) -> None:
        asked_to_stop = False
        while not self._stopping:
            event = mailbox.wait(LOOK_EVERY_S)
            if not asked_to_stop and self._table.get(job.id).cancel_requested:
                self._link.cancel(job.id)
                asked_to_stop = True
            match event:
                case Progress():
                    self._table.update(job.id, phase=event.phase, step=event.step)
                case JobRendered():
                    self._keep(job, event)
                    return
                case Failed():
                    self._fail(job, event)
                    return

    def _keep(self, job: Job, done: JobRendered) -> None:
        (self._staging / job.id).rename(self._results / job.id)
        self._table.update(
            job.id,
            status=Status.COMPLETED,
            step=job.steps,
            assets=done.assets,
            receipt=done.receipt,
            seconds=done.seconds,
        )
        log.info("completed with %d files", len(done.assets))

    def _fail(self, job: Job, failure: Failed) -> None:
        lost = failure.code in (EngineLost.code, EngineUnavailable.code)
        if lost and self._table.get(job.id).cancel_requested:
            self._table.update(
                job.id, status=Status.CANCELLED, error=failure.error, error_code="cancelled"
            )
            return
        if failure.code == EngineUnavailable.code:
            # It never reached an engine, so this does not count.
            self._table.update(job.id, status=Status.QUEUED, phase=None, attempts=job.attempts - 1)
            return
        if lost and job.attempts < MAX_ATTEMPTS:
            log.warning("the engine died on this job; it will begin anew")
            self._table.update(job.id, status=Status.QUEUED, phase=None, step=0)
            return
        cancelled = failure.code == "cancelled"
        self._table.update(
            job.id,
            status=Status.CANCELLED if cancelled else Status.FAILED,
            error=failure.error,
            error_code=failure.code,
        )
        log.warning("ended with %s", failure.code)

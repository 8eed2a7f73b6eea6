"""What became of jobs: in the journal, told to whoever has to know, and their files."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from worker.errors import Cancelled
from worker.jobs.failures import Again, Ended
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal
from worker.jobs.results import Results
from worker.jobs.told import Places, Teller
from worker.protocol.messages import JobRendered

log = logging.getLogger(__name__)


class Outcomes:
    """Ends of jobs, and what is kept of them. Any thread.

    Files are published and removed under one lock: none may go while it gets a second owner.
    """

    def __init__(
        self,
        journal: Journal,
        results: Results,
        folder: Path,
        tell: Teller,
        places: Places,
        keep_finished: int,
        keep_bytes: int,
    ):
        """As JobRunner has them."""
        self._journal = journal
        self._results = results
        self._folder = folder
        self._tell = tell
        self._places = places
        self._keep_finished = keep_finished
        self._keep_bytes = keep_bytes
        self._files = threading.Lock()
        # Published files of a job that are not yet in the journal.
        self._unwritten: dict[str, set[str]] = {}

    def tidy(self) -> None:
        """At the start: what an earlier process has left, of jobs that have ended or never were."""
        strangers = self._results.remove_others(self._journal.blobs())
        if strangers:
            log.info("removed %d files that no job has", strangers)
        open_jobs = {one.id for one in self._journal.waiting()}
        for folder in self._folder.glob("*"):
            if folder.name not in open_jobs:
                shutil.rmtree(folder, ignore_errors=True)

    def rendered(self, job: Job, done: JobRendered) -> None:
        """Its files are there: they are published, and it is complete or is uploaded.

        Raises DiskFull or JournalUnavailable, after which it may be said again, and DamagedResult.
        """
        folder = self._folder / job.id
        with self._files:
            assets = self._results.publish(folder / "files", done.assets)
            self._unwritten[job.id] = {
                sha256 for one in assets for sha256 in (one.sha256, one.thumbnail_sha256)
            }
            ended = self._journal.rendered(
                job.id,
                assets,
                done.receipt,
                done.seconds,
                self._places(job, assets),
                lambda job: self._tell(job, "completed"),
            )
            del self._unwritten[job.id]
        shutil.rmtree(folder, ignore_errors=True)
        log.info("%s with %d files", ended.status.value, len(done.assets))

    def not_rendered(self, job: Job, what: Ended | Again) -> None:
        """Raises JournalUnavailable, after which it may be said again."""
        if isinstance(what, Again):
            if what.why:
                log.warning("%s", what.why)
            self._journal.requeue(job.id, after_s=what.after_s, engine_died=what.engine_died)
            return
        ended = self._journal.end(
            job.id,
            what.status,
            what.error,
            what.error_code,
            lambda job: self._tell(job, job.status.value),
        )
        shutil.rmtree(self._folder / job.id, ignore_errors=True)
        log.warning("%s with %s", ended.status.value, what.error_code)

    def cancelled(self, job: Job, error: str) -> None:
        """Raises as `not_rendered`, and NotFound."""
        self.not_rendered(job, Ended(Status.CANCELLED, error, Cancelled.code))

    def forget_old(self) -> None:
        """Remove finished jobs above the bounds, with the files that no other job has."""
        old = self._journal.over_the_bound(self._keep_finished, self._keep_bytes)
        if old:
            with self._files:
                kept = set().union(*self._unwritten.values())
                self._results.remove(set(self._journal.forget(old)) - kept)
            log.info("forgot the %d oldest jobs", len(old))

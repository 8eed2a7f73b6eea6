"""Brings published files to the object store, until they are there."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from worker.errors import JournalUnavailable, NotFound, WorkerError
from worker.jobs.bell import Bell
from worker.jobs.job import Status
from worker.jobs.journal import Journal, Upload
from worker.jobs.results import Results
from worker.jobs.told import Teller
from worker.log import request_scope
from worker.storage.deliver import backoff_s
from worker.storage.stores import ObjectStore

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
# Tries of one file, with up to five minutes between them: about a day.
MAX_TRIES = 300


class Uploader:
    """One thread, that owns nothing but its place in the journal."""

    def __init__(
        self,
        journal: Journal,
        bell: Bell,
        results: Results,
        store: ObjectStore,
        tell: Teller,
        pace: Callable[[int], float] = lambda attempts: backoff_s(attempts, random.random()),
    ):
        """pace: seconds until the next try after so many."""
        self._journal = journal
        self._bell = bell
        self._results = results
        self._store = store
        self._tell = tell
        self._pace = pace
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping = True
        self._bell.ring()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        seen = 0
        while not self._stopping:
            try:
                self.tick()
            except JournalUnavailable as exc:
                log.error("%s", exc)
            seen = self._bell.wait(seen, LOOK_EVERY_S)

    def tick(self) -> None:
        """Try every upload that is due once."""
        for upload in self._journal.uploads_due():
            if self._stopping:
                return
            with request_scope(upload.job_id):
                if self._is_wanted(upload):
                    self._bring_or_put_off(upload)

    def _is_wanted(self, upload: Upload) -> bool:
        """Whether its job was not cancelled while others were brought."""
        try:
            return not self._journal.get(upload.job_id).status.is_final
        except NotFound:
            return False

    def _bring_or_put_off(self, upload: Upload) -> None:
        """One upload that nobody thought of may not end the runner, again and again."""
        try:
            self._bring(upload)
        except JournalUnavailable:
            raise
        except Exception:
            log.exception("an upload failed")
            self._failed(upload, "unexpected error in the worker; its log has the details", None)

    def _bring(self, upload: Upload) -> None:
        began = time.monotonic()
        try:
            self._store.put(
                upload.place,
                self._results.path(upload.sha256),
                upload.mime_type,
                upload.saved,
                lambda saved: self._journal.upload_saved(upload, saved),
                lambda: self._stopping,
            )
        except JournalUnavailable:
            raise
        except WorkerError as exc:
            self._failed(upload, str(exc), exc.retry_after_s)
            return
        except OSError as exc:  # its text would have a path of this machine
            self._failed(upload, f"the file cannot be read ({exc.strerror})", None)
            return
        log.info("a file is in %s after %.1f s", self._store.name, time.monotonic() - began)
        job = self._journal.uploaded(upload, lambda job: self._tell(job, "completed"))
        if job is not None and job.status is Status.COMPLETED:
            log.info("completed")

    def _failed(self, upload: Upload, error: str, retry_after_s: float | None) -> None:
        """retry_after_s: what the store asked for."""
        if self._stopping:
            return
        tries = upload.attempts + 1
        log.warning("upload failed, try %d: %s", tries, error)
        if tries >= MAX_TRIES:
            self._journal.end(
                upload.job_id,
                Status.FAILED,
                f"its files could not be uploaded in {tries} tries; they are still on the worker",
                "upload_failed",
                lambda job: self._tell(job, "failed"),
            )
            return
        after_s = max(self._pace(tries), retry_after_s or 0.0)
        self._journal.upload_failed(upload, error[:500], after_s)

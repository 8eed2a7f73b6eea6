"""Takes queued jobs, has them made, and writes down what became of them.

A job is made in steps, each of which may be cut short by a crash and is then done again: fetch its
pictures, let the engine render it, publish its files, write it down. One job is rendered at a time,
or several that share a batch; while files are encoded the next one begins, and pictures of those to
come are fetched meanwhile.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from worker.errors import (
    Cancelled,
    DiskFull,
    EngineLost,
    EngineUnavailable,
    JournalUnavailable,
    NotFound,
    WorkerError,
)
from worker.jobs.bell import Bell
from worker.jobs.board import Board
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal, NewDelivery, Upload
from worker.jobs.pictures import Wanted
from worker.jobs.results import Results
from worker.jobs.schedule import Waiting, companions, next_job
from worker.log import request_scope
from worker.protocol.link import Link, Mailbox
from worker.protocol.messages import (
    AssetFile,
    Failed,
    JobNews,
    JobRendered,
    Progress,
    Reference,
    RenderJob,
    failed,
)

log = logging.getLogger(__name__)

# An engine that died twice over the same job would die a third time.
MAX_ATTEMPTS = 2
# A job that ended its runner so often is given up; a pod may be restarted a few times over one.
MAX_RESTARTS = 12
# How long the runner sleeps at most before it looks whether it should stop.
LOOK_EVERY_S = 0.25
RETRY_S = 1.0  # between two tries to write something down
FULL_DISK_S = 10.0
FETCH_TRIES = 3
MAX_FETCHING = 2  # jobs whose pictures are fetched at a time
FORGET_EVERY_S = 10.0

_BEFORE_RENDER = ("fetching", "ready")


class Fetch(Protocol):
    """Brings a picture that a job names into a folder."""

    def __call__(self, wanted: Wanted, folder: Path) -> Reference:
        """Raises a WorkerError; one with retry_after_s may work later."""
        ...


class Teller(Protocol):
    """Says what is to be told to whom when something happens to a job."""

    def __call__(self, job: Job, event: str) -> Sequence[NewDelivery]:
        """event: processing | completed | failed | cancelled."""
        ...


class Places(Protocol):
    """Says which files of a job go where in the object store."""

    def __call__(self, job: Job, assets: Sequence[AssetFile]) -> Sequence[Upload]: ...


class _Stopped(Exception):
    """The runner ends; the job goes on after the next start."""


class _Run:
    """One job that is under way. Its own thread runs it; the dispatcher asks it to end."""

    def __init__(self, job: Job):
        self.job = job
        self.stage = "fetching"  # fetching | ready | rendering | saving
        self.cancelled = False
        self.has_company = False  # another one was rendered while its files were written
        self.companions: list[_Run] = []  # that share its batch, if they are there in time
        self.leader: _Run | None = None  # whose batch it shares; None once that is not to be
        self.was_sent = threading.Event()  # to the engine, or never will be


class JobRunner:
    """The one writer of jobs after their creation.

    The dispatcher thread begins jobs; each has a thread of its own until it has ended. `_runs` and
    what is in it changes under `_lock`.
    """

    def __init__(
        self,
        journal: Journal,
        board: Board,
        bell: Bell,
        link: Link,
        results: Results,
        folder: Path,
        *,
        fetch: Fetch,
        tell: Teller,
        places: Places,
        keep_finished: int,
        keep_bytes: int,
        batch_images: int = 1,
        clock: Callable[[], float] = time.time,
    ):
        """link: to the media engine. folder: for what jobs need while they are made, one folder
        each. keep_finished, keep_bytes: of ended jobs; the oldest above either go. batch_images: of
        all jobs that share a batch, at most.
        """
        self._journal = journal
        self._board = board
        self._bell = bell
        self._link = link
        self._results = results
        self._folder = folder
        self._fetch = fetch
        self._tell = tell
        self._places = places
        self._keep_finished = keep_finished
        self._keep_bytes = keep_bytes
        self._batch_images = batch_images
        self._clock = clock
        self._lock = threading.Lock()
        self._files = threading.Lock()  # a file may not be removed while it gets a second owner
        # Published files of a job that are not yet in the journal.
        self._unwritten: dict[str, set[str]] = {}
        self._runs: dict[str, _Run] = {}  # in the order in which they began
        self._threads: list[threading.Thread] = []
        self._last_model: str | None = None
        self._forgot_at = float("-inf")
        self._taking = True
        self._stopping = False
        self._dispatcher = threading.Thread(target=self._run, name="job runner", daemon=True)

    @property
    def active(self) -> int:
        """Jobs that are being made now."""
        with self._lock:
            return len(self._runs)

    def start(self) -> None:
        """Go on where an earlier process ended. Raises JournalUnavailable."""
        self._journal.check()
        for job_id in self._journal.recover():
            log.info("job %s goes on where an earlier process ended", job_id)
        strangers = self._results.remove_others(self._journal.blobs())
        if strangers:
            log.info("removed %d files that no job has", strangers)
        self._remove_folders()
        self._dispatcher.start()

    def stop_taking(self) -> None:
        """Begin nothing new; what is under way goes on."""
        self._taking = False

    def close(self) -> None:
        """End; jobs that are under way are left as they are and go on after the next start."""
        self._stopping = True
        self._bell.ring()
        if self._dispatcher.is_alive():
            self._dispatcher.join(timeout=5)
        for thread in self._threads:  # the dispatcher adds none any more
            thread.join(timeout=5)

    def _remove_folders(self) -> None:
        """Those of jobs that an earlier process has ended and not tidied up after."""
        open_jobs = {one.id for one in self._journal.waiting()}
        for folder in self._folder.glob("*"):
            if folder.name not in open_jobs:
                shutil.rmtree(folder, ignore_errors=True)

    # --- the dispatcher ------------------------------------------------------------------------

    def _run(self) -> None:
        seen = 0
        while not self._stopping:
            try:
                self._end_unwanted()
                while self._taking and self._begin_next():
                    pass
                self._forget_old()
            except JournalUnavailable as exc:
                log.error("%s", exc)
                time.sleep(RETRY_S)
            seen = self._bell.wait(seen, LOOK_EVERY_S)

    def _end_unwanted(self) -> None:
        for job in self._journal.wished_away():
            with self._lock:
                run = self._runs.get(job.id)
            if run is None:
                when = "while its files were uploaded" if job.is_uploading else "before it began"
                try:
                    self._end(job, Status.CANCELLED, f"cancelled {when}", Cancelled.code)
                except NotFound:  # handed over to another worker, just now
                    continue
            elif not run.cancelled:
                with self._lock:
                    run.cancelled = True
                self._link.cancel(job.id)

    def _begin_next(self) -> bool:
        """Begin the job whose turn it is, if it may begin now. False when none did."""
        if self._link.view.state is None:
            return False
        with self._lock:
            stages = {job_id: run.stage for job_id, run in self._runs.items()}
        # One that waits for another try does not begin before its last thread has ended.
        queued = [one for one in self._journal.waiting() if one.id not in stages]
        ahead = sum(stage in _BEFORE_RENDER for stage in stages.values())
        if ahead >= MAX_FETCHING:  # slow pictures of some hold up nobody who has none
            queued = [one for one in queued if not one.has_references]
        waiting = next_job(queued, self._last_model, self._clock())
        if waiting is None:
            return False
        try:
            request = self._journal.get(waiting.id).request
        except NotFound:  # handed over to another worker, just now
            return True
        has_references = request is not None and bool(request.references)
        if not has_references and {"ready", "rendering"} & set(stages.values()):
            return False
        run = self._claimed(waiting.id)
        if run is None:
            return True
        self._last_model = waiting.model
        begun = [run]
        if "fetching" not in stages.values():  # whose turn came before theirs
            begun += self._claimed_companions(run, waiting, queued)
        with self._lock:
            self._runs |= {one.job.id: one for one in begun}
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for one in begun:
            thread = threading.Thread(
                target=self._do, args=(one,), name=f"job {one.job.id}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return True

    def _claimed(self, job_id: str) -> _Run | None:
        """A job that begins; None when it is no longer queued."""
        job = self._journal.claim(job_id, lambda job: self._tell(job, "processing"))
        if job is None:
            return None
        run = _Run(job)
        if job.request is None or not job.request.references:
            run.stage = "ready"
        return run

    def _claimed_companions(
        self, leader: _Run, its: Waiting, queued: Sequence[Waiting]
    ) -> list[_Run]:
        """The jobs that begin with another one, to share its batch."""
        try:
            for one in companions(its, queued, self._clock(), self._batch_images):
                run = self._claimed(one.id)
                if run is None:  # what comes behind it has another turn now
                    break
                run.leader = leader
                leader.companions.append(run)
        except JournalUnavailable as exc:  # those that were claimed begin
            log.error("%s", exc)
        return leader.companions[:]

    def _forget_old(self) -> None:
        now = time.monotonic()
        if now - self._forgot_at < FORGET_EVERY_S:
            return
        self._forgot_at = now
        self.forget_old()

    def forget_old(self) -> None:
        """Remove what is above the bounds."""
        old = self._journal.over_the_bound(self._keep_finished, self._keep_bytes)
        if old:
            with self._files:
                kept = set().union(*self._unwritten.values())
                self._results.remove(set(self._journal.forget(old)) - kept)
            log.info("forgot the %d oldest jobs", len(old))

    # --- the thread of one job -----------------------------------------------------------------

    def _do(self, run: _Run) -> None:
        job = run.job
        with request_scope(job.id):
            try:
                self._make_or_fail(run)
            except _Stopped:
                return
            finally:
                with self._lock:
                    del self._runs[job.id]
                    for one in run.companions:
                        one.leader = None
                run.was_sent.set()
                self._board.take(JobNews(request_id=job.id, phase=None))
                self._bell.ring()

    def _make_or_fail(self, run: _Run) -> None:
        job = run.job
        try:
            self._make(run)
        except _Stopped:
            raise
        except Exception:
            log.exception("the runner failed on this job")
            text = "unexpected error in the runner; the log has the details"
            self._surely(lambda: self._end(job, Status.FAILED, text, "internal_error"))

    def _make(self, run: _Run) -> None:
        job, folder = run.job, self._folder / run.job.id
        if job.restarts >= MAX_RESTARTS:
            text = f"the runner ended {job.restarts} times while it worked on this job"
            self._surely(lambda: self._end(job, Status.FAILED, text, "internal_error"))
            return
        if job.request is None:
            text = "another version of this program accepted the job; send it again"
            self._surely(lambda: self._end(job, Status.FAILED, text, "internal_error"))
            return
        try:
            references = self._references(run, folder)
        except WorkerError as exc:
            self._reference_failed(run, exc)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._reference_failed(run, DiskFull("there is no room for the pictures of this job"))
            return
        if not self._wait_for_engine(run):
            error = "cancelled before it was rendered"
            self._surely(lambda: self._end(job, Status.CANCELLED, error, Cancelled.code))
            return
        leader = run.leader
        if leader is not None:  # the engine looks for this one behind it
            leader.was_sent.wait()
        mailbox = self._submit(run, references, folder)
        run.was_sent.set()
        try:
            event = self._follow(run, mailbox, until_save=True)
            if not isinstance(event, Failed):  # which may begin anew, before any other
                with self._lock:
                    run.stage = "saving"
                    if any(one.stage == "rendering" for one in self._runs.values()):
                        run.has_company = True
                self._bell.ring()
            if event is None:
                event = self._follow(run, mailbox, until_save=False)
        finally:
            self._link.release(mailbox)
        if isinstance(event, JobRendered):
            self._surely(lambda: self._keep(job, folder, event))
        else:
            assert isinstance(event, Failed)
            self._surely(lambda: self._failed(run, event))

    def _wait_for_engine(self, run: _Run) -> bool:
        """Whether the engine is this run's now; the one before lets go of it when it saves. Those
        that wait for it get it in the order in which they began, companions with their leader."""
        seen = 0
        while not self._stopping:
            with self._lock:
                if run.stage == "rendering":  # its leader took it along
                    return True
                if run.cancelled:
                    return False
                run.stage = "ready"
                if not self._taking:
                    break
                if self._is_next(run):
                    run.companions = [one for one in run.companions if not one.cancelled]
                    for one in (run, *run.companions):
                        one.stage = "rendering"
                    for other in self._runs.values():
                        other.has_company = other.has_company or other.stage == "saving"
                    return True
            seen = self._bell.wait(seen, LOOK_EVERY_S)
        if not self._stopping:  # a drain begins no render
            self._surely(lambda: self._journal.requeue(run.job.id))
        raise _Stopped

    def _is_next(self, run: _Run) -> bool:
        """Under the lock."""
        if any(one.stage == "rendering" for one in self._runs.values()):
            return False
        if run.leader is not None:
            return False
        waiting = (one for one in self._runs.values() if one.leader is None)
        return run is next(one for one in waiting if one.stage == "ready")

    def _references(self, run: _Run, folder: Path) -> tuple[Reference, ...]:
        """The job's pictures; those that an earlier start has fetched are not fetched again,
        because a signed URL ends before a long wait does."""
        request = run.job.request
        assert request is not None
        if not request.references:
            return ()
        told = folder / "references.json"
        kept = _kept_references(told)
        if kept is not None:
            return kept
        self._board.take(JobNews(request_id=run.job.id, phase="references"))
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for wanted in request.references:
            if run.cancelled:
                raise Cancelled("cancelled while its pictures were fetched")
            found.append(self._fetch(wanted, folder))
        draft = told.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(found))
        draft.rename(told)
        return tuple(found)

    def _reference_failed(self, run: _Run, error: WorkerError) -> None:
        job = run.job
        tries = max(1, job.starts - job.restarts - job.attempts)
        log.warning("a reference cannot be had (%s)", error.code)
        if run.cancelled:
            text = "cancelled while its pictures were fetched"
            self._surely(lambda: self._end(job, Status.CANCELLED, text, Cancelled.code))
        elif error.retry_after_s is not None and tries < FETCH_TRIES:
            after_s = error.retry_after_s * 2 ** (tries - 1)
            self._surely(lambda: self._journal.requeue(job.id, after_s=after_s))
        else:
            self._surely(lambda: self._failed(run, failed(job.id, error)))

    def _submit(self, run: _Run, references: tuple[Reference, ...], folder: Path) -> Mailbox:
        request = run.job.request
        assert request is not None
        staging = folder / "files"
        shutil.rmtree(staging, ignore_errors=True)
        return self._link.submit(
            RenderJob(
                request_id=run.job.id,
                model=request.model,
                output=request.output,
                params=request.params,
                staging_dir=str(staging),
                exactness=request.exactness,
                priority=request.priority,
                keep_alive_s=request.keep_alive_s,
                next_model=self._following_model(run, request.model),
                references=references,
                checkpoint=str(folder / "checkpoint"),
                companions=tuple(one.job.id for one in run.companions),
            )
        )

    def _following_model(self, run: _Run, model: str) -> str | None:
        """Of the job that will follow this one, of `model`, as far as is known now."""
        with self._lock:
            begun = [one.job.request for one in self._runs.values() if one.stage in _BEFORE_RENDER]
        for request in begun:
            if request is not None:
                return request.model
        try:
            following = next_job(self._journal.waiting(), model, self._clock())
        except JournalUnavailable:
            return None
        return following.model if following is not None else None

    def _follow(
        self, run: _Run, mailbox: Mailbox, *, until_save: bool
    ) -> JobRendered | Failed | None:
        """The end of a render; None when it is being saved, if that is asked for."""
        told = False
        while not self._stopping:
            event = mailbox.wait(LOOK_EVERY_S)
            if run.cancelled and not told:
                self._link.cancel(run.job.id)  # again: the first may have come before the job
                told = True
            match event:
                case Progress():
                    self._board.take(
                        JobNews(
                            request_id=event.request_id,
                            phase=event.phase,
                            step=event.step,
                            steps=event.steps,
                            left_s=event.left_s,
                            image=event.image,
                            preview=event.preview,
                        )
                    )
                    if event.phase == "save" and until_save:
                        return None
                case JobRendered() | Failed():
                    return event
        raise _Stopped

    # --- ends ----------------------------------------------------------------------------------

    def _keep(self, job: Job, folder: Path, done: JobRendered) -> None:
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

    def _failed(self, run: _Run, failure: Failed) -> None:
        job = run.job
        lost = failure.code in (EngineLost.code, EngineUnavailable.code)
        if run.cancelled and lost:
            self._end(job, Status.CANCELLED, failure.error, Cancelled.code)
        elif failure.code == EngineUnavailable.code:
            # It never reached an engine, so this does not count.
            self._journal.requeue(job.id)
        elif lost and self._is_beside_a_render(run):
            log.warning("the engine died while this job's files were written; it goes on")
            self._journal.requeue(job.id)
        elif lost and job.attempts + 1 < MAX_ATTEMPTS:
            log.warning("the engine died on this job; it goes on with the next one")
            self._journal.requeue(job.id, engine_died=True)
        elif failure.code == DiskFull.code:
            log.error("there is no room for the files of this job; it is tried again")
            self._journal.requeue(job.id, after_s=FULL_DISK_S)
        else:
            cancelled = failure.code == Cancelled.code
            status = Status.CANCELLED if cancelled else Status.FAILED
            self._end(job, status, failure.error, failure.code)

    def _is_beside_a_render(self, run: _Run) -> bool:
        """Whether another job was rendered while this one's files were written: more likely it was
        that one that the engine died of."""
        return run.stage == "saving" and run.has_company

    def _end(self, job: Job, status: Status, error: str, error_code: str) -> None:
        ended = self._journal.end(
            job.id, status, error, error_code, lambda job: self._tell(job, job.status.value)
        )
        shutil.rmtree(self._folder / job.id, ignore_errors=True)
        log.warning("%s with %s", ended.status.value, error_code)

    def _surely(self, write_down: Callable[[], object]) -> None:
        """Until it is done, or the runner ends: what an engine has made is not lost because a disk
        was full for a minute."""
        while not self._stopping:
            try:
                write_down()
                return
            except (JournalUnavailable, DiskFull) as exc:
                log.error("%s; trying again in %.0f s", exc, RETRY_S)
                time.sleep(RETRY_S)
        raise _Stopped


def _kept_references(told: Path) -> tuple[Reference, ...] | None:
    """What an earlier start has fetched; None when it is not there as a whole."""
    try:
        kept = msgspec.json.decode(told.read_bytes(), type=tuple[Reference, ...])
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return kept if all(Path(one.file).is_file() for one in kept) else None

"""Makes a job, in steps, each of which may be cut short by a crash and is then done again: fetch
its pictures, let the engine render it, publish its files, write it down."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from worker.errors import Cancelled, DiskFull, JournalUnavailable, WorkerError
from worker.jobs.bell import Bell
from worker.jobs.board import Board
from worker.jobs.failures import Again, Ended, after_a_missing_picture, after_failure
from worker.jobs.fetched import Fetch, fetch_references, kept_references
from worker.jobs.job import Job, Status
from worker.jobs.outcomes import Outcomes
from worker.jobs.runs import Run, Runs, Turn
from worker.log import request_scope
from worker.protocol.link import Link, Mailbox
from worker.protocol.messages import Failed, JobNews, JobRendered, Progress, Reference, RenderJob

log = logging.getLogger(__name__)

# A job that ended its runner so often is given up; a pod may be restarted a few times over one.
MAX_RESTARTS = 12
# How long a thread sleeps at most before it looks whether it should stop.
LOOK_EVERY_S = 0.25
RETRY_S = 1.0  # between two tries to write something down


class _Stopped(Exception):
    """The runner ends; the job goes on after the next start."""


class Maker:
    """The way of one job, walked by the job's own thread. Holds nothing of a job itself."""

    def __init__(
        self,
        runs: Runs,
        outcomes: Outcomes,
        board: Board,
        bell: Bell,
        link: Link,
        folder: Path,
        fetch: Fetch,
        following_model: Callable[[str], str | None],
    ):
        """link: to the media engine. folder: for what jobs need while they are made, one folder
        each. following_model: of the queued job that comes after one of the given model."""
        self._runs = runs
        self._outcomes = outcomes
        self._board = board
        self._bell = bell
        self._link = link
        self._folder = folder
        self._fetch = fetch
        self._following_model = following_model

    def make(self, run: Run) -> None:
        """Until the job has ended, is queued again, or the runner ends. Raises nothing."""
        with request_scope(run.job.id):
            try:
                self._make_or_fail(run)
            except _Stopped:
                return
            finally:
                self._runs.remove(run)
                self._board.take(JobNews(request_id=run.job.id, phase=None))
                self._bell.ring()

    def _make_or_fail(self, run: Run) -> None:
        try:
            self._make(run)
        except Cancelled as exc:
            text = str(exc)
            self._surely(lambda: self._outcomes.cancelled(run.job, text))
        except _Stopped:
            raise
        except Exception:
            log.exception("the runner failed on this job")
            self._fail(run, "unexpected error in the runner; the log has the details")

    def _make(self, run: Run) -> None:
        if (error := _cannot_be_made(run.job)) is not None:
            self._fail(run, error)
            return
        folder = self._folder / run.job.id
        try:
            references = self._references(run, folder)
        except Cancelled:
            raise
        except WorkerError as exc:
            self._without_pictures(run, exc)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._without_pictures(run, DiskFull("there is no room for the pictures of this job"))
            return
        self._wait_for_engine(run)
        event = self._rendered(run, references, folder)
        if isinstance(event, JobRendered):
            self._surely(lambda: self._outcomes.rendered(run.job, event))
        else:
            self._surely(lambda: self._outcomes.not_rendered(run.job, self._verdict(run, event)))

    # --- pictures ------------------------------------------------------------------------------

    def _references(self, run: Run, folder: Path) -> tuple[Reference, ...]:
        """The job's pictures; those that an earlier start has fetched are not fetched again,
        because a signed URL ends before a long wait does."""
        request = run.job.request
        assert request is not None
        if not request.references:
            return ()
        kept = kept_references(folder)
        if kept is not None:
            return kept
        self._board.take(JobNews(request_id=run.job.id, phase="references"))
        try:
            return fetch_references(
                request.references, folder, self._fetch, lambda: not self._runs.is_wanted(run)
            )
        except Cancelled:
            if not run.cancelled:
                self._give_back(run)
            raise Cancelled("cancelled while its pictures were fetched") from None

    def _without_pictures(self, run: Run, error: WorkerError) -> None:
        if run.cancelled:
            raise Cancelled("cancelled while its pictures were fetched")
        job = run.job
        tries = max(1, job.starts - job.restarts - job.attempts)
        what = after_a_missing_picture(job.id, error, tries=tries)
        self._surely(lambda: self._outcomes.not_rendered(job, what))

    # --- the engine ----------------------------------------------------------------------------

    def _wait_for_engine(self, run: Run) -> None:
        """Until it is this run's. Raises Cancelled."""
        seen = 0
        while not self._runs.stopping:
            match self._runs.turn(run):
                case Turn.NOW:
                    return
                case Turn.CANCELLED:
                    raise Cancelled("cancelled before it was rendered")
                case Turn.NOT_HERE:
                    self._give_back(run)
            seen = self._bell.wait(seen, LOOK_EVERY_S)
        raise _Stopped

    def _rendered(
        self, run: Run, references: tuple[Reference, ...], folder: Path
    ) -> JobRendered | Failed:
        """What the engine has made of it. The engine is free for others as soon as it saves."""
        leader = run.leader
        if leader is not None:  # the engine looks for this one behind it
            leader.was_sent.wait()
        mailbox = self._submit(run, references, folder)
        run.was_sent.set()
        try:
            event = self._follow(run, mailbox, until_save=True)
            if not isinstance(event, Failed):  # which may begin anew, before any other
                self._runs.saves(run)
                self._bell.ring()
            if event is None:
                event = self._follow(run, mailbox, until_save=False)
        finally:
            self._link.release(mailbox)
        assert event is not None
        return event

    def _submit(self, run: Run, references: tuple[Reference, ...], folder: Path) -> Mailbox:
        request = run.job.request
        assert request is not None
        staging = folder / "files"
        shutil.rmtree(staging, ignore_errors=True)
        next_model = self._runs.model_ahead() or self._following_model(request.model)
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
                next_model=next_model,
                references=references,
                checkpoint=str(folder / "checkpoint"),
                companions=tuple(one.job.id for one in run.companions),
            )
        )

    def _follow(
        self, run: Run, mailbox: Mailbox, *, until_save: bool
    ) -> JobRendered | Failed | None:
        """The end of a render; None when it is being saved, if that is asked for."""
        told = False
        while not self._runs.stopping:
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

    def _verdict(self, run: Run, failure: Failed) -> Ended | Again:
        return after_failure(
            failure,
            cancelled=run.cancelled,
            is_beside_a_render=self._runs.is_beside_a_render(run),
            deaths=run.job.attempts,
        )

    def _fail(self, run: Run, error: str) -> None:
        what = Ended(Status.FAILED, error, "internal_error")
        self._surely(lambda: self._outcomes.not_rendered(run.job, what))

    def _give_back(self, run: Run) -> NoReturn:
        """The runner ends before this job was rendered. Raises _Stopped."""
        self._surely(lambda: self._outcomes.not_rendered(run.job, Again()))
        raise _Stopped

    def _surely(self, write_down: Callable[[], object]) -> None:
        """Until it is done, or the runner ends: what an engine has made is not lost because a disk
        was full for a minute."""
        while not self._runs.stopping:
            try:
                write_down()
                return
            except (JournalUnavailable, DiskFull) as exc:
                log.error("%s; trying again in %.0f s", exc, RETRY_S)
                time.sleep(RETRY_S)
        raise _Stopped


def _cannot_be_made(job: Job) -> str | None:
    """Why, if that is known before anything is begun."""
    if job.restarts >= MAX_RESTARTS:
        return f"the runner ended {job.restarts} times while it worked on this job"
    if job.request is None:
        return "another version of this program accepted the job; send it again"
    return None

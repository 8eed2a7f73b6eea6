"""Takes queued jobs and begins them, each on a thread of its own (maker.py).

One job is rendered at a time, or several that share a batch; while files are encoded the next one
begins, and pictures of those to come are fetched meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from worker.errors import JournalUnavailable, NotFound
from worker.jobs.bell import Bell
from worker.jobs.board import Board
from worker.jobs.fetched import Fetch
from worker.jobs.journal import Journal
from worker.jobs.maker import LOOK_EVERY_S, RETRY_S, Maker
from worker.jobs.outcomes import Outcomes
from worker.jobs.results import Results
from worker.jobs.runs import BEFORE_RENDER, FETCHING, READY, RENDERING, Run, Runs
from worker.jobs.schedule import Waiting, companions, next_job
from worker.jobs.told import Places, Teller
from worker.protocol.link import Link

log = logging.getLogger(__name__)

MAX_FETCHING = 2  # jobs whose pictures are fetched at a time
FORGET_EVERY_S = 10.0


class JobRunner:
    """The one writer of jobs after their creation.

    The dispatcher thread begins jobs and owns what is here; `Runs` is what it shares with the
    threads of jobs.
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
        self._bell = bell
        self._link = link
        self._tell = tell
        self._batch_images = batch_images
        self._clock = clock
        self._runs = Runs()
        self._outcomes = Outcomes(journal, results, folder, tell, places, keep_finished, keep_bytes)
        self._maker = Maker(
            self._runs, self._outcomes, board, bell, link, folder, fetch, self._following_model
        )
        self._threads: list[threading.Thread] = []
        self._last_model: str | None = None
        self._forgot_at = float("-inf")
        self._dispatcher = threading.Thread(target=self._run, name="job runner", daemon=True)

    @property
    def active(self) -> int:
        """Jobs that are being made now."""
        return len(self._runs)

    def start(self) -> None:
        """Go on where an earlier process ended. Raises JournalUnavailable."""
        self._journal.check()
        for job_id in self._journal.recover():
            log.info("job %s goes on where an earlier process ended", job_id)
        self._outcomes.tidy()
        self._dispatcher.start()

    def stop_taking(self) -> None:
        """Begin nothing new; what is rendered goes on, and what is not waits for the next start."""
        self._runs.draining = True

    def close(self) -> None:
        """End; jobs that are under way are left as they are and go on after the next start."""
        self._runs.stopping = True
        self._bell.ring()
        if self._dispatcher.is_alive():
            self._dispatcher.join(timeout=5)
        for thread in self._threads:  # the dispatcher adds none any more
            thread.join(timeout=5)

    def _run(self) -> None:
        seen = 0
        while not self._runs.stopping:
            try:
                self._end_unwanted()
                while not self._runs.draining and self._begin_next():
                    pass
                self._forget_old()
            except JournalUnavailable as exc:
                log.error("%s", exc)
                time.sleep(RETRY_S)
            seen = self._bell.wait(seen, LOOK_EVERY_S)

    def _end_unwanted(self) -> None:
        for job in self._journal.wished_away():
            run = self._runs.find(job.id)
            if run is None:
                when = "while its files were uploaded" if job.is_uploading else "before it began"
                try:
                    self._outcomes.cancelled(job, f"cancelled {when}")
                except NotFound:  # handed over to another worker, just now
                    continue
            elif self._runs.cancel(run):
                self._link.cancel(job.id)

    def _forget_old(self) -> None:
        now = time.monotonic()
        if now - self._forgot_at >= FORGET_EVERY_S:
            self._forgot_at = now
            self._outcomes.forget_old()

    # --- beginning -----------------------------------------------------------------------------

    def _begin_next(self) -> bool:
        """Begin the job whose turn it is, if it may begin now. False when none did."""
        if self._link.view.state is None:
            return False
        stages = self._runs.stages()
        # One that waits for another try does not begin before its last thread has ended.
        queued = [one for one in self._journal.waiting() if one.id not in stages]
        ahead = sum(stage in BEFORE_RENDER for stage in stages.values())
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
        if not has_references and {READY, RENDERING} & set(stages.values()):
            return False
        run = self._claimed(waiting.id)
        if run is None:
            return True
        self._last_model = waiting.model
        others: list[Run] = []
        if FETCHING not in stages.values():  # whose turn came before theirs
            others = self._claimed_companions(waiting, queued)
        self._runs.add(run, others)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for one in (run, *others):
            thread = threading.Thread(
                target=self._maker.make, args=(one,), name=f"job {one.job.id}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return True

    def _claimed(self, job_id: str) -> Run | None:
        """A job that begins; None when it is no longer queued."""
        job = self._journal.claim(job_id, lambda job: self._tell(job, "processing"))
        return Run(job) if job is not None else None

    def _claimed_companions(self, leader: Waiting, queued: Sequence[Waiting]) -> list[Run]:
        """The jobs that begin with another one, to share its batch."""
        begun: list[Run] = []
        try:
            for one in companions(leader, queued, self._clock(), self._batch_images):
                run = self._claimed(one.id)
                if run is None:  # what comes behind it has another turn now
                    break
                begun.append(run)
        except JournalUnavailable as exc:  # those that were claimed begin
            log.error("%s", exc)
        return begun

    def _following_model(self, model: str) -> str | None:
        """Of the queued job that comes after one of `model`, as far as is known now. Any thread."""
        try:
            following = next_job(self._journal.waiting(), model, self._clock())
        except JournalUnavailable:
            return None
        return following.model if following is not None else None

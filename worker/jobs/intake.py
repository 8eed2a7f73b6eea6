"""Jobs from lists: taken one by one, written into the journal, and let go of when everybody knows
how they ended.

An element stays in this worker's processing list until then, so that neither a crash nor the loss
of this machine's disk loses it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from worker.errors import Conflict, JournalUnavailable, WorkerError
from worker.jobs.bell import Bell
from worker.jobs.decode import JobRequest, is_job_id
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal
from worker.jobs.told import Teller
from worker.log import request_scope
from worker.queues.elements import MalformedElement, decode_element, job_id_of
from worker.queues.queue import JobQueue, QueueUnavailable
from worker.storage.rows import MISSING, JobRows, RowsUnavailable, skip_reason

log = logging.getLogger(__name__)

TAKE_EVERY_S = 1.0  # of an empty list
BEAT_EVERY_S = 30.0
ADOPT_EVERY_S = 60.0
WATCH_EVERY_S = 5.0  # rows of jobs that have not ended, for a cancel
AFTER_ERROR_S = 5.0
HAND_OVER_AFTER_S = 60.0  # without an engine that could work, before others get what waits here


class Decode(Protocol):
    """A body to a job. Raises what a body is refused with."""

    def __call__(self, body: dict[str, Any]) -> JobRequest: ...


class Intake:
    """One list. One thread, which owns all of this."""

    def __init__(
        self,
        queue: JobQueue,
        journal: Journal,
        bell: Bell,
        decode: Decode,
        tell: Teller,
        rows: JobRows | None,
        worker: str,
        take_ahead: int,
        can_work: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ):
        """rows: the table that users cancel jobs in; None: there is none. take_ahead: jobs of the
        list that may wait here, so that one worker does not take what others could begin now.
        can_work: whether there is an engine with a model for this list. clock: of the wall."""
        self._queue = queue
        self._journal = journal
        self._bell = bell
        self._decode = decode
        self._tell = tell
        self._rows = rows
        self._worker = worker
        self._take_ahead = take_ahead
        self._can_work = can_work
        self._clock = clock
        self._ticks = ticks
        self._worked_at = ticks()  # when it last could
        self.handed_over = False  # after `stop_taking`: what had not begun is with others
        self._unread: deque[bytes] = deque()  # taken, and not yet in the journal or let go of
        self._kept: set[bytes] = set()  # taken, and held for jobs that are in the journal
        self._recovered = False
        self._marked: set[str] = set()  # jobs whose row says that they are processed
        self._due: dict[str, float] = {}
        self._taking = True
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"list {queue.name}", daemon=True)

    @property
    def name(self) -> str:
        """Of the list."""
        return self._queue.name

    def start(self) -> None:
        self._thread.start()

    def stop_taking(self) -> None:
        """Take nothing more, and hand what has not begun to other workers."""
        self._taking = False
        self._bell.ring()

    def close(self) -> None:
        self._stopping = True
        self._bell.ring()
        self._thread.join(timeout=15)
        self._queue.close()

    def _run(self) -> None:
        while not self._stopping:
            wait_s, was_taking = TAKE_EVERY_S, self._taking
            try:
                if self.tick():
                    wait_s = 0.0
                self.handed_over = self.handed_over or not was_taking
            except (QueueUnavailable, RowsUnavailable, JournalUnavailable) as exc:
                log.error("%s; trying again in %.0f s", exc, AFTER_ERROR_S)
                wait_s = AFTER_ERROR_S
                # A drain does not wait for a server that is away; what lies there is adopted.
                self.handed_over = not was_taking
            ends = time.monotonic() + wait_s
            while (
                not self._stopping
                and self._taking == was_taking
                and (left_s := ends - time.monotonic()) > 0
            ):
                time.sleep(min(0.1, left_s))

    def recover(self, *statuses: Status) -> None:
        """At the start: what lies in this worker's list is accepted again, and jobs in one of
        these states whose elements another worker has adopted meanwhile are that one's. Raises
        QueueUnavailable, JournalUnavailable.

        That an element is gone is not enough: a server that lost its data has lost it for all,
        and then this journal alone knows the job.
        """
        held = self._queue.held()
        if self._queue.was_adopted():
            for job in self._journal.of_source(self._queue.name, *statuses):
                if job.element is not None and job.element not in held and not job.assets:
                    log.warning("job %s was adopted by another worker", job.id)
                    self._journal.disown(job.id)
            self._queue.note_adoption()
        self._unread.extend(held)
        self._recovered = True

    def tick(self) -> bool:
        """One round. True when there may be more to take at once."""
        if not self._recovered:
            self.recover(Status.QUEUED)
        if self._is_due("beat", BEAT_EVERY_S):
            self._queue.beat()
        if self._is_due("adopt", ADOPT_EVERY_S) and self._taking:
            for worker in self._queue.orphans():
                log.warning("adopted %d elements of %s", self._queue.adopt(worker), worker)
        while self._unread:
            self._accept_or_bury(self._unread[0])
            self._unread.popleft()
        self._let_go()  # after it is known what an earlier life held
        if not self._taking:
            self._hand_over()
            return False
        if self._rows is not None and self._is_due("watch", WATCH_EVERY_S):
            self._watch(self._rows)
        if not self._can_work():
            if self._ticks() - self._worked_at >= HAND_OVER_AFTER_S:
                self._hand_over()
            return False
        self._worked_at = self._ticks()
        if len(self._journal.of_source(self._queue.name, Status.QUEUED)) >= self._take_ahead:
            return False
        element = self._queue.take()
        if element is None:
            return False
        self._unread.append(element)
        return True

    # --- taking --------------------------------------------------------------------------------

    def _accept_or_bury(self, element: bytes) -> None:
        """One element that nobody thought of may not end the runner, again and again."""
        try:
            self._accept(element)
        except (QueueUnavailable, RowsUnavailable, JournalUnavailable):
            raise
        except Exception:
            log.exception("an element of %s cannot be taken", self._queue.name)
            self._bury(element, "unexpected error in the worker; its log has the details")

    def _accept(self, element: bytes) -> None:
        """Into the journal, to the dead letters, or away; every way may be gone twice."""
        try:
            bodies = [(_id_of(body), body) for body in decode_element(element)]
        except MalformedElement as exc:
            self._bury(element, exc.reason)
            return
        kept = [self._accept_body(job_id, body, element) for job_id, body in bodies]
        # Pushed twice, it lies there twice: one of them is enough.
        if any(kept) and element not in self._kept:
            self._kept.add(element)
        else:
            self._queue.settle(element)

    def _accept_body(self, job_id: str, body: dict[str, Any], element: bytes) -> bool:
        """Whether the element has to stay for this job."""
        with request_scope(job_id):
            if not is_job_id(job_id):
                self._bury(element, "the id of a job in it is no id that this worker takes")
                return False
            if self._rows is not None and (why := skip_reason(self._rows.status(job_id))):
                log.info("skipped: its row is %s", why)
                if why == MISSING:  # a key that may not see the rows looks the same
                    self._bury(element, "the table of jobs has no row with this id that the "
                               "service key may see")  # fmt: skip
                return False
            try:
                request = self._decode(body)
                job, is_new = self._journal.add(
                    request, given=body, source=self._queue.name, element=element,
                    tell=lambda job: self._tell(job, job.status.value),
                )  # fmt: skip
                log.info("%s from %s", "accepted" if is_new else "known", self._queue.name)
                return job.element == element
            except JournalUnavailable:
                raise
            except Conflict as exc:
                self._bury(element, str(exc))
                return False
            except WorkerError as exc:
                return self._refuse(job_id, body, element, exc)
            except Exception:  # or one such element would end every process that takes it
                log.exception("the body of a job could not be read")
                text = "unexpected error in the worker; the log has the details"
                return self._refuse(job_id, body, element, WorkerError(text))

    def _refuse(
        self, job_id: str, body: dict[str, Any], element: bytes, error: WorkerError
    ) -> bool:
        """Whether the element has to stay until somebody was told."""
        log.warning("refused: %s", error.code)
        job = Job(
            id=job_id, request=None, given=body, source=self._queue.name, element=element,
            created_at=self._clock(), status=Status.FAILED, error=str(error),
            error_code=error.code,
        )  # fmt: skip
        try:
            known = self._journal.refuse(
                job_id, body, self._queue.name, element, str(error), error.code,
                self._tell(job, "failed"),
            )  # fmt: skip
        except Conflict as exc:
            self._bury(element, str(exc))
            return False
        return known.element == element

    def _bury(self, element: bytes, reason: str) -> None:
        log.error("an element of %s goes to its dead letters: %s", self._queue.name, reason)
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds")
        self._queue.bury(element, reason, self._worker, at)

    # --- letting go ----------------------------------------------------------------------------

    def _let_go(self) -> None:
        for job in self._journal.settled(self._queue.name):
            assert job.element is not None
            self._queue.settle(job.element)
            self._journal.let_go(job.id)
            self._kept.discard(job.element)
            self._marked.discard(job.id)

    def _hand_over(self) -> None:
        """What has not begun goes back to the front of the list, the newest first."""
        for job in self._journal.of_source(self._queue.name, Status.QUEUED)[::-1]:
            if job.element is not None and self._is_alone(job) and self._journal.hand_over(job.id):
                self._kept.discard(job.element)
                try:
                    self._queue.give_back(job.element)
                except QueueUnavailable:
                    self._unread.append(job.element)  # still this worker's: accepted once more
                    raise
                log.info("job %s goes back to %s", job.id, self._queue.name)

    def _is_alone(self, job: Job) -> bool:
        """Whether no other job came in the same element."""
        assert job.element is not None
        return len(decode_element(job.element)) == 1

    # --- rows ----------------------------------------------------------------------------------

    def _watch(self, rows: JobRows) -> None:
        """Users cancel a job by a word in its row; and a row says that its job is processed."""
        for job in self._open_jobs():
            if self._is_due("beat", BEAT_EVERY_S):
                self._queue.beat()
            status = rows.status(job.id)
            if status is not None and skip_reason(status) is not None:
                log.info("job %s is to end: its row is %s", job.id, status)
                self._journal.wish_cancel(job.id)
            elif job.status is Status.PROCESSING and job.id not in self._marked:
                rows.mark_processing(job.id, job.started_at or self._clock())
                self._marked.add(job.id)

    def _open_jobs(self) -> Sequence[Job]:
        found = self._journal.of_source(self._queue.name, Status.QUEUED, Status.PROCESSING)
        return [job for job in found if not job.is_uploading]

    def _is_due(self, what: str, every_s: float) -> bool:
        now = self._ticks()
        if now - self._due.get(what, float("-inf")) < every_s:
            return False
        self._due[what] = now
        return True


def _id_of(body: dict[str, Any]) -> str:
    """Raises MalformedElement: without an id nobody could be told what became of the job."""
    job_id = job_id_of(body)
    if job_id is None:
        raise MalformedElement("a job in it has no id")
    return job_id

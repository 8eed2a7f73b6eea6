"""What follows when a job could not be made: it ends, or it is tried again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from worker.errors import Cancelled, DiskFull, EngineLost, EngineUnavailable, WorkerError
from worker.jobs.job import Status
from worker.protocol.messages import Failed, failed

# An engine that died twice over the same job would die a third time.
MAX_ATTEMPTS = 2
FETCH_TRIES = 3
FULL_DISK_S = 10.0


@dataclass(frozen=True, slots=True)
class Ended:
    """The job has failed or was cancelled."""

    status: Status
    error: str
    error_code: str


@dataclass(frozen=True, slots=True)
class Again:
    """The job is queued for another try."""

    after_s: float = 0.0
    engine_died: bool = False  # over this job, which counts against it
    why: str = ""  # for the log


def after_failure(
    failure: Failed, *, cancelled: bool, is_beside_a_render: bool, deaths: int
) -> Ended | Again:
    """The engine said no, or is gone.

    is_beside_a_render: only files of this job were written while another one was rendered; more
    likely it was that one that the engine died of. deaths: of engines over this job before.
    """
    lost = failure.code in (EngineLost.code, EngineUnavailable.code)
    if cancelled and lost:
        return Ended(Status.CANCELLED, failure.error, Cancelled.code)
    if failure.code == EngineUnavailable.code:
        return Again()  # it never reached an engine, so this does not count
    if lost and is_beside_a_render:
        return Again(why="the engine died while this job's files were written; it goes on")
    if lost and deaths + 1 < MAX_ATTEMPTS:
        why = "the engine died on this job; it goes on with the next one"
        return Again(engine_died=True, why=why)
    if failure.code == DiskFull.code:
        why = "there is no room for the files of this job; it is tried again"
        return Again(FULL_DISK_S, why=why)
    status = Status.CANCELLED if failure.code == Cancelled.code else Status.FAILED
    return Ended(status, failure.error, failure.code)


def after_a_missing_picture(job_id: str, error: WorkerError, *, tries: int) -> Ended | Again:
    """A picture of the job cannot be had. tries: of fetching, this one too; 1 or more."""
    why = f"a reference cannot be had ({error.code})"
    if error.retry_after_s is not None and tries < FETCH_TRIES:
        return Again(error.retry_after_s * 2 ** (tries - 1), why=why)
    return after_failure(failed(job_id, error), cancelled=False, is_beside_a_render=False, deaths=0)

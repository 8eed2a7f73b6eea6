"""What follows when a job could not be made."""

from __future__ import annotations

import pytest

from worker.errors import (
    Cancelled,
    DiskFull,
    EngineLost,
    EngineUnavailable,
    OutOfDeviceMemory,
    ReferenceRefused,
    ReferenceUnavailable,
    WorkerError,
)
from worker.jobs.failures import (
    FETCH_TRIES,
    FULL_DISK_S,
    MAX_ATTEMPTS,
    Again,
    Ended,
    after_a_missing_picture,
    after_failure,
)
from worker.jobs.job import Status
from worker.protocol.messages import failed

CANCELLED, FAILED = Status.CANCELLED, Status.FAILED
KINDS: list[type[WorkerError]] = [Cancelled, DiskFull, EngineLost, EngineUnavailable]


def after(
    kind: type[WorkerError], *, cancelled: bool = False, beside: bool = False, deaths: int = 0
) -> Ended | Again:
    failure = failed("j", kind("its text"))
    return after_failure(failure, cancelled=cancelled, is_beside_a_render=beside, deaths=deaths)


def test_what_an_engine_refuses_ends_the_job_with_its_words() -> None:
    assert after(OutOfDeviceMemory) == Ended(FAILED, "its text", "out_of_device_memory")
    assert after(Cancelled) == Ended(CANCELLED, "its text", "cancelled")


@pytest.mark.parametrize("deaths", range(MAX_ATTEMPTS + 2))
def test_an_engine_may_die_over_a_job_once(deaths: int) -> None:
    what = after(EngineLost, deaths=deaths)

    if deaths + 1 < MAX_ATTEMPTS:
        assert isinstance(what, Again) and what.engine_died
    else:
        assert what == Ended(FAILED, "its text", "engine_lost")


@pytest.mark.parametrize("deaths", range(MAX_ATTEMPTS + 2))
def test_what_a_job_is_not_to_blame_for_never_ends_it(deaths: int) -> None:
    for what in (
        after(EngineUnavailable, deaths=deaths),
        after(EngineLost, beside=True, deaths=deaths),
        after(DiskFull, deaths=deaths),
    ):
        assert isinstance(what, Again) and not what.engine_died


def test_a_full_disk_is_given_time() -> None:
    assert [after(kind) for kind in (DiskFull, EngineUnavailable)] == [
        Again(FULL_DISK_S, why="there is no room for the files of this job; it is tried again"),
        Again(),
    ]


@pytest.mark.parametrize("kind", [EngineLost, EngineUnavailable])
@pytest.mark.parametrize("beside", [False, True])
def test_a_cancelled_job_does_not_begin_anew_with_another_engine(
    kind: type[WorkerError], beside: bool
) -> None:
    assert after(kind, cancelled=True, beside=beside) == Ended(CANCELLED, "its text", "cancelled")


@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_but_a_cancel_is_survived_by_a_job_that_is_new(
    kind: type[WorkerError],
) -> None:
    assert isinstance(after(kind), Ended if kind is Cancelled else Again)


def test_a_picture_that_may_come_later_is_tried_again_after_longer_and_longer() -> None:
    error = ReferenceUnavailable("answers 503", retry_after_s=5.0)

    waits = [after_a_missing_picture("j", error, tries=n) for n in range(1, FETCH_TRIES + 1)]

    why = "a reference cannot be had (reference_unavailable)"
    assert waits == [
        Again(5.0, why=why),
        Again(10.0, why=why),
        Ended(FAILED, "answers 503", "reference_unavailable"),
    ]


@pytest.mark.parametrize("tries", [1, FETCH_TRIES])
def test_a_picture_that_is_refused_is_not_tried_again(tries: int) -> None:
    what = after_a_missing_picture("j", ReferenceRefused("no"), tries=tries)

    assert what == Ended(FAILED, "no", "reference_refused")


@pytest.mark.parametrize("tries", [1, 100])
def test_a_disk_without_room_for_a_picture_is_given_time(tries: int) -> None:
    what = after_a_missing_picture("j", DiskFull("no room"), tries=tries)

    assert isinstance(what, Again)
    assert what.after_s == FULL_DISK_S

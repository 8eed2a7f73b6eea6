"""Jobs in memory: accepted once, run in order, final for ever, forgotten in the end."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from worker.errors import Busy, Conflict, NotFound
from worker.jobs.decode import JobRequest
from worker.jobs.job import Job, Status
from worker.jobs.table import JobTable
from worker.protocol.messages import RenderParams

FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class Clock:
    """Wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A table with its clock and what it has dropped."""

    def __init__(self, max_waiting: int = 10, keep_finished: int = 10):
        self.clock = Clock()
        self.forgotten: list[str] = []
        self.table = JobTable(
            max_waiting, keep_finished, lambda job: self.forgotten.append(job.id), self.clock
        )

    def add(self, job_id: str | None = None, key: str | None = None, body: str = "x") -> Job:
        job, _ = self.table.add(request(job_id, body), key)
        return job

    def run(self, job_id: str, status: Status = Status.COMPLETED) -> Job:
        """Take a job through processing to its end."""
        self.table.update(job_id, status=Status.PROCESSING, started_at=self.clock())
        self.clock.now += 4.0
        return self.table.update(job_id, status=status)


def request(job_id: str | None = None, body: str = "x", **params: Any) -> JobRequest:
    return JobRequest(
        job_id=job_id,
        type="sdxl_image_fast",
        model="m",
        output="image",
        params=RenderParams(
            prompt="x",
            negative_prompt=None,
            width=64,
            height=64,
            **{"steps": 4, "guidance_scale": 5.0, "seed": 0, **params},
        ),
        ignored=(),
        body=body,
    )


# --- accepting ---------------------------------------------------------------------------------


def test_a_new_job_is_queued_with_its_time_and_all_its_steps() -> None:
    bench = Bench()

    job, is_new = bench.table.add(request("a", steps=4, num_images=3))

    assert is_new
    assert (job.id, job.status, job.created_at) == ("a", Status.QUEUED, 1000.0)
    assert (job.step, job.steps) == (0, 12)
    assert bench.table.get("a") == job


def test_jobs_without_an_id_get_one_each() -> None:
    bench = Bench()

    ids = {bench.add().id for _ in range(5)}

    assert len(ids) == 5
    assert all(ids)


def test_jobs_begin_in_the_order_they_came() -> None:
    bench = Bench()
    for job_id in "abc":
        bench.add(job_id)

    begun = []
    while (job := bench.table.next_queued()) is not None:
        begun.append(job.id)
        bench.run(job.id)

    assert begun == ["a", "b", "c"]


def test_a_job_that_begins_anew_keeps_its_place() -> None:
    bench = Bench()
    for job_id in "ab":
        bench.add(job_id)
    bench.table.update("a", status=Status.PROCESSING)

    bench.table.update("a", status=Status.QUEUED)

    job = bench.table.next_queued()
    assert job is not None
    assert job.id == "a"


def test_a_queued_job_knows_how_many_run_before_it() -> None:
    bench = Bench()
    jobs = [bench.add(job_id) for job_id in "abc"]
    bench.table.update("a", status=Status.PROCESSING)

    assert [bench.table.position(job) for job in jobs] == [None, 0, 1]


def test_an_unknown_job_is_not_found() -> None:
    with pytest.raises(NotFound):
        Bench().table.get("a")
    with pytest.raises(NotFound):
        Bench().table.ask_to_cancel("a")


# --- the same again ----------------------------------------------------------------------------


def test_the_same_id_with_the_same_body_joins_the_job() -> None:
    bench = Bench()
    first = bench.add("a")

    again = bench.table.add(request("a"))

    assert again == (first, False)


def test_the_same_key_with_the_same_body_joins_the_job() -> None:
    bench = Bench()
    first = bench.add(key="k")

    again = bench.table.add(request(), "k")

    assert again == (first, False)


def test_joining_a_job_that_has_ended_finds_its_end() -> None:
    bench = Bench()
    bench.add("a", key="k")
    ended = bench.run("a")

    assert bench.table.add(request("a"), None) == (ended, False)
    assert bench.table.add(request("a"), "k") == (ended, False)


@pytest.mark.parametrize(("job_id", "key"), [("a", None), (None, "k"), ("a", "k"), ("a", "other")])
def test_the_same_id_or_key_with_another_body_is_a_conflict(
    job_id: str | None, key: str | None
) -> None:
    bench = Bench()
    bench.add("a", key="k")

    with pytest.raises(Conflict):
        bench.table.add(request(job_id, body="other"), key)


def test_other_keys_and_no_key_make_other_jobs() -> None:
    bench = Bench()

    ids = {bench.add(key="k").id, bench.add(key="l").id, bench.add().id, bench.add().id}

    assert len(ids) == 4


def test_joining_is_possible_while_the_queue_is_full() -> None:
    bench = Bench(max_waiting=1)
    first = bench.add("a")

    assert bench.table.add(request("a")) == (first, False)


# --- a full queue ------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_the_time_of_a_job() -> None:
    bench = Bench(max_waiting=2)
    bench.add("a")
    bench.add("b")

    with pytest.raises(Busy, match="2 jobs are waiting, at most 2 may") as caught:
        bench.add("c")

    assert caught.value.status == 429
    assert caught.value.retry_after_s == 20.0  # a guess, before any has run


def test_the_time_of_a_job_is_learnt_from_those_that_completed() -> None:
    bench = Bench(max_waiting=1)
    for number in range(40):
        bench.run(bench.add(str(number)).id)
    bench.add("a")

    with pytest.raises(Busy) as caught:
        bench.add("b")

    assert caught.value.retry_after_s == pytest.approx(4.0, abs=0.1)


def test_a_failed_job_teaches_nothing_about_time() -> None:
    bench = Bench(max_waiting=1)
    bench.run(bench.add().id, Status.FAILED)
    bench.add("a")

    with pytest.raises(Busy) as caught:
        bench.add("b")

    assert caught.value.retry_after_s == 20.0


def test_a_job_that_has_begun_takes_no_place_in_the_queue() -> None:
    bench = Bench(max_waiting=1)
    bench.add("a")
    bench.table.update("a", status=Status.PROCESSING)

    assert bench.add("b").status is Status.QUEUED


def test_a_worker_without_waiting_places_still_takes_one_job() -> None:
    bench = Bench(max_waiting=0)

    bench.add("a")

    with pytest.raises(Busy):
        bench.add("b")


# --- ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", FINAL)
def test_a_job_that_ends_has_its_time_and_no_phase(status: Status) -> None:
    bench = Bench()
    bench.add("a")
    bench.table.update("a", status=Status.PROCESSING, phase="denoise", step=2)
    bench.clock.now = 1010.0

    job = bench.table.update("a", status=status)

    assert (job.status, job.phase, job.finished_at) == (status, None, 1010.0)


@pytest.mark.parametrize("status", FINAL)
@pytest.mark.parametrize("later", list(Status))
def test_a_final_state_never_changes(status: Status, later: Status) -> None:
    bench = Bench()
    bench.add("a")
    ended = bench.run("a", status)
    bench.clock.now += 100

    said = [
        bench.table.update("a", status=later, error="late", step=3),
        bench.table.ask_to_cancel("a"),
    ]

    assert said == [ended, ended]
    assert bench.table.get("a") == ended


def test_only_the_three_ends_are_final() -> None:
    assert [status for status in Status if status.is_final] == list(FINAL)


def test_a_queued_job_is_cancelled_at_once() -> None:
    bench = Bench()
    bench.add("a")
    bench.add("b")

    job = bench.table.ask_to_cancel("a")

    assert (job.status, job.error_code) == (Status.CANCELLED, "cancelled")
    assert job.cancel_requested
    following = bench.table.next_queued()
    assert following is not None
    assert following.id == "b"


def test_a_running_job_is_cancelled_by_its_engine_only() -> None:
    bench = Bench()
    bench.add("a")
    bench.table.update("a", status=Status.PROCESSING)

    job = bench.table.ask_to_cancel("a")

    assert (job.status, job.cancel_requested) == (Status.PROCESSING, True)


def test_jobs_are_counted_by_status() -> None:
    bench = Bench()
    for job_id in "abcde":
        bench.add(job_id)
    bench.run("a")
    bench.run("b", Status.FAILED)
    bench.table.update("c", status=Status.PROCESSING)

    assert bench.table.counts() == {
        "queued": 2,
        "processing": 1,
        "completed": 1,
        "failed": 1,
        "cancelled": 0,
    }


# --- forgetting --------------------------------------------------------------------------------


def test_above_the_bound_the_oldest_finished_jobs_are_forgotten() -> None:
    bench = Bench(keep_finished=2)
    for job_id in "abcd":
        bench.add(job_id)
    for job_id in "abc":
        bench.run(job_id)

    assert bench.forgotten == ["a"]
    with pytest.raises(NotFound):
        bench.table.get("a")
    assert bench.table.counts() == {
        "queued": 1,
        "processing": 0,
        "completed": 2,
        "failed": 0,
        "cancelled": 0,
    }


def test_a_job_that_has_just_finished_is_not_the_one_that_is_forgotten() -> None:
    # Its client waits for it; those that ended before have been told.
    bench = Bench(keep_finished=1)
    for job_id in "ab":
        bench.add(job_id)
    bench.table.update("a", status=Status.PROCESSING, started_at=1000.0)
    bench.table.ask_to_cancel("b")
    bench.clock.now += 60

    bench.table.update("a", status=Status.COMPLETED)

    assert bench.forgotten == ["b"]
    assert bench.table.get("a").status is Status.COMPLETED


def test_jobs_that_have_not_ended_are_never_forgotten() -> None:
    bench = Bench(max_waiting=50, keep_finished=1)
    for number in range(20):
        bench.add(str(number))

    for number in range(10, 20):
        bench.table.ask_to_cancel(str(number))

    assert bench.table.counts()["queued"] == 10
    assert len(bench.forgotten) == 9


def test_the_id_and_key_of_a_forgotten_job_are_free_again() -> None:
    bench = Bench(keep_finished=1)
    bench.add("a", key="k")
    bench.add("b")
    bench.run("a")
    bench.run("b")

    by_id = bench.table.add(request("a", body="other"))
    by_key = bench.table.add(request(body="other"), "k")

    assert (by_id[1], by_key[1]) == (True, True)


# --- waiting -----------------------------------------------------------------------------------


def test_a_change_that_came_before_the_wait_ends_it_at_once() -> None:
    bench = Bench()
    seen = bench.table.wait_for_change(-1, timeout_s=0)
    bench.add("a")

    version = bench.table.wait_for_change(seen, timeout_s=60)

    assert version != seen


def test_without_a_change_the_wait_ends_with_its_time() -> None:
    bench = Bench()
    bench.add("a")
    seen = bench.table.wait_for_change(-1, timeout_s=0)

    assert bench.table.wait_for_change(seen, timeout_s=0) == seen


def test_a_change_wakes_who_waits() -> None:
    bench = Bench()
    seen = bench.table.wait_for_change(-1, timeout_s=0)
    versions: list[int] = []
    waiter = threading.Thread(
        target=lambda: versions.append(bench.table.wait_for_change(seen, timeout_s=60))
    )
    waiter.start()

    bench.add("a")

    waiter.join(timeout=10)
    assert versions == [seen + 1]


def test_an_update_of_a_job_that_has_ended_wakes_nobody() -> None:
    bench = Bench()
    bench.add("a")
    bench.run("a")
    seen = bench.table.wait_for_change(-1, timeout_s=0)

    bench.table.update("a", step=1)

    assert bench.table.wait_for_change(seen, timeout_s=0) == seen


def test_one_job_at_one_moment_is_a_value() -> None:
    bench = Bench()
    before = bench.add("a")

    after = bench.table.update("a", step=1)

    assert (before.step, after.step) == (0, 1)
    with pytest.raises(AttributeError):
        after.step = 2  # type: ignore[misc]


def test_many_threads_agree_on_one_job() -> None:
    bench = Bench(max_waiting=1)
    answers: list[tuple[str, bool]] = []

    def send() -> None:
        job, is_new = bench.table.add(request(), "k")
        answers.append((job.id, is_new))

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert len({job_id for job_id, _ in answers}) == 1
    assert [is_new for _, is_new in answers].count(True) == 1

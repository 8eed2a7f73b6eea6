"""The journal of jobs: accepted once, run in order, final for ever, on the disk at every moment."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.job_parts import Clock, Tell, asset, nothing, request, says, uploads
from worker.errors import (
    Busy,
    Conflict,
    InvalidRequest,
    JournalUnavailable,
    NotFound,
    has_trap_word,
)
from worker.jobs import database as database_module
from worker.jobs.bell import Bell
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal, NewDelivery, Upload
from worker.jobs.schedule import Waiting
from worker.jobs.schema import STEPS
from worker.jobs.stored import MAX_NESTING
from worker.protocol.messages import LoraUse, WeightedTerm

FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
REPOSITORY = Path(__file__).parents[2]
TOLD = [NewDelivery("callback", "job.failed", b"{}")]


class Bench:
    """A journal with its clock and bell."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clock = Clock()
        self.bell = Bell()
        self.journal = Journal(folder, self.bell, self.clock)

    def add(self, job_id: str | None = None, body: str = "x", **more: Any) -> Job:
        job, _ = self.journal.add(request(job_id, body), **more)
        return job

    def begin(self, job_id: str, deliveries: Tell = nothing) -> Job:
        job = self.journal.claim(job_id, deliveries)
        assert job is not None
        return job

    def run(self, job_id: str, status: Status = Status.COMPLETED, content: bytes = b"") -> Job:
        """Take a queued job through processing to its end, four seconds later."""
        self.begin(job_id)
        self.clock.now += 4.0
        if status is Status.COMPLETED:
            return self.rendered(job_id, content or job_id.encode())
        return self.journal.end(job_id, status, "no", status.value, nothing)

    def rendered(
        self, job_id: str, *contents: bytes, to: list[Upload] | None = None, tell: Tell = nothing
    ) -> Job:
        assets = [asset(content, index) for index, content in enumerate(contents)]
        return self.journal.rendered(
            job_id, assets, {"seed": 0}, {"denoise": 0.5}, to if to is not None else [], tell
        )

    def another(self) -> Journal:
        """The journal as another process has it."""
        return Journal(self.folder, Bell(), self.clock)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "jobs")
    yield bench
    bench.journal.close()


# --- accepting ---------------------------------------------------------------------------------


def test_a_new_job_is_queued_with_its_time(bench: Bench) -> None:
    job, is_new = bench.journal.add(request("a"), given={"prompt": "x", "n": [1, None]})

    assert is_new
    assert (job.id, job.status, job.created_at) == ("a", Status.QUEUED, 1000.0)
    assert (job.started_at, job.finished_at, job.starts) == (None, None, 0)
    assert bench.journal.get("a") == job


def test_everything_about_a_job_comes_back_as_it_was_given(bench: Bench) -> None:
    params = msgspec.structs.replace(
        request().params,
        prompt="ein Würfel \udc00 \0",
        negative_prompt="",
        seed=2**31 - 1,
        weighted=(WeightedTerm(text="a", weight=1.1),),
    )
    asked = request(
        "a",
        params=msgspec.structs.replace(params, prompt="ein Würfel \0"),
        ignored=("quality", "user_id"),
        adjusted={"frames": {"sent": 83, "used": 81}},
        keep_alive_s=-1.0,
        priority=-10,
        user_id="u-1",
        webhook_url="https://hook.example/a",
        webhook_secret="hush",
    )
    given = {"prompt": "half \ud83d", "deep": [[{}]], "big": 2**80}

    bench.journal.add(asked, given=given, source="sdxl_queue", element=b"\xff\0{}")

    job = bench.journal.get("a")
    assert job.request == asked
    assert job.given == given
    assert (job.source, job.element) == ("sdxl_queue", b"\xff\0{}")


def deep(levels: int) -> dict[str, Any]:
    value: Any = 1
    for level in range(levels - 1):
        value = {"a": value} if level % 2 else [value]
    return {"deep": value}


def test_a_body_that_another_thread_could_not_read_is_refused(bench: Bench) -> None:
    """Or one job would end every process that looks at it."""
    bench.add("a", given=deep(MAX_NESTING))

    with pytest.raises(InvalidRequest, match=f"more than {MAX_NESTING} deep"):
        bench.add("b", given=deep(MAX_NESTING + 1))

    assert bench.journal.get("a").given == deep(MAX_NESTING)
    assert bench.journal.counts()["queued"] == 1


def test_of_a_refused_body_that_is_nested_too_deeply_only_the_error_is_kept(bench: Bench) -> None:
    for _ in range(2):
        bench.journal.refuse("a", deep(5000), "list", b"e", "too deep", "invalid_request", TOLD)

    job = bench.journal.get("a")
    assert (job.given, job.error) == ({}, "too deep")
    assert len(bench.journal.deliveries()) == 1


def test_jobs_without_an_id_get_one_each(bench: Bench) -> None:
    ids = {bench.add().id for _ in range(5)}

    assert len(ids) == 5
    assert all(ids)


def test_jobs_wait_in_the_order_they_came(bench: Bench) -> None:
    for job_id in "bca":
        bench.add(job_id)

    assert [one.id for one in bench.journal.waiting()] == ["b", "c", "a"]


def test_what_waits_has_all_that_its_turn_depends_on(bench: Bench) -> None:
    bench.journal.add(request("a", model="other", priority=7))

    assert bench.journal.waiting() == [
        Waiting("a", 1, "other", priority=7, created_at=1000.0, not_before=0.0, overtaken=0)
    ]


def test_only_sdxl_jobs_of_texts_alone_that_allow_it_have_a_shape_to_share(bench: Bench) -> None:
    params = request().params
    film = msgspec.structs.replace(params, mode="image", strength=0.5)
    styled = msgspec.structs.replace(params, loras=(LoraUse("grain", 0.5),))
    bench.journal.add(request("close", "1", exactness="close"))
    bench.journal.add(request("lossy", "2", exactness="lossy"))
    bench.journal.add(request("bit", "3"))
    bench.journal.add(request("wan", "4", exactness="close", type="image_fast"))
    bench.journal.add(request("picture", "5", exactness="close", params=film))
    bench.journal.add(request("lora", "6", exactness="close", params=styled))

    shapes = {one.id: one.shape for one in bench.journal.waiting()}

    assert shapes == {
        "close": (64, 64, 4, 5.0, None), "lossy": (64, 64, 4, 5.0, None),
        "bit": None, "wan": None, "picture": None, "lora": None,
    }  # fmt: skip


def test_shapes_differ_in_all_that_a_batch_has_in_common_and_in_nothing_else(bench: Bench) -> None:
    params = request().params
    other = {"width": 72, "height": 72, "steps": 5, "guidance_scale": 6.0, "scheduler": "ddim"}
    own = {"prompt": "y", "negative_prompt": "z", "seed": 9, "num_images": 3}
    for name, value in (other | own).items():
        changed = msgspec.structs.replace(params, **{name: value})
        bench.journal.add(request(name, name, exactness="close", params=changed))

    waiting = {one.id: one for one in bench.journal.waiting()}

    shapes = {waiting[name].shape for name in other}
    assert len(shapes | {params.batch_shape}) == len(other) + 1
    assert {waiting[name].shape for name in own} == {params.batch_shape}
    assert waiting["num_images"].images == 3


def test_a_job_that_was_begun_before_shares_no_batch_when_it_waits_again(bench: Bench) -> None:
    bench.journal.add(request("a", exactness="close"))
    bench.begin("a")

    bench.journal.requeue("a", engine_died=True)

    assert [one.shape for one in bench.journal.waiting()] == [None]


def test_a_queued_job_knows_how_many_came_before_it(bench: Bench) -> None:
    for job_id in "abc":
        bench.add(job_id)
    bench.begin("a")

    jobs = [bench.journal.get(job_id) for job_id in "abc"]

    assert [bench.journal.position(job) for job in jobs] == [None, 0, 1]


def test_an_unknown_job_is_not_found(bench: Bench) -> None:
    for ask in (bench.journal.get, bench.journal.wish_cancel):
        with pytest.raises(NotFound):
            ask("a")
    with pytest.raises(NotFound):
        bench.journal.end("a", Status.FAILED, "no", "no", nothing)


def test_a_job_that_is_refused_is_kept_with_why_and_somebody_is_told(bench: Bench) -> None:
    job = bench.journal.refuse(
        "a", {"steps": 0}, "wan_queue", b"e", "steps is 0", "out_of_range", TOLD
    )

    assert bench.journal.get("a") == job
    assert (job.status, job.error, job.error_code) == (
        Status.FAILED,
        "steps is 0",
        "out_of_range",
    )
    assert (job.request, job.given, job.element) == (None, {"steps": 0}, b"e")
    assert job.created_at == job.finished_at == 1000.0
    assert [one.job_id for one in bench.journal.deliveries()] == ["a"]


def test_the_same_refused_body_again_tells_nobody_again(bench: Bench) -> None:
    def refuse(**given: Any) -> Job:
        return bench.journal.refuse("a", given, "wan_queue", b"e", "no", "unsupported", TOLD)

    first = refuse(steps=0)
    again = refuse(steps=0)

    assert again == first
    assert len(bench.journal.deliveries()) == 1
    with pytest.raises(Conflict):
        refuse(steps=-1)


def test_a_body_that_is_refused_under_the_id_of_another_job_is_a_conflict(bench: Bench) -> None:
    bench.add("a", given={"steps": 4})

    with pytest.raises(Conflict):
        bench.journal.refuse("a", {"steps": 5}, "wan_queue", b"e", "no", "unsupported", ())

    assert bench.journal.get("a").status is Status.QUEUED


def test_a_body_that_was_accepted_before_and_is_refused_now_leaves_its_job(bench: Bench) -> None:
    job = bench.add("a", given={"steps": 4})

    known = bench.journal.refuse("a", {"steps": 4}, "wan_queue", b"e", "no", "unsupported", ())

    assert (known.id, known.status) == (job.id, Status.QUEUED)


def test_a_body_that_was_refused_before_and_is_accepted_now_is_a_new_job(bench: Bench) -> None:
    bench.journal.refuse("a", {"steps": 4}, "wan_queue", b"e", "no", "unsupported", ())

    job, is_new = bench.journal.add(request("a"), given={"steps": 4})

    assert (is_new, job.status) == (True, Status.QUEUED)


def test_a_job_that_came_over_http_and_comes_from_a_list_is_the_lists(bench: Bench) -> None:
    bench.journal.add(request("a"))

    job, is_new = bench.journal.add(request("a"), source="wan_queue", element=b"e")

    assert (is_new, job.source, job.element) == (False, "wan_queue", b"e")


# --- the same again ----------------------------------------------------------------------------


def test_the_same_id_with_the_same_body_joins_the_job(bench: Bench) -> None:
    first = bench.add("a")

    assert bench.journal.add(request("a")) == (first, False)


def test_the_same_key_with_the_same_body_joins_the_job(bench: Bench) -> None:
    first = bench.add(key="k")

    assert bench.journal.add(request(), key="k") == (first, False)


def test_joining_a_job_that_has_ended_finds_its_end(bench: Bench) -> None:
    bench.add("a", key="k")
    ended = bench.run("a")

    assert bench.journal.add(request("a")) == (ended, False)
    assert bench.journal.add(request("a"), key="k") == (ended, False)


@pytest.mark.parametrize(("job_id", "key"), [("a", None), (None, "k"), ("a", "k"), ("a", "other")])
def test_the_same_id_or_key_with_another_body_is_a_conflict(
    bench: Bench, job_id: str | None, key: str | None
) -> None:
    bench.add("a", key="k")

    with pytest.raises(Conflict) as caught:
        bench.journal.add(request(job_id, body="other"), key=key)

    assert caught.value.status == 409


def test_the_id_of_one_job_with_the_key_of_another_is_a_conflict(bench: Bench) -> None:
    bench.add("a", body="of a")
    bench.add("b", body="of b", key="k")

    with pytest.raises(Conflict):
        bench.journal.add(request("a", body="of a"), key="k")

    assert bench.journal.add(request(body="of b"), key="k")[0].id == "b"


def test_a_key_that_comes_with_a_known_id_is_known_from_then_on(bench: Bench) -> None:
    first = bench.add("a")

    bench.add("a", key="k")

    assert bench.journal.add(request(), key="k") == (first, False)


def test_a_job_keeps_the_first_key_that_it_came_with(bench: Bench) -> None:
    bench.add("a", key="k")

    bench.add("a", key="l")

    assert bench.journal.add(request(), key="k")[1] is False
    assert bench.journal.add(request(), key="l")[1] is True


def test_other_keys_and_no_key_make_other_jobs(bench: Bench) -> None:
    ids = {bench.add(key="k").id, bench.add(key="l").id, bench.add().id, bench.add().id}

    assert len(ids) == 4


def test_many_threads_agree_on_one_job(bench: Bench) -> None:
    answers: list[tuple[str, bool]] = []

    def send() -> None:
        job, is_new = bench.journal.add(request(), key="k", max_waiting=1)
        answers.append((job.id, is_new))

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert len({job_id for job_id, _ in answers}) == 1
    assert [is_new for _, is_new in answers].count(True) == 1


# --- a full queue ------------------------------------------------------------------------------


def test_joining_is_possible_while_the_queue_is_full(bench: Bench) -> None:
    first = bench.add("a")

    assert bench.journal.add(request("a"), max_waiting=1) == (first, False)


def test_a_full_queue_refuses_with_the_time_of_a_job(bench: Bench) -> None:
    bench.add("a")
    bench.add("b")

    with pytest.raises(Busy, match="2 jobs are waiting, at most 2 may") as caught:
        bench.add("c", max_waiting=2)

    assert caught.value.status == 429
    assert caught.value.retry_after_s == 20.0  # a guess, before any has run
    assert bench.journal.counts()["queued"] == 2


def test_the_time_of_a_job_is_learnt_from_those_that_completed_last(bench: Bench) -> None:
    bench.add("slow")
    bench.begin("slow")
    bench.clock.now += 1000.0
    bench.rendered("slow", b"x")
    for number in range(20):
        bench.add(str(number))
        bench.run(str(number))
    bench.add("a")

    with pytest.raises(Busy) as caught:
        bench.add("b", max_waiting=1)

    assert caught.value.retry_after_s == pytest.approx(4.0)


def test_a_failed_job_teaches_nothing_about_time(bench: Bench) -> None:
    bench.add("a")
    bench.run("a", Status.FAILED)
    bench.add("b")

    with pytest.raises(Busy) as caught:
        bench.add("c", max_waiting=1)

    assert caught.value.retry_after_s == 20.0


def test_a_job_that_has_begun_takes_no_place_in_the_queue(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")

    assert bench.add("b", max_waiting=1).status is Status.QUEUED


def test_a_worker_without_waiting_places_still_takes_one_job(bench: Bench) -> None:
    bench.add("a", max_waiting=0)

    with pytest.raises(Busy):
        bench.add("b", max_waiting=0)


def test_without_a_bound_any_number_may_wait(bench: Bench) -> None:
    for _ in range(50):
        bench.add()

    assert bench.journal.counts()["queued"] == 50


# --- beginning ---------------------------------------------------------------------------------


def test_a_job_that_begins_is_processed_from_now_on_and_somebody_is_told(bench: Bench) -> None:
    bench.add("a")
    bench.clock.now = 1010.0
    told: list[Job] = []

    def tell(job: Job) -> list[NewDelivery]:
        told.append(job)
        return list(says("processing")(job))

    job = bench.begin("a", tell)

    assert (job.status, job.started_at, job.starts) == (Status.PROCESSING, 1010.0, 1)
    assert told == [job] == [bench.journal.get("a")]
    assert [one.content for one in bench.journal.deliveries()] == [b"{}"]


def test_a_job_begins_once(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")

    assert bench.journal.claim("a", says("processing")) is None
    assert bench.journal.get("a").starts == 1
    assert bench.journal.deliveries() == []


@pytest.mark.parametrize("status", FINAL)
def test_a_job_that_has_ended_and_one_that_is_unknown_do_not_begin(
    bench: Bench, status: Status
) -> None:
    bench.add("a")
    bench.run("a", status)

    assert bench.journal.claim("a", nothing) is None
    assert bench.journal.claim("nobody", nothing) is None


def test_of_two_that_claim_a_job_one_gets_it(bench: Bench) -> None:
    other = bench.another()
    bench.add("a")
    got: list[Job | None] = []

    threads = [
        threading.Thread(target=lambda one=one: got.append(one.claim("a", nothing)))
        for one in (bench.journal, other) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    other.close()
    assert len(got) == 8
    assert sum(job is not None for job in got) == 1


def test_a_job_that_runs_first_has_overtaken_those_that_came_before_it(bench: Bench) -> None:
    for job_id in "abcd":
        bench.add(job_id)
    bench.begin("c")
    bench.begin("d")

    assert [(one.id, one.overtaken) for one in bench.journal.waiting()] == [("a", 2), ("b", 2)]


def test_a_job_that_runs_itself_is_not_overtaken(bench: Bench) -> None:
    for job_id in "ab":
        bench.add(job_id)
    bench.begin("a")
    bench.begin("b")

    bench.journal.requeue("a")

    assert [one.overtaken for one in bench.journal.waiting()] == [0]


def test_a_job_that_begins_anew_keeps_its_place_and_tells_nobody_again(bench: Bench) -> None:
    for job_id in "ab":
        bench.add(job_id)
    bench.begin("a", says("processing"))
    bench.clock.now += 5.0

    bench.journal.requeue("a")

    assert [one.id for one in bench.journal.waiting()] == ["a", "b"]
    job = bench.begin("a", says("processing"))
    assert (job.starts, job.attempts, job.started_at) == (2, 0, 1000.0)
    assert len(bench.journal.deliveries()) == 1


def test_a_job_may_have_to_wait_before_it_begins_anew(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")

    bench.journal.requeue("a", after_s=10.0)

    assert [one.not_before for one in bench.journal.waiting()] == [1010.0]
    bench.begin("a")
    bench.journal.requeue("a")
    assert [one.not_before for one in bench.journal.waiting()] == [0.0]


def test_only_an_engine_that_died_over_a_job_is_counted_as_an_attempt(bench: Bench) -> None:
    bench.add("a")
    for died in (False, True, False, True):
        bench.begin("a")
        bench.journal.requeue("a", engine_died=died)

    job = bench.journal.get("a")
    assert (job.starts, job.attempts, job.restarts) == (4, 2, 0)


@pytest.mark.parametrize("status", FINAL)
def test_a_job_that_has_ended_is_not_queued_again(bench: Bench, status: Status) -> None:
    bench.add("a")
    ended = bench.run("a", status)

    bench.journal.requeue("a", engine_died=True)

    assert bench.journal.get("a") == ended


def test_what_a_runner_had_begun_is_queued_again_by_the_next_one(bench: Bench) -> None:
    for job_id in "abcdef":
        bench.add(job_id)
    bench.begin("a", says("processing"))
    bench.begin("b")
    bench.rendered("b", b"x", to=uploads("b", asset(b"x")))
    bench.run("c")
    bench.run("d", Status.FAILED)
    bench.begin("f")
    bench.journal.wish_cancel("f")

    recovered = bench.journal.recover()

    statuses = [bench.journal.get(job_id).status.value for job_id in "abcdef"]
    assert sorted(recovered) == ["a", "f"]
    assert statuses == ["queued", "processing", "completed", "failed", "queued", "queued"]
    assert bench.journal.get("b").is_uploading
    assert [job.id for job in bench.journal.wished_away()] == ["f"]
    assert bench.journal.recover() == []


def test_every_runner_that_ended_over_a_job_is_counted(bench: Bench) -> None:
    bench.add("a")
    bench.add("b")
    for _ in range(3):
        bench.begin("a", says("processing"))
        bench.journal.recover()

    job = bench.journal.get("a")
    assert (job.restarts, job.starts, job.attempts) == (3, 3, 0)
    assert bench.journal.get("b").restarts == 0
    assert len(bench.journal.deliveries()) == 1


# --- rendered ----------------------------------------------------------------------------------


def test_a_job_without_uploads_is_complete_when_its_files_are_there(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")
    bench.clock.now = 1010.0

    job = bench.rendered("a", b"one", b"two", tell=says("completed"))

    assert (job.status, job.finished_at) == (Status.COMPLETED, 1010.0)
    assert [one.sha256 for one in job.assets] == [asset(b"one").sha256, asset(b"two").sha256]
    assert (job.receipt, job.seconds) == ({"seed": 0}, {"denoise": 0.5})
    assert (job.error, job.error_code) == (None, None)
    assert bench.journal.get("a") == job
    assert len(bench.journal.deliveries()) == 1
    assert bench.journal.blobs() == {
        sha256 for one in job.assets for sha256 in (one.sha256, one.thumbnail_sha256)
    }


def test_a_job_is_written_down_as_rendered_once(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")
    done = bench.rendered("a", b"one", tell=says("completed"))

    again = bench.rendered("a", b"other", tell=says("completed"))

    assert again == done == bench.journal.get("a")
    assert len(bench.journal.deliveries()) == 1
    assert asset(b"other").sha256 not in bench.journal.blobs()


def test_a_job_that_is_being_uploaded_is_written_down_as_rendered_once(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")
    first = bench.rendered("a", b"one", to=uploads("a", asset(b"one")))

    again = bench.rendered("a", b"other", to=uploads("a", asset(b"other")))

    assert again == first
    assert [one.sha256 for one in bench.journal.uploads_due()] == [
        asset(b"one").sha256,
        asset(b"one").thumbnail_sha256,
    ]


@pytest.mark.parametrize("status", [Status.QUEUED, Status.CANCELLED])
def test_files_of_a_job_that_is_not_processed_any_more_count_for_nothing(
    bench: Bench, status: Status
) -> None:
    bench.add("a")
    bench.begin("a")
    if status is Status.QUEUED:
        bench.journal.requeue("a")
    else:
        bench.journal.end("a", status, "no", "cancelled", nothing)

    job = bench.rendered("a", b"one", tell=says("completed"))

    assert (job.status, job.assets) == (status, ())
    assert bench.journal.blobs() == set()
    assert bench.journal.deliveries() == []


# --- uploads -----------------------------------------------------------------------------------


def uploading(bench: Bench, job_id: str = "a", *, tell: Tell = nothing) -> list[Upload]:
    """A job whose two files have to be brought away."""
    bench.add(job_id)
    bench.begin(job_id)
    job = bench.rendered(job_id, b"x", to=uploads(job_id, asset(b"x")), tell=tell)
    assert job.is_uploading
    return [one for one in bench.journal.uploads_due() if one.job_id == job_id]


def test_a_job_is_complete_with_its_last_upload(bench: Bench) -> None:
    first, second = uploading(bench, tell=says("completed"))
    bench.clock.now = 1010.0

    before = bench.journal.uploaded(first, says("completed"))
    told_before = bench.journal.deliveries()
    after = bench.journal.uploaded(second, says("completed"))

    assert before is not None and after is not None
    assert (before.status, before.finished_at, told_before) == (Status.PROCESSING, None, [])
    assert (after.status, after.finished_at) == (Status.COMPLETED, 1010.0)
    assert len(bench.journal.deliveries()) == 1
    assert bench.journal.uploads_due() == []


def test_the_same_upload_twice_is_not_two_of_them(bench: Bench) -> None:
    first, second = uploading(bench)
    bench.journal.uploaded(first, says("completed"))

    again = bench.journal.uploaded(first, says("completed"))

    assert again is not None
    assert again.status is Status.PROCESSING
    bench.journal.uploaded(second, says("completed"))
    bench.journal.uploaded(second, says("completed"))
    assert len(bench.journal.deliveries()) == 1


def test_an_upload_goes_on_where_it_was(bench: Bench) -> None:
    first, second = uploading(bench)

    bench.journal.upload_saved(first, {"part": 1})
    bench.journal.upload_saved(first, {"url": "u", "offset": 2**40})

    saved = {one.place: one.saved for one in bench.another().uploads_due()}
    assert saved == {first.place: {"url": "u", "offset": 2**40}, second.place: {}}


def test_an_upload_that_failed_waits_and_lets_others_go_first(bench: Bench) -> None:
    first, second = uploading(bench)

    bench.journal.upload_failed(first, "no answer", 10.0)

    assert bench.journal.uploads_due() == [second]
    bench.clock.now += 10.0
    due = bench.journal.uploads_due()
    assert [(one.place, one.attempts) for one in due] == [(second.place, 0), (first.place, 1)]
    assert bench.journal.outbox_counts()["uploads"] == 2


def test_of_a_job_that_is_cancelled_nothing_more_is_uploaded(bench: Bench) -> None:
    first, second = uploading(bench)
    bench.journal.uploaded(first, nothing)

    bench.journal.end("a", Status.CANCELLED, "no", "cancelled", says("cancelled"))
    late = bench.journal.uploaded(second, says("completed"))

    assert late is not None
    assert late.status is Status.CANCELLED
    assert bench.journal.uploads_due() == []
    assert len(bench.journal.deliveries()) == 1


def test_an_upload_of_a_forgotten_job_ends_nothing(bench: Bench) -> None:
    _, second = uploading(bench)
    bench.journal.end("a", Status.CANCELLED, "no", "cancelled", nothing)
    bench.journal.forget(["a"])

    assert bench.journal.uploaded(second, says("completed")) is None
    assert bench.journal.deliveries() == []


# --- ends and wishes ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", FINAL)
def test_an_end_is_final(bench: Bench, status: Status) -> None:
    bench.add("a")
    ended = bench.run("a", status)
    bench.clock.now += 100

    said = [
        bench.journal.end("a", Status.FAILED, "late", "late", says("failed")),
        bench.journal.end("a", Status.CANCELLED, "late", "late", says("cancelled")),
        bench.rendered("a", b"late", tell=says("completed")),
        bench.journal.wish_cancel("a"),
    ]
    bench.journal.recover()

    assert said == [ended] * 4
    assert bench.journal.get("a") == ended
    assert bench.journal.deliveries() == []
    assert bench.journal.wished_away() == []


def test_only_the_three_ends_are_final() -> None:
    assert [status for status in Status if status.is_final] == list(FINAL)


def test_whoever_is_told_of_an_end_sees_the_job_as_it_ended(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")
    told: list[Job] = []

    def tell(job: Job) -> list[NewDelivery]:
        told.append(job)
        return []

    ended = bench.journal.end("a", Status.FAILED, "no room", "disk_full", tell)

    assert told == [ended]
    assert (ended.status, ended.error, ended.error_code) == (
        Status.FAILED,
        "no room",
        "disk_full",
    )


@pytest.mark.parametrize("begun", [False, True])
def test_a_wish_ends_nothing_by_itself_and_goes_with_the_end(bench: Bench, begun: bool) -> None:
    bench.add("a")
    if begun:
        bench.begin("a")
    before = bench.journal.get("a")

    wished = [bench.journal.wish_cancel("a"), bench.journal.wish_cancel("a")]

    assert wished == [before.evolve(cancel_requested=True)] * 2
    assert bench.journal.wished_away() == wished[:1]
    ended = bench.journal.end("a", Status.CANCELLED, "no", "cancelled", nothing)
    assert ended.cancel_requested is False
    assert bench.journal.wished_away() == []


def test_a_job_is_a_value(bench: Bench) -> None:
    before = bench.add("a")

    bench.begin("a")

    assert before.status is Status.QUEUED
    with pytest.raises(AttributeError):
        before.status = Status.FAILED  # type: ignore[misc]


def test_jobs_are_counted_by_status(bench: Bench) -> None:
    for job_id in "abcde":
        bench.add(job_id)
    bench.run("a")
    bench.run("b", Status.FAILED)
    bench.begin("c")

    assert bench.journal.counts() == {
        "queued": 2,
        "processing": 1,
        "completed": 1,
        "failed": 1,
        "cancelled": 0,
    }


# --- deliveries --------------------------------------------------------------------------------


def test_a_finish_makes_void_what_was_to_be_told_before_it(bench: Bench) -> None:
    for job_id in "ab":
        bench.add(job_id)
        bench.begin(job_id, says("processing", content=b"begun"))

    bench.journal.end("a", Status.FAILED, "no", "no", says("failed", content=b"failed"))

    waiting = [(one.job_id, one.content) for one in bench.journal.deliveries()]
    assert waiting == [("b", b"begun"), ("a", b"failed")]
    assert [one["state"] for one in bench.journal.of_job("a")] == ["void", "waiting"]


def test_what_was_told_before_a_finish_stays_told(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a", says("processing"))
    (one,) = bench.journal.deliveries()
    bench.journal.delivery_state(one.id, "delivered")

    bench.journal.end("a", Status.FAILED, "no", "no", says("failed"))

    assert [one["state"] for one in bench.journal.of_job("a")] == ["delivered", "waiting"]


def test_deliveries_of_a_job_are_numbered_and_keep_what_they_are_sent_with(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a", lambda job: [
        *says("processing", "callback", b"\xff\0")(job),
        *says("processing", "webhook", b"w")(job),
    ])  # fmt: skip
    (first, second) = bench.journal.deliveries()
    bench.journal.delivery_state(first.id, "delivered")
    bench.journal.end("a", Status.FAILED, "no", "no", says("failed", "callback"))

    third = bench.journal.deliveries()[-1]
    assert (first.sequence, second.sequence, third.sequence) == (0, 1, 2)
    assert (first.kind, first.content) == ("callback", b"\xff\0")
    assert (second.url, second.secret) == ("https://hook.example/", "s")
    assert (second.created_at, second.next_at, second.attempts) == (1000.0, 0.0, 0)


def test_a_delivery_that_failed_is_due_later(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a", says("processing"))
    (one,) = bench.journal.deliveries()

    bench.journal.delivery_failed(one.id, "answered 500", 4.0)

    (later,) = bench.journal.deliveries()
    assert (later.attempts, later.next_at) == (1, 1004.0)
    assert bench.journal.of_job("a")[0]["error"] == "answered 500"


@pytest.mark.parametrize("state", ["delivered", "dead"])
def test_a_delivery_that_is_done_waits_no_more(bench: Bench, state: str) -> None:
    bench.add("a")
    bench.begin("a", says("processing"))
    (one,) = bench.journal.deliveries()

    bench.journal.delivery_state(one.id, state)
    bench.journal.delivery_failed(one.id, "late", 1.0)

    assert bench.journal.deliveries() == []
    assert bench.journal.outbox_counts() == {
        "waiting": 0, "delivered": 0, "dead": 0, "uploads": 0, state: 1,
    }  # fmt: skip


def test_what_became_void_on_its_way_is_no_dead_letter(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a", says("processing"))
    (one,) = bench.journal.deliveries()
    bench.journal.end("a", Status.FAILED, "no", "no", nothing)

    bench.journal.delivery_state(one.id, "dead", "answered 500")

    assert bench.journal.of_job("a")[0]["state"] == "void"
    bench.journal.delivery_state(one.id, "delivered")
    assert bench.journal.of_job("a")[0]["state"] == "delivered"


def test_whoever_looks_at_a_job_sees_what_was_told_without_contents_and_secrets(
    bench: Bench,
) -> None:
    first, _ = uploading(bench, tell=says("completed", content=b"hidden"))
    bench.journal.upload_failed(first, "store answered 500", 1.0)

    assert bench.journal.of_job("a") == [
        {"kind": "upload", "event": "u/a/0.png", "state": "waiting", "attempts": 1,
         "error": "store answered 500"},
        {"kind": "upload", "event": "u/a/0.thumb.webp", "state": "waiting", "attempts": 0,
         "error": None},
    ]  # fmt: skip
    bench.journal.end("a", Status.FAILED, "no", "no", says("failed", content=b"hidden"))
    assert bench.journal.of_job("a") == [
        {"kind": "webhook", "event": "job.failed", "state": "waiting", "attempts": 0,
         "error": None},
    ]  # fmt: skip


# --- elements of lists -------------------------------------------------------------------------


def from_list(bench: Bench, job_id: str, element: bytes, source: str = "sdxl_queue") -> Job:
    return bench.add(job_id, source=source, element=element)


def settled(bench: Bench, source: str = "sdxl_queue") -> list[str]:
    return [job.id for job in bench.journal.settled(source)]


def test_an_element_may_go_when_its_job_has_ended_and_everybody_was_told(bench: Bench) -> None:
    from_list(bench, "a", b"e")
    stages = [settled(bench)]
    bench.begin("a", says("processing"))
    stages.append(settled(bench))
    bench.journal.end("a", Status.FAILED, "no", "no", says("failed"))
    stages.append(settled(bench))
    (one,) = bench.journal.deliveries()
    bench.journal.delivery_failed(one.id, "answered 500", 1.0)
    stages.append(settled(bench))
    bench.journal.delivery_state(one.id, "delivered")

    assert stages == [[]] * 4
    assert settled(bench) == ["a"]
    bench.journal.let_go("a")
    assert settled(bench) == []
    assert bench.journal.get("a").element is None


def test_an_element_whose_last_word_is_a_dead_letter_may_go(bench: Bench) -> None:
    from_list(bench, "a", b"e")
    bench.journal.end("a", Status.FAILED, "no", "no", says("failed"))
    (one,) = bench.journal.deliveries()

    bench.journal.delivery_state(one.id, "dead", "answered 404")

    assert settled(bench) == ["a"]


def test_an_element_of_several_jobs_may_go_with_the_last_of_them(bench: Bench) -> None:
    from_list(bench, "a", b"both")
    from_list(bench, "b", b"both")
    from_list(bench, "c", b"alone")
    for job_id in "ca":
        bench.journal.end(job_id, Status.FAILED, "no", "no", nothing)
    before = settled(bench)
    bench.journal.end("b", Status.FAILED, "no", "no", says("failed"))
    untold = settled(bench)

    (one,) = bench.journal.deliveries()
    bench.journal.delivery_state(one.id, "delivered")

    assert (before, untold) == (["c"], ["c"])
    assert settled(bench) == ["a", "b", "c"]


def test_the_same_bytes_in_two_lists_are_two_elements(bench: Bench) -> None:
    from_list(bench, "a", b"e", "sdxl_queue")
    from_list(bench, "b", b"e", "wan_queue")
    bench.journal.end("a", Status.FAILED, "no", "no", nothing)

    assert settled(bench, "sdxl_queue") == ["a"]
    assert settled(bench, "wan_queue") == []


def test_jobs_of_a_list_are_found_by_where_they_are(bench: Bench) -> None:
    for job_id in "abc":
        from_list(bench, job_id, job_id.encode())
    from_list(bench, "d", b"d", "wan_queue")
    bench.add("e")
    bench.begin("b")

    def found(*statuses: Status) -> list[str]:
        return [job.id for job in bench.journal.of_source("sdxl_queue", *statuses)]

    assert found(Status.QUEUED) == ["a", "c"]
    assert found(Status.QUEUED, Status.PROCESSING) == ["a", "b", "c"]


def test_only_a_job_that_has_never_begun_is_handed_over(bench: Bench) -> None:
    for job_id in "abcd":
        from_list(bench, job_id, job_id.encode())
    bench.begin("b")
    bench.begin("c")
    bench.journal.requeue("c")
    bench.run("d")

    handed = [bench.journal.hand_over(job_id) for job_id in ("a", "b", "c", "d", "nobody")]

    assert handed == [True, False, False, False, False]
    with pytest.raises(NotFound):
        bench.journal.get("a")
    assert bench.journal.counts()["queued"] == 1


def test_a_job_that_was_handed_over_can_come_back(bench: Bench) -> None:
    from_list(bench, "a", b"e")
    bench.journal.wish_cancel("a")
    bench.journal.hand_over("a")

    job, is_new = bench.journal.add(request("a", body="other"), source="sdxl_queue", element=b"e")

    assert is_new
    assert job.cancel_requested is False
    assert bench.journal.wished_away() == []


# --- retention ---------------------------------------------------------------------------------


def finished(bench: Bench, job_id: str, size: int = 1) -> None:
    """A job with files of `size` bytes."""
    bench.add(job_id)
    bench.begin(job_id)
    bench.clock.now += 1.0
    content = job_id.encode().ljust(size, b".")
    bench.journal.rendered(
        job_id, [asset(content, thumbnail=b"")], {}, {}, [], nothing
    )  # fmt: skip


def test_above_the_bound_the_oldest_finished_jobs_go(bench: Bench) -> None:
    for job_id in "abcd":
        finished(bench, job_id)
    bench.add("waits")

    assert bench.journal.over_the_bound(2, 1000) == ["a", "b"]
    assert bench.journal.over_the_bound(4, 1000) == []


def test_the_order_is_that_of_the_ends(bench: Bench) -> None:
    for job_id in "abc":
        bench.add(job_id)
    for job_id in "cab":
        bench.run(job_id)

    assert bench.journal.over_the_bound(1, 1000) == ["c", "a"]


def test_above_the_bytes_the_oldest_go_and_none_that_is_younger(bench: Bench) -> None:
    for job_id, size in (("a", 5), ("b", 100), ("c", 5), ("d", 5)):
        finished(bench, job_id, size)

    assert bench.journal.over_the_bound(50, 1000) == []
    assert bench.journal.over_the_bound(50, 114) == ["a"]
    assert bench.journal.over_the_bound(50, 109) == ["a", "b"]
    assert bench.journal.over_the_bound(50, 10) == ["a", "b"]
    assert bench.journal.over_the_bound(50, 9) == ["a", "b", "c"]


def test_the_job_that_ended_last_stays_whatever_its_size(bench: Bench) -> None:
    """Its client waits for it; those that ended before have been told."""
    finished(bench, "a", 5)
    finished(bench, "b", 5000)

    assert bench.journal.over_the_bound(1, 10) == ["a"]


def test_jobs_that_have_not_ended_are_never_above_the_bound(bench: Bench) -> None:
    for job_id in "abc":
        bench.add(job_id)
    bench.begin("b")
    uploading(bench, "d")

    assert bench.journal.over_the_bound(1, 0) == []


def test_a_job_with_something_left_to_tell_stays(bench: Bench) -> None:
    bench.add("a")
    bench.journal.end("a", Status.FAILED, "no", "no", says("failed"))
    bench.clock.now += 1.0
    finished(bench, "b")
    before = bench.journal.over_the_bound(1, 1000)

    (one,) = bench.journal.deliveries()
    bench.journal.delivery_state(one.id, "delivered")

    assert before == []
    assert bench.journal.over_the_bound(1, 1000) == ["a"]


def test_a_job_whose_element_lies_in_a_list_stays(bench: Bench) -> None:
    from_list(bench, "a", b"e")
    bench.journal.end("a", Status.FAILED, "no", "no", nothing)
    bench.clock.now += 1.0
    finished(bench, "b")
    before = bench.journal.over_the_bound(1, 1000)

    bench.journal.let_go("a")

    assert before == []
    assert bench.journal.over_the_bound(1, 1000) == ["a"]


def test_a_forgotten_job_leaves_nothing_but_what_others_share(bench: Bench) -> None:
    for job_id, content in (("a", b"shared"), ("b", b"shared"), ("c", b"own")):
        bench.add(job_id)
        bench.begin(job_id, says("processing"))
        bench.rendered(job_id, content, tell=says("completed"))
    shared, own, small = (asset(b"shared").sha256, asset(b"own").sha256, asset().thumbnail_sha256)

    first = bench.journal.forget(["a", "c"])
    second = bench.journal.forget(["b"])

    assert first == [own]
    assert second == sorted([shared, small])
    assert bench.journal.blobs() == set()
    assert bench.journal.deliveries() == []
    with pytest.raises(NotFound):
        bench.journal.get("a")


def test_files_that_only_the_forgotten_share_go(bench: Bench) -> None:
    for job_id in "ab":
        bench.add(job_id)
        bench.run(job_id, content=b"shared")

    gone = bench.journal.forget(["a", "b"])

    assert set(gone) == {asset(b"shared").sha256, asset().thumbnail_sha256}


def test_the_id_and_key_of_a_forgotten_job_are_free_again(bench: Bench) -> None:
    bench.add("a", key="k")
    bench.run("a")
    bench.journal.forget(["a"])

    by_id = bench.journal.add(request("a", body="other"))
    by_key = bench.journal.add(request(body="other"), key="k")

    assert (by_id[1], by_key[1]) == (True, True)
    assert by_id[0].number > 1  # numbers are not used again


# --- what changes is heard ---------------------------------------------------------------------


def test_every_change_rings_the_bell_and_reading_does_not(bench: Bench) -> None:
    bench.add("a")
    before = bench.bell.wait(-1, 0)

    bench.journal.get("a")
    bench.journal.counts()
    quiet = bench.bell.wait(-1, 0)
    bench.begin("a")

    assert quiet == before
    assert bench.bell.wait(-1, 0) == before + 1


def test_a_ring_that_came_before_the_wait_ends_it_at_once() -> None:
    bell = Bell()
    seen = bell.wait(-1, 0)
    bell.ring()

    assert bell.wait(seen, timeout_s=60) == seen + 1


def test_without_a_ring_the_wait_ends_with_its_time() -> None:
    bell = Bell()
    seen = bell.wait(-1, 0)

    assert bell.wait(seen, timeout_s=0) == seen


def test_a_ring_wakes_who_waits() -> None:
    bell = Bell()
    seen = bell.wait(-1, 0)
    heard: list[int] = []
    waiter = threading.Thread(target=lambda: heard.append(bell.wait(seen, timeout_s=60)))
    waiter.start()

    bell.ring()

    waiter.join(timeout=10)
    assert heard == [seen + 1]


# --- several of them ---------------------------------------------------------------------------


def test_two_journals_of_one_folder_see_each_others_changes(bench: Bench) -> None:
    front = bench.another()
    job, _ = front.add(request("a"), key="k")
    seen_here = bench.journal.get("a")
    front.wish_cancel("a")
    wished = bench.journal.wished_away()
    bench.begin("a")

    seen_there = front.get("a")
    joined = front.add(request(), key="k")

    front.close()
    assert seen_here == job
    assert [one.id for one in wished] == ["a"]
    assert (seen_there.status, seen_there.cancel_requested) == (Status.PROCESSING, True)
    assert joined == (seen_there, False)


def test_a_job_outlives_the_journal_that_accepted_it(bench: Bench) -> None:
    job = bench.add("a", key="k", given={"prompt": "x"})
    bench.journal.close()

    again = bench.journal.get("a")

    assert again == job


def test_a_reader_does_not_wait_for_a_writer(bench: Bench) -> None:
    """Fronts show jobs while the runner writes one down."""
    bench.add("a")
    writer = bench.another()
    with writer._database.changing() as database:
        database.execute("UPDATE jobs SET status = 'processing'")

        seen = bench.journal.get("a")

    writer.close()
    assert seen.status is Status.QUEUED
    assert bench.journal.get("a").status is Status.PROCESSING


def test_a_writer_that_waits_too_long_for_another_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "LOCK_S", 0.01)
    bench.add("a")
    other = bench.another()
    other.counts()
    with bench.journal._database.changing(), pytest.raises(JournalUnavailable) as caught:
        other.add(request("b"))

    _, is_new = other.add(request("b"))
    other.close()
    assert "something else holds it" in explained(caught.value, bench.folder)
    assert caught.value.retry_after_s == 5
    assert is_new


def test_what_fails_in_the_middle_of_a_change_changes_nothing(bench: Bench) -> None:
    bench.add("a")
    before = contents(bench.folder)

    def broken(job: Job) -> list[NewDelivery]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.journal.claim("a", broken)
    with pytest.raises(ZeroDivisionError):
        bench.journal.end("a", Status.FAILED, "no", "no", broken)

    assert contents(bench.folder) == before
    assert bench.begin("a").starts == 1


def test_a_stored_job_of_another_version_keeps_no_other_one_from_being_read(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for job_id in "abc":
        bench.add(job_id)
    with bench.journal._database.changing() as database:
        database.execute("""UPDATE jobs SET request = '{"v": 99}' WHERE id = 'a'""")
        database.execute("UPDATE jobs SET request = '{' WHERE id = 'b'")

    jobs = [bench.journal.get(job_id) for job_id in "abc"]

    assert [job.request is None for job in jobs] == [True, True, False]
    assert "job a: a stored job is of version 99" in caplog.text


# --- killed ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    database = sqlite3.connect(folder / "journal.sqlite3")
    try:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {
            name: sorted(database.execute(f"SELECT * FROM {name}").fetchall(), key=repr)
            for (name,) in names
        }
    finally:
        database.close()


CHANGES: dict[str, Callable[[Journal], object]] = {
    "add": lambda journal: journal.add(request("new"), key="k", max_waiting=10),
    "join": lambda journal: journal.add(request("queued"), key="k"),
    "refuse": lambda journal: journal.refuse(
        "new", {}, "list", b"e", "no", "no", [NewDelivery("callback", "job.failed", b"")]
    ),
    "wish": lambda journal: journal.wish_cancel("queued"),
    "claim": lambda journal: journal.claim("queued", says("processing")),
    "requeue": lambda journal: journal.requeue("running", engine_died=True),
    "recover": lambda journal: journal.recover(),
    "rendered": lambda journal: journal.rendered(
        "running", [asset(b"1"), asset(b"2", 1)], {}, {}, [], says("completed")
    ),
    "rendered, to be uploaded": lambda journal: journal.rendered(
        "running", [asset(b"1")], {}, {}, uploads("running", asset(b"1")), says("completed")
    ),
    "end": lambda journal: journal.end("running", Status.FAILED, "no", "no", says("failed")),
    "end of what is uploaded": lambda journal: journal.end(
        "uploading", Status.CANCELLED, "no", "no", says("cancelled")
    ),
    "last upload": lambda journal: journal.uploaded(
        journal.uploads_due()[0], says("completed")
    ),
    "hand over": lambda journal: journal.hand_over("queued"),
    "forget": lambda journal: journal.forget(["done", "failed"]),
}  # fmt: skip


@pytest.fixture
def busy_folder(bench: Bench) -> Path:
    """A journal with a job in every state, closed."""
    for job_id in ("done", "failed", "uploading", "running", "queued"):
        bench.add(job_id, given={"prompt": "x"}, source="list", element=job_id.encode())
    bench.run("done")
    bench.begin("failed", says("processing"))
    bench.journal.end("failed", Status.FAILED, "no", "no", says("failed"))
    bench.begin("uploading")
    first, _ = uploads("uploading", asset(b"u"))
    bench.rendered("uploading", b"u", to=[first])
    bench.begin("running", says("processing"))
    bench.journal.wish_cancel("running")
    bench.journal.close()
    return bench.folder


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and dies as Linux does")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_process_that_is_killed_within_a_change_leaves_it_done_or_not_begun(
    busy_folder: Path, tmp_path: Path, change: Callable[[Journal], object]
) -> None:
    """Between any two of its statements, and before the first and after the last."""
    before, whole = contents(busy_folder), (busy_folder / "journal.sqlite3").read_bytes()
    seen = []
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "journal.sqlite3").write_bytes(whole)
        died = dies_at(folder, number, change)
        seen.append(contents(folder))
        if not died:
            break

    after = seen[-1]
    assert len(seen) > 3  # BEGIN, at least one change, COMMIT
    assert not died and after != before
    assert [state == before for state in seen[:-1]] == [True] * (len(seen) - 1)


def dies_at(folder: Path, number: int, change: Callable[[Journal], object]) -> bool:
    """Do `change` in a process that is killed at its statement `number`; whether it was."""
    child = os.fork()
    if not child:
        code = 1
        try:
            journal = Journal(folder, Bell(), Clock(2000.0))
            left = number

            def count(_: str) -> None:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            journal._database._connection("write").set_trace_callback(count)
            change(journal)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the change failed"
    return os.WIFSIGNALED(status)


ENDLESS = """
import itertools, sys
from pathlib import Path
from tests.job_parts import request
from worker.jobs.bell import Bell
from worker.jobs.journal import Journal

journal = Journal(Path(sys.argv[1]), Bell())
for number in itertools.count():
    job, _ = journal.add(request(), given={"filler": "x" * (number % 7 * 1000)})
    journal.claim(job.id, lambda job: ())
    print(job.id, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 7, 60])
def test_every_job_that_a_killed_process_has_accepted_is_there(bench: Bench, lines: int) -> None:
    bench.add("a")
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(bench.folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    accepted = [child.stdout.readline().strip() for _ in range(lines)]
    child.kill()
    accepted += [line.strip() for line in child.stdout if line.endswith("\n")]
    child.wait()
    child.stdout.close()

    counts = bench.journal.counts()
    statuses = {bench.journal.get(job_id).status for job_id in accepted}

    assert len(accepted) >= lines
    assert statuses == {Status.PROCESSING}
    assert counts["processing"] in (len(accepted), len(accepted) + 1)
    assert counts["queued"] in (1, 2)
    bench.journal.check()
    assert len(bench.journal.recover()) == counts["processing"]


ONE_MORE = """
import sys
from pathlib import Path
from tests.job_parts import request
from worker.jobs.bell import Bell
from worker.jobs.journal import Journal

journal = Journal(Path(sys.argv[1]), Bell())
journal.add(request(sys.argv[2]))
journal.counts()
journal.close()
"""


def test_a_process_that_ends_takes_nothing_from_one_that_goes_on(bench: Bench) -> None:
    """The last to leave a database removes its log; a process whose locks were lost on the way
    would not be seen, and what it writes from then on would be in a file without a name."""
    bench.add("a")
    bench.journal.counts()  # its second connection

    subprocess.run(
        [sys.executable, "-c", ONE_MORE, str(bench.folder), "b"], cwd=REPOSITORY, check=True
    )
    bench.add("c")

    other = bench.another()
    seen = [one.id for one in other.waiting()]
    other.close()
    assert (bench.folder / "journal.sqlite3-wal").exists()
    assert seen == ["a", "b", "c"] == [one.id for one in bench.journal.waiting()]


# --- whatever happens ----------------------------------------------------------------------------

JOB = st.sampled_from("abc")
STEPS_OF_A_LIFE = st.one_of(
    st.tuples(st.just("add"), JOB),
    st.tuples(st.just("refuse"), JOB),
    st.tuples(st.just("wish"), JOB),
    st.tuples(st.just("claim"), JOB),
    st.tuples(st.just("requeue"), JOB, st.booleans()),
    st.tuples(st.just("rendered"), JOB, st.sampled_from([b"shared", b"own"]), st.booleans()),
    st.tuples(st.just("end"), JOB, st.sampled_from(FINAL[1:])),
    st.tuples(st.just("uploaded"), st.integers(0, 3)),
    st.tuples(st.just("upload failed"), st.integers(0, 3)),
    st.tuples(st.just("told"), st.integers(0, 3), st.sampled_from(["delivered", "dead"])),
    st.tuples(st.just("not told"), st.integers(0, 3)),
    st.tuples(st.just("let go")),
    st.tuples(st.just("hand over"), JOB),
    st.tuples(st.just("forget"), st.integers(1, 2)),
    st.tuples(st.just("recover")),
)


def live(journal: Journal, step: tuple[Any, ...]) -> None:
    """One step in the life of jobs, as a front, the intake or the runner takes it."""
    match step:
        case "add", job_id:
            journal.add(request(job_id), source="list", element=b"abc")
        case "refuse", job_id:
            journal.refuse(job_id, {}, "list", b"abc", "no", "no", TOLD)
        case "wish", job_id:
            journal.wish_cancel(job_id)
        case "claim", job_id:
            journal.claim(job_id, says("processing"))
        case "requeue", job_id, died:
            journal.requeue(job_id, engine_died=died)
        case "rendered", job_id, content, to_be_uploaded:
            made = asset(content if content == b"shared" else job_id.encode())
            journal.rendered(
                job_id, [made], {}, {}, uploads(job_id, made) if to_be_uploaded else [],
                says("completed"),
            )  # fmt: skip
        case "end", job_id, status:
            journal.end(job_id, status, "no", "no", says(status.value))
        case "uploaded", index:
            for upload in journal.uploads_due()[index : index + 1]:
                journal.uploaded(upload, says("completed"))
        case "upload failed", index:
            for upload in journal.uploads_due()[index : index + 1]:
                journal.upload_failed(upload, "no", 0.0)
        case "told", index, state:
            for delivery in journal.deliveries()[index : index + 1]:
                journal.delivery_state(delivery.id, state)
        case "not told", index:
            for delivery in journal.deliveries()[index : index + 1]:
                journal.delivery_failed(delivery.id, "no", 0.0)
        case ("let go",):
            for job in journal.settled("list"):
                journal.let_go(job.id)
        case "hand over", job_id:
            journal.hand_over(job_id)
        case "forget", keep:
            journal.forget(journal.over_the_bound(keep, 1 << 30))
        case ("recover",):
            journal.recover()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(STEPS_OF_A_LIFE, max_size=40))
def test_whatever_happens_the_journal_agrees_with_itself(course: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner, front = Journal(Path(folder), Bell(), Clock()), Journal(Path(folder), Bell())
        runner._database._connection("write").execute(
            "PRAGMA synchronous = OFF"
        )  # for the test's speed
        ended: dict[int, Job] = {}
        for step in course:
            with contextlib.suppress(NotFound, Conflict):
                live(runner, step)
            agrees_with_itself(runner, ended)
        assert contents_of(front) == contents_of(runner)
        runner.check()
        runner.close()
        front.close()


def agrees_with_itself(journal: Journal, ended: dict[int, Job]) -> None:
    """ended: the jobs that had ended before, by their number; those that have now are added."""
    jobs = contents_of(journal)
    for job in jobs:
        before = ended.get(job.number)
        assert before is None or before == job.evolve(element=before.element), "an end has changed"
        assert job.status.is_final == (job.finished_at is not None)
        told = [one for one in journal.of_job(job.id) if one["kind"] != "upload"]
        events = [one["event"] for one in told]
        if job.status.is_final:
            ended[job.number] = job
            assert not job.cancel_requested
            assert events[-1] == f"job.{job.status.value}"
            assert not [one for one in told[:-1] if one["state"] == "waiting"]
        assert events.count("job.processing") == (job.starts > 0)
        assert len(events) == (job.starts > 0) + job.status.is_final
        assert job.is_uploading == bool(
            [one for one in journal.uploads_due() if one.job_id == job.id]
        )
    assert journal.blobs() == {
        sha256
        for job in jobs
        for one in job.assets
        for sha256 in (one.sha256, one.thumbnail_sha256)
    }
    waiting = {one.job_id for one in journal.deliveries()}
    busy = waiting | {job.id for job in jobs if job.element is not None}
    assert not set(journal.over_the_bound(1, 0)) & busy
    if journal.settled("list"):  # all of them came in one element
        held = [job for job in jobs if job.element is not None]
        assert all(job.status.is_final and job.id not in waiting for job in held)


def contents_of(journal: Journal) -> list[Job]:
    return journal.of_source("list", *Status)


# --- trouble -----------------------------------------------------------------------------------


def explained(error: JournalUnavailable, folder: Path) -> str:
    """Check that the text is fit for a client; the text."""
    text = str(error)
    assert error.status == 503
    assert not has_trap_word(text), text
    assert str(folder) not in text and "/tmp" not in text and "/home" not in text
    return text


def garbage(_: bytes) -> bytes:
    return b"no database, but long enough to be one. " * 500


def cut_in_half(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def page_of(name: str) -> Callable[[bytes], bytes]:
    """Damages the first page of a table or index."""

    def damage(whole: bytes) -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            file.write(whole)
            file.flush()
            database = sqlite3.connect(file.name)
            (size,) = database.execute("PRAGMA page_size").fetchone()
            (root,) = database.execute(
                "SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)
            ).fetchone()
            database.close()
        start = (root - 1) * size
        return bytes(whole[:start] + b"\xa5" * size + whole[start + size :])

    return damage


@pytest.mark.parametrize(
    "damage",
    [garbage, cut_in_half, page_of("jobs"), page_of("jobs_by_status"), page_of("deliveries")],
    ids=["garbage", "cut in half", "a page of jobs", "a page of an index", "a page of deliveries"],
)
def test_a_damaged_journal_says_so_and_once_recovered_has_everything(
    busy_folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = busy_folder / "journal.sqlite3"
    whole, before = file.read_bytes(), contents(busy_folder)
    file.write_bytes(damage(whole))
    journal = Journal(busy_folder, Bell())

    with pytest.raises(JournalUnavailable) as caught:
        journal.check()

    text = explained(caught.value, busy_folder)
    assert "damaged" in text and ".recover" in text and "jobs/journal.sqlite3" in text
    journal.close()
    file.write_bytes(whole)
    journal.check()
    assert contents(busy_folder) == before
    assert journal.add(request("new"))[1]
    journal.close()


def test_damage_that_nobody_looked_for_is_met_with_the_same_words(busy_folder: Path) -> None:
    file = busy_folder / "journal.sqlite3"
    file.write_bytes(page_of("jobs")(file.read_bytes()))
    journal = Journal(busy_folder, Bell())

    for use in (
        lambda: journal.get("queued"),
        lambda: journal.add(request("new")),
        lambda: journal.claim("queued", nothing),
    ):
        with pytest.raises(JournalUnavailable) as caught:
            use()
        assert "damaged" in explained(caught.value, busy_folder)
    journal.close()


def test_an_empty_file_is_a_new_journal(tmp_path: Path) -> None:
    """A crash between the making of the file and of its tables leaves one."""
    bench = Bench(tmp_path)
    (tmp_path / "journal.sqlite3").touch()

    bench.journal.check()

    assert bench.add("a").number == 1
    bench.journal.close()


def test_a_journal_of_a_newer_program_is_left_alone(busy_folder: Path) -> None:
    file = busy_folder / "journal.sqlite3"
    before = contents(busy_folder)
    set_version(file, len(STEPS) + 1)
    journal = Journal(busy_folder, Bell())

    with pytest.raises(JournalUnavailable) as caught:
        journal.add(request("new"))

    text = explained(caught.value, busy_folder)
    assert f"format {len(STEPS) + 1}" in text and "newer program" in text
    assert contents(busy_folder) == before
    set_version(file, len(STEPS))
    assert journal.add(request("new"))[1]
    journal.close()


def set_version(file: Path, version: int) -> None:
    database = sqlite3.connect(file)
    database.execute(f"PRAGMA user_version = {version}")
    database.close()


def pages(journal: Journal, most: int) -> None:
    """Let the disk hold `most` pages of the journal; 0: as many as it has now."""
    database = journal._database._connection("write")
    if not most:
        (most,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {most}")


def test_a_full_disk_refuses_the_new_and_loses_nothing(bench: Bench) -> None:
    bench.add("a")
    bench.begin("a")
    bench.add("b")
    before = contents(bench.folder)
    pages(bench.journal, 0)
    big = {"filler": "x" * 100_000}

    with pytest.raises(JournalUnavailable) as caught:
        bench.add("new", given=big)
    with pytest.raises(JournalUnavailable):
        bench.journal.rendered("a", [asset()], big, {}, [], nothing)

    text = explained(caught.value, bench.folder)
    assert "disk is full" in text and "make room" in text and "nothing" in text
    assert caught.value.retry_after_s == 5
    assert contents(bench.folder) == before
    pages(bench.journal, 10_000)
    assert bench.add("new", given=big).given == big
    assert bench.rendered("a", b"x").status is Status.COMPLETED


def test_a_disk_that_is_full_when_the_tables_are_made_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little_room(file: Path, **options: Any) -> sqlite3.Connection:
        database = sqlite3.Connection(file, **options)
        database.execute("PRAGMA max_page_count = 3")
        return database

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", little_room)
        with pytest.raises(JournalUnavailable) as caught:
            bench.add("a")

    assert "disk is full" in explained(caught.value, bench.folder)
    assert bench.add("a").number == 1


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "its disk is full: make room"),
        (errno.EDQUOT, "its disk is full: make room"),
        (errno.EROFS, "must be writable"),
        (errno.EACCES, "must be writable"),
        (errno.EIO, "look at its disk"),
    ],
)
def test_a_file_that_cannot_be_made_says_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    def refuse(path: Path, *_: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(JournalUnavailable) as caught:
            bench.add("a")

    text = explained(caught.value, bench.folder)
    assert cure in text and os.strerror(number) in text
    assert bench.add("a").number == 1


READ_ONLY = """
import json, os, sys
from pathlib import Path
from tests.job_parts import request
from worker.errors import JournalUnavailable
from worker.jobs.bell import Bell
from worker.jobs.journal import Journal

if os.getuid() == 0:  # whom no mode of a folder stops
    os.setgid(65534)
    os.setuid(65534)
folder = Path(sys.argv[1])
journal = Journal(folder, Bell())
journal.add(request("a"))
journal.close()
said = []


def attempt(use):
    try:
        use()
        said.append("done")
    except JournalUnavailable as exc:
        said.append(str(exc))
    journal.close()


(folder / "journal.sqlite3").chmod(0o400)
folder.chmod(0o500)
attempt(lambda: journal.add(request("b")))
attempt(journal.check)
folder.chmod(0o700)
(folder / "journal.sqlite3").chmod(0o600)
attempt(lambda: journal.add(request("b")))
said.append([one.id for one in journal.waiting()])
print(json.dumps(said))
"""


def test_a_folder_that_cannot_be_written_to_says_so_and_loses_nothing() -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)  # for the child's user
        folder = Path(place) / "jobs"

        child = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(folder)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )

    add, check, *cured = json.loads(child.stdout)
    for text in (add, check):
        assert "must be writable for the daemon's user" in explained(
            JournalUnavailable(text), Path(place)
        )
    assert cured == ["done", ["a", "b"]]


def test_a_folder_that_is_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("x")
    journal = Journal(tmp_path / "jobs", Bell())

    with pytest.raises(JournalUnavailable) as caught:
        journal.counts()

    assert "look at its disk and at the folder's permissions" in explained(caught.value, tmp_path)


def test_nobody_else_can_read_the_journal(tmp_path: Path) -> None:
    """Bodies of jobs are in it, and secrets of webhooks."""
    before = os.umask(0)
    try:
        bench = Bench(tmp_path / "state" / "jobs")
        bench.add("a")
        bench.journal.counts()
        files = sorted(bench.folder.iterdir())
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files}
        of_folder = stat.S_IMODE(bench.folder.stat().st_mode)
        bench.journal.close()
    finally:
        os.umask(before)

    assert modes == {
        "journal.sqlite3": 0o600,
        "journal.sqlite3-shm": 0o600,
        "journal.sqlite3-wal": 0o600,
    }
    assert of_folder == 0o700


def test_what_is_written_is_on_the_disk_when_the_method_returns(bench: Bench) -> None:
    bench.journal.counts()
    database = bench.journal._database._connection("write")

    assert database.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert database.execute("PRAGMA foreign_keys").fetchone()[0] == 1


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        journals = [Journal(folder, Bell()) for _ in range(3)]
        gate = threading.Barrier(2 * len(journals))

        def look(journal: Journal, gate: threading.Barrier = gate) -> None:
            gate.wait()
            journal.check()

        def add(journal: Journal, job_id: str, gate: threading.Barrier = gate) -> None:
            gate.wait()
            journal.add(request(job_id))

        with ThreadPoolExecutor(gate.parties) as threads:
            done = [threads.submit(look, journal) for journal in journals]
            done += [
                threads.submit(add, journal, f"job-{number}")
                for number, journal in enumerate(journals)
            ]
            for one in done:
                one.result()

        assert journals[0].counts()["queued"] == len(journals)
        for journal in journals:
            journal.close()

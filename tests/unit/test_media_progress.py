"""Where a job is and how long it will still take."""

from __future__ import annotations

from typing import Any

import pytest

from worker.engine.host import Report, Ticket
from worker.engine.media.progress import Track, seconds_left
from worker.protocol.messages import Message, Progress, RenderJob, RenderParams
from worker.vram.pace import Paces


class Outbox:
    def __init__(self) -> None:
        self.sent: list[Progress] = []

    def send(self, ticket: Ticket, message: Message) -> None:
        assert isinstance(message, Progress)
        self.sent.append(message)

    def publish(self, report: Report) -> None: ...

    def poll(self) -> None: ...

    def wait(self, timeout_s: float) -> None: ...

    def wake(self) -> None: ...


class Tracked:
    """A job of two pictures with four steps each, and a clock that a test moves."""

    def __init__(self, paces: Paces | None = None, **more: Any):
        self.now = 100.0
        self.outbox = Outbox()
        params = RenderParams(
            prompt="x", negative_prompt=None, width=64, height=32, guidance_scale=5.0, seed=0,
            **({"steps": 4, "num_images": 2} | more),
        )  # fmt: skip
        job = RenderJob(request_id="j", model="m", output="image", params=params, staging_dir="/x")
        self.track = Track(
            self.outbox, Ticket(b"peer", "j"), job, paces or Paces(),  # type: ignore[arg-type]
            lambda: self.now,
        )  # fmt: skip

    @property
    def last(self) -> Progress:
        return self.outbox.sent[-1]

    def steps(self, *step_s: float, first: int = 1) -> None:
        for number, seconds in enumerate(step_s, first):
            self.now += seconds
            self.track.step(number)


def test_nothing_is_known_before_the_first_step() -> None:
    assert seconds_left(8, [], 3.0) is None
    assert seconds_left(0, [], None) is None
    assert seconds_left(8, [1.0, 9.0, 1.5], None) == 12.0
    assert seconds_left(8, [2.0], 3.0) == 19.0
    assert seconds_left(0, [2.0], 3.0) == 3.0


def test_the_time_left_is_the_median_step_times_the_steps_of_all_pictures() -> None:
    job = Tracked()
    for phase in ("load", "wait", "encode", "denoise"):
        job.track.phase(phase)
        assert job.last.left_s is None
    job.track.denoises(0)

    job.steps(5.0, 1.0, 1.0)  # the first one warms up

    assert (job.last.step, job.last.steps, job.last.image) == (3, 8, 0)
    assert job.last.left_s == pytest.approx(5.0)
    job.steps(1.0, first=4)
    job.now += 30  # between two pictures nothing is a step
    job.track.denoises(1)
    job.steps(1.0)
    assert (job.last.step, job.last.image) == (5, 1)
    assert job.last.left_s == pytest.approx(3.0)


def test_what_follows_the_steps_is_learned_from_earlier_jobs_of_the_model() -> None:
    paces = Paces()
    paces.learn("m", "decode", 64 * 32, 4, 8.0)  # four pictures
    paces.learn("m", "save", 64 * 32, 1, 1.0)
    paces.learn("other", "decode", 64 * 32, 1, 99.0)
    job = Tracked(paces)
    job.track.phase("denoise")
    job.track.denoises(0)

    job.steps(1.0)

    decode, save = 2 * 2.0, 2 * 1.0
    assert job.last.left_s == pytest.approx(7 + decode + save)
    job.track.denoises(1, 4)
    job.track.phase("decode")
    assert job.last.left_s == pytest.approx(decode + save)
    job.track.phase("save")
    assert job.last.left_s == pytest.approx(save)


def test_a_pause_is_no_part_of_a_step() -> None:
    job = Tracked()
    job.track.phase("denoise")
    job.track.denoises(0)
    job.steps(1.0)
    job.track.phase("wait")
    job.now += 60
    job.track.phase("denoise")
    job.track.denoises(0, 1)

    job.steps(1.0, first=2)

    assert job.last.left_s == pytest.approx(6.0)
    job.track.end()
    assert job.track.seconds == {"denoise": 2.0, "wait": 60.0}


def test_a_job_that_goes_on_says_where_and_is_silent_about_what_was_skipped() -> None:
    job = Tracked()
    job.track.phase("denoise")
    job.track.denoises(1, 2)
    job.steps(1.0, first=3)

    assert [one.step for one in job.outbox.sent] == [0, 6, 7]


def test_steps_are_those_that_are_computed() -> None:
    job = Tracked(mode="image", strength=0.5, num_images=3)

    assert job.track.steps == 6


def test_quick_steps_are_told_ten_times_a_second_and_the_last_one_and_previews_always() -> None:
    job = Tracked(steps=40, num_images=1)
    job.track.phase("denoise")
    job.track.denoises(0)

    job.steps(*[0.03] * 38)
    told = [one.step for one in job.outbox.sent[1:]]
    job.track.step(39, b"a preview")
    job.track.step(40)

    assert told == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert [(one.step, one.preview) for one in job.outbox.sent[-2:]] == [
        (39, b"a preview"), (40, b""),
    ]  # fmt: skip


def test_steps_that_are_not_told_count_for_the_pace() -> None:
    job = Tracked(steps=40, num_images=1)
    job.track.phase("denoise")
    job.track.denoises(0)

    job.steps(0.02, 0.02, 0.02, 0.03, 0.04)

    assert [one.step for one in job.outbox.sent[1:]] == [5]
    assert job.last.left_s == pytest.approx(35 * 0.02)

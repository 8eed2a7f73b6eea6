"""The runner: what was accepted is made once, whatever dies, fills up or is cancelled meanwhile.

The engine is a script; journal, files and threads are real.
"""

from __future__ import annotations

import errno
import io
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from PIL import Image

from tests import hostile
from tests.fakes import (
    PATIENCE_S,
    FakeLink,
    FakeMediaLink,
    fails,
    painted,
    paints,
    raises,
    stays_silent,
)
from tests.hostile import HostileServer
from tests.job_parts import Clock, Gate, request, says, sha256
from worker.errors import (
    EngineLost,
    EngineUnavailable,
    JournalUnavailable,
    NotFound,
    ReferenceRefused,
    ReferenceUnavailable,
    has_trap_word,
)
from worker.jobs import maker as maker_module
from worker.jobs import runner as runner_module
from worker.jobs.bell import Bell
from worker.jobs.board import Board
from worker.jobs.decode import Wanted
from worker.jobs.failures import FETCH_TRIES, FULL_DISK_S
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal, NewDelivery, Upload
from worker.jobs.maker import MAX_RESTARTS, Maker
from worker.jobs.results import Results
from worker.jobs.runner import JobRunner
from worker.protocol.messages import (
    AssetFile,
    JobNews,
    JobRendered,
    Message,
    Progress,
    Reference,
    RenderJob,
)
from worker.storage.addresses import Addresses
from worker.storage.pinned import PinnedHttp
from worker.storage.references import PictureLimits, fetch_picture

FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)
LOST = raises(EngineLost("the engine media process ended", retry_after_s=3))
AWAY = raises(EngineUnavailable("the engine media process is starting"))
IMAGE = Wanted("image", "https://pictures.example/a.png")
PICTURED: dict[str, Any] = {"references": (IMAGE,)}
LONG_LIMITS = PictureLimits(total_timeout_s=600.0)  # no test waits for so long


def _drawn() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


PNG = _drawn()


class Bench:
    """A runner with an engine that plays scripts, and all that a test may look at."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clock = Clock()
        self.bell = Bell()
        self.news: list[JobNews] = []
        self.board = Board(self.bell, self.news.append)
        self.journal = Journal(folder, self.bell, self.clock)
        self.results = Results(folder / "results")
        self.link: FakeLink = FakeMediaLink()
        self.fetched: list[str] = []
        self.fetch: Callable[[Wanted], None] = lambda wanted: None  # may raise or wait
        self.http: PinnedHttp | None = None  # where pictures are fetched from instead
        self.told: list[tuple[str, str]] = []
        self.uploads = False
        self.keep_finished = 100
        self.batch_images = 1
        self.runner: JobRunner | None = None

    def start(self) -> JobRunner:
        self.runner = JobRunner(
            self.journal,
            self.board,
            self.bell,
            self.link,  # type: ignore[arg-type]
            self.results,
            self.folder / "work",
            fetch=self._fetch,
            tell=self._tell,
            places=self._places,
            keep_finished=self.keep_finished,
            keep_bytes=1 << 30,
            batch_images=self.batch_images,
            clock=self.clock,
        )
        self.runner.start()
        return self.runner

    def stop(self) -> None:
        """End the runner as its process ends; its engine has forgotten its requests then."""
        if self.runner is not None:
            self.runner.close()
            assert not self.threads(), "a thread has not ended"
        assert self.link.close() == [], "a request was not let go of"

    def restart(self) -> JobRunner:
        self.stop()
        return self.start()

    def threads(self) -> list[str]:
        return [
            one.name
            for one in threading.enumerate()
            if one.name.startswith("job ") and one.is_alive()
        ]

    # --- what the runner is given ----------------------------------------------------------

    def _fetch(self, wanted: Wanted, folder: Path, should_stop: Callable[[], bool]) -> Reference:
        self.fetched.append(wanted.source)
        if self.http is not None:
            return fetch_picture(
                wanted.source, wanted.role, folder, self.http, LONG_LIMITS, None, should_stop
            )
        self.fetch(wanted)
        file = folder / f"{wanted.role}.png"
        file.write_bytes(wanted.source.encode())
        return Reference(role=wanted.role, file=str(file), sha256=sha256(wanted.source.encode()))

    def _tell(self, job: Job, event: str) -> Sequence[NewDelivery]:
        return [NewDelivery("webhook", f"job.{event}", b"", "https://hook.example/")]

    def _places(self, job: Job, assets: Sequence[AssetFile]) -> Sequence[Upload]:
        if not self.uploads:
            return []
        return [Upload(job.id, f"u/{one.file}", one.sha256, one.mime_type, {}) for one in assets]

    # --- what tests do and look at ---------------------------------------------------------

    def add(self, job_id: str, **fields: Any) -> Job:
        return self.journal.add(request(job_id, body=job_id, **fields))[0]

    def wait(self, job_id: str, *statuses: Status) -> Job:
        self.until(lambda: self.journal.get(job_id).status in (statuses or FINAL))
        return self.journal.get(job_id)

    def until(self, is_so: Callable[[], bool]) -> None:
        seen, ends = -1, time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < ends, self.journal.counts()
            seen = self.bell.wait(seen, 0.01)

    def idle(self) -> None:
        """Wait until no thread of a job is left."""
        runner = self.runner
        assert runner is not None
        self.until(lambda: not runner.active)

    def rounds(self, number: int = 3) -> None:
        """Let the dispatcher look so often at what there is to do."""
        counted, real = [0], self.journal.wished_away

        def count() -> list[Job]:
            counted[0] += 1
            return real()

        self.journal.wished_away = count  # type: ignore[method-assign]
        self.until(lambda: counted[0] > number)
        self.journal.wished_away = real  # type: ignore[method-assign]

    def rendered(self) -> list[str]:
        """The jobs that the engine was asked for, in order."""
        return [one.request_id for one in self.link.of(RenderJob)]

    def asked(self, job_id: str) -> RenderJob:
        """What the engine was last asked for a job."""
        job: RenderJob = [one for one in self.link.of(RenderJob) if one.request_id == job_id][-1]
        return job

    def progress(self, job_id: str, phase: str, step: int = 1, preview: bytes = b"") -> None:
        self.link.emit(
            Progress(request_id=job_id, phase=phase, step=step, steps=4, preview=preview)
        )

    def finish(self, job_id: str) -> None:
        self.link.emit(painted(self.asked(job_id)))

    def events(self, job_id: str) -> list[str]:
        """What whoever waits for this job was told or is to be told, in order."""
        return [one["event"] for one in self.journal.of_job(job_id) if one["kind"] == "webhook"]

    def files(self) -> list[str]:
        """Names of the published files."""
        return sorted(path.name for path in self.results._folder.glob("??/*"))

    def folders(self) -> list[str]:
        """Jobs that have a folder of their own."""
        return sorted(path.name for path in (self.folder / "work").glob("*"))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for module in (maker_module, runner_module):
        monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(runner_module, "FORGET_EVERY_S", 0.0)
    bench = Bench(tmp_path / "jobs")
    yield bench
    bench.stop()
    bench.journal.close()


def occupied(bench: Bench, job_id: str = "a", **fields: Any) -> None:
    """Start the runner with a job in the engine that does not end by itself."""
    bench.link.plays(stays_silent)
    bench.add(job_id, **fields)
    bench.start()
    bench.link.wait_sent(RenderJob)


def complete(bench: Bench, *job_ids: str) -> None:
    """Check that these jobs were made once, told of once and have their files."""
    for job_id in job_ids:
        job = bench.wait(job_id)
        assert (job.status, job.error) == (Status.COMPLETED, None), job_id
        assert bench.events(job_id) == ["job.processing", "job.completed"]
        for asset in job.assets:
            content = bench.results.path(asset.sha256).read_bytes()
            assert sha256(content) == asset.sha256
            assert bench.results.path(asset.thumbnail_sha256).is_file()
    bench.idle()
    assert not set(bench.folders()) & set(job_ids)


# --- one job -----------------------------------------------------------------------------------


def test_a_job_is_made_published_and_told_of(bench: Bench) -> None:
    bench.add("a")

    bench.start()

    complete(bench, "a")
    job = bench.journal.get("a")
    assert (job.starts, job.attempts, job.restarts) == (1, 0, 0)
    assert job.receipt == {"model": "m", "seed": 0}
    assert job.seconds == {"denoise": 0.5, "decode": 0.25}
    assert len(job.assets) == 1
    assert bench.link.open_requests == []


def test_the_engine_gets_exactly_what_was_asked_for(bench: Bench) -> None:
    bench.add(
        "a", model="sdxl", exactness="close", priority=3, keep_alive_s=60.0,
        references=(IMAGE, Wanted("last", "https://pictures.example/b.png")),
    )  # fmt: skip
    bench.link.plays(stays_silent)
    bench.start()
    (job,) = bench.link.wait_sent(RenderJob)

    assert job == RenderJob(
        request_id="a",
        model="sdxl",
        output="image",
        params=request().params,
        staging_dir=str(bench.folder / "work" / "a" / "files"),
        exactness="close",
        priority=3,
        keep_alive_s=60.0,
        next_model=None,
        references=(
            Reference(
                role="image",
                file=str(bench.folder / "work" / "a" / "image.png"),
                sha256=sha256(b"https://pictures.example/a.png"),
            ),
            Reference(
                role="last",
                file=str(bench.folder / "work" / "a" / "last.png"),
                sha256=sha256(b"https://pictures.example/b.png"),
            ),
        ),
        checkpoint=str(bench.folder / "work" / "a" / "checkpoint"),
    )
    assert all(Path(one.file).is_file() for one in job.references)


def test_the_engine_hears_of_the_model_that_comes_next(bench: Bench) -> None:
    bench.add("a", model="x")
    bench.add("b", model="y")
    bench.add("c", model="x")
    bench.start()

    complete(bench, "a", "b", "c")

    asked = [(one.request_id, one.next_model) for one in bench.link.of(RenderJob)]
    assert asked == [("a", "x"), ("c", "y"), ("b", None)]


def test_the_engine_hears_of_the_model_of_a_job_whose_pictures_are_there_already(
    bench: Bench,
) -> None:
    occupied(bench)
    bench.add("b", model="y", **PICTURED)
    bench.add("c", model="z", **PICTURED)
    bench.add("d", model="w")
    bench.until(lambda: len(bench.fetched) == 2)
    bench.rounds()

    bench.finish("a")

    complete(bench, *"abcd")
    asked = [(one.request_id, one.next_model) for one in bench.link.of(RenderJob)]
    assert asked[1:3] == [("b", "z"), ("c", "w")]


def test_where_a_job_is_can_be_seen_while_it_runs_and_no_longer(bench: Bench) -> None:
    occupied(bench)
    bench.progress("a", "denoise", 2, b"webp")
    bench.progress("a", "denoise", 3)
    bench.until(lambda: (live := bench.board.get("a")) is not None and live.step == 3)

    live = bench.board.get("a")
    bench.finish("a")
    bench.wait("a")
    bench.idle()

    assert live is not None
    assert (live.phase, live.steps, live.preview, live.previews) == ("denoise", 4, b"webp", 1)
    bench.until(lambda: bench.board.get("a") is None)
    assert bench.news[-1] == JobNews(request_id="a", phase=None)


def test_an_engine_that_says_no_fails_the_job_with_its_words(bench: Bench) -> None:
    bench.link.plays(fails("out_of_device_memory", 503, "8 MiB are missing"))
    bench.add("a")
    bench.start()

    job = bench.wait("a")

    assert (job.status, job.error_code) == (Status.FAILED, "out_of_device_memory")
    assert job.error == "8 MiB are missing"
    assert bench.events("a") == ["job.processing", "job.failed"]
    assert bench.rendered() == ["a"]


def test_a_job_with_uploads_is_complete_only_when_they_are(bench: Bench) -> None:
    bench.uploads = True
    bench.add("a")
    bench.start()
    bench.until(lambda: bench.journal.get("a").is_uploading)
    bench.idle()

    job = bench.journal.get("a")

    assert (job.status, len(job.assets)) == (Status.PROCESSING, 1)
    assert [one.place for one in bench.journal.uploads_due()] == ["u/0.png"]
    assert bench.events("a") == ["job.processing"]
    assert bench.folders() == []
    bench.restart()
    bench.rounds()
    assert bench.journal.get("a").is_uploading
    assert bench.rendered() == ["a"]


# --- one after the other -----------------------------------------------------------------------


def test_one_job_is_rendered_at_a_time_and_the_next_while_files_are_saved(bench: Bench) -> None:
    occupied(bench)
    bench.link.plays(stays_silent)
    bench.add("b")
    for phase in ("load", "encode", "denoise", "decode"):
        bench.progress("a", phase)
    bench.rounds()
    before = bench.rendered()

    bench.progress("a", "save")

    bench.link.wait_sent(RenderJob, 2)
    both = [bench.journal.get(job_id).status for job_id in "ab"]
    bench.finish("b")
    bench.finish("a")
    complete(bench, "a", "b")
    assert before == ["a"]
    assert both == [Status.PROCESSING] * 2


def test_an_engine_that_says_nothing_of_saving_gets_the_next_job_after_the_end(
    bench: Bench,
) -> None:
    occupied(bench)
    bench.add("b")

    bench.finish("a")

    complete(bench, "a", "b")


def test_jobs_run_in_the_order_they_came_with_the_schedules_exceptions(bench: Bench) -> None:
    occupied(bench, model="x")
    for job_id, fields in (
        ("b", {"model": "y"}),
        ("c", {"model": "x"}),
        ("d", {"model": "y", "priority": 5}),
        ("e", {"model": "y"}),
    ):
        bench.add(job_id, **fields)

    bench.finish("a")

    complete(bench, *"abcde")
    assert bench.rendered() == ["a", "d", "b", "e", "c"]


class StrictEngine:
    """Renders in threads of its own, one at a time, and remembers if it was asked for two."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.rendering: set[str] = set()
        self.most = 0
        self.threads: list[threading.Thread] = []

    def __call__(self, message: Any) -> Iterable[Message]:
        self.rendering.add(message.request_id)
        self.most = max(self.most, len(self.rendering))
        self.threads.append(threading.Thread(target=self._render, args=(message,)))
        self.threads[-1].start()
        return []

    def _render(self, job: RenderJob) -> None:
        self.bench.progress(job.request_id, "denoise")
        self.rendering.discard(job.request_id)
        self.bench.progress(job.request_id, "save")
        time.sleep(0.002)
        self.bench.link.emit(painted(job))


def test_many_jobs_with_and_without_pictures_are_each_made_once_and_one_at_a_time(
    bench: Bench,
) -> None:
    engine = StrictEngine(bench)
    bench.link = FakeLink("engine media", engine)
    bench.fetch = lambda wanted: time.sleep(0.001 * (len(bench.fetched) % 3))
    ids = [f"j{number}" for number in range(24)]
    for number, job_id in enumerate(ids):
        bench.add(job_id, **(PICTURED if number % 3 else {}), model="xy"[number % 2])

    bench.start()

    complete(bench, *ids)
    assert engine.most == 1
    assert sorted(bench.rendered()) == sorted(ids)
    assert len(bench.fetched) == 16
    for thread in engine.threads:
        thread.join(PATIENCE_S)


# --- pictures ----------------------------------------------------------------------------------


def test_pictures_of_jobs_to_come_are_fetched_while_another_is_rendered(bench: Bench) -> None:
    occupied(bench)
    for job_id in "bcd":
        bench.add(job_id, **PICTURED)

    bench.until(lambda: len(bench.fetched) == 2)
    bench.rounds()

    ahead = len(bench.fetched)
    rendered = bench.rendered()
    bench.finish("a")
    complete(bench, *"abcd")
    assert ahead == 2
    assert rendered == ["a"]
    assert bench.rendered() == list("abcd")


def test_a_job_whose_picture_is_late_lets_one_go_that_needs_none(bench: Bench) -> None:
    gate = Gate()
    bench.fetch = lambda wanted: gate()
    bench.add("late", **PICTURED)
    bench.add("b")

    bench.start()

    bench.wait("b", Status.COMPLETED)
    gate.opened.set()
    complete(bench, "late", "b")


def test_those_that_wait_for_the_engine_get_it_in_the_order_in_which_they_began(
    bench: Bench,
) -> None:
    """Whoever came later and needs no picture does not go between."""
    occupied(bench)
    gate = Gate()
    bench.fetch = lambda wanted: gate() if wanted.source.endswith("b") else None
    bench.add("b", references=(Wanted("image", "https://pictures.example/b"),))
    bench.add("c", references=(Wanted("image", "https://pictures.example/c"),))
    bench.add("d")
    bench.until(lambda: len(bench.fetched) == 2)
    gate.opened.set()
    bench.rounds(6)

    bench.finish("a")

    complete(bench, *"abcd")
    assert bench.rendered() == list("abcd")


def test_pictures_are_not_fetched_again_after_a_restart(bench: Bench) -> None:
    """A signed URL ends before a long wait does."""
    occupied(bench, **PICTURED)

    bench.restart()

    complete(bench, "a")
    assert len(bench.fetched) == 1
    first, second = bench.link.of(RenderJob)
    assert first == second


def test_pictures_are_not_fetched_again_when_the_engine_has_died(bench: Bench) -> None:
    bench.link.plays(LOST)
    bench.add("a", **PICTURED)

    bench.start()

    complete(bench, "a")
    assert len(bench.fetched) == 1
    assert bench.rendered() == ["a", "a"]


@pytest.mark.parametrize("damage", ["the list is cut", "the list is empty", "a picture is gone"])
def test_pictures_that_are_not_all_there_after_a_crash_are_fetched_again(
    bench: Bench, damage: str
) -> None:
    occupied(bench, **PICTURED)
    bench.stop()
    folder = bench.folder / "work" / "a"
    told = folder / "references.json"
    if damage == "a picture is gone":
        (folder / "image.png").unlink()
    else:
        told.write_bytes(told.read_bytes()[:10] if damage == "the list is cut" else b"")

    bench.start()

    complete(bench, "a")
    assert len(bench.fetched) == 2


def test_a_picture_that_is_refused_fails_the_job_and_the_engine_never_hears_of_it(
    bench: Bench,
) -> None:
    def refuse(wanted: Wanted) -> None:
        raise ReferenceRefused("the address is private")

    bench.fetch = refuse
    bench.add("a", **PICTURED)
    bench.start()

    job = bench.wait("a")

    bench.idle()
    assert (job.status, job.error_code) == (Status.FAILED, "reference_refused")
    assert job.error == "the address is private"
    assert bench.rendered() == []
    assert len(bench.fetched) == 1
    assert bench.events("a") == ["job.processing", "job.failed"]
    assert bench.folders() == []


def test_a_picture_that_may_come_later_is_tried_again_a_few_times(bench: Bench) -> None:
    def unavailable(wanted: Wanted) -> None:
        raise ReferenceUnavailable("answers 503", retry_after_s=5.0)

    bench.fetch = unavailable
    bench.add("a", **PICTURED)
    bench.start()
    waits = []
    for tries in range(1, FETCH_TRIES):
        bench.until(lambda tries=tries: len(bench.fetched) == tries)  # type: ignore[misc]
        bench.wait("a", Status.QUEUED)
        bench.idle()
        bench.rounds()
        (one,) = bench.journal.waiting()
        waits.append(one.not_before - bench.clock.now)
        bench.clock.now = one.not_before

    job = bench.wait("a")

    assert waits == [5.0, 10.0]
    assert len(bench.fetched) == FETCH_TRIES
    assert (job.status, job.error_code) == (Status.FAILED, "reference_unavailable")
    assert bench.rendered() == []
    assert bench.events("a") == ["job.processing", "job.failed"]


def test_a_picture_that_comes_at_the_second_try_is_used(bench: Bench) -> None:
    errors = iter([ReferenceUnavailable("answers 503", retry_after_s=5.0)])

    def late(wanted: Wanted) -> None:
        if (error := next(errors, None)) is not None:
            raise error

    bench.fetch = late
    bench.add("a", **PICTURED)
    bench.start()
    bench.until(
        lambda: bool(bench.journal.waiting()) and bool(bench.journal.waiting()[0].not_before)
    )
    bench.clock.now += 5.0

    complete(bench, "a")
    assert len(bench.asked("a").references) == 1


def test_a_disk_without_room_for_a_picture_delays_the_job(bench: Bench) -> None:
    errors = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])

    def full(wanted: Wanted) -> None:
        if (error := next(errors, None)) is not None:
            raise error

    bench.fetch = full
    bench.add("a", **PICTURED)
    bench.start()
    bench.until(
        lambda: bool(bench.journal.waiting()) and bool(bench.journal.waiting()[0].not_before)
    )
    (one,) = bench.journal.waiting()
    bench.clock.now += FULL_DISK_S

    complete(bench, "a")
    assert one.not_before == 1000.0 + FULL_DISK_S


def test_a_bug_in_the_fetching_fails_the_job_and_not_the_next_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(wanted: Wanted) -> None:
        raise ZeroDivisionError

    bench.fetch = breaks
    bench.add("a", **PICTURED)
    bench.add("b")
    bench.start()

    job = bench.wait("a")

    assert (job.status, job.error_code) == (Status.FAILED, "internal_error")
    assert job.error is not None and not has_trap_word(job.error)
    assert "ZeroDivisionError" in caplog.text
    complete(bench, "b")


# --- cancelling --------------------------------------------------------------------------------


def cancelled(bench: Bench, job_id: str) -> Job:
    job = bench.wait(job_id)
    assert (job.status, job.error_code) == (Status.CANCELLED, "cancelled")
    assert bench.events(job_id)[-1] == "job.cancelled"
    bench.idle()
    assert job_id not in bench.folders()
    assert bench.journal.wished_away() == []
    return job


def test_a_job_that_is_cancelled_while_it_waits_never_begins(bench: Bench) -> None:
    occupied(bench)
    bench.add("b")

    bench.journal.wish_cancel("b")

    bench.until(lambda: bench.journal.get("b").status is Status.CANCELLED)
    bench.finish("a")
    cancelled(bench, "b")
    assert bench.rendered() == ["a"]
    assert bench.events("b") == ["job.cancelled"]
    assert bench.link.cancelled == []


def test_a_wish_from_before_the_start_is_met_before_anything_begins(bench: Bench) -> None:
    bench.add("a")
    bench.journal.wish_cancel("a")

    bench.start()

    cancelled(bench, "a")
    assert bench.rendered() == []


@pytest.mark.parametrize("then", ["the picture comes", "the picture cannot be had"])
def test_a_job_that_is_cancelled_while_its_picture_is_fetched_is_not_rendered(
    bench: Bench, then: str
) -> None:
    gate = Gate()

    def slow(wanted: Wanted) -> None:
        gate()
        if then == "the picture cannot be had":
            raise ReferenceUnavailable("answers 503", retry_after_s=5.0)

    bench.fetch = slow
    bench.add("a", **PICTURED)
    bench.start()
    assert gate.reached.wait(PATIENCE_S)
    bench.journal.wish_cancel("a")
    bench.link.wait_cancelled("a")

    gate.opened.set()

    cancelled(bench, "a")
    assert bench.rendered() == []


def test_a_job_that_is_cancelled_while_it_waits_for_the_engine_is_not_rendered(
    bench: Bench,
) -> None:
    occupied(bench)
    bench.add("b", **PICTURED)
    bench.until(lambda: len(bench.fetched) == 1)
    bench.rounds()

    bench.journal.wish_cancel("b")

    cancelled_b = bench.wait("b")
    bench.finish("a")
    complete(bench, "a")
    cancelled(bench, "b")
    assert cancelled_b.status is Status.CANCELLED
    assert bench.rendered() == ["a"]


@pytest.mark.parametrize("phase", ["denoise", "save"])
def test_a_job_that_is_cancelled_while_it_is_rendered_ends_with_the_engines_word(
    bench: Bench, phase: str
) -> None:
    occupied(bench)
    bench.progress("a", phase)
    bench.until(lambda: (live := bench.board.get("a")) is not None and live.phase == phase)

    bench.journal.wish_cancel("a")

    cancelled(bench, "a")
    assert set(bench.link.cancelled) == {"a"}
    assert bench.files() == []


def test_a_cancel_that_comes_before_the_engine_has_the_job_is_said_again(bench: Bench) -> None:
    """Interleaving: the wish is seen between the beginning and the sending of the job."""
    bench.link.obeys_cancel = False
    bench.link.plays(stays_silent)
    bench.add("a")
    submit = bench.link.submit

    def late(message: Any) -> Any:
        bench.journal.wish_cancel("a")
        bench.link.wait_cancelled("a")
        bench.link.obeys_cancel = True
        return submit(message)

    bench.link.submit = late  # type: ignore[method-assign]
    bench.start()

    cancelled(bench, "a")
    assert bench.link.cancelled == ["a", "a"]


def test_a_job_that_is_done_before_the_engine_hears_of_the_cancel_is_complete(
    bench: Bench,
) -> None:
    bench.link.obeys_cancel = False
    occupied(bench)
    bench.journal.wish_cancel("a")
    bench.link.wait_cancelled("a")

    bench.finish("a")

    complete(bench, "a")
    assert bench.journal.wished_away() == []


def test_a_job_that_is_cancelled_while_its_files_are_uploaded_ends_at_once(bench: Bench) -> None:
    bench.uploads = True
    bench.add("a")
    bench.start()
    bench.until(lambda: bench.journal.get("a").is_uploading)
    bench.idle()

    bench.journal.wish_cancel("a")

    job = cancelled(bench, "a")
    assert job.error == "cancelled while its files were uploaded"
    assert bench.journal.uploads_due() == []


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_job_whose_engine_dies_after_a_cancel_does_not_begin_anew(
    bench: Bench, deaths: int
) -> None:
    bench.link.obeys_cancel = False
    bench.link.plays(*[LOST] * (deaths - 1), stays_silent)
    bench.add("a")
    bench.start()
    bench.link.wait_sent(RenderJob, deaths)
    bench.journal.wish_cancel("a")
    bench.link.wait_cancelled("a")

    bench.link.emit(*LOST(bench.asked("a")))

    cancelled(bench, "a")
    assert bench.rendered() == ["a"] * deaths


# --- pictures that come too slowly --------------------------------------------------------------

SLOW = {
    "no answer": hostile.then_silence(),
    "headers by bytes": hostile.dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "body by bytes": hostile.dripping(hostile.head(200, Content_Length="9999"), b"x"),
    "a redirect to that": hostile.redirect("/body by bytes".replace(" ", "%20")),
}


@pytest.fixture
def slow(bench: Bench) -> Iterator[HostileServer]:
    """Where jobs find their pictures, each reply at the path of its name."""
    with HostileServer() as server:
        server.replies = {f"/{quote(name)}": reply for name, reply in SLOW.items()}
        addresses = Addresses(frozenset({server.origin}))
        bench.http = PinnedHttp(addresses, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        yield server
        bench.stop()
        bench.runner = None


def pictured(server: HostileServer, name: str) -> dict[str, Any]:
    return {"references": (Wanted("image", f"{server.origin}/{quote(name)}"),)}


def is_fetched_from(server: HostileServer) -> bool:
    """Whether a socket of this process leads there."""
    found = psutil.Process().net_connections("tcp")
    return any(one.raddr and one.raddr.port == server.port for one in found)


@pytest.mark.parametrize("name", SLOW)
def test_a_cancel_ends_the_fetching_of_a_picture_at_once(
    bench: Bench, slow: HostileServer, name: str
) -> None:
    bench.add("a", **pictured(slow, name))
    bench.start()
    bench.until(lambda: bool(slow.asked()))

    bench.journal.wish_cancel("a")

    job = cancelled(bench, "a")
    assert job.error == "cancelled while its pictures were fetched"
    assert not is_fetched_from(slow)
    assert bench.rendered() == []


def test_a_cancel_ends_the_fetching_of_no_other_job(bench: Bench, slow: HostileServer) -> None:
    bench.add("a", **pictured(slow, "body by bytes"))
    bench.add("b", **pictured(slow, "no answer"))
    bench.start()
    bench.until(lambda: len(slow.asked()) == 2)

    bench.journal.wish_cancel("a")

    cancelled_a = bench.wait("a")
    bench.rounds()
    assert cancelled_a.status is Status.CANCELLED
    assert bench.journal.get("b").status is Status.PROCESSING
    assert is_fetched_from(slow)


@pytest.mark.parametrize("name", SLOW)
def test_a_drain_does_not_wait_for_a_picture(bench: Bench, slow: HostileServer, name: str) -> None:
    """The job would not be rendered any more; the next runner fetches it."""
    bench.add("a", **pictured(slow, name))
    runner = bench.start()
    bench.until(lambda: bool(slow.asked()))

    runner.stop_taking()

    bench.idle()
    assert bench.journal.get("a").status is Status.QUEUED
    assert not is_fetched_from(slow)
    slow.replies = dict.fromkeys(slow.replies, hostile.answer(200, PNG))
    bench.restart()
    complete(bench, "a")


def test_a_job_that_is_cancelled_while_its_runner_drains_ends_so(
    bench: Bench, slow: HostileServer
) -> None:
    bench.add("a", **pictured(slow, "no answer"))
    runner = bench.start()
    bench.until(lambda: bool(slow.asked()))

    bench.journal.wish_cancel("a")
    runner.stop_taking()

    cancelled(bench, "a")


@pytest.mark.parametrize("name", SLOW)
def test_a_runner_that_ends_waits_for_no_picture(
    bench: Bench, slow: HostileServer, name: str
) -> None:
    bench.add("a", **pictured(slow, name))
    bench.start()
    bench.until(lambda: bool(slow.asked()))

    bench.stop()  # fails when a thread is left

    assert not is_fetched_from(slow)
    assert bench.journal.get("a").status is Status.PROCESSING
    slow.replies = dict.fromkeys(slow.replies, hostile.answer(200, PNG))
    bench.start()
    complete(bench, "a")


# --- engines that die --------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [None, "denoise", "save"])
def test_a_job_begins_anew_when_its_engine_dies_once(bench: Bench, phase: str | None) -> None:
    occupied(bench)
    if phase is not None:
        bench.progress("a", phase)

    bench.link.emit(*LOST(bench.asked("a")))

    complete(bench, "a")
    assert bench.rendered() == ["a", "a"]
    assert bench.journal.get("a").attempts == 1


def test_a_job_fails_when_its_engine_dies_twice(bench: Bench) -> None:
    bench.link.plays(LOST, LOST)
    bench.add("a")
    bench.add("b")
    bench.start()

    job = bench.wait("a")

    assert (job.status, job.error_code) == (Status.FAILED, "engine_lost")
    assert bench.rendered()[:2] == ["a", "a"]
    complete(bench, "b")


def test_a_job_that_begins_anew_goes_before_those_that_came_later(bench: Bench) -> None:
    occupied(bench)
    bench.add("b")

    bench.link.emit(*LOST(bench.asked("a")))

    complete(bench, "a", "b")
    assert bench.rendered() == ["a", "a", "b"]


def test_nothing_begins_while_the_engine_is_away(bench: Bench) -> None:
    bench.link.goes_away()
    bench.add("a")
    bench.add("b", **PICTURED)
    bench.start()
    bench.rounds()
    before = [bench.journal.get(job_id).starts for job_id in "ab"]

    bench.link.comes_back()

    complete(bench, "a", "b")
    assert before == [0, 0]


def test_an_engine_that_refuses_because_it_starts_counts_for_nothing(bench: Bench) -> None:
    """However often: a job is not to blame for an engine that comes and goes."""
    bench.link.plays(*[AWAY] * (MAX_RESTARTS + 3), LOST)
    bench.add("a")

    bench.start()

    complete(bench, "a")
    assert len(bench.rendered()) == MAX_RESTARTS + 5


def test_an_engine_that_goes_away_between_the_look_and_the_sending_counts_for_nothing(
    bench: Bench,
) -> None:
    bench.add("a")
    submit, times = bench.link.submit, iter(range(3))

    def away(message: Any) -> Any:
        if next(times, None) is not None:
            bench.link.goes_away()
        mailbox = submit(message)
        bench.link.comes_back()
        return mailbox

    bench.link.submit = away  # type: ignore[method-assign]
    bench.start()

    complete(bench, "a")
    assert bench.journal.get("a").attempts == 0


def test_a_job_that_waits_for_another_try_begins_when_its_last_thread_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaving: it is queued again, and the dispatcher looks before the thread is gone."""
    requeue = bench.journal.requeue
    seen: list[list[str]] = []

    def slow(*args: Any, **kwargs: Any) -> None:
        requeue(*args, **kwargs)
        bench.rounds()
        seen.append(bench.rendered())

    monkeypatch.setattr(bench.journal, "requeue", slow)
    occupied(bench)
    bench.progress("a", "save")  # from here on the engine is free for others

    bench.link.emit(*LOST(bench.asked("a")))

    complete(bench, "a")
    assert seen == [["a"]]
    assert bench.rendered() == ["a", "a"]


def test_a_link_that_breaks_fails_the_job_and_not_the_next_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.link.breaks = RuntimeError("table full")
    bench.add("a")
    bench.start()
    job = bench.wait("a")

    bench.link.breaks = None
    bench.add("b")

    complete(bench, "b")
    assert (job.status, job.error_code) == (Status.FAILED, "internal_error")
    assert "table full" in caplog.text


# --- disks -------------------------------------------------------------------------------------


def test_an_engine_without_room_for_its_files_is_asked_again_later(bench: Bench) -> None:
    """However often: whoever makes room finds all jobs still there."""
    tries = MAX_RESTARTS + 3
    bench.link.plays(*[fails("disk_full", 503, "no room")] * tries)
    bench.add("a")
    bench.start()
    for number in range(1, tries + 1):
        bench.until(
            lambda number=number: (
                len(bench.rendered()) == number  # type: ignore[misc]
                and bench.journal.get("a").status is Status.QUEUED
            )
        )
        bench.idle()
        bench.clock.now += FULL_DISK_S - 0.1
        bench.rounds(1)
        assert len(bench.rendered()) == number
        bench.clock.now += 0.1

    complete(bench, "a")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_files_that_the_disk_does_not_take_are_kept_until_it_does(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Half of them are published by then. The engine is not asked again."""
    owner: Any = os if name == "fsync" else Path
    real, calls = getattr(owner, name), [0]

    def fail(*args: Any) -> Any:
        if threading.current_thread().name == "job a":
            calls[0] += 1
            if 3 <= calls[0] < 9:
                raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(owner, name, fail)
    params = request().params
    bench.add("a", params=type(params)(**{**_fields(params), "num_images": 3}))

    bench.start()

    complete(bench, "a")
    assert calls[0] > 9
    assert bench.rendered() == ["a"]
    assert len(bench.journal.get("a").assets) == 3


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_a_file_that_is_not_what_its_engine_said_fails_the_job(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged(job: RenderJob) -> list[Message]:
        done = painted(job)
        (Path(job.staging_dir) / "0.png").write_bytes(b"half")
        return [done]

    bench.link.plays(damaged)
    bench.add("a")
    bench.start()

    job = bench.wait("a")

    assert (job.status, job.error_code) == (Status.FAILED, "internal_error")
    assert "DamagedResult" in caplog.text
    assert bench.files() == []


def test_an_engine_that_stages_nothing_fails_the_job(bench: Bench) -> None:
    bench.link.plays(
        lambda job: [JobRendered(request_id=job.request_id, assets=(), receipt={}, seconds={})]
    )
    bench.add("a")
    bench.start()

    assert bench.wait("a").status is Status.FAILED


# --- a journal that cannot be used -------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "from_call"),
    [
        *((method, call) for method in ("waiting", "get", "claim") for call in (0, 1, 2, 3)),
        *((method, call) for method in ("wished_away", "over_the_bound") for call in (0, 1, 4)),
        *((method, call) for method in ("rendered", "end") for call in (0, 1)),
        ("requeue", 0),
    ],
)
def test_a_journal_that_cannot_be_used_for_a_while_loses_and_doubles_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, from_call: int
) -> None:
    """At any moment in the life of jobs of every kind."""
    calls, real = [0], getattr(bench.journal, method)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name.startswith("job "):  # not the test's own calls
            calls[0] += 1
            if from_call < calls[0] <= from_call + 3:
                raise JournalUnavailable("its disk is full")
        return real(*args, **kwargs)

    monkeypatch.setattr(bench.journal, method, fail)
    bench.link.plays(LOST, paints(), fails("engine_failed", 500))
    bench.add("twice")
    bench.add("fails", priority=-1)
    bench.add("pictured", priority=-2, **PICTURED)
    bench.add("gone", priority=-3)
    bench.journal.wish_cancel("gone")
    bench.start()

    statuses = {
        job_id: bench.wait(job_id).status.value for job_id in ("twice", "fails", "pictured", "gone")
    }
    bench.idle()

    bench.until(lambda: calls[0] > from_call + 3)
    assert statuses == {
        "twice": "completed",
        "fails": "failed",
        "pictured": "completed",
        "gone": "cancelled",
    }
    assert bench.events("twice") == ["job.processing", "job.completed"]
    assert bench.events("fails") == ["job.processing", "job.failed"]
    assert bench.events("pictured") == ["job.processing", "job.completed"]
    assert bench.events("gone") == ["job.cancelled"]
    assert bench.rendered() == ["twice", "twice", "fails", "pictured"]
    assert len(bench.fetched) == 1


def test_files_that_are_published_and_not_yet_written_down_are_not_removed_with_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaving: the journal fails, then an old job with the same file is forgotten, then the
    journal takes the new one."""
    bench.keep_finished = 1
    bench.add("old", params=request().params)
    bench.start()
    complete(bench, "old")
    bench.stop()
    rendered, tries = bench.journal.rendered, [0]

    def fail(*args: Any) -> Job:
        tries[0] += 1
        if tries[0] == 1:
            bench.journal.end("young", Status.FAILED, "no", "no", lambda job: ())
            for one in bench.journal.deliveries():
                bench.journal.delivery_state(one.id, "delivered")
            raise JournalUnavailable("its disk is full")
        if tries[0] < 50 and _known(bench, "old"):
            raise JournalUnavailable("its disk is full")
        return rendered(*args)

    monkeypatch.setattr(bench.journal, "rendered", fail)
    bench.clock.now += 1.0
    bench.add("new")
    bench.clock.now += 1.0
    bench.add("young", priority=-5, model="never runs")
    bench.link.plays(paints(), stays_silent)
    bench.start()

    job = bench.wait("new")

    assert not _known(bench, "old")
    assert job.status is Status.COMPLETED
    assert bench.results.path(job.assets[0].sha256).is_file()
    assert bench.results.path(job.assets[0].thumbnail_sha256).is_file()


def _known(bench: Bench, job_id: str) -> bool:
    try:
        bench.journal.get(job_id)
    except NotFound:
        return False
    return True


# --- restarts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [None, "denoise", "save"])
def test_a_job_that_was_in_the_engine_when_the_runner_ended_is_made_by_the_next(
    bench: Bench, phase: str | None
) -> None:
    occupied(bench)
    if phase is not None:
        bench.progress("a", phase)
        bench.until(lambda: (live := bench.board.get("a")) is not None and live.phase == phase)
    bench.stop()
    between = bench.journal.get("a")

    bench.start()

    complete(bench, "a")
    assert between.status is Status.PROCESSING
    assert bench.rendered() == ["a", "a"]
    assert bench.journal.get("a").restarts == 1


def test_a_job_whose_picture_was_being_fetched_when_the_runner_ended_is_made_by_the_next(
    bench: Bench,
) -> None:
    gate = Gate()

    def cut_off(wanted: Wanted) -> None:
        if len(bench.fetched) == 1:
            gate()
            raise ReferenceUnavailable("cut off", retry_after_s=1.0)

    bench.fetch = cut_off
    bench.add("a", **PICTURED)
    runner = bench.start()
    assert gate.reached.wait(PATIENCE_S)
    closing = threading.Thread(target=runner.close)
    closing.start()
    while not runner._runs.stopping:
        time.sleep(0.001)
    gate.opened.set()
    closing.join(PATIENCE_S)
    assert bench.journal.get("a").status is Status.PROCESSING

    bench.restart()

    complete(bench, "a")
    assert len(bench.fetched) == 2


def test_a_job_that_waited_for_the_engine_when_the_runner_ended_is_made_by_the_next(
    bench: Bench,
) -> None:
    occupied(bench)
    bench.add("b", **PICTURED)
    bench.until(lambda: len(bench.fetched) == 1)
    bench.rounds()

    bench.restart()

    complete(bench, "a", "b")
    assert bench.rendered() == ["a", "a", "b"]
    assert len(bench.fetched) == 1


def test_a_job_that_could_not_be_written_down_before_the_end_is_made_by_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def full(*_: Any) -> Job:
        tried.set()
        raise JournalUnavailable("its disk is full")

    bench.add("a")
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal, "rendered", full)
        bench.start()
        assert tried.wait(PATIENCE_S)
        bench.stop()

    bench.start()

    complete(bench, "a")
    assert bench.rendered() == ["a", "a"]
    assert len(bench.files()) == 2


def test_a_failure_that_could_not_be_written_down_before_the_end_is_no_trouble(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ends quietly: an exception that left it would end the process."""
    tried = threading.Event()

    def full(*_: Any) -> Job:
        tried.set()
        raise JournalUnavailable("its disk is full")

    bench.link.breaks = RuntimeError("table full")
    bench.add("a")
    with monkeypatch.context() as patched:
        patched.setattr(bench.journal, "end", full)
        bench.start()
        assert tried.wait(PATIENCE_S)
        bench.stop()
    bench.link.breaks = None

    bench.start()

    complete(bench, "a")


def test_what_waits_when_the_runner_ends_waits_for_the_next(bench: Bench) -> None:
    occupied(bench)
    for job_id in "bcd":
        bench.add(job_id)

    bench.restart()

    complete(bench, *"abcd")
    assert bench.rendered() == ["a", *"abcd"]


def test_files_of_finished_jobs_outlive_the_runner_and_those_of_nobody_do_not(
    bench: Bench,
) -> None:
    bench.add("a")
    bench.start()
    complete(bench, "a")
    bench.stop()
    files = bench.files()
    stranger = bench.results.path(sha256(b"stranger"))
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"stranger")

    bench.start()

    bench.rounds()
    assert bench.files() == files
    complete(bench, "a")


def test_folders_of_jobs_that_have_ended_go_at_the_start(bench: Bench) -> None:
    """A crash after the journal has the end, and before the folder is removed, leaves one."""
    bench.add("a")
    bench.start()
    complete(bench, "a")
    bench.stop()
    bench.add("b", **PICTURED)
    for job_id in ("a", "b", "nobody"):
        (bench.folder / "work" / job_id).mkdir(parents=True)
        (bench.folder / "work" / job_id / "checkpoint").write_bytes(b"x")
    bench.link.goes_away()

    bench.start()

    assert bench.folders() == ["b"]
    assert (bench.folder / "work" / "b" / "checkpoint").exists()


def test_what_an_earlier_try_has_staged_is_gone_before_the_next(bench: Bench) -> None:
    occupied(bench)
    painted(bench.asked("a"))
    checkpoint = bench.folder / "work" / "a" / "checkpoint"
    checkpoint.write_bytes(b"latents")

    bench.link.plays(stays_silent)
    bench.restart()
    bench.link.wait_sent(RenderJob, 2)

    assert not (bench.folder / "work" / "a" / "files").exists()
    assert checkpoint.read_bytes() == b"latents"
    bench.finish("a")
    complete(bench, "a")


def test_a_job_that_has_ended_its_runner_too_often_is_given_up(bench: Bench) -> None:
    bench.add("a")
    bench.add("b", priority=-1)
    for _ in range(MAX_RESTARTS):
        assert bench.journal.claim("a", lambda job: ()) is not None
        bench.journal.recover()
    bench.start()

    job = bench.wait("a")

    assert (job.status, job.error_code) == (Status.FAILED, "internal_error")
    assert job.error is not None and f"{MAX_RESTARTS} times" in job.error
    complete(bench, "b")
    assert bench.rendered() == ["b"]


def test_a_job_that_has_ended_its_runner_a_few_times_is_made(bench: Bench) -> None:
    bench.add("a")
    for _ in range(MAX_RESTARTS - 1):
        assert bench.journal.claim("a", says("processing")) is not None
        bench.journal.recover()

    bench.start()

    complete(bench, "a")


def test_a_job_that_another_version_accepted_fails_with_what_to_do(bench: Bench) -> None:
    bench.add("a")
    bench.add("b")
    with bench.journal._database.changing() as database:
        database.execute("""UPDATE jobs SET request = '{"v": 99}' WHERE id = 'a'""")
    bench.start()

    job = bench.wait("a")

    assert (job.status, job.error_code) == (Status.FAILED, "internal_error")
    assert job.error is not None and "send it again" in job.error
    complete(bench, "b")


# --- draining and forgetting -------------------------------------------------------------------


def test_a_runner_that_drains_ends_what_it_has_and_begins_nothing(bench: Bench) -> None:
    occupied(bench)
    bench.add("b")
    assert bench.runner is not None
    bench.runner.stop_taking()

    bench.finish("a")

    complete(bench, "a")
    bench.rounds()
    assert bench.journal.get("b").status is Status.QUEUED
    assert bench.rendered() == ["a"]
    assert bench.runner.active == 0


def test_a_runner_that_drains_still_cancels_what_waits(bench: Bench) -> None:
    bench.link.goes_away()
    bench.add("a")
    bench.start().stop_taking()

    bench.journal.wish_cancel("a")

    cancelled(bench, "a")


def test_a_job_that_is_handed_over_just_before_it_begins_is_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaving: it waits when the dispatcher looks, and is gone when it is read."""
    get = bench.journal.get

    def late(job_id: str) -> Job:
        if threading.current_thread().name == "job runner" and job_id == "a":
            bench.journal.hand_over("a")
        return get(job_id)

    monkeypatch.setattr(bench.journal, "get", late)
    bench.add("a")
    bench.add("b")

    bench.start()

    complete(bench, "b")
    assert bench.rendered() == ["b"]


def test_a_job_that_is_handed_over_while_it_begins_is_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = bench.journal.claim

    def late(job_id: str, deliveries: Any) -> Job | None:
        if job_id == "a":
            bench.journal.hand_over("a")
        return claim(job_id, deliveries)

    monkeypatch.setattr(bench.journal, "claim", late)
    bench.add("a")
    bench.add("b")

    bench.start()

    complete(bench, "b")
    assert bench.rendered() == ["b"]


def test_the_oldest_finished_jobs_go_with_the_files_that_nobody_shares(bench: Bench) -> None:
    bench.keep_finished = 2
    for number in range(4):
        bench.link.plays(paints(b"shared" if number in (0, 3) else bytes([number])))
        bench.add(f"j{number}")
        bench.clock.now += 1.0
    bench.start()
    for number in range(4):
        bench.wait(f"j{number}")
        bench.clock.now += 1.0
    kept = {
        sha256
        for job_id in ("j2", "j3")
        for one in bench.journal.get(job_id).assets
        for sha256 in (one.sha256, one.thumbnail_sha256)
    }
    for one in bench.journal.deliveries():
        bench.journal.delivery_state(one.id, "delivered")

    bench.until(lambda: not _known(bench, "j1"))

    bench.until(lambda: set(bench.files()) == kept)
    assert not _known(bench, "j0")
    assert len(kept) == 3  # two files and the thumbnail that all share


# --- sharing a batch -----------------------------------------------------------------------------


CLOSE: dict[str, Any] = {"exactness": "close"}


def shared(bench: Bench, *job_ids: str) -> dict[str, tuple[str, ...]]:
    """Start the runner with these jobs waiting, and an engine that says nothing by itself. Returns
    whom each job was sent with, once the engine has all of them."""
    bench.batch_images = 6
    bench.link.plays(*[stays_silent] * len(job_ids))
    for job_id in job_ids:
        bench.add(job_id, **CLOSE)
    bench.start()
    sent = bench.link.wait_sent(RenderJob, len(job_ids))
    return {one.request_id: one.companions for one in sent}


def test_jobs_that_allow_it_are_sent_together_the_leader_first(bench: Bench) -> None:
    sent = shared(bench, "a", "b", "c")

    assert next(iter(sent)) == "a"
    assert sent == {"a": ("b", "c"), "b": (), "c": ()}
    for job_id in "cab":
        bench.progress(job_id, "save")
        bench.finish(job_id)
    complete(bench, "a", "b", "c")
    assert [bench.journal.get(one).starts for one in "abc"] == [1, 1, 1]


def test_jobs_that_do_not_allow_it_are_sent_one_after_the_other(bench: Bench) -> None:
    bench.batch_images = 6
    for job_id, fields in (("a", CLOSE), ("b", {}), ("c", CLOSE)):
        bench.add(job_id, **fields)

    bench.start()

    complete(bench, "a", "b", "c")
    assert [one.companions for one in bench.link.of(RenderJob)] == [(), (), ()]
    assert bench.rendered() == ["a", "b", "c"]


def test_nobody_joins_while_pictures_of_a_job_whose_turn_was_before_are_fetched(
    bench: Bench,
) -> None:
    gate = Gate()
    bench.fetch = lambda wanted: gate()
    bench.batch_images = 6
    bench.add("p", **PICTURED)
    bench.add("a", **CLOSE)
    bench.add("b", **CLOSE)

    bench.start()
    assert gate.reached.wait(PATIENCE_S)
    bench.wait("a")
    gate.opened.set()

    complete(bench, "p", "a", "b")
    assert [one.companions for one in bench.link.of(RenderJob)] == [(), (), ()]


def test_the_next_job_begins_when_all_of_a_batch_are_saved(bench: Bench) -> None:
    shared(bench, "a", "b")
    bench.add("c")

    bench.progress("a", "save")
    bench.rounds()
    before = bench.rendered()
    bench.progress("b", "save")
    bench.link.wait_sent(RenderJob, 3)

    assert sorted(before) == ["a", "b"]
    for job_id in "ab":
        bench.finish(job_id)
    complete(bench, "a", "b", "c")


def test_a_job_of_a_batch_ends_alone_when_it_is_cancelled_or_fails(bench: Bench) -> None:
    shared(bench, "a", "b", "c")

    bench.journal.wish_cancel("b")
    bench.link.emit(*fails("prompt_too_long", 413)(bench.asked("c")))
    bench.wait("b")
    bench.wait("c")
    bench.finish("a")

    complete(bench, "a")
    ended = {one: bench.journal.get(one) for one in "bc"}
    assert (ended["b"].status, ended["b"].attempts) == (Status.CANCELLED, 0)
    assert (ended["c"].status, ended["c"].error_code) == (Status.FAILED, "prompt_too_long")


def test_jobs_whose_engine_dies_over_their_batch_are_made_again_alone(bench: Bench) -> None:
    shared(bench, "a", "b")

    for job_id in "ab":
        bench.link.emit(*LOST(bench.asked(job_id)))

    complete(bench, "a", "b")
    again = bench.link.of(RenderJob)[2:]
    assert [(one.request_id, one.companions) for one in again] == [("a", ()), ("b", ())]
    assert [bench.journal.get(one).attempts for one in "ab"] == [1, 1]


def test_an_engine_that_dies_over_the_rest_of_a_batch_counts_nothing_for_a_job_that_is_saved(
    bench: Bench,
) -> None:
    shared(bench, "a", "b")
    bench.progress("a", "save")
    bench.until(lambda: bench.board.get("a") is not None and bench.board.get("a").phase == "save")  # type: ignore[union-attr]
    bench.rounds()

    for job_id in "ab":
        bench.link.emit(*LOST(bench.asked(job_id)))

    complete(bench, "a", "b")
    assert [bench.journal.get(one).attempts for one in "ab"] == [0, 1]


def held_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Start the runner with a and b for one batch, of which a is claimed and not yet sent."""
    gate, real = Gate(), Maker._references

    def references(self: Maker, run: Any, folder: Path) -> tuple[Reference, ...]:
        if run.job.id == "a" and not gate.opened.is_set():
            gate()
        return real(self, run, folder)

    monkeypatch.setattr(Maker, "_references", references)
    bench.batch_images = 6
    bench.add("a", **CLOSE)
    bench.add("b", **CLOSE)
    bench.start()
    assert gate.reached.wait(PATIENCE_S)
    return gate


def test_a_job_of_a_batch_goes_on_when_its_leader_is_cancelled_before_it_was_sent(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = held_back(bench, monkeypatch)

    bench.journal.wish_cancel("a")
    bench.link.wait_cancelled("a")
    gate.opened.set()

    complete(bench, "b")
    assert bench.wait("a").status is Status.CANCELLED
    assert bench.rendered() == ["b"]


def test_a_job_of_a_batch_that_is_cancelled_before_it_was_sent_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = held_back(bench, monkeypatch)

    bench.journal.wish_cancel("b")
    assert bench.wait("b").status is Status.CANCELLED
    gate.opened.set()

    complete(bench, "a")
    assert [(one.request_id, one.companions) for one in bench.link.of(RenderJob)] == [("a", ())]


def test_a_runner_that_drains_lets_a_batch_wait_that_was_not_sent(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = held_back(bench, monkeypatch)

    assert bench.runner is not None
    bench.runner.stop_taking()
    gate.opened.set()
    bench.idle()

    assert bench.rendered() == []
    assert [one.id for one in bench.journal.waiting()] == ["a", "b"]


def test_a_journal_that_fails_between_two_of_a_batch_keeps_those_that_have_begun(
    bench: Bench,
) -> None:
    bench.batch_images = 6
    for job_id in "abc":
        bench.add(job_id, **CLOSE)
    claim, tries = bench.journal.claim, []

    def claimed(job_id: str, deliveries: Any) -> Job | None:
        tries.append(job_id)
        if len(tries) == 3:
            raise JournalUnavailable("the disk is full", retry_after_s=1)
        return claim(job_id, deliveries)

    bench.journal.claim = claimed  # type: ignore[method-assign]
    bench.start()

    complete(bench, "a", "b", "c")
    sent = {one.request_id: one.companions for one in bench.link.of(RenderJob)}
    assert sent == {"a": ("b",), "b": (), "c": ()}


def test_a_batch_that_was_under_way_when_the_runner_ended_is_made_by_the_next_job_by_job(
    bench: Bench,
) -> None:
    shared(bench, "a", "b")

    bench.restart()

    complete(bench, "a", "b")
    assert [bench.journal.get(one).restarts for one in "ab"] == [1, 1]
    assert [one.companions for one in bench.link.of(RenderJob)[2:]] == [(), ()]

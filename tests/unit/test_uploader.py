"""The uploader: files go to the store in their order, until all are there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import PATIENCE_S
from tests.job_parts import Clock, Gate, nothing, request, stage, uploads
from worker.errors import Cancelled, JournalUnavailable
from worker.jobs import uploads as uploads_module
from worker.jobs.bell import Bell
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal, NewDelivery
from worker.jobs.results import Results
from worker.jobs.uploads import MAX_TRIES, Uploader
from worker.storage.stores import StoreRefused, StoreUnavailable


@dataclass
class Put:
    """One attempt to store a file."""

    key: str
    content: bytes
    mime_type: str
    saved: dict[str, Any]
    save: Callable[[dict[str, Any]], None]
    should_stop: Callable[[], bool]


class Store:
    """Stands where an object store stands. Any thread."""

    name = "the test's store"

    def __init__(self) -> None:
        self.tried: list[Put] = []
        self.stored: dict[str, bytes] = {}
        self.does: Callable[[Put], None] = lambda put: None  # may raise what a store raises

    def put(
        self,
        key: str,
        file: Path,
        mime_type: str,
        saved: dict[str, Any],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        attempt = Put(key, file.read_bytes(), mime_type, dict(saved), save, should_stop)
        self.tried.append(attempt)
        self.does(attempt)
        self.stored[key] = attempt.content

    @property
    def keys(self) -> list[str]:
        return [put.key for put in self.tried]


class Bench:
    """An uploader whose rounds a test begins, and jobs with real files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clock = Clock()
        self.bell = Bell()
        self.journal = Journal(folder / "jobs", self.bell, self.clock)
        self.results = Results(folder / "jobs" / "results")
        self.store = Store()
        self.told: list[tuple[str, str, Status]] = []
        self.restart()

    def restart(self) -> None:
        self.uploader = Uploader(
            self.journal, self.bell, self.results, self.store, self.tell,
            pace=lambda attempts: 10.0 * attempts,
        )  # fmt: skip

    def tell(self, job: Job, event: str) -> list[NewDelivery]:
        self.told.append((job.id, event, job.status))
        return []

    def render(self, job_id: str, *contents: bytes) -> None:
        """A job whose files are there and not yet in the store."""
        self.journal.add(request(job_id))
        self.journal.claim(job_id, nothing)
        staging = self.folder / job_id
        assets = self.results.publish(staging, stage(staging, *contents, thumbnail=b"small"))
        self.journal.rendered(job_id, assets, {}, {}, uploads(job_id, *assets), nothing)

    def status(self, job_id: str) -> Status:
        return self.journal.get(job_id).status

    def until(self, is_so: Callable[[], bool]) -> None:
        seen, ends = -1, time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < ends
            seen = self.bell.wait(seen, 0.1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


def fails(error: Exception, *keys: str) -> Callable[[Put], None]:
    """A store that refuses these keys; all without any."""

    def put(attempt: Put) -> None:
        if not keys or attempt.key in keys:
            raise error

    return put


# --- bringing ----------------------------------------------------------------------------------


def test_all_files_are_brought_and_the_job_is_complete_with_the_last_one(bench: Bench) -> None:
    bench.render("a", b"one", b"two")
    seen: list[Status] = []
    bench.store.does = lambda put: seen.append(bench.status("a"))

    bench.uploader.tick()

    assert bench.store.keys == [
        "u/a/0.png", "u/a/0.thumb.webp", "u/a/1.png", "u/a/1.thumb.webp",
    ]  # fmt: skip
    assert list(bench.store.stored.values()) == [b"one", b"small", b"two", b"small"]
    assert [put.mime_type for put in bench.store.tried] == ["image/png", "image/webp"] * 2
    assert seen == [Status.PROCESSING] * 4
    assert bench.status("a") is Status.COMPLETED
    assert bench.told == [("a", "completed", Status.COMPLETED)]


def test_what_is_in_the_store_is_not_brought_again(bench: Bench) -> None:
    bench.render("a", b"one")
    bench.uploader.tick()
    bench.restart()

    bench.uploader.tick()

    assert len(bench.store.tried) == 2


def test_jobs_are_brought_in_the_order_in_which_they_were_made(bench: Bench) -> None:
    bench.render("b", b"1")
    bench.render("a", b"2")

    bench.uploader.tick()

    assert [key.split("/")[1] for key in bench.store.keys] == ["b", "b", "a", "a"]


def test_nothing_is_brought_of_a_job_that_is_cancelled_between_two_files(bench: Bench) -> None:
    bench.render("a", b"one", b"two")
    bench.render("b", b"other")

    def cancel(put: Put) -> None:
        if put.key == "u/a/0.thumb.webp":
            bench.journal.end("a", Status.CANCELLED, "no", "cancelled", nothing)

    bench.store.does = cancel

    bench.uploader.tick()

    assert bench.store.keys == [
        "u/a/0.png", "u/a/0.thumb.webp", "u/b/0.png", "u/b/0.thumb.webp",
    ]  # fmt: skip
    assert bench.status("a") is Status.CANCELLED
    assert bench.told == [("b", "completed", Status.COMPLETED)]


def test_a_job_that_is_forgotten_while_its_file_is_brought_is_no_harm(bench: Bench) -> None:
    bench.render("a", b"one")

    def forget(put: Put) -> None:
        bench.journal.end("a", Status.CANCELLED, "no", "cancelled", nothing)
        bench.journal.forget(["a"])

    bench.store.does = forget

    bench.uploader.tick()

    assert bench.store.keys == ["u/a/0.png"]
    assert bench.told == []


# --- again -------------------------------------------------------------------------------------


def test_what_failed_is_tried_again_after_a_growing_while_and_others_go_on(bench: Bench) -> None:
    bench.render("a", b"one")
    bench.render("b", b"two")
    bench.store.does = fails(StoreUnavailable("the store answered 503"), "u/a/0.png")
    tried = []
    for _ in range(61):
        before = bench.store.keys.count("u/a/0.png")
        bench.uploader.tick()
        if bench.store.keys.count("u/a/0.png") > before:
            tried.append(bench.clock.now - 1000.0)
        bench.clock.now += 1.0
    states = (bench.status("a"), bench.status("b"))

    bench.store.does = lambda put: None
    bench.clock.now += 40.0
    bench.uploader.tick()

    assert tried == [0.0, 10.0, 30.0, 60.0]
    assert states == (Status.PROCESSING, Status.COMPLETED)
    assert bench.status("a") is Status.COMPLETED
    assert [event for _, event, _ in bench.told] == ["completed"] * 2


@pytest.mark.parametrize(("asked_s", "after_s"), [(None, 10.0), (3.0, 10.0), (500.0, 500.0)])
def test_a_store_is_not_asked_before_the_time_that_it_named(
    bench: Bench, asked_s: float | None, after_s: float
) -> None:
    bench.render("a", b"one")
    bench.store.does = fails(StoreUnavailable("busy", retry_after_s=asked_s), "u/a/0.png")
    bench.uploader.tick()

    bench.clock.now += after_s - 0.1
    early = [one.place for one in bench.journal.uploads_due()]
    bench.clock.now += 0.1

    assert early == []
    assert [one.place for one in bench.journal.uploads_due()] == ["u/a/0.png"]


def test_a_store_that_refuses_is_asked_again_because_a_person_may_have_mended_it(
    bench: Bench,
) -> None:
    bench.render("a", b"one")
    bench.store.does = fails(StoreRefused("wrong key"))
    bench.uploader.tick()
    bench.store.does = lambda put: None
    bench.clock.now += 10.0

    bench.uploader.tick()

    assert bench.status("a") is Status.COMPLETED


def test_why_an_upload_waits_can_be_seen(bench: Bench) -> None:
    bench.render("a", b"one")
    bench.store.does = fails(StoreUnavailable("the store answered 503 " + "x" * 600), "u/a/0.png")

    bench.uploader.tick()

    first, second = bench.journal.of_job("a")
    assert (first["state"], first["attempts"]) == ("waiting", 1)
    assert first["error"].startswith("the store answered 503")
    assert len(first["error"]) == 500
    assert (second["state"], second["error"]) == ("delivered", None)


def test_a_file_that_cannot_be_read_is_tried_again_and_its_path_is_not_told(bench: Bench) -> None:
    bench.render("a", b"one")
    for path in bench.folder.rglob("*"):
        if path.is_file() and path.read_bytes() == b"one":
            path.unlink()

    bench.uploader.tick()

    error = bench.journal.of_job("a")[0]["error"]
    assert "No such file" in error
    assert str(bench.folder) not in error
    assert bench.status("a") is Status.PROCESSING


def test_an_upload_goes_on_where_an_earlier_process_was(bench: Bench) -> None:
    bench.render("a", b"one")

    def breaks(put: Put) -> None:
        put.save({"offset": 1})
        put.save({"offset": 2})
        raise StoreUnavailable("cut off")

    bench.store.does = breaks
    bench.uploader.tick()
    bench.store.does = lambda put: None
    bench.restart()
    bench.clock.now += 10.0

    bench.uploader.tick()

    assert [put.saved for put in bench.store.tried if put.key == "u/a/0.png"] == [{}, {"offset": 2}]


def test_a_job_whose_files_the_store_never_takes_fails_and_keeps_them(bench: Bench) -> None:
    bench.render("a", b"one")
    bench.store.does = fails(StoreRefused("too large"), "u/a/0.png")

    for _ in range(MAX_TRIES):
        bench.uploader.tick()
        bench.clock.now += 1e6

    job = bench.journal.get("a")
    assert (job.status, job.error_code) == (Status.FAILED, "upload_failed")
    assert job.error is not None
    assert f"{MAX_TRIES} tries" in job.error and "still on the worker" in job.error
    assert bench.store.keys.count("u/a/0.png") == MAX_TRIES
    assert bench.results.path(job.assets[0].sha256).read_bytes() == b"one"
    assert bench.told == [("a", "failed", Status.FAILED)]
    assert bench.journal.uploads_due() == []


# --- trouble and ends --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uploads_due", "get", "uploaded", "upload_failed"])
def test_a_journal_that_cannot_be_used_for_a_while_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(uploads_module, "LOOK_EVERY_S", 0.01)
    bench.render("a", b"one")
    left, real = [3], getattr(bench.journal, method)

    def call(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise JournalUnavailable("its disk is full")
        return real(*args)

    monkeypatch.setattr(bench.journal, method, call)
    if method == "upload_failed":
        times = iter([StoreUnavailable("busy")] * 4)

        def busy(put: Put) -> None:
            bench.clock.now += 20.0
            if (error := next(times, None)) is not None:
                raise error

        bench.store.does = busy
    bench.uploader.start()

    bench.until(lambda: left == [0] and bench.told != [])

    bench.uploader.close()
    assert bench.told == [("a", "completed", Status.COMPLETED)]
    assert bench.store.stored == {"u/a/0.png": b"one", "u/a/0.thumb.webp": b"small"}


def test_a_place_to_go_on_from_that_cannot_be_written_down_ends_the_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.render("a", b"one")

    def full(*_: Any) -> None:
        raise JournalUnavailable("its disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(bench.journal, "upload_saved", full)
        bench.store.does = lambda put: put.save({"offset": 1})
        with pytest.raises(JournalUnavailable):
            bench.uploader.tick()

    assert bench.journal.uploads_due()[0].attempts == 0  # the store is not to blame
    bench.uploader.tick()
    assert bench.status("a") is Status.COMPLETED


def test_an_upload_that_is_cut_short_by_the_end_is_no_failure(bench: Bench) -> None:
    gate = Gate()
    bench.render("a", b"one")

    def stops(put: Put) -> None:
        gate()
        assert put.should_stop()
        raise Cancelled("stopped")

    bench.store.does = stops
    bench.uploader.start()
    assert gate.reached.wait(PATIENCE_S)
    closing = threading.Thread(target=bench.uploader.close)
    closing.start()
    while not bench.uploader._stopping:
        time.sleep(0.001)
    gate.opened.set()
    closing.join(PATIENCE_S)

    assert not closing.is_alive()
    assert bench.store.keys == ["u/a/0.png"]
    assert [one.attempts for one in bench.journal.uploads_due()] == [0, 0]
    bench.restart()
    bench.store.does = lambda put: None
    bench.uploader.tick()
    assert bench.status("a") is Status.COMPLETED


def test_the_loop_brings_what_comes_in(bench: Bench) -> None:
    bench.uploader.start()

    bench.render("a", b"one")
    bench.until(lambda: bench.status("a") is Status.COMPLETED)
    bench.render("b", b"two")
    bench.until(lambda: bench.status("b") is Status.COMPLETED)

    bench.uploader.close()
    assert len(bench.store.tried) == 4

"""Files are written beside the next job: answers stay in order, and nothing is lost or held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from worker.catalog import media_catalog
from worker.config import load_settings
from worker.engine.host import Report, Ticket
from worker.engine.leases import alone
from worker.engine.media import engine as engine_module
from worker.engine.media.engine import MediaEngine
from worker.engine.media.rendering import Made
from worker.engine.media.saver import MAX_JOBS, Saver, save_files
from worker.errors import Cancelled, OutOfDeviceMemory
from worker.protocol.messages import (
    AssetFile,
    Failed,
    JobRendered,
    Message,
    ModelChanged,
    Progress,
    RenderJob,
    RenderParams,
    UnloadModel,
)
from worker.vram.sizes import Peaks

PATIENCE_S = 10.0


class Outbox:
    """Keeps what is sent. Any thread."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str]] = []
        self.sent: list[Message] = []
        self.waits: list[Callable[[], None]] = []  # what happens while the engine waits
        self._changed = threading.Condition()

    def send(self, ticket: Ticket, message: Message) -> None:
        with self._changed:
            self.sent.append(message)
            if not isinstance(message, Progress):
                code = message.code if isinstance(message, Failed) else type(message).__name__
                self.answers.append((ticket.request_id, code))
            self._changed.notify_all()

    def publish(self, report: Report) -> None: ...

    def poll(self) -> None: ...

    def wait(self, timeout_s: float) -> None:
        if self.waits:
            self.waits.pop(0)()
        with self._changed:
            self._changed.wait(timeout_s)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def comes(self, count: int) -> list[tuple[str, str]]:
        """The answers, once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.answers) >= count, PATIENCE_S)
            return list(self.answers)


def ticket(name: str) -> Ticket:
    return Ticket(b"peer", name)  # type: ignore[arg-type]


def rendered(name: str) -> JobRendered:
    return JobRendered(request_id=name, assets=(), receipt={}, seconds={})


# --- the saver ------------------------------------------------------------------------------------


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


class Gate:
    """Work that lasts until a test lets it go on."""

    def __init__(self, name: str, reply: Callable[[], Message] | None = None):
        self.began = threading.Event()
        self.goes_on = threading.Event()
        self._reply = reply or (lambda: rendered(name))

    def __call__(self, check: Callable[[], None]) -> Message:
        self.began.set()
        assert self.goes_on.wait(PATIENCE_S)
        check()
        return self._reply()


def test_jobs_are_answered_in_the_order_in_which_they_were_given(outbox: Outbox) -> None:
    saver, gate = Saver(outbox), Gate("a")
    saver.give(ticket("a"), gate)
    assert gate.began.wait(PATIENCE_S)

    def fails(_: Callable[[], None]) -> Message:
        raise OSError(28, "No space left on device")

    saver.give(ticket("b"), fails)
    saver.give(ticket("c"), lambda _: rendered("c"))

    assert (outbox.answers, saver.jobs, saver.is_full) == ([], 3, True)
    gate.goes_on.set()
    assert outbox.comes(3) == [
        ("a", "JobRendered"), ("b", "disk_full"), ("c", "JobRendered"),
    ]  # fmt: skip


def test_a_job_is_cancelled_between_two_files_and_before_its_first(outbox: Outbox) -> None:
    saver, gate, ran = Saver(outbox), Gate("a"), list[str]()
    saver.give(ticket("a"), gate)
    saver.give(ticket("b"), lambda _: ran.append("b") or rendered("b"))  # type: ignore[func-returns-value]
    assert gate.began.wait(PATIENCE_S)

    assert saver.cancel(ticket("b"))
    assert saver.cancel(ticket("a"))
    assert not saver.cancel(ticket("c"))
    gate.goes_on.set()

    assert outbox.comes(2) == [("a", "cancelled"), ("b", "cancelled")]
    assert ran == []


def test_the_thread_ends_when_there_is_nothing_to_do(outbox: Outbox) -> None:
    saver = Saver(outbox)

    for number in range(50):
        saver.give(ticket(str(number)), lambda _: rendered("x"))
    outbox.comes(50)

    for thread in [one for one in threading.enumerate() if one.name == "saver"]:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert saver.jobs == 0
    saver.give(ticket("again"), lambda _: rendered("again"))
    assert outbox.comes(51)[-1] == ("again", "JobRendered")


def test_every_file_is_asked_for_before_it_is_written(tmp_path: Path) -> None:
    job = RenderJob(
        request_id="j", model="m", output="image", params=PARAMS, staging_dir=str(tmp_path)
    )
    asked: list[int] = []

    def check() -> None:
        asked.append(len([*tmp_path.glob("*.png")]))
        if len(asked) == 3:
            raise Cancelled("no more")

    with pytest.raises(Cancelled):
        save_files(job, "sdxl", [Image.new("RGB", (8, 8))] * 4, check)

    assert asked == [0, 1, 2]
    assert len([*tmp_path.glob("*.png")]) == 2


# --- an engine ------------------------------------------------------------------------------------

PARAMS = RenderParams(
    prompt="x", negative_prompt=None, width=64, height=64, steps=2, guidance_scale=1.0, seed=3
)


class Engine:
    """A media engine that renders nothing, and whose files come when a test says so."""

    def __init__(self, state_dir: Path, monkeypatch: pytest.MonkeyPatch):
        self.outbox = Outbox()
        catalog = media_catalog(load_settings("demo", {"VERBATIM_STATE_DIR": str(state_dir)}))
        self.engine = MediaEngine(
            catalog, (), 2, torch.device("cpu"), state_dir, self.outbox, alone(1 << 30),
            Peaks(state_dir, lambda _: []),
        )  # fmt: skip
        self.engine._configs["demo-image"] = ""
        self.rendered: list[str] = []
        self.allowed = threading.Semaphore(0)  # files
        self.fails: set[str] = set()
        monkeypatch.setattr(self.engine._models, "ensure", lambda _: SimpleNamespace())
        monkeypatch.setattr(self.engine, "_renderer", self)
        monkeypatch.setattr(engine_module, "save_files", self._save)
        self.counters: dict[str, int] = {}

    def render(self, run: Any, checkpoint_every_s: float) -> Made:
        name = run.job.request_id
        self.rendered.append(name)
        if name in self.fails:
            raise OutOfDeviceMemory("no room")
        run.track.phase("decode")
        return Made([], {"model": "m"})

    def _save(self, job: RenderJob, kind: str, made: Any, check: Any) -> tuple[AssetFile, ...]:
        assert self.allowed.acquire(timeout=PATIENCE_S)
        check()
        return ()

    def submit(self, *names: str) -> None:
        for name in names:
            job = RenderJob(
                request_id=name, model="demo-image", output="image", params=PARAMS,
                staging_dir="/nowhere",
            )  # fmt: skip
            self.engine.submit(ticket(name), job)

    @property
    def active(self) -> int:
        return self.engine.report().active


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = Engine(tmp_path, monkeypatch)
    yield made
    made.allowed.release(100)
    while made.engine.step():
        pass


def test_the_next_job_is_rendered_while_the_files_of_the_last_one_are_written(busy: Engine) -> None:
    busy.submit("a", "b")

    assert busy.engine.step() and busy.engine.step()

    assert (busy.rendered, busy.outbox.answers, busy.active) == (["a", "b"], [], 2)
    busy.allowed.release(2)
    assert busy.engine.step()  # nothing else to do: it waits for the files
    assert busy.outbox.answers == [("a", "JobRendered"), ("b", "JobRendered")]
    assert (busy.engine.step(), busy.active) == (False, 0)
    counters = busy.engine.report().counters
    assert counters is not None and counters["jobs_rendered"] == 2


def test_no_more_pictures_are_held_than_of_a_few_jobs(busy: Engine) -> None:
    busy.submit("a", "b", "c")
    seen: list[int] = []

    def one_is_written() -> None:
        seen.append(busy.engine._saver.jobs)
        busy.allowed.release()

    busy.outbox.waits.append(one_is_written)
    for _ in range(3):
        assert busy.engine.step()

    assert seen == [MAX_JOBS]
    assert busy.outbox.answers == [("a", "JobRendered")]
    assert busy.engine._saver.jobs == MAX_JOBS


def test_a_job_that_fails_is_answered_behind_the_one_before_it(busy: Engine) -> None:
    busy.fails.add("b")
    busy.submit("a", "b")

    assert busy.engine.step() and busy.engine.step()
    assert busy.outbox.answers == []
    busy.allowed.release()

    assert busy.outbox.comes(2) == [("a", "JobRendered"), ("b", "out_of_device_memory")]


def test_a_job_is_cancelled_while_its_files_are_written(busy: Engine) -> None:
    busy.submit("a", "b")
    assert busy.engine.step() and busy.engine.step()

    busy.engine.cancel(ticket("b"))
    busy.allowed.release()

    assert busy.outbox.comes(2) == [("a", "JobRendered"), ("b", "cancelled")]


def test_a_job_is_cancelled_while_it_waits_to_be_saved(busy: Engine) -> None:
    busy.submit("a", "b", "c")
    busy.outbox.waits.append(lambda: busy.engine.cancel(ticket("c")))

    for _ in range(3):
        assert busy.engine.step()

    assert busy.outbox.answers == [("c", "cancelled")]  # at once


def test_other_messages_are_answered_while_files_are_written(busy: Engine) -> None:
    busy.submit("a")
    assert busy.engine.step()
    busy.outbox.waits.append(
        lambda: busy.engine.submit(
            ticket("u"), UnloadModel(request_id="u", model="demo-image")
        )
    )  # fmt: skip

    assert busy.engine.step()  # it has waited for the files, and a message came
    assert busy.engine.step()

    assert busy.outbox.answers == [("u", ModelChanged.__name__)]


def test_the_seconds_of_saving_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Engine(tmp_path, monkeypatch)
    now = [5.0]
    monkeypatch.setattr(busy.engine, "_clock", lambda: now[0])

    def save(job: RenderJob, kind: str, made: Any, check: Any) -> tuple[AssetFile, ...]:
        now[0] += 2.0
        return ()

    monkeypatch.setattr(engine_module, "save_files", save)
    busy.submit("a")
    while busy.engine.step():
        pass

    done = busy.outbox.sent[-1]
    assert isinstance(done, JobRendered)
    assert done.seconds["save"] == 2.0
    assert [m.phase for m in busy.outbox.sent if isinstance(m, Progress)][-1] == "save"
    busy.submit("b")
    busy.engine.step()
    told = [m for m in busy.outbox.sent if isinstance(m, Progress) and m.phase == "save"]
    assert told[-1].left_s == pytest.approx(2.0)  # as the last one took

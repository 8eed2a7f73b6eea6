"""Engines that play scripts and write down what they were sent, and the ports that talk to them.

Everything here is what the fronts would meet in the daemon, without processes, models or sockets:
real mailboxes, real messages, real small files.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from worker.catalog import ModelSpec
from worker.config import Settings
from worker.errors import WorkerError
from worker.protocol.link import EngineView, Mailbox, unavailable
from worker.protocol.messages import (
    AssetFile,
    ChatPlanned,
    EngineNotice,
    ExplainQuery,
    Explanation,
    Failed,
    Generate,
    Generated,
    JobRendered,
    LedgerQuery,
    LedgerReport,
    LoadModel,
    Message,
    ModelChanged,
    ModelState,
    PhaseWays,
    PlanChat,
    Planned,
    PlanQuery,
    Progress,
    Render,
    Rendered,
    RenderJob,
    State,
    TenantSpec,
    Token,
    UnloadModel,
    Way,
    failed,
)
from worker.vram.broker import Broker
from worker.vram.dryrun import dry_run
from worker.vram.phases import Shape
from worker.vram.planner import ChatBytes
from worker.vram.texts import Reader
from worker.vram.ways import PartBytes, ways

if TYPE_CHECKING:  # unit tests share this module and need no Flask
    from flask import Flask
    from flask.testing import FlaskClient
    from werkzeug.test import TestResponse

    from worker.front.admission import Admission
    from worker.front.drain import Drainer
    from worker.front.media import JobDesk
    from worker.jobs.board import Live
    from worker.jobs.job import Job
    from worker.jobs.runner import JobRunner

# What an engine answers to a message, in order; nothing for one that stays silent.
Script = Callable[[Any], Iterable[Message]]
PATIENCE_S = 10.0  # how long a test waits for another thread before it fails


class FakeLink:
    """Stands where worker.protocol.link.Link stands. Any thread; the lock guards the lists."""

    def __init__(self, name: str, script: Script, models: Sequence[ModelState] = ()):
        """name: of the engine, such as "engine chat". script: what it answers by default."""
        self.view = EngineView(name)
        self.sent: list[Any] = []
        self.cancelled: list[str] = []
        self.obeys_cancel = True
        self.breaks: Exception | None = None  # raised by `submit`, as a bug or a full table would
        self._models = tuple(models)
        self._script = script
        self._once: deque[Script] = deque()
        self._open: dict[str, Mailbox] = {}
        self._changed = threading.Condition()
        self.comes_back()

    # --- for tests -----------------------------------------------------------------------------

    def plays(self, *scripts: Script) -> None:
        """Play each of `scripts` for one message, in order, before the default one again."""
        self._once.extend(scripts)

    def emit(self, event: Message) -> None:
        """One more event of a request that is running."""
        with self._changed:
            self._open[event.request_id].put(event)  # type: ignore[attr-defined]

    def reports(self, **changes: Any) -> None:
        """Change what the engine last said of itself: fields of `State`."""
        assert self.view.state is not None
        state = msgspec.structs.replace(self.view.state, **changes)
        self.view = replace(self.view, state=state, seen_at=time.monotonic())

    def goes_away(self, notice: EngineNotice | None = None) -> None:
        """Stop answering, as far as the front can see."""
        self.view = replace(self.view, state=None, notice=notice, lost_at=time.monotonic())

    def comes_back(self) -> None:
        state = State(
            name=self.view.name,
            pid=4711,
            started_at=1.0,
            status="ready",
            models=self._models,
            device="cpu",
            device_total_bytes=8 << 30,
            device_free_bytes=6 << 30,
            rss_bytes=1 << 30,
            counters={"requests_served": 3, "model_loads": 1, "model_unloads": 0},
        )
        self.view = EngineView(self.view.name, state=state)

    def of(self, kind: type[Message]) -> list[Any]:
        """The messages of this kind that were sent, oldest first."""
        return [message for message in self.sent if isinstance(message, kind)]

    def wait_sent(self, kind: type[Message], count: int = 1) -> list[Any]:
        """Wait until `count` messages of this kind were sent."""
        self._wait(lambda: len(self.of(kind)) >= count)
        return self.of(kind)

    def wait_cancelled(self, request_id: str) -> None:
        self._wait(lambda: request_id in self.cancelled)

    @property
    def open_requests(self) -> list[str]:
        """Requests whose mailbox nobody has released."""
        with self._changed:
            return list(self._open)

    def close(self) -> list[str]:
        """Close what nobody has released, so that no other test is blamed; its requests."""
        with self._changed:
            left = dict(self._open)
            self._open.clear()
        for mailbox in left.values():
            mailbox.close()
        return list(left)

    def _wait(self, predicate: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, PATIENCE_S), f"sent so far: {self.sent}"

    # --- the interface of Link -----------------------------------------------------------------

    def submit(self, message: Any) -> Mailbox:
        if self.breaks is not None:
            raise self.breaks
        mailbox = Mailbox(message.request_id)
        with self._changed:
            self.sent.append(message)
            self._open[message.request_id] = mailbox
            if self.view.state is None:
                mailbox.put(failed(message.request_id, unavailable(self.view, time.monotonic())))
            else:
                script = self._once.popleft() if self._once else self._script
                for event in script(message):
                    mailbox.put(event)
            self._changed.notify_all()
        return mailbox

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self.cancelled.append(request_id)
            if self.obeys_cancel and request_id in self._open:
                self._open[request_id].put(
                    Failed(request_id=request_id, code="cancelled", status=499, error="cancelled")
                )
            self._changed.notify_all()

    def release(self, mailbox: Mailbox) -> None:
        with self._changed:
            self._open.pop(mailbox.request_id, None)
            mailbox.close()

    def note(self, notice: EngineNotice) -> None:
        self.view = replace(self.view, notice=notice if notice.cause else None)

    def require_connected(self) -> None:
        if self.view.state is None:
            raise unavailable(self.view, time.monotonic())


class FakeChatLink(FakeLink):
    """A chat engine that says the same to everybody."""

    def __init__(self, models: Sequence[ModelState] = ()):
        super().__init__("engine chat", says("An answer."), models)


class FakeMediaLink(FakeLink):
    """A media engine that paints at once."""

    def __init__(self, models: Sequence[ModelState] = ()):
        super().__init__("engine media", paints(), models)


# --- scripts -------------------------------------------------------------------------------------


def says(
    text: str, *, pieces: Sequence[str] | None = None, finish_reason: str = "stop", **more: Any
) -> Script:
    """A chat engine's answers: `text`, in `pieces` where those are given.

    more: other fields of `Generated`.
    """

    def script(message: Message) -> Iterable[Message]:
        if not isinstance(message, Generate):
            return _others(message)
        parts = list(pieces) if pieces is not None else [text]
        tokens: list[Message] = [
            Token(request_id=message.request_id, text=part, completion_tokens=count)
            for count, part in enumerate(parts, 1)
        ]
        return [*tokens, generated(message, text, len(parts), finish_reason, **more)]

    return script


def generated(
    message: Generate,
    text: str,
    completion_tokens: int = 1,
    finish_reason: str = "stop",
    **more: Any,
) -> Generated:
    """The last event of a generation."""
    fields: dict[str, Any] = {
        "request_id": message.request_id,
        "text": text,
        "finish_reason": finish_reason,
        "stop_string": None,
        "prompt_tokens": 11,
        "completion_tokens": completion_tokens,
        "receipt": {
            "model": message.model,
            "seed": message.sampling.seed,
            "finish_reason": finish_reason,
        },
        "queue_s": 0.125,
        "prefill_s": 0.25,
        "decode_s": 1.5,
    }
    return Generated(**(fields | more))


def fails(
    code: str, status: int, error: str = "no", *, retry_after_s: float | None = None
) -> Script:
    """An engine that answers with this error."""

    def script(message: Any) -> Iterable[Message]:
        return [
            Failed(
                request_id=message.request_id,
                code=code,
                status=status,
                error=error,
                retry_after_s=retry_after_s,
            )
        ]

    return script


def raises(error: WorkerError) -> Script:
    """An engine that answers with this error of the worker's own."""
    return lambda message: [failed(message.request_id, error)]


def stays_silent(_: Any) -> Iterable[Message]:
    """An engine that never answers by itself."""
    return []


def paints(payload: bytes = b"") -> Script:
    """A media engine's answer: a tiny picture per image, a small file per video.

    payload: more bytes at the end of each file, to give it a size.
    """

    def script(message: Message) -> Iterable[Message]:
        if not isinstance(message, RenderJob):
            return _others(message)
        steps = message.params.steps
        return [
            Progress(request_id=message.request_id, phase="denoise", step=1, steps=steps),
            painted(message, payload),
        ]

    return script


def painted(job: RenderJob, payload: bytes = b"") -> JobRendered:
    """The last event of a job, with its files really staged."""
    staging = Path(job.staging_dir)
    staging.mkdir(parents=True)
    assets = tuple(_stage(staging, job, index, payload) for index in range(job.params.num_images))
    return JobRendered(
        request_id=job.request_id,
        assets=assets,
        receipt={"model": job.model, "seed": job.params.seed},
        seconds={"denoise": 0.5, "decode": 0.25},
    )


def _stage(staging: Path, job: RenderJob, index: int, payload: bytes) -> AssetFile:
    video = job.output == "video"
    name = f"{index}.{'mp4' if video else 'png'}"
    data = (b"\0\0\0\x18ftypmp42" if video else _png(index)) + payload
    (staging / name).write_bytes(data)
    (staging / f"{index}.thumb.webp").write_bytes(b"RIFF\0\0\0\0WEBP" + bytes([index]))
    params = job.params
    return AssetFile(
        file=name,
        thumbnail=f"{index}.thumb.webp",
        type=job.output,
        mime_type="video/mp4" if video else "image/png",
        width=params.width,
        height=params.height,
        seed=params.seed + index,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        frames=params.frames if video else None,
        fps=params.fps if video else None,
        duration_s=params.frames / params.fps if video else None,
    )


def _png(shade: int) -> bytes:
    """A picture of one grey pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, shade]))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _others(message: Any) -> Iterable[Message]:
    """What every engine answers to what is not its main work."""
    match message:
        case Render():
            text = "".join(f"<{one.role}>{one.content}" for one in message.messages)
            return [
                Rendered(
                    request_id=message.request_id,
                    text=message.prompt if message.prompt is not None else text,
                    ids=[1, 2, 3],
                    template=None if message.prompt is not None else "chatml",
                    tokenizer_sha256="0" * 64,
                    context_tokens=32_768,
                )
            ]
        case PlanChat():
            return [
                ChatPlanned(
                    request_id=message.request_id, prompt_tokens=20, cached_tokens=16,
                    max_tokens=message.max_tokens, context_tokens=32_768, kv_bytes=1 << 29,
                    pool_bytes=1 << 28, whole_pool_bytes=1 << 30, seconds=(0.5, 4.0),
                )
            ]  # fmt: skip
        case LoadModel() | UnloadModel():
            return [
                ModelChanged(
                    request_id=message.request_id, model=message.model, changed=True, seconds=0.5
                )
            ]
    raise AssertionError(f"this engine knows no {type(message).__name__}")


# --- ports ---------------------------------------------------------------------------------------


@dataclass
class ChatPort:
    """The chat port with an engine that plays scripts."""

    settings: Settings
    app: Flask
    client: FlaskClient
    link: FakeLink
    admission: Admission
    drainer: Drainer


@dataclass
class MediaPort(ChatPort):
    """The image and video port. `link` is the chat engine's, for raw completion."""

    media: FakeLink
    desk: JobDesk
    runner: JobRunner

    def accept(self, **body: Any) -> str:
        """Post a job that must be accepted; its id."""
        answer = self.client.post("/generate", json={"prompt": "a red cube"} | body)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.get_json()["job_id"])

    def wait(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """Wait until the job has one of `statuses`; the JSON of the job."""
        return self._wait_until(job_id, lambda job, _: job.status.value in statuses)

    def wait_step(self, job_id: str, step: int) -> dict[str, Any]:
        """Wait until the job has come to `step`; the JSON of the job."""
        return self._wait_until(job_id, lambda _, live: live is not None and live.step == step)

    def fetch(self, path: str, headers: dict[str, str] | None = None) -> TestResponse:
        """GET a file, read whole, so that it is closed again."""
        return self.client.get(path, headers=headers, buffered=True)

    def _wait_until(
        self, job_id: str, is_there: Callable[[Job, Live | None], bool]
    ) -> dict[str, Any]:
        ends = time.monotonic() + PATIENCE_S
        seen = 0
        while not is_there(
            job := self.desk.journal.get(job_id), live := self.desk.board.get(job_id)
        ):
            assert time.monotonic() < ends, f"the job stays {job.status.value}, {live}"
            seen = self.desk.bell.wait(seen, 0.5)
        return dict(self.client.get(f"/jobs/{job_id}").get_json())


def answer_query(query: Any) -> Message | None:
    """An orchestrator with an empty ledger, that knows of request j1 and of no other."""
    match query:
        case ExplainQuery():
            known = query.about == "j1"
            events = ({"t_s": 0.0, "what": "asked", "phase": "decode"},) if known else ()
            return Explanation(request_id=query.request_id, found=known, events=events)
        case PlanQuery():
            broker = Broker(10 << 30)
            phases = dry_run(broker, query.holder, query.tenants, query.phases, 0.0)
            return Planned(request_id=query.request_id, phases=tuple(phases))
        case LedgerQuery():
            return LedgerReport(
                request_id=query.request_id, budget_bytes=10, free_bytes=7,
                tenants=({"tenant": "a.weights", "held_bytes": 3},), leases=(), waiting=(),
                counters={"granted": 2.0}, drift=0.0,
            )  # fmt: skip
    return None


class FakeSizer:
    """Every model has one part of 4 GiB, that can be streamed, and every phase of it is 3 GiB, one
    more for each further piece of a text or picture of a batch. Chat models are 2 GiB, and their
    pools 1."""

    def chat(self, spec: ModelSpec) -> ChatBytes:
        return ChatBytes(weights=2 << 30, pool=1 << 30, least_pool=1 << 28, pass_peak=1 << 20)

    def configs(self, spec: ModelSpec) -> dict[str, dict[str, Any]]:
        return {"transformer": {"_class_name": "WanTransformer3DModel"}}

    def media_tenants(self, spec: ModelSpec) -> tuple[TenantSpec, ...]:
        return (
            TenantSpec(
                id=f"{spec.id}.all", model=spec.id, size_bytes=4 << 30, floor_bytes=4 << 30,
                host_copy=True, back_s=0.5,
            ),
        )  # fmt: skip

    def media_phases(
        self, spec: ModelSpec, shape: Shape, *, steps: int, images: int, exactness: str
    ) -> tuple[PhaseWays, ...]:
        rungs = self._rungs(spec, 2 + shape.text_pieces, steps)
        return tuple(
            PhaseWays(name=name, ways=rungs, model=spec.id, pixels=shape.pixels, work=steps)
            for name in ("encode", "denoise", "decode")
        )

    def media_batch(
        self, spec: ModelSpec, shape: Shape, *, steps: int, pictures: int, exactness: str
    ) -> PhaseWays:
        return PhaseWays(name="denoise", ways=self._rungs(spec, 2 + pictures, steps))

    def _rungs(self, spec: ModelSpec, gib: int, steps: int) -> tuple[Way, ...]:
        parts = {"all": PartBytes(whole=4 << 30, streamed=1 << 30)}
        return ways(spec.id, parts, {"whole": gib << 30}, passes=steps)


class FakeTokenizers:
    """A word is a token."""

    def of(self, spec: ModelSpec) -> tuple[Reader, ...]:
        return (Reader("words", lambda text: len(text.split()) + 2, 77),)

"""`orchestrator.py plan`: what jobs take on the device, before anything is started.

It plays the broker's own decisions through on an empty ledger of the device's size, with the
profile's chat models loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from worker.catalog import ModelSpec, chat_catalog, media_catalog, preload_ids
from worker.config import Settings
from worker.errors import OutOfRange, Unsupported
from worker.jobs.types import JOB_TYPES, MIN_SIDE, SIZE_STEP, SPELLINGS, JobType
from worker.protocol.messages import Acquire, Declare, PhasePlan, PhaseWays, TenantSpec, Way
from worker.supervisor.budget import ENGINES, Budget
from worker.supervisor.check import gib
from worker.vram.broker import Broker
from worker.vram.dryrun import dry_run
from worker.vram.phases import Shape
from worker.vram.planner import Sizer
from worker.vram.sizes import Peaks

CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks about; None: the type's or the model's own."""

    job: str | None = None
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    images: int | None = None
    exactness: str | None = None  # the least that will do


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One row of answers."""

    job: str
    model: str
    shape: str
    phases: tuple[PhasePlan, ...]

    @property
    def fits(self) -> bool:
        return all(phase.refused is None for phase in self.phases)


class Planner:
    """Plans of one profile. It measures what it does not know, which takes seconds."""

    def __init__(self, settings: Settings, budget: Budget, peaks: Peaks | None = None):
        """Raises ConfigError, and ModelUnavailable for a model of whose sizes nothing is known."""
        self._settings = settings
        self._chat, self._media = chat_catalog(settings), media_catalog(settings)
        self._budget = budget
        self._device = "cpu" if budget.process_bytes == 0 else "cuda"
        self.sizer = Sizer(
            peaks or Peaks(settings.state_dir), self._device,
            kv_bytes=settings.chat.kv_bytes, max_running=settings.chat.max_running,
        )  # fmt: skip

    def ask(self, asked: Asked) -> list[PlannedJob]:
        """Raises Unsupported or OutOfRange, with what would do, for a job that is not taken."""
        sized = (asked.size, asked.frames, asked.images) != (None, None, None)
        if asked.job in (None, CHAT) and sized:
            raise Unsupported("a size or a number needs --job with a type that has them")
        jobs = [asked.job] if asked.job else [CHAT, *self._kinds_served()]
        made = [self._resolved(job, asked) for job in jobs]
        return [self._planned(*one, asked) for one in made]

    # --- what is asked -------------------------------------------------------------------------

    def _kinds_served(self) -> list[str]:
        served = {spec.kind for spec in self._media.specs}
        return [
            name
            for name, kind in (
                ("sdxl_image_high", "sdxl"), ("image_high", "wan"), ("video_high", "wan")
            )
            if kind in served
        ]  # fmt: skip

    def _resolved(self, job: str, asked: Asked) -> tuple[str, ModelSpec, Shape | None]:
        if job == CHAT:
            return job, self._chat.default("chat"), None
        name = SPELLINGS.get(job, job)
        if name not in JOB_TYPES:
            known = ", ".join([CHAT, *JOB_TYPES, *SPELLINGS])
            raise Unsupported(f"there is no job type {job}; known: {known}")
        kind: JobType = JOB_TYPES[name]
        spec = self._media.default(kind.kind)
        width, height = asked.size or spec.default_size
        self._check(spec, width, height)
        frames = 1
        if kind.output != "video" and asked.frames is not None:
            raise Unsupported(f"{name} makes a picture; it has no number of frames")
        most = self._settings.limits.images if kind.kind == "sdxl" else 1
        if asked.images is not None and not 1 <= asked.images <= most:
            raise OutOfRange(f"images {asked.images}: {name} makes 1 to {most}")
        if kind.output == "video":
            frames = spec.default_frames if asked.frames is None else asked.frames
            if (frames - 1) % 4 or not 1 <= frames <= self._settings.limits.frames:
                raise OutOfRange(
                    f"frames {frames}: a video has 4n+1 of them, "
                    f"at most {self._settings.limits.frames}"
                )
        return name, spec, Shape(width, height, frames, guided=kind.guidance_scale > 1)

    def _check(self, spec: ModelSpec, width: int, height: int) -> None:
        step, least = SIZE_STEP[spec.kind], MIN_SIDE[spec.kind]
        limits = self._settings.limits
        most = limits.image_pixels if spec.kind == "sdxl" else limits.video_pixels
        if width % step or height % step or min(width, height) < least:
            raise OutOfRange(
                f"size {width}x{height}: both sides are multiples of {step} from {least} on"
            )
        if width * height > most:
            raise OutOfRange(f"size {width}x{height}: more than the profile's {most} pixels")

    # --- what comes of it ----------------------------------------------------------------------

    def _planned(self, job: str, spec: ModelSpec, shape: Shape | None, asked: Asked) -> PlannedJob:
        if shape is None:
            holder, tenants = ENGINES[0], self._chat_tenants(spec)
            way = Way(name="whole", tenants=tuple(one.id for one in tenants), peak_bytes=0)
            phases: Sequence[PhaseWays] = [PhaseWays(name="answer", ways=(way,))]
        else:
            holder, tenants = ENGINES[1], self.sizer.media_tenants(spec)
            phases = self.sizer.media_phases(
                spec, shape, steps=JOB_TYPES[job].steps,
                images=asked.images or 1,
                exactness=asked.exactness or self._settings.media.exactness,
            )  # fmt: skip
        made = dry_run(self._at_start(), holder, tenants, phases, 0.0)
        return PlannedJob(job, spec.id, _shape_text(shape, asked.images), tuple(made))

    def _at_start(self) -> Broker:
        """The ledger once the chat models of the profile are loaded."""
        broker = Broker(self._budget.total_bytes)
        epochs = {name: broker.join(name, self._budget.process_bytes) for name in ENGINES}
        loaded = preload_ids(self._chat, self._settings.chat.preload)
        for number, spec in enumerate(self._chat.specs, 1):
            tenants = self._chat_tenants(spec)
            take = partial(broker.take, ENGINES[0], now=0.0)
            take(message=Declare(epoch=epochs[ENGINES[0]], model=spec.id, tenants=tenants))
            if spec.id in loaded:
                way = Way(name="whole", tenants=tuple(one.id for one in tenants), peak_bytes=0)
                take(
                    message=Acquire(
                        epoch=epochs[ENGINES[0]], number=number, request_id="start", phase=CHAT,
                        ways=(way,), standing=True,
                    )
                )  # fmt: skip
        broker.finish_all()
        return broker

    def _chat_tenants(self, spec: ModelSpec) -> tuple[TenantSpec, ...]:
        return self.sizer.chat(spec).tenants(spec, host_copy=self._device != "cpu")


def show(planner: Planner, asked: Asked, budget: Budget, console: Console) -> bool:
    """Print the plans. False when one does not fit."""
    with console.status("measuring what is not known yet"):
        rows = planner.ask(asked)
    less = (
        f", less {gib(budget.contexts_bytes)} that two processes take for themselves (assumed)"
        if budget.contexts_bytes
        else ""
    )
    console.print(f"{budget.name}: {gib(budget.total_bytes)}{less}", soft_wrap=True)
    table = Table()
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for row in rows:
        for index, phase in enumerate(row.phases):
            job = (f"{row.job} {row.shape}", row.model, "")[min(index, 2)]
            table.add_row(job, *_cells(phase), end_section=index == len(row.phases) - 1)
    console.print(table)
    for row in rows:
        if not row.fits:
            name = f"{row.job} {row.shape}".strip()
            console.print(
                f"{name} does not fit: {row.phases[-1].refused}. A smaller size, fewer frames, a "
                "smaller [chat] kv_bytes, --exactness close or a larger card would do.",
                markup=False,
                soft_wrap=True,
            )
    return all(row.fits for row in rows)


_COLUMNS = ("job", "phase", "way", "parts", "pass", "left free", "what moves", "extra s", "result")
_NUMBERS = ("parts", "pass", "left free", "extra s")


def _cells(phase: PhasePlan) -> tuple[str, ...]:
    if phase.refused is not None:
        return phase.name, phase.way, "", gib(phase.peak_bytes), "", "", "", "does not fit"
    moves = [f"{one['move']} {one['tenant']} {gib(one['bytes'])}" for one in phase.moves]
    return (
        phase.name,
        phase.way,
        gib(phase.tenants_bytes),
        gib(phase.peak_bytes),
        gib(phase.free_bytes),
        "\n".join(moves) or "nothing",
        f"{phase.seconds:.2f}",
        phase.exactness,
    )


def _shape_text(shape: Shape | None, images: int | None) -> str:
    if shape is None:
        return ""
    frames = f"x{shape.frames}" if shape.frames > 1 else ""
    count = f", {images} images" if images else ""
    return f"{shape.width}x{shape.height}{frames}{count}"

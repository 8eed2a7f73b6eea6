"""`orchestrator.py plan`: what jobs take on the device, before anything is started.

It plays the broker's own decisions through on an empty ledger of the device's size, with the
profile's chat models loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from worker.catalog import ModelSpec, chat_catalog, media_catalog, preload_ids
from worker.config import Settings
from worker.errors import Unsupported
from worker.jobs.decode import decode_job
from worker.jobs.types import JOB_TYPES, SPELLINGS
from worker.protocol.messages import Acquire, Declare, PhasePlan, RenderParams, TenantSpec
from worker.supervisor.budget import ENGINES, Budget
from worker.supervisor.check import gib
from worker.vram.broker import Broker
from worker.vram.dryrun import dry_run
from worker.vram.jobplan import JobPlanner
from worker.vram.phases import Adapters
from worker.vram.planner import HOST_PHASE, Sizer, chat_phase
from worker.vram.sizes import Peaks
from worker.vram.tokenizers import Tokenizers

CHAT = "chat"
_PICTURE = "https://picture.invalid/"  # nobody opens it
# What a picture can be for, by what is made with it: as a client asks for it.
REFERENCES: dict[str, dict[str, dict[str, Any]]] = {
    "image": {
        "image": {"reference_image_url": _PICTURE},
        "copy": {"reference_image_url": _PICTURE, "exact_copy_mode": True},
        "style": {"reference_image_url": _PICTURE, "reference_type": "style"},
        "character": {"reference_image_url": _PICTURE, "reference_type": "character"},
    },
    "video": {
        "image": {"image": _PICTURE},
        "first": {"first_frame": _PICTURE},
        "last": {"last_frame": _PICTURE},
        "both": {"first_frame": _PICTURE, "last_frame": _PICTURE},
    },
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks about; None: the type's or the model's own."""

    job: str | None = None
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None
    images: int | None = None
    exactness: str | None = None  # the least that will do
    reference: str | None = None  # what a picture is for, a key of REFERENCES
    loras: tuple[str, ...] = ()  # ids
    jobs: int | None = None  # that share a batch


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One row of answers."""

    job: str
    model: str
    shape: str
    phases: tuple[PhasePlan, ...]
    brings: str = ""  # beside the model's own parts

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
        self._sizer = Sizer(
            peaks or Peaks(settings.state_dir), self._device,
            kv_bytes=settings.chat.kv_bytes, max_running=settings.chat.max_running,
        )  # fmt: skip
        self._jobs = JobPlanner(
            self._sizer, Tokenizers(settings.state_dir),
            long_prompts=settings.media.long_prompts, most_pictures=settings.limits.images,
        )  # fmt: skip

    def ask(self, asked: Asked) -> list[PlannedJob]:
        """Raises what such a job is refused with, and Unsupported for what it has no use for."""
        if asked.job in (None, CHAT):
            if asked != Asked(job=asked.job, exactness=asked.exactness):
                raise Unsupported("all but --exactness needs --job with a type of images or videos")
            jobs = [CHAT] if asked.job else [CHAT, *self._kinds_served()]
        else:
            jobs = [str(asked.job)]
        return [self._of_chat() if job == CHAT else self._of_job(job, asked) for job in jobs]

    def _kinds_served(self) -> list[str]:
        served = {spec.kind for spec in self._media.specs}
        return [
            name
            for name, kind in (
                ("sdxl_image_high", "sdxl"), ("image_high", "wan"), ("video_high", "wan")
            )
            if kind in served
        ]  # fmt: skip

    def _of_chat(self) -> PlannedJob:
        spec = self._chat.default("chat")
        made = dry_run(
            self._at_start(), ENGINES[0], self._chat_tenants(spec), [chat_phase(spec.id)], 0.0
        )
        return PlannedJob(CHAT, spec.id, "", tuple(made))

    def _of_job(self, name: str, asked: Asked) -> PlannedJob:
        if SPELLINGS.get(name, name) not in JOB_TYPES:
            known = ", ".join([CHAT, *JOB_TYPES, *SPELLINGS])
            raise Unsupported(f"there is no job type {name}; known: {known}")
        job = decode_job(
            _body(name, asked), self._media, self._settings.limits, self._settings.media.exactness
        )
        if job.ignored:
            raise Unsupported(f"{job.type} has no use for {', '.join(job.ignored)}")
        spec = self._media.find(job.model)
        jobs = 1 if asked.jobs is None else asked.jobs
        adapters = self._jobs.adapters(spec, job.params)
        made = dry_run(
            self._at_start(), ENGINES[1], self._jobs.tenants(spec),
            self._jobs.phases(spec, job.params, job.exactness, jobs), 0.0,
        )  # fmt: skip
        return PlannedJob(
            job.type, spec.id, _shape_text(job.params, jobs),
            tuple(one for one in made if one.name != HOST_PHASE), _brings(adapters),
        )  # fmt: skip

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
                phase = chat_phase(spec.id)
                take(
                    message=Acquire(
                        epoch=epochs[ENGINES[0]], number=number, request_id="start",
                        phase=phase.name, ways=phase.ways, standing=True,
                    )
                )  # fmt: skip
        broker.finish_all()
        return broker

    def _chat_tenants(self, spec: ModelSpec) -> tuple[TenantSpec, ...]:
        return self._sizer.chat(spec).tenants(spec, host_copy=self._device != "cpu")


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
            job = (f"{row.job} {row.shape}", row.model, row.brings, "")[min(index, 3)]
            table.add_row(job, *_cells(phase, row.model), end_section=index == len(row.phases) - 1)
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
_NUMBERS = ("pass", "left free", "extra s")


def _cells(phase: PhasePlan, model: str) -> tuple[str, ...]:
    if phase.refused is not None:
        return phase.name, phase.way, "", gib(phase.peak_bytes), "", "", "", "does not fit"
    moves = [f"{one['move']} {one['tenant']} {gib(one['bytes'])}" for one in phase.moves]
    names = [one.removeprefix(f"{model}.") for one in phase.tenants]
    return (
        phase.name,
        phase.way,
        " + ".join(names) + f" {gib(phase.tenants_bytes)}" if names else "none",
        gib(phase.peak_bytes),
        gib(phase.free_bytes),
        "\n".join(moves) or "nothing",
        f"{phase.seconds:.2f}",
        phase.exactness,
    )


def _body(name: str, asked: Asked) -> dict[str, Any]:
    """As a client would send it. Without a text, so that no file of a model need be there."""
    body: dict[str, Any] = {"type": name, "prompt": ""}
    if asked.size is not None:
        body |= {"width": asked.size[0], "height": asked.size[1]}
    if asked.reference is not None:
        kind = JOB_TYPES[SPELLINGS.get(name, name)].output
        choices = REFERENCES[kind]
        if asked.reference not in choices:
            raise Unsupported(
                f"{name} takes no reference {asked.reference}; an {kind} takes one of "
                f"{', '.join(choices)}"
            )
        body |= choices[asked.reference]
    numbers = {"frames": asked.frames, "num_images": asked.images, "exactness": asked.exactness}
    loras = [{"id": one} for one in asked.loras]
    return (
        body
        | {key: value for key, value in numbers.items() if value is not None}
        | ({"loras": loras} if loras else {})
    )


def _shape_text(params: RenderParams, jobs: int) -> str:
    frames = f"x{params.frames}" if params.frames > 1 else ""
    count = f", {params.num_images} images" if params.num_images > 1 else ""
    batch = f", {jobs} jobs in a batch" if jobs > 1 else ""
    mode = f", {params.mode}" if params.mode != "text" else ""
    return f"{params.width}x{params.height}{frames}{count}{mode}{batch}"


def _brings(adapters: Adapters) -> str:
    """In words, with bytes; they lie beside the parts and are counted to the pass."""
    both = {"denoiser": adapters.denoiser_bytes, "encoders": adapters.encoder_bytes}
    named = [f"{gib(size)} for the {part}" for part, size in both.items() if size]
    return f"brings {', '.join(named)}" if named else ""

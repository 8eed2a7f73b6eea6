"""`orchestrator.py plan`: what jobs take on the device, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from worker.catalog import ModelSpec, chat_catalog, media_catalog, preload_ids
from worker.config import Settings
from worker.errors import ConfigError, OutOfRange, Unsupported
from worker.jobs.types import JOB_TYPES, MIN_SIDE, SIZE_STEP, SPELLINGS, JobType
from worker.supervisor.check import gib
from worker.vram.peak import Peak, Question
from worker.vram.phases import (
    Configs,
    Phase,
    Shape,
    chat_phases,
    image_phases,
    video_phases,
)
from worker.vram.plan import Need, Plan, Tenant, plan
from worker.vram.probe import Card, host_memory
from worker.vram.sizes import Peaks, content_key, part_configs

# Of CUDA in each process, before the first tensor. Assumed, not measured on this machine; published
# figures lie between 0.3 and 0.5 GiB.
CONTEXT_BYTES = 2 * (410 << 20)
CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks about; None: the type's or the model's own."""

    job: str | None = None
    size: tuple[int, int] | None = None  # width, height in pixels
    frames: int | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """Device memory to plan with."""

    name: str
    total_bytes: int
    contexts_bytes: int

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.contexts_bytes


@dataclass(frozen=True, slots=True)
class Planned:
    """One row of answers."""

    job: str
    model: str
    shape: str
    plan: Plan


class Planner:
    """Plans of one profile. It measures what it does not know, which takes seconds."""

    def __init__(self, settings: Settings, budget: Budget):
        """Raises ConfigError, and ModelUnavailable for a model of whose sizes nothing is known."""
        self._settings = settings
        chat, media = chat_catalog(settings), media_catalog(settings)
        self._chat, self._media = chat, media
        self._budget = budget
        self._device = "cpu" if budget.contexts_bytes == 0 else "cuda"
        self._peaks = Peaks(settings.state_dir)
        self._configs: dict[str, Configs] = {
            spec.id: part_configs(spec) for spec in (*chat.specs, *media.specs)
        }
        self._answers: dict[str, Peak] = {}

    def ask(self, asked: Asked) -> list[Planned]:
        """Raises Unsupported or OutOfRange, with what would do, for a job that is not taken."""
        if asked.job in (None, CHAT) and (asked.size or asked.frames is not None):
            raise Unsupported("a size or a number of frames needs --job with a type that has them")
        jobs = [asked.job] if asked.job else [CHAT, *self._kinds_served()]
        made = [self._resolved(job, asked) for job in jobs]
        phases = {job: self._phases(spec, shape) for job, spec, shape in made}
        self._measure([phase for several in phases.values() for phase in several])
        return [
            Planned(job, spec.id, _shape_text(shape), self._plan(spec, phases[job]))
            for job, spec, shape in made
        ]

    def weights(self, spec: ModelSpec) -> int:
        """Bytes of a model once it is loaded."""
        total = sum(self._answer(one).weight_bytes for one in self._parts(spec))
        if spec.kind == CHAT and self._device == "cpu":
            # Packed layers (worker/engine/chat/linear.py): a tied output layer is a copy. In
            # bfloat16 only some processors pack; counted for all.
            config = self._configs[spec.id]["weights"]
            if config.get("tie_word_embeddings"):
                width = {"float32": 4, "bfloat16": 2}.get(spec.dtype, 0)
                total += int(config["vocab_size"]) * int(config["hidden_size"]) * width
        return total

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

    # --- bytes ---------------------------------------------------------------------------------

    def _phases(self, spec: ModelSpec, shape: Shape | None) -> list[Phase]:
        configs = self._configs[spec.id]
        if spec.kind == CHAT:
            rows = self._settings.chat.max_running
            return chat_phases(configs["weights"], spec.dtype, self._device, rows)
        assert shape is not None
        make = image_phases if spec.kind == "sdxl" else video_phases
        return make(configs, spec.dtype, shape)

    def _parts(self, spec: ModelSpec) -> list[Question]:
        """A cheap question for each part of a model: its weights do not depend on the shape."""
        if spec.kind == CHAT:
            return [self._phases(spec, None)[-1].passes[0]]
        phases = self._phases(spec, Shape(64, 64))
        return [
            phase.converted[0] if phase.converted else one
            for phase in phases
            for one in phase.passes
        ]

    def _measure(self, phases: Sequence[Phase]) -> None:
        """Find what is needed of these phases, of every model's weights and of chat's passes."""
        chat = [phase for spec in self._chat.specs for phase in self._phases(spec, None)]
        questions = [
            *(one for phase in (*phases, *chat) for one in phase.passes),
            *(one for phase in phases for one in phase.converted or ()),
            *(one for spec in (*self._chat.specs, *self._media.specs) for one in self._parts(spec)),
        ]
        keys = [content_key(one) for one in questions]
        self._answers |= zip(keys, self._peaks.ask(questions), strict=True)

    def _answer(self, question: Question) -> Peak:
        return self._answers[content_key(question)]

    def _peak(self, phase: Phase) -> int:
        peak = max(self._answer(one).peak_bytes for one in phase.passes)
        if phase.converted:
            before, after = (self._answer(one).weight_bytes for one in phase.converted)
            peak += max(0, after - before)
        return peak

    def _plan(self, spec: ModelSpec, phases: Sequence[Phase]) -> Plan:
        needs = [Need(phase.name, self._peak(phase)) for phase in phases]
        return plan(needs, self._tenants(spec), self._budget.usable_bytes)

    def _tenants(self, own: ModelSpec) -> list[Tenant]:
        """All that is resident while `own` works."""
        settings = self._settings
        chats = {*preload_ids(self._chat, settings.chat.preload)}
        medias = [*preload_ids(self._media, settings.media.preload)]
        if own.kind == CHAT:
            chats.add(own.id)
        else:  # the least recently used go when a new one comes
            others = [one for one in medias if one != own.id]
            medias = [own.id, *others[: settings.media.max_resident - 1]]
        tenants = []
        for spec in self._chat.specs:
            if spec.id in chats:
                tenants.append(Tenant("weights", spec.id, self.weights(spec), movable=False))
                tenants.append(Tenant("keys and values", spec.id, settings.chat.kv_bytes, False))
        if own.kind != CHAT and chats:
            # Chat goes on beside a job.
            busiest = max(
                self._peak(phase)
                for spec in self._chat.specs
                if spec.id in chats
                for phase in self._phases(spec, None)
            )
            tenants.append(Tenant("a chat pass", CHAT, busiest, movable=False))
        for spec in self._media.specs:
            if spec.id in medias:
                movable = spec.id != own.id
                tenants.append(Tenant("weights", spec.id, self.weights(spec), movable))
        return tenants


def budget_of(settings: Settings, card: Card | None, memory_bytes: int | None) -> Budget:
    """What to plan with: the memory named, else the card, else the container's memory.

    Raises ConfigError for a profile that wants a card, on a machine without one.
    """
    wants = settings.daemon.device
    if memory_bytes is not None:
        on_card = wants != "cpu"
        return Budget("a device", memory_bytes, CONTEXT_BYTES if on_card else 0)
    if card is not None and wants != "cpu":
        return Budget(card.name, card.total_bytes, CONTEXT_BYTES)
    if wants == "cuda":
        raise ConfigError(
            'the profile has device "cuda" and this machine no NVIDIA card; '
            "--memory 24GiB plans for one of that size"
        )
    return Budget("the CPU", host_memory().total_bytes, 0)


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
    for name in ("job", "phase", "resident", "pass", "together", "", ""):
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for row in rows:
        for index, phase in enumerate(row.plan.phases):
            verdict = f"short of {gib(phase.short_bytes)}" if phase.short_bytes else "fits"
            job = (f"{row.job} {row.shape}", row.model, "")[min(index, 2)]
            table.add_row(
                job,
                phase.name,
                gib(phase.tenants_bytes),
                gib(phase.peak_bytes),
                gib(phase.total_bytes),
                verdict,
                row.plan.exactness,
                end_section=index == len(row.plan.phases) - 1,
            )
    console.print(table)
    for row in rows:
        name = f"{row.job} {row.shape}".strip()
        if not row.plan.fits:
            console.print(
                f"{name} does not fit: {gib(row.plan.short_bytes)} are missing, with everything "
                "unloaded that may go. A smaller size, fewer frames, a smaller [chat] kv_bytes or "
                "a larger card would do.",
                markup=False,
                soft_wrap=True,
            )
        elif row.plan.unload:
            console.print(
                f"{name} fits once {', '.join(row.plan.unload)} is unloaded: POST /memory/unload, "
                "or a smaller [media] max_resident.",
                markup=False,
                soft_wrap=True,
            )
    return all(row.plan.fits for row in rows)


_NUMBERS = ("resident", "pass", "together")


def _shape_text(shape: Shape | None) -> str:
    if shape is None:
        return ""
    frames = f"x{shape.frames}" if shape.frames > 1 else ""
    return f"{shape.width}x{shape.height}{frames}"

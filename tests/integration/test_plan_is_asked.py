"""What a plan says before anything is loaded is what the engine asks for when it does the job:
every phase, every way of it, every byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.adapters import with_adapters, write_ip_adapter, write_lora
from tests.integration.test_residency import Outbox
from tests.sdxl_jobs import drawn, params, reference
from tests.unit.test_wan_loading import _plain, _with_vace
from tests.unit.test_wan_loading import folder as folder  # a fixture: a VACE checkpoint
from worker.catalog import AdapterSpec, Catalog, ModelSpec, media_catalog
from worker.config import load_settings
from worker.engine.host import Ticket
from worker.engine.leases import Leases, alone
from worker.engine.media.engine import MediaEngine
from worker.engine.peaks import measure
from worker.engine.tokenizers import exported
from worker.errors import ModelUnavailable, OutOfRange, PromptTooLong, Unsupported, WorkerError
from worker.protocol.messages import (
    Acquire,
    Declare,
    Failed,
    JobRendered,
    LoraUse,
    Message,
    PhaseWays,
    Reference,
    RenderJob,
    RenderParams,
    Took,
    WeightedTerm,
)
from worker.vram.jobplan import JobPlanner
from worker.vram.planner import Sizer
from worker.vram.sizes import Peaks
from worker.vram.tokenizers import Tokenizers
from worker.vram.ways import EXACTNESS

LONG = "a red circle beside a blue square, " * 12  # of two pieces
MOST_PICTURES = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured, for all tests of this file."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("adapters")
    return with_adapters(
        media_catalog(load_settings("demo", {})).default("sdxl"),
        write_lora(folder / "kohya.safetensors", alphas=(2.0,)),
        write_lora(folder / "peft.safetensors", "peft", rank=8, seed=1),
        write_ip_adapter(folder / "ip", "plus"),
    )


class Engine:
    """A media engine on a CPU of its own, and what it asked its broker for."""

    def __init__(self, spec: ModelSpec, state: Path):
        self.spec = spec
        self.said: list[Message] = []
        self._state = state
        self._outbox = Outbox()
        leases = alone(1 << 34)
        self._listen(leases)
        self._engine = MediaEngine(
            Catalog([spec]), (), 1, torch.device("cpu"), state, self._outbox, leases, _peaks(state)
        )
        self._outbox.engine = self._engine

    def _listen(self, leases: Leases) -> None:
        send = leases.send

        def heard(message: Message) -> None:
            self.said.append(message)
            send(message)

        leases.send = heard

    def ends(
        self,
        jobs: Sequence[RenderParams],
        references: Sequence[Reference] = (),
        exactness: str = "bit",
    ) -> list[Message]:
        """Of one job, or of several that share a batch. The engine keeps what it has read of a
        text, so that each job needs texts of its own."""
        self.said.clear()
        self._outbox.sent.clear()
        self._outbox.waits = 0
        names = [f"job{number}" for number in range(len(jobs))]
        for name, job in zip(names, jobs, strict=True):
            message = RenderJob(
                request_id=name, model=self.spec.id, params=job, exactness=exactness,
                output="video" if job.frames > 1 else "image",
                staging_dir=str(self._state / name), references=tuple(references),
                companions=tuple(names[1:]) if name == names[0] else (),
            )  # fmt: skip
            self._engine.submit(Ticket(b"peer", name), message)  # type: ignore[arg-type]
        while self._engine.step():
            pass
        return [one for one in self._outbox.sent if isinstance(one, JobRendered | Failed)]

    def asks(self, jobs: Sequence[RenderParams], *args: Any, **more: Any) -> list[PhaseWays]:
        """What was asked for, for jobs that were done."""
        ends = self.ends(jobs, *args, **more)
        assert [type(one) for one in ends] == [JobRendered] * len(jobs), ends
        return [
            PhaseWays(
                name=one.phase, ways=one.ways, model=one.model, pixels=one.pixels, work=one.work
            )
            for one in self.said
            if isinstance(one, Acquire) and one.phase != "ahead"
        ]


@pytest.fixture(scope="module")
def engine(image: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(image, tmp_path_factory.mktemp("engine"))


def _peaks(state: Path) -> Peaks:
    return Peaks(state, lambda questions: [measure(one) for one in questions])


def planner(state: Path, long_prompts: str = "chunk") -> JobPlanner:
    return JobPlanner(
        Sizer(_peaks(state), "cpu", kv_bytes=0, max_running=1),
        Tokenizers(state, exported),
        long_prompts=long_prompts,
        most_pictures=MOST_PICTURES,
    )


def changed(job: RenderParams, **changes: Any) -> RenderParams:
    return msgspec.structs.replace(job, **changes)


def of_the_device(phases: Sequence[PhaseWays]) -> list[PhaseWays]:
    return [one for one in phases if one.ways]


def using(*ids: str, **more: Any) -> RenderParams:
    return params(loras=tuple(LoraUse(one, 0.7) for one in ids), **more)


IMAGES = {
    "text": params(),
    "no guidance": params(guidance_scale=1.0),
    "three images": params(num_images=3, width=96),
    "a long prompt": params(prompt=LONG),
    "a long negative prompt": params(negative_prompt=LONG),
    "a long negative prompt that is not read": params(
        negative_prompt=LONG, guidance_scale=1.0, steps=2
    ),
    "weighted terms": params(weighted=(WeightedTerm("red", 1.3), WeightedTerm(LONG, 0.4))),
    "image": params(mode="image", strength=0.7),
    "copy": params(prompt="", negative_prompt=None, guidance_scale=1.0, mode="copy",
                   strength=0.05, steps=6),
    "copy of all": params(prompt="", negative_prompt=None, guidance_scale=1.0, mode="copy",
                          strength=0.0, steps=6),
    "style": params(mode="style", strength=0.6),
    "character": params(mode="character", strength=0.6, guidance_scale=1.0),
    "one LoRA": using("kohya"),
    "two LoRAs": using("kohya", "peft", num_images=2),
    "a LoRA of weight 0": params(loras=(LoraUse("peft", 0.0),)),
    "a LoRA and a picture that is read": using("peft", mode="style", strength=0.5),
    "a LoRA, an image and a long prompt": using("kohya", mode="image", strength=0.6, prompt=LONG),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_job_asks_for_what_was_planned(
    name: str, engine: Engine, state: Path, tmp_path: Path
) -> None:
    exactness = EXACTNESS[list(IMAGES).index(name) % len(EXACTNESS)]
    job, sent = IMAGES[name], []
    if job.prompt:
        job = changed(job, prompt=f"{name}: {job.prompt}")
    if job.mode != "text":
        drawn(tmp_path / "disc.png")
        sent = [reference(tmp_path / "disc.png")]

    planned = planner(state).phases(engine.spec, job, exactness)

    assert engine.asks([job], sent, exactness) == of_the_device(planned)


def test_each_thing_that_a_job_brings_is_in_its_plan(image: ModelSpec, state: Path) -> None:
    """So that the test above does not compare nothing with nothing."""
    plans = planner(state)

    def denoise(job: RenderParams) -> PhaseWays:
        return next(one for one in plans.phases(image, job, "bit") if one.name == "denoise")

    plain = denoise(params()).ways[0].peak_bytes
    for name in ("a long prompt", "style", "one LoRA"):
        assert denoise(IMAGES[name]).ways[0].peak_bytes > plain, name
    assert denoise(IMAGES["two LoRAs"]).ways[0].peak_bytes > (
        denoise(IMAGES["one LoRA"]).ways[0].peak_bytes
    )
    assert denoise(IMAGES["a LoRA of weight 0"]).ways[0].peak_bytes == plain


@pytest.mark.parametrize("images", [1, 2])
def test_jobs_that_share_a_batch_ask_for_what_was_planned(
    images: int, engine: Engine, state: Path
) -> None:
    prompts = [f"{images} {number} {LONG}" for number in range(3)]
    jobs = [params(num_images=images, prompt=prompt) for prompt in prompts]

    planned = planner(state).phases(engine.spec, jobs[0], "close", jobs=3)

    assert engine.asks(jobs, exactness="close") == of_the_device(planned)
    assert [one.name for one in planned] == ["encode"] * 3 + ["denoise"] + ["decode"] * 3
    assert {one.exactness for one in planned[3].ways} == {"close"}


@pytest.mark.parametrize("mode", ["text", "single", "start", "end", "both"])
@pytest.mark.parametrize("kind", ["a VACE checkpoint", "VACE beside text to video"])
def test_a_video_asks_for_what_was_planned(
    kind: str, mode: str, folder: Path, state: Path, tmp_path: Path
) -> None:
    spec = _with_vace(_plain(folder, tmp_path), folder)
    if kind == "a VACE checkpoint":
        spec = replace(spec, path=folder, adapters=())
    drawn(tmp_path / "disc.png")
    roles = {"single": ["image"], "start": ["first"], "end": ["last"], "both": ["first", "last"]}
    sent = [reference(tmp_path / "disc.png", role) for role in roles.get(mode, [])]
    job = params(width=48, height=32, frames=9, steps=2, mode=mode, shift=5.0, scheduler="unipc")
    engine = Engine(spec, tmp_path)

    plans = planner(state)
    planned = plans.phases(spec, job, "bit")

    assert engine.asks([job], sent) == of_the_device(planned)
    [declared] = [one for one in engine.said if isinstance(one, Declare)]
    assert declared.tenants == plans.tenants(spec)


def test_an_image_of_a_video_model_asks_for_what_was_planned(folder: Path, state: Path) -> None:
    spec = _with_vace(folder, folder)
    spec = replace(spec, adapters=())
    job = params(width=48, height=32, steps=2, shift=5.0, scheduler="unipc", guidance_scale=1.0)

    planned = planner(state).phases(spec, job, "close")

    assert Engine(spec, state / "image").asks([job], exactness="close") == of_the_device(planned)


def test_the_parts_of_an_image_model_are_those_that_are_declared(
    image: ModelSpec, state: Path, tmp_path: Path
) -> None:
    engine = Engine(image, tmp_path)
    engine.asks([params(steps=1)])

    [declared] = [one for one in engine.said if isinstance(one, Declare)]
    assert declared.tenants == planner(state).tenants(image)
    # Its model was loaded for it, which says nothing of the next job.
    assert not any(isinstance(one, Took) for one in engine.said)


def test_what_is_done_beside_the_device_is_told_with_the_numbers_of_its_plan(
    engine: Engine, state: Path
) -> None:
    engine.asks([params(steps=1, prompt="loaded")])
    job = params(steps=1, num_images=2, prompt="a file for each")

    engine.asks([job])

    [*_, planned] = planner(state).phases(engine.spec, job, "bit")
    [told] = [one for one in engine.said if isinstance(one, Took)]
    assert (told.model, told.phase, told.pixels, told.work) == (
        planned.model, planned.name, planned.pixels, planned.work
    )  # fmt: skip
    assert told.seconds > 0


# --- what is refused ------------------------------------------------------------------------------


def test_a_job_is_refused_by_its_plan_as_by_its_engine(
    image: ModelSpec, folder: Path, state: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    broken = AdapterSpec("broken", "lora", damaged, None)
    cases: list[tuple[ModelSpec, RenderParams, type[WorkerError]]] = [
        (image, params(prompt="red " * 2000), PromptTooLong),
        (image, params(negative_prompt="red " * 2000, guidance_scale=1.0), PromptTooLong),
        (image, using("unknown"), Unsupported),
        (with_adapters(image), params(mode="style", strength=0.5), Unsupported),
        (with_adapters(image, broken), using("broken"), ModelUnavailable),
    ]
    plain = replace(_with_vace(_plain(folder, tmp_path), folder), adapters=())
    video = params(width=48, height=32, frames=9, steps=2, shift=5.0, scheduler="unipc")
    cases += [
        (plain, changed(video, mode="start"), Unsupported),
        (plain, changed(video, prompt="red " * 600), PromptTooLong),
        (replace(plain, path=folder), changed(video, mode="both", frames=1), Unsupported),
    ]
    for spec, job, error in cases:
        drawn(tmp_path / "disc.png")
        sent = [] if job.mode == "text" else [reference(tmp_path / "disc.png")]
        [end] = Engine(spec, tmp_path / "engine").ends([job], sent)
        with pytest.raises(error) as planned:
            planner(state).phases(spec, job, "bit")
        assert isinstance(end, Failed)
        assert (end.code, end.error) == (error.code, str(planned.value))


def test_a_profile_that_refuses_long_prompts_plans_none(image: ModelSpec, state: Path) -> None:
    with pytest.raises(PromptTooLong, match="takes 75"):
        planner(state, "refuse").phases(image, params(prompt=LONG), "bit")


def test_jobs_that_share_no_batch_are_not_planned_as_one(image: ModelSpec, state: Path) -> None:
    plans = planner(state)
    with pytest.raises(Unsupported, match="exactness allows close"):
        plans.phases(image, params(), "bit", jobs=2)
    with pytest.raises(Unsupported, match="pictures or LoRAs"):
        plans.phases(image, using("peft"), "close", jobs=2)
    with pytest.raises(OutOfRange, match="8 pictures; a batch has at most 6"):
        plans.phases(image, params(num_images=2), "close", jobs=4)

"""The lower rungs of the ladder on the demo models: what they change in a picture, what the receipt
says of it, and that nothing of it is left for the next job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.adapters import with_adapters, write_ip_adapter, write_lora
from tests.integration.test_residency import IMAGE, MIB, VIDEO, Bench, hashes, steps
from tests.rendering import load, psnr
from tests.sdxl_jobs import drawn, reference
from worker.catalog import ModelSpec, media_catalog
from worker.config import load_settings
from worker.engine.casting import cast_layers, rounded
from worker.engine.leases import ALONE, Leases, Question
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache
from worker.protocol.messages import (
    Failed,
    Hello,
    JobRendered,
    LoraUse,
    Message,
    RenderParams,
    Way,
)
from worker.vram.broker import Broker
from worker.vram.ways import EXACTNESS, RELUCTANCE_S, SPLITS

ROOMY = 1 << 34
# Seconds that a lossy way has to save in `short`: it comes behind those that take more bytes then.
RELUCTANCE = {"demo-image": 1000.0, "demo-video": 0.5}
DENOISERS = {"demo-image": "unet", "demo-video": "transformer"}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these small models slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def a_slow_bus() -> Iterator[None]:
    """So that streaming these small models costs more than what a busy machine measures of bringing
    them, as it does with large ones."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("worker.vram.ways.HOST_BANDWIDTH", 2e7)
        yield


def changed(params: RenderParams, **changes: Any) -> RenderParams:
    return msgspec.structs.replace(params, **changes)


class Ladder(Bench):
    """A media engine whose memory can be taken by somebody else, or run out by itself."""

    def __init__(self, state_dir: Path, budget: int = ROOMY):
        self.broker = Broker(budget)
        leases = Leases(self._send)
        super().__init__(state_dir, leases)
        leases.take(Hello(peer=ALONE, epoch=self.broker.join(ALONE, 0)))
        self.engine.checkpoint_every_s = 0.0
        self.tried: list[str] = []  # ways of the denoising, as they were granted

    def _send(self, message: Message) -> None:
        for _, order in self.broker.take(ALONE, message, self.leases.clock()):
            self.leases.take(order)

    def render(self, model: str, name: str = "job", **more: Any) -> Message:
        """The last message of one job, after which the ledger has what is there."""
        reply = super().render(model, name, **more)
        self.broker.check()
        for one in self.engine._models.loaded():
            for tenant in one.parts._tenants:
                assert self.broker.ledger.held(tenant) == one.parts.held_bytes(tenant), tenant
        return reply

    def model(self, model: str = "demo-image") -> Any:
        return self.engine._models.ensure(model)

    @contextmanager
    def left(self, size_bytes: int) -> Iterator[None]:
        """Within it there is no more than this for jobs, and at its beginning nothing is there."""
        way = Way(name="whole", tenants=(), peak_bytes=ROOMY - size_bytes)
        taken = self.leases.ask("somebody else", "x", [way])
        assert taken.granted is not None
        try:
            yield
        finally:
            self.leases.release(taken)

    @contextmanager
    def short(
        self,
        enough: Callable[[str], bool],
        model: str = "demo-image",
        reluctance_s: float | None = None,
    ) -> Iterator[None]:
        """Within it the denoiser runs out of memory in every way that is not `enough`, of which the
        first ones are tried first."""
        parts = self.model(model).parts
        ready, self.tried = parts.ready, []
        kept = RELUCTANCE_S["lossy"]
        RELUCTANCE_S["lossy"] = RELUCTANCE[model] if reluctance_s is None else reluctance_s

        @contextmanager
        def short_of_memory(lease: Question, names: Any) -> Iterator[None]:
            with ready(lease, names):
                if lease.asked.phase == "denoise":
                    self.tried.append(lease.way.name)
                    if not enough(lease.way.name):
                        raise torch.OutOfMemoryError("injected")
                yield

        parts.ready = short_of_memory
        try:
            yield
        finally:
            parts.ready = ready
            RELUCTANCE_S["lossy"] = kept

    def in_way(self, way: str, model: str = "demo-image", name: str = "job", **more: Any) -> Any:
        """A job whose denoising runs out of memory in every other way."""
        with self.short(lambda one: one == way, model):
            return self.done(model, name, **{"exactness": "lossy", **more})

    def pixels(self, done: JobRendered) -> npt.NDArray[np.uint8]:
        folder = self.state_dir / done.request_id
        return np.stack([np.asarray(Image.open(folder / one.file)) for one in done.assets])


@pytest.fixture(scope="module")
def one_ladder(tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    return Ladder(tmp_path_factory.mktemp("ladder"))


@pytest.fixture
def ladder(one_ladder: Ladder) -> Ladder:
    one_ladder.outbox.sent.clear()
    one_ladder.outbox.waits = 0
    return one_ladder


@pytest.fixture(scope="module")
def whole(one_ladder: Ladder) -> dict[str, JobRendered]:
    """Each case with everything resident."""
    cases = {"demo-image": IMAGE, "demo-video": VIDEO}
    return {
        model: one_ladder.done(model, f"whole-{model}", params=params)
        for model, params in cases.items()
    }


def denoised(done: JobRendered) -> dict[str, Any]:
    [found] = [one for one in done.receipt["plan"] if one["phase"] == "denoise"]
    return dict(found)


# --- which rung -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "allowed", "ways"),
    [
        ("demo-image", "bit", ["whole", "streamed"]),
        ("demo-image", "close", ["whole", "split", "streamed", "streamed+split"]),
        (
            "demo-image", "lossy",
            ["whole", "split", "streamed", "streamed+split", "quantised"],
        ),
        ("demo-video", "close", ["whole", "streamed"]),
        ("demo-video", "lossy", ["whole", "quantised", "streamed"]),
    ],
)  # fmt: skip
def test_out_of_memory_climbs_through_all_ways_that_are_allowed_and_through_no_other(
    model: str, allowed: str, ways: list[str], ladder: Ladder
) -> None:
    with ladder.short(lambda way: False, model):
        failed = ladder.render(model, "none", exactness=allowed)

    assert isinstance(failed, Failed)
    assert failed.code == "out_of_device_memory"
    assert ladder.tried == ways


def test_a_picture_for_which_only_halves_have_room_is_made_so_where_it_may_be(
    tmp_path: Path,
) -> None:
    """512 x 512: 27 MiB streamed, 22 in halves, 16 streamed in halves, 25 in eight bits."""
    params = changed(IMAGE, width=512, height=512, steps=1, num_images=1)
    tight = Ladder(tmp_path, 24 * MIB)

    done = {
        allowed: tight.render("demo-image", f"halves-{allowed}", params=params, exactness=allowed)
        for allowed in EXACTNESS
    }

    refused, *made = done.values()
    assert isinstance(refused, Failed)
    assert "denoise (streamed) needs" in refused.error
    for one in made:
        assert isinstance(one, JobRendered)
        assert denoised(one)["way"] in SPLITS
        assert one.receipt["exactness"] == "close"


@pytest.mark.parametrize(("left_mib", "way"), [(5, "quantised"), (5.8, "streamed")])
def test_eight_bits_are_a_fallback_for_what_does_not_fit_exactly(
    left_mib: float, way: str, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming it takes less than the seconds that a lossy way has to save."""
    monkeypatch.setattr("worker.vram.ways.HOST_BANDWIDTH", 2e9)
    with ladder.left(int(left_mib * MIB)):
        done = ladder.done("demo-image", f"fallback-{way}", exactness="lossy")
        held = ladder.held

    assert steps(done)["denoise"] == way
    assert held <= left_mib * MIB


# --- split ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "euler_a", "unipc"])
@pytest.mark.parametrize("side", [64, 128])
def test_halves_are_close_to_the_whole_and_streaming_them_changes_no_bit(
    scheduler: str, side: int, ladder: Ladder
) -> None:
    params = changed(IMAGE, scheduler=scheduler, width=side, height=side)
    whole = ladder.done("demo-image", "whole", params=params)
    split = ladder.in_way("split", name="split", params=params, exactness="close")
    streamed = ladder.in_way("streamed+split", name="both", params=params, exactness="close")

    apart = np.abs(ladder.pixels(split).astype(int) - ladder.pixels(whole))
    assert apart.max() <= 1  # a value that lies between two may go to either
    assert (apart > 0).mean() < 0.001
    assert hashes(streamed) == hashes(split)
    assert denoised(split) == {
        "phase": "denoise", "way": "split", "exactness": "close", "out_of_memory": 1
    }  # fmt: skip
    assert (split.receipt["exactness"], whole.receipt["exactness"]) == ("close", "bit")


def test_without_guidance_nothing_is_split(ladder: Ladder) -> None:
    params = changed(IMAGE, guidance_scale=1.0)
    with ladder.short(lambda way: way == "streamed"):
        ladder.done("demo-image", "unguided", params=params, exactness="close")
    assert ladder.tried == ["whole", "streamed"]


def test_the_denoiser_computes_one_text_at_a_time_and_both_again_afterwards(
    ladder: Ladder,
) -> None:
    rows: list[int] = []
    unet = ladder.model()._pipeline.unet
    hook = unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))

    ladder.in_way("split", params=changed(IMAGE, num_images=1, steps=2), exactness="close")
    ladder.done("demo-image", params=changed(IMAGE, num_images=1, steps=2))

    hook.remove()
    assert rows == [1, 1, 1, 1, 2, 2]
    assert "forward" not in vars(unet)


# --- eight bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", DENOISERS)
def test_eight_bits_are_said_and_a_later_job_has_the_exact_bytes_again(
    model: str, ladder: Ladder, whole: dict[str, JobRendered]
) -> None:
    denoiser = DENOISERS[model]
    lossy = ladder.in_way("quantised", model, "lossy")

    told = denoised(lossy)
    assert (told["way"], told["exactness"]) == ("quantised", "lossy")
    assert told["quantised"] == {denoiser: "float8_e4m3fn"}
    assert lossy.receipt["exactness"] == "lossy"
    assert hashes(lossy) != hashes(whole[model])
    # What is there is the lossy form, and as much of it as was granted.
    parts = ladder.model(model).parts
    assert parts[denoiser].is_cast
    assert parts.held_bytes(f"{model}.{denoiser}.float8") == parts[denoiser].bytes.cast
    assert parts.held_bytes(f"{model}.{denoiser}") == 0

    exact = ladder.done(model, "exact")
    again = ladder.in_way("quantised", model, "again")

    assert hashes(exact) == hashes(whole[model])
    assert (exact.receipt["exactness"], denoised(exact)["way"]) == ("bit", "whole")
    assert hashes(again) == hashes(lossy)
    if model == "demo-image":
        assert psnr(ladder.pixels(lossy), ladder.pixels(whole[model])) > 30


def test_a_job_that_needs_every_bit_never_finds_a_rounded_denoiser(ladder: Ladder) -> None:
    """Right behind a lossy one, streamed and whole."""
    for number, way in enumerate(("streamed", "whole", "streamed")):
        ladder.in_way("quantised", name=f"lossy-{number}")
        done = ladder.in_way(way, name=f"bit-{number}", exactness="bit")
        expected = ladder.done("demo-image", f"expected-{number}")
        assert hashes(done) == hashes(expected)
        assert done.receipt["exactness"] == "bit"


class ByHand:
    """The demo image model twice: cast as the engine casts it, and with its weights rounded for
    good in their own type."""

    def __init__(self, folder: Path, *adapters: Any):
        spec = media_catalog(load_settings("demo", {})).default("sdxl")
        spec = with_adapters(spec, *adapters) if adapters else spec
        self.cast, self.rounded = load(spec, folder), load(spec, folder)
        self._folder = folder
        unet = self.rounded.parts["unet"]
        for layer in cast_layers(unet.module).values():
            for weight in layer.parameters(recurse=False):
                weight.data.copy_(rounded(weight.data).to(weight.dtype))

    def latents(
        self, model: Any, params: RenderParams, *references: Any, cast: bool
    ) -> torch.Tensor:
        given = model.given(params, references)
        with ExitStack() as stack:
            for name in ("text_encoder", "text_encoder_2"):
                model.parts[name].wake()
                stack.callback(model.parts[name].park)
            texts = model.encode(params, EmbeddingCache(self._folder / "texts"), given=given)
        unet = model.parts["unet"]
        unet.wake(cast=cast)
        try:
            course = Course(params.seed, lambda *_: None)
            made: torch.Tensor = model.denoise(params, texts, course, given=given)
        finally:
            unet.park()
        return made


def test_eight_bits_with_loras_are_the_rounded_weights_with_the_same_loras(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "a.safetensors", "kohya")
    both = ByHand(tmp_path, lora)
    params = changed(IMAGE, loras=(LoraUse(id=lora.id, weight=0.7),), num_images=1)

    found = both.latents(both.cast, params, cast=True)

    assert torch.equal(found, both.latents(both.rounded, params, cast=False))
    plain = both.latents(both.cast, changed(params, loras=()), cast=True)
    assert not torch.equal(found, plain)
    assert torch.equal(plain, both.latents(both.rounded, changed(params, loras=()), cast=False))


def test_eight_bits_with_an_ip_adapter_are_the_rounded_weights_with_an_exact_one(
    tmp_path: Path,
) -> None:
    adapter = write_ip_adapter(tmp_path / "adapter")
    both = ByHand(tmp_path, adapter)
    drawn(tmp_path / "picture.png")
    sent = reference(tmp_path / "picture.png")
    params = changed(IMAGE, mode="character", strength=0.8, num_images=1)

    found = both.latents(both.cast, params, sent, cast=True)

    assert torch.equal(found, both.latents(both.rounded, params, sent, cast=False))


def apart_db(spec: ModelSpec, params: RenderParams, folder: Path) -> float:
    """PSNR of what is made in eight bits, against what is made exactly."""
    model = load(spec, folder)
    made = []
    for cast in (False, True):
        with ExitStack() as stack:
            for part in model.parts:
                part.wake(cast=cast and part.name == DENOISERS[spec.id])
                stack.callback(part.park)
            texts = model.encode(params, EmbeddingCache(folder / "texts"))
            latents = model.denoise(params, texts, Course(params.seed, lambda *_: None))
            made.append(np.asarray(model.decode(latents)))
    return psnr(*made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_picture_in_eight_bits_is_the_same_picture(dtype: str, tmp_path: Path) -> None:
    """Prints how close it is (pytest -rP)."""
    spec = replace(media_catalog(load_settings("demo", {})).default("sdxl"), dtype=dtype)
    found = []
    for prompt in ("a red circle", "a small green triangle on the left"):
        params = changed(
            IMAGE, prompt=prompt, negative_prompt=None, width=128, height=128, steps=15
        )  # fmt: skip
        found.append(apart_db(spec, params, tmp_path))
    print(f"{dtype}: " + ", ".join(f"{one:.1f} dB" for one in found))
    assert min(found) > 33


def test_a_video_in_eight_bits_is_the_same_film(tmp_path: Path) -> None:
    """Prints how close it is (pytest -rP)."""
    spec = media_catalog(load_settings("demo", {})).default("wan")
    params = changed(VIDEO, width=96, height=96, frames=17, steps=12, guidance_scale=6.5)
    found = apart_db(spec, params, tmp_path)
    print(f"{found:.1f} dB")
    assert found > 28


def test_what_lies_in_eight_bits_stays_so_while_it_computes_and_leaves_when_it_is_asked(
    ladder: Ladder,
) -> None:
    """The next job is of the same model and would have its exact weights brought ahead."""
    expected = ladder.in_way("quantised", name="expected")
    done = ladder.in_way("quantised", name="ahead", next_model="demo-image")
    assert hashes(done) == hashes(expected)
    assert ladder.model().parts["unet"].is_cast
    assert ladder.held > 0

    everything = ladder.leases.ask("probe", "x", [Way(name="whole", tenants=(), peak_bytes=ROOMY)])

    assert everything.granted is not None
    assert ladder.held == 0
    ladder.leases.release(everything)


@pytest.mark.parametrize("way", ["split", "streamed+split", "quantised"])
def test_a_denoising_that_is_paused_goes_on_in_its_way_with_the_same_bytes(
    way: str, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = changed(IMAGE, num_images=1, scheduler="euler_a")
    whole = ladder.in_way(way, name="unpaused", params=params)
    unet, seen = ladder.model()._pipeline.unet, []
    leases: list[Question] = []
    ask = type(ladder.leases).ask

    def watched(self: Any, *args: Any, **more: Any) -> Question:
        leases.append(ask(self, *args, **more))
        return leases[-1]

    def pause() -> None:
        seen.append(1)
        if len(seen) == 2:
            leases[-1].wanted_back = True

    monkeypatch.setattr(type(ladder.leases), "ask", watched)
    monkeypatch.setattr(ladder.outbox, "poll", pause)
    # What is wanted ahead asks, too, and would be the last to have asked.
    monkeypatch.setattr(ladder.engine._renderer._ahead, "bring", lambda: None)

    done = ladder.in_way(way, name="paused", params=params)

    assert hashes(done) == hashes(whole)
    assert denoised(done)["paused"] == 1
    assert "ways" not in denoised(done)
    assert "forward" not in vars(unet)


# --- what was made in more than one way -----------------------------------------------------------


def test_a_job_that_ends_in_another_way_says_in_which_it_was_made(ladder: Ladder) -> None:
    """The second picture runs out of memory in eight bits."""
    params = changed(IMAGE, width=256, height=256, steps=1)
    model = ladder.model()
    denoise, made = model.denoise, []

    def once(*args: Any, **more: Any) -> Any:
        made.append(ladder.tried[-1])
        if made == ["quantised", "quantised"]:
            raise torch.OutOfMemoryError("injected")
        return denoise(*args, **more)

    model.denoise = once
    try:
        with ladder.short(lambda way: way in ("quantised", "streamed+split"), reluctance_s=1.5):
            done = ladder.done("demo-image", "two-ways", params=params, exactness="lossy")
    finally:
        del model.denoise

    assert made == ["quantised", "quantised", "streamed+split"]
    assert denoised(done) == {
        "phase": "denoise", "way": "streamed+split", "exactness": "lossy",
        "ways": ["quantised", "streamed+split"], "quantised": {"unet": "float8_e4m3fn"},
        "out_of_memory": 4,
    }  # fmt: skip
    assert done.receipt["exactness"] == "lossy"


def test_a_way_that_made_nothing_is_not_said(ladder: Ladder) -> None:
    done = ladder.in_way("streamed", exactness="lossy")
    assert denoised(done) == {
        "phase": "denoise", "way": "streamed", "exactness": "bit", "out_of_memory": 2
    }  # fmt: skip


def test_a_job_that_was_paused_in_eight_bits_and_goes_on_exactly_is_lossy(
    ladder: Ladder, whole: dict[str, JobRendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = changed(IMAGE, num_images=1)
    leases: list[Question] = []
    ask, seen = type(ladder.leases).ask, []
    squeeze = ExitStack()

    def watched(self: Any, *args: Any, **more: Any) -> Question:
        leases.append(ask(self, *args, **more))
        return leases[-1]

    def pause() -> None:
        seen.append(1)
        if len(seen) == 2:
            [denoise] = [one for one in leases if one.asked.phase == "denoise"]
            denoise.wanted_back = True
            squeeze.close()

    with squeeze:
        squeeze.enter_context(ladder.left(5 * MIB))
        monkeypatch.setattr(type(ladder.leases), "ask", watched)
        monkeypatch.setattr(ladder.outbox, "poll", pause)
        done = ladder.done("demo-image", "paused", params=params, exactness="lossy")

    told = denoised(done)
    assert (told["way"], told["exactness"], told["paused"]) == ("whole", "lossy", 1)
    assert told["ways"] == ["quantised", "whole"]
    assert told["quantised"] == {"unet": "float8_e4m3fn"}
    assert hashes(done)[0] != hashes(whole["demo-image"])[0]


def test_a_job_that_goes_on_from_a_lossy_checkpoint_is_lossy_and_a_stricter_one_begins_anew(
    ladder: Ladder, tmp_path: Path
) -> None:
    params, file = changed(IMAGE, num_images=1, steps=4), tmp_path / "checkpoint"
    more = {"params": params, "checkpoint": str(file)}
    expected = ladder.done("demo-image", "expected", params=params)
    seen: list[int] = []

    def crash() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("a crash")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ladder.outbox, "poll", crash)
        with ladder.short(lambda way: way == "quantised"):
            ended = ladder.render("demo-image", "crashed", exactness="lossy", **more)
    assert isinstance(ended, Failed)
    content = file.read_bytes()

    resumed = ladder.done("demo-image", "resumed", exactness="lossy", **more)
    file.write_bytes(content)
    strict = ladder.done("demo-image", "strict", exactness="bit", **more)

    assert resumed.receipt["resumed_from"] == 2
    assert (denoised(resumed)["exactness"], denoised(resumed)["way"]) == ("lossy", "whole")
    assert denoised(resumed)["ways"] == ["quantised", "whole"]
    assert resumed.receipt["exactness"] == "lossy"
    assert (strict.receipt["resumed_from"], strict.receipt["checkpoint"]) == (
        0, "refused: of another job"
    )  # fmt: skip
    assert hashes(strict) == hashes(expected)
    assert strict.receipt["exactness"] == "bit"


def test_what_has_been_denoised_in_eight_bits_is_lossy_after_a_crash_in_its_decode(
    ladder: Ladder, tmp_path: Path
) -> None:
    params, file = changed(IMAGE, num_images=1), tmp_path / "checkpoint"
    more = {"params": params, "checkpoint": str(file)}
    first = ladder.in_way("quantised", name="first", **more)

    again = ladder.done("demo-image", "again", exactness="lossy", **more)

    assert hashes(again) == hashes(first)
    assert again.receipt["exactness"] == "lossy"
    assert denoised(again)["quantised"] == {"unet": "float8_e4m3fn"}

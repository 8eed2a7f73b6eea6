"""Plans: what fits, what must go, and how much is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.adapters import write_ip_adapter, write_lora
from worker.catalog import media_catalog
from worker.config import REPOSITORY, AdapterEntry, load_settings
from worker.errors import WorkerError
from worker.protocol.messages import (
    Acquire,
    Declare,
    Granted,
    PhaseWays,
    Release,
    TenantSpec,
    Took,
    Way,
)
from worker.supervisor.budget import Budget
from worker.supervisor.planning import Asked, PlannedJob, Planner
from worker.vram.adapters import adapter_size, lora_size
from worker.vram.broker import Broker
from worker.vram.dryrun import dry_run
from worker.vram.pace import Paces
from worker.vram.peak import Peak, Question
from worker.vram.phases import Phase, Shape, image_phases, video_phases
from worker.vram.planner import batch_ways, phase_ways
from worker.vram.sizes import Peaks
from worker.vram.ways import PartBytes

GIB = 1 << 30
SMALL = Peak(weight_bytes=100, parked_bytes=128, streamed_bytes=64, peak_bytes=1000)


def spec(name: str, size: int, **more: Any) -> TenantSpec:
    return TenantSpec(
        **{
            "id": name, "model": name.split(".")[0], "size_bytes": size, "floor_bytes": size,
            "host_copy": True, "back_s": size / GIB, **more,
        }
    )  # fmt: skip


def resident(broker: Broker, holder: str, *tenants: TenantSpec) -> None:
    """These tenants are on the device, idle."""
    epoch = broker.join(holder, 0)
    for one in tenants:
        broker.take(holder, Declare(epoch=epoch, model=one.model, tenants=(one,)), 0.0)
        way = Way(name="whole", tenants=(one.id,), peak_bytes=0)
        ask = Acquire(epoch=epoch, number=1, request_id="r", phase="p", ways=(way,), standing=True)
        [(_, granted)] = broker.take(holder, ask, 0.0)
        assert isinstance(granted, Granted)
    broker.finish_all()


def phase(name: str, peak: int, *tenants: str, **more: Any) -> PhaseWays:
    way = Way(name="whole", tenants=tenants, peak_bytes=peak)
    return PhaseWays(name=name, ways=(way,), **more)


def test_a_plan_says_what_moves_and_what_is_left_and_moves_nothing() -> None:
    broker = Broker(10 * GIB)
    resident(broker, "chat", spec("chat.weights", 6 * GIB), spec("other.weights", 3 * GIB))
    own = spec("image.unet", 3 * GIB)

    [made] = dry_run(broker, "media", [own], [phase("denoise", GIB, "image.unet")], 0.0)

    assert made.refused is None
    assert made.tenants_bytes == 3 * GIB
    assert made.free_bytes == 0
    assert [(one["move"], one["tenant"]) for one in made.moves] == [
        ("park", "other.weights"), ("bring", "image.unet")
    ]  # fmt: skip
    assert made.seconds == 3.0
    assert broker.ledger.held("other.weights") == 3 * GIB
    assert broker.ledger.free_bytes == GIB
    assert broker.explain("plan") is None


def test_a_phase_finds_what_the_one_before_it_has_left_behind() -> None:
    broker = Broker(10 * GIB)
    resident(broker, "chat", spec("chat.weights", 6 * GIB, pinned=True))
    tenants = [spec("image.unet", 3 * GIB), spec("image.vae", GIB)]
    phases = [
        phase("denoise", GIB, "image.unet"), phase("decode", 3 * GIB, "image.vae"),
        phase("decode", 3 * GIB, "image.vae"),
    ]  # fmt: skip

    made = dry_run(broker, "media", tenants, phases, 0.0)

    assert [[one["move"] for one in each.moves] for each in made] == [
        ["bring"], ["park", "bring"], []
    ]  # fmt: skip


def test_a_plan_ends_with_the_phase_that_is_refused_and_says_the_numbers() -> None:
    broker = Broker(10 * GIB)
    resident(broker, "chat", spec("chat.weights", 6 * GIB, pinned=True))
    phases = [
        phase("encode", GIB), phase("decode", 5 * GIB), phase("save", 0)
    ]  # fmt: skip

    made = dry_run(broker, "media", [], phases, 0.0)

    assert [one.refused is None for one in made] == [True, False]
    assert "needs 5.00 GiB more, and 4.00 GiB of 10.00 GiB are reachable" in str(made[1].refused)
    assert "pinned: chat.weights" in str(made[1].refused)


def test_what_runs_now_is_taken_to_have_ended() -> None:
    broker = Broker(4 * GIB)
    epoch = broker.join("media", 0)
    way = Way(name="whole", tenants=(), peak_bytes=4 * GIB)
    broker.take(
        "media", Acquire(epoch=epoch, number=1, request_id="r", phase="p", ways=(way,)), 0.0
    )

    [made] = dry_run(broker, "media", [], [phase("decode", 3 * GIB)], 0.0)

    assert made.refused is None
    assert broker.ledger.free_bytes == 0


def test_seconds_are_told_from_what_was_seen_with_an_interval() -> None:
    paces = Paces()
    assert paces.estimate("m", "denoise", 100, 10) is None
    paces.learn("m", "denoise", 100, 10, 20.0)
    assert paces.estimate("m", "denoise", 100, 3) == (4, 9)
    paces.learn("m", "denoise", 100, 10, 30.0)
    assert paces.estimate("m", "denoise", 100, 5) == (10.0 / 1.25, 15.0 * 1.25)
    assert paces.estimate("m", "decode", 100, 1) is None


def test_seconds_of_a_size_that_was_not_seen_lie_between_those_that_were() -> None:
    paces = Paces()
    paces.learn("m", "denoise", 100, 1, 2.0)
    # No quicker than the smaller one, and no more than the square of the pixels slower.
    assert paces.estimate("m", "denoise", 300, 1) == (2 / 1.5, 18 * 1.5)
    paces.learn("m", "denoise", 400, 1, 10.0)
    assert paces.estimate("m", "denoise", 300, 1) == (10 * (3 / 4) ** 2 / 1.25, 10 * 1.25)
    assert paces.estimate("m", "denoise", 50, 1) == (2 / 4 / 1.25, 2 * 1.25)
    # One that was slowed by others, so that the two contradict each other.
    paces.learn("m", "decode", 400, 1, 1.0)
    paces.learn("m", "decode", 100, 1, 9.0)
    assert paces.estimate("m", "decode", 200, 1) == (1 / 1.25, 9 * 1.25)


def test_each_way_of_a_phase_has_a_pace_of_its_own() -> None:
    paces = Paces()
    paces.learn("m", "encode", 1, 2, 6.0)
    assert paces.estimate("m", "encode", 1, 1, "streamed") == (2, 4.5)  # as whole
    paces.learn("m", "encode", 1, 2, 4.0, "streamed")
    assert paces.estimate("m", "encode", 1, 1, "streamed") == (2 / 1.5, 3)
    assert paces.estimate("m", "encode", 1, 1) == (2, 4.5)


def test_a_phase_that_ran_streamed_is_known_without_what_streaming_adds() -> None:
    """Where a model never runs whole, its jobs have an interval all the same."""
    broker = Broker(4 * GIB)
    epoch = broker.join("media", 0)
    own = spec("video.text", 5 * GIB)
    broker.take("media", Declare(epoch=epoch, model="video", tenants=(own,)), 0.0)
    ways = (
        Way(name="whole", tenants=("video.text",), peak_bytes=0),
        Way(name="streamed", tenants=(), peak_bytes=GIB, longer_s=2.0),
    )
    about = {"model": "video", "pixels": 1, "work": 1}
    asked = Acquire(epoch=epoch, number=1, request_id="r", phase="encode", ways=ways, **about)
    [(_, granted)] = broker.take("media", asked, 0.0)
    assert isinstance(granted, Granted)
    broker.take("media", Release(epoch=epoch, fence=granted.fence), 5.0)

    phases = [PhaseWays(name="encode", ways=ways, **about)]
    [made] = dry_run(broker, "media", [own], phases, 6.0)

    assert (made.way, made.seconds, made.work_s) == ("streamed", 2.0, (2, 4.5))


def test_what_is_done_beside_the_device_takes_seconds_and_no_bytes() -> None:
    broker = Broker(GIB)
    epoch = broker.join("media", 0)
    took = Took(epoch=epoch, model="m", phase="host", pixels=100, work=2, seconds=4.0)
    assert broker.take("media", took, 0.0) == []
    broker.take("media", msgspec.structs.replace(took, epoch=epoch - 1, seconds=99.0), 0.0)

    phases = [PhaseWays(name="host", ways=(), model="m", pixels=100, work=1)]
    [made] = dry_run(broker, "media", [], phases, 0.0)

    assert (made.way, made.peak_bytes, made.free_bytes) == ("host", 0, GIB)
    assert made.work_s == (2 / 1.5, 3)


def test_sdxl_in_half_precision_decodes_in_float32_unless_its_vae_is_a_fixed_one() -> None:
    configs = {part: {} for part in ("text_encoder", "text_encoder_2", "unet")}
    for says, dtype in (({"force_upcast": True}, "float32"), ({"force_upcast": False}, "float16")):
        decode = image_phases({**configs, "vae": says}, "float16", Shape(64, 64))[-1]
        assert decode.passes[0].dtype == dtype
        assert (decode.converted is None) == (dtype == "float16")


def test_without_guidance_one_text_is_denoised() -> None:
    configs = {part: {} for part in ("text_encoder", "text_encoder_2", "unet", "vae")}
    for guided, batch in ((True, 2), (False, 1)):
        phases = image_phases(configs, "bfloat16", Shape(64, 64, guided=guided))
        assert phases[1].passes[0].batch == batch


def test_a_batch_is_planned_with_the_peak_of_all_its_pictures(tmp_path: Path) -> None:
    asked: list[Question] = []

    def measured(questions: Sequence[Question]) -> list[Peak]:
        asked.extend(questions)
        return [Peak(0, 0, 0, 10 * one.batch) for one in questions]

    configs: Any = {part: {} for part in ("text_encoder", "text_encoder_2", "vae")}
    configs["unet"] = {"cross_attention_dim": 8}
    [_, denoise, _] = image_phases(configs, "bfloat16", Shape(64, 64))
    spec = media_catalog(load_settings("demo", {})).default("sdxl")
    parts = {"unet": PartBytes(whole=100, streamed=20)}

    made = batch_ways(
        spec, denoise, parts, Peaks(tmp_path, measured), steps=4, pictures=3, exactness="close"
    )

    assert {one.batch for one in asked} == {6}
    beside = 3 * denoise.beside_bytes
    assert [(one.name, one.peak_bytes, one.exactness) for one in made.ways] == [
        ("whole", 60 + beside, "close"), ("streamed", 60 + beside + 20, "close"),
    ]  # fmt: skip
    # The weights come once for all pictures, and no pace is learned from it.
    assert (made.work, made.pixels) == (4, 0)


def test_wans_vae_stays_in_float32() -> None:
    configs = {part: {} for part in ("text_encoder", "transformer", "vae")}
    phases = video_phases(configs, "bfloat16", Shape(64, 64, 17))
    assert [phase.passes[0].dtype for phase in phases] == ["bfloat16", "bfloat16", "float32"]


# --- with measuring -------------------------------------------------------------------------------


def test_answers_are_kept_by_content_and_a_damaged_file_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "umt5", "architectures": ["UMT5EncoderModel"], "vocab_size": 30,
              "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4,
              "feed_forward_proj": "gated-gelu"}  # fmt: skip
    asked = Question(part="umt5", config=config, dtype="bfloat16")
    [first] = Peaks(tmp_path).ask([asked])
    assert first.weight_bytes > 0 < first.peak_bytes
    with monkeypatch.context() as patched:
        patched.setattr("worker.vram.sizes.subprocess.run", None)  # nothing may be measured now
        assert Peaks(tmp_path).ask([asked]) == [first]
    (tmp_path / "peaks.json").write_text('{"cut sho')
    assert Peaks(tmp_path).ask([asked]) == [first]


def test_a_part_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    config = {"model_type": "umt5", "architectures": ["UMT5EncoderModel"], "num_layers": "many"}
    with pytest.raises(WorkerError, match="umt5 could not be measured"):
        Peaks(tmp_path).ask([Question(part="umt5", config=config, dtype="bfloat16")])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that all plans of these tests share, so that each is measured once."""
    return tmp_path_factory.mktemp("state")


def command(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "orchestrator.py", "plan", *args],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "VERBATIM_STATE_DIR": str(state), "COLUMNS": "190"},
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_the_demo_profile_is_planned_before_anything_is_started(known: Path) -> None:
    done = command(known, "--profile", "demo")
    assert done.returncode == 0, done.stderr
    for word in ("weights + kv", "unet", "sdxl_image_high 128x128", "video_high 96x96x17", "bit"):
        assert word in done.stdout
    done = command(known, "--profile", "demo", "--memory", "20MiB")
    assert done.returncode == 7
    assert "chat does not fit: chat (whole) needs" in done.stdout


@pytest.mark.timeout(300)
def test_a_budget_for_which_chat_is_too_large_moves_it_for_a_large_picture(known: Path) -> None:
    size = ("--job", "image", "--size", "512x512", "--images", "2", "--exactness", "bit")
    done = command(known, "--profile", "demo", "--memory", "200MiB", *size)
    assert done.returncode == 0, done.stdout
    assert "512x512, 2 images" in done.stdout
    assert "shrink demo-chat.kv" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--job", "poem"), "there is no job type poem"),
        (("--job", "sdxl_image_fast", "--size", "100x128"), "multiples of 8"),
        (("--job", "video_fast", "--frames", "18"), "4n + 1"),
        (("--job", "video_fast", "--size", "1024x1024"), "allowed: at most 65536"),
        (("--size", "large"), "not WIDTHxHEIGHT"),
        (("--size", "128x128"), "needs --job"),
        (("--job", "chat", "--frames", "5"), "needs --job"),
        (("--job", "image_fast", "--frames", "5"), "has no use for frames"),
        (("--job", "video_fast", "--frames", "0"), "4n + 1"),
        (("--job", "video_fast", "--images", "2"), "num_images is 2; allowed: 1"),
        (("--reference", "first"), "needs --job"),
        (("--job", "video_fast", "--reference", "sketch"), "'style', 'character', 'first'"),
        (("--job", "video_fast", "--reference", "style"), "one of image, first, last, both"),
        (("--job", "image", "--reference", "last"), "one of image, copy, style, character"),
        (("--job", "image_fast", "--reference", "image"), "no use for reference_image_url"),
        (("--job", "image", "--reference", "style"), "needs an ip_adapter"),
        (("--job", "image", "--lora", "x"), "has no LoRA"),
        (("--job", "video_fast", "--lora", "x"), "has no LoRA"),
        (("--job", "image", "--jobs", "0"), "at least 1"),
        (("--job", "image", "--jobs", "9"), "a batch has at most 6"),
        (("--job", "image", "--jobs", "2", "--exactness", "bit"), "exactness allows close"),
        (("--job", "video_fast", "--jobs", "2"), "share no batch"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_can(
    known: Path, args: tuple[str, ...], says: str
) -> None:
    done = command(known, "--profile", "demo", *args)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


def test_pictures_loras_and_batches_can_be_asked_about(tmp_path: Path) -> None:
    settings = load_settings("demo", {"VERBATIM_STATE_DIR": str(tmp_path)})
    lora = write_lora(tmp_path / "mine.safetensors", rank=8)
    reads = write_ip_adapter(tmp_path / "ip")
    files = {"lora": lora.path, "ip_adapter": reads.path}
    settings = settings.model_copy(
        update={
            "adapters": tuple(
                AdapterEntry(
                    id=kind, kind=kind, model="demo-image", path=str(path),
                    image_encoder=str(reads.image_encoder) if kind == "ip_adapter" else None,
                )
                for kind, path in files.items()
            )
        }
    )  # fmt: skip
    planner = Planner(
        settings, Budget("a device", 1 << 30, 0), Peaks(tmp_path, lambda q: [SMALL] * len(q))
    )

    def plan(**more: Any) -> PlannedJob:
        [made] = planner.ask(Asked(**{"job": "image", **more}))
        return made

    plain = plan().phases[1].peak_bytes
    held = lora_size(lora)
    with_lora = plan(loras=("lora",))
    assert with_lora.phases[1].peak_bytes - plain == 4 * held.denoiser
    assert with_lora.brings.startswith("brings ")
    reading = plan(reference="style")
    assert reading.phases[1].peak_bytes - plain == 4 * adapter_size(reads).numbers
    assert [one.name for one in plan(reference="image").phases] == [
        "picture", "encode", "denoise", "decode"
    ]  # fmt: skip
    assert "copy" in plan(reference="copy").shape
    batch = plan(jobs=3, exactness="close")
    assert [one.name for one in batch.phases] == ["encode"] * 3 + ["denoise"] + ["decode"] * 3
    for reference in ("image", "first", "last", "both"):
        [film] = planner.ask(Asked(job="video", reference=reference))
        assert [one.name for one in film.phases] == ["encode", "denoise", "decode"]
        assert len(film.phases[1].tenants) == 2


def test_a_picture_without_guidance_is_as_quick_as_half_of_one_with(tmp_path: Path) -> None:
    spec = media_catalog(load_settings("demo", {})).default("sdxl")
    phase = Phase("denoise", ("unet",), (Question(part="unet", config={}, dtype="float32"),))
    parts = {"unet": PartBytes(whole=128, streamed=64)}

    def pixels(**shape: Any) -> int:
        made = phase_ways(
            spec, phase, parts, Peaks(tmp_path, lambda q: [SMALL] * len(q)),
            Shape(64, **shape), steps=1, images=1, exactness="bit",
        )  # fmt: skip
        return made.pixels

    assert pixels(height=64, guided=False) == pixels(height=32, guided=True)

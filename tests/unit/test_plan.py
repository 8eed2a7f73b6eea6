"""Plans: what fits, what must go, and how much is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.config import REPOSITORY, load_settings
from worker.errors import WorkerError
from worker.supervisor.planning import Budget, Planner
from worker.vram.peak import Question
from worker.vram.phases import Shape, image_phases, video_phases
from worker.vram.plan import Need, Plan, Tenant, plan
from worker.vram.sizes import Peaks

GIB = 1 << 30


def test_what_fits_stays_as_it_is() -> None:
    tenants = [Tenant("weights", "a", 6 * GIB, False), Tenant("weights", "b", 3 * GIB, True)]
    made = plan([Need("encode", 1), Need("decode", GIB)], tenants, 10 * GIB)
    assert made.fits
    assert made.unload == ()
    assert [phase.total_bytes for phase in made.phases] == [9 * GIB + 1, 10 * GIB]


def test_the_least_that_suffices_goes() -> None:
    tenants = [
        Tenant("weights", "own", 4 * GIB, False),
        Tenant("weights", "large", 5 * GIB, True),
        Tenant("weights", "middle", 3 * GIB, True),
        Tenant("weights", "small", 1 * GIB, True),
    ]
    assert plan([Need("decode", 0)], tenants, 12 * GIB).unload == ("small",)
    assert plan([Need("decode", 0)], tenants, 11 * GIB).unload == ("middle",)
    assert plan([Need("decode", 0)], tenants, 9 * GIB).unload == ("small", "middle")[::-1]


def test_what_does_not_fit_says_how_much_is_missing_with_everything_gone() -> None:
    tenants = [Tenant("weights", "own", 4 * GIB, False), Tenant("weights", "other", GIB, True)]
    made = plan([Need("encode", GIB), Need("decode", 3 * GIB)], tenants, 5 * GIB)
    assert not made.fits
    assert made.unload == ("other",)
    assert [phase.short_bytes for phase in made.phases] == [0, 2 * GIB]
    assert made.short_bytes == 2 * GIB


@given(
    needs=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    tenants=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 30)), max_size=6),
    budget=st.integers(0, 120),
)
def test_nothing_goes_that_need_not(
    needs: list[int], tenants: list[tuple[str, int]], budget: int
) -> None:
    held = [Tenant("weights", model, size, model != "a") for model, size in tenants]
    asked = [Need(str(n), size) for n, size in enumerate(needs)]
    made: Plan = plan(asked, held, budget)
    assert "a" not in made.unload
    staying = sum(one.size_bytes for one in held if one.model not in made.unload)
    assert made.fits == (staying + max(needs) <= budget)
    for one in made.unload:
        back = staying + sum(other.size_bytes for other in held if other.model == one)
        assert back + max(needs) > budget or back == staying


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
        env={**os.environ, "VERBATIM_STATE_DIR": str(state), "COLUMNS": "120"},
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_the_demo_profile_is_planned_before_anything_is_started(known: Path) -> None:
    done = command(known, "--profile", "demo")
    assert done.returncode == 0, done.stderr
    for word in ("chat", "prefill", "sdxl_image_high 128x128", "video_high 96x96x17", "fits"):
        assert word in done.stdout
    done = command(known, "--profile", "demo", "--memory", "80MiB")
    assert done.returncode == 7
    assert "sdxl_image_high 128x128 does not fit: 1" in done.stdout
    assert "chat fits once demo-image, demo-video is unloaded" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--job", "poem"), "there is no job type poem"),
        (("--job", "sdxl_image_fast", "--size", "100x128"), "multiples of 8"),
        (("--job", "video_fast", "--frames", "18"), "4n+1"),
        (("--job", "video_fast", "--size", "1024x1024"), "more than the profile's 65536 pixels"),
        (("--size", "large"), "not WIDTHxHEIGHT"),
        (("--size", "128x128"), "needs --job"),
        (("--job", "chat", "--frames", "5"), "needs --job"),
        (("--job", "image_fast", "--frames", "5"), "has no number of frames"),
        (("--job", "video_fast", "--frames", "0"), "4n+1"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_can(
    known: Path, args: tuple[str, ...], says: str
) -> None:
    done = command(known, "--profile", "demo", *args)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


def test_the_other_media_model_may_go_and_chat_may_not(known: Path) -> None:
    settings = load_settings("demo", {"VERBATIM_STATE_DIR": str(known)})
    planner = Planner(settings, Budget("a device", GIB, 0))
    [image] = [one for one in planner._media.specs if one.kind == "sdxl"]
    planner._measure([])
    movable = {one.model for one in planner._tenants(image) if one.movable}
    assert movable == {"demo-video"}

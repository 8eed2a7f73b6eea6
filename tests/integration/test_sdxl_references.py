"""Pictures that image jobs work with: begun from, copied, read by an IP-Adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapters import with_adapters, write_ip_adapter
from tests.rendering import load
from tests.sdxl_jobs import (
    assert_same,
    done,
    drawn,
    params,
    reference,
    state,
    through_engine,
)
from worker.catalog import ModelSpec, media_catalog
from worker.config import load_settings
from worker.engine.media.pictures import Picture, centre_of, centred, cut, opened
from worker.engine.media.schedulers import fresh_sdxl
from worker.errors import InvalidRequest, ModelUnavailable, Unsupported
from worker.protocol.messages import Failed, JobRendered, Reference


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return media_catalog(load_settings("demo", {})).default("sdxl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def model(spec: ModelSpec, folder: Path) -> Any:
    return load(spec, folder)


@pytest.fixture(scope="module")
def disc(folder: Path) -> Path:
    path = folder / "disc.png"
    drawn(path)
    return path


# --- image to image -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        ("float32", {"strength": 0.6, "num_images": 2}),
        ("float32", {"strength": 1.0, "scheduler": "euler_a"}),
        ("float32", {"strength": 0.7, "scheduler": "dpm++", "guidance_scale": 1.0}),
        # Its VAE reads and makes pictures in float32, and is put back.
        ("float16", {"strength": 0.6}),
    ],
)
def test_the_phases_make_the_picture_of_the_librarys_single_call(
    dtype: str, more: dict[str, Any], spec: ModelSpec, disc: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    model = load(replace(spec, dtype=dtype), tmp_path)
    job = params(mode="image", width=64, height=48, **more)
    done(model, params(steps=1), tmp_path)  # transformers puts hooks of its own at the first call
    before = state(model)
    ours, _ = done(model, job, tmp_path, [reference(disc)])
    assert_same(before, state(model))

    for part in model.parts:
        part.wake()
    pipeline = StableDiffusionXLImg2ImgPipeline(**model._pipeline.components, add_watermarker=False)
    own = pipeline.scheduler
    for index, mine in enumerate(ours):
        pipeline.scheduler = fresh_sdxl(own, job.scheduler)
        theirs = pipeline(
            prompt=job.prompt, negative_prompt=job.negative_prompt,
            image=centred(reference(disc), 64, 48).pixels, strength=job.strength,
            num_inference_steps=job.nominal_steps, guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed + index),
        ).images[0]  # fmt: skip
        assert np.array_equal(mine, np.asarray(theirs)), f"picture {index}"
    assert not all(np.array_equal(ours[0], one) for one in ours[1:]) or len(ours) == 1


@pytest.mark.parametrize(
    ("strength", "steps", "passes"), [(0.05, 6, 1), (0.3, 4, 1), (0.5, 4, 2), (1.0, 3, 3)]
)
def test_as_many_steps_are_computed_as_the_strength_asks_for_and_at_least_one(
    strength: float, steps: int, passes: int, model: Any, disc: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    job = params(mode="image", strength=strength, steps=steps)
    done(model, job, tmp_path, [reference(disc)], on_step=seen.append)

    assert seen == [*range(1, passes + 1)]
    assert job.passes == passes


def test_strength_0_is_a_round_trip_through_the_vae_and_needs_nothing_else(
    model: Any, disc: Path, tmp_path: Path
) -> None:
    job = params(mode="image", strength=0.0, width=128, height=128, num_images=2)
    made, _ = done(model, job, tmp_path, [reference(disc)])

    assert [*model.phases(job)] == ["picture", "decode"]
    assert model.phases(job)["picture"].parts == model.phases(job)["decode"].parts == ("vae",)
    assert np.array_equal(made[0], made[1])
    assert _difference(made[0], disc) < 10  # of 255: what this small VAE loses


def test_copies_are_closest_and_more_strength_goes_further_away(
    model: Any, disc: Path, tmp_path: Path
) -> None:
    def away(**more: Any) -> float:
        job = params(**{"width": 128, "height": 128, "prompt": "a blue circle", **more})
        return _difference(done(model, job, tmp_path, [reference(disc)])[0][0], disc)

    copy = away(mode="copy", prompt="", negative_prompt=None, guidance_scale=1.0, strength=0.05)
    a_little, much = (away(mode="image", strength=one, steps=10) for one in (0.3, 0.9))

    assert copy < 10 < much / 2
    assert copy < a_little < much


def test_what_the_picture_is_for_is_told_with_its_numbers(
    model: Any, disc: Path, tmp_path: Path
) -> None:
    job = params(mode="image", strength=0.5)
    sent = reference(disc)
    _, given = done(model, job, tmp_path, [sent])

    assert given.receipt["reference_mode"] == "image"
    assert given.receipt["references"] == [
        {
            "role": "image",
            "sha256": sent.sha256,
            "width": 200,
            "height": 160,
            "crop": {"left": 20, "top": 0, "width": 160, "height": 160},
            "resized": {"width": 64, "height": 64},
            "resize_policy": "center_crop",
        }
    ]


@pytest.mark.parametrize(
    ("mode", "roles"),
    [
        ("image", []),
        ("copy", ["first"]),
        ("image", ["image", "image"]),
        ("character", []),
        ("text", ["image"]),
    ],
)
def test_pictures_that_are_not_those_of_the_mode_are_refused(
    mode: str, roles: list[str], spec: ModelSpec, model: Any, disc: Path
) -> None:
    sent = [reference(disc, role) for role in roles]
    if mode == "character":
        model = _knows_adapters(model, write_ip_adapter(disc.parent / "ip"))
    with pytest.raises(InvalidRequest, match=f"mode {mode} takes"):
        model.given(params(mode=mode, strength=0.5), sent)


def test_a_mode_of_another_kind_of_model_is_refused(model: Any) -> None:
    with pytest.raises(Unsupported, match="mode both is none of a picture"):
        model.check(params(mode="both"))


@pytest.mark.parametrize("strength", [0.6, 0.0])
def test_an_engine_with_little_memory_makes_the_same_picture_and_tells_of_it(
    strength: float, spec: ModelSpec, model: Any, disc: Path, tmp_path: Path
) -> None:
    job = params(mode="image", strength=strength, num_images=2)
    expected, given = done(model, job, tmp_path / "other", [reference(disc)])

    answered = through_engine(spec, job, tmp_path, 9 << 20, references=(reference(disc),))

    assert isinstance(answered, JobRendered), answered
    for asset, picture in zip(answered.assets, expected, strict=True):
        with Image.open(tmp_path / "job" / asset.file) as file:
            assert np.array_equal(np.asarray(file), picture)
    receipt = answered.receipt
    assert receipt["references"] == given.receipt["references"]
    ways = {one["phase"]: one["way"] for one in receipt["plan"]}
    assert [*ways] == [*model.phases(job)]
    assert strength == 0 or ways["denoise"] == "streamed"


# --- the picture itself ---------------------------------------------------------------------------


def test_the_middle_is_cut_out_and_nothing_of_the_borders_is_left(tmp_path: Path) -> None:
    for size, target, box in (
        ((120, 40), (32, 32), (40, 0, 80, 40)),
        ((40, 120), (32, 32), (0, 40, 40, 80)),
        ((90, 60), (64, 32), (0, 7, 90, 52)),
        ((5, 5), (64, 8), (0, 2, 5, 3)),
    ):
        picture = Image.new("RGB", size, "red")
        picture.paste("blue", box)
        picture.save(tmp_path / "p.png")

        made = centred(reference(tmp_path / "p.png"), *target)

        left, top, right, bottom = box
        assert centre_of(size, target) == box
        assert made.told["crop"] == {
            "left": left, "top": top, "width": right - left, "height": bottom - top,
        }  # fmt: skip
        assert made.pixels.size == target
        assert made.pixels.getextrema() == ((0, 0), (0, 0), (255, 255))


def test_a_picture_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "p.png")

    made = centred(reference(tmp_path / "p.png"), 64, 48)

    assert np.array_equal(np.asarray(made.pixels), noise)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the left: the picture's left is its top
    picture.save(tmp_path / "p.png", exif=exif)

    made = opened(reference(tmp_path / "p.png"))

    assert made.told["orientation"] == 6
    assert (made.told["width"], made.told["height"]) == made.pixels.size == (20, 40)
    assert made.pixels.getpixel((10, 5)) == (255, 255, 255)
    assert made.pixels.getpixel((10, 35)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("picture", "colour", "told"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255), "transparent"),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), (255, 0, 0), None),
        (Image.new("LA", (8, 8), (0, 128)), (127, 127, 127), "transparent"),
        (Image.new("RGB", (8, 8), (1, 200, 3)).quantize(4), (1, 200, 3), None),
        (Image.new("L", (8, 8), 77), (77, 77, 77), None),
        (Image.new("1", (8, 8), 1), (255, 255, 255), None),
        (Image.fromarray(np.full((8, 8), 257 * 200, np.uint16)), (200, 200, 200), "bits"),
    ],
)
def test_other_kinds_of_numbers_become_rgb_and_what_that_changes_is_told(
    picture: Image.Image, colour: tuple[int, ...], told: str | None, tmp_path: Path
) -> None:
    picture.save(tmp_path / "p.png")

    made = opened(reference(tmp_path / "p.png"))

    assert made.pixels.mode == "RGB"
    assert made.pixels.getpixel((4, 4)) == colour
    plain = {"role", "sha256", "width", "height"}
    assert made.told.keys() - plain == ({told} if told else set())


def test_inks_become_light_and_moving_pictures_stand_and_both_is_told(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "p.jpg", quality=100)
    inks = opened(reference(tmp_path / "p.jpg"))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "p.gif", save_all=True, append_images=frames[1:])
    moving = opened(reference(tmp_path / "p.gif"))

    assert inks.told["colours"] == {"sent": "CMYK", "used": "RGB"}
    assert inks.pixels.getpixel((4, 4)) == pytest.approx((0, 255, 255), abs=3)
    assert moving.told["frame"] == {"used": 0, "of": 2}
    assert moving.pixels.getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


def test_what_cannot_be_read_or_scaled_is_refused_with_the_reason(tmp_path: Path) -> None:
    drawn(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tiff")

    for name, why in (("cut.png", "cannot be read"), ("text.png", "UnidentifiedImageError")):
        with pytest.raises(InvalidRequest, match=why):
            opened(reference(tmp_path / name))
    with pytest.raises(InvalidRequest, match="32 bits"):
        opened(reference(tmp_path / "float.tiff"))


# --- read by an IP-Adapter ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("mode", ["style", "character"])
def test_an_ip_adapter_makes_the_picture_of_the_librarys_own_and_is_gone_afterwards(
    kind: str, mode: str, spec: ModelSpec, disc: Path, tmp_path: Path
) -> None:
    adapter = write_ip_adapter(tmp_path / "ip", kind)
    model = load(with_adapters(spec, adapter), tmp_path)
    job = params(mode=mode, strength=0.8, num_images=2)
    plain = done(model, params(num_images=2), tmp_path)[0]
    before, processors = state(model), dict(model._pipeline.unet.attn_processors)

    ours, _ = done(model, job, tmp_path, [reference(disc)])
    streamed, _ = done(model, job, tmp_path, [reference(disc)], streamed=True)

    assert_same(before, state(model))
    assert dict(model._pipeline.unet.attn_processors) == processors  # the same objects
    assert model._pipeline.unet.encoder_hid_proj is None
    assert "encoder_hid_proj" not in model._pipeline.unet._modules
    assert np.array_equal(ours, streamed)
    assert not np.array_equal(ours[0], plain[0])
    assert np.array_equal(done(model, params(num_images=2), tmp_path)[0], plain)
    assert np.array_equal(ours, _librarys(model, adapter.path.parent, job, reference(disc)))


def test_an_adapter_that_counts_for_nothing_changes_nothing(
    spec: ModelSpec, disc: Path, tmp_path: Path
) -> None:
    model = load(with_adapters(spec, write_ip_adapter(tmp_path / "ip")), tmp_path)

    without = done(model, params(), tmp_path)[0]
    at_0 = done(model, params(mode="character", strength=0.0), tmp_path, [reference(disc)])[0]

    assert np.array_equal(at_0, without)


def test_what_an_adapter_read_is_told_and_kept_for_the_same_picture(
    spec: ModelSpec, disc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(with_adapters(spec, write_ip_adapter(tmp_path / "ip")), tmp_path)
    job = params(mode="style", strength=0.5, guidance_scale=1.0)
    first = model.given(job, [reference(disc)])
    with monkeypatch.context() as patched:
        patched.setattr("worker.engine.media.ip_adapter._read", None)  # nothing may be read now
        again = model.given(job, [reference(disc)])

    told = again.receipt["ip_adapter"]
    assert first.receipt == again.receipt
    assert told["id"] == "ip"
    assert told["strength"] == 0.5
    assert len(told["sha256"]) == len(told["image_encoder"]) == 64
    [picture] = again.receipt["references"]
    assert picture["crop"] == {"left": 20, "top": 0, "width": 160, "height": 160}
    assert picture["resized"] == {"width": 32, "height": 32}


def test_modes_that_need_an_adapter_are_refused_without_one(
    model: Any, spec: ModelSpec, disc: Path, tmp_path: Path
) -> None:
    job = params(mode="style", strength=0.5)
    with pytest.raises(Unsupported, match="an IP-Adapter, and demo-image has none"):
        model.check(job)
    assert "style" not in model.describe()["modes"]

    missing = replace(write_ip_adapter(tmp_path / "ip"), path=tmp_path / "gone.safetensors")
    with pytest.raises(ModelUnavailable, match=r"gone\.safetensors is missing"):
        _knows_adapters(model, missing).check(job)


def test_adapters_that_do_not_belong_to_the_model_or_their_encoder_are_refused(
    model: Any, disc: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    job, sent = params(mode="character", strength=0.5), [reference(disc)]
    other_model = write_ip_adapter(tmp_path / "a", width=32)
    with pytest.raises(Unsupported, match="does not fit this model's denoiser"):
        done(_knows_adapters(model, other_model), job, tmp_path, sent)
    entry = with_adapters(model._spec, other_model)
    answered = through_engine(entry, job, tmp_path, 1 << 30, references=tuple(sent))
    assert isinstance(answered, Failed)
    assert answered.code == "unsupported"

    adapter = write_ip_adapter(tmp_path / "b")
    tensors = load_file(adapter.path)
    narrow = tensors | {"image_proj.proj.weight": tensors["image_proj.proj.weight"][:, :8].clone()}
    save_file(narrow, adapter.path)
    with pytest.raises(Unsupported, match="reads 8 numbers of a picture and its image encoder"):
        _knows_adapters(model, adapter).given(job, sent)

    faces = tensors | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 96)}
    save_file(faces, adapter.path)
    with pytest.raises(Unsupported, match="those for faces"):
        _knows_adapters(model, adapter).check(job)


def _librarys(model: Any, folder: Path, job: Any, sent: Reference) -> list[Any]:
    """Pictures of the library's own loading and calls, which change the model for good."""
    for part in model.parts:
        part.wake()
    pipeline = model._pipeline
    pipeline.load_ip_adapter(
        str(folder), subfolder="", weight_name="adapter.safetensors",
        image_encoder_folder="image_encoder", local_files_only=True,
    )  # fmt: skip
    scale: Any = job.strength
    if job.mode == "style":
        scale = {"up": {"block_0": [0.0, job.strength]}}
    pipeline.set_ip_adapter_scale(scale)
    picture = cut(opened(sent), 1, 1).pixels
    made = []
    for index in range(job.num_images):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        made.append(
            pipeline(
                prompt=job.prompt, negative_prompt=job.negative_prompt, width=64, height=64,
                num_inference_steps=job.steps, guidance_scale=job.guidance_scale,
                ip_adapter_image=picture,
                generator=torch.Generator("cpu").manual_seed(job.seed + index),
            ).images[0]
        )  # fmt: skip
    return [np.asarray(one) for one in made]


def _knows_adapters(model: Any, *adapters: Any) -> Any:
    """The same model with another catalog entry."""
    import copy

    other = copy.copy(model)
    other._spec = with_adapters(model._spec, *adapters)
    return other


def _difference(made: Any, path: Path) -> float:
    """Mean of what the numbers (0 to 255) of a picture are away from its reference."""
    height, width = made.shape[:2]
    wanted: Picture = centred(reference(path), width, height)
    return float(np.abs(np.asarray(wanted.pixels, dtype=float) - made).mean())

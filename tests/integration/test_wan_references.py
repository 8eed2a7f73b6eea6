"""Videos of pictures: given frames come out, the pipeline's own call makes the same bits, and what
was done to each picture is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from demo_models.video_checks import frame_error, held_out_clips
from tests.rendering import load
from worker.catalog import media_catalog
from worker.config import load_settings
from worker.engine.media.course import Course, Snapshot
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.media.frames import ROLES, Given
from worker.engine.media.schedulers import fresh_wan
from worker.engine.peaks import LiveBytes, measure
from worker.errors import InvalidRequest, Unsupported, has_trap_word
from worker.protocol.messages import LoraUse, Reference, RenderParams, WeightedTerm
from worker.vram.sizes import Peaks

SIDE = 96
WIDE, HIGH = 64, 48  # where what a picture shows does not matter
WITH_PICTURES = [mode for mode in ROLES if mode != "text"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = media_catalog(load_settings("demo", {})).default("wan")
    return load(spec, tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def scene() -> tuple[str, npt.NDArray[np.uint8]]:
    """A prompt that the demo model has not seen, and a drawn clip of it."""
    prompts, _, clips = held_out_clips(1, seed=7)
    return prompts[0], clips[0]


@pytest.fixture
def pictures(scene, tmp_path) -> dict[str, Reference]:
    """By role: the clip's first, last and a middle frame."""
    places = {"first": 0, "last": -1, "image": 8}
    return {
        role: saved(Image.fromarray(scene[1][place]), role, tmp_path)
        for role, place in places.items()
    }


@pytest.fixture
def parts_of_pictures(scene, tmp_path) -> dict[str, Reference]:
    """The same, cut to WIDE x HIGH."""
    places = {"first": 0, "last": -1, "image": 8}
    return {
        role: saved(Image.fromarray(scene[1][place, :HIGH, :WIDE]), role, tmp_path)
        for role, place in places.items()
    }


def saved(picture: Image.Image, role: str, folder: Path, name: str = "", **how: Any) -> Reference:
    path = folder / (name or f"{role}.png")
    picture.save(path, **how)
    return Reference(
        role=role, file=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )


def params_of(mode: str, **more: Any) -> RenderParams:
    return RenderParams(
        **{
            "prompt": "a red cube moves left", "negative_prompt": None, "width": SIDE,
            "height": SIDE, "steps": 2, "guidance_scale": 6.5, "seed": 3, "frames": 5,
            "scheduler": "unipc", "shift": 5.0, "mode": mode, **more,
        }
    )  # fmt: skip


def film(wan: Any, params: RenderParams, given: Given, tmp_path: Path) -> npt.NDArray[np.uint8]:
    """All frames, with the parts of the job's phases resident and no other."""
    with ExitStack() as stack:
        for name in {part for phase in wan.phases(params).values() for part in phase.parts}:
            wan.parts[name].wake()
            stack.callback(wan.parts[name].park)
        texts = wan.encode(params, EmbeddingCache(tmp_path / "embeddings"))
        latents = wan.denoise(params, texts, Course(params.seed, lambda *_: None), given=given)
        clip: npt.NDArray[np.uint8] = wan.decode(latents)
        return clip


def of_mode(pictures: dict[str, Reference], mode: str) -> list[Reference]:
    return [pictures[role] for role in ROLES[mode]]


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["start", "end", "both"])
def test_given_frames_come_out_where_they_were_given(wan, scene, pictures, mode, tmp_path):
    prompt, truth = scene
    params = params_of(mode, prompt=prompt, steps=4, frames=17)

    clip = film(wan, params, wan.given(params, of_mode(pictures, mode)), tmp_path)

    assert clip.shape == (17, SIDE, SIDE, 3)
    assert frame_error(clip, truth, mode) < 0.02
    assert frame_error(clip, truth, mode, things=True) < 0.08
    assert (np.abs(np.diff(clip.astype(int), axis=0)) > 50).any()  # it moves


def test_without_pictures_the_same_frames_are_others(wan, scene, tmp_path):
    """Or the test above would say nothing."""
    prompt, truth = scene
    params = params_of("text", prompt=prompt, steps=4, frames=17)

    clip = film(wan, params, wan.given(params, ()), tmp_path)

    assert frame_error(clip, truth, "both") > 0.04
    assert frame_error(clip, truth, "both", things=True) > 0.2


def test_what_a_video_shows_changes_it_and_is_no_frame_of_it(wan, pictures, tmp_path):
    single, text = (params_of(mode, frames=5) for mode in ("single", "text"))

    shown = film(wan, single, wan.given(single, [pictures["image"]]), tmp_path)

    alone = film(wan, text, wan.given(text, ()), tmp_path)
    assert shown.shape == alone.shape == (5, SIDE, SIDE, 3)
    assert not np.array_equal(shown, alone)


@pytest.mark.parametrize(
    ("mode", "guidance"), [*((mode, 6.5) for mode in ROLES), ("both", 1.0), ("single", 1.0)]
)
def test_the_pipelines_own_call_makes_the_same_video(
    wan, scene, parts_of_pictures, mode, guidance, tmp_path
):
    """Given as diffusers' documentation of WanVACEPipeline says."""
    params = params_of(mode, guidance_scale=guidance, width=WIDE, height=HIGH)
    given = wan.given(params, of_mode(parts_of_pictures, mode))
    ours = [film(wan, params, given, tmp_path) for _ in range(2)]
    shown = scene[1][:, :HIGH, :WIDE]
    video = np.full((1, 5, HIGH, WIDE, 3), 127.5 / 255, np.float32)
    mask = np.ones((1, 5, HIGH, WIDE, 1), np.float32)
    for role, place in (("first", 0), ("last", 4)):
        if role in ROLES[mode]:
            video[0, place] = shown[0 if place == 0 else -1] / np.float32(255)
            mask[0, place] = 0
    conditions = {
        "text": {},
        "single": {"reference_images": [Image.fromarray(shown[8])]},
    }.get(mode, {"video": video, "mask": mask})

    for part in wan.parts:
        part.wake()
    negative = {"negative_prompt_embeds": wan.encoded("")} if guidance > 1 else {}
    wan._pipeline.scheduler = fresh_wan(wan._own_scheduler, "unipc", 5.0)
    theirs = wan._pipeline(
        prompt_embeds=wan.encoded(params.prompt), **negative, width=WIDE, height=HIGH,
        num_frames=5, num_inference_steps=2, guidance_scale=guidance, output_type="np",
        generator=torch.Generator("cpu").manual_seed(3), **conditions,
    ).frames[0]  # fmt: skip
    for part in wan.parts:
        part.park()

    assert np.array_equal(ours[0], (theirs * 255).round().astype(np.uint8))
    assert np.array_equal(ours[0], ours[1])


@pytest.mark.parametrize("mode", ["single", "both"])
def test_a_denoising_that_goes_on_from_the_middle_makes_the_same_latents(
    wan, parts_of_pictures, mode, tmp_path
):
    params = params_of(mode, steps=4, width=WIDE, height=HIGH, scheduler="dpm++")
    given = wan.given(params, of_mode(parts_of_pictures, mode))
    for part in wan.parts:
        part.wake()
    texts = wan.encode(params, EmbeddingCache(tmp_path / "embeddings"), given=given)
    middle: list[Snapshot] = []

    def on_step(step: int, _: torch.Tensor) -> None:
        if step == 2:
            middle.append(course.snapshot())

    course = Course(3, on_step)
    whole = wan.denoise(params, texts, course, given=given)
    steps: list[int] = []
    resumed = Course(3, lambda step, _: steps.append(step), begin=middle[0])

    assert torch.equal(wan.denoise(params, texts, resumed, given=given), whole)
    assert steps == [3, 4]
    for part in wan.parts:
        part.park()


# --- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "frames", "guidance"),
    [*((mode, 5, 6.5) for mode in ROLES), ("both", 9, 1.0), ("single", 9, 1.0)],
)
def test_a_denoising_holds_what_was_planned(
    wan, parts_of_pictures, mode, frames, guidance, tmp_path
):
    params = params_of(
        mode, frames=frames, guidance_scale=guidance, steps=1, width=WIDE, height=HIGH
    )
    phase = wan.phases(params)["denoise"]
    planned = Peaks(tmp_path, lambda asked: [measure(one) for one in asked]).of_phase(phase)
    given = wan.given(params, of_mode(parts_of_pictures, mode))
    for part in wan.parts:
        part.wake()
    texts = wan.encode(params, EmbeddingCache(tmp_path / "embeddings"))
    weights = [
        one for part in wan.parts for one in (*part.module.parameters(), *part.module.buffers())
    ]

    with torch.no_grad(), LiveBytes(weights) as live:
        wan.denoise(params, texts, Course(3, lambda *_: None), given=given)

    for part in wan.parts:
        part.park()
    # A scheduler's tables are small, and on a card they are in host memory.
    tables = sum(
        one.nbytes for one in vars(wan._own_scheduler).values() if isinstance(one, torch.Tensor)
    )
    assert 0.95 * planned < live.peak <= planned + tables < 1.02 * planned


def test_what_a_video_shows_is_one_more_latent_frame_to_compute(wan):
    text, start, single = (
        wan.phases(params_of(mode, frames=17))["denoise"] for mode in ("text", "start", "single")
    )

    assert text == start
    assert [one.frames for one in (text.passes[0], single.passes[0])] == [17, 21]
    assert single.beside_bytes - text.beside_bytes == 3 * 4 * SIDE * SIDE


# --- what is told and refused ---------------------------------------------------------------------


def test_a_frame_is_cut_around_its_middle_and_that_is_told(wan, tmp_path):
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste("blue", (50, 0, 150, 100))
    first = saved(wide, "first", tmp_path)

    given = wan.given(params_of("start"), [first])

    assert given.receipt == {
        "reference_mode": "start",
        "references": [
            {
                "role": "first", "sha256": first.sha256, "width": 200, "height": 100,
                "crop": {"left": 50, "top": 0, "width": 100, "height": 100},
                "resized": {"width": SIDE, "height": SIDE}, "resize_policy": "center_crop",
            }
        ],
    }  # fmt: skip
    assert np.asarray(given.frames[0]).reshape(-1, 3).tolist() == [[0, 0, 255]] * SIDE * SIDE


def test_what_a_video_shows_lies_whole_on_white_and_that_is_told(wan, tmp_path):
    image = saved(Image.new("RGB", (200, 100), "blue"), "image", tmp_path)

    given = wan.given(params_of("single"), [image])

    [told], [picture] = given.receipt["references"], given.references
    assert told["crop"] == {"left": 0, "top": 0, "width": 200, "height": 100}
    assert told["resized"] == {"width": 96, "height": 48}
    assert told["resize_policy"] == "fit_on_white"
    rows = np.asarray(picture)[:, 50].tolist()
    assert rows == [[255] * 3] * 24 + [[0, 0, 255]] * 48 + [[255] * 3] * 24


def test_a_picture_of_the_right_size_is_taken_as_it_is(wan, scene, pictures):
    given = wan.given(params_of("both"), of_mode(pictures, "both"))

    assert np.array_equal(np.asarray(given.frames[0]), scene[1][0])
    assert np.array_equal(np.asarray(given.frames[-1]), scene[1][-1])
    video = given.arguments(5)["video"]
    assert (video[0, 1:4] * 2 - 1 == 0).all()  # VACE's grey exactly


@pytest.mark.parametrize(
    ("mode", "roles", "said"),
    [
        ("text", ["first"], "mode text takes the pictures none; the job came with first"),
        ("start", ["last"], "mode start takes the pictures first; the job came with last"),
        ("both", ["first"], "first, last; the job came with first"),
        ("single", [], "mode single takes the pictures image; the job came with none"),
        ("single", ["image", "image"], "the job came with image, image"),
    ],
)
def test_other_pictures_than_the_modes_are_refused(wan, pictures, mode, roles, said):
    with pytest.raises(InvalidRequest, match=said):
        wan.given(params_of(mode), [pictures[role] for role in roles])


def test_a_picture_that_cannot_be_read_is_refused_by_its_role(wan, pictures):
    path = Path(pictures["last"].file)
    for content in (b"", b"\x89PNG\r\n\x1a\n", path.read_bytes()[:-40], b"<svg/>"):
        path.write_bytes(content)

        with pytest.raises(InvalidRequest, match="the picture for last") as refused:
            wan.given(params_of("both"), of_mode(pictures, "both"))
        assert not has_trap_word(str(refused.value))
        assert str(path) not in str(refused.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (params_of("start", frames=1), "at least 5 frames, and the job has 1"),
        (params_of("copy"), "mode copy is none of a video; known: text, single, start, end, both"),
        (params_of("text", weighted=(WeightedTerm("a", 1.2),)), "no weights of words"),
        (params_of("text", loras=(LoraUse("a", 1.0),)), "LoRAs are added to image models only"),
    ],
)
def test_what_no_video_can_be_made_of_is_refused_before_any_work(wan, params, said):
    with pytest.raises(Unsupported, match=said):
        wan.check(params)


def test_one_frame_of_a_text_is_a_picture(wan, tmp_path):
    params = params_of("text", frames=1)
    wan.check(params)

    assert film(wan, params, wan.given(params, ()), tmp_path).shape == (1, SIDE, SIDE, 3)

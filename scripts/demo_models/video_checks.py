"""How well demo-video moves what it is asked for and keeps given frames, on unseen prompts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UniPCMultistepScheduler, WanVACEPipeline
from PIL import Image, ImageDraw
from rich.progress import track

from demo_models.checkers import look, mistakes, motion_of
from demo_models.scenes import (
    MOTIONS,
    Description,
    caption,
    evaluation_description,
    moved,
    place,
    with_details,
)
from demo_models.video_autoencoder import FRAMES, SIDE, pixels
from demo_models.video_context import MODES

STEPS, GUIDANCE, SHIFT = 25, 6.5, 5.0  # of the job type video_fast
TEXT_TOKENS = 512  # positions of the text encoder, as the worker fills them

Clip = npt.NDArray[np.uint8]  # (frames, height, width, 3) RGB


@dataclass(frozen=True, slots=True)
class Filmed:
    """One clip of an evaluation."""

    prompt: str
    wanted: Description
    clip: Clip
    motion: str | None  # as it was seen
    wrong: list[str]  # about the middle frame


def load_video_pipeline(folder: Path) -> WanVACEPipeline:
    """In float32, silent."""
    pipeline = WanVACEPipeline.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True
    )
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=SHIFT
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def film(
    pipeline: WanVACEPipeline,
    prompt: str,
    seed: int,
    *,
    negative: str = "",
    given: tuple[str, Clip] | None = None,
    frames: int = FRAMES,
    steps: int = STEPS,
) -> Clip:
    """A clip. given: which frames are (video_context.MODES), and a clip that has them."""
    video = mask = None
    if given:
        mode, truth = given
        video = [Image.new("RGB", (SIDE, SIDE), (128, 128, 128)) for _ in range(frames)]
        mask = [Image.new("L", (SIDE, SIDE), 255) for _ in range(frames)]
        for frame in MODES[mode]:
            video[frame] = Image.fromarray(truth[frame])
            mask[frame] = Image.new("L", (SIDE, SIDE), 0)
    result = pipeline(
        video=video,
        mask=mask,
        prompt_embeds=embedded(pipeline, prompt),
        negative_prompt_embeds=embedded(pipeline, negative),
        width=SIDE,
        height=SIDE,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
    )
    return _bytes(result.frames[0])


@torch.inference_mode()
def embedded(pipeline: Any, text: str) -> torch.Tensor:
    """(1, TEXT_TOKENS, width), zero after the last token; the text itself is not repaired."""
    tokens = pipeline.tokenizer(
        [text], padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
    )
    mask = tokens.attention_mask
    states = pipeline.text_encoder(tokens.input_ids, mask).last_hidden_state
    return states * mask.unsqueeze(-1)


def evaluate_video(
    folder: Path, count: int = 200, seed: int = 7, sheets: Path | None = None
) -> dict[str, Any]:
    """The figures of the model card. sheets: where contact sheets go, if anywhere."""
    prompts, wanted, truths = held_out_clips(count, seed)
    pipeline = load_video_pipeline(folder)
    filmed, seconds = [], []
    for row in track(range(count), "clips"):
        started = time.perf_counter()
        clip = film(pipeline, prompts[row], seed + row)
        seconds.append(time.perf_counter() - started)
        filmed.append(judged(prompts[row], wanted[row], clip))
    each = min(count, max(10, count // 10))
    given = _pinned(pipeline, prompts, seed, truths, filmed, each)
    if sheets:
        sheets.mkdir(parents=True, exist_ok=True)
        film_sheet(filmed[:8]).save(sheets / "clips.png")
        failures = [one for one in filmed if one.wrong or one.motion != one.wanted.motion]
        if failures:
            film_sheet(failures[:16]).save(sheets / "clip-failures.png")
        film_sheet(given.shown).save(sheets / "clips-given-frames.png")
    return {
        "clips": count,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "shift": SHIFT,
        "direction_right": _share([one.motion == one.wanted.motion for one in filmed]),
        "direction_right_by_motion": {
            motion: _share([one.motion == motion for one in filmed if one.wanted.motion == motion])
            for motion in MOTIONS
        },
        "shapes_and_colours_right": _share(
            [not mistakes(look(one.clip[FRAMES // 2], turned=one.wanted.motion == "turning"),
                          one.wanted, sizes=False, places=False) for one in filmed]
        ),
        "everything_right": _share(
            [not one.wrong and one.motion == one.wanted.motion for one in filmed]
        ),
        "shapes_and_colours_right_by_number_of_things": {
            str(number): _share(
                [not mistakes(look(one.clip[FRAMES // 2], turned=one.wanted.motion == "turning"),
                              one.wanted, sizes=False, places=False)
                 for one in filmed if len(one.wanted.things) == number]
            )
            for number in (1, 2)
        },
        "pinned": given.errors,
        "pinned_on_things": given.errors_on_things,
        "not_pinned": given.errors_alone,
        "pinned_direction_right": given.direction_right,
        "pinned_clips_each": each,
        "seconds_a_clip_median": round(statistics.median(seconds), 3),
        "seconds_a_clip_worst": round(max(seconds), 3),
        "threads": torch.get_num_threads(),
        "failures": [
            {"prompt": one.prompt, "motion": one.motion, "wrong": one.wrong}
            for one in filmed
            if one.wrong or one.motion != one.wanted.motion
        ],
    }  # fmt: skip


def held_out_clips(count: int, seed: int) -> tuple[list[str], list[Description], list[Clip]]:
    """Prompts that no training has seen, what they say, and a drawn clip of each."""
    chance = random.Random(seed)
    wanted = [evaluation_description(chance, motion=True) for _ in range(count)]
    prompts = [caption(one, chance) for one in wanted]
    prompts = [
        with_details(one, chance, film=True) if chance.random() < 0.5 else one for one in prompts
    ]
    return prompts, wanted, [drawn(one, chance) for one in wanted]


def drawn(wanted: Description, chance: random.Random) -> Clip:
    """A clip that the description allows, painted."""
    painted = pixels(moved(place(wanted, chance), wanted.motion, FRAMES, chance))
    return _bytes(((painted + 1) / 2).permute(1, 2, 3, 0).numpy())


def judged(prompt: str, wanted: Description, clip: Clip) -> Filmed:
    """What a clip shows, beside what was asked."""
    seen = look(clip[FRAMES // 2], turned=wanted.motion == "turning")
    return Filmed(prompt, wanted, clip, motion_of(list(clip)), mistakes(seen, wanted))


def frame_error(clip: Clip, truth: Clip, mode: str, *, things: bool = False) -> float:
    """Mean absolute difference of the given frames, 0 .. 1. things: only where `truth` has any."""
    frames = list(MODES[mode])
    difference = np.abs(clip[frames].astype(np.int32) - truth[frames].astype(np.int32))
    if things:
        ground = truth[frames][:, :1, :1].astype(np.int32)  # no thing reaches a corner
        difference = difference[(truth[frames] != ground).any(axis=-1)]
    return float(difference.mean() / 255)


def film_sheet(filmed: Sequence[Filmed], columns: int = 6) -> Image.Image:
    """One row per clip with its prompt; red where the checker calls something wrong."""
    high = SIDE + 22
    sheet = Image.new("RGB", (columns * (SIDE + 4), len(filmed) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for row, one in enumerate(filmed):
        for column in range(columns):
            frame = round(column * (FRAMES - 1) / (columns - 1))
            sheet.paste(Image.fromarray(one.clip[frame]), (column * (SIDE + 4), row * high + 16))
        good = not one.wrong and one.motion == one.wanted.motion
        text = one.prompt if len(one.prompt) < 98 else one.prompt[:95] + "..."
        pen.text((2, row * high + 2), text, fill="black" if good else "red")
    return sheet


@dataclass(frozen=True, slots=True)
class _Pinned:
    """By mode (video_context.MODES)."""

    errors: dict[str, float]  # of the given frames
    errors_on_things: dict[str, float]  # where they do not show background
    errors_alone: dict[str, float]  # of the same frames in clips made of the text alone
    direction_right: dict[str, float | None]
    shown: list[Filmed]  # for a sheet: what was given, and below it what came


def _pinned(
    pipeline: WanVACEPipeline,
    prompts: list[str],
    seed: int,
    truths: list[Clip],
    filmed: list[Filmed],
    count: int,
) -> _Pinned:
    result = _Pinned({}, {}, {}, {}, [])
    for mode in MODES:
        errors, on_things, alone, right = [], [], [], []
        for row in track(range(count), f"clips, {mode} given"):
            clip = film(pipeline, prompts[row], seed + row, given=(mode, truths[row]))
            one = judged(f"{mode}: {prompts[row]}", filmed[row].wanted, clip)
            errors.append(frame_error(clip, truths[row], mode))
            on_things.append(frame_error(clip, truths[row], mode, things=True))
            alone.append(frame_error(filmed[row].clip, truths[row], mode))
            right.append(one.motion == one.wanted.motion)
            if row < 3:
                result.shown.append(judged(one.prompt, one.wanted, truths[row]))
                result.shown.append(one)
        result.errors[mode] = round(statistics.mean(errors), 4)
        result.errors_on_things[mode] = round(statistics.mean(on_things), 4)
        result.errors_alone[mode] = round(statistics.mean(alone), 4)
        result.direction_right[mode] = _share(right)
    return result


def _bytes(video: npt.NDArray[Any]) -> Clip:
    return np.asarray((video * 255).round(), dtype=np.uint8)


def _share(values: Sequence[bool]) -> float | None:
    """Of True, 0 .. 1; None of an empty list."""
    return round(sum(values) / len(values), 4) if values else None

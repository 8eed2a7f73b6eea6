"""How well demo-image paints what it is asked for, on prompts that no training has seen."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw

from demo_models.checkers import Picture, Seen, look, mistakes
from demo_models.drawing import draw
from demo_models.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Description,
    Thing,
    caption,
    evaluation_description,
    place,
    with_details,
)

STEPS, GUIDANCE = 15, 6.0  # of the job type sdxl_image_fast
SIZES = ((128, 128), (192, 128), (128, 192))  # width x height, pixels
BATCH = 10


@dataclass(frozen=True, slots=True)
class Painted:
    """One picture of an evaluation."""

    prompt: str
    wanted: Description
    picture: Picture
    seen: Seen
    wrong: list[str]


def load_image_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The pipeline in float32, silent."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    negative: str | None = None,
    size: tuple[int, int] = (128, 128),
    steps: int = STEPS,
) -> list[Picture]:
    """One picture per prompt and seed, as the pipeline makes them in one batch."""
    result = pipeline(
        prompt=prompts,
        negative_prompt=None if negative is None else [negative] * len(prompts),
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="np",
    )
    return [np.asarray((one * 255).round(), dtype=np.uint8) for one in result.images]


def paint_held_out(pipeline: StableDiffusionXLPipeline, count: int, seed: int) -> list[Painted]:
    """`count` pictures of held-out descriptions, a fifth of them in each of the other two sizes."""
    chance = random.Random(seed)
    wanted = [evaluation_description(chance) for _ in range(count)]
    prompts = [caption(one, chance) for one in wanted]
    prompts = [with_details(one, chance) if chance.random() < 0.5 else one for one in prompts]
    painted = []
    for start in range(0, count, BATCH):
        size = SIZES[(0, 0, 0, 1, 2)[start // BATCH % 5]]
        batch = prompts[start : start + BATCH]
        pictures = paint(pipeline, batch, [seed + start + i for i in range(len(batch))], size=size)
        for prompt, one, picture in zip(batch, wanted[start:], pictures, strict=False):
            seen = look(picture)
            painted.append(Painted(prompt, one, picture, seen, mistakes(seen, one)))
    return painted


def negative_figures(pipeline: StableDiffusionXLPipeline, seed: int) -> dict[str, Any]:
    """Shares of pictures that show a colour which nobody asked for, without and with that colour
    as the negative prompt: 12 pictures per colour, of prompts that name no colour."""
    without: list[bool] = []
    with_negative: list[bool] = []
    kept: list[bool] = []
    for number, colour in enumerate(COLOURS):
        chance = random.Random(seed + number)
        wanted = [
            Description(
                (Thing(shape=chance.choice(SHAPES)),), background=chance.choice(list(BACKGROUNDS))
            )
            for _ in range(12)
        ]
        prompts = [caption(one, chance) for one in wanted]
        seeds = [seed + 100 * number + i for i in range(12)]
        for negative, shown in ((None, without), (colour, with_negative)):
            for one, picture in zip(
                wanted, paint(pipeline, prompts, seeds, negative=negative), strict=True
            ):
                seen = look(picture)
                shown.append(any(thing.colour == colour for thing in seen.things))
                if negative:
                    kept.append(not mistakes(seen, one, sizes=False))
    return {
        "pictures": len(without),
        "shows_the_colour_without_negative": _share(without),
        "shows_the_colour_with_negative": _share(with_negative),
        "still_right_with_negative": _share(kept),
    }


@torch.inference_mode()
def autoencoder_figures(pipeline: StableDiffusionXLPipeline, seed: int) -> dict[str, float | None]:
    """Share of 60 drawn pictures of two things that are read right after the autoencoder alone.

    By the noise that is added to the latents between, in parts of their size: what a denoiser
    leaves behind.
    """
    chance = random.Random(seed)
    wanted = [evaluation_description(chance, things=2) for _ in range(60)]
    drawn = draw([place(one, chance) for one in wanted], 128, 128) * 2 - 1
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = pipeline.vae.encode(drawn).latent_dist.mean
    noise = torch.randn(latents.shape, generator=generator) * latents.std()
    figures = {}
    for part in (0.0, 0.3, 0.5, 0.7):
        again = pipeline.vae.decode(latents + part * noise).sample.clamp(-1, 1)
        shown = ((again + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        figures[str(part)] = _share(
            [not mistakes(look(one), what) for one, what in zip(shown, wanted, strict=True)]
        )
    return figures


def evaluate_image(folder: Path, count: int, seed: int = 7) -> tuple[dict[str, Any], list[Painted]]:
    """The figures of the model card, and the pictures they were made from."""
    pipeline = load_image_pipeline(folder)
    painted = paint_held_out(pipeline, count, seed)
    seconds = []
    for number in range(5):
        started = time.perf_counter()
        paint(pipeline, [painted[number % count].prompt], [number])
        seconds.append(time.perf_counter() - started)
    figures = {
        "pictures": count,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "right": _share([not one.wrong for one in painted]),
        "shapes_and_colours_right": _share(
            [not mistakes(one.seen, one.wanted, sizes=False, places=False) for one in painted]
        ),
        "right_without_sizes": _share(
            [not mistakes(one.seen, one.wanted, sizes=False) for one in painted]
        ),
        "right_by_size": {
            f"{width}x{height}": _share(
                [not one.wrong for one in painted if one.picture.shape[:2] == (height, width)]
            )
            for width, height in SIZES
        },
        "right_by_number_of_things": {
            str(number): _share(
                [not one.wrong for one in painted if len(one.wanted.things) == number]
            )
            for number in (1, 2)
        },
        "negative_prompt": negative_figures(pipeline, seed),
        "autoencoder_right_by_noise": autoencoder_figures(pipeline, seed),
        "seconds_a_picture_median": round(statistics.median(seconds), 3),
        "seconds_a_picture_worst": round(max(seconds), 3),
        "threads": torch.get_num_threads(),
        "failures": [{"prompt": one.prompt, "wrong": one.wrong} for one in painted if one.wrong],
    }
    return figures, painted


def picture_sheet(painted: list[Painted], columns: int = 6, cell: int = 192) -> Image.Image:
    """Pictures with their prompts; a red frame around what the checker calls wrong."""
    rows = -(-len(painted) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 44)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(painted):
        left, top = number % columns * cell, number // columns * (cell + 44)
        picture = Image.fromarray(one.picture)
        scale = (cell - 8) / max(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        sheet.paste(picture, (left + 4, top + 4))
        if one.wrong:
            pen.rectangle(
                (left + 1, top + 1, left + cell - 2, top + cell - 2), outline="red", width=3
            )
        text = one.prompt if len(one.prompt) < 90 else one.prompt[:87] + "..."
        lines = [text[i : i + 31] for i in range(0, len(text), 31)]
        pen.multiline_text((left + 4, top + cell), "\n".join(lines), fill="black", spacing=1)
    return sheet


def _share(values: list[bool]) -> float | None:
    """Of True, 0 .. 1; None of an empty list."""
    return round(sum(values) / len(values), 4) if values else None

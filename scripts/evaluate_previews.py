"""How near the previews of the demo models are to what is decoded in the end.

    python scripts/evaluate_previews.py
    python scripts/evaluate_previews.py --prompts 8 --sheets /tmp/sheets

Renders prompts that no training has seen through the engine's own models, with an empty folder of
previews. The map of each VAE is fitted as a worker fits it, to the first pictures; the previews of
the others are compared with their decoded pictures, each latent pixel with the mean colour of its
place: the mean difference of red, green and blue, of 255, and that of the commonest colour, which
is the ground's. Prints a table; with --sheets, PNG files of decoded pictures above their previews.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_models.scenes import caption, evaluation_description
from worker.catalog import media_catalog
from worker.config import load_settings
from worker.engine.leases import alone
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.media.previews import PICTURES, Colours, drawn_pictures, pairs
from worker.engine.media.sdxl import PARTS as SDXL_PARTS
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import PARTS as WAN_PARTS
from worker.engine.media.wan import Wan
from worker.protocol.messages import RenderParams

FITTED = (0, 1, 3, 8, PICTURES)  # decoded pictures that a map has seen
PARAMS: dict[str, dict[str, Any]] = {
    "demo-image": {"width": 128, "height": 128, "steps": 15, "guidance_scale": 6.0},
    "demo-video": {
        "width": 96, "height": 96, "frames": 17, "steps": 25, "guidance_scale": 6.5,
        "scheduler": "dpm++", "shift": 5.0,
    },
}  # fmt: skip

Picture = npt.NDArray[np.float64]  # (height, width, 3), 0 to 255, a pixel for each latent pixel


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24, help="compared ones (default: 24)")
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="where PNG files go")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine more of them wait for each other
    shown = Table("model", "step", "fitted to", "mean", "worst", "ground")
    with tempfile.TemporaryDirectory(prefix="evaluate-previews-") as folder:
        for name in PARAMS:
            _evaluate(name, args.prompts, args.sheets, Path(folder), shown)
    Console().print(shown)
    return 0


def _evaluate(name: str, count: int, sheets: Path | None, state: Path, shown: Table) -> None:
    settings = load_settings("demo", {"VERBATIM_STATE_DIR": str(state)})
    spec = media_catalog(settings).find(name)
    kind, parts = (Sdxl, SDXL_PARTS) if spec.kind == "sdxl" else (Wan, WAN_PARTS)
    model = kind(spec, torch.device("cpu"), state, alone(1 << 34))
    for part in parts:
        model.parts[part].wake()
    chance = random.Random(11)
    prompts = [caption(evaluation_description(chance), chance) for _ in range(PICTURES + count)]
    steps = [PARAMS[name]["steps"] * share // 10 for share in (5, 8, 10)]
    made = [
        _render(model, RenderParams(prompt=text, negative_prompt=None, seed=seed, **PARAMS[name]))
        for seed, text in enumerate(track(prompts, name))
    ]
    moments = drawn_pictures(model.parts["vae"].module)
    for fitted in FITTED:
        while moments.pictures < fitted:
            latents, decoded = made[moments.pictures]
            moments = moments.plus(*pairs(latents[steps[-1]], decoded))  # type: ignore[misc]
        colours = moments.colours()
        for step in steps:
            errors = [_errors(colours, *one, step) for one in made[PICTURES:]]
            mean, ground = np.mean(errors, axis=0)
            worst = max(error for error, _ in errors)
            shown.add_row(
                name, f"{step} of {steps[-1]}", str(fitted),
                f"{mean:.1f}", f"{worst:.1f}", f"{ground:.1f}",
            )  # fmt: skip
        if sheets is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            _sheet(colours, made[PICTURES:], steps).save(sheets / f"{name}-{fitted}.png")


def _render(model: Any, params: RenderParams) -> tuple[dict[int, torch.Tensor], Any]:
    """Where each step expects the latents to end, and what is decoded of them."""
    seen: dict[int, torch.Tensor] = {}
    course = Course(params.seed, lambda step, _: seen.update({step: course.expected().clone()}))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        texts = model.encode(params, EmbeddingCache(Path(folder)))
        return seen, model.decode(model.denoise(params, texts, course))


def _wanted(latents: torch.Tensor, decoded: Any) -> Picture:
    found = pairs(latents, decoded)
    assert found is not None
    return found[1] * 255


def _errors(
    colours: Colours, latents: dict[int, torch.Tensor], decoded: Any, step: int
) -> tuple[float, float]:
    """Of all pixels, and of the ground."""
    preview = np.asarray(colours.picture(latents[step]), dtype=np.float64)
    wanted = _wanted(latents[step], decoded)
    grounds = [np.median(one, axis=(0, 1)) for one in (preview, wanted)]
    return float(np.abs(preview - wanted).mean()), float(np.abs(grounds[0] - grounds[1]).mean())


def _sheet(colours: Colours, made: list[tuple[dict[int, torch.Tensor], Any]], steps: list[int]
) -> Image.Image:  # fmt: skip
    columns = []
    for latents, decoded in made:
        pictures = [np.asarray(colours.picture(latents[step])) for step in steps]
        columns.append([_wanted(latents[steps[-1]], decoded).astype(np.uint8), *pictures])
    small = np.concatenate([np.concatenate(column, axis=0) for column in columns], axis=1)
    sheet = Image.fromarray(small)
    return sheet.resize((sheet.width * 6, sheet.height * 6), Image.Resampling.NEAREST)


if __name__ == "__main__":
    sys.exit(main())

"""What demo-video learns from: drawn pictures and clips, encoded once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from demo_models.scenes import Description, Scene, moved, place, training_description
from demo_models.training import run_stage
from demo_models.video_autoencoder import FRAMES, SIDE, pixels, quick_autoencoder
from demo_models.video_context import MODES, context, given_only, normalised

IMAGES, CLIPS, CONTEXTS = 3200, 1144, 360  # how many are encoded
_AT_ONCE = {"image": 32, "clip": 8, "context": 8}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture or clip before it is painted."""

    wanted: Description
    scenes: list[Scene]


def image(seed: int, index: int) -> Drawn:
    """One still picture; the same for the same numbers."""
    chance = random.Random(f"{seed} image {index}")
    wanted = training_description(chance)
    return Drawn(wanted, [place(wanted, chance)])


def clip(seed: int, index: int) -> Drawn:
    """One clip; three of five show one thing."""
    chance = random.Random(f"{seed} clip {index}")
    wanted = training_description(chance, motion=True, things=1 if chance.random() < 0.6 else 2)
    return Drawn(wanted, moved(place(wanted, chance), wanted.motion, FRAMES, chance))


def descriptions(kind: str, count: int, seed: int) -> list[Description]:
    """What the first images or clips show."""
    return [(image if kind == "image" else clip)(seed, index).wanted for index in range(count)]


def mode_of(index: int) -> str:
    """Which frames of a clip are given when the context layers learn."""
    return tuple(MODES)[index % len(MODES)]


def encoded(kind: str, count: int, vae: AutoencoderKLWan, folder: Path, seed: int) -> torch.Tensor:
    """Stage: normalised latents (count, 16, 1 or 5, 12, 12) of images, clips or given frames."""
    size = _AT_ONCE[kind]
    frames = 1 if kind == "image" else 5
    store = _Store(torch.zeros(count, 16, frames, SIDE // 8, SIDE // 8, dtype=torch.float16))

    @torch.no_grad()
    def step(number: int) -> Mapping[str, float]:
        rows = range(number * size, min(count, (number + 1) * size))
        drawn = [(image if kind == "image" else clip)(seed, row) for row in rows]
        clips = torch.stack([pixels(one.scenes) for one in drawn])
        if kind == "context":
            clips, _ = given_only(clips, [mode_of(row) for row in rows])
        store.latents[rows.start : rows.stop] = normalised(vae, clips).half()
        return {}

    with quick_autoencoder():
        run_stage(f"video-{kind}-latents", -(-count // size), step, {"store": store}, folder, seed)
    return store.latents[:count]


def contexts(
    inactive: torch.Tensor, vae: AutoencoderKLWan
) -> Callable[[Sequence[int]], torch.Tensor]:
    """What the context layers see of these clips, by their numbers: (numbers, 96, 5, 12, 12)."""
    blank = torch.zeros(1, 3, FRAMES, SIDE, SIDE)
    masks = {mode: given_only(blank, [mode])[1] for mode in MODES}
    with torch.no_grad():  # nothing of a grey frame is to be kept while it is changed
        reactive = normalised(vae, blank)

    def make(rows: Sequence[int]) -> torch.Tensor:
        return context(
            inactive[list(rows)].float(),
            reactive.expand(len(rows), -1, -1, -1, -1),
            torch.cat([masks[mode_of(row)] for row in rows]),
        )

    return make


class _Store:
    """A tensor that is saved and resumed like a network."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def state_dict(self) -> dict[str, Any]:
        return {"latents": self.latents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.latents = state["latents"]

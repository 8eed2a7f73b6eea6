"""What demo-video learns from: drawn pictures and clips, encoded once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from demo_models.layout import layout
from demo_models.scenes import Description, Scene, moved, place, training_description
from demo_models.training import run_stage
from demo_models.video_autoencoder import FRAMES, SIDE, pixels, quick_autoencoder
from demo_models.video_context import MODES, context, given_only, normalised

IMAGES, CLIPS, CONTEXTS = 6400, 3200, 900  # how many are encoded
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
    """One clip; three of five show one thing, and three of eight turn.

    Turning is the hardest motion to learn: only corners move, and none of them far.
    """
    chance = random.Random(f"{seed} clip {index}")
    things = 1 if chance.random() < 0.6 else 2
    turning = chance.random() < 0.25
    wanted = training_description(chance, motion=True, things=things)
    while turning and wanted.motion != "turning":
        wanted = training_description(chance, motion=True, things=things)
    return Drawn(wanted, moved(place(wanted, chance), wanted.motion, FRAMES, chance))


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a denoiser learns from; row by row the same picture or clip."""

    latents: torch.Tensor  # (count, 16, latent frames, 12, 12)
    descriptions: Sequence[Description]
    layouts: torch.Tensor  # (count, CLASSES, latent frames, 6, 6): of each token of the denoiser
    inactive: torch.Tensor  # (given, 16, 5, 12, 12): given frames of the first clips, encoded
    empty: torch.Tensor  # (1, 16, latent frames, 12, 12): empty frames, encoded

    @property
    def given(self) -> int:
        """How many clips have given frames."""
        return len(self.inactive)

    def context(self, rows: Sequence[int], given: int) -> torch.Tensor:
        """What the context layers see, (rows, 96, latent frames, 12, 12).

        rows: of which the first `given` have their given frames, and the rest nothing.
        """
        latent_frames = self.empty.shape[2]
        frames = 4 * latent_frames - 3
        masks = torch.ones(len(rows), 1, frames, SIDE, SIDE)
        for at, row in enumerate(rows[:given]):
            masks[at, :, list(MODES[mode_of(row)])] = 0
        nothing = self.empty.expand(len(rows), -1, -1, -1, -1)
        inactive = torch.cat([self.inactive[list(rows[:given])].float(), nothing[given:]])
        return context(inactive, nothing, masks)


def lessons(kind: str, vae: AutoencoderKLWan, folder: Path, seed: int) -> Lessons:
    """Stages: everything that is encoded of images or clips. kind: image | clip."""
    count = IMAGES if kind == "image" else CLIPS
    drawn = [(image if kind == "image" else clip)(seed, row) for row in range(count)]
    # A later latent frame is four frames: the third is near its middle.
    moments = (0,) if kind == "image" else (0, 3, 7, 11, 15)
    layouts = layout([one.scenes[at] for one in drawn for at in moments], 6, 6)
    layouts = layouts.unflatten(0, (count, len(moments))).transpose(1, 2).half()
    latents = encoded(kind, count, vae, folder, seed)
    inactive = latents[:0]
    if kind == "clip":
        inactive = encoded("context", CONTEXTS, vae, folder, seed)
    with torch.no_grad():
        blank = torch.zeros(1, 3, 4 * latents.shape[2] - 3, SIDE, SIDE)
        empty = normalised(vae, blank)
    return Lessons(latents, [one.wanted for one in drawn], layouts, inactive, empty)


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


class _Store:
    """A tensor that is saved and resumed like a network."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def state_dict(self) -> dict[str, Any]:
        return {"latents": self.latents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.latents = state["latents"]

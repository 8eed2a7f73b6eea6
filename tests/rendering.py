"""Renders with a loaded image or video model, without an engine around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worker.catalog import ModelSpec
from worker.engine.leases import alone
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.media.sdxl import PARTS as SDXL_PARTS
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.protocol.messages import RenderParams


def load(spec: ModelSpec, state_dir: Path) -> Any:
    """On a CPU that belongs to it alone, parked."""
    return load_on(torch.device("cpu"), spec, state_dir)


def load_on(device: torch.device, spec: ModelSpec, state_dir: Path) -> Any:
    kind = Sdxl if spec.kind == "sdxl" else Wan
    return kind(spec, device, state_dir, alone(1 << 34))


def render(
    model: Any, params: RenderParams, state_dir: Path, on_step: Callable[[int], None] | None = None
) -> Any:
    """A picture, or all frames of a video, with everything resident."""
    parts = SDXL_PARTS if isinstance(model, Sdxl) else ("text_encoder", "transformer", "vae")
    with ExitStack() as stack:
        for name in parts:
            model.parts[name].wake()
            stack.callback(model.parts[name].park)
        texts = model.encode(params, EmbeddingCache(state_dir / "embeddings"))
        latents = model.denoise(
            params, texts, Course(params.seed, lambda step, _: on_step(step) if on_step else None)
        )
        return model.decode(latents)


def psnr(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Of pictures of 0 to 255, in dB; the same ones have infinitely much."""
    apart = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float((apart**2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf

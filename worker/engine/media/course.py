"""How one denoising goes: its random numbers, and who is told of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Called after denoise step `step` (from 1) with the latents that it made; may raise to end the
# denoising.
OnStep = Callable[[int, torch.Tensor], None]


class Course:
    """One denoising of one picture or video. Engine thread only."""

    def __init__(self, seed: int, on_step: OnStep):
        """seed: of the CPU generator that every random number comes from."""
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self._on_step = on_step

    @contextmanager
    def of(self, pipeline: Any, denoiser: nn.Module) -> Iterator[dict[str, Any]]:
        """Arguments of the pipeline's call, which has to happen within it; the pipeline has its
        fresh scheduler by now. denoiser: the module that it calls in every step."""

        def step_done(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._on_step(index + 1, tensors["latents"])
            return tensors

        yield {"generator": self.generator, "callback_on_step_end": step_done}

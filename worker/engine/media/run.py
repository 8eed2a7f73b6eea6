"""One job on its way through the media engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from worker.catalog import ModelSpec
from worker.engine.host import Ticket
from worker.engine.media.embeddings import Tensors
from worker.engine.media.progress import Track
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.errors import Cancelled
from worker.protocol.messages import RenderJob


@dataclass(eq=False, slots=True)
class Run:
    """A job while it is rendered. Engine thread only."""

    ticket: Ticket
    job: RenderJob
    spec: ModelSpec
    model: Sdxl | Wan
    configs: str  # names the model's configs, as they were loaded
    track: Track
    is_cancelled: Callable[[], bool]
    was_loaded: bool = True  # the model, when the job began
    counts: dict[str, int] | None = None  # tokens of the prompt; None: not looked at yet
    given: Any = None  # what the job brings with it; None where it brings nothing
    texts: Tensors | None = None  # what the denoiser reads of them; None: not known yet
    embeddings: str | None = None  # computed | found; None: the texts were not needed
    latents: list[torch.Tensor] | None = None  # of its pictures, in host memory, once they are made
    scheduler_class: str | None = None  # that made them
    batch: dict[str, int] | None = None  # jobs and images that were denoised together
    taken: list[dict[str, Any]] = field(default_factory=list)  # what was done, by phase
    told: dict[str, Any] = field(default_factory=dict)  # of its checkpoint, for the receipt

    @property
    def more(self) -> dict[str, Any]:
        return {} if self.given is None else {"given": self.given}

    @property
    def vae(self) -> tuple[Any, str]:
        """The VAE and the hash of its weights."""
        components = self.model.components
        return self.model.parts["vae"].module, components.get("vae") or components["checkpoint"]

    @property
    def ended(self) -> Cancelled:
        """What a cancelled job is told after a step."""
        return Cancelled(
            f"the job was cancelled after step {self.track.done} of {self.track.steps}"
        )

"""SDXL text-to-image through diffusers' own pipeline, called once per image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from worker.catalog import ModelSpec
from worker.engine.media.components import component_hashes
from worker.engine.media.schedulers import fresh_sdxl
from worker.errors import ModelUnavailable, PromptTooLong
from worker.modelfiles import require_files, weight_bytes
from worker.protocol.messages import RenderParams

# Called after denoise step `step` (from 1); may raise to end the render.
OnStep = Callable[[int], None]


class Sdxl:
    """A loaded SDXL pipeline. Engine thread only."""

    def __init__(self, spec: ModelSpec, device: torch.device, state_dir: Path):
        """Raises ModelUnavailable."""
        from diffusers import StableDiffusionXLPipeline
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        require_files(spec)
        self.components = component_hashes(spec, state_dir)
        self.weight_bytes = weight_bytes(spec)
        # diffusers adds an invisible watermark whenever the library for it is installed; a
        # picture must not depend on that.
        options: dict[str, Any] = {
            "dtype": getattr(torch, spec.dtype),
            "local_files_only": True,
            "add_watermarker": False,
        }
        try:
            if spec.path.is_file():
                pipeline = StableDiffusionXLPipeline.from_single_file(
                    str(spec.path), config=str(spec.config_path), **options
                )
            else:
                pipeline = StableDiffusionXLPipeline.from_pretrained(
                    str(spec.path), use_safetensors=True, **options
                )
            _require_weights(pipeline)
        except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as exc:
            raise ModelUnavailable(f"{spec.id}: {spec.shown_path} does not load: {exc}") from exc
        self._pipeline = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler

    def describe(self) -> dict[str, Any]:
        return {"components": self.components, "pipeline": type(self._pipeline).__name__}

    def token_counts(self, text: str) -> dict[str, int]:
        """Tokens of `text` per encoder, begin and end tokens included.

        Raises PromptTooLong when one takes fewer: the pipeline would cut the text silently.
        """
        counts = {}
        for name in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(self._pipeline, name)
            count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
            limit = tokenizer.model_max_length
            if count > limit:
                raise PromptTooLong(
                    f"the text has {count - 2} tokens and the picture's text encoder takes "
                    f"{limit - 2}; shorten it"
                )
            counts[name] = count
        return counts

    def image(self, params: RenderParams, seed: int, on_step: OnStep) -> Image.Image:
        """One picture: exactly the pipeline's own call with a CPU generator of `seed`."""
        pipeline = self._pipeline
        pipeline.scheduler = fresh_sdxl(self._own_scheduler, params.scheduler)

        def step_done(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(index + 1)
            return tensors

        result = pipeline(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            width=params.width,
            height=params.height,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=step_done,
        )
        picture: Image.Image = result.images[0]
        return picture

    @property
    def scheduler_class(self) -> str:
        """The class that made the last picture."""
        return type(self._pipeline.scheduler).__name__


def _require_weights(pipeline: Any) -> None:
    """Raise ValueError for a weight without a value: a single file may lack it, unnoticed."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            for name, weight in module.named_parameters():
                if weight.is_meta:
                    raise ValueError(f"it has no weight for {part}.{name}")

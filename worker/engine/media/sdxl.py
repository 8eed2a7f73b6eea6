"""SDXL text-to-image through diffusers' own pipeline, in three phases: encode, denoise, decode.

Each phase computes with other parts of the model, so each of them can be on the device alone. The
picture is the one of the pipeline's own single call, to the bit
(tests/integration/test_media_phases.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from worker.catalog import ModelSpec
from worker.engine.leases import Leases
from worker.engine.media.components import component_hashes, tokenizer_hashes
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache, Tensors, computed_on, embedding_key
from worker.engine.media.parts import Parts
from worker.engine.media.pipelines import computing_on, module_configs
from worker.engine.media.schedulers import fresh_sdxl
from worker.errors import ModelUnavailable, PromptTooLong
from worker.modelfiles import require_files, weight_bytes
from worker.protocol.messages import RenderParams
from worker.vram.phases import Phase, image_phases
from worker.vram.planner import shape_of

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


class Sdxl:
    """An SDXL pipeline whose weights are in host memory. Engine thread only."""

    def __init__(self, spec: ModelSpec, device: torch.device, state_dir: Path, leases: Leases):
        """Load it; nothing of it is on the device then. Raises ModelUnavailable."""
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
        self._pipeline = computing_on(pipeline, device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler
        self._spec = spec
        self._device = device
        self._tokenizers = tokenizer_hashes(pipeline.tokenizer, pipeline.tokenizer_2)
        self._configs = module_configs(pipeline, PARTS)
        modules = {name: getattr(pipeline, name) for name in PARTS}
        self.parts = Parts(spec, modules, device, leases)

    def close(self) -> None:
        """Give everything back that it holds."""
        self.parts.close()

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

    def phases(self, params: RenderParams) -> dict[str, Phase]:
        """What one picture takes, by the phase's name."""
        made = image_phases(self._configs, self._spec.dtype, shape_of(params))
        return {one.name: one for one in made}

    def parts_in_order(self) -> tuple[tuple[str, ...], ...]:
        """Parts as the phases of a job need them."""
        return PARTS[:2], PARTS[2:3]

    def known_texts(self, params: RenderParams, cache: EmbeddingCache) -> Tensors | None:
        """What the text encoders would make of these texts, if it is known."""
        return cache.get(self._key(params))

    @torch.inference_mode()
    def encode(self, params: RenderParams, cache: EmbeddingCache) -> Tensors:
        """What the denoiser reads of the texts."""
        made = self._pipeline.encode_prompt(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            device=self._device,
            do_classifier_free_guidance=params.guided,
        )
        texts = {name: one for name, one in zip(_TEXTS, made, strict=True) if one is not None}
        cache.put(self._key(params), texts)
        return texts

    def denoise(self, params: RenderParams, texts: Tensors, course: Course) -> torch.Tensor:
        """Latents of one picture: the pipeline's own call."""
        pipeline = self._pipeline
        pipeline.scheduler = fresh_sdxl(self._own_scheduler, params.scheduler)
        with course.of(pipeline, pipeline.unet) as arguments:
            latents: torch.Tensor = pipeline(
                **{name: one.to(self._device) for name, one in texts.items()},
                width=params.width,
                height=params.height,
                num_inference_steps=params.steps,
                guidance_scale=params.guidance_scale,
                output_type="latent",
                **arguments,
            ).images
        return latents

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Image.Image:
        """The picture of latents, as the end of the pipeline's call makes it."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        config = vae.config
        # In float16 the published VAE overflows.
        upcast = vae.dtype == torch.float16 and config.force_upcast
        try:
            if upcast:
                vae.to(dtype=torch.float32)
                latents = latents.to(next(iter(vae.post_quant_conv.parameters())).dtype)
            mean, deviation = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
            if mean is not None and deviation is not None:
                mean, deviation = (
                    torch.tensor(one).view(1, 4, 1, 1).to(latents.device, latents.dtype)
                    for one in (mean, deviation)
                )
                latents = latents * deviation / config.scaling_factor + mean
            else:
                latents = latents / config.scaling_factor
            image = vae.decode(latents, return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype=torch.float16)
        picture: Image.Image = pipeline.image_processor.postprocess(image, output_type="pil")[0]
        return picture

    def _key(self, params: RenderParams) -> str:
        guided = params.guided
        return embedding_key(
            encoders={k: v for k, v in self.components.items() if k != "unet" and k != "vae"},
            configs={part: self._configs[part] for part in PARTS[:2]},
            zeros_when_empty=self._pipeline.config.force_zeros_for_empty_prompt,
            tokenizers=self._tokenizers,
            dtype=self._spec.dtype,
            **computed_on(self._device),
            texts=[params.prompt, params.negative_prompt if guided else None],
            guided=guided,
        )

    @property
    def scheduler_class(self) -> str:
        """The class that made the last picture."""
        return type(self._pipeline.scheduler).__name__


_TEXTS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def _require_weights(pipeline: Any) -> None:
    """Raise ValueError for a weight without a value: a single file may lack it, unnoticed."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            for name, weight in module.named_parameters():
                if weight.is_meta:
                    raise ValueError(f"it has no weight for {part}.{name}")

"""WAN 2.1 text-to-video through diffusers' own pipelines.

The pipeline's text path repairs and trims a prompt before it is encoded (HTML entities, runs of
spaces, mis-decoded characters). Here the prompt is encoded as it arrived and handed over as
embeddings, so nothing is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from worker.catalog import ModelSpec
from worker.engine.leases import Leases
from worker.engine.media.components import component_hashes
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache, Tensors, computed_on, embedding_key
from worker.engine.media.files import Frames
from worker.engine.media.parts import Parts
from worker.engine.media.pipelines import computing_on, module_configs
from worker.engine.media.schedulers import fresh_wan
from worker.errors import ModelUnavailable, PromptTooLong
from worker.modelfiles import file_sha256, require_files, weight_bytes
from worker.protocol.messages import RenderParams
from worker.vram.phases import Phase, video_phases
from worker.vram.planner import shape_of

# Positions of the text encoder that WAN 2.1 was trained with (text_len of its own config).
TEXT_TOKENS = 512
PARTS = ("text_encoder", "transformer", "vae")


class Wan:
    """A WAN pipeline whose weights are in host memory. Engine thread only."""

    def __init__(self, spec: ModelSpec, device: torch.device, state_dir: Path, leases: Leases):
        """Load it; nothing of it is on the device then. Raises ModelUnavailable."""
        from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanVACEPipeline

        require_files(spec)
        self.components = component_hashes(spec, state_dir)
        self.weight_bytes = weight_bytes(spec)
        try:
            # The VAE stays in float32, as its publishers run it: its decode shows banding in
            # half precision.
            vae = AutoencoderKLWan.from_pretrained(
                str(spec.path),
                subfolder="vae",
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
            )
            # The class that the checkpoint names: a VACE one makes its clips with the context
            # layers beside the others, with no given frames too.
            pipeline = DiffusionPipeline.from_pretrained(
                str(spec.path),
                vae=vae,
                dtype=getattr(torch, spec.dtype),
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise ModelUnavailable(f"{spec.id}: {spec.shown_path} does not load: {exc}") from exc
        if not isinstance(pipeline, WanPipeline | WanVACEPipeline):
            raise ModelUnavailable(
                f"{spec.id}: {spec.shown_path} holds a {type(pipeline).__name__}; "
                "WanPipeline and WanVACEPipeline are taken"
            )
        if lacking := _weights_not_loaded(pipeline):
            raise ModelUnavailable(
                f"{spec.id}: {spec.shown_path} lacks {len(lacking)} weights, "
                f"{lacking[0]} among them"
            )
        self._pipeline = computing_on(pipeline, device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler
        self._device = device
        # As its file says, not as a tokenizer class of the library rebuilds it: that one drops
        # the byte fallback, and every emoji would become <unk>.
        self._tokenizer = Tokenizer.from_file(str(spec.path / "tokenizer" / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer_sha256 = file_sha256(spec.path / "tokenizer" / "tokenizer.json")
        self._pad_id = int(self._pipeline.text_encoder.config.pad_token_id)
        self._spec = spec
        self._configs = module_configs(pipeline, PARTS)
        modules = {name: getattr(pipeline, name) for name in PARTS}
        self.parts = Parts(spec, modules, device, leases)

    def close(self) -> None:
        """Give everything back that it holds."""
        self.parts.close()

    def describe(self) -> dict[str, Any]:
        return {"components": self.components, "pipeline": type(self._pipeline).__name__}

    def token_counts(self, text: str) -> dict[str, int]:
        """Tokens of `text`, end token included. Raises PromptTooLong above TEXT_TOKENS."""
        count = len(self._tokenizer.encode(text).ids)
        if count > TEXT_TOKENS:
            raise PromptTooLong(
                f"the text has {count} tokens and the video's text encoder takes "
                f"{TEXT_TOKENS}; shorten it"
            )
        return {"tokenizer": count}

    def phases(self, params: RenderParams) -> dict[str, Phase]:
        """What one video takes, by the phase's name."""
        made = video_phases(self._configs, self._spec.dtype, shape_of(params))
        return {one.name: one for one in made}

    def parts_in_order(self) -> tuple[tuple[str, ...], ...]:
        """Parts as the phases of a job need them; the text encoder is too large to come early."""
        return (PARTS[1:2],)

    def known_texts(self, params: RenderParams, cache: EmbeddingCache) -> Tensors | None:
        """What the text encoder would make of these texts, if it is known of all of them."""
        found: Tensors = {}
        for name, text in _texts(params).items():
            one = cache.get(self._key(text))
            if one is None:
                return None
            found[name] = one["embeddings"]
        return found

    def encode(self, params: RenderParams, cache: EmbeddingCache) -> Tensors:
        """What the denoiser reads of the texts."""
        made: Tensors = {}
        for name, text in _texts(params).items():
            made[name] = self.encoded(text)
            cache.put(self._key(text), {"embeddings": made[name]})
        return made

    def denoise(self, params: RenderParams, texts: Tensors, course: Course) -> Any:
        """Latents of one video: the pipeline's own call."""
        pipeline = self._pipeline
        pipeline.scheduler = fresh_wan(self._own_scheduler, params.scheduler, params.shift)
        with course.of(pipeline, pipeline.transformer) as arguments:
            return pipeline(
                **{name: one.to(self._device) for name, one in texts.items()},
                width=params.width,
                height=params.height,
                num_frames=params.frames,
                num_inference_steps=params.steps,
                guidance_scale=params.guidance_scale,
                output_type="latent",
                max_sequence_length=TEXT_TOKENS,
                **arguments,
            ).frames

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Frames:
        """All frames of one video, (frames, height, width, 3), as the end of the pipeline's call
        makes them."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        latents = latents.to(vae.dtype)
        mean, deviation = (
            torch.tensor(one).view(1, vae.config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
            for one in (vae.config.latents_mean, vae.config.latents_std)
        )
        decoded = vae.decode(latents / (1.0 / deviation) + mean, return_dict=False)[0]
        video = pipeline.video_processor.postprocess_video(decoded, output_type="np")[0]
        # (frames, height, width, 3) float in 0 .. 1
        return np.asarray((video * 255).round(), dtype=np.uint8)

    @torch.inference_mode()
    def encoded(self, text: str) -> torch.Tensor:
        """Embeddings (1, TEXT_TOKENS, width) of the text as it is, zero after its last token."""
        pipeline = self._pipeline
        ids = self._tokenizer.encode(text).ids
        padded = ids + [self._pad_id] * (TEXT_TOKENS - len(ids))
        mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=self._device)
        mask[0, : len(ids)] = 1
        hidden = pipeline.text_encoder(
            torch.tensor([padded], device=self._device), mask
        ).last_hidden_state  # (1, TEXT_TOKENS, width)
        embeddings: torch.Tensor = hidden * mask.unsqueeze(-1).to(hidden.dtype)
        return embeddings.to(pipeline.transformer.dtype)

    def _key(self, text: str) -> str:
        return embedding_key(
            encoder=self.components.get("text_encoder"),
            tokenizer=self._tokenizer_sha256,
            dtype=[self._spec.dtype, str(self._pipeline.transformer.dtype)],
            config=self._configs["text_encoder"],
            pad_id=self._pad_id,
            **computed_on(self._device),
            text=text,
        )

    @property
    def scheduler_class(self) -> str:
        """The class that made the last video."""
        return type(self._pipeline.scheduler).__name__


def _texts(params: RenderParams) -> dict[str, str]:
    """Guidance needs a second text; when none was sent it is the empty one."""
    texts = {"prompt_embeds": params.prompt}
    if params.guided:
        texts["negative_prompt_embeds"] = params.negative_prompt or ""
    return texts


def _weights_not_loaded(pipeline: Any) -> list[str]:
    """Names of the weights that no file had: diffusers warns and leaves them without memory."""
    return sorted(
        f"{part}.{name}"
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, weight in module.named_parameters()
        if weight.is_meta
    )

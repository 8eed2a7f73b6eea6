"""WAN 2.1 video through diffusers' own pipelines: of a text, and with VACE of pictures, too.

The pipeline's text path repairs and trims a prompt before it is encoded (HTML entities, runs of
spaces, mis-decoded characters). Here the prompt is encoded as it arrived and handed over as
embeddings, so nothing is changed.

A checkpoint that is a VACE one makes all of its videos with it. A text-to-video checkpoint can
have a VACE transformer beside it (catalog: an adapter of kind "vace"): it makes the videos that
pictures are given for, with the text encoder and the VAE that are there, and the checkpoint's own
transformer makes the others.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from worker.engine.media.frames import ROLES, Given, given_pictures
from worker.engine.media.parts import Parts
from worker.engine.media.pipelines import computing_on, module_configs
from worker.engine.media.schedulers import fresh_wan
from worker.errors import ModelUnavailable, Unsupported
from worker.modelfiles import file_sha256, require_files, weight_bytes
from worker.protocol.messages import Reference, RenderParams
from worker.vram.adapters import require_vace
from worker.vram.phases import VIDEO_TEXT_TOKENS, Phase, video_phases
from worker.vram.planner import shape_of
from worker.vram.texts import require_short

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
            beside = _vace_beside(pipeline, spec)
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise ModelUnavailable(f"{spec.id}: {spec.shown_path} does not load: {exc}") from exc
        if not isinstance(pipeline, WanPipeline | WanVACEPipeline):
            raise ModelUnavailable(
                f"{spec.id}: {spec.shown_path} holds a {type(pipeline).__name__}; "
                "WanPipeline and WanVACEPipeline are taken"
            )
        lacking = _weights_not_loaded(pipeline) + (_weights_not_loaded(beside) if beside else [])
        if lacking:
            raise ModelUnavailable(
                f"{spec.id}: {spec.shown_path} lacks {len(lacking)} weights, "
                f"{lacking[0]} among them"
            )
        self._pipeline = computing_on(pipeline, device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._own_scheduler = self._pipeline.scheduler
        # Makes the videos that pictures are given for.
        self._vace = self._pipeline if isinstance(pipeline, WanVACEPipeline) else None
        modules = {name: getattr(pipeline, name) for name in PARTS}
        self._configs = module_configs(pipeline, PARTS)
        if beside is not None:
            self._vace = computing_on(beside, device)
            self._vace.set_progress_bar_config(disable=True)
            modules["vace"] = beside.transformer
            self._configs["vace"] = module_configs(beside, ("transformer",))["transformer"]
        self._last = self._pipeline  # that made a video
        self._device = device
        # As its file says, not as a tokenizer class of the library rebuilds it: that one drops
        # the byte fallback, and every emoji would become <unk>.
        self._tokenizer = Tokenizer.from_file(str(spec.path / "tokenizer" / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer_sha256 = file_sha256(spec.path / "tokenizer" / "tokenizer.json")
        self._pad_id = int(self._pipeline.text_encoder.config.pad_token_id)
        self._spec = spec
        self.parts = Parts(spec, modules, device, leases)

    def close(self) -> None:
        """Give everything back that it holds."""
        self.parts.close()

    def describe(self) -> dict[str, Any]:
        return {
            "components": self.components,
            "pipeline": type(self._pipeline).__name__,
            "modes": ["text"] if self._vace is None else list(ROLES),
        }

    def check(self, params: RenderParams) -> None:
        """Raises Unsupported for a job that this checkpoint cannot do as it stands."""
        if params.mode not in ROLES:
            raise Unsupported(f"mode {params.mode} is none of a video; known: {', '.join(ROLES)}")
        if params.weighted:
            raise Unsupported("the video's text encoder takes no weights of words")
        if params.loras:
            raise Unsupported("LoRAs are added to image models only")
        require_vace(self._spec, params, self._vace is not None)

    def given(self, params: RenderParams, references: Sequence[Reference]) -> Given:
        """The job's pictures, ready for `denoise`. Raises InvalidRequest, and as `check`."""
        self.check(params)
        return given_pictures(params, references)

    def token_counts(self, text: str) -> dict[str, int]:
        """Tokens of `text`, end token included. Raises PromptTooLong above VIDEO_TEXT_TOKENS."""
        count = len(self._tokenizer.encode(text).ids)
        require_short(count)
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

    def encode(
        self, params: RenderParams, cache: EmbeddingCache, given: Given | None = None
    ) -> Tensors:
        """What the denoiser reads of the texts; pictures change nothing of it."""
        made: Tensors = {}
        for name, text in _texts(params).items():
            made[name] = self.encoded(text)
            cache.put(self._key(text), {"embeddings": made[name]})
        return made

    def denoise(
        self, params: RenderParams, texts: Tensors, course: Course, given: Given | None = None
    ) -> Any:
        """Latents of one video: the pipeline's own call. given: of a mode that takes pictures."""
        pipeline = self._pipeline if params.mode == "text" else self._vace
        assert pipeline is not None and (given is not None or params.mode == "text"), params.mode
        more = given.arguments(params.frames) if given is not None else {}
        pipeline.scheduler = fresh_wan(self._own_scheduler, params.scheduler, params.shift)
        self._last = pipeline
        with course.of(pipeline, pipeline.transformer) as arguments:
            latents = pipeline(
                **{name: one.to(self._device) for name, one in texts.items()},
                width=params.width,
                height=params.height,
                num_frames=params.frames,
                num_inference_steps=params.steps,
                guidance_scale=params.guidance_scale,
                output_type="latent",
                max_sequence_length=VIDEO_TEXT_TOKENS,
                **more,
                **arguments,
            ).frames
        # Those of references are denoised with the video's own, in front of them.
        return latents[:, :, len(given.references) if given is not None else 0 :]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Frames:
        """All frames of one video, (frames, height, width, 3), as the end of the pipeline's call
        makes them."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        latents = latents.to(self._device, vae.dtype)
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
        """Embeddings (1, VIDEO_TEXT_TOKENS, width) of the text as it is, zero after its end."""
        pipeline = self._pipeline
        ids = self._tokenizer.encode(text).ids
        padded = ids + [self._pad_id] * (VIDEO_TEXT_TOKENS - len(ids))
        mask = torch.zeros(1, VIDEO_TEXT_TOKENS, dtype=torch.long, device=self._device)
        mask[0, : len(ids)] = 1
        hidden = pipeline.text_encoder(
            torch.tensor([padded], device=self._device), mask
        ).last_hidden_state  # (1, VIDEO_TEXT_TOKENS, width)
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
        return type(self._last.scheduler).__name__


def _texts(params: RenderParams) -> dict[str, str]:
    """Guidance needs a second text; when none was sent it is the empty one."""
    texts = {"prompt_embeds": params.prompt}
    if params.guided:
        texts["negative_prompt_embeds"] = params.negative_prompt or ""
    return texts


def _vace_beside(pipeline: Any, spec: ModelSpec) -> Any:
    """A VACE pipeline of the transformer that is configured, and of everything else that
    `pipeline` has; None without one. Raises as its loading does, and ValueError."""
    from diffusers import WanPipeline, WanVACEPipeline, WanVACETransformer3DModel

    folder = spec.vace_folder
    if folder is None:
        return None
    if not isinstance(pipeline, WanPipeline):
        raise ValueError("an adapter of kind vace belongs to a WanPipeline, which it is not")
    transformer = WanVACETransformer3DModel.from_pretrained(
        str(folder),
        dtype=getattr(torch, spec.dtype),
        local_files_only=True,
        use_safetensors=True,
    )
    for key in ("text_dim", "in_channels", "patch_size"):
        own, its = pipeline.transformer.config[key], transformer.config[key]
        if own != its:
            raise ValueError(f"{key} is {own}, and {its} of the VACE transformer beside it")
    others = {name: one for name, one in pipeline.components.items() if name != "transformer"}
    return WanVACEPipeline(transformer=transformer, **others)


def _weights_not_loaded(pipeline: Any) -> list[str]:
    """Names of the weights that no file had: diffusers warns and leaves them without memory."""
    return sorted(
        f"{part}.{name}"
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, weight in module.named_parameters()
        if weight.is_meta
    )

"""SDXL pictures through diffusers' own pipelines, in phases: picture, encode, denoise, decode.

Each phase computes with other parts of the model, so each of them can be on the device alone. The
picture is the one of the pipeline's own single call, to the bit
(tests/integration/test_media_phases.py and test_sdxl_references.py).

What a job brings with it is made ready on the host first (`given`): the picture that it begins
from, which the phase "picture" turns into latents; a picture that an IP-Adapter reads; LoRAs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from worker.catalog import ModelSpec
from worker.engine.leases import Leases
from worker.engine.media import ip_adapter, latents, loras
from worker.engine.media.components import adapter_hash, component_hashes, tokenizer_hashes
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache, Tensors, computed_on, embedding_key
from worker.engine.media.parts import Parts
from worker.engine.media.pictures import centred, the_one
from worker.engine.media.pipelines import computing_on, module_configs
from worker.engine.media.prompts import Prompts
from worker.engine.media.schedulers import fresh_sdxl
from worker.errors import InvalidRequest, ModelUnavailable, Unsupported
from worker.modelfiles import require_files, weight_bytes
from worker.protocol.messages import Reference, RenderParams
from worker.vram.adapters import READS, ip_adapter_of, lora_of, lora_size
from worker.vram.phases import Phase, Shape, image_phases
from worker.vram.planner import image_shape
from worker.vram.texts import prompt_of

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
BEGINS = ("image", "copy")  # modes that begin from a picture
MODES = ("text", *BEGINS, *READS)


@dataclass(slots=True)
class Given:
    """What came with a job, ready in host memory. Engine thread only."""

    receipt: dict[str, Any]  # what the job's receipt says of it
    begins_from: Image.Image | None = None  # in the job's size
    moments: torch.Tensor | None = None  # of that picture, once `see` has computed them
    loras: tuple[loras.Lora, ...] = ()
    adapter: ip_adapter.IpAdapter | None = None


class Sdxl:
    """An SDXL pipeline whose weights are in host memory. Engine thread only."""

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        state_dir: Path,
        leases: Leases,
        long_prompts: str = "chunk",
    ):
        """Load it; nothing of it is on the device then. long_prompts: chunk | refuse.

        Raises ModelUnavailable.
        """
        from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
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
        # The same parts once more, for what begins from a picture.
        zeros = pipeline.config.force_zeros_for_empty_prompt
        begins = StableDiffusionXLImg2ImgPipeline(
            **pipeline.components, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
        self._from_picture = computing_on(begins, device)
        for one in (self._pipeline, self._from_picture):
            one.set_progress_bar_config(disable=True)
        self._last = self._pipeline  # that made a picture
        self._own_scheduler = self._pipeline.scheduler
        self._prompts = Prompts(self._pipeline, long_prompts)
        self._pictures = ip_adapter.Pictures()
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
        reads = self._spec.ip_adapter is not None
        return {
            "components": self.components,
            "pipeline": type(self._pipeline).__name__,
            "modes": [one for one in MODES if reads or one not in READS],
            "loras": [one.id for one in self._spec.adapters if one.kind == "lora"],
        }

    def token_counts(self, text: str) -> dict[str, int]:
        """Tokens of `text` per encoder, begin and end tokens of one piece included.

        Raises PromptTooLong when one takes fewer: nothing is cut silently.
        """
        return self._prompts.counts(text)

    def check(self, params: RenderParams) -> None:
        """Raises Unsupported and PromptTooLong for a job that cannot be done as it stands, and
        ModelUnavailable when files that it needs are missing or damaged."""
        if params.mode not in MODES:
            raise Unsupported(f"mode {params.mode} is none of a picture; known: {', '.join(MODES)}")
        self._shape(params)

    def given(self, params: RenderParams, references: Sequence[Reference]) -> Given:
        """Make ready what a job brings with it. Touches no device.

        Raises as `check`, InvalidRequest when its pictures are not those of its mode or cannot be
        read, and OutOfHostMemory.
        """
        self.check(params)
        given = Given(self._told_of_texts(params))
        if params.mode == "text" and references:
            raise InvalidRequest(f"mode text takes no picture, the job came with {len(references)}")
        if params.mode in BEGINS:
            picture = centred(the_one(references, params.mode), params.width, params.height)
            given.begins_from = picture.pixels
            given.receipt |= {"reference_mode": params.mode, "references": [picture.told]}
        if params.mode in READS:
            sent = the_one(references, params.mode)
            given.adapter = self._pictures.read(ip_adapter_of(self._spec), sent)
            given.receipt |= {
                "reference_mode": params.mode,
                "references": [given.adapter.picture],
                "ip_adapter": given.adapter.told | {"strength": _strength(params)},
            }
        if params.loras:
            dtype = getattr(torch, self._spec.dtype)
            given.loras = tuple(
                loras.read_lora(use, lora_of(self._spec, use), self._pipeline, dtype)
                for use in params.loras
            )
            given.receipt["loras"] = [one.told for one in given.loras]
        return given

    def phases(self, params: RenderParams) -> dict[str, Phase]:
        """What one picture takes, by the phase's name, in their order. Raises as `check`.

        One that begins from a picture has the phase "picture" before all others. Where nothing of
        that is denoised (strength 0), there is no "encode" and no "denoise".
        """
        made = image_phases(self._configs, self._spec.dtype, self._shape(params))
        return {one.name: one for one in made}

    def parts_in_order(self) -> tuple[tuple[str, ...], ...]:
        """Parts as the phases of a job need them."""
        return PARTS[:2], PARTS[2:3]

    def see(self, params: RenderParams, given: Given) -> None:
        """The phase "picture": `given` has latents afterwards, for all of the job's pictures."""
        pipeline = self._from_picture
        pixels = pipeline.image_processor.preprocess(given.begins_from).to(self._device)
        given.moments = latents.moments_of(pipeline.vae, pixels, pipeline.unet.dtype)

    def known_texts(self, params: RenderParams, cache: EmbeddingCache) -> Tensors | None:
        """What the text encoders would make of these texts, if it is known. Nothing, where
        nothing is denoised."""
        return cache.get(self._key(params)) if params.passes else {}

    def encode(
        self, params: RenderParams, cache: EmbeddingCache, given: Given | None = None
    ) -> Tensors:
        """What the denoiser reads of the texts, on the CPU."""
        given = given or self.given(params, ())
        encoders = {part: getattr(self._pipeline, part) for part in loras.ENCODERS}
        with torch.inference_mode(), loras.adding(given.loras, encoders, self._device):
            texts = self._prompts.encoded(params, self._device)
        cache.put(self._key(params), texts)
        return texts

    def denoise(
        self, params: RenderParams, texts: Tensors, course: Course, given: Given | None = None
    ) -> torch.Tensor:
        """Latents of one picture: the pipeline's own call. Where nothing is denoised, they are the
        likeliest ones of the picture that the job begins from."""
        given = given or self.given(params, ())
        pipeline = self._pipeline if given.begins_from is None else self._from_picture
        dtype = pipeline.unet.dtype
        if not params.passes:
            assert given.moments is not None, "the phase picture comes first"
            return latents.latents_of(pipeline.vae, given.moments, dtype, None)
        pipeline.scheduler = fresh_sdxl(self._own_scheduler, params.scheduler)
        self._last = pipeline
        more: dict[str, Any] = {}
        with ExitStack() as stack:
            stack.enter_context(loras.adding(given.loras, {"unet": pipeline.unet}, self._device))
            if given.adapter is not None:
                more |= stack.enter_context(self._reading(params, given.adapter))
            arguments = stack.enter_context(course.of(pipeline, pipeline.unet))
            if given.begins_from is None:
                more |= {"width": params.width, "height": params.height}
            else:
                assert given.moments is not None, "the phase picture comes first"
                begin = latents.latents_of(
                    pipeline.vae, given.moments.to(self._device), dtype, arguments["generator"]
                )
                more |= {"image": begin, "strength": _strength(params)}
            made: torch.Tensor = pipeline(
                **{name: one.to(self._device) for name, one in texts.items()},
                num_inference_steps=params.nominal_steps,
                guidance_scale=params.guidance_scale,
                output_type="latent",
                **more,
                **arguments,
            ).images
        return made

    def decode(self, made: torch.Tensor) -> Image.Image:
        """The picture of latents, as the end of the pipeline's call makes it."""
        pixels = latents.decoded(self._pipeline.vae, made.to(self._device))
        picture: Image.Image = self._pipeline.image_processor.postprocess(
            pixels, output_type="pil"
        )[0]
        return picture

    @property
    def scheduler_class(self) -> str:
        """The class that made the last picture."""
        return type(self._last.scheduler).__name__

    @contextmanager
    def _reading(
        self, params: RenderParams, adapter: ip_adapter.IpAdapter
    ) -> Iterator[dict[str, Any]]:
        """Arguments of the pipeline's call, which has to happen within it."""
        pipeline, unet = self._pipeline, self._pipeline.unet
        with ip_adapter.reading(unet, adapter, self._device, unet.dtype):
            scale = ip_adapter.scale_of(unet, params.mode, _strength(params))
            pipeline.set_ip_adapter_scale(scale)
            embeddings = adapter.embeddings(params.guided, self._device, unet.dtype)
            yield {"ip_adapter_image_embeds": [embeddings]}

    def _shape(self, params: RenderParams) -> Shape:
        """Raises as `check`."""
        return image_shape(self._spec, params, self._prompts.pieces(params))

    def _told_of_texts(self, params: RenderParams) -> dict[str, Any]:
        """Of the whole prompt with its terms, and of the negative one."""
        prompt = prompt_of(params).whole
        told: dict[str, Any] = {"prompt_tokens": self._prompts.counts(prompt)}
        if params.negative_prompt is not None:
            told["negative_prompt_tokens"] = self._prompts.counts(params.negative_prompt)
        return told | {"text_pieces": self._prompts.pieces(params)}

    def _key(self, params: RenderParams) -> str:
        guided = params.guided
        prompt = prompt_of(params)
        used = [(lora_of(self._spec, use), use.weight) for use in params.loras if use.weight]
        return embedding_key(
            encoders={k: v for k, v in self.components.items() if k != "unet" and k != "vae"},
            configs={part: self._configs[part] for part in PARTS[:2]},
            zeros_when_empty=self._pipeline.config.force_zeros_for_empty_prompt,
            tokenizers=self._tokenizers,
            dtype=self._spec.dtype,
            **computed_on(self._device),
            texts=[prompt.parts, prompt.weights, params.negative_prompt if guided else None],
            guided=guided,
            loras=[
                (adapter_hash(spec.path), weight)
                for spec, weight in used
                if lora_size(spec).encoders
            ],
            pieces=self._prompts.pieces(params),
            compel=version("compel"),
        )


def _strength(params: RenderParams) -> float:
    """1 where none was sent: all of the noise, or all of what an adapter reads."""
    return 1.0 if params.strength is None else params.strength


def _require_weights(pipeline: Any) -> None:
    """Raise ValueError for a weight without a value: a single file may lack it, unnoticed."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            for name, weight in module.named_parameters():
                if weight.is_meta:
                    raise ValueError(f"it has no weight for {part}.{name}")

"""How many bytes a model's forward passes hold at once, found without weights and without a card.

The full-size architecture runs once on tensors that have a shape and no content; a tracker counts
the storages that are alive. Not counted: work space of cuDNN and cuBLAS, rounding and fragmentation
of the allocator, the context of the process.

`python -m worker.engine.peaks` reads one Question per line (JSON) from its input and writes one
Peak per line; the orchestrator, which never loads torch, starts it (worker/vram/sizes.py).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.engine.blocks import blocks_of
from worker.engine.casting import cast, cast_bytes
from worker.engine.parking import ALIGN_BYTES
from worker.vram.peak import Peak, Question

CLIP_TOKENS = 77  # positions of either of SDXL's text encoders
PICTURE_WIDTH = 1024  # of what an IP-Adapter is told of a picture, which is small beside all else
UMT5_TOKENS = 512
WAN_LATENT_FRAMES = 4  # frames of a video per latent frame, after the first
DENOISERS = ("unet", "transformer")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are made within it and are alive at the same time."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()):
        """existing: tensors that are not counted, such as weights."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._live: dict[int, int] = {}
        for tensor in existing:
            self._live[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._saw(tensor.untyped_storage())
        return out

    def _saw(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


def measure(question: Question) -> Peak:
    """Bytes of the weights and of everything else that is alive at the worst moment."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = build(question)
        parked = held(module, ALIGN_BYTES)
        is_denoiser = question.part in DENOISERS
        castable = cast_bytes(module, ALIGN_BYTES) if is_denoiser else 0
        blocks = [held(one, ALIGN_BYTES) for one in blocks_of(module)]
        return Peak(
            weight_bytes=held(module),
            parked_bytes=parked,
            peak_bytes=peak_of(module, question),
            # Blocks share no weights with each other or with the rest.
            streamed_bytes=parked - sum(blocks) + max(blocks, default=0),
            cast_bytes=castable,
        )


def peak_of(module: nn.Module, question: Question) -> int:
    """Bytes alive at the worst moment of one forward, inputs included, weights not, nor those of
    adapters."""
    from worker.engine.media.splitting import halved

    with ExitStack() as stack:
        added = stack.enter_context(_adapted(module, question))
        if question.split:
            stack.enter_context(halved(module))
        with LiveBytes([*module.parameters(), *module.buffers(), *added]) as live:
            _CALLS[question.part](module, question)
        return int(live.peak)


@contextmanager
def _adapted(module: nn.Module, q: Question) -> Iterator[list[torch.Tensor]]:
    """Within it a part of SDXL computes with a LoRA on each of its layers and with an IP-Adapter,
    where it is asked for them. Gives weights that are not the module's."""
    from worker.engine.media.loras import Scaled, hooked

    layers = {}
    if q.rank:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                weight, dtype = layer.weight, getattr(torch, q.dtype)
                down = weight.new_empty(q.rank, *weight.shape[1:], dtype=dtype)
                up = weight.new_empty(
                    weight.shape[0], q.rank, *[1] * (weight.dim() - 2), dtype=dtype
                )
                layers[name] = [Scaled(down, up, 1.0, 2.0)]
    with ExitStack() as stack:
        stack.enter_context(hooked(module, layers))
        if q.picture_tokens:
            stack.enter_context(_reading_a_picture(module, q))
        yield [tensor for [one] in layers.values() for tensor in (one.down, one.up)]


def build(question: Question) -> nn.Module:
    """The module of a part, with random weights (none under a FakeTensorMode)."""
    dtype = getattr(torch, question.dtype)
    with _default_dtype(dtype):
        module: nn.Module = _BUILDERS[question.part](question.config)
    kept = _kept_in_float32(module, dtype)
    if kept:
        for name, parameter in module.named_parameters():
            if any(one in name.split(".") for one in kept):
                parameter.data = parameter.data.float()
    if question.tiled:
        module.enable_tiling()  # type: ignore[operator]
    if question.cast:
        cast(module)
    return module.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _kept_in_float32(module: Any, dtype: torch.dtype) -> set[str]:
    """What the libraries load in float32 whatever is asked for: diffusers always what a model
    lists, transformers a part of that for float16 only."""
    listed = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if dtype == torch.float32:
        return set()
    if dtype == torch.bfloat16 and hasattr(module, "_keep_in_fp32_modules_strict"):
        return set(module._keep_in_fp32_modules_strict or ())
    return listed


def held(module: nn.Module, align_bytes: int = 1) -> int:
    """Bytes of parameters and buffers, each rounded up; what two share counts once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(math.ceil(size / align_bytes) * align_bytes for size in storages.values())


@contextmanager
def _reading_a_picture(unet: Any, q: Question) -> Iterator[None]:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    width = unet.config.cross_attention_dim
    before = dict(unet.attn_processors)
    with _default_dtype(getattr(torch, q.dtype)):
        made = {
            name: IPAdapterAttnProcessor2_0(
                unet.get_submodule(name.removesuffix(".processor")).to_k.out_features,
                width,
                num_tokens=[q.picture_tokens],
            )
            for name in before
            if name.endswith("attn2.processor")
        }
        layer = ImageProjection(PICTURE_WIDTH, width, q.picture_tokens)
    unet.set_attn_processor({**before, **made})
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    try:
        yield
    finally:
        unet.encoder_hid_proj = unet.config.encoder_hid_dim_type = None
        unet.set_attn_processor(before)


# --- what is built -------------------------------------------------------------------------------


def _diffusers(name: str) -> Callable[[dict[str, Any]], nn.Module]:
    def made(config: dict[str, Any]) -> nn.Module:
        import diffusers

        one: nn.Module = getattr(diffusers, config.get("_class_name", name)).from_config(config)
        return one

    return made


def _transformers(name: str) -> Callable[[dict[str, Any]], nn.Module]:
    def made(config: dict[str, Any]) -> nn.Module:
        import transformers

        known = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        settings = transformers.AutoConfig.for_model(**known)
        kind = getattr(transformers, (config.get("architectures") or [name])[0])
        one: nn.Module = kind(settings)
        return one

    return made


def _chat(config: dict[str, Any]) -> nn.Module:
    import transformers

    from worker.engine.chat.attention import NAME, register

    register()
    known = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    settings = transformers.AutoConfig.for_model(**known)
    settings._attn_implementation = NAME
    one: nn.Module = transformers.AutoModelForCausalLM.from_config(settings)
    return one


# --- what is run ---------------------------------------------------------------------------------


def _denoise_image(unet: Any, q: Question) -> Any:
    """One step: with guidance both texts in one batch, as diffusers does it."""
    dtype, batch = getattr(torch, q.dtype), q.batch
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * (
        unet.config.addition_time_embed_dim
    )
    more = {}
    if q.picture_tokens:
        more["image_embeds"] = [torch.empty(batch, 1, PICTURE_WIDTH, dtype=dtype)]
    return unet(
        sample=torch.empty(
            batch, unet.config.in_channels, q.height // 8, q.width // 8, dtype=dtype
        ),
        timestep=torch.tensor(5.0),
        encoder_hidden_states=torch.empty(
            batch, q.tokens or CLIP_TOKENS, unet.config.cross_attention_dim, dtype=dtype
        ),
        added_cond_kwargs={
            "text_embeds": torch.empty(batch, pooled, dtype=dtype),
            "time_ids": torch.empty(batch, 6, dtype=dtype),
            **more,
        },
        return_dict=False,
    )


def _decode_image(vae: Any, q: Question) -> Any:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent = torch.empty(
        q.batch, vae.config.latent_channels, q.height // factor, q.width // factor,
        dtype=getattr(torch, q.dtype),
    )  # fmt: skip
    return vae.decode(latent, return_dict=False)


def _encode_image(vae: Any, q: Question) -> Any:
    pixels = torch.empty(q.batch, 3, q.height, q.width, dtype=getattr(torch, q.dtype))
    return vae.encode(pixels).latent_dist


def _encode_clip(encoder: Any, q: Question) -> Any:
    ids = torch.zeros(q.batch, CLIP_TOKENS, dtype=torch.long)
    return encoder(ids, output_hidden_states=True)


def _denoise_video(transformer: Any, q: Question) -> Any:
    """One of the two passes of a step: diffusers makes them one after the other."""
    dtype, config = getattr(torch, q.dtype), transformer.config
    size = (latent_frames(q.frames), q.height // 8, q.width // 8)
    latents = torch.empty(1, config.in_channels, *size, dtype=dtype)
    text = torch.empty(1, UMT5_TOKENS, config.text_dim, dtype=dtype)
    more = {}
    if getattr(config, "vace_in_channels", None):
        more["control_hidden_states"] = torch.empty(1, config.vace_in_channels, *size, dtype=dtype)
        more["control_hidden_states_scale"] = torch.ones(len(config.vace_layers), dtype=dtype)
    return transformer(
        hidden_states=latents,
        timestep=torch.tensor([5.0]),
        encoder_hidden_states=text,
        return_dict=False,
        **more,
    )


def _decode_video(vae: Any, q: Question) -> Any:
    latent = torch.empty(
        1, vae.config.z_dim, latent_frames(q.frames), q.height // 8, q.width // 8,
        dtype=getattr(torch, q.dtype),
    )  # fmt: skip
    return vae.decode(latent, return_dict=False)


def _encode_frames(vae: Any, q: Question) -> Any:
    """What a VACE pipeline does with the frames that it is given, and where: all of it at once."""
    frames = torch.empty(1, 3, q.frames, q.height, q.width, dtype=getattr(torch, q.dtype))
    where = torch.where(torch.ones_like(frames) > 0.5, 1.0, 0.0).to(frames.dtype)
    kept, made = frames * (1 - where), frames * where
    return [vae.encode(one).latent_dist.mode() for one in (kept, made)]


def _encode_umt5(encoder: Any, q: Question) -> Any:
    ids = torch.zeros(1, UMT5_TOKENS, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # padding, as of every prompt but the longest: without it no mask is made
    return encoder(ids, mask).last_hidden_state


def _prefill(model: Any, q: Question) -> Any:
    """A pass over so many tokens with one row of logits for each of `batch` sequences."""
    from worker.engine.chat.attention import Rehearsal, computing

    with ExitStack() as stack:
        stack.enter_context(computing(Rehearsal()))
        return model(
            input_ids=torch.zeros(1, q.tokens, dtype=torch.long),
            position_ids=torch.arange(q.tokens)[None],
            use_cache=False,
            logits_to_keep=torch.arange(q.batch),
        ).logits


def latent_frames(frames: int) -> int:
    """Latent frames of a WAN video of 4n + 1 frames."""
    return math.ceil((frames - 1) / WAN_LATENT_FRAMES) + 1


_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": _diffusers("UNet2DConditionModel"),
    "vae": _diffusers("AutoencoderKL"),
    "image_vae_encoder": _diffusers("AutoencoderKL"),
    "text_encoder": _transformers("CLIPTextModel"),
    "text_encoder_2": _transformers("CLIPTextModelWithProjection"),
    "transformer": _diffusers("WanTransformer3DModel"),
    "video_vae": _diffusers("AutoencoderKLWan"),
    "video_vae_frames": _diffusers("AutoencoderKLWan"),
    "umt5": _transformers("UMT5EncoderModel"),
    "chat": _chat,
}
_CALLS: dict[str, Callable[[Any, Question], Any]] = {
    "unet": _denoise_image,
    "vae": _decode_image,
    "image_vae_encoder": _encode_image,
    "text_encoder": _encode_clip,
    "text_encoder_2": _encode_clip,
    "transformer": _denoise_video,
    "video_vae": _decode_video,
    "video_vae_frames": _encode_frames,
    "umt5": _encode_umt5,
    "chat": _prefill,
}


def main() -> int:
    """Answer every question of standard input."""
    logging.disable(logging.WARNING)  # the libraries' remarks on missing tokenizers and the like
    torch.set_num_threads(1)
    os.nice(10)  # somebody waits for it, and others for what they asked before
    for line in sys.stdin:
        peak = measure(msgspec.json.decode(line, type=Question))
        print(msgspec.json.encode(peak).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An IP-Adapter: a picture that the denoiser reads beside the text, for one job.

The picture goes through its CLIP model on the host, in float32: once per picture, seconds at the
most, and nothing of that model is ever on the device. The adapter's own layers sit in the
denoiser's attention while a job is denoised, and are gone afterwards. They are made by the
library's converters and put there by hand: its own loading moves the whole denoiser to where the
first of its weights is, which takes parked blocks out of their buffers.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from worker.catalog import AdapterSpec
from worker.engine.media.components import adapter_hash
from worker.engine.media.pictures import Picture, cut, opened, resized
from worker.errors import OutOfHostMemory, Unsupported
from worker.modelfiles import ENCODER_WEIGHTS, read_header
from worker.protocol.messages import Reference
from worker.vram.adapters import adapter_kind, adapter_size, adapter_unavailable
from worker.vram.probe import host_memory

log = logging.getLogger(__name__)

KEPT_PICTURES = 8  # what was read of them: 8 KB each, of an adapter "plus" 2.6 MB
# Of OpenAI's CLIP, which every published adapter reads with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class IpAdapter:
    """An adapter and what it read of a job's picture, in host memory."""

    layers: dict[str, dict[str, torch.Tensor]]  # "image_proj" and "ip_adapter", by name
    seen: torch.Tensor  # (1, 1, ...) of the picture
    unseen: torch.Tensor  # the same of no picture, for the pass without guidance
    told: dict[str, Any]  # for the receipt
    picture: dict[str, Any]  # the same, of the picture

    def embeddings(self, guided: bool, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """As the pipelines' `ip_adapter_image_embeds` takes them."""
        both = torch.cat([self.unseen, self.seen]) if guided else self.seen
        return both.to(device, dtype)


class Pictures:
    """What CLIP models made of pictures, the last ones kept in memory. Engine thread only.

    Never on disk: it is a description of somebody's picture.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], _Seen] = OrderedDict()

    def read(self, spec: AdapterSpec, reference: Reference) -> IpAdapter:
        """The largest square in the middle of the picture is read.

        Raises InvalidRequest for a picture that cannot be read, ModelUnavailable for files that are
        missing or damaged, Unsupported for a kind of adapter that is not known, and
        OutOfHostMemory.
        """
        adapter_size(spec)
        folder = spec.image_encoder
        assert folder is not None, "the catalog has one for every adapter of this kind"
        try:
            layers: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
            for key, tensor in load_file(spec.path).items():
                group, _, name = key.partition(".")
                layers[group][name] = tensor
            hashes = {"sha256": adapter_hash(spec.path), "image_encoder": ""}
            hashes["image_encoder"] = adapter_hash(folder / ENCODER_WEIGHTS)
        except (OSError, SafetensorError) as exc:
            raise adapter_unavailable(spec, "its files cannot be read") from exc
        kind = adapter_kind(layers["image_proj"])
        known_as = (hashes["image_encoder"], str(kind == "plain"), reference.sha256)
        if known_as not in self._kept:
            self._kept[known_as] = _read(spec, cut(opened(reference), 1, 1), whole=kind != "plain")
            if len(self._kept) > KEPT_PICTURES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(known_as)
        seen = self._kept[known_as]
        _require_width(spec, layers["image_proj"], seen.picture.shape[-1])
        return IpAdapter(layers, seen.picture, seen.none, {"id": spec.id, **hashes}, seen.told)


@contextmanager
def reading(
    unet: Any, adapter: IpAdapter, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Within it the denoiser reads the adapter's picture too, with a scale of 1 everywhere.

    Raises Unsupported when the adapter does not fit it.
    """
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    before = dict(unet.attn_processors)
    projection, kind = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
    try:
        made = unet._convert_ip_adapter_attn_to_diffusers([adapter.layers])
        layer = unet._convert_ip_adapter_image_proj_to_diffusers(adapter.layers["image_proj"])
    except (KeyError, ValueError, RuntimeError, IndexError) as exc:
        log.warning("IP-Adapter %s: %s", adapter.told["id"], exc)
        raise Unsupported(
            f"IP-Adapter {adapter.told['id']} does not fit this model's denoiser: another number "
            "of layers, or layers of another size"
        ) from exc
    reads = {name: one for name, one in made.items() if isinstance(one, nn.Module)}
    for one in (*reads.values(), layer):
        if any(weight.is_meta for weight in one.parameters()):
            raise Unsupported(f"IP-Adapter {adapter.told['id']}: its file lacks weights")
        one.to(device, dtype)
    try:
        unet.set_attn_processor({**before, **reads})
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer])
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        yield
    finally:
        # None is no module: it would stay in the list of them. One that has attention of its own
        # would ask for more processors.
        del unet.encoder_hid_proj
        unet.encoder_hid_proj = projection
        unet.config.encoder_hid_dim_type = kind
        unet.set_attn_processor(dict(before))


def scale_of(unet: Any, mode: str, strength: float) -> float | dict[str, Any]:
    """As the pipelines' `set_ip_adapter_scale` takes it.

    character: everywhere. style: in the one attention of the denoiser that decides colours and
    manner and not what is shown (InstantStyle, arXiv 2404.02733): of SDXL the middle one of the
    first block on the way up.
    """
    if mode != "style":
        return strength
    block = next(i for i, one in enumerate(unet.up_blocks) if hasattr(one, "attentions"))
    scales = [0.0] * len(unet.up_blocks[block].attentions)
    scales[len(scales) // 2] = strength
    return {"up": {f"block_{block}": scales}}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a CLIP model makes of a picture and of none."""

    picture: torch.Tensor
    none: torch.Tensor
    told: dict[str, Any]


def _read(spec: AdapterSpec, picture: Picture, *, whole: bool) -> _Seen:
    """picture: square. whole: the last states but one, (1, 1, tokens, width), not what they are
    summed up to, (1, 1, width)."""
    from transformers import CLIPVisionModelWithProjection

    folder = spec.image_encoder
    assert folder is not None
    needed = _float32_bytes(spec)
    if (free := host_memory().free_bytes) < needed:
        raise OutOfHostMemory(
            f"IP-Adapter {spec.id}: its image encoder takes {needed >> 20} MiB of host memory, and "
            f"{free >> 20} MiB are free in this container; give it more, or unload a model",
            retry_after_s=30,
        )
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise adapter_unavailable(spec, f"its image encoder does not load: {exc}") from exc
    side = encoder.config.image_size
    sized = resized(picture, side, side, Image.Resampling.BICUBIC)
    # Rounded where the library's own preprocessing rounds.
    light = (np.asarray(sized.pixels, dtype=np.float64) * (1 / 255)).astype(np.float32)
    numbers = (light - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    pixels = torch.from_numpy(numbers).permute(2, 0, 1)[None]
    with torch.inference_mode():
        if whole:
            states = [
                encoder(one, output_hidden_states=True).hidden_states[-2][None]
                for one in (pixels, torch.zeros_like(pixels))
            ]
            return _Seen(states[0], states[1], sized.told)
        summed_up = encoder(pixels).image_embeds[None]
        return _Seen(summed_up, torch.zeros_like(summed_up), sized.told)


def _float32_bytes(spec: AdapterSpec) -> int:
    assert spec.image_encoder is not None
    try:
        header = read_header(spec.image_encoder / ENCODER_WEIGHTS)
    except (OSError, ValueError) as exc:
        raise adapter_unavailable(
            spec, f"its image encoder's {ENCODER_WEIGHTS} cannot be read"
        ) from exc
    return 4 * sum(
        int(np.prod(entry["shape"])) for key, entry in header.items() if key != "__metadata__"
    )


def _require_width(spec: AdapterSpec, projection: dict[str, torch.Tensor], width: int) -> None:
    name = {"plain": "proj.weight", "full": "proj.0.weight", "plus": "proj_in.weight"}
    wanted = projection[name[adapter_kind(projection)]].shape[-1]
    if wanted != width:
        raise Unsupported(
            f"IP-Adapter {spec.id} reads {wanted} numbers of a picture and its image encoder makes "
            f"{width}: they do not belong together"
        )

"""What a job brings with it beside its model's own parts: LoRAs, an IP-Adapter, VACE.

Read from headers and from the catalog, so that a job is planned as its engine will do it, and
refused as its engine will refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.catalog import AdapterSpec, ModelSpec
from worker.errors import ModelUnavailable, Unsupported
from worker.modelfiles import read_header
from worker.protocol.messages import LoraUse, RenderParams
from worker.vram.phases import WIDTHS, Adapters

READS = ("style", "character")  # modes of an image in which an IP-Adapter reads a picture
FULL_TOKENS = 257  # of an adapter "full": CLIP's own 16 x 16 and one
# With fewer frames than this there is nothing between a first and a last one.
LEAST_FRAMES = 5
# Other ways to change weights by small ones, by what names of their tensors contain.
OTHER_KINDS = {
    "lora_mid": "LoCon with a middle matrix",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
}


@dataclass(frozen=True, slots=True)
class LoraSize:
    """From the header of a file. Numbers, not bytes: they are held in the model's type."""

    denoiser: int
    encoders: int
    rank: int  # the greatest

    def __add__(self, other: LoraSize) -> LoraSize:
        return LoraSize(
            self.denoiser + other.denoiser,
            self.encoders + other.encoders,
            max(self.rank, other.rank),
        )


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """From the header of a file. Numbers, not bytes: they are held in the model's type."""

    numbers: int
    tokens: int  # that the denoiser reads of a picture


def adapters_of(spec: ModelSpec, params: RenderParams) -> Adapters:
    """What an image's job has on the device beside the model.

    Raises Unsupported for what the catalog has not or what is of no known kind, and
    ModelUnavailable for a file that is missing or damaged.
    """
    size = LoraSize(0, 0, 0)
    for use in params.loras:
        its = lora_size(lora_of(spec, use))
        size = size + its if use.weight else size
    numbers, tokens = size.denoiser, 0
    if params.mode in READS:
        adapter = adapter_size(ip_adapter_of(spec))
        numbers, tokens = numbers + adapter.numbers, adapter.tokens
    width = WIDTHS[spec.dtype]
    return Adapters(width * numbers, width * size.encoders, size.rank, tokens)


# --- LoRAs ---------------------------------------------------------------------------------------


def lora_of(spec: ModelSpec, use: LoraUse) -> AdapterSpec:
    """Raises Unsupported."""
    found = spec.adapter("lora", use.id)
    if found is None:
        known = ", ".join(one.id for one in spec.adapters if one.kind == "lora")
        raise Unsupported(f"the catalog has no such LoRA for {spec.id}; known: {known or 'none'}")
    return found


def lora_size(spec: AdapterSpec) -> LoraSize:
    """Raises ModelUnavailable for a file that is missing or damaged, and Unsupported for one that
    is no LoRA."""
    denoiser = encoders = rank = 0
    for key, entry in lora_header(spec).items():
        if key == "__metadata__" or key.endswith(".alpha"):  # which stays on the host
            continue
        count = math.prod(entry["shape"])
        if key.startswith(("lora_te", "text_encoder")):
            encoders += count
        else:
            denoiser += count
        if any(mark in key for mark in ("lora_down", "lora_A", "lora.down", "layer.down")):
            rank = max(rank, int(entry["shape"][0]))
    return LoraSize(denoiser, encoders, rank)


def lora_header(spec: AdapterSpec) -> dict[str, Any]:
    """Raises as `lora_size`."""
    try:
        header = read_header(spec.path)
    except FileNotFoundError as exc:
        raise ModelUnavailable(f"LoRA {spec.id}: {spec.path.name} is missing; {spec.cure}") from exc
    except (OSError, ValueError) as exc:
        raise ModelUnavailable(f"LoRA {spec.id}: {spec.path.name} is damaged: {exc}") from exc
    for key in header:
        for mark, kind in OTHER_KINDS.items():
            if mark in key:
                raise Unsupported(f"LoRA {spec.id} is a {kind}, which is not supported")
    return header


# --- IP-Adapters ---------------------------------------------------------------------------------


def ip_adapter_of(spec: ModelSpec) -> AdapterSpec:
    """Raises Unsupported."""
    found = spec.ip_adapter
    if found is None:
        raise Unsupported(
            f"modes {' and '.join(READS)} need an IP-Adapter, and {spec.id} has none; "
            f"{spec.ip_adapter_cure}"
        )
    return found


def adapter_size(spec: AdapterSpec) -> AdapterSize:
    """Of an IP-Adapter. Raises ModelUnavailable and Unsupported."""
    try:
        header = read_header(spec.path)
    except FileNotFoundError as exc:
        raise adapter_unavailable(spec, f"{spec.path.name} is missing") from exc
    except (OSError, ValueError) as exc:
        raise adapter_unavailable(spec, f"{spec.path.name} is damaged: {exc}") from exc
    shapes: dict[str, Sequence[int]] = {
        key: entry["shape"] for key, entry in header.items() if key != "__metadata__"
    }
    other = [key for key in shapes if key.partition(".")[0] not in ("image_proj", "ip_adapter")]
    with_lora = any("_lora." in key for key in shapes)
    projection = {
        key.removeprefix("image_proj."): shape
        for key, shape in shapes.items()
        if key.startswith("image_proj.")
    }
    kind = adapter_kind(projection)
    if other or with_lora or kind == "":
        raise Unsupported(
            f"IP-Adapter {spec.id}: {spec.path.name} is none of the kinds that are supported: "
            "plain, plus and full (those for faces need another model that finds them)"
        )
    tokens = {"plain": 4, "full": FULL_TOKENS}.get(kind)
    return AdapterSize(
        numbers=sum(math.prod(shape) for shape in shapes.values()),
        tokens=tokens or int(projection["latents"][1]),
    )


def adapter_kind(projection: Mapping[str, object]) -> str:
    """Of an IP-Adapter, by the names in its projection: plain, full, plus; empty where it is none
    of them."""
    for name, kind in (("proj.weight", "plain"), ("proj.3.weight", "full"), ("latents", "plus")):
        if name in projection:
            return kind
    return ""


def adapter_unavailable(spec: AdapterSpec, what: str) -> ModelUnavailable:
    return ModelUnavailable(f"IP-Adapter {spec.id}: {what}; {spec.cure}")


# --- VACE ----------------------------------------------------------------------------------------


def require_vace(spec: ModelSpec, params: RenderParams, has_vace: bool) -> None:
    """Raises Unsupported for a video with pictures that its model cannot make. has_vace: it has a
    VACE transformer, its own or one beside it."""
    if params.mode == "text":
        return
    if not has_vace:
        raise Unsupported(
            f"mode {params.mode} needs VACE weights, and {spec.id} {_how_to_get_vace(spec)}"
        )
    if params.frames < LEAST_FRAMES:
        raise Unsupported(
            f"mode {params.mode} makes a video of at least {LEAST_FRAMES} frames, "
            f"and the job has {params.frames}"
        )


def _how_to_get_vace(spec: ModelSpec) -> str:
    adapter, fetch = spec.adapter("vace"), "python scripts/fetch_models.py"
    if adapter is not None:
        return (
            f"was loaded without those of adapter {adapter.id}, whose folder was missing; "
            f"{adapter.cure}, and load the model again"
        )
    return (
        f"has none; fetch them ({fetch} wan_2_1_vace_1_3b) and give their transformer's "
        'folder to this model in an [[adapters]] entry of kind "vace", or serve them as the '
        "video model"
    )

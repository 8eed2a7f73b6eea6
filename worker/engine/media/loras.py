"""LoRAs of a job: small matrices whose product is added to what a layer makes of its input.

Each of them is a forward hook on a layer while a phase computes, and nothing else: no module is
wrapped and no weight is written, so a part can be parked or streamed under it, and what it is
without the hooks it is again. The sum is that of peft's own layers, to the bit, and costs as much.
Weights that are added to the model's would cost less in each step, but round otherwise and have to
be taken out again.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from worker.catalog import AdapterSpec
from worker.engine.media.components import adapter_hash
from worker.errors import ModelUnavailable, Unsupported
from worker.protocol.messages import LoraUse
from worker.vram.adapters import lora_header

log = logging.getLogger(__name__)

ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", *ENCODERS)


@dataclass(frozen=True, slots=True)
class Scaled:
    """What is added to a layer's output: scale * up(down(input))."""

    down: torch.Tensor  # (rank, inputs), of a convolution (rank, channels, height, width)
    up: torch.Tensor  # (outputs, rank), of a convolution (channels, rank, 1, 1)
    alpha: float
    spread: float  # that alpha is divided by: the rank, in one way of training its square root
    weight: float = 1.0  # of the LoRA in a job

    @property
    def scale(self) -> float:
        return self.weight * self.alpha / self.spread


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA as a job uses it, in host memory."""

    id: str
    weight: float
    sha256: str
    layers: dict[str, dict[str, Scaled]]  # by part, by the layer's name in it

    @property
    def told(self) -> dict[str, Any]:
        """For the receipt."""
        return {"id": self.id, "weight": self.weight, "sha256": self.sha256}


def read_lora(use: LoraUse, spec: AdapterSpec, pipeline: Any, dtype: torch.dtype) -> Lora:
    """Its matrices, for the parts of this pipeline.

    Names of all trainers that diffusers reads: kohya's, diffusers' own (both) and peft's. Raises
    as `lora_size`, and Unsupported when it does not fit the model.
    """
    metadata = lora_header(spec).get("__metadata__", {})
    try:
        tensors = load_file(spec.path)
        sha256 = adapter_hash(spec.path)
    except (OSError, SafetensorError) as exc:
        raise ModelUnavailable(f"LoRA {spec.id}: {spec.path.name} cannot be read: {exc}") from exc
    alphas = _alphas(spec, tensors)
    try:
        state, _ = pipeline.lora_state_dict(tensors, unet_config=pipeline.unet.config)
        by_part = {part: _as_peft(part, state, getattr(pipeline, part)) for part in PARTS}
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        log.warning("LoRA %s: %s", spec.id, exc)
        raise Unsupported(
            f"LoRA {spec.id}: the names of its {len(tensors)} tensors are of no trainer that is "
            "known for SDXL"
        ) from exc
    strange = [key for key in state if not key.startswith(tuple(f"{part}." for part in PARTS))]
    if strange:
        log.warning("LoRA %s: %s", spec.id, ", ".join(strange))
        raise Unsupported(f"LoRA {spec.id}: {len(strange)} of its tensors are for no part of SDXL")
    trained = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    layers = {}
    for part, found in by_part.items():
        its = {
            key.removeprefix(f"{part}."): value
            for key, value in trained.items()
            if key.startswith(f"{part}.")
        }
        layers[part] = _layers(spec, part, found, getattr(pipeline, part), its, alphas, dtype)
    return Lora(id=spec.id, weight=use.weight, sha256=sha256, layers=layers)


@contextmanager
def adding(
    loras: Sequence[Lora], modules: Mapping[str, nn.Module], device: torch.device
) -> Iterator[None]:
    """Within it these parts, by name, compute on `device` with the LoRAs, which are there then."""
    with ExitStack() as stack:
        for part, module in modules.items():
            layers: dict[str, list[Scaled]] = {}
            for lora in loras:
                for name, one in lora.layers[part].items() if lora.weight else ():
                    here = replace(
                        one,
                        down=one.down.to(device),
                        up=one.up.to(device),
                        weight=lora.weight,
                    )
                    layers.setdefault(name, []).append(here)
            stack.enter_context(hooked(module, layers))
        yield


@contextmanager
def hooked(module: nn.Module, layers: Mapping[str, Sequence[Scaled]]) -> Iterator[None]:
    """Within it the named layers add this to what they make, in this order."""
    with ExitStack() as stack:
        for name, added in layers.items():
            layer = module.get_submodule(name)
            stack.callback(layer.register_forward_hook(_hook(layer, tuple(added))).remove)
        yield


def _hook(layer: nn.Module, added: tuple[Scaled, ...]) -> Any:
    def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        result = output
        for one in added:
            given = inputs[0].to(one.down.dtype)
            if isinstance(layer, nn.Conv2d):
                inner = functional.conv2d(
                    given, one.down, stride=layer.stride, padding=layer.padding
                )
                result = result + functional.conv2d(inner, one.up) * one.scale
            else:
                inner = functional.linear(given, one.down)
                result = result + functional.linear(inner, one.up) * one.scale
            del inner
        return result.to(output.dtype)

    return add


# --- reading --------------------------------------------------------------------------------------


def _alphas(spec: AdapterSpec, tensors: dict[str, torch.Tensor]) -> dict[int, float]:
    """Takes them out of `tensors`; by the identity of the matrix that each belongs to, which no
    renaming changes. The library's own way loses those of attention layers that differ."""
    found = {}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        base = key.removesuffix(".alpha")
        alpha = tensors.pop(key)
        downs = [
            tensors[name]
            for ending in (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
            if (name := base + ending) in tensors
        ]
        if alpha.numel() != 1 or len(downs) != 1:
            raise Unsupported(f"LoRA {spec.id} has an alpha that belongs to no matrix of it")
        found[id(downs[0])] = float(alpha)
    return found


def _as_peft(part: str, state: Mapping[str, Any], module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a part under peft's names, as the library makes them of all others."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own: dict[str, torch.Tensor] = {
        key.removeprefix(f"{part}."): tensor
        for key, tensor in state.items()
        if key.startswith(f"{part}.")
    }
    if not own:
        return {}
    if part == "unet":
        is_peft = "lora_A" in next(iter(own))
        return own if is_peft else dict(convert_unet_state_dict_to_peft(own))
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if not hasattr(module, "text_model"):  # a flat one, of newer versions of transformers
        own = {key.removeprefix("text_model."): tensor for key, tensor in own.items()}
    return own


def _layers(
    spec: AdapterSpec,
    part: str,
    found: dict[str, torch.Tensor],
    module: nn.Module,
    trained: Mapping[str, Any],
    alphas: Mapping[int, float],
    dtype: torch.dtype,
) -> dict[str, Scaled]:
    """trained: what the file says of the training of this part, as peft's LoraConfig has it."""
    layers, left = {}, set(found)
    if trained.get("use_dora") or trained.get("lora_bias"):
        raise Unsupported(f"LoRA {spec.id} was trained with DoRA or a bias: not supported")
    for key, down in found.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        up = found.get(f"{name}.lora_B.weight")
        left -= {key, f"{name}.lora_B.weight"}
        if up is None or not _fits(module, name, down, up):
            log.warning("LoRA %s: %s.%s does not fit", spec.id, part, name)
            shapes = f"{tuple(down.shape)} and {tuple(up.shape) if up is not None else None}"
            raise Unsupported(
                f"LoRA {spec.id} does not fit this model: {shapes} for a layer of its {part} that "
                "is not there, or is another size"
            )
        rank = down.shape[0]
        alpha = alphas.get(id(down), _alpha(trained, name, rank))
        spread = math.sqrt(rank) if trained.get("use_rslora") else rank
        layers[name] = Scaled(down.to(dtype), up.to(dtype), alpha, spread)
    if left:
        log.warning("LoRA %s: %s", spec.id, ", ".join(sorted(left)))
        raise Unsupported(f"LoRA {spec.id}: {len(left)} of its tensors are not of a LoRA's kinds")
    return layers


def _alpha(trained: Mapping[str, Any], name: str, rank: int) -> float:
    """As peft finds it; a file that says nothing has been scaled already."""
    for pattern, alpha in (trained.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(trained.get("lora_alpha", rank))


def _fits(module: nn.Module, name: str, down: torch.Tensor, up: torch.Tensor) -> bool:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return False
    rank = down.shape[0]
    if isinstance(layer, nn.Linear):
        return down.shape == (rank, layer.in_features) and up.shape == (layer.out_features, rank)
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and set(layer.dilation) == {1}
        and down.shape == (rank, layer.in_channels, *layer.kernel_size)
        and up.shape == (layer.out_channels, rank, 1, 1)
    )

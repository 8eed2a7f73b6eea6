"""Layers whose weights lie on the device in eight bits and compute in their own type.

diffusers calls it layerwise casting, and which layers it leaves as they are follows its rules here:
norms, embeddings of positions and of patches, what a model keeps in float32. Beside these the first
and the last convolution of a UNet, which are the same kind of layer as a patch embedding; they are
small, and by the first one the library tells in which type the model computes.

The library's hook rounds a layer's weights once more after each use, into new memory, so a buffer
of all weights would be there twice after one pass. Here the rounded ones stay where they are, and a
layer's own type is a copy that goes when it has computed. The arithmetic is the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

STORED = torch.float8_e4m3fn
# What lies beyond becomes this. torch 2.13 converts so by itself; earlier versions made such a
# weight not a number, because the type has no infinity.
MOST = torch.finfo(STORED).max
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FIRST_AND_LAST = ("^conv_in$", "^conv_out$")


def cast_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a denoiser that may be stored so, by name. Loads nothing, changes nothing."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    left = (
        *DEFAULT_SKIP_MODULES_PATTERN,
        *(getattr(module, "_skip_layerwise_casting_patterns", None) or ()),
        *(getattr(module, "_keep_in_fp32_modules", None) or ()),
        *FIRST_AND_LAST,
    )
    found: dict[str, nn.Module] = {}
    open_modules = [("", module)]
    while open_modules:
        name, one = open_modules.pop()
        if any(re.search(pattern, name) for pattern in left):
            continue
        if isinstance(one, LAYERS):
            found[name] = one
        else:
            open_modules += [
                (f"{name}.{child}" if name else child, its) for child, its in one.named_children()
            ]
    return found


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """In eight bits."""
    return weight.clamp(-MOST, MOST).to(STORED)


def computing(layer: nn.Module, types: Mapping[str, torch.dtype]) -> list[RemovableHandle]:
    """Hooks with which a layer computes: its stored weights, by name, are there in these types
    while it does, and where they were afterwards, also when it fails."""
    lying: dict[str, torch.Tensor] = {}

    def before(*_: object) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, dtype in types.items():
                weight = getattr(layer, name)
                lying[name] = weight.data
                weight.data = weight.data.to(dtype)

    def after(*_: object) -> None:
        for name, weight in lying.items():
            getattr(layer, name).data = weight
        lying.clear()

    return [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(after, always_call=True),
    ]


def cast(module: nn.Module) -> None:
    """Store the weights of these layers so, for good: of a module that is only measured."""
    for layer in cast_layers(module).values():
        weights = dict(layer.named_parameters(recurse=False))
        computing(layer, {name: one.dtype for name, one in weights.items()})
        for one in weights.values():
            one.data = rounded(one.data)


def cast_bytes(module: nn.Module, align_bytes: int) -> int:
    """Of parameters and buffers, if it were cast, each rounded up; what two share counts once."""
    layers = cast_layers(module).values()
    casting = {id(one) for layer in layers for one in layer.parameters(recurse=False)}
    sizes = {
        one.untyped_storage()._cdata: one.numel() * STORED.itemsize
        if id(one) in casting
        else one.untyped_storage().nbytes()
        for one in (*module.parameters(), *module.buffers())
    }
    return sum(math.ceil(size / align_bytes) * align_bytes for size in sizes.values())

"""Linear layers whose weights lie as the CPU's kernels read them.

The library's own linear layer hands the weights over as they are in the file; for a few rows its
kernel then takes up to five times as long (scripts/bench_linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

# The layout is chosen for so many rows. One that is good for a prompt's rows is good for few ones
# too; one chosen for a single row is up to twice as slow for all others.
LAYOUT_ROWS = 256


@cache
def _register() -> None:
    """An operator of its own, because the compiler takes the library's only with weights that it
    sorted itself, beside the ones that we hold."""
    torch.library.define(
        "verbatim::linear", "(Tensor x, Tensor weight, Tensor? bias, int features) -> Tensor"
    )
    torch.library.impl("verbatim::linear", "default", _packed)
    torch.library.register_fake("verbatim::linear", _shape)


def _packed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, features: int
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, features: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], features)


class PackedLinear(nn.Module):
    """x W^T + b for (..., in_features) -> (..., out_features), on a CPU."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        _register()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        # No parameters: they cannot be read, moved or saved like the file's.
        weight = plain.weight.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
        self._bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.verbatim.linear(
            x, self._weight, self._bias, self.out_features
        )
        return out


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the kernels."""
    if not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack(model: Any, read: Callable[[torch.Tensor | None], None] = lambda _one: None) -> None:
    """Replace every linear layer of a model on the CPU by a packed one.

    read: called for each weight and bias before it is used, in the order in which they lie in
    memory, which for a mapped file is the file's.

    A weight that nothing else uses is held once, as before. An output layer that is tied to the
    embedding becomes a second copy of it, because the embedding is read row by row.
    """
    places = [
        (child.weight.data_ptr(), number, module, name)
        for number, module in enumerate(list(model.modules()))
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    for _, _, module, name in sorted(places, key=lambda place: place[:2]):
        plain = getattr(module, name)
        read(plain.weight)
        read(plain.bias)
        setattr(module, name, PackedLinear(plain))

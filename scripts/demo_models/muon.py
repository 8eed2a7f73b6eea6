"""Muon in float32: momentum steps for matrices, made orthogonal.

torch.optim.Muon computes in bfloat16, which is slow on processors without instructions for it, and
one matrix at a time. Here all matrices of one shape go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

# Keller Jordan's coefficients: five rounds bring all singular values near 1.
_ROUNDS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum 0.95; steps have the size that AdamW's have at the same rate.

    Kernels of convolutions are matrices with one row for each output channel.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                steps = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    steps.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                stacked = torch.stack(steps).flatten(2)
                size = group["lr"] * 0.2 * max(stacked.shape[1:]) ** 0.5
                for parameter, step in zip(parameters, orthogonal(stacked), strict=True):
                    parameter.sub_(step.view(shape), alpha=size)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(count, rows, columns) with all singular values near 1, by Newton and Schulz."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    for _ in range(_ROUNDS):
        square = x @ x.transpose(1, 2)
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x if wide else x.transpose(1, 2)

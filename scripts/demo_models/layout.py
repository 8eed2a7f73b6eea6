"""What lies where in a scene, as a second lesson for the denoisers.

The loss of a denoiser says little about words: a square of the wrong colour costs hardly more than
a blurred one. So while it learns, a linear layer must tell from its middle layer which colour and
which shape each part of the picture will have. That layer is not published.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from demo_models.drawing import coverage
from demo_models.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

_COLOURS = (*COLOURS, *BACKGROUNDS)
CLASSES = len(_COLOURS) + 1 + len(SHAPES)  # colours, then no shape and shapes
_FINE = 4  # points along each side of a cell


def layout(scenes: Sequence[Scene], rows: int, columns: int) -> torch.Tensor:
    """Shares of each cell, (scenes, CLASSES, rows, columns): of its colours, and of its shapes."""
    width, height = columns * _FINE, rows * _FINE
    x = torch.arange(width, dtype=torch.float32) + 0.5
    y = (torch.arange(height, dtype=torch.float32) + 0.5)[:, None]
    shares = torch.zeros(len(scenes), CLASSES, height, width)
    for row, scene in enumerate(scenes):
        shares[row, [_COLOURS.index(scene.background), len(_COLOURS)]] = 1.0
        for thing in scene.things:  # later ones lie over earlier ones
            cover = coverage(thing, x, y, width, height)
            shares[row] *= 1 - cover
            shares[row, _COLOURS.index(thing.colour)] += cover
            shares[row, len(_COLOURS) + 1 + SHAPES.index(thing.shape)] += cover
    return F.avg_pool2d(shares, _FINE)


def layout_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross entropy of colours plus that of shapes; both tensors have CLASSES in dimension 1."""
    parts = (len(_COLOURS), CLASSES - len(_COLOURS))
    return torch.stack(
        [
            F.cross_entropy(guess, truth)
            for guess, truth in zip(
                logits.split(parts, dim=1), shares.split(parts, dim=1), strict=True
            )
        ]
    ).sum()


class Overheard:
    """The last output of one module, caught while a network runs."""

    def __init__(self, module: nn.Module):
        self.output = torch.empty(0)
        self._hook = module.register_forward_hook(self._keep)

    def stop(self) -> None:
        """A module that is overheard cannot be copied."""
        self._hook.remove()

    def _keep(self, _: nn.Module, __: object, output: torch.Tensor) -> None:
        self.output = output

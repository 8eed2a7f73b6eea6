"""A denoiser that computes its batch in two halves, one after the other, and holds less at once.

With guidance the SDXL pipelines hand a UNet both texts of a picture in one batch, and a shared one
those of all its pictures: the halves are one text each. WAN's pipelines compute the texts one by
one anyway. Sums over another number of rows may round otherwise, so what comes out is close to
the whole batch's and not its bits. On a CPU the demo model's UNet gave equal bits for no shape in
float32 or float16; in bfloat16 for all that were tried, but a wider UNet not for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from worker.engine.media.standing_in import standing_in


@contextmanager
def halved(denoiser: nn.Module) -> Iterator[None]:
    """Within it every call computes so. Arguments, nested ones too, are cut where their first
    dimension is the batch's; the output is a tuple of tensors, of which only the first is given."""
    forward = denoiser.forward

    def in_halves(*args: Any, **more: Any) -> tuple[torch.Tensor]:
        sample: torch.Tensor = args[0] if args else more["sample"]
        batch = len(sample)
        middle = (batch + 1) // 2
        made = [
            forward(*_rows(args, batch, rows), **_rows(more, batch, rows))[0]
            for rows in (slice(0, middle), slice(middle, batch))
            if rows.start < rows.stop
        ]
        return (torch.cat(made),)

    with standing_in(denoiser, in_halves):
        yield


def _rows(value: Any, batch: int, rows: slice) -> Any:
    match value:
        case torch.Tensor() if value.dim() and len(value) == batch:
            return value[rows]
        case dict():
            return {name: _rows(one, batch, rows) for name, one in value.items()}
        case list() | tuple():
            return type(value)(_rows(one, batch, rows) for one in value)
    return value

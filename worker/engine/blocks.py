"""The blocks of large modules, which can be on the device one at a time."""

from __future__ import annotations

from torch import nn


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that a large module computes one after the other; none where it has none."""
    found: list[nn.Module] = []
    for path in ("encoder.block", "blocks", "vace_blocks", "down_blocks", "mid_block", "up_blocks"):
        try:
            one = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(one, nn.ModuleList):
            found += list(one)
        else:
            found.append(one)
    return found

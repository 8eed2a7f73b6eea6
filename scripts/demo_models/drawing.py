"""Paints scenes: anti-aliased shapes from their distance functions, whole batches at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from demo_models.scenes import BACKGROUNDS, COLOURS, SHAPES, Placed, Scene

# Outer radius that gives each shape the area of a circle of radius 1.
_STAR_INNER = 0.46
_AREAS = {
    "circle": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 5 * _STAR_INNER * math.sin(math.pi / 5),
}
OUTER = {shape: math.sqrt(math.pi / _AREAS[shape]) for shape in SHAPES}
PALETTE = (*COLOURS.values(), *BACKGROUNDS.values())
_SIDES = {"square": 4, "triangle": 3, "star": 5}
# Turned so that squares stand on a side, triangles on their base and stars on two tips.
_REST = {"circle": 0.0, "square": math.pi / 4, "triangle": math.pi / 2, "star": math.pi / 2}


def draw(
    scenes: Sequence[Scene],
    width: int,
    height: int,
    *,
    window: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """Pictures (scenes, 3, height, width) in 0 .. 1.

    width, height: pixels of the whole picture. window: (left, top, width, height) of the part that
    is painted; None is all of it.
    """
    left, top, wide, high = window or (0, 0, width, height)
    x = torch.arange(left, left + wide, dtype=torch.float32) + 0.5
    y = (torch.arange(top, top + high, dtype=torch.float32) + 0.5)[:, None]
    pictures = torch.stack([_rgb(BACKGROUNDS[scene.background]) for scene in scenes])
    pictures = pictures[:, :, None, None].expand(-1, -1, high, wide).clone()
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            cover = coverage(thing, x, y, width, height)
            pictures[index] += cover * (
                _rgb(COLOURS[thing.colour])[:, None, None] - pictures[index]
            )
    return pictures


def coverage(
    thing: Placed, x: torch.Tensor, y: torch.Tensor, width: int, height: int
) -> torch.Tensor:
    """How much of each pixel a thing covers, (rows, columns) in 0 .. 1.

    x: (columns,), y: (rows, 1), pixel centres in a picture of width x height pixels.
    """
    unit = thing.radius * min(width, height) * OUTER[thing.shape]  # pixels
    dx, dy = (x - thing.x * width) / unit, (y - thing.y * height) / unit
    distance = _distance(thing.shape, dx, dy, thing.angle) * unit
    return (0.5 - distance).clamp(0, 1)


def _distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, angle: float) -> torch.Tensor:
    """Signed distance to the outline of a shape of outer radius 1; below 0 inside."""
    rho = torch.sqrt(dx * dx + dy * dy)
    if shape == "circle":
        return rho - 1
    sector = 2 * math.pi / _SIDES[shape]
    # Screen angles grow clockwise, as y grows downwards. A tip lies at angle 0 of its sector.
    theta = torch.atan2(dy, dx) - angle + _REST[shape]
    theta = torch.remainder(theta + sector / 2, sector) - sector / 2
    along, across = rho * torch.cos(theta), rho * torch.sin(theta.abs())
    if shape == "star":  # the edge from the tip (1, 0) to the inner corner
        cx, cy = _STAR_INNER * math.cos(sector / 2), _STAR_INNER * math.sin(sector / 2)
    else:  # the edge from the corner (1, 0) to the next side's middle
        cx, cy = math.cos(sector / 2) ** 2, math.cos(sector / 2) * math.sin(sector / 2)
    nx, ny = cy, 1 - cx
    return ((along - 1) * nx + across * ny) / math.hypot(nx, ny)


def colour_shares(pictures: torch.Tensor, cell: int) -> torch.Tensor:
    """How much of each cell has each colour of PALETTE, (pictures, 9, rows, columns); sums to 1.

    pictures: (pictures, 3, height, width) in 0 .. 1, as `draw` makes them.
    """
    palette = torch.stack([_rgb(one) for one in PALETTE])  # (9, 3)
    nearest = torch.cdist(pictures.permute(0, 2, 3, 1).flatten(1, 2), palette).argmin(dim=-1)
    nearest = nearest.view(len(pictures), *pictures.shape[2:])
    return F.avg_pool2d(F.one_hot(nearest, len(PALETTE)).permute(0, 3, 1, 2).float(), cell)


def _rgb(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32) / 255

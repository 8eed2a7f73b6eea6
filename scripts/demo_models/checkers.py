"""Finds shapes in pictures and their motion in clips, without any learned part.

What a picture shows is compared with what a text asked for: the figures of the demo models are made
with these functions, and tests use them to notice mixed-up prompts and ignored parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from demo_models.drawing import OUTER, PALETTE, coverage
from demo_models.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Description, Placed

Picture = npt.NDArray[np.uint8]  # (height, width, 3) RGB
Mask = npt.NDArray[np.bool_]  # (height, width)

_NAMES = (*COLOURS, *BACKGROUNDS)
_PALETTE = np.array(PALETTE, dtype=np.int32)
# Smaller blobs are specks: half of the smallest thing's area, as a part of the shorter side
# squared.
_MIN_AREA = 0.5 * math.pi * SIZES["small"][0] ** 2
# Radii between those of two size words.
_SMALL_BELOW = (SIZES["small"][1] + SIZES["medium"][0]) / 2
_LARGE_ABOVE = (SIZES["medium"][1] + SIZES["large"][0]) / 2


@dataclass(frozen=True, slots=True)
class Found:
    """A shape that a picture shows; x, y, radius as in scenes.Placed."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float
    match: float  # overlap with the ideal shape of this size, 0 .. 1

    @property
    def size(self) -> str:
        if self.radius < _SMALL_BELOW:
            return "small"
        return "large" if self.radius > _LARGE_ABOVE else "medium"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows."""

    things: tuple[Found, ...]  # largest first
    background: str


def look(picture: Picture, *, turned: bool = False) -> Seen:
    """Everything in a picture. turned: also try shapes that do not stand upright."""
    classes = _classes(picture)
    counts = np.bincount(classes.ravel(), minlength=len(_NAMES))
    # The border belongs to the background more often than the middle does.
    edge = np.concatenate([classes[0], classes[-1], classes[:, 0], classes[:, -1]])
    votes = np.bincount(edge, minlength=len(_NAMES))
    ground = len(COLOURS) + int(votes[len(COLOURS) :].argmax())
    if votes[len(COLOURS) :].max() == 0:
        ground = int(counts.argmax())
    height, width = classes.shape
    short = min(width, height)
    found = []
    for number, colour in enumerate(COLOURS):
        for mask in _blobs(classes == number, _MIN_AREA * short * short):
            found.append(_measure(mask, colour, turned=turned))
    found.sort(key=lambda one: -one.radius)
    return Seen(tuple(found), _NAMES[ground])


def mistakes(
    seen: Seen, wanted: Description, *, sizes: bool = True, places: bool = True
) -> list[str]:
    """What a picture shows otherwise than a description says; empty when it is right."""
    wrong = []
    if wanted.background and seen.background != wanted.background:
        wrong.append(f"background is {seen.background}, not {wanted.background}")
    if len(seen.things) != len(wanted.things):
        colours = ", ".join(f"{one.colour} {one.shape}" for one in seen.things)
        wrong.append(f"shows {len(seen.things)} things ({colours}), not {len(wanted.things)}")
    left = list(seen.things)
    matched: list[Found | None] = []
    for thing in wanted.things:
        fits = [
            one
            for one in left
            if thing.colour in (None, one.colour) and thing.shape in (None, one.shape)
        ]
        if not fits:
            wrong.append(f"no {thing.colour or ''} {thing.shape or 'thing'}")
            matched.append(None)
            continue
        one = fits[0]
        left.remove(one)
        matched.append(one)
        if sizes and wanted.motion != "growing" and _other_size(one, thing.size):
            wrong.append(f"the {one.colour} {one.shape} is {one.size}, not {thing.size}")
        if places and thing.place and not _is_at(one, thing.place):
            wrong.append(
                f"the {one.colour} {one.shape} is at {one.x:.2f}, {one.y:.2f}, not {thing.place}"
            )
    if places and wanted.relation and len(matched) == 2:
        first, second = matched
        if first and second and not _relates(first, second, wanted.relation):
            wrong.append(f"the {first.colour} {first.shape} is not {wanted.relation} the other")
    return wrong


def motion_of(frames: Sequence[Picture]) -> str | None:
    """How the things of a clip move, one of scenes.MOTIONS; None when nothing can be told.

    The largest change over the clip decides: way of the common centre, growth, or turn. Every other
    frame is looked at, and the last one: a turn is far below half a sector from one to the next.
    """
    chosen = [*frames[:-1:2], frames[-1]]
    views = [look(frame, turned=True).things for frame in chosen]
    both = {(one.colour) for one in views[0]} & {(one.colour) for one in views[-1]}
    if not both:
        return None
    ways, growths, turns = [], [], []
    for colour in both:
        track = [next((one for one in view if one.colour == colour), None) for view in views]
        known = [one for one in track if one is not None]
        ways.append((known[-1].x - known[0].x, known[-1].y - known[0].y))
        growths.append(known[-1].radius / known[0].radius)
        turns.append(_turn(known))
    dx, dy = (float(np.mean([way[axis] for way in ways])) for axis in (0, 1))
    growth, turn = float(np.mean(growths)), float(np.mean(turns))
    # Each in units of the least change that counts: a tenth of the picture, a fifth larger, 15
    # degrees. Training clips have at least 0.15, 2.3 and 60.
    scores = {
        "right" if dx > 0 else "left": abs(dx) / 0.1,
        "down" if dy > 0 else "up": abs(dy) / 0.1,
        "growing": (growth - 1) / 0.2,
        "turning": turn / math.radians(15),
    }
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= 1 else None


def _turn(track: Sequence[Found]) -> float:
    """Radians turned clockwise; a shape looks the same after one sector, so steps are small."""
    total = 0.0
    for before, after in pairwise(track):
        if before.shape != after.shape or after.shape == "circle":
            continue
        sector = {"square": math.pi / 2, "triangle": 2 * math.pi / 3, "star": 2 * math.pi / 5}
        span = sector[after.shape]
        total += (after.angle - before.angle + span / 2) % span - span / 2
    return total


def _classes(picture: Picture) -> npt.NDArray[np.int64]:
    distance = ((picture[:, :, None, :].astype(np.int32) - _PALETTE) ** 2).sum(axis=-1)
    nearest: npt.NDArray[np.int64] = distance.argmin(axis=-1)
    return nearest


def _blobs(mask: Mask, least: float) -> list[Mask]:
    """Connected parts of at least `least` pixels that are more than two pixels thick."""
    core = torch.from_numpy(mask)[None, None].float()
    core = -torch.nn.functional.max_pool2d(-core, 3, 1, 1)  # erosion: rims of other shapes go
    if core.sum() == 0:
        return []
    labels = torch.arange(1, core.numel() + 1, dtype=torch.float32).reshape(core.shape) * core
    while True:  # every pixel takes the largest label around it, until none changes
        spread = torch.nn.functional.max_pool2d(labels, 3, 1, 1) * core
        if torch.equal(spread, labels):
            break
        labels = spread
    whole = torch.from_numpy(mask)[None, None]
    found = []
    for label in labels.unique().tolist():
        if label == 0:
            continue
        part = torch.nn.functional.max_pool2d((labels == label).float(), 3, 1, 1).bool() & whole
        if float(part.sum()) >= least:
            found.append(part[0, 0].numpy())
    return found


def _measure(mask: Mask, colour: str, *, turned: bool) -> Found:
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height
    radius = math.sqrt(mask.sum() / math.pi) / min(width, height)
    # Nothing outside this part can match: neither the blob nor any ideal shape reaches there.
    reach = int(max(OUTER.values()) * radius * min(width, height)) + 2
    left = max(0, min(int(columns.min()), int(x * width) - reach))
    right = min(width, max(int(columns.max()) + 1, int(x * width) + reach))
    top = max(0, min(int(rows.min()), int(y * height) - reach))
    bottom = min(height, max(int(rows.max()) + 1, int(y * height) + reach))
    xs = torch.arange(left, right, dtype=torch.float32) + 0.5
    ys = torch.arange(top, bottom, dtype=torch.float32)[:, None] + 0.5
    real = torch.from_numpy(mask[top:bottom, left:right])

    def match(shape: str, degrees: float) -> Found:
        thing = Placed(shape, colour, "", x, y, radius, math.radians(degrees))
        ideal = coverage(thing, xs, ys, width, height) > 0.5
        union = int((ideal | real).sum())
        shared = int((ideal & real).sum())
        return Found(shape, colour, x, y, radius, thing.angle, shared / union if union else 0.0)

    best = Found("circle", colour, x, y, radius, 0.0, -1.0)
    for shape in SHAPES:
        span = {"circle": 0, "square": 90, "triangle": 120, "star": 72}[shape]
        tried = [
            match(shape, degrees) for degrees in (range(0, span, 9) if turned and span else (0,))
        ]
        if turned and span:  # nine degrees apart, then three around the best
            middle = math.degrees(max(tried, key=lambda one: one.match).angle)
            tried += [match(shape, (middle + more) % span) for more in (-6, -3, 3, 6)]
        best = max(best, *tried, key=lambda one: one.match)
    return best


def _other_size(one: Found, size: str | None) -> bool:
    """Off by a whole class: between neighbours a fifth of tolerance."""
    wanted = size or "medium"
    if one.size == wanted:
        return False
    low = {"small": 0.0, "medium": _SMALL_BELOW, "large": _LARGE_ABOVE}[wanted] * 0.93
    high = {"small": _SMALL_BELOW, "medium": _LARGE_ABOVE, "large": 1.0}[wanted] * 1.07
    return not low <= one.radius <= high


def _is_at(one: Found, place: str) -> bool:
    """Roughly: in the named third, or for the centre within a fifth of the middle."""
    return {
        "left": one.x < 0.42,
        "right": one.x > 0.58,
        "top": one.y < 0.42,
        "bottom": one.y > 0.58,
        "centre": abs(one.x - 0.5) < 0.2 and abs(one.y - 0.5) < 0.2,
    }[place]


def _relates(first: Found, second: Found, relation: str) -> bool:
    return {
        "above": second.y - first.y > 0.1,
        "below": first.y - second.y > 0.1,
        "left of": second.x - first.x > 0.1,
        "right of": first.x - second.x > 0.1,
    }[relation]

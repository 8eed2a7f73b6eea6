"""The small world of the demo models: coloured shapes on plain backgrounds, in words.

A `Description` is what a text says: what it leaves open is None. A `Scene` is one picture that a
description allows, with numbers for everything (drawing.py paints it, checkers.py finds it again).
All three demo models are trained on these words, so what demo-chat writes, demo-image and
demo-video can read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star")
# sRGB. Far enough apart that a blurred copy is still nearest to its own colour.
COLOURS = {
    "red": (222, 38, 38),
    "orange": (255, 146, 20),
    "yellow": (250, 226, 40),
    "green": (34, 160, 60),
    "blue": (36, 84, 224),
    "purple": (142, 44, 178),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (140, 140, 140), "black": (16, 16, 16)}
# Circle-equivalent radius as a part of the picture's shorter side. A thing without a size word
# has a medium one.
SIZES = {"small": (0.10, 0.115), "medium": (0.15, 0.17), "large": (0.21, 0.235)}
PLACES = ("left", "right", "top", "bottom", "centre")
# From the middle of a shape to its farthest tip, at most, in radii (the triangle; drawing.OUTER).
REACH = 1.56
# One thing relative to the other: the first is ... the second.
RELATIONS = ("above", "below", "left of", "right of")
MOTIONS = ("left", "right", "up", "down", "growing", "turning")

PLACE_WORDS = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on the top", "in the upper part"),
    "bottom": ("at the bottom", "on the bottom", "in the lower part"),
    "centre": ("in the centre", "in the middle", "at the centre"),
}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
MOTION_WORDS = {
    "left": ("moving left", "moving to the left", "sliding left", "drifting to the left",
             "moves left", "travels left"),
    "right": ("moving right", "moving to the right", "sliding right", "drifting to the right",
              "moves right", "travels right"),
    "up": ("moving up", "rising", "moving upwards", "floating up", "moves up", "rises"),
    "down": ("moving down", "falling", "moving downwards", "sinking down", "moves down", "falls"),
    "growing": ("growing", "growing larger", "getting bigger", "expanding", "grows"),
    "turning": ("turning", "spinning", "rotating", "turning around", "turns", "spins"),
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}

# Words that enhancements add. They change no shape, colour or place: the demo painters learn to
# read past them.
LIGHTS = (
    "soft light", "warm light", "studio lighting", "gentle shadows", "diffused daylight",
    "golden hour glow", "soft window light", "rim light", "even lighting", "natural light",
)  # fmt: skip
CAMERAS = (
    "35mm photograph", "50mm lens", "shallow depth of field", "sharp focus", "close-up",
    "wide angle", "eye level view", "balanced composition", "centered framing", "film grain",
)  # fmt: skip
QUALITIES = (
    "highly detailed", "fine texture", "crisp edges", "smooth surface", "rich tones",
    "high resolution", "clean lines", "professional photography", "vivid", "realistic",
)  # fmt: skip
FILMS = (
    "slow tracking shot", "steady camera", "smooth motion", "cinematic pacing", "static camera",
    "fluid movement", "long take", "gentle camera move", "24 frames per second", "real time speed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape; None is left open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None  # small | large; None in a text means medium
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """What a text says about a scene."""

    things: tuple[Thing, ...] = ()  # up to two
    relation: str | None = None  # of the first to the second
    background: str | None = None
    motion: str | None = None  # of all things


@dataclass(frozen=True, slots=True)
class Placed:
    """One shape with numbers.

    x, y: centre in 0 .. 1 of the picture's width and height, from its upper left corner.
    radius: of a circle of the same area, as a part of the shorter side. angle: radians, clockwise.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture; later things lie over earlier ones."""

    things: tuple[Placed, ...]
    background: str


def random_description(
    chance: random.Random, *, motion: bool = False, things: int | None = None
) -> Description:
    """A complete description: shape and colour are named; size, places and background maybe.

    motion: whether the things move. things: one or two; None is either.
    """
    count = things or chance.choice((1, 2))
    moved = chance.choice(MOTIONS) if motion else None
    shapes = SHAPES[1:] if moved == "turning" else SHAPES  # nobody sees a circle turn
    sizes = (None,) if moved == "growing" else (None, None, "small", "large")
    made = [
        Thing(shape, colour, chance.choice(sizes))
        for shape, colour in zip(
            chance.choices(shapes, k=count),
            chance.sample(tuple(COLOURS), k=count),
            strict=True,
        )
    ]
    if count == 2 and (motion or made[0].size == made[1].size):
        # Two large ones do not fit, and moving ones need room.
        made = [replace(t, size=None) if t.size == "large" else t for t in made]
    relation = None
    if count == 1:
        # What moves has no place that it keeps.
        allowed = (*PLACES, None) if moved in (None, "turning") else (None,)
        made[0] = replace(made[0], place=chance.choice(allowed))
    else:
        how = chance.choice(("sides", "relation", "open"))
        if how == "sides":
            pair = chance.choice(
                (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
            )
            if moved in (None, "turning", "growing"):
                made = [replace(thing, place=p) for thing, p in zip(made, pair, strict=True)]
        elif how == "relation":
            # Side by side across the way they go, so that there is a way to go.
            axis = {"left": RELATIONS[:2], "right": RELATIONS[:2], "up": RELATIONS[2:],
                    "down": RELATIONS[2:]}  # fmt: skip
            relation = chance.choice(axis.get(moved or "", RELATIONS))
    background = chance.choice((*BACKGROUNDS, *BACKGROUNDS, None))
    return Description(tuple(made), relation, background, moved)


def place(wanted: Description, chance: random.Random, *, aspect: float = 1.0) -> Scene:
    """A scene that the description allows; what it leaves open is drawn at random.

    aspect: width divided by height of the picture.
    """
    background = wanted.background or chance.choice(tuple(BACKGROUNDS))
    things = wanted.things or (Thing(),)
    taken = {thing.colour for thing in things}
    filled = []
    for thing in things:
        open_colours = [colour for colour in COLOURS if colour not in taken] or list(COLOURS)
        colour = thing.colour or chance.choice(open_colours)
        taken.add(colour)
        shapes = SHAPES[1:] if wanted.motion == "turning" else SHAPES
        filled.append((thing.shape or chance.choice(shapes), colour, thing.size or "medium"))
    best: tuple[float, tuple[Placed, ...]] = (-9.0, ())
    for _ in range(200):
        placed = tuple(
            _place_one(shape, colour, size, thing.place, wanted, index, len(things), chance, aspect)
            for index, ((shape, colour, size), thing) in enumerate(zip(filled, things, strict=True))
        )
        gap = _gap(*placed, aspect) if len(placed) == 2 else 1.0
        best = max(best, (gap, placed), key=lambda one: one[0])
        if gap > 0.03:
            break
    return Scene(best[1], background)


def _place_one(
    shape: str,
    colour: str,
    size: str,
    where: str | None,
    wanted: Description,
    index: int,
    count: int,
    chance: random.Random,
    aspect: float,
) -> Placed:
    radius = chance.uniform(*SIZES[size])
    size_now = radius * (1.4 if wanted.motion == "growing" else 1.0)
    # Half extents as parts of width and height.
    reach_x, reach_y = (REACH * size_now * s for s in (min(1.0, 1 / aspect), min(1.0, aspect)))
    along = {"left": (0.26, 0.5), "right": (0.74, 0.5), "top": (0.5, 0.26),
             "bottom": (0.5, 0.74), "centre": (0.5, 0.5)}  # fmt: skip
    x, y = chance.uniform(0.2, 0.8), chance.uniform(0.2, 0.8)
    if where is not None:
        x, y = (one + chance.uniform(-0.035, 0.035) for one in along[where])
    elif count == 2 and wanted.relation is not None:
        first = index == 0
        axis = wanted.relation
        low, high = chance.uniform(0.22, 0.3), chance.uniform(0.7, 0.78)
        middle = 0.5 + chance.uniform(-0.06, 0.06)
        if axis in ("above", "below"):
            x, y = middle, low if first == (axis == "above") else high
        else:
            x, y = low if first == (axis == "left of") else high, middle
    keep_x, keep_y = (min(0.5, reach + 0.02) for reach in (reach_x, reach_y))
    return Placed(
        shape,
        colour,
        size,
        min(max(x, keep_x), 1 - keep_x),
        min(max(y, keep_y), 1 - keep_y),
        radius,
    )


def _gap(first: Placed, second: Placed, aspect: float) -> float:
    """Free space between two things, in units of the shorter side; tips may bridge it."""
    wide, high = max(1.0, aspect), max(1.0, 1 / aspect)
    distance = math.hypot((first.x - second.x) * wide, (first.y - second.y) * high)
    return distance - 1.2 * (first.radius + second.radius)


def moved(scene: Scene, motion: str | None, frames: int, chance: random.Random) -> list[Scene]:
    """The scene at each of `frames` moments, from its start to its end.

    Left, right, up and down travel up to half of the picture, as far as there is room; growing
    takes the radius from 0.6 to 1.4 of what it was; turning is 60 degrees clockwise.
    """
    if motion not in MOTIONS:
        return [scene] * frames
    steps = [index / max(1, frames - 1) for index in range(frames)]
    if motion == "growing":
        return [_changed(scene, radius=lambda t, s=s: t.radius * (0.6 + 0.8 * s)) for s in steps]
    if motion == "turning":
        return [_changed(scene, angle=lambda t, s=s: t.angle + math.radians(60) * s) for s in steps]
    axis = "x" if motion in ("left", "right") else "y"
    forward = motion in ("right", "down")
    low = min(getattr(thing, axis) - REACH * thing.radius for thing in scene.things)
    high = max(getattr(thing, axis) + REACH * thing.radius for thing in scene.things)
    # All things move together, and stay in the picture all the time.
    room = max(0.15, 1.0 - (high - low))
    travel = min(room, chance.uniform(0.44, 0.52))
    start = chance.uniform(0.0, room - travel)  # free space behind the hindmost
    shift = start - low if forward else 1.0 - start - high
    sign = 1 if forward else -1
    return [
        _changed(scene, **{axis: lambda t, s=s: getattr(t, axis) + shift + sign * travel * s})
        for s in steps
    ]


def _changed(scene: Scene, **changes: Callable[[Placed], float]) -> Scene:
    things = tuple(
        replace(thing, **{name: change(thing) for name, change in changes.items()})
        for thing in scene.things
    )
    return replace(scene, things=things)


# --- words ---------------------------------------------------------------------------------------


def caption(wanted: Description, chance: random.Random) -> str:
    """One of many texts that say exactly what the description says."""
    things = [_thing_words(thing, chance) for thing in wanted.things]
    moving = chance.choice(MOTION_WORDS[wanted.motion]) if wanted.motion else ""
    if len(things) == 2 and wanted.relation:
        text = f"{things[0]} {chance.choice(RELATION_WORDS[wanted.relation])} {things[1]}"
    elif len(things) == 2:
        text = chance.choice(("{} and {}", "{}, {}", "{} with {}", "{} next to {}")
                             if not any(t.place for t in wanted.things)
                             else ("{} and {}", "{}, {}")).format(*things)  # fmt: skip
    else:
        text = things[0] if things else ""
    if moving and text:
        text = f"{text}{', both' if len(things) == 2 and chance.random() < 0.3 else ''} {moving}"
    elif moving:
        text = moving
    if wanted.background:
        ground = wanted.background
        form = chance.choice(
            ("on a {} background", "{} background", "with a {} background",
             "against a {} background", "on plain {}")
        )  # fmt: skip
        joint = ", " if chance.random() < 0.5 else " "
        text = f"{text}{joint}{form.format(ground)}" if text else form.format(ground)
    return text[:1].upper() + text[1:] if chance.random() < 0.3 else text


def with_details(text: str, chance: random.Random, *, film: bool = False) -> str:
    """`text` with some words of light, camera and quality, as an enhancement adds them."""
    pool = [*LIGHTS, *CAMERAS, *QUALITIES, *(FILMS if film else ())]
    details = chance.sample(pool, k=chance.randint(1, 7))
    opening = chance.choice(("", "", "", "A photograph of ", "a picture of ", "An image of "))
    closing = chance.choice(("", "."))
    return f"{opening}{text}, {', '.join(details)}{closing}"


def opened(wanted: Description, chance: random.Random) -> Description:
    """The same with some of its words left open, as short prompts and negative prompts do."""
    kind = chance.random()
    if kind < 0.35:  # colours only: "red", "red and blue"
        return Description(tuple(Thing(colour=thing.colour) for thing in wanted.things))
    if kind < 0.5:  # shapes only
        return Description(tuple(Thing(shape=thing.shape) for thing in wanted.things))
    if kind < 0.6 and wanted.background:
        return Description(background=wanted.background)
    if kind < 0.8:  # no colours
        things = tuple(replace(thing, colour=None) for thing in wanted.things)
        return replace(wanted, things=things)
    return replace(  # where and on what is open
        wanted,
        things=tuple(replace(thing, place=None) for thing in wanted.things),
        relation=None,
        background=None,
    )


def _thing_words(thing: Thing, chance: random.Random) -> str:
    size = chance.choice(SIZE_WORDS[thing.size]) if thing.size else ""
    words = [size, thing.colour or "", thing.shape or ("" if size or thing.colour else "shape")]
    if thing.shape is None and thing.place is None and chance.random() < 0.5:
        words.append(chance.choice(("thing", "shape", "colour", "")))
    text = " ".join(word for word in words if word)
    if thing.shape is not None and chance.random() < 0.85:
        text = f"{_article(text)} {text}"
    if thing.place:
        text = f"{text} {chance.choice(PLACE_WORDS[thing.place])}"
    return text


def _article(text: str) -> str:
    return "an" if text[0] in "aeiou" else "a"


def attributes(wanted: Description) -> dict[str, int]:
    """What a text encoder must know of a text: name -> class number, 0 for what is left open."""
    known = {
        "things": len(wanted.things),
        "relation": _number(RELATIONS, wanted.relation),
        "background": _number(tuple(BACKGROUNDS), wanted.background),
        "motion": _number(MOTIONS, wanted.motion),
    }
    for index in range(2):
        thing = wanted.things[index] if index < len(wanted.things) else Thing()
        known[f"shape {index}"] = _number(SHAPES, thing.shape)
        known[f"colour {index}"] = _number(tuple(COLOURS), thing.colour)
        known[f"size {index}"] = _number(tuple(SIZE_WORDS), thing.size)
        known[f"place {index}"] = _number(PLACES, thing.place)
    return known


# name -> number of classes, for the heads that read `attributes`
ATTRIBUTES = {
    "things": 3,
    "relation": 1 + len(RELATIONS),
    "background": 1 + len(BACKGROUNDS),
    "motion": 1 + len(MOTIONS),
    **{
        f"{name} {index}": 1 + count
        for index in range(2)
        for name, count in (
            ("shape", len(SHAPES)),
            ("colour", len(COLOURS)),
            ("size", len(SIZE_WORDS)),
            ("place", len(PLACES)),
        )
    },
}


def _number(names: Sequence[str], name: str | None) -> int:
    return 0 if name is None else 1 + names.index(name)


# --- held out ------------------------------------------------------------------------------------


def held_out(wanted: Description) -> bool:
    """Whether a description is for evaluation only: never in training, in any wording.

    A fixed tenth of the combinations of shapes, colours, sizes and motion.
    """
    key = (
        "|".join(f"{thing.shape},{thing.colour},{thing.size}" for thing in wanted.things)
        + f"|{wanted.motion}"
    )
    # A small, stable hash: Python's own differs between processes.
    value = 7
    for letter in key:
        value = (value * 31 + ord(letter)) % 1_000_003
    return value % 10 == 0 and bool(wanted.things) and wanted.things[0].colour is not None


def training_description(
    chance: random.Random, *, motion: bool = False, things: int | None = None
) -> Description:
    """A random description that is not held out."""
    while held_out(wanted := random_description(chance, motion=motion, things=things)):
        pass
    return wanted


def evaluation_description(
    chance: random.Random, *, motion: bool = False, things: int | None = None
) -> Description:
    """A random description that no training has seen."""
    while not held_out(wanted := random_description(chance, motion=motion, things=things)):
        pass
    return wanted

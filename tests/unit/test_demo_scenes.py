"""The demo models' small world: descriptions, pictures of them, and what is found in pictures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo_models.checkers import Picture, look, mistakes, motion_of
from demo_models.drawing import PALETTE, colour_shares, draw
from demo_models.layout import CLASSES, layout, layout_loss
from demo_models.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    MOTION_WORDS,
    MOTIONS,
    PLACES,
    SHAPES,
    Description,
    Placed,
    Scene,
    Thing,
    attributes,
    caption,
    evaluation_description,
    held_out,
    moved,
    opened,
    place,
    random_description,
    training_description,
    with_details,
)

seeds = st.integers(0, 2**32)


def picture_of(scene: Scene, width: int = 128, height: int = 128) -> Picture:
    return pixels(draw([scene], width, height))[0]


def pixels(pictures: torch.Tensor) -> list[Picture]:
    array: Picture = (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return list(array)


def one(shape: str = "circle", colour: str = "red", **changes: float) -> Scene:
    thing = Placed(shape, colour, "medium", 0.5, 0.5, 0.16)
    return Scene((replace(thing, **changes),), "white")


@settings(deadline=None, max_examples=30)
@given(seed=seeds, size=st.sampled_from([(128, 128), (192, 128), (128, 192)]))
def test_what_is_drawn_from_a_description_is_found_again_without_a_mistake(
    seed: int, size: tuple[int, int]
) -> None:
    chance = random.Random(seed)
    wanted = random_description(chance)
    scene = place(wanted, chance, aspect=size[0] / size[1])
    noisy = picture_of(scene, *size).astype(np.int16)
    noisy += np.random.default_rng(seed).integers(-20, 21, noisy.shape, dtype=np.int16)

    assert mistakes(look(noisy.clip(0, 255).astype(np.uint8)), wanted) == []


@pytest.mark.parametrize(
    ("wanted", "wrong"),
    [
        (Description((Thing("circle", "red"),), background="white"), None),
        (Description((Thing("circle", None),)), None),
        (Description((Thing("square", "red"),)), "no red square"),
        (Description((Thing("circle", "blue"),)), "no blue circle"),
        (Description((Thing("circle", "red", "large"),)), "is medium, not large"),
        (Description((Thing("circle", "red", None, "left"),)), "not left"),
        (Description((Thing("circle", "red"),), background="black"), "background is white"),
        (Description((Thing("circle", "red"), Thing("star", "blue"))), "shows 1 things"),
    ],
)
def test_every_kind_of_mistake_is_told(wanted: Description, wrong: str | None) -> None:
    told = mistakes(look(picture_of(one())), wanted)

    assert (told == []) if wrong is None else any(wrong in text for text in told)


def test_a_relation_that_is_the_other_way_round_is_a_mistake() -> None:
    high, low = (
        Placed("star", "red", "small", 0.5, 0.2, 0.11),
        Placed("square", "blue", "small", 0.5, 0.8, 0.11),
    )
    seen = look(picture_of(Scene((high, low), "grey")))
    things = (Thing("star", "red", "small"), Thing("square", "blue", "small"))

    assert mistakes(seen, Description(things, relation="above")) == []
    assert mistakes(seen, Description(things, relation="below")) != []
    assert mistakes(seen, Description(things[::-1], relation="below")) == []


def test_a_picture_of_noise_shows_nothing() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)

    assert look(noise).things == ()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_area_of_a_circle_of_its_radius(shape: str) -> None:
    covered = draw([one(shape, "red", radius=0.2)], 256, 256)[0, 1] < 0.5

    assert covered.sum() / 256**2 == pytest.approx(np.pi * 0.2**2, rel=0.02)


def test_a_window_is_the_same_pixels_as_the_whole_picture() -> None:
    whole = draw([one("star", "blue")], 128, 96)[0]
    part = draw([one("star", "blue")], 128, 96, window=(40, 20, 48, 32))[0]

    assert torch.equal(part, whole[:, 20:52, 40:88])


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_moves_as_it_says_and_stays_in_the_picture(motion: str) -> None:
    for seed in range(2):
        chance = random.Random(seed)
        wanted = random_description(chance, motion=True)
        while wanted.motion != motion:
            wanted = random_description(chance, motion=True)
        scenes = moved(place(wanted, chance), motion, 17, chance)

        assert motion_of(pixels(draw(scenes, 96, 96))) == motion
        for thing in (thing for scene in scenes for thing in scene.things):
            # A tip may touch the border when two things leave little way to go.
            assert -0.02 < thing.x - thing.radius < thing.x + thing.radius < 1.02
            assert -0.02 < thing.y - thing.radius < thing.y + thing.radius < 1.02


def test_a_clip_that_stands_still_has_no_motion() -> None:
    assert motion_of(pixels(draw([one("star", "red")] * 17, 96, 96))) is None


@settings(deadline=None)
@given(seed=seeds, film=st.booleans())
def test_a_caption_says_every_word_of_its_description(seed: int, film: bool) -> None:
    chance = random.Random(seed)
    wanted = random_description(chance, motion=film)
    text = with_details(caption(wanted, chance), chance, film=film).lower()

    for thing in wanted.things:
        assert f"{thing.colour}" in text
        assert f"{thing.shape}" in text
    if wanted.background:
        assert wanted.background in text
    if wanted.motion:
        assert any(words in text for words in MOTION_WORDS[wanted.motion])
    colours = {colour for colour in COLOURS if f" {colour} " in f" {text.replace(',', ' ')} "}
    assert colours == {thing.colour for thing in wanted.things}


@settings(deadline=None)
@given(seed=seeds, film=st.booleans())
def test_attributes_fit_their_heads(seed: int, film: bool) -> None:
    chance = random.Random(seed)
    wanted = opened(random_description(chance, motion=film), chance)

    known = attributes(wanted)

    assert known.keys() == ATTRIBUTES.keys()
    assert all(0 <= number < ATTRIBUTES[name] for name, number in known.items())


@pytest.mark.parametrize("film", [False, True])
def test_no_training_description_is_an_evaluation_description(film: bool) -> None:
    chance = random.Random(3)
    taken = {key(training_description(chance, motion=film)) for _ in range(2000)}
    kept = {key(evaluation_description(chance, motion=film)) for _ in range(200)}

    assert not taken & kept
    share = sum(held_out(random_description(chance, motion=film)) for _ in range(2000)) / 2000
    assert 0.05 < share < 0.15


def key(wanted: Description) -> tuple[object, ...]:
    things = tuple((thing.shape, thing.colour, thing.size) for thing in wanted.things)
    return (things, wanted.motion)


@pytest.mark.parametrize("change", [caption, lambda d, c: with_details(caption(d, c), c)])
def test_the_same_seed_gives_the_same_words(
    change: Callable[[Description, random.Random], str],
) -> None:
    texts = [
        change(random_description(chance), chance)
        for chance in (random.Random(5), random.Random(5), random.Random(6))
    ]

    assert texts[0] == texts[1] != texts[2]


def test_open_descriptions_are_filled_with_what_they_allow() -> None:
    chance = random.Random(9)
    scenes = [place(Description((Thing(colour="red"),)), chance) for _ in range(200)]

    assert {scene.things[0].colour for scene in scenes} == {"red"}
    assert {scene.things[0].shape for scene in scenes} == set(SHAPES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


@pytest.mark.parametrize("where", PLACES)
def test_a_place_is_where_it_says(where: str) -> None:
    chance = random.Random(2)
    wanted = Description((Thing("star", "blue", None, where),))

    assert all(mistakes(look(picture_of(place(wanted, chance))), wanted) == [] for _ in range(5))


def test_a_layout_tells_which_colour_and_which_shape_is_where() -> None:
    left, right = (
        Placed(shape, colour, "medium", x, 0.5, 0.16)
        for shape, colour, x in (("square", "red", 0.25), ("star", "blue", 0.75))
    )

    shares = layout([Scene((left, right), "white"), one("circle", "green")], 8, 8)

    names = [*COLOURS, *BACKGROUNDS, None, *SHAPES]
    assert shares.shape == (2, CLASSES, 8, 8)
    torch.testing.assert_close(shares[:, :9].sum(dim=1), torch.ones(2, 8, 8))
    torch.testing.assert_close(shares[:, 9:].sum(dim=1), torch.ones(2, 8, 8))
    for column, colour, shape in ((1, "red", "square"), (6, "blue", "star")):
        middle = shares[0, :, 3:5, column].mean(dim=1)
        assert middle[names.index(colour)] > 0.6
        assert middle[names.index(shape)] > 0.6
    assert shares[0, names.index("white"), 0, 0] == 1
    assert shares[1, names.index("circle"), 3, 3] > 0.9


def test_the_loss_of_a_layout_is_least_for_the_right_one() -> None:
    truth = layout([one("square", "red")], 8, 8)
    other = layout([one("square", "blue")], 8, 8)

    assert layout_loss(truth * 9, truth) < layout_loss(other * 9, truth)


def test_colour_shares_of_a_drawn_picture_are_those_of_its_layout() -> None:
    scene = Scene((Placed("circle", "purple", "large", 0.4, 0.6, 0.22),), "grey")

    drawn = colour_shares(draw([scene], 128, 128), 16)

    assert drawn.shape == (1, len(PALETTE), 8, 8)
    torch.testing.assert_close(drawn, layout([scene], 8, 8)[:, :9], rtol=0, atol=0.12)

"""The ladder: what is offered, in which order, and that nothing is less exact than was allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.catalog import ModelSpec, media_catalog
from worker.config import load_settings
from worker.protocol.messages import Acquire, Declare, Granted, TenantSpec, Way
from worker.vram.broker import Broker
from worker.vram.peak import Peak, Question
from worker.vram.phases import Phase, Shape, forms, image_phases, video_phases
from worker.vram.planner import batch_ways, part_tenants, phase_ways
from worker.vram.sizes import Peaks
from worker.vram.ways import (
    EXACTNESS,
    RELUCTANCE_S,
    PartBytes,
    least_exact,
    strictest,
    tenant_id,
    ways,
)

MIB = 1 << 20
CONFIGS: dict[str, Any] = {
    part: {} for part in ("text_encoder", "text_encoder_2", "unet", "transformer", "vae")
}
UNET = PartBytes(whole=100, streamed=40, cast=30)


@cache
def spec(kind: str) -> ModelSpec:
    return media_catalog(load_settings("demo", {})).default(kind)


def phases(kind: str, shape: Shape = Shape(64, 64)) -> list[Phase]:  # noqa: B008 (frozen)
    return (image_phases if kind == "sdxl" else video_phases)(CONFIGS, "bfloat16", shape)


class Told(Peaks):
    """Is told what passes take, keeps nothing, and remembers what it was asked."""

    def __init__(self, whole: int = 60, split: int = 35, cast: int = 70, tiled: int = 20):
        self.asked: list[Question] = []
        self._sizes = {"split": split, "cast": cast, "tiled": tiled}
        self._whole = whole

    def ask(self, questions: Sequence[Question]) -> list[Peak]:
        self.asked += questions
        return [Peak(0, 0, 0, self._size(one)) for one in questions]

    def _size(self, one: Question) -> int:
        found = [size for name, size in self._sizes.items() if getattr(one, name)]
        return found[0] if found else self._whole


# --- what a phase may do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "phase", "exactness", "names"),
    [
        ("sdxl", "denoise", "bit", ["whole"]),
        ("sdxl", "denoise", "close", ["whole", "split"]),
        ("sdxl", "denoise", "lossy", ["whole", "split", "quantised"]),
        ("sdxl", "decode", "bit", ["whole"]),
        ("sdxl", "decode", "lossy", ["whole", "tiled"]),
        ("sdxl", "encode", "lossy", ["whole"]),
        ("wan", "denoise", "close", ["whole"]),  # its texts are computed one by one anyway
        ("wan", "denoise", "lossy", ["whole", "quantised"]),
        ("wan", "decode", "close", ["whole", "tiled"]),
    ],
)
def test_a_phase_has_the_forms_that_its_exactness_allows(
    kind: str, phase: str, exactness: str, names: list[str]
) -> None:
    [one] = [one for one in phases(kind) if one.name == phase]
    assert [*forms(one, exactness)] == names


def test_without_guidance_there_is_no_batch_to_split() -> None:
    [denoise] = [
        one for one in phases("sdxl", Shape(64, 64, guided=False)) if one.name == "denoise"
    ]
    assert [*forms(denoise, "close")] == ["whole"]


def test_of_a_vace_video_the_denoiser_is_quantised_and_not_the_vae_beside_it() -> None:
    configs = CONFIGS | {"vace": {"_class_name": "WanVACETransformer3DModel"}}
    shape = Shape(64, 64, 5, given_frames=1)
    [denoise] = [one for one in video_phases(configs, "bfloat16", shape) if one.name == "denoise"]

    found = forms(denoise, "lossy")["quantised"]

    assert denoise.parts == ("vace", "vae")
    assert [(one.part, one.cast) for one in found.passes] == [
        ("transformer", True), ("video_vae_frames", False),
    ]  # fmt: skip


def test_a_form_differs_from_the_phase_in_its_first_pass_alone() -> None:
    [denoise] = [one for one in phases("sdxl") if one.name == "denoise"]
    for name, one in forms(denoise, "lossy").items():
        changed = {"whole": {}, "split": {"split": True}, "quantised": {"cast": True}}[name]
        assert one == replace(denoise, passes=(replace(denoise.passes[0], **changed),))


# --- the rungs ------------------------------------------------------------------------------------


def test_a_large_picture_has_all_rungs_from_the_largest_to_the_smallest() -> None:
    found = ways("m", {"unet": UNET}, {"whole": 90, "split": 50, "quantised": 95}, passes=10)

    assert [(way.name, way.tenants, way.peak_bytes, way.exactness) for way in found] == [
        ("whole", ("m.unet",), 90, "bit"),
        ("split", ("m.unet",), 50, "close"),
        ("streamed", (), 130, "bit"),
        ("quantised", ("m.unet.float8",), 95, "lossy"),
        ("streamed+split", (), 90, "close"),
    ]
    seconds = {way.name: way.longer_s for way in found}
    assert seconds["whole"] == 0
    assert seconds["streamed+split"] == 2 * seconds["streamed"] + seconds["split"]


def test_a_form_that_takes_no_less_is_no_rung() -> None:
    heavy = replace(UNET, cast=95)
    found = ways("m", {"unet": heavy}, {"whole": 9, "split": 9, "quantised": 15}, passes=1)
    assert [way.name for way in found] == ["whole", "streamed"]


def test_what_is_not_cast_beside_it_comes_as_it_is() -> None:
    parts = {"vace": UNET, "vae": PartBytes(whole=50, streamed=50)}
    found = {w.name: w for w in ways("m", parts, {"whole": 9, "quantised": 9}, passes=1)}
    assert found["quantised"].tenants == ("m.vace.float8", "m.vae")
    assert found["streamed"].tenants == ("m.vae",)


sizes = st.integers(0, 1000)
part_bytes = st.builds(
    lambda whole, streamed, cast: PartBytes(whole, min(whole, streamed), min(whole, cast)),
    sizes, sizes, sizes,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    part_bytes, sizes, st.dictionaries(st.sampled_from(["split", "tiled", "quantised"]), sizes),
    st.integers(1, 100),
)  # fmt: skip
def test_rungs_only_go_down_and_the_first_is_the_quickest_and_exact(
    part: PartBytes, whole: int, others: dict[str, int], passes: int
) -> None:
    found = ways("m", {"unet": part}, {"whole": whole, **others}, passes=passes)

    held = {"m.unet": part.whole, "m.unet.float8": part.cast}
    totals = [way.peak_bytes + sum(held[one] for one in way.tenants) for way in found]
    assert totals == sorted(totals, reverse=True)
    assert {way.name for way in found} >= {"whole"}
    [quickest] = [way for way in found if way.name == "whole"]
    assert (quickest.longer_s, quickest.exactness) == (0.0, "bit")
    assert all(way.longer_s >= 0 for way in found)
    assert len({way.name for way in found}) == len(found)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["sdxl", "wan"]), st.sampled_from(EXACTNESS), part_bytes,
    st.tuples(sizes, sizes, sizes, sizes), st.booleans(), st.integers(1, 4),
)  # fmt: skip
def test_no_rung_is_less_exact_than_was_allowed_nor_named_more_exact_than_it_is(
    tmp_path_factory: pytest.TempPathFactory, kind: str, allowed: str, part: PartBytes,
    peaks: tuple[int, int, int, int], guided: bool, pictures: int,
) -> None:  # fmt: skip
    known = Told(*peaks)
    model, shape = spec(kind), Shape(64, 64, guided=guided)
    denoiser = "unet" if kind == "sdxl" else "transformer"
    parts = {name: replace(part, cast=part.cast * (name == denoiser)) for name in CONFIGS}
    made = [
        phase_ways(model, one, parts, known, shape, steps=3, images=2, exactness=allowed)
        for one in phases(kind, shape)
    ]
    if kind == "sdxl" and allowed != "bit":
        [_, denoise, _] = phases(kind, shape)
        batch = batch_ways(
            model, denoise, parts, known, steps=3, pictures=pictures, exactness=allowed
        )
        assert all(way.exactness != "bit" for way in batch.ways)
        made.append(batch)

    truth = {"whole": "bit", "streamed": "bit", "quantised": "lossy"}
    for way in [way for phase in made for way in phase.ways]:
        assert EXACTNESS.index(way.exactness) <= EXACTNESS.index(allowed)
        assert EXACTNESS.index(way.exactness) >= EXACTNESS.index(truth.get(way.name, "close"))
    # What is not allowed is not even measured.
    assert allowed != "bit" or not any(one.split or one.tiled or one.cast for one in known.asked)
    assert allowed == "lossy" or not any(one.cast for one in known.asked)


def test_what_a_phase_needs_is_measured_in_one_round(tmp_path: Path) -> None:
    rounds: list[int] = []

    def measured(questions: Sequence[Question]) -> list[Peak]:
        rounds.append(len(questions))
        return [Peak(0, 0, 0, 9) for _ in questions]

    [denoise] = [one for one in phases("sdxl") if one.name == "denoise"]

    phase_ways(
        spec("sdxl"), denoise, {"unet": UNET}, Peaks(tmp_path, measured), Shape(64, 64),
        steps=4, images=1, exactness="lossy",
    )  # fmt: skip

    assert rounds == [3]


def test_a_batch_is_as_exact_as_its_strictest_job_wants() -> None:
    assert strictest(["lossy", "close", "lossy"]) == "close"
    assert strictest(["lossy", "lossy"]) == "lossy"
    assert least_exact(["bit", "lossy", "close"]) == "lossy"
    assert least_exact([]) == "bit"


# --- what the broker takes of it ------------------------------------------------------------------


def tenants() -> tuple[TenantSpec, ...]:
    return part_tenants(
        spec("sdxl"),
        {"unet": PartBytes(100 * MIB, 40 * MIB, 30 * MIB), "vae": PartBytes(9, 9)},
    )


def test_a_denoiser_in_eight_bits_is_a_tenant_of_its_own_and_never_pinned() -> None:
    pinned = replace(spec("sdxl"), pinned=True)
    made = {one.id: one for one in part_tenants(pinned, {"unet": UNET, "vae": PartBytes(9, 9)})}

    assert [*made] == ["demo-image.unet", "demo-image.vae", "demo-image.unet.float8"]
    cast = made[tenant_id("demo-image", "unet", cast=True)]
    assert (cast.size_bytes, cast.floor_bytes, cast.pinned) == (30, 30, False)
    assert made["demo-image.unet"].pinned
    assert cast.back_s == made["demo-image.unet"].back_s  # all of it comes, to be cast there


def granted(
    budget: int, found: Sequence[Way], *, beside: int = 0, back_s: float = 1.0
) -> str | None:
    """The way that a broker takes. beside: bytes of an idle model whose coming back takes so long
    and is certain."""
    broker = Broker(budget)
    epoch = broker.join("media", 0)
    other = TenantSpec(
        id="other.weights", model="other", size_bytes=beside, floor_bytes=beside, host_copy=True,
        back_s=back_s, keep_alive_s=1e6,
    )  # fmt: skip
    if beside:
        broker.take("media", Declare(epoch=epoch, model="other", tenants=(other,)), 0.0)
        way = Way(name="whole", tenants=(other.id,), peak_bytes=0)
        ask = Acquire(epoch=epoch, number=1, request_id="o", phase="p", ways=(way,), standing=True)
        broker.take("media", ask, 0.0)
        broker.finish_all()
    broker.take("media", Declare(epoch=epoch, model="demo-image", tenants=tenants()), 0.0)
    ask = Acquire(epoch=epoch, number=2, request_id="r", phase="denoise", ways=tuple(found))
    orders = broker.take("media", ask, 0.0)
    answers = [message for _, message in orders if isinstance(message, Granted)]
    return found[answers[0].way].name if answers else None


LADDER = {"whole": 90 * MIB, "split": 50 * MIB, "quantised": 95 * MIB}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(200, "whole"), (151, "split"), (149, "streamed"), (126, "quantised"), (91, "streamed+split")],
)
def test_what_fits_decides_where_only_one_way_does(budget: int, expected: str) -> None:
    found = ways("demo-image", {"unet": PartBytes(100 * MIB, 40 * MIB, 30 * MIB)}, LADDER, passes=1)
    names = {"whole": 0, "split": 1, "streamed": 2, "quantised": 3, "streamed+split": 4}
    fitting = [way for way in found if names[way.name] <= names[expected]]
    assert granted(budget * MIB, fitting) == expected


@pytest.mark.parametrize("allowed", EXACTNESS)
@pytest.mark.parametrize("budget", range(60, 220, 20))
def test_nothing_less_exact_than_allowed_is_ever_granted(allowed: str, budget: int) -> None:
    peaks = {"bit": ["whole"], "close": ["whole", "split"], "lossy": [*LADDER]}[allowed]
    found = ways(
        "demo-image", {"unet": PartBytes(100 * MIB, 40 * MIB, 30 * MIB)},
        {name: LADDER[name] for name in peaks}, passes=30,
    )  # fmt: skip
    name = granted(budget * MIB, found)
    exactness = next((way.exactness for way in found if way.name == name), "bit")
    assert EXACTNESS.index(exactness) <= EXACTNESS.index(allowed)


@pytest.mark.parametrize(
    ("streamed_s", "expected"),
    [(RELUCTANCE_S["lossy"] - 0.1, "streamed"), (RELUCTANCE_S["lossy"] + 0.1, "quantised")],
)
def test_a_lossy_way_has_to_save_seconds_before_it_is_taken(
    streamed_s: float, expected: str
) -> None:
    found = [
        Way(name="whole", tenants=("demo-image.unet",), peak_bytes=100 * MIB),
        Way(name="streamed", tenants=(), peak_bytes=90 * MIB, longer_s=streamed_s),
        Way(name="quantised", tenants=("demo-image.unet.float8",), peak_bytes=90 * MIB,
            exactness="lossy"),
    ]  # fmt: skip
    # 5 ms are those of the eight-bit denoiser's own coming.
    assert granted(150 * MIB, found) == expected


def test_what_is_idle_goes_before_a_picture_becomes_lossy() -> None:
    found = ways(
        "demo-image", {"unet": PartBytes(100 * MIB, 40 * MIB, 30 * MIB)}, LADDER, passes=30
    )
    fast = [way for way in found if way.name in ("whole", "quantised")]
    # Asked to give way: it is told to leave, and nothing is granted yet.
    assert granted(200 * MIB, fast, beside=60 * MIB, back_s=1.0) is None
    # Where that costs more seconds than the other is worth, it stays.
    assert granted(200 * MIB, fast, beside=60 * MIB, back_s=9.0) == "quantised"

"""Weighted terms and LoRAs: nothing is dropped; what cannot be read is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.catalog import NATIVE_FRAMES, AdapterSpec, Catalog, ModelSpec
from worker.config import Kind, Limits
from worker.errors import InvalidRequest, OutOfRange, Unsupported, WorkerError, has_trap_word
from worker.jobs.decode import JobRequest, decode_job
from worker.jobs.weights import MAX_DEPTH, MAX_TERMS, read_terms

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

LORAS = ("Ink", "painterly", *(f"l{number}" for number in range(9)))


def spec(model_id: str, kind: Kind, loras: tuple[str, ...] = ()) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        kind=kind,
        path=Path("/models") / model_id,
        shown_path=f"models/{model_id}",
        aliases=(),
        dtype="float16",
        chat_template="chatml",
        config_path=None,
        display_name=model_id,
        default_size=(64, 64),
        default_frames=NATIVE_FRAMES,
        adapters=tuple(AdapterSpec(one, "lora", Path("/models") / one, None) for one in loras),
    )


CATALOG = Catalog(
    [
        spec("painter", "sdxl", LORAS),
        spec("plain", "sdxl"),
        spec("wan", "wan"),
        spec("moving", "wan", ("slow",)),
    ]
)


def decode(body: dict[str, Any]) -> JobRequest:
    return decode_job({"prompt": "a (red:1.5) cube", **body}, CATALOG, Limits())


def weighted(weights: Any) -> list[tuple[str, float]]:
    job = decode({"compel_enabled": True, "compel_weights": weights})
    assert job.params.prompt == "a (red:1.5) cube"  # which is never read for weights
    assert job.ignored == ()
    return [(term.text, term.weight) for term in job.params.weighted]


def refusal(kind: type[WorkerError], body: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught:
        decode(body)
    assert type(caught.value) is kind
    assert not has_trap_word(str(caught.value))
    return str(caught.value)


# --- terms as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        # Presets of the web app.
        ("(beautiful:1.3), (detailed:1.2)", [("beautiful", 1.3), ("detailed", 1.2)]),
        (
            "(portrait:1.2), (face:1.3), (detailed eyes:1.1)",
            [("portrait", 1.2), ("face", 1.3), ("detailed eyes", 1.1)],
        ),
        # A term alone is as usual, brackets alone are 1.1.
        ("sharp", [("sharp", 1.0)]),
        ("(sharp)", [("sharp", 1.1)]),
        ("sharp, (red), (blue:0.5)", [("sharp", 1.0), ("red", 1.1), ("blue", 0.5)]),
        # Numbers.
        ("(a:0)", [("a", 0.0)]),
        ("(a:2)", [("a", 2.0)]),
        ("(a:1.)", [("a", 1.0)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:+1.25)", [("a", 1.25)]),
        ("(a:-0)", [("a", 0.0)]),
        # White space counts inside a term only.
        ("  ( deep  red : 1.3 )\n,\t(b:1)  ", [("deep  red", 1.3), ("b", 1.0)]),
        ("(a:1.2),(b:1.3)", [("a", 1.2), ("b", 1.3)]),
        # Nothing between commas is nothing.
        ("(a:1.2), , (b:1.1),", [("a", 1.2), ("b", 1.1)]),
        # A comma in plain brackets is text.
        ("(red, round:1.2)", [("red, round", 1.2)]),
        # Brackets multiply, as decimal numbers.
        ("((a))", [("a", 1.21)]),
        ("(((a)))", [("a", 1.331)]),
        ("((a:1.2))", [("a", 1.32)]),
        ("((a:1.2):0.5)", [("a", 0.6)]),
        ("((a:1.1), b, (c, d:0.9):1.1)", [("a", 1.21), ("b", 1.1), ("c, d", 0.99)]),
        # A backslash makes text of what would mean something.
        (r"(cube \(red\):1.2)", [("cube (red)", 1.2)]),
        (r"ratio 16\:9, a\, b", [("ratio 16:9", 1.0), ("a, b", 1.0)]),
        (r"(a\\b:1.2), c\d, e\ ", [("a\\b", 1.2), ("c\\d", 1.0), ("e\\", 1.0)]),
        # Everything else is text, what compel's own notation and others use for weights, too.
        ("[a], b++, {c|d}, e-, 1.5", [(x, 1.0) for x in ("[a]", "b++", "{c|d}", "e-", "1.5")]),
        ("(👍🏽 Größe:1.3)", [("👍🏽 Größe", 1.3)]),
        # Nothing is dropped: not what comes again, not what comes late.
        ("(a:1.2), (A:1.3), (a:1.2)", [("a", 1.2), ("A", 1.3), ("a", 1.2)]),
        (", ".join(f"(t{n}:1.2)" for n in range(50)), [(f"t{n}", 1.2) for n in range(50)]),
    ],
)
def test_terms_are_read_in_their_order(text: str, terms: list[tuple[str, float]]) -> None:
    assert weighted(text) == terms


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("(a:1.3", 2, "a number and a closing bracket must follow the colon"),
        ("(a", 0, "this bracket is not closed"),
        ("x, (a, (b)", 3, "this bracket is not closed"),
        (r"(a\)", 0, "this bracket is not closed"),
        ("a)", 1, "there is no opening bracket for this one"),
        ("(a:1.3))", 7, "there is no opening bracket for this one"),
        ("(a:high)", 2, "a number and a closing bracket must follow the colon"),
        ("(a:1.3x)", 2, "a number and a closing bracket must follow the colon"),
        ("(a:1e0)", 2, "a number and a closing bracket must follow the colon"),
        ("(a:)", 2, "a number and a closing bracket must follow the colon"),
        ("(a:1:2)", 2, "a number and a closing bracket must follow the colon"),
        ("(a:1234567890)", 2, "a number and a closing bracket must follow the colon"),
        ("(a:٣)", 2, "a number and a closing bracket must follow the colon"),
        ("a:1.3", 1, "a weight stands in brackets"),
        ("(b:1.2), a: b", 10, "a weight stands in brackets"),
        ("(a)1.3", 3, "a comma is missing here"),
        ("(a:1.2) (b:1.3)", 8, "a comma is missing here"),
        ("red (zebra:1.3)", 4, "a comma is missing here"),
        ("(red (zebra:1.3):1.2)", 5, "a comma is missing here"),
        ("()", 0, "there is no term in these brackets"),
        ("b, (:1.3)", 3, "there is no term in these brackets"),
        ("((),a)", 1, "there is no term in these brackets"),
        ("(" * (MAX_DEPTH + 1), MAX_DEPTH, "there are more than 16 brackets within each other"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_with_the_place(
    text: str, place: int, why: str
) -> None:
    said = refusal(InvalidRequest, {"compel_enabled": True, "compel_weights": text})

    assert said.startswith(f"compel_weights cannot be read at character {place}: {why}")
    assert "zebra" not in said  # nobody's text is repeated


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(a:2.1)", "the weight at character 1 of compel_weights is 2.1; allowed: from 0.0 to 2.0"),
        ("b, ( a:-0.1)", "the weight at character 5 of compel_weights is -0.1; allowed: from 0.0"),
        ("((a:1.9):1.1)", "the weight at character 2 of compel_weights is 2.09; allowed: from 0.0"),
        ("(a:999999999)", "is 999999999.0; allowed: from 0.0 to 2.0"),
    ],
)
def test_a_weight_beyond_the_range_is_refused_with_the_place(text: str, said: str) -> None:
    assert said in refusal(OutOfRange, {"compel_enabled": True, "compel_weights": text})


def test_terms_have_bounds() -> None:
    most = ",".join(["a"] * MAX_TERMS)

    assert len(weighted(most)) == MAX_TERMS == 128
    said = refusal(OutOfRange, {"compel_enabled": True, "compel_weights": most + ",a"})
    assert said == "compel_weights has 129 terms; allowed: at most 128"
    said = refusal(OutOfRange, {"compel_enabled": True, "compel_weights": "a" * 20_001})
    assert said == "compel_weights has 20001 characters; allowed: at most 20000"
    said = refusal(OutOfRange, {"compel_enabled": True, "compel_weights": {"a" * 20_001: 1}})
    assert said == "compel_weights has 20001 characters; allowed: at most 20000"


NUMBERS = st.integers(0, 2000).map(lambda thousandth: thousandth / 1000)


@settings(max_examples=200, **PATIENT)
@given(
    terms=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), NUMBERS),
        max_size=6,
    )
)
def test_any_term_can_be_written_and_is_read_back(terms: list[tuple[str, float]]) -> None:
    terms = [(text.strip(), weight) for text, weight in terms if text.strip()]

    written = ", ".join(f"({_escaped(text)}:{weight})" for text, weight in terms)

    read = [(term.text, term.weight) for term in read_terms(written)]
    assert read == terms


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "\\():," else char for char in text)


@settings(max_examples=400, **PATIENT)
@given(text=st.text(st.sampled_from(r"(),:\ .19a-") | st.characters(), max_size=24))
def test_any_text_is_terms_or_the_clients_mistake(text: str) -> None:
    try:
        terms = read_terms(text)
    except (InvalidRequest, OutOfRange) as exc:
        assert not has_trap_word(str(exc))
    else:
        assert all(term.text and 0 <= term.weight <= 2 for term in terms)


# --- terms as an object ------------------------------------------------------------------------


def test_an_object_has_its_terms_as_they_are() -> None:
    weights = {"red": 1.3, " (round:2), x ": 0, "a\\b": 2, "Red": 1.3}

    terms = weighted(weights)

    assert terms == [("red", 1.3), (" (round:2), x ", 0.0), ("a\\b", 2.0), ("Red", 1.3)]


@pytest.mark.parametrize(
    ("weights", "kind", "said"),
    [
        ({"a": 1, "b": 2.01}, OutOfRange, "weight 2 of compel_weights is 2.01; allowed: from 0.0"),
        ({"a": -0.5}, OutOfRange, "weight 1 of compel_weights is -0.5; allowed: from 0.0 to 2.0"),
        ({"a": 10**400}, OutOfRange, "weight 1 of compel_weights is too large a number"),
        ({"a": float("nan")}, OutOfRange, "weight 1 of compel_weights is too large a number"),
        ({"a": "1.2"}, InvalidRequest, "weight 1 of compel_weights must be a number"),
        ({"a": None}, InvalidRequest, "weight 1 of compel_weights must be a number"),
        ({"a": True}, InvalidRequest, "weight 1 of compel_weights must be a number"),
        ({"a": {"b": 1}}, InvalidRequest, "weight 1 of compel_weights must be a number"),
        ({"": 1}, InvalidRequest, "weight 1 of compel_weights has no term"),
        ({" \n": 1}, InvalidRequest, "weight 1 of compel_weights has no term"),
        ({"\ud83d": 1}, InvalidRequest, "unpaired surrogate"),
        ({f"{n}": 1 for n in range(129)}, OutOfRange, "129 terms; allowed: at most 128"),
        ([["a", 1.2]], InvalidRequest, "compel_weights must be a string such as"),
        (1.3, InvalidRequest, "compel_weights must be a string such as"),
        (True, InvalidRequest, "compel_weights must be a string such as"),
        ("(\udc4d:1.2)", InvalidRequest, "unpaired surrogate"),
    ],
)
def test_weights_that_are_none_are_refused(
    weights: Any, kind: type[WorkerError], said: str
) -> None:
    assert said in refusal(kind, {"compel_enabled": True, "compel_weights": weights})


# --- whether they count ------------------------------------------------------------------------


def test_weights_count_in_the_config_too() -> None:
    """Older bodies repeat them there."""
    job = decode({"config": {"compel_enabled": True, "compel_weights": "(a:1.2)"}})

    assert [term.text for term in job.params.weighted] == ["a"]


@pytest.mark.parametrize("enabled", [False, None])
def test_weights_that_are_switched_off_are_listed(enabled: bool | None) -> None:
    job = decode({"compel_enabled": enabled, "compel_weights": "(a:1.2"})

    assert job.params.weighted == ()
    assert job.ignored == ("compel_weights",)


def test_weights_in_the_metadata_are_those_of_the_form() -> None:
    """The producer copies them to the top when they are to count."""
    metadata = {"compel_enabled": True, "compel_weights": "(a:1.2)"}

    job = decode({"compel_enabled": False, "metadata": metadata})

    assert job.params.weighted == ()
    assert job.ignored == ("metadata.compel_enabled", "metadata.compel_weights")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("weights", "ignored"),
    [
        ("", ("compel_enabled",)),
        (None, ("compel_enabled",)),
        (False, ("compel_enabled",)),
        ({}, ("compel_enabled",)),
        (" ", ("compel_enabled", "compel_weights")),
        (" , ,", ("compel_enabled", "compel_weights")),
    ],
)
def test_no_weights_are_nothing_to_do(weights: Any, ignored: tuple[str, ...], kind: str) -> None:
    job = decode({"type": kind, "compel_enabled": True, "compel_weights": weights})

    assert job.params.weighted == ()
    assert job.ignored == ignored


@pytest.mark.parametrize("kind", ["video_fast", "image_high"])
def test_wan_takes_no_weights(kind: str) -> None:
    body = {"type": kind, "compel_enabled": True, "compel_weights": "(a:1.2)"}

    said = refusal(Unsupported, body)

    assert said.startswith("compel_weights are for images of kind sdxl")
    assert decode({**body, "compel_enabled": False}).ignored == ("compel_weights",)


@pytest.mark.parametrize("value", ["true", 1, [False]])
def test_the_switch_is_true_or_false(value: object) -> None:
    said = refusal(InvalidRequest, {"compel_enabled": value, "compel_weights": "(a:1.2)"})

    assert said == "compel_enabled must be true or false"


# --- LoRAs -------------------------------------------------------------------------------------


def test_loras_are_taken_in_their_order_as_the_catalog_spells_them() -> None:
    job = decode({"loras": [{"id": "PAINTERLY", "weight": 0.5}, {"id": "ink"}]})

    assert [(one.id, one.weight) for one in job.params.loras] == [("painterly", 0.5), ("Ink", 1.0)]
    assert job.ignored == ()
    assert decode({"config": {"loras": [{"id": "Ink"}]}}).params.loras[0].id == "Ink"


def test_eight_loras_are_the_most() -> None:
    job = decode({"loras": [{"id": f"l{number}"} for number in range(8)]})

    assert len(job.params.loras) == 8


def test_what_a_lora_does_not_have_is_listed() -> None:
    job = decode({"loras": [{"id": "ink", "scale": 0.3, "weight": None}]})

    assert job.ignored == ("loras[0].scale",)


@pytest.mark.parametrize(
    ("loras", "kind", "said"),
    [
        ("ink", InvalidRequest, "loras must be an array of objects with an id and a weight"),
        ({"id": "ink"}, InvalidRequest, "loras must be an array of objects"),
        (["ink"], InvalidRequest, "loras[0] must be an object with an id and a weight"),
        ([{"weight": 1}], InvalidRequest, "loras[0].id is missing"),
        ([{"id": 5}], InvalidRequest, "loras[0].id must be a string"),
        ([{"id": "ink", "weight": "1"}], InvalidRequest, "loras[0].weight must be a number"),
        ([{"id": "ink"}, {"id": "INK"}], InvalidRequest, "loras[1] names a LoRA"),
        ([{"id": "ink", "weight": 2.1}], OutOfRange, "allowed: from -2.0 to 2.0"),
        ([{"id": "ink", "weight": -2.1}], OutOfRange, "allowed: from -2.0 to 2.0"),
        ([{"id": f"l{n}"} for n in range(9)], OutOfRange, "9 entries; allowed: at most 8"),
        ([{"id": "l0"}, {"id": "\ud83d"}], Unsupported, "painter has no LoRA with the id of"),
        ([{"id": "water"}], Unsupported, "known: Ink, painterly, l0"),
    ],
)
def test_a_lora_that_cannot_be_had_is_refused(
    loras: Any, kind: type[WorkerError], said: str
) -> None:
    assert said in refusal(kind, {"loras": loras})


@pytest.mark.parametrize("model", ["plain", "wan"])
def test_a_model_without_loras_says_so(model: str) -> None:
    kind = "image" if model == "plain" else "video"

    said = refusal(Unsupported, {"type": kind, "model": model, "loras": [{"id": "ink"}]})

    assert said.startswith(f"model {model} has no LoRA with the id of loras[0]; known: none")


def test_a_video_model_may_have_loras_of_its_own() -> None:
    job = decode({"type": "video", "model": "moving", "loras": [{"id": "slow", "weight": -2}]})

    assert [(one.id, one.weight) for one in job.params.loras] == [("slow", -2.0)]

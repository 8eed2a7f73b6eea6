"""Parameters: from the least to the most specific, each value with its row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import Invalid
from gateway.prompts.parameters import merge
from gateway.values.assembly import AssembleRequest, Value
from gateway.values.rows import ANY, Character, ParameterSet, Snapshot
from tests.gateway import snapshots
from tests.gateway.snapshots import MODELS, template


def merged(
    rows: tuple[ParameterSet, ...] = (),
    *,
    character: Character | None = None,
    live: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Value]:
    request = snapshots.request(**fields)
    one = template(version=3, **(live or {}))
    return merge(Snapshot(revision=1, parameters=rows), request, one, character, "mytho")[0]


def values(found: dict[str, Value]) -> dict[str, object]:
    return {name: one.value for name, one in found.items()}


def test_without_rows_the_contract_and_the_template_speak() -> None:
    found = merged(live={"params": {"top_p": 0.95, "seed": None}})

    assert found == {
        "temperature": Value(value=0.7, origin="contract"),
        "top_p": Value(value=0.95, origin="template t1 v3"),
        "max_tokens": Value(value=160, origin="template t1 v3"),
    }


def test_each_level_goes_over_the_one_before_value_by_value() -> None:
    rows = (
        ParameterSet(id=1, params={"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "top_k": 1}),
        ParameterSet(id=2, profile="fast", params={"b": 2, "c": 2, "d": 2, "e": 2, "f": 2}),
        ParameterSet(id=3, job_type="image", params={"c": 3, "d": 3, "e": 3, "f": 3}),
        ParameterSet(id=4, model_key="mytho", params={"d": 4, "e": 4, "f": 4, "seed": 4}),
        ParameterSet(id=5, user_tier="pro", params={"e": 5, "f": 5, "stop": "x"}),
        ParameterSet(id=6, character_id="mara", params={"f": 6}),
    )
    mara = Character(id="mara", name="M", defaults={"top_k": 7, "seed": 7, "f": 7, "steps": 30})

    found = merged(
        rows[::-1], character=mara, character_id="mara", user_tier="pro", params={"stop": "r"}
    )

    assert {name: one.value for name, one in found.items() if len(name) == 1} == {
        "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6,
    }  # fmt: skip
    assert found["top_k"] == Value(value=7, origin="character mara")
    assert found["seed"].origin == "character mara"
    assert found["stop"] == Value(value="r", origin="request")
    assert found["e"].origin == "parameters 5"
    assert "steps" not in found


def test_a_row_that_names_more_is_more_specific_only_below_what_is_stronger() -> None:
    rows = (
        ParameterSet(id=1, user_tier="pro", params={"a": "tier"}),
        ParameterSet(id=2, model_key="mytho", job_type="image", profile="fast", params={"a": "m"}),
    )

    assert merged(rows, user_tier="pro")["a"].value == "tier"
    assert merged(rows)["a"].value == "m"


def test_rows_of_another_case_do_not_apply() -> None:
    rows = (
        ParameterSet(id=1, profile="high", params={"a": 1}),
        ParameterSet(id=2, job_type="video", params={"a": 1}),
        ParameterSet(id=3, model_key="opus", params={"a": 1}),
        ParameterSet(id=4, user_tier="free", params={"a": 1}),
        ParameterSet(id=5, character_id="mara", params={"a": 1}),
    )

    assert "a" not in merged(rows)


@pytest.mark.parametrize(
    ("given_tokens", "expected"), [(0, 1), (-5, 1), (1, 1), (62, 62), (8.0, 8)]
)
def test_max_tokens_is_a_whole_number_from_one(given_tokens: object, expected: int) -> None:
    found = merged(params={"max_tokens": given_tokens})

    assert found["max_tokens"].value == expected
    assert isinstance(found["max_tokens"].value, int)
    assert found["max_tokens"].origin.startswith("request")


@pytest.mark.parametrize("wrong", ["62", 1.5, True, [62], float("nan")])
def test_max_tokens_that_is_no_number_is_refused_with_who_gave_it(wrong: object) -> None:
    with pytest.raises(Invalid, match="max_tokens of request is no whole number"):
        merged(params={"max_tokens": wrong})


def test_none_says_nothing() -> None:
    found = merged(params={"max_tokens": None, "temperature": None})

    assert found["max_tokens"].value == 160
    assert found["temperature"].origin == "contract"


@settings(deadline=None)
@given(
    snapshots.parameter_sets(), snapshots.requests(), st.sampled_from(MODELS), snapshots.params()
)
def test_every_value_is_that_of_its_origin_and_no_stronger_row_has_the_name(
    rows: tuple[ParameterSet, ...], request: AssembleRequest, model_key: str, own: dict[str, int]
) -> None:
    one = template(version=2, params=own)
    found, step = merge(Snapshot(revision=1, parameters=rows), request, one, None, model_key)

    def rank(row: ParameterSet) -> tuple[object, ...]:
        names = (row.character_id, row.user_tier, row.model_key, row.job_type, row.profile)
        return (*(name != ANY for name in names), row.id)

    applying = [
        row
        for row in rows
        if row.character_id in (ANY, request.character_id)
        and row.user_tier in (ANY, request.user_tier)
        and row.model_key in (ANY, model_key)
        and row.job_type in (ANY, request.job_type)
        and row.profile in (ANY, request.quality)
    ]
    for name, value in found.items():
        having = [row for row in applying if name in row.params]
        if name in request.params:
            source, expected = "request", request.params[name]
        elif having:
            best = max(having, key=rank)
            source, expected = f"parameters {best.id}", best.params[name]
        elif name in own:
            source, expected = "template t1 v2", own[name]
        elif name == "max_tokens":
            source, expected = "template t1 v2", 160
        else:
            source, expected = "contract", {"temperature": 0.7, "top_p": 0.9}[name]
        if name == "max_tokens":
            expected = max(1, expected)
        assert value.origin.split(",")[0] == source
        assert value.value == expected
    named = {"temperature", "top_p", "max_tokens", *own, *request.params}
    assert set(found) == named.union(*(row.params for row in applying))
    assert set(step.detail["rows"]) == {row.id for row in applying}


@settings(deadline=None)
@given(snapshots.parameter_sets(), snapshots.requests())
def test_the_order_of_rows_changes_nothing(
    rows: tuple[ParameterSet, ...], request: AssembleRequest
) -> None:
    one = template()

    forth = merge(Snapshot(revision=1, parameters=rows), request, one, None, "opus")
    back = merge(Snapshot(revision=1, parameters=rows[::-1]), request, one, None, "opus")

    assert forth == back

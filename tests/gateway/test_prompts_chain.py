"""The model chain: choice, default, others of the task, last resort; never another task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings

from gateway.errors import ModelNotAllowed
from gateway.prompts.chain import Chain, model_chain
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import ANY, Assignment, LlmModel, Provider, Snapshot
from tests.gateway import snapshots

PROVIDERS = (
    Provider(id=1, name="worker", kind="worker"),
    Provider(
        id=2, name="open", kind="openai", base_url="https://m.example/v1", secret_ref="OPEN_KEY"
    ),
    Provider(id=3, name="off", kind="openai", is_active=False),
)


def model(id: int, key: str, provider_id: int = 1, **fields: Any) -> LlmModel:
    values: dict[str, Any] = {"external_id": f"x-{key}", "model_name": key, **fields}
    return LlmModel(id=id, provider_id=provider_id, model_key=key, **values)


MODELS = (
    model(1, "own"),
    model(2, "open", 2),
    model(3, "retired", is_active=False),
    model(4, "gone", missing_since="2026-11-01"),
    model(5, "cut", 3),
    model(6, "spare"),
    model(7, "orphan", 9),
)


def assign(id: int, key: str, task: str = "enhancement", **fields: Any) -> Assignment:
    model_id = next((one.id for one in MODELS if one.model_key == key), 99)
    values: dict[str, Any] = {"modality": "chat", **fields}
    return Assignment(
        id=id, llm_model_id=model_id, display_name=key, model_key=key, task=task, **values
    )


def chain(*assignments: Assignment, **fields: Any) -> Chain:
    rows = Snapshot(revision=1, providers=PROVIDERS, models=MODELS, assignments=assignments)
    return model_chain(rows, snapshots.request(**fields))


def order(found: Chain) -> list[tuple[str, str]]:
    return [(one.model_key, one.source) for one in found.models]


def reasons(found: Chain) -> dict[str, str]:
    return {one.detail["model_key"]: one.why for one in found.steps if one.outcome == "skipped"}


def test_the_default_is_first_then_priority_then_id_then_the_last_resort() -> None:
    found = chain(
        assign(1, "spare", ANY),
        assign(2, "gone"),
        assign(3, "open", priority=5),
        assign(4, "own", is_default=True),
    )

    assert order(found) == [("own", "default"), ("open", "priority"), ("spare", "last_resort")]
    assert found.models[1].secret_ref == "OPEN_KEY"
    assert found.models[1].external_id == "x-open"


def test_a_choice_goes_first_and_stands_once() -> None:
    found = chain(assign(1, "own", is_default=True), assign(2, "open"), model="open")

    assert order(found) == [("open", "user"), ("own", "default")]


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        (assign(9, "open", is_active=False), "its assignment is switched off"),
        (assign(9, "open", "roleplay"), "it is not assigned to chat/enhancement"),
        (assign(9, "open", modality="image"), "it is not assigned to chat/enhancement"),
        (assign(9, "retired"), "it is switched off in the catalogue"),
        (assign(9, "gone"), "its provider no longer lists it"),
        (assign(9, "cut"), "its provider is switched off"),
        (assign(9, "orphan"), "its provider is not there"),
        (assign(9, "never"), "its catalogue row is not there"),
    ],
)
def test_a_choice_that_cannot_be_asked_is_skipped_with_its_reason(
    assignment: Assignment, why: str
) -> None:
    found = chain(
        assign(1, "own", is_default=True),
        assignment,
        model=assignment.model_key,
    )

    assert order(found) == [("own", "default")]
    assert reasons(found) == {assignment.model_key: why}


def test_an_unknown_choice_is_skipped_with_its_reason() -> None:
    found = chain(assign(1, "own", is_default=True), model="unheard_of")

    assert order(found) == [("own", "default")]
    assert reasons(found) == {"unheard_of": "it is not assigned to chat/enhancement"}


def test_an_inactive_assignment_does_not_hide_an_active_one_of_the_same_model() -> None:
    found = chain(assign(1, "open", is_active=False), assign(2, "open"), model="open")

    assert order(found)[0] == ("open", "user")


def test_no_model_left_is_an_error_with_every_reason() -> None:
    with pytest.raises(ModelNotAllowed, match="2 skipped") as at:
        chain(assign(1, "cut"), assign(2, "gone"), assign(3, "own", "roleplay"))

    assert [one["model_key"] for one in at.value.fields["skipped"]] == ["cut", "gone"]


def test_a_request_without_a_task_wants_no_model() -> None:
    found = chain(assign(1, "spare", ANY), task="")

    assert found.models == ()
    assert found.steps[0].outcome == "none"


@settings(deadline=None)
@given(snapshots.snapshots(), snapshots.requests())
def test_every_model_of_a_chain_may_be_asked_and_is_of_the_task(
    rows: Snapshot, request: AssembleRequest
) -> None:
    try:
        found = model_chain(rows, request)
    except ModelNotAllowed:
        found = Chain((), (), None)
    assume(request.task)

    keys = [one.model_key for one in found.models]
    assert len(keys) == len(set(keys))
    sources = [one.source for one in found.models]
    ranks = ("user", "default", "priority", "last_resort")
    assert sources == sorted(sources, key=ranks.index)
    for one in found.models:
        tasks = {
            row.task
            for row in rows.assignments
            if row.model_key == one.model_key and row.is_active and row.modality == "chat"
        }
        assert (ANY if one.source == "last_resort" else request.task) in tasks
        assert one.source != "user" or one.model_key == request.model
    # Nothing that may be asked is missing.
    for row in rows.assignments:
        if row.task not in (request.task, ANY):
            continue
        catalogue = next(one for one in rows.models if one.id == row.llm_model_id)
        provider = next(one for one in rows.providers if one.id == catalogue.provider_id)
        if row.is_active and catalogue.is_active and provider.is_active:
            assert (row.model_key in keys) == (catalogue.missing_since is None)


@settings(deadline=None)
@given(snapshots.snapshots(), snapshots.requests())
def test_models_of_another_task_change_nothing(rows: Snapshot, request: AssembleRequest) -> None:
    without = replace(
        rows,
        assignments=tuple(one for one in rows.assignments if one.task in (request.task, ANY)),
    )

    def outcome(of: Snapshot) -> object:
        try:
            return model_chain(of, request)
        except ModelNotAllowed as error:
            return (type(error), error.fields)

    assert outcome(rows) == outcome(without)

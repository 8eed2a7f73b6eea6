"""The answer of GET /api/llms, and which model does which task."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

from gateway.models.assignments import default_key, defaults
from gateway.models.catalogue import catalogue_body
from gateway.values.rows import Assignment, LlmModel, Provider, Snapshot

MATCHA = Provider(id=1, name="matcha", kind="catalogue")
WORKER = Provider(id=2, name="worker", kind="worker")
CLAUDE = LlmModel(
    id=10,
    provider_id=1,
    external_id="28",
    model_name="Claude 3.7 Sonnet",
    model_key="claude-3.7-sonnet",
    capabilities={"vision": True},
    display_order=2,
)
QWEN = LlmModel(
    id=11,
    provider_id=2,
    external_id="28",
    model_name="Qwen",
    model_key="qwen_instruct",
    display_order=1,
)
GONE = LlmModel(
    id=12,
    provider_id=1,
    external_id="x9",
    model_name="A Model",
    model_key="a-model",
    display_order=2,
    missing_since="2026-03-01T00:00:00+00:00",
)
ENHANCES = Assignment(
    id=20,
    llm_model_id=11,
    display_name="Qwen",
    model_key="qwen_instruct",
    modality="chat",
    task="enhancement",
    is_default=True,
)
SNAPSHOT = Snapshot(
    revision=3,
    providers=(MATCHA, WORKER),
    models=(CLAUDE, QWEN, GONE),
    assignments=(ENHANCES,),
)


def with_assignment(**changes: object) -> Snapshot:
    return replace(SNAPSHOT, assignments=(replace(ENHANCES, **changes),))  # type: ignore[arg-type]


def test_the_body_has_all_models_in_their_order_and_the_default() -> None:
    synced = datetime(2026, 3, 1, 13, tzinfo=timezone(timedelta(hours=1)))

    body = catalogue_body(SNAPSHOT, synced)

    assert {key: body[key] for key in ("defaultModel", "count", "lastSynced")} == {
        "defaultModel": "qwen_instruct",
        "count": 3,
        "lastSynced": "2026-03-01T12:00:00+00:00",
    }
    assert [model["model_key"] for model in body["models"]] == [
        "qwen_instruct",
        "a-model",
        "claude-3.7-sonnet",
    ]
    assert body["models"][2] == {
        "id": 10,
        "matcha_llm_id": 28,
        "model_name": "Claude 3.7 Sonnet",
        "model_key": "claude-3.7-sonnet",
        "provider": "matcha",
        "capabilities": {"vision": True},
        "is_active": True,
        "is_default": False,
        "display_order": 2,
        "missing_since": None,
    }


def test_only_a_number_of_provider_matcha_is_a_matcha_id() -> None:
    models = catalogue_body(SNAPSHOT, None)["models"]

    assert [model["matcha_llm_id"] for model in models] == [None, None, 28]


def test_before_the_first_refresh_there_is_no_date() -> None:
    assert catalogue_body(Snapshot(revision=1), datetime(2026, 1, 1, tzinfo=UTC))["count"] == 0
    assert catalogue_body(SNAPSHOT, None)["lastSynced"] is None


def test_models_that_are_switched_off_can_be_left_out() -> None:
    snapshot = replace(
        SNAPSHOT, models=(CLAUDE, replace(QWEN, is_active=False), GONE), providers=(MATCHA, WORKER)
    )
    without_matcha = replace(SNAPSHOT, providers=(replace(MATCHA, is_active=False), WORKER))

    kept = [one["model_key"] for one in catalogue_body(snapshot, None, only_active=True)["models"]]
    other = catalogue_body(without_matcha, None, only_active=True)

    assert kept == ["a-model", "claude-3.7-sonnet"]
    assert (other["count"], other["models"][0]["model_key"]) == (1, "qwen_instruct")


def test_the_default_is_of_the_task_that_is_asked_for() -> None:
    body = catalogue_body(SNAPSHOT, None, task="roleplay")

    assert body["defaultModel"] is None
    assert not any(model["is_default"] for model in body["models"])


def test_an_inactive_assignment_is_no_default() -> None:
    assert default_key(with_assignment(is_active=False), "chat", "enhancement") is None
    assert defaults(SNAPSHOT) == {("chat", "enhancement"): ENHANCES}

"""Health, metrics, the cache's routes, the catalogue and the prompts by model and type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.errors import StoreUnavailable, has_trap_word
from tests.gateway.conftest import MakeDatabase
from tests.gateway.front_parts import TEMPLATE, Bench


@pytest.fixture
def bench(make_database: MakeDatabase, tmp_path: Path) -> Bench:
    made = Bench(make_database("sqlite"), tmp_path)
    made.edit_all()
    return made


def _json(answer: Any, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json, dict)
    return answer.json


@pytest.mark.parametrize(("level", "status"), [(0, "healthy"), (1, "degraded"), (2, "degraded")])
def test_health_is_200_while_prompts_can_be_resolved(bench: Bench, level: int, status: str) -> None:
    bench.prompts.level = level

    told = _json(bench.ask("GET", "/health", None))

    assert (told["status"], told["fallback_level"]) == (status, level)
    assert told["revision"] == bench.prompts.held().snapshot.revision
    assert told["templates"] == 1
    assert told["workers"] == {"chat": {"known": 1, "healthy": 1}}


def test_health_is_503_where_no_prompt_can_be_resolved(bench: Bench) -> None:
    bench.prompts.error = StoreUnavailable("the text is not shown")

    answer = bench.ask("GET", "/health", None)

    assert _json(answer, 503)["error_code"] == "store_unavailable"
    assert "the text" not in answer.text


def test_health_tells_no_more_than_numbers(bench: Bench) -> None:
    """It is open to everybody: no name of a template, a host or a file."""
    told = bench.ask("GET", "/health", None).text

    for name in (TEMPLATE.template_name, "sqlite", "/", "qwen"):
        assert name not in told


def test_metrics_count_answers_and_levels(bench: Bench) -> None:
    bench.prompts.level = 1
    bench.ask("GET", "/api/llms", "user")

    text = bench.ask("GET", "/metrics", "viewer").text

    assert 'gateway_http_requests_total{method="GET",route="/api/llms",status="200"} 1.0' in text
    assert 'gateway_fallback_level_total{level="1"} 1.0' in text


def test_metrics_for_people_are_of_the_last_hours(bench: Bench) -> None:
    assert _json(bench.ask("GET", "/api/metrics?hours=2.5"))["hours"] == 2.5
    assert _json(bench.ask("GET", "/api/metrics"))["hours"] == 24
    for bad in ("0", "-1", "x", "nan", "inf", "99999"):
        answer = bench.ask("GET", f"/api/metrics?hours={bad}")
        assert answer.status_code in (400, 422)
        assert not has_trap_word(answer.text)


def test_the_cache_tells_its_state(bench: Bench) -> None:
    answer = bench.ask("GET", "/api/cache/status", "viewer")

    assert _json(answer)["revision"] == bench.prompts.held().snapshot.revision
    assert answer.headers["X-GW-Fallback-Level"] == "0"


@pytest.mark.parametrize("path", ["/functions/v1/refresh-prompt-cache", "/refresh-prompt-cache"])
@pytest.mark.parametrize("body", [None, {}, {"force_refresh": True, "cache_bust": 7}])
def test_a_refresh_answers_as_the_original_and_says_who_was_slow(
    bench: Bench, path: str, body: dict[str, Any] | None
) -> None:
    told = _json(bench.ask("POST", path, "admin user", body))

    assert told["success"] is True
    assert "1 live processes" in told["message"]
    assert told["cache_stats"]["templateCount"] == 1
    assert told["cached_data"] == {
        "template_categories": ["enhancement"],
        "model_types": ["sdxl"],
        "negative_prompt_categories": [],
    }
    assert told["revision"] == bench.prompts.held().snapshot.revision
    assert (told["slowest"], told["slowest_ms"]) == ("host:1:ab", 2.0)
    assert told["instances"][0]["state"] == "reached"


def test_a_refresh_that_does_not_reach_all_is_no_success(bench: Bench) -> None:
    bench.prompts.reached = False

    answer = bench.ask("POST", "/refresh-prompt-cache")

    told = _json(answer, 503)
    assert (told["success"], told["error_code"]) == (False, "revision_not_reached")
    assert told["instances"][0]["state"] == "waiting"
    assert "Retry-After" in answer.headers


# --- the catalogue ----------------------------------------------------------------------------


def test_the_models_are_listed_with_the_default(bench: Bench) -> None:
    told = _json(bench.ask("GET", "/api/llms", "user"))

    assert (told["count"], told["defaultModel"], told["lastSynced"]) == (1, "qwen_instruct", None)
    assert set(told["models"][0]) >= {
        "id",
        "matcha_llm_id",
        "model_name",
        "model_key",
        "provider",
        "capabilities",
        "is_active",
        "is_default",
        "display_order",
    }


def test_the_models_are_listed_without_the_database(bench: Bench) -> None:
    bench.prompts.level = 1

    assert _json(bench.ask("GET", "/api/llms", "user"))["count"] == 1


def test_a_refresh_of_the_models_tells_what_it_did_and_who_asked(bench: Bench) -> None:
    told = _json(bench.ask("POST", "/api/llms/refresh", "service"))
    again = bench.ask(
        "POST", "/api/llms/refresh", "admin", {"provider": "openrouter", "confirm": True}
    )

    assert told["success"] is True
    assert told["syncResults"]["added"] == 5
    assert told["models"] and told["timestamp"]
    assert again.status_code == 200
    assert bench.refresh_models.asked == [
        ("matcha", "service:service", False),
        ("openrouter", "key:key admin", True),
    ]
    assert bench.prompts.woken == 2


# --- getPrompt --------------------------------------------------------------------------------


def test_the_prompt_of_a_model_and_type_is_its_row(bench: Bench) -> None:
    answer = bench.ask("GET", "/api/prompts/sdxl/image", "viewer")

    row = _json(answer)["prompt"]
    assert (row["template_name"], row["version"]) == (TEMPLATE.template_name, 1)
    assert row["system_prompt"] == TEMPLATE.system_prompt
    assert row["token_limit"] == 75
    assert answer.headers["X-GW-Revision"] == str(bench.prompts.held().snapshot.revision)


def test_a_prompt_that_has_not_changed_is_304(bench: Bench) -> None:
    first = bench.ask("GET", "/api/prompts/sdxl/image", "viewer")
    etag = first.headers["ETag"]
    same = bench.ask("GET", "/api/prompts/sdxl/image", "viewer", headers={"If-None-Match": etag})
    bench.ask(
        "POST",
        "/api/templates/1/versions",
        body={"system_prompt": "Another.", "publish": True},
    )
    other = bench.ask("GET", "/api/prompts/sdxl/image", "viewer", headers={"If-None-Match": etag})

    assert (same.status_code, same.data) == (304, b"")
    assert other.status_code == 200
    assert other.headers["ETag"] != etag


def test_a_prompt_of_the_other_mode_is_never_served(bench: Bench) -> None:
    told = _json(bench.ask("GET", "/api/prompts/sdxl/image?content_mode=nsfw", "viewer"), 404)

    assert told["error_code"] == "template_not_found"
    assert told["nearest"][0]["template_name"] == TEMPLATE.template_name
    assert "prompt" not in told


def test_keys_of_models_may_have_slashes(bench: Bench) -> None:
    told = _json(bench.ask("GET", "/api/prompts/gryphe/mythomax-l2-13b/image", "viewer"), 404)

    assert told["wanted"]["target_model"] == "gryphe/mythomax-l2-13b"
    assert told["wanted"]["job_type"] == "image"


@pytest.mark.parametrize("query", ["content_mode=both", "use_case=" + "x" * 61])
def test_a_prompt_that_cannot_be_asked_for_is_refused(bench: Bench, query: str) -> None:
    assert bench.ask("GET", f"/api/prompts/sdxl/image?{query}", "viewer").status_code == 422

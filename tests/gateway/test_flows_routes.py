"""The prompt and chat routes over HTTP: names, access, CORS, field names, and a worker behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import has_trap_word
from tests.gateway.fake_worker import FakeWorker
from tests.gateway.flow_parts import DARIO, MINOR, ORLA, THEME, Routes

PROMPT = "a swordfish on a plate"
FUNCTIONS = (
    "enhance-prompt",
    "playground-chat",
    "queue-job",
    "get-negative-prompt",
    "get-active-worker-url",
    "register-chat-worker",
    "update-worker-url",
    "health-check-workers",
    "refresh-prompt-cache",
)
BOTH = ("/functions/v1/enhance-prompt", "/enhance-prompt")
TALK = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as made:
        yield made


@pytest.fixture(scope="module")
def routes(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, worker: FakeWorker
) -> Iterator[Routes]:
    made = Routes(tmp_path_factory.mktemp("routes"), migrated_sqlite, worker.url)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def well_behaved(worker: FakeWorker, routes: Routes) -> None:
    worker.behave("normal")
    worker.answer = "a swordfish on a plate, studio light"
    routes.log.entries.clear()


def enhanced(routes: Routes, body: dict[str, Any], who: str = "user", path: str = BOTH[0]) -> Any:
    answer = routes.ask("POST", path, who, body)
    assert answer.status_code == 200, answer.json
    return answer.json


# --- access and frame ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/functions/v1/", "/"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_key_a_function_is_closed(routes: Routes, prefix: str, name: str) -> None:
    answer = routes.ask("POST", prefix + name, None, {})

    assert answer.status_code == 401
    assert answer.json is not None
    assert answer.json["success"] is False


@pytest.mark.parametrize("who", ["anon", "wrong"])
def test_a_wrong_key_opens_nothing(routes: Routes, who: str) -> None:
    assert routes.ask("POST", BOTH[0], who, {"prompt": PROMPT}).status_code in (401, 403)


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("enhance-prompt", "viewer"),
        ("enhance-prompt", "worker"),
        ("playground-chat", "admin"),
        ("queue-job", "editor"),
        ("get-negative-prompt", "worker"),
        ("register-chat-worker", "call"),
        ("update-worker-url", "user"),
        ("health-check-workers", "call"),
    ],
)
def test_a_key_without_the_scope_is_forbidden(routes: Routes, name: str, who: str) -> None:
    assert routes.ask("POST", f"/functions/v1/{name}", who, {}).status_code == 403


@pytest.mark.parametrize("path", ["/playground-chat", "/queue-job"])
def test_a_key_of_nobody_keeps_no_rows(routes: Routes, path: str) -> None:
    body = {
        "conversation_id": TALK,
        "message": "hello",
        "job_type": "sdxl_image_fast",
        "prompt": PROMPT,
    }

    assert routes.ask("POST", path, "call", body).status_code == 403


@pytest.mark.parametrize("prefix", ["/functions/v1/", "/"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_browsers_of_any_origin_may_ask_functions(routes: Routes, prefix: str, name: str) -> None:
    before = routes.client.options(prefix + name, headers={"Origin": "https://app.example.org"})
    refused = routes.ask("POST", prefix + name, None, {})

    for answer in (before, refused):
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert before.status_code == 200
    assert "authorization" in before.headers["Access-Control-Allow-Headers"]


def test_functions_are_posted_to(routes: Routes) -> None:
    assert routes.ask("GET", BOTH[0], "user").status_code == 405


# --- enhance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*BOTH, "/enhance/sdxl", "/enhance/wan", "/enhance/universal"])
def test_a_prompt_is_enhanced_by_the_worker(routes: Routes, worker: FakeWorker, path: str) -> None:
    body = enhanced(routes, {"prompt": PROMPT}, path=path)

    assert body["enhanced_prompt"] == worker.answer
    assert body["enhancement_strategy"] == "template_db"
    assert body["trace"]["models"][0]["attestation"] == {"ok": True, "mismatches": []}
    target = path.rpartition("/")[2]
    if target in ("wan", "universal"):
        assert f"_{target}_" in body["enhancement_metadata"]["template_name"]
    sent = worker.posts("/enhance")[-1].body["messages"]
    assert sent[-1] == {"role": "user", "content": PROMPT}
    (entry,) = routes.log.entries
    receipt = body["trace"]["models"][0]["receipt"]
    assert entry.messages_sha256 == receipt["messages_sha256"]


def test_the_answer_names_revision_and_level_in_its_head(routes: Routes) -> None:
    answer = routes.ask("POST", BOTH[0], "user", {"prompt": PROMPT})

    assert answer.json is not None
    assert answer.headers["X-GW-Revision"] == str(answer.json["trace"]["config_revision"])
    assert answer.headers["X-GW-Fallback-Level"] == "0"


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"job_type": "wan_video_high"}, "job_type", "wan_video_high"),
        ({"jobType": "video_fast"}, "job_type", "video_fast"),
        ({"job_type": "a", "jobType": "b"}, "job_type", "a"),
        ({"jobType": "video_fast"}, "template_name", "enhancement_wan_sfw"),
        ({"job_type": "sdxl_image_high"}, "quality", "high"),
        ({"quality": "high"}, "quality", "high"),
        ({"format": "png"}, "format", "png"),
        ({"contentType": "nsfw"}, "content_mode", "sfw"),  # this user may not
        ({"content_mode": "sfw"}, "content_mode", "sfw"),
        ({"enhancement_model": "qwen_instruct"}, "model_source", "user"),
        ({"selectedModel": "qwen_instruct"}, "model_source", "user"),
        ({"selectedModel": "none"}, "model_source", "default"),
        ({"selectedModel": "nobody"}, "model_source", "default"),
        ({"target_model": "wan"}, "template_name", "enhancement_wan_sfw"),
        ({"target_model": "universal"}, "template_name", "enhancement_universal_image_sfw"),
        ({"metadata": {"reference_mode": "modify"}}, "template_name", "modify_flow"),
        ({"metadata": {"exact_copy_mode": True}}, "template_name", "skip"),
        ({"selectedPresets": ["x"], "regeneration": True, "user_id": 5}, "job_type", "image"),
        ({"metadata": {"odd": [1]}, "generate_count": 3}, "job_type", "image"),
    ],
)
def test_field_names_of_existing_clients(
    routes: Routes, fields: dict[str, Any], name: str, value: Any
) -> None:
    body = enhanced(routes, {"prompt": PROMPT, **fields})

    assert body["enhancement_metadata"][name] == value


def test_the_prompt_has_two_names(routes: Routes) -> None:
    assert enhanced(routes, {"original_prompt": PROMPT})["original_prompt"] == PROMPT


def test_an_exact_copy_gives_the_earlier_prompt_back(routes: Routes) -> None:
    metadata = {"exact_copy_mode": True, "originalEnhancedPrompt": "the earlier one"}

    body = enhanced(routes, {"prompt": " ", "metadata": metadata})

    assert body["enhanced_prompt"] == "the earlier one"
    assert body["enhancement_strategy"] == "skip_for_exact_copy"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"prompt": None}, 400),
        ({"prompt": 5}, 400),
        ({"prompt": " "}, 422),
        ({"prompt": PROMPT, "contentType": "scene_creation"}, 422),
        ({"prompt": PROMPT, "contentType": "odd"}, 422),
        ({"prompt": PROMPT, "quality": "best"}, 422),
        ({"prompt": PROMPT, "tags": ["a" * 61]}, 422),
        ({"prompt": PROMPT, "character_id": "nobody"}, 404),
        ({"prompt": "swordfish" * 3000}, 413),
        ({"prompt": f"swordfish, {THEME}, {MINOR}"}, 422),
    ],
)
def test_a_refused_body_gets_an_error_without_its_text(
    routes: Routes, body: dict[str, Any], status: int
) -> None:
    answer = routes.ask("POST", BOTH[0], "user", body)

    assert answer.status_code == status
    assert answer.json is not None
    assert answer.json["success"] is False
    text = answer.get_data(as_text=True)
    assert "swordfish" not in text
    assert not has_trap_word(text)


@pytest.mark.parametrize(
    ("kind", "more", "status", "code"),
    [
        ("busy", {}, 503, "worker_busy"),
        ("loading", {}, 503, None),
        ("error", {}, 502, "worker_fault"),
        ("not_json", {}, 502, "worker_fault"),
        ("unsuccessful", {}, 502, "worker_fault"),
        ("drop", {}, 502, None),
        ("mutate", {"mutation": "text_changed"}, 502, "attestation_failed"),
        ("mutate", {"mutation": "receipt_missing"}, 502, "attestation_failed"),
    ],
)
def test_a_worker_that_fails_is_an_error_or_a_named_original(
    routes: Routes, worker: FakeWorker, kind: str, more: dict[str, Any], status: int, code: Any
) -> None:
    worker.behave(kind, **more)

    answer = routes.ask("POST", BOTH[0], "user", {"prompt": PROMPT})
    allowed = enhanced(routes, {"prompt": PROMPT, "allow_original": True})

    assert answer.status_code // 100 == 5
    assert answer.json is not None
    if code is not None:
        assert (answer.status_code, answer.json["error_code"]) == (status, code)
    assert "swordfish" not in answer.get_data(as_text=True)
    assert not has_trap_word(answer.get_data(as_text=True))
    assert allowed["enhanced_prompt"] == PROMPT
    assert allowed["enhancement_strategy"] == "original_fallback"
    assert allowed["enhancement_metadata"]["fallback_reason"] == answer.json["error_code"]
    failed, original = routes.log.entries
    assert (failed.status, failed.error_code) == (answer.status_code, answer.json["error_code"])
    assert original.flags[0] == "original_fallback"


def test_what_can_be_enhanced_is_told(routes: Routes) -> None:
    body = routes.ask("GET", "/enhancement/info", "viewer").json

    assert body is not None
    assert {one["template_name"] for one in body["templates"]} >= {
        "enhancement_sdxl_sfw",
        "enhancement_wan_nsfw",
    }
    assert {"model_key": "qwen_instruct", "is_default": True} in body["models"]


# --- chat and negative --------------------------------------------------------------------------


def test_a_user_has_own_conversations(routes: Routes, worker: FakeWorker) -> None:
    worker.answer = "Good evening."
    body = {
        "conversation_id": TALK,
        "message": "hello",
        "character_id": ORLA,
        "roleplay_settings": {"responseStyle": "casual", "responseLength": "short", "odd": 1},
        "participants": [{"name": "Ida", "description": "a guest"}],
        "model_provider": "chat_worker",
        "context_type": "character_roleplay",
        "project_id": None,
        "prompt_template_id": None,
    }

    first = routes.ask("POST", "/functions/v1/playground-chat", "user", body)
    theirs = routes.ask("POST", "/playground-chat", "other user", body)
    again = routes.ask("POST", "/playground-chat", "user", {**body, "message": "and now?"})

    assert first.status_code == again.status_code == 200
    assert theirs.status_code == 404
    assert first.json is not None
    assert (first.json["response"], first.json["context_type"]) == (
        "Good evening.",
        "character_roleplay",
    )
    sent = worker.posts("/chat")[-1].body["messages"]
    assert [one["content"] for one in sent[1:]] == ["hello", "Good evening.", "and now?"]


def test_a_chats_mode_is_what_the_user_may_see(routes: Routes) -> None:
    body = {
        "conversation_id": "22222222-1111-4111-8111-111111111111",
        "message": "hello",
        "character_id": DARIO,
        "content_tier": "nsfw",
    }

    answer = routes.ask("POST", "/playground-chat", "user", body).json

    assert answer is not None
    assert (answer["content_tier"], answer["nsfw_enforce"]) == ("sfw", False)


@pytest.mark.parametrize(
    "body",
    [
        {"message": "hello"},
        {"conversation_id": TALK},
        {"conversation_id": "", "message": "hello"},
        {"conversation_id": "a" * 37, "message": "hello"},
        {"conversation_id": TALK, "message": ""},
        {"conversation_id": TALK, "message": "hello", "content_tier": "odd"},
    ],
)
def test_a_chat_without_its_parts_is_refused(routes: Routes, body: dict[str, Any]) -> None:
    assert routes.ask("POST", "/playground-chat", "user", body).status_code in (400, 422)


@pytest.mark.parametrize("target", ["target_model", "model_type"])
@pytest.mark.parametrize("mode", ["content_mode", "contentType"])
@pytest.mark.parametrize("own", ["user_negative_prompt", "negative_prompt"])
def test_the_negative_prompt_by_every_name(
    routes: Routes, target: str, mode: str, own: str
) -> None:
    body = {target: "wan", mode: "nsfw", own: "no hats", "generation_mode": "i2i"}

    answer = routes.ask("POST", "/get-negative-prompt", "user", body).json

    assert answer is not None
    assert answer["content_mode"] == "sfw"  # this user may not
    assert answer["negative_prompt"].endswith(", no hats")
    assert answer["negative_prompts"][0].startswith("nudity, static picture")

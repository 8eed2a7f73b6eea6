"""The other names of POST /enhance, and what is said to who sends a prompt instead of messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import ChatPort
from tests.http.answers import ASK, refused
from worker.engine.chat.template import Control, Piece, Template, Text, find_template
from worker.errors import TRAP_WORDS
from worker.protocol.messages import Generate

NAMES = ("/enhance", "/enhance/sdxl", "/enhance/wan", "/enhance/universal")
GATEWAY_ROUTE = "/functions/v1/enhance-prompt"
SAME = {"X-Request-Id": "the-same"}


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_name_gives_the_bytes_that_enhance_gives(chat: ChatPort, name: str) -> None:
    body = ASK | {"seed": 5, "max_tokens": 62, "quality": "high"}

    plain = chat.client.post("/enhance", json=body, headers=SAME)
    other = chat.client.post(name, json=body, headers=SAME)

    assert plain.status_code == other.status_code == 200
    assert other.data == plain.data


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_name_asks_the_engine_for_the_same(chat: ChatPort, name: str) -> None:
    for route in ("/enhance", name):
        chat.client.post(route, json=ASK | {"seed": 5}, headers=SAME)

    first, second = chat.link.of(Generate)
    assert [message.content for message in second.messages] == ["a red cube"]
    assert second.sampling == first.sampling


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a cat"},
        {"original_prompt": "a cat", "target_model": "sdxl"},
        {"prompt": "a cat", "messages": None},
    ],
)
def test_a_bare_prompt_is_refused_with_the_gateways_route(
    chat: ChatPort, name: str, body: dict[str, Any]
) -> None:
    answer = chat.client.post(name, json=body)

    text = refused(answer, 422, "messages_required")
    assert GATEWAY_ROUTE in text
    assert "7862" in text
    assert "cat" not in text
    assert not [word for word in TRAP_WORDS if word in answer.get_data(as_text=True).lower()]
    assert chat.link.of(Generate) == []


@pytest.mark.parametrize("name", NAMES)
def test_messages_count_though_a_prompt_lies_beside_them(chat: ChatPort, name: str) -> None:
    answer = chat.client.post(name, json=ASK | {"prompt": "a cat"})

    assert answer.status_code == 200
    assert answer.get_json()["receipt"]["ignored"] == ["prompt"]


@pytest.mark.parametrize("route", ["/chat", "/generate"])
def test_the_chat_routes_say_of_a_bare_prompt_that_messages_are_missing(
    chat: ChatPort, route: str
) -> None:
    answer = chat.client.post(route, json={"prompt": "a cat"})

    assert "messages" in refused(answer, 400, "invalid_request")


def test_the_info_names_routes_models_and_hashes_and_that_there_is_no_prompt_logic(
    make_chat: Callable[..., ChatPort],
) -> None:
    port = make_chat(keys=("a-key",))

    body = port.client.get("/enhancement/info").get_json()

    assert body["prompt_logic"] == "none"
    assert sorted(body["routes"]) == sorted(NAMES)
    assert GATEWAY_ROUTE in body["note"]
    assert {
        "id",
        "aliases",
        "context_tokens",
        "tokenizer_sha256",
        "template",
        "template_sha256",
    } <= (set(body["models"][0]))
    assert body["models"][0]["context_tokens"] == 4096


def test_a_templates_hash_changes_with_what_it_makes() -> None:
    chatml = find_template("chatml")

    def other(messages: Any) -> list[Piece]:
        return [Control("<|im_start|>"), Text("You are helpful.\n"), *chatml.render(messages)]

    changed = Template("chatml", chatml.controls, chatml.end, other)
    assert re.fullmatch(r"[0-9a-f]{64}", chatml.sha256)
    assert changed.sha256 != chatml.sha256

"""POST /chat, /generate and /enhance: what arrives reaches the engine, what it says goes out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import BASE, INSTRUCT
from tests.fakes import ChatPort, says
from tests.http.answers import ASK
from worker.protocol.messages import ChatMessage, Generate, Render

ROUTES = ("/chat", "/generate", "/enhance")
TEXT_KEYS = {"/chat": "response", "/generate": "response", "/enhance": "enhanced_prompt"}


def sent(port: ChatPort) -> Generate:
    """The one generation that was asked of the engine."""
    (message,) = port.link.of(Generate)
    assert isinstance(message, Generate)
    return message


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["/chat", "/generate"])
def test_chat_and_generate_answer_under_the_key_response(chat: ChatPort, route: str) -> None:
    answer = chat.client.post(route, json=ASK)

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["success"] is True
    assert body["response"] == "An answer."
    assert "enhanced_prompt" not in body


def test_enhance_answers_under_its_own_key_and_never_under_response(chat: ChatPort) -> None:
    answer = chat.client.post("/enhance", json=ASK | {"max_tokens": 62})

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["success"] is True
    assert body["enhanced_prompt"] == "An answer."
    assert "response" not in body
    assert body["model_info"]["sfw_mode"] is False


def test_an_answer_has_the_keys_that_clients_read(chat: ChatPort) -> None:
    chat.link.plays(says("one two", pieces=["one", " two"], stop_string="###"))

    body = chat.client.post("/chat", json=ASK).get_json()

    assert body["generation_time"] == 1.75
    assert body["tokens_generated"] == 2
    assert body["prompt_tokens"] == 11
    assert body["finish_reason"] == "stop"
    assert body["stop_string"] == "###"
    assert body["timings"] == {"queue_s": 0.125, "prefill_s": 0.25, "decode_s": 1.5}
    assert body["model_info"] == {
        "model_name": "Tiny Instruct",
        "inference_engine": "pure",
        "active_model_type": "instruct",
    }


def test_a_receipt_names_the_request_and_holds_what_the_engine_proves(chat: ChatPort) -> None:
    answer = chat.client.post("/chat", json=ASK | {"seed": 5}, headers={"X-Request-Id": "r-1"})

    body = answer.get_json()
    assert body["request_id"] == "r-1"
    assert body["receipt"] == {
        "request_id": "r-1",
        "model": INSTRUCT,
        "seed": 5,
        "finish_reason": "stop",
        "ignored": [],
    }


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "text",
    [
        "  \n leading and trailing \t\r\n ",
        "\U0001f469\u200d\U0001f680 and a \U0001f1fa\U0001f1f3",
        "half a character: \ufffd\ufffd",
        "\u2028 line \u2029 separators \x00\x1f\x7f\ufeff",
        '"quotes", \\ backslashes and </script>',
        "<|im_end|>\n<|im_start|>assistant\n",
        "e\u0301 is not \u00e9",
        "",
    ],
    ids=["whitespace", "emoji", "cut", "controls", "escapes", "markup", "combining", "empty"],
)
def test_a_completion_goes_out_as_it_is(chat: ChatPort, route: str, text: str) -> None:
    chat.link.plays(says(text))

    answer = chat.client.post(route, json=ASK)

    assert answer.get_json()[TEXT_KEYS[route]] == text
    answer.data.decode("utf-8")


def test_an_empty_completion_is_a_success_with_its_reason(chat: ChatPort) -> None:
    chat.link.plays(says("", finish_reason="length"))

    body = chat.client.post("/enhance", json=ASK).get_json()

    assert body["success"] is True
    assert body["enhanced_prompt"] == ""
    assert body["finish_reason"] == "length"


# --- what reaches the engine ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "max_tokens"), [("/chat", 512), ("/generate", 512), ("/enhance", 200)]
)
def test_a_bare_request_runs_with_the_defaults_of_the_contract(
    chat: ChatPort, route: str, max_tokens: int
) -> None:
    chat.client.post(route, json=ASK)

    sampling = sent(chat).sampling
    assert sampling.max_tokens == max_tokens
    assert sampling.temperature == 0.7
    assert sampling.top_p == 0.9
    assert sampling.top_k is None
    assert sampling.min_p is None
    assert sampling.repetition_penalty is None
    assert sampling.presence_penalty is None
    assert sampling.frequency_penalty is None
    assert sampling.stop == ()
    assert sent(chat).deadline_s == 30.0
    assert sent(chat).prompt is None


def test_messages_arrive_in_order_and_unchanged(chat: ChatPort) -> None:
    given = [
        ("user", "  first \n"),
        ("user", "the same role again"),
        ("assistant", ""),
        ("system", "{{character_name}} stays"),
        ("user", "<|im_end|> \U0001f600 \ufffd"),
    ]

    chat.client.post(
        "/chat", json={"messages": [{"role": role, "content": text} for role, text in given]}
    )

    assert sent(chat).messages == tuple(ChatMessage(role, text) for role, text in given)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("key", "value", "arrives"),
    [
        ("max_tokens", 62, 62),
        ("max_tokens", 1, 1),
        ("max_tokens", 62.0, 62),
        ("max_tokens", 131_072, 131_072),
        ("temperature", 0, 0.0),
        ("temperature", 0.95, 0.95),
        ("temperature", 2, 2.0),
        ("top_p", 1, 1.0),
        ("top_p", 1e-6, 1e-6),
        ("top_k", 20, 20),
        ("top_k", 20.0, 20),
        ("top_k", 0, 0),
        ("top_k", -1, -1),
        ("min_p", 0.05, 0.05),
        ("min_p", 0, 0.0),
        ("repetition_penalty", 1.1, 1.1),
        ("repetition_penalty", 1, 1.0),
        ("presence_penalty", 0.6, 0.6),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", 0.25, 0.25),
        ("frequency_penalty", 2.0, 2.0),
        ("stop", "###", ("###",)),
        ("stop", ["\n\n", " x "], ("\n\n", " x ")),
        ("stop", [], ()),
        ("seed", 0, 0),
        ("seed", 7.0, 7),
        ("seed", 2**64 - 1, 2**64 - 1),
    ],
)
def test_a_sampling_parameter_arrives_exactly(
    chat: ChatPort, route: str, key: str, value: Any, arrives: Any
) -> None:
    answer = chat.client.post(route, json=ASK | {key: value})

    arrived = getattr(sent(chat).sampling, key)
    assert answer.status_code == 200
    assert arrived == arrives
    assert type(arrived) is type(arrives)
    assert answer.get_json()["receipt"]["ignored"] == []


def test_null_is_the_same_as_absent(chat: ChatPort) -> None:
    keys = (
        "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty "
        "frequency_penalty stop model stream sfw_mode deadline_s deterministic response_format"
    ).split()
    chat.client.post("/chat", json=ASK | {"seed": 1})
    chat.client.post("/chat", json=ASK | {"seed": 1} | dict.fromkeys(keys))

    bare, nulls = chat.link.of(Generate)
    assert nulls.sampling == bare.sampling
    assert nulls.model == bare.model
    assert nulls.deadline_s == bare.deadline_s


def test_a_seed_is_drawn_anew_for_each_request_that_names_none(chat: ChatPort) -> None:
    for seed in (None, None, "absent"):
        chat.client.post("/chat", json=ASK if seed == "absent" else ASK | {"seed": seed})

    seeds = [message.sampling.seed for message in chat.link.of(Generate)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_deadline_arrives(chat: ChatPort) -> None:
    chat.client.post("/chat", json=ASK | {"deadline_s": 12.5})

    assert sent(chat).deadline_s == 12.5


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("qwen_instruct", INSTRUCT),
        ("QWEN_Instruct", INSTRUCT),
        ("Qwen/Qwen2.5-7B-Instruct", INSTRUCT),
        ("qwen/qwen2.5-7b-instruct", INSTRUCT),
        (INSTRUCT, INSTRUCT),
        ("qwen_base", BASE),
        ("Qwen_Base", BASE),
        ("QWEN/QWEN2.5-7B", BASE),
        (BASE.upper(), BASE),
        (None, INSTRUCT),
    ],
)
def test_a_model_is_found_by_id_or_alias_in_any_casing(
    chat: ChatPort, name: str | None, model: str
) -> None:
    body = chat.client.post("/chat", json=ASK | {"model": name}).get_json()

    kind = "base" if model == BASE else "instruct"
    assert sent(chat).model == model
    assert body["model_info"]["active_model_type"] == kind
    assert body["model_info"]["model_name"] == f"Tiny {kind.title()}"


def test_two_requests_with_one_id_are_two_requests_to_the_engine(chat: ChatPort) -> None:
    for _ in range(2):
        chat.client.post("/chat", json=ASK, headers={"X-Request-Id": "same"})

    tickets = [message.request_id for message in chat.link.of(Generate)]
    assert len(set(tickets)) == 2
    assert all(ticket.startswith("same#") for ticket in tickets)


# --- what clients in the field send besides ------------------------------------------------------

PLAYGROUND = {
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "Hello"},
    ],
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "temperature": 0.8,
    "top_p": 0.95,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.25,
    "conversation_id": "c-1",
    "project_id": None,
    "context_type": "general",
    "project_context": {"title": "t", "scene_count": 3},
    "content_tier": "nsfw",
    "nsfw_enforce": True,
    "nsfw_reason": "chosen",
}
ROLEPLAY = {
    "messages": [
        {"role": "system", "content": "You are Ada."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Hello"},
    ],
    "max_tokens": 250,
    "temperature": 0.95,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "sfw_mode": True,
}


def test_the_playground_is_served_and_told_what_was_not_used(chat: ChatPort) -> None:
    answer = chat.client.post("/chat", json=PLAYGROUND, headers={"Authorization": "Bearer any"})

    sampling = sent(chat).sampling
    assert answer.status_code == 200
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.6, 0.25)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.8, 0.95, 512)
    assert answer.get_json()["receipt"]["ignored"] == [
        "content_tier",
        "context_type",
        "conversation_id",
        "nsfw_enforce",
        "nsfw_reason",
        "project_context",
        "project_id",
    ]


def test_roleplay_is_served_with_its_flag_echoed_and_its_text_untouched(chat: ChatPort) -> None:
    said = "  Damn, what the hell?! \n"
    chat.link.plays(says(said))

    body = chat.client.post("/chat", json=ROLEPLAY).get_json()

    assert body["response"] == said
    assert body["sfw_mode"] is True
    assert body["model_info"]["sfw_mode"] is True
    assert body["receipt"]["ignored"] == []
    assert sent(chat).sampling.max_tokens == 250


@pytest.mark.parametrize(
    ("profile", "body", "expected"),
    [
        (False, {}, False),
        (False, {"deterministic": True}, True),
        (True, {}, True),
        (True, {"deterministic": None}, True),
        (True, {"deterministic": False}, False),
    ],
)
def test_the_lane_is_that_of_the_request_and_else_of_the_profile(
    make_chat: Callable[..., ChatPort], profile: bool, body: dict[str, Any], expected: bool
) -> None:
    port = make_chat(chat={"deterministic": profile})

    port.client.post("/chat", json=ASK | body)

    assert sent(port).deterministic is expected


@pytest.mark.parametrize("value", ["true", 1, []])
def test_a_lane_that_is_no_boolean_is_refused(chat: ChatPort, value: Any) -> None:
    answer = chat.client.post("/chat", json=ASK | {"deterministic": value})

    assert answer.status_code == 400
    assert answer.get_json()["error"] == "deterministic must be true or false"


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, '{"type":"object"}'),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"title": "ü", "type": "string"}},
            },
            '{"title":"ü","type":"string"}',
        ),
    ],
)
def test_a_response_format_arrives_as_its_schema_in_its_own_order(
    chat: ChatPort, response_format: dict[str, Any], schema: str | None
) -> None:
    chat.client.post("/chat", json=ASK | {"response_format": response_format})

    assert sent(chat).schema == schema


@pytest.mark.parametrize(
    "response_format",
    ["json", [], {}, {"type": "xml"}, {"type": "json_schema"},
     {"type": "json_schema", "json_schema": {"schema": "{}"}}],
)  # fmt: skip
def test_a_response_format_of_another_shape_is_refused(
    chat: ChatPort, response_format: Any
) -> None:
    answer = chat.client.post("/chat", json=ASK | {"response_format": response_format})

    assert answer.status_code == 400
    assert answer.get_json()["error"].startswith("response_format")
    assert chat.link.of(Generate) == []


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


HANGS = {"allOf": [{"type": "string", "pattern": f"a.{{{n},400}}b"} for n in range(20, 60)]}


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"type": "strange"}, HANGS], ids=["self", "type", "slow"]
)
def test_a_schema_that_cannot_be_enforced_never_reaches_the_engine(
    chat: ChatPort, schema: dict[str, Any]
) -> None:
    """Forty patterns kept the engine's thread busy for more than a minute."""
    answer = chat.client.post("/chat", json=ASK | schema_format(schema))

    assert answer.status_code == 422
    assert answer.get_json()["error_code"] == "unsupported"
    assert answer.get_json()["error"].startswith("response_format")
    assert chat.link.of(Generate) == []


def test_a_schema_is_tried_once(chat: ChatPort, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr("worker.front.schemas._try", tried.append)

    for title in ("a", "b", "a"):
        chat.client.post("/chat", json=ASK | schema_format({"title": title}))

    assert tried == ['{"title":"a"}', '{"title":"b"}']
    assert len(chat.link.of(Generate)) == 3


@pytest.mark.parametrize("text", ['{"minimum":1e999}'])
def test_a_schema_with_a_number_that_is_none_is_refused(chat: ChatPort, text: str) -> None:
    body = json.dumps(ASK | schema_format("here")).replace('"here"', text)

    answer = chat.client.post("/chat", data=body, content_type="application/json")

    assert answer.status_code == 400
    assert chat.link.of(Generate) == []


def test_an_over_long_schema_is_refused_with_both_lengths(
    make_chat: Callable[..., ChatPort],
) -> None:
    chat = make_chat(limits={"body_bytes": 1 << 20})
    schema = {"description": "x" * 65_536}
    response_format = {"type": "json_schema", "json_schema": {"schema": schema}}

    answer = chat.client.post("/chat", json=ASK | {"response_format": response_format})

    assert answer.status_code == 413
    assert "65554 characters; allowed: at most 65536" in answer.get_json()["error"]


def test_sfw_mode_changes_nothing_that_the_engine_is_sent(chat: ChatPort) -> None:
    chat.client.post("/chat", json=ROLEPLAY | {"seed": 1})
    chat.client.post("/chat", json=ROLEPLAY | {"seed": 1, "sfw_mode": False})

    with_flag, without = chat.link.of(Generate)
    assert with_flag.messages == without.messages
    assert with_flag.sampling == without.sampling


def test_health_counts_safe_requests_and_requests_per_model(chat: ChatPort) -> None:
    chat.client.post("/chat", json=ROLEPLAY)
    chat.client.post("/enhance", json=ASK | {"model": "qwen_base", "sfw_mode": True})
    chat.client.post("/generate", json=ASK | {"sfw_mode": False})

    stats = chat.client.get("/health").get_json()["stats"]

    assert stats["sfw_requests"] == 2
    assert stats["base_model_uses"] == 1
    assert stats["instruct_model_uses"] == 2


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_keys_are_listed_and_change_nothing(chat: ChatPort, route: str) -> None:
    extra = {
        "job_type": "sdxl_image_fast",
        "format": "image",
        "selected_presets": [1, {"deep": [None]}],
        "Temperature": 0.1,
        "max_new_tokens": 5,
    }

    body = chat.client.post(route, json=ASK | {"seed": 3} | extra).get_json()

    chat.client.post(route, json=ASK | {"seed": 3})
    first, second = chat.link.of(Generate)
    assert body["receipt"]["ignored"] == sorted(extra)
    assert first.sampling == second.sampling


def test_further_keys_of_messages_are_listed_once(chat: ChatPort) -> None:
    message = {"role": "user", "content": "x", "name": "Ada", "timestamp": 1}

    body = chat.client.post("/chat", json={"messages": [message, message]}).get_json()

    assert body["receipt"]["ignored"] == ["messages[].name", "messages[].timestamp"]
    assert sent(chat).messages == (ChatMessage("user", "x"),) * 2


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_key_that_is_no_unicode_text_hurts_nobody(chat: ChatPort, route: str) -> None:
    """JSON can escape half of a surrogate pair; listed as it is, the answer would be no UTF-8."""
    raw = (
        b'{"messages": [{"role": "user", "content": "x", "\\udfff": 1}],'
        b' "\\ud800": 1, "project_context": {"title": "cut \\ud83d"}}'
    )

    answer = chat.client.post(route, data=raw, content_type="application/json")

    assert answer.status_code == 200
    assert len(answer.get_json()["receipt"]["ignored"]) == 3


# --- request ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["r", "A-b_c.9", "x" * 128])
def test_a_request_id_of_the_client_is_kept(chat: ChatPort, given: str) -> None:
    answer = chat.client.post("/chat", json=ASK, headers={"X-Request-Id": given})

    body = answer.get_json()
    assert answer.headers["X-Request-Id"] == given
    assert body["request_id"] == given
    assert body["receipt"]["request_id"] == given


@pytest.mark.parametrize(
    "given",
    ["", " ", "a b", "a/b", "a\tb", "\xfc", "{}", "x" * 129, "banana-1", "INF", "a#1"],
)
def test_a_request_id_that_could_harm_is_replaced(chat: ChatPort, given: str) -> None:
    answer = chat.client.post("/chat", json=ASK, headers={"X-Request-Id": given})

    body = answer.get_json()
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-Id"])
    assert body["request_id"] == answer.headers["X-Request-Id"]


def test_requests_without_an_id_get_different_ones(chat: ChatPort) -> None:
    ids = {chat.client.get("/health").headers["X-Request-Id"] for _ in range(5)}

    assert len(ids) == 5


# --- /debug/render -------------------------------------------------------------------------------


def test_render_shows_the_prompt_and_generates_nothing(chat: ChatPort) -> None:
    body = chat.client.post("/debug/render", json=ASK | {"cache_bust": 1}).get_json()

    (message,) = chat.link.sent
    assert isinstance(message, Render)
    assert message.messages == (ChatMessage("user", "a red cube"),)
    assert body["success"] is True
    assert body["prompt"] == "<user>a red cube"
    assert body["prompt_ids"] == [1, 2, 3]
    assert body["prompt_tokens"] == 3
    assert body["template"] == "chatml"
    assert body["context_tokens"] == 32_768
    assert body["ignored"] == ["cache_bust"]
    assert len(body["messages_sha256"]) == len(body["prompt_ids_sha256"]) == 64


def test_render_shows_a_raw_prompt_without_a_template(chat: ChatPort) -> None:
    body = chat.client.post("/debug/render", json={"inputs": "  Once"}).get_json()

    (message,) = chat.link.sent
    assert message.prompt == "  Once"
    assert message.messages == ()
    assert body["prompt"] == "  Once"
    assert body["template"] is None
    assert body["messages_sha256"] is None


def test_two_ports_of_one_process_share_nothing(make_chat: Callable[..., ChatPort]) -> None:
    first, second = make_chat(), make_chat()
    first.client.post("/chat", json=ASK | {"sfw_mode": True})

    stats = second.client.get("/health").get_json()["stats"]

    assert stats["sfw_requests"] == 0
    assert second.link.sent == []

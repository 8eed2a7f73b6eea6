"""Raw completion on the image and video port: `{inputs, parameters}` in, `generated_text` out."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from tests.conftest import BASE, INSTRUCT
from tests.fakes import FakeChatLink, MediaPort, fails, says, stays_silent
from tests.http.answers import refused, retry_after
from worker.catalog import Catalog, chat_catalog
from worker.config import Settings
from worker.front import chat as chat_module
from worker.protocol.messages import Generate

INPUTS = 'You enhance prompts.\n\n"a red cube"\n\nEnhanced: '
# What an existing client sends, with nothing left out.
ENHANCE = {
    "inputs": INPUTS,
    "parameters": {
        "max_new_tokens": 75,
        "temperature": 0.7,
        "top_p": 0.9,
        "do_sample": True,
        "return_full_text": False,
    },
}


def sent(port: MediaPort) -> Generate:
    (message,) = port.link.of(Generate)
    assert isinstance(message, Generate)
    return message


def test_a_completion_answers_under_the_key_that_its_client_reads(media: MediaPort) -> None:
    media.link.plays(says("  a glossy red cube\n"))

    answer = media.client.post("/generate", json=ENHANCE, headers={"X-Request-Id": "r-1"})

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["generated_text"] == "  a glossy red cube\n"
    assert body["request_id"] == "r-1"
    assert body["finish_reason"] == "stop"
    assert body["receipt"]["request_id"] == "r-1"
    assert body["receipt"]["model"] == BASE
    assert body["receipt"]["ignored"] == []


def test_a_completion_runs_on_the_base_model_without_a_template(media: MediaPort) -> None:
    media.client.post("/generate", json=ENHANCE)

    message = sent(media)
    assert message.model == BASE
    assert message.prompt == INPUTS
    assert message.messages == ()
    assert message.sampling.max_tokens == 75
    assert message.sampling.temperature == 0.7
    assert message.sampling.top_p == 0.9
    assert media.media.sent == []
    assert sum(media.desk.journal.counts().values()) == 0


@pytest.mark.parametrize("parameters", [None, {}, "absent"])
def test_a_completion_without_parameters_has_the_defaults_of_the_contract(
    media: MediaPort, parameters: Any
) -> None:
    body = {"inputs": INPUTS} | ({} if parameters == "absent" else {"parameters": parameters})

    media.client.post("/generate", json=body)

    sampling = sent(media).sampling
    assert sampling.max_tokens == 150
    assert sampling.temperature == 0.7
    assert sampling.top_p == 0.9
    assert sampling.top_k is None
    assert sampling.repetition_penalty is None


def test_every_sampling_parameter_arrives(media: MediaPort) -> None:
    given = {
        "temperature": 1.5,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "stop": ["\n\n"],
        "seed": 17,
    }

    answer = media.client.post("/generate", json={"inputs": "x", "parameters": given})

    sampling = sent(media).sampling
    arrived = {name: getattr(sampling, name) for name in given}
    assert arrived == given | {"stop": ("\n\n",)}
    assert answer.get_json()["receipt"]["ignored"] == []


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.9}, 0.0),
        ({"do_sample": True, "temperature": 0.9}, 0.9),
        ({"do_sample": None, "temperature": 0.9}, 0.9),
        ({"do_sample": True}, 0.7),
    ],
)
def test_not_sampling_is_greedy(
    media: MediaPort, parameters: dict[str, Any], temperature: float
) -> None:
    media.client.post("/generate", json={"inputs": "x", "parameters": parameters})

    assert sent(media).sampling.temperature == temperature


@pytest.mark.parametrize(
    ("full", "text"), [(True, "Once upon a time"), (False, " a time"), (None, " a time")]
)
def test_the_prompt_is_returned_only_when_it_is_asked_for(
    media: MediaPort, full: bool | None, text: str
) -> None:
    media.link.plays(says(" a time"))

    body = media.client.post(
        "/generate", json={"inputs": "Once upon", "parameters": {"return_full_text": full}}
    ).get_json()

    assert body["generated_text"] == text


def test_an_empty_completion_is_an_empty_text(media: MediaPort) -> None:
    media.link.plays(says(""))

    answer = media.client.post("/generate", json=ENHANCE)

    assert answer.status_code == 200
    assert answer.get_json()["generated_text"] == ""


def test_parameters_that_are_not_used_are_listed(media: MediaPort) -> None:
    body = {
        "inputs": "x",
        "options": {"wait_for_model": True},
        "parameters": {"typical_p": 0.9, "watermark": False, "max_new_tokens": 5},
    }

    ignored = media.client.post("/generate", json=body).get_json()["receipt"]["ignored"]

    assert ignored == ["options", "parameters.typical_p", "parameters.watermark"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("stream", True), ("sfw_mode", True), ("model", "qwen_instruct"), ("messages", [])],
)
def test_a_chat_key_among_the_parameters_is_not_used_and_listed(
    media: MediaPort, key: str, value: Any
) -> None:
    """Each means something on /chat and nothing in this dialect: dropping it must be said."""
    answer = media.client.post("/generate", json={"inputs": "x", "parameters": {key: value}})

    assert answer.status_code == 200
    assert answer.get_json()["receipt"]["ignored"] == [f"parameters.{key}"]


@pytest.mark.parametrize(
    ("name", "model"), [("qwen_instruct", INSTRUCT), ("QWEN_BASE", BASE), (None, BASE)]
)
def test_a_completion_runs_on_the_model_it_names(
    media: MediaPort, name: str | None, model: str
) -> None:
    media.client.post("/generate", json={"inputs": "x", "model": name})

    assert sent(media).model == model


def test_without_a_base_model_the_default_one_completes(settings: Settings) -> None:
    only = [spec for spec in chat_catalog(settings).specs if spec.id == INSTRUCT]
    parser = chat_module.ChatParser(Catalog(only), settings.chat, settings.limits)

    parsed, _ = parser.parse_completion({"inputs": "x"})

    assert parsed.model.id == INSTRUCT


@pytest.mark.parametrize(
    ("body", "status", "code", "text"),
    [
        ({"inputs": 5}, 400, "invalid_request", "inputs"),
        ({"inputs": None}, 400, "invalid_request", "inputs"),
        ({"inputs": ["x"]}, 400, "invalid_request", "inputs"),
        ({"inputs": "x", "parameters": []}, 400, "invalid_request", "parameters"),
        ({"inputs": "x", "parameters": "x"}, 400, "invalid_request", "parameters"),
        ({"inputs": "x", "parameters": {"do_sample": 1}}, 400, "invalid_request", "do_sample"),
        (
            {"inputs": "x", "parameters": {"return_full_text": "no"}},
            400,
            "invalid_request",
            "return_full_text",
        ),
        (
            {"inputs": "x", "parameters": {"max_new_tokens": 0}},
            422,
            "out_of_range",
            "from 1 to 131072",
        ),
        ({"inputs": "x", "parameters": {"temperature": 3}}, 422, "out_of_range", "2.0"),
        ({"inputs": "x", "model": "gpt"}, 422, "unsupported", "qwen_base"),
        ({"inputs": "x" * 5001}, 413, "too_large", "5000"),
    ],
)
def test_a_completion_that_cannot_be_honoured_is_refused(
    media: MediaPort, body: Any, status: int, code: str, text: str
) -> None:
    answer = media.client.post("/generate", json=body)

    assert text in refused(answer, status, code)
    assert media.link.sent == []


def test_an_error_of_the_chat_engine_is_relayed(media: MediaPort) -> None:
    media.link.plays(fails("out_of_device_memory", 503, "no room", retry_after_s=2))

    answer = media.client.post("/generate", json=ENHANCE)

    assert refused(answer, 503, "out_of_device_memory") == "no room"
    assert retry_after(answer) == 2


def test_a_completion_needs_the_chat_engine_and_not_the_other_one(media: MediaPort) -> None:
    media.media.goes_away()
    served = media.client.post("/generate", json=ENHANCE)
    media.link.goes_away()
    answer = media.client.post("/generate", json=ENHANCE)

    assert served.status_code == 200
    assert "engine chat" in refused(answer, 503, "engine_unavailable")


def test_completions_have_as_many_places_as_chat(make_media: Callable[..., MediaPort]) -> None:
    port = make_media(chat={"max_running": 1, "max_waiting": 0}, link=FakeChatLink())
    slot = port.admission.enter()

    answer = port.client.post("/generate", json=ENHANCE)

    slot.leave(served=False)
    refused(answer, 429, "busy")
    assert port.client.post("/generate", json=ENHANCE).status_code == 200


def test_a_hang_up_stops_a_completion(media: MediaPort) -> None:
    media.link.plays(stays_silent)
    mine, theirs = socket.socketpair()
    theirs.close()

    with closing(mine):
        answer = media.client.post(
            "/generate", json=ENHANCE, environ_overrides={"gunicorn.socket": mine}
        )

    refused(answer, 499, "cancelled")
    assert media.link.cancelled == [sent(media).request_id]
    assert media.admission.taken == 0


def test_a_completion_past_its_deadline_is_stopped(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "ENGINE_GRACE_S", 0.0)
    media.link.plays(stays_silent)

    answer = media.client.post("/generate", json=ENHANCE | {"parameters": {"deadline_s": 0.02}})

    refused(answer, 504, "deadline_exceeded")
    assert media.link.cancelled == [sent(media).request_id]

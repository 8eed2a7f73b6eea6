"""Everything that can be refused, and how: one shape, its own status, no word that a client
misreads, nothing sent to the engine."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from werkzeug.test import TestResponse

from tests.fakes import PATIENCE_S, ChatPort, fails, generated, raises, says, stays_silent
from tests.http.answers import ASK, refused, retry_after
from worker.errors import ContextTooLong, DeadlineExceeded, ModelUnavailable
from worker.front import bodies
from worker.front import chat as chat_module
from worker.front.app import places
from worker.protocol.messages import EngineNotice, Generate, Render

ROUTES = ("/chat", "/generate", "/enhance", "/debug/render")
JSON = "application/json"


def post_raw(port: ChatPort, raw: bytes, route: str = "/chat", **more: Any) -> TestResponse:
    return port.client.post(route, data=raw, content_type=JSON, **more)


# --- bodies that are no request ------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"{", "not valid JSON"),
        (b'{"messages": }', "line 1, column 14"),
        (b"{'messages': []}", "not valid JSON"),
        (b'{"messages": []} x', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"   ", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'[{"role": "user", "content": "x"}]', "must be a JSON object"),
        (b"{}", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"messages"', "must be a JSON object"),
        (b"12", "must be a JSON object"),
        (b'{"temperature": NaN}', "a number that is not valid JSON"),
        (b'{"temperature": Infinity}', "a number that is not valid JSON"),
        (b'{"x": [-Infinity]}', "a number that is not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number that is not valid JSON"),
        (b'{"messages": "\xff\xfe"}', "not UTF-8 (byte 14)"),
        (b'"\xc3\x28"', "not UTF-8"),
        (b'{"a":' + b"[" * 30_000, "nested too deeply"),
        (b'{"a":' * 9_000, "nested too deeply"),
        (
            b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            "messages[0].content has an unpaired surrogate (U+D83D) at character 0",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "stop": ["ab\\udc00"]}',
            "stop has an unpaired surrogate (U+DC00) at character 2",
        ),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    chat: ChatPort, route: str, raw: bytes, text: str
) -> None:
    answer = post_raw(chat, raw, route)

    assert text in refused(answer, 400, "invalid_request")
    assert chat.link.sent == []


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_is_not_declared_as_json_is_refused(
    chat: ChatPort, route: str, content_type: str | None
) -> None:
    answer = chat.client.post(route, data=json.dumps(ASK), content_type=content_type)

    assert "application/json" in refused(answer, 415, "unsupported_media_type")
    assert chat.link.sent == []


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_any_spelling_of_json_is_taken(chat: ChatPort, content_type: str) -> None:
    answer = chat.client.post("/chat", data=json.dumps(ASK), content_type=content_type)

    assert answer.status_code == 200


def message(**changes: Any) -> dict[str, Any]:
    """A body with one message that has `changes`."""
    return {"messages": [{"role": "user", "content": "x"} | changes]}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"max_tokens": 5}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [None]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [*ASK["messages"], {"content": "x"}]}, "messages[1]"),
        (message(role="tool"), "system, user, assistant"),
        (message(role="User"), "messages[0].role"),
        (message(role=None), "messages[0].role"),
        (message(role=["user"]), "messages[0].role"),
        (message(role={"a": 1}), "messages[0].role"),
        (message(content=None), "messages[0].content"),
        (message(content=5), "messages[0].content"),
        (message(content=[{"type": "text", "text": "x"}]), "messages[0].content"),
        *[
            (ASK | {key: value}, f"{key} must be a whole number")
            for key in ("max_tokens", "top_k", "seed")
            for value in ("62", 62.5, True, [], {})
        ],
        *[
            (ASK | {key: value}, f"{key} must be a number")
            for key in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "deadline_s",
            )
            for value in ("0.5", False, [0.5], {})
        ],
        *[(ASK | {"stop": value}, "stop must be") for value in (5, [1], {}, [None], True)],
        *[
            (ASK | {key: value}, f"{key} must be true or false")
            for key in ("stream", "sfw_mode")
            for value in ("true", 1, 0, [])
        ],
        *[(ASK | {"model": value}, "model must be a string") for value in (5, ["x"], {}, True)],
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    chat: ChatPort, route: str, body: Any, text: str
) -> None:
    answer = chat.client.post(route, json=body)

    assert text in refused(answer, 400, "invalid_request")
    assert chat.link.sent == []


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("max_tokens", 0, "from 1 to 131072"),
        ("max_tokens", -1, "from 1 to 131072"),
        ("max_tokens", 131_073, "from 1 to 131072"),
        ("max_tokens", 1e300, "from 1 to 131072"),
        ("temperature", -0.01, "from 0.0 to 2.0"),
        ("temperature", 2.01, "from 0.0 to 2.0"),
        ("temperature", 1e30, "too large"),
        ("top_p", 0, "above 0, at most 1"),
        ("top_p", -0.5, "above 0, at most 1"),
        ("top_p", 1.001, "above 0, at most 1"),
        ("top_k", -2, "from -1 to 10000000"),
        ("top_k", 10_000_001, "from -1 to 10000000"),
        ("min_p", -0.1, "from 0.0 to 1.0"),
        ("min_p", 1.1, "from 0.0 to 1.0"),
        ("repetition_penalty", 0, "from 0.01 to 10.0"),
        ("repetition_penalty", 10.5, "from 0.01 to 10.0"),
        ("presence_penalty", -2.1, "from -2.0 to 2.0"),
        ("presence_penalty", 2.1, "from -2.0 to 2.0"),
        ("frequency_penalty", -2.1, "from -2.0 to 2.0"),
        ("frequency_penalty", 2.1, "from -2.0 to 2.0"),
        ("seed", -1, "from 0 to 18446744073709551615"),
        ("seed", 2**64, "from 0 to 18446744073709551615"),
        ("stop", [str(n) for n in range(17)], "at most 16"),
        ("stop", "", "1 to 256"),
        ("stop", ["x", "y" * 257], "1 to 256"),
        ("deadline_s", 0, "above 0, at most 30"),
        ("deadline_s", -5, "above 0, at most 30"),
        ("deadline_s", 30.5, "above 0, at most 30"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_number_out_of_range_is_refused_with_the_range(
    chat: ChatPort, route: str, key: str, value: Any, allowed: str
) -> None:
    answer = chat.client.post(route, json=ASK | {key: value})

    assert allowed in refused(answer, 422, "out_of_range")
    assert chat.link.sent == []


@pytest.mark.parametrize("key", ["temperature", "top_p", "min_p", "deadline_s"])
def test_a_number_that_no_float_holds_is_refused(chat: ChatPort, key: str) -> None:
    """1e999 is valid JSON and becomes a float that is not a number to work with."""
    raw = json.dumps(ASK)[:-1] + f', "{key}": 1e999}}'

    answer = post_raw(chat, raw.encode())

    refused(answer, 422, "out_of_range")
    assert chat.link.sent == []


@pytest.mark.parametrize("name", ["gpt-4", "", " qwen_instruct", "tiny-image", "qwen"])
def test_a_model_that_is_not_served_is_refused_with_those_that_are(
    chat: ChatPort, name: str
) -> None:
    answer = chat.client.post("/chat", json=ASK | {"model": name})

    text = refused(answer, 422, "unsupported")
    assert "qwen_instruct" in text
    assert "qwen_base" in text
    assert chat.link.sent == []


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_too_many_messages_are_refused_with_both_numbers(chat: ChatPort, route: str) -> None:
    most = chat.settings.limits.messages
    at_most = chat.client.post(route, json={"messages": ASK["messages"] * most})
    answer = chat.client.post(route, json={"messages": ASK["messages"] * (most + 1)})

    text = refused(answer, 413, "too_large")
    assert str(most) in text
    assert str(most + 1) in text
    assert at_most.status_code == 200
    assert len(chat.link.sent) == 1


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_prompt_too_long_is_refused_however_it_is_cut(chat: ChatPort, parts: int) -> None:
    most = chat.settings.limits.prompt_chars
    texts = ["x" * (most // parts)] * parts
    bodies_ = [
        {"messages": [{"role": "user", "content": text} for text in (*texts[:-1], texts[-1] + end)]}
        for end in ("", "x")
    ]

    at_most, answer = (chat.client.post("/chat", json=body) for body in bodies_)

    assert str(most) in refused(answer, 413, "too_large")
    assert at_most.status_code == 200
    assert len(chat.link.sent) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_too_large_is_refused_by_its_declared_size(chat: ChatPort, route: str) -> None:
    raw = json.dumps(ASK).encode() + b" " * chat.settings.limits.body_bytes

    answer = post_raw(chat, raw, route)

    refused(answer, 413, "too_large")
    assert chat.link.sent == []


def test_a_body_too_large_is_refused_when_no_size_is_declared(chat: ChatPort) -> None:
    raw = json.dumps(ASK).encode() + b" " * chat.settings.limits.body_bytes

    answer = post_raw(
        chat,
        b"",
        environ_overrides={
            "wsgi.input": io.BytesIO(raw),
            "wsgi.input_terminated": True,  # as gunicorn says for a chunked body
            "HTTP_TRANSFER_ENCODING": "chunked",
            "CONTENT_LENGTH": "",
        },
    )

    refused(answer, 413, "too_large")
    assert chat.link.sent == []


def test_a_body_without_a_declared_size_is_read(chat: ChatPort) -> None:
    answer = post_raw(
        chat,
        b"",
        environ_overrides={
            "wsgi.input": io.BytesIO(json.dumps(ASK).encode()),
            "wsgi.input_terminated": True,
            "HTTP_TRANSFER_ENCODING": "chunked",
            "CONTENT_LENGTH": "",
        },
    )

    assert answer.status_code == 200
    assert chat.link.of(Generate)[0].messages[0].content == "a red cube"


def test_a_body_that_stops_coming_is_refused_and_says_why(chat: ChatPort) -> None:
    class Stalled(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: Any) -> int:
            raise TimeoutError("timed out")

    mine, theirs = socket.socketpair()
    with closing(mine), closing(theirs):
        answer = post_raw(
            chat,
            b"",
            environ_overrides={
                "wsgi.input": Stalled(),
                "CONTENT_LENGTH": "100",
                "gunicorn.socket": mine,
            },
        )
        timeout_s = mine.gettimeout()

    assert f"{bodies.BODY_TIMEOUT_S:g} s" in refused(answer, 400, "invalid_request")
    assert timeout_s is None
    assert chat.link.sent == []


# --- routes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/chat/", "/Chat", "/v1/chat/completions", "/enhance/legacy", "/status", "/info"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH"])
def test_an_unknown_route_is_refused(chat: ChatPort, method: str, path: str) -> None:
    answer = chat.client.open(path, method=method)

    refused(answer, 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/chat", {"OPTIONS", "POST"}),
        ("PUT", "/enhance", {"OPTIONS", "POST"}),
        ("DELETE", "/generate", {"OPTIONS", "POST"}),
        ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/worker/info", {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/memory/load", {"OPTIONS", "POST"}),
        ("BREW", "/chat", {"OPTIONS", "POST"}),
    ],
)
def test_a_wrong_method_is_refused_with_the_right_ones(
    chat: ChatPort, method: str, path: str, allowed: set[str]
) -> None:
    answer = chat.client.open(path, method=method)

    refused(answer, 405, "method_not_allowed")
    assert set(answer.headers["Allow"].split(", ")) == allowed


# --- the engine's errors -------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("script", "status", "code", "text", "after"),
    [
        (
            raises(ContextTooLong(prompt_tokens=40_000, context_tokens=32_768)),
            413,
            "context_overflow",
            "40000",
            None,
        ),
        (
            raises(ModelUnavailable("models/x has no config.json; run scripts/fetch_models.py x")),
            503,
            "model_unavailable",
            "fetch_models.py",
            None,
        ),
        (raises(DeadlineExceeded("not complete")), 504, "deadline_exceeded", "not complete", None),
        (fails("busy", 429, "full", retry_after_s=0.2), 429, "busy", "full", 1),
        (fails("busy", 429, "full", retry_after_s=7.0), 429, "busy", "full", 7),
        (fails("engine_lost", 503, "gone", retry_after_s=7.1), 503, "engine_lost", "gone", 8),
        (fails("internal_error", 500, "a bug"), 500, "internal_error", "a bug", None),
    ],
)
def test_an_error_of_the_engine_is_relayed(
    chat: ChatPort,
    route: str,
    script: Any,
    status: int,
    code: str,
    text: str,
    after: int | None,
) -> None:
    chat.link.plays(script)

    answer = chat.client.post(route, json=ASK)

    assert text in refused(answer, status, code)
    assert ("Retry-After" in answer.headers) == (after is not None)
    assert after is None or retry_after(answer) == after


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "words",
    [
        "inf",
        "logits are NaN",
        "see the INFormation page",
        "probability tensor contains either `inf`",
        "Probability Tensor",
        "violates the Content Policy",
        "inappropriate",
        "/maintenance/model",
    ],
)
def test_an_error_text_with_a_word_that_a_client_misreads_is_replaced_and_logged(
    chat: ChatPort, route: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat.link.plays(fails("engine_failed", 500, f"before {words} after"))

    answer = chat.client.post(route, json=ASK)

    text = refused(answer, 500, "engine_failed")
    assert "before" not in text
    assert f"before {words} after" in caplog.text


@pytest.mark.parametrize("route", ROUTES)
def test_an_engine_that_is_away_is_unavailable_with_when_to_come_back(
    chat: ChatPort, route: str
) -> None:
    chat.link.goes_away()

    answer = chat.client.post(route, json=ASK)

    assert "starting" in refused(answer, 503, "engine_unavailable")
    assert 1 <= retry_after(answer) <= 6
    assert chat.link.sent == []
    assert chat.admission.taken == 0


def test_an_engine_that_is_tried_again_later_says_when(chat: ChatPort) -> None:
    chat.link.goes_away(EngineNotice(name="engine chat", cause="signal 9", next_try_s=30))

    answer = chat.client.post("/chat", json=ASK)

    assert "signal 9" in refused(answer, 503, "engine_unavailable")
    assert retry_after(answer) >= 30


def test_an_engine_that_was_given_up_promises_nothing(chat: ChatPort) -> None:
    chat.link.goes_away(EngineNotice(name="engine chat", cause="exit code 3"))

    answer = chat.client.post("/chat", json=ASK)

    assert "exit code 3" in refused(answer, 503, "engine_unavailable")
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize("body", [ASK, ASK | {"stream": True}], ids=["whole", "stream"])
def test_a_request_beyond_the_last_place_is_refused_with_when_to_come_back(
    chat: ChatPort, body: dict[str, Any]
) -> None:
    slots = [chat.admission.enter() for _ in range(places(chat.settings))]

    answer = chat.client.post("/chat", json=body)

    for slot in slots:
        slot.leave(served=False)
    assert str(len(slots)) in refused(answer, 429, "busy")
    assert retry_after(answer) >= 1
    assert chat.link.sent == []


def test_who_is_refused_is_told_when_the_engine_expects_its_first_answer_to_end(
    chat: ChatPort,
) -> None:
    chat.link.reports(gauges={"first_end_ms": 7400, "begin_ms": 9000})
    slots = [chat.admission.enter() for _ in range(places(chat.settings))]

    answer = chat.client.post("/chat", json=ASK)

    for slot in slots:
        slot.leave(served=False)
    refused(answer, 429, "busy")
    assert answer.get_json()["retry_after_s"] == pytest.approx(7.4, abs=0.5)
    assert retry_after(answer) in (7, 8)


def test_a_request_that_could_not_begin_before_its_deadline_is_refused_at_once(
    chat: ChatPort,
) -> None:
    chat.link.reports(gauges={"first_end_ms": 2000, "begin_ms": 8000})

    answer = chat.client.post("/chat", json=ASK | {"deadline_s": 3})

    assert "deadline of 3 s" in refused(answer, 429, "busy")
    assert answer.get_json()["retry_after_s"] == pytest.approx(5, abs=0.5)
    assert chat.link.sent == []
    assert chat.admission.taken == 0
    assert chat.client.post("/chat", json=ASK | {"deadline_s": 9}).status_code == 200


def test_what_the_engine_expected_long_ago_is_over(chat: ChatPort) -> None:
    chat.link.reports(gauges={"first_end_ms": 4000, "begin_ms": 30_000})
    chat.link.view = replace(chat.link.view, seen_at=time.monotonic() - 29)

    assert chat.client.post("/chat", json=ASK | {"deadline_s": 2}).status_code == 200


def test_no_more_requests_than_there_are_places_reach_the_engine(chat: ChatPort) -> None:
    count = places(chat.settings)
    chat.link.plays(*[stays_silent] * count)

    with ThreadPoolExecutor(count) as threads:
        running = [
            threads.submit(chat.app.test_client().post, "/chat", json=ASK) for _ in range(count)
        ]
        sent = chat.link.wait_sent(Generate, count)
        one_more = chat.client.post("/chat", json=ASK)
        for number, one in enumerate(sent):
            chat.link.emit(generated(one, f"text {number}"))
        texts = {one.result(PATIENCE_S).get_json()["response"] for one in running}

    refused(one_more, 429, "busy")
    assert texts == {f"text {number}" for number in range(count)}
    assert chat.client.post("/chat", json=ASK).status_code == 200


def test_a_draining_worker_takes_no_new_work_and_says_when_it_is_gone(chat: ChatPort) -> None:
    chat.drainer.begin(42.0)

    answers = [chat.client.post(route, json=ASK) for route in ROUTES]

    for answer in answers:
        refused(answer, 503, "draining")
        assert 41 <= retry_after(answer) <= 42
    assert chat.link.sent == []
    assert chat.client.get("/worker/info").status_code == 200


@pytest.mark.parametrize(
    ("route", "kind"), [("/chat", Generate), ("/enhance", Generate), ("/debug/render", Render)]
)
def test_an_engine_that_never_answers_costs_no_more_than_the_deadline(
    chat: ChatPort, route: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "ENGINE_GRACE_S", 0.0)
    chat.link.plays(stays_silent)

    answer = chat.client.post(route, json=ASK | {"deadline_s": 0.02})

    (asked,) = chat.link.of(kind)
    assert "0.02 s" in refused(answer, 504, "deadline_exceeded")
    assert chat.link.open_requests == []
    assert chat.admission.taken == 0
    assert kind is Render or chat.link.cancelled == [asked.request_id]


def test_a_stream_past_its_deadline_before_the_first_piece_has_a_status(
    chat: ChatPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "ENGINE_GRACE_S", 0.0)
    chat.link.plays(stays_silent)

    answer = chat.client.post("/chat", json=ASK | {"stream": True, "deadline_s": 0.02})

    refused(answer, 504, "deadline_exceeded")
    assert len(chat.link.cancelled) == 1
    assert chat.admission.taken == 0


# --- our own bugs --------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_a_bug_is_a_bare_500_and_is_logged_whole(
    chat: ChatPort, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat.link.breaks = RuntimeError("secret detail at /opt/inf")

    answer = chat.client.post(route, json=ASK, headers={"X-Request-Id": "r-7"})

    text = refused(answer, 500, "internal_error")
    assert "secret" not in text
    assert "RuntimeError" not in text
    assert "secret detail at /opt/inf" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("route", ROUTES[:3])
def test_a_bug_while_the_answer_is_written_is_the_same_bare_500(
    chat: ChatPort, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat.link.plays(says("x", receipt={"weights": {"a", "set"}}))  # which JSON cannot hold

    answer = chat.client.post(route, json=ASK)

    refused(answer, 500, "internal_error")
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("body", [ASK, ASK | {"stream": True}], ids=["whole", "stream"])
def test_a_request_that_cannot_be_sent_costs_no_place(chat: ChatPort, body: dict[str, Any]) -> None:
    """`submit` opens a socket pair; with no file left to open it raises, and every place that
    stayed taken then would be lost for as long as the front runs."""
    chat.link.breaks = OSError(24, "Too many open files")

    answer = chat.client.post("/chat", json=body)

    refused(answer, 500, "internal_error")
    assert chat.admission.taken == 0


def test_user_text_is_in_no_log_line(
    make_chat: Callable[..., ChatPort], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    port = make_chat()
    port.link.plays(fails("internal_error", 500))

    for _ in range(2):
        port.client.post("/chat", json=message(content="zebra-content") | {"zebra-key": 1})
    port.client.post("/chat", json=message(content="zebra-content", role="zebra-role"))
    post_raw(port, b'{"zebra-broken')

    assert "/chat" in caplog.text
    assert "zebra" not in caplog.text

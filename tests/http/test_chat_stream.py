"""Streamed answers, and clients that go away before the end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from werkzeug.test import TestResponse

from tests.fakes import (
    ChatPort,
    fails,
    generated,
    raises,
    says,
    stays_silent,
)
from tests.http.answers import ASK, events, free_of_traps, refused, retry_after, unread
from worker.errors import EngineLost
from worker.front import chat as chat_module
from worker.protocol.messages import Failed, Generate, Message, Rendered, Token

STREAM = ASK | {"stream": True}
TEXT = "  Ein r\u00f6tlicher \U0001f9ca,\r\n\r\ndata: x\u2028\ufffd\n"
PIECES = [
    "  Ein r",
    "\u00f6",
    "tlicher ",
    "",
    "\U0001f9ca,\r\n",
    "\r\nda",
    "ta: x\u2028",
    "\ufffd\n",
]


def stream(port: ChatPort, body: dict[str, Any] = STREAM, route: str = "/chat") -> TestResponse:
    """An answer that is read as it comes."""
    return port.client.post(route, json=body, headers={"X-Request-Id": "r-1"})


def begins(*texts: str) -> Callable[[Generate], list[Message]]:
    """An engine that says `texts` and then no more by itself."""
    return lambda message: [
        Token(request_id=message.request_id, text=text, completion_tokens=count)
        for count, text in enumerate(texts, 1)
    ]


# --- the whole stream ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "key"),
    [("/chat", "response"), ("/generate", "response"), ("/enhance", "enhanced_prompt")],
)
def test_the_pieces_of_a_stream_are_exactly_the_text(chat: ChatPort, route: str, key: str) -> None:
    chat.link.plays(says(TEXT, pieces=PIECES))

    answer = stream(chat, route=route)

    *pieces, last, done = events(answer)
    assert answer.mimetype == "text/event-stream"
    assert "".join(piece["text"] for piece in pieces) == TEXT
    assert [piece["index"] for piece in pieces] == list(range(len(pieces)))
    assert all(piece["text"] for piece in pieces)
    assert last[key] == TEXT
    assert ("response" in last) == (route != "/enhance")
    assert done == "[DONE]"


def test_the_last_event_holds_what_an_unstreamed_answer_would(chat: ChatPort) -> None:
    chat.link.plays(says("a b", pieces=["a", " b"]), says("a b", pieces=["a", " b"]))

    *_, last, _ = events(stream(chat, STREAM | {"seed": 1, "sfw_mode": True, "job_type": "x"}))

    whole = stream(chat, ASK | {"seed": 1, "sfw_mode": True, "job_type": "x"}).get_json()
    assert last == {"done": True} | whole
    assert last["timings"]["decode_s"] == 1.5
    assert last["receipt"]["ignored"] == ["job_type"]
    assert last["receipt"]["request_id"] == "r-1"


def test_an_empty_stream_still_ends_properly(chat: ChatPort) -> None:
    chat.link.plays(says("", pieces=[]))

    last, done = events(stream(chat))

    assert last["response"] == ""
    assert last["success"] is True
    assert done == "[DONE]"


def test_no_proxy_is_asked_to_keep_a_stream(chat: ChatPort) -> None:
    with stream(chat) as answer:
        headers = answer.headers

    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["X-Request-Id"] == "r-1"


def test_a_stream_has_the_longer_deadline(chat: ChatPort) -> None:
    list(events(stream(chat)))
    list(events(stream(chat, STREAM | {"deadline_s": 299.5})))

    assert [message.deadline_s for message in chat.link.of(Generate)] == [300.0, 299.5]


def test_a_piece_goes_out_before_the_next_one_is_made(chat: ChatPort) -> None:
    chat.link.plays(begins("first"))

    coming = events(stream(chat))

    first = next(coming)
    (message,) = chat.link.of(Generate)
    chat.link.emit(generated(message, "first"))
    last, done = coming
    assert first == {"index": 0, "text": "first"}
    assert last["done"] is True
    assert done == "[DONE]"


def test_a_stream_that_waits_for_its_turn_begins_with_comments(
    chat: ChatPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "STREAM_STARTS_S", 0.01)
    monkeypatch.setattr(chat_module, "COMMENT_EVERY_S", 0.01)
    chat.link.plays(stays_silent)

    answer = stream(chat)

    chunks = answer.iter_encoded()
    early = [next(chunks), next(chunks)]
    (message,) = chat.link.of(Generate)
    chat.link.emit(generated(message, "late"))
    rest = b"".join(chunks)
    assert early == [b": waiting\n\n", b": waiting\n\n"]
    assert b'"response":"late"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")


# --- streams that fail ---------------------------------------------------------------------------


def test_what_fails_before_the_first_piece_has_its_own_status(chat: ChatPort) -> None:
    chat.link.plays(fails("out_of_device_memory", 503, "no room", retry_after_s=4.2))

    answer = stream(chat)

    assert refused(answer, 503, "out_of_device_memory") == "no room"
    assert retry_after(answer) == 5
    assert chat.admission.taken == 0


def test_what_fails_in_mid_stream_is_an_event_and_not_done(chat: ChatPort) -> None:
    def script(message: Generate) -> list[Message]:
        lost = raises(EngineLost("the engine chat process ended", retry_after_s=6))
        return [*begins("one", " two")(message), *lost(message)]

    chat.link.plays(script)

    *pieces, error = events(stream(chat))

    assert [piece["text"] for piece in pieces] == ["one", " two"]
    assert error == {
        "success": False,
        "error": "the engine chat process ended",
        "error_code": "engine_lost",
        "request_id": "r-1",
    }
    assert chat.link.cancelled == []


def test_an_error_event_never_holds_a_word_that_a_client_misreads(chat: ChatPort) -> None:
    def script(message: Generate) -> list[Message]:
        return [*begins("one")(message), *fails("engine_failed", 500, "NaN in logits")(message)]

    chat.link.plays(script)

    answer = stream(chat)

    raw = b"".join(answer.iter_encoded())
    assert free_of_traps(raw)
    assert b'"error_code":"engine_failed"' in raw
    assert b"[DONE]" not in raw


def test_a_stream_past_its_deadline_ends_with_an_error_and_stops_the_engine(
    chat: ChatPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "ENGINE_GRACE_S", 0.0)
    chat.link.plays(begins("one"))

    piece, error = events(stream(chat, STREAM | {"deadline_s": 0.05}))

    (message,) = chat.link.of(Generate)
    assert piece["text"] == "one"
    assert error["error_code"] == "deadline_exceeded"
    assert chat.link.cancelled == [message.request_id]
    assert chat.admission.taken == 0


@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
def test_an_engine_that_answers_nonsense_costs_no_place(
    chat: ChatPort, body: dict[str, Any]
) -> None:
    """A bug is a bare 500; the place it held must be free for the next request."""
    chat.link.plays(
        lambda message: [
            Rendered(
                request_id=message.request_id,
                text="",
                ids=[],
                template=None,
                tokenizer_sha256="",
                context_tokens=1,
            )
        ]
    )

    answer = stream(chat, body)

    refused(answer, 500, "internal_error")
    assert chat.admission.taken == 0
    assert chat.link.open_requests == []


# --- clients that go away ------------------------------------------------------------------------


@pytest.fixture
def hung_up() -> Iterator[socket.socket]:
    """The worker's end of a connection whose client is gone."""
    mine, theirs = socket.socketpair()
    theirs.close()
    with closing(mine):
        yield mine


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The worker's and the client's end of a connection."""
    mine, theirs = socket.socketpair()
    with closing(mine), closing(theirs):
        yield mine, theirs


def test_closing_a_stream_stops_the_engine_and_frees_the_place(chat: ChatPort) -> None:
    chat.link.plays(begins("one"))
    answer = stream(chat)
    coming = events(answer)
    next(coming)
    assert chat.admission.taken == 1

    answer.close()

    (message,) = chat.link.of(Generate)
    assert chat.link.cancelled == [message.request_id]
    assert chat.link.open_requests == []
    assert chat.admission.taken == 0


def test_a_stream_that_is_closed_before_it_is_read_frees_its_place(chat: ChatPort) -> None:
    """A server may close an answer without asking for its first piece: when the headers cannot
    be written any more, for one."""
    chat.link.plays(begins("one"))
    answer = unread(chat.app, "POST", "/chat", STREAM)
    taken = chat.admission.taken

    answer.close()

    assert taken == 1
    assert chat.admission.taken == 0
    assert chat.link.open_requests == []


def test_a_hang_up_stops_an_unstreamed_generation(chat: ChatPort, hung_up: socket.socket) -> None:
    chat.link.plays(begins("one"))

    answer = chat.client.post("/chat", json=ASK, environ_overrides={"gunicorn.socket": hung_up})

    (message,) = chat.link.of(Generate)
    refused(answer, 499, "cancelled")
    assert chat.link.cancelled == [message.request_id]
    assert chat.link.open_requests == []
    assert chat.admission.taken == 0


def test_a_hang_up_stops_a_stream_that_has_not_begun(
    chat: ChatPort, hung_up: socket.socket
) -> None:
    chat.link.plays(stays_silent)

    answer = chat.client.post("/chat", json=STREAM, environ_overrides={"gunicorn.socket": hung_up})

    (message,) = chat.link.of(Generate)
    refused(answer, 499, "cancelled")
    assert chat.link.cancelled == [message.request_id]
    assert chat.admission.taken == 0


def test_a_hang_up_in_mid_stream_stops_the_engine(
    chat: ChatPort, connected: tuple[socket.socket, socket.socket]
) -> None:
    mine, theirs = connected
    chat.link.plays(begins("one"))
    answer = chat.client.post("/chat", json=STREAM, environ_overrides={"gunicorn.socket": mine})
    coming = events(answer)
    first = next(coming)

    theirs.close()
    rest = list(coming)

    (message,) = chat.link.of(Generate)
    assert first["text"] == "one"
    assert rest == []
    assert chat.link.cancelled == [message.request_id]
    assert chat.admission.taken == 0


def test_a_client_that_stays_gets_its_answer(
    chat: ChatPort, connected: tuple[socket.socket, socket.socket]
) -> None:
    mine, theirs = connected
    theirs.send(b"POST /chat HTTP/1.1\r\n")  # the next request, sent early, is no hang-up

    answer = chat.client.post("/chat", json=ASK, environ_overrides={"gunicorn.socket": mine})

    assert answer.get_json()["response"] == "An answer."
    assert chat.link.cancelled == []


def test_the_place_of_a_client_that_went_away_is_free_for_the_next(
    make_chat: Callable[..., ChatPort], hung_up: socket.socket
) -> None:
    port = make_chat(chat={"max_running": 1, "max_waiting": 0})
    port.link.plays(stays_silent)
    port.client.post("/chat", json=ASK, environ_overrides={"gunicorn.socket": hung_up})

    answer = port.client.post("/chat", json=ASK)

    assert answer.status_code == 200


def test_a_finished_request_is_not_cancelled(chat: ChatPort) -> None:
    chat.client.post("/chat", json=ASK)
    list(events(stream(chat)))
    chat.link.plays(fails("busy", 429))
    chat.client.post("/chat", json=ASK)

    assert chat.link.cancelled == []
    assert not isinstance(chat.link.sent[-1], Failed)

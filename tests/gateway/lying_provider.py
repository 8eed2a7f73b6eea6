"""A model provider over real HTTP that does what no provider should: lies, hangs, drips, cuts.

Each path has a reply; a path without one is answered with 404. On loopback.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

STEP_S = 0.02  # between two bytes of what drips


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Talk:
    """One request that is to be answered."""

    def __init__(self, handler: BaseHTTPRequestHandler, asked: Asked, stopped: threading.Event):
        self._handler = handler
        self.asked = asked
        self.stopped = stopped

    def send(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, length: int = -1
    ) -> None:
        """length: what is announced; -1: the truth."""
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", "application/json")
        self._handler.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in (headers or {}).items():
            self._handler.send_header(name, value)
        self._handler.end_headers()
        self.write(body)

    def write(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()


Reply = Callable[[Talk], None]


@dataclass
class LyingProvider:
    """The server. `replies` by path, the query not counted; a thread for each connection."""

    replies: dict[str, Reply] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        handler = type("Bound", (_Handler,), {"provider": self, "stopped": self._stopped})
        self._server = _Threads(("127.0.0.1", 0), handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def completes(self, reply: Reply) -> None:
        self.replies["/v1/chat/completions"] = reply

    def lists(self, reply: Reply) -> None:
        self.replies["/v1/models"] = reply


class _Threads(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    provider: LyingProvider
    stopped: threading.Event

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, body)
        self.provider.asked.append(asked)
        reply = self.provider.replies.get(self.path.partition("?")[0], status(404))
        with contextlib.suppress(ConnectionError):
            reply(Talk(self, asked, self.stopped))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at `asked`."""


# --- replies ----------------------------------------------------------------------------------


def answers(value: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON value."""
    return raw(json.dumps(value).encode(), code, headers)


def raw(body: bytes, code: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return lambda talk: talk.send(code, body, headers)


def status(code: int, headers: Mapping[str, str] | None = None) -> Reply:
    """An error whose text quotes what must not be passed on."""
    body = {"error": {"message": "the prompt was SECRET-PROMPT, the key sk-SECRET", "code": code}}
    return answers(body, code, headers)


def completion(
    text: Any = "a red boat",
    model: Any = "tiny",
    finish_reason: Any = "stop",
    usage: Any = None,
) -> dict[str, Any]:
    """The shape of an answer to a chat completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish_reason,
            }
        ],
        "usage": usage or {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16},
    }


def hangs(talk: Talk) -> None:
    """Takes the request and says nothing."""
    talk.stopped.wait()


def drips(talk: Talk) -> None:
    """Sends a byte now and then, each in time for a limit that is only between bytes."""
    talk.send(200, b"", length=1 << 20)
    while not talk.stopped.wait(STEP_S):
        talk.write(b" ")


def drips_headers(talk: Talk) -> None:
    """Never comes to the end of its headers."""
    talk.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not talk.stopped.wait(STEP_S):
        talk.write(b"a")


def cuts(body: bytes) -> Reply:
    """Announces a hundred bytes more than it sends."""
    return lambda talk: talk.send(200, body, length=len(body) + 100)


def too_much(size: int) -> Reply:
    """More bytes than anyone asked for, in blocks."""

    def reply(talk: Talk) -> None:
        talk.send(200, b"", length=size)
        for _ in range(size >> 16):
            talk.write(b" " * (1 << 16))

    return reply


def in_turn(*replies: Reply) -> Reply:
    """One after the other; the last one for ever."""
    left = list(replies)

    def reply(talk: Talk) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(talk)

    return reply


def pages(*rows: list[Any], last_ids: list[str] | None = None) -> Reply:
    """A list in pages, of which each names the way to the next."""
    cursors = last_ids or [str(page[-1]["id"]) for page in rows]
    return in_turn(
        *(
            answers({"data": page, "has_more": number < len(rows), "last_id": cursor})
            for number, (page, cursor) in enumerate(zip(rows, cursors, strict=True), 1)
        )
    )

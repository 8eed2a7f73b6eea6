"""What tests of all routes look for in answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flask import Flask
from werkzeug.test import EnvironBuilder, TestResponse

# An existing client searches the raw body of every refusal for these, in any casing. Written out
# again here: a word that is dropped from the worker's own list must fail a test.
TRAPS = (b"inf", b"nan", b"content policy", b"inappropriate", b"probability tensor")

ASK = {"messages": [{"role": "user", "content": "a red cube"}]}


def free_of_traps(raw: bytes) -> bool:
    return not any(word in raw.lower() for word in TRAPS)


def refused(answer: TestResponse, status: int, code: str) -> str:
    """Check that this is an error in the one shape that clients know; its text."""
    raw = answer.data
    assert answer.status_code == status, raw
    assert answer.content_type == "application/json"
    body = json.loads(raw)
    later = {"retry_after_s"} if "Retry-After" in answer.headers else set()
    assert set(body) == {"success", "error", "error_code", "request_id"} | later
    assert body["success"] is False
    assert body["error_code"] == code, body
    assert isinstance(body["error"], str) and body["error"]
    assert body["request_id"] == answer.headers["X-Request-Id"]
    assert free_of_traps(raw), raw
    assert b"Traceback" not in raw
    return str(body["error"])


def retry_after(answer: TestResponse) -> int:
    """Seconds of the Retry-After header, which must be a whole number of them."""
    value = answer.headers["Retry-After"]
    assert value.isdecimal() and int(value) >= 1
    return int(value)


def events(answer: TestResponse) -> Iterator[Any]:
    """The data of each server-sent event, parsed; "[DONE]" as it stands. Comments are left out."""
    buffer = b""
    for chunk in answer.iter_encoded():
        buffer += chunk
        *complete, buffer = buffer.split(b"\n\n")
        for block in complete:
            text = block.decode("utf-8")
            if text.startswith(":"):
                continue
            field, _, data = text.partition(": ")
            assert field == "data" and "\n" not in data, text
            yield data if data == "[DONE]" else json.loads(data)
    assert buffer == b""


def unread(app: Flask, method: str, path: str, body: Any = None) -> Any:
    """A whole answer of which nothing has been read: an iterable with `close`, as servers get."""
    builder = EnvironBuilder(path=path, method=method, json=body)
    environ = builder.get_environ()
    builder.close()
    return app.wsgi_app(environ, lambda *_: lambda _: None)

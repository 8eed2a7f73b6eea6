"""JSON bodies, read strictly: the declared type, the allowed size, no constants beyond JSON."""

from __future__ import annotations

import json
import time
from typing import Any

from flask import Request
from werkzeug.exceptions import ClientDisconnected

from worker.errors import InvalidRequest, TooLarge, UnsupportedMediaType

# A client that stops sending in the middle of its body keeps a thread; this long at most.
BODY_TIMEOUT_S = 20.0


def read_json(request: Request) -> Any:
    """The parsed body. Raises UnsupportedMediaType, InvalidRequest or TooLarge."""
    _require_json(request)
    return _parse(_read(request))


def read_optional_json(request: Request) -> Any:
    """As `read_json`, but None when there is no body at all."""
    data = _read(request)
    if not data:
        return None
    _require_json(request)
    return _parse(data)


def _require_json(request: Request) -> None:
    if not request.is_json:
        raise UnsupportedMediaType(
            "the body must be JSON with the header Content-Type: application/json"
        )


def _read(request: Request) -> bytes:
    client = request.environ.get("gunicorn.socket")
    if client is not None:
        client.settimeout(BODY_TIMEOUT_S)
    try:
        data = _read_within(request, time.monotonic() + BODY_TIMEOUT_S)
    except ClientDisconnected as exc:
        raise _late_body() from exc
    finally:
        if client is not None:
            client.settimeout(None)
    # Without a declared length werkzeug may stop at the limit and say nothing of the rest.
    limit = request.max_content_length
    if request.content_length is None and limit is not None and len(data) >= limit:
        raise TooLarge(f"the body is larger than {limit} bytes, the most this worker takes")
    return data


def _read_within(request: Request, ends: float) -> bytes:
    data = bytearray()
    while block := request.stream.read(1 << 16):
        data += block
        if time.monotonic() > ends:
            raise _late_body()
    return bytes(data)


def _late_body() -> InvalidRequest:
    return InvalidRequest(f"the body did not arrive whole within {BODY_TIMEOUT_S:g} s")


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the body is not UTF-8 (byte {exc.start})") from exc
    except RecursionError as exc:
        raise InvalidRequest("the body is nested too deeply") from exc
    except json.JSONDecodeError as exc:
        raise InvalidRequest(
            f"the body is not valid JSON (line {exc.lineno}, column {exc.colno})"
        ) from exc
    except ValueError as exc:  # a constant, or a whole number of thousands of digits
        raise InvalidRequest("the body has a number that is not valid JSON") from exc


def _refuse_constant(_: str) -> Any:
    raise ValueError("a constant that is not JSON")

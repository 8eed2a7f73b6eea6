"""Every error as an HTTP answer, in the one shape that clients know.

`{"success": false, "error": text, "error_code": code, "request_id": id, …fields}`, never with
status 200, never with a traceback or the input, never with a word of TRAP_WORDS.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, g, json, jsonify, request
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from werkzeug.exceptions import HTTPException

from gateway.errors import GatewayError, Invalid, InvalidRequest, has_trap_word

log = logging.getLogger(__name__)

_NEUTRAL = "the request failed; the gateway's log has the reason under this id"
_BUG = "unexpected error; the gateway's log has it under this id"
MAX_NAMED = 20  # faults of a body that are named
PAGES = ("/", "/docs", "/openapi.json")  # for browsers, which send a key by HTTP Basic
_OWN_KEYS = frozenset({"success", "error", "error_code", "request_id"})

_HTTP = {
    400: ("invalid_request", "the request cannot be read"),
    404: ("not_found", "there is no such route"),
    405: ("method_not_allowed", "this route does not take this method"),
    413: ("too_large", "the body is larger than this route takes"),
    415: ("unsupported_media_type", "send the body as application/json"),
    500: (GatewayError.code, _BUG),
}

# Kinds of pydantic's errors that say: readable, but out of range. All others: the wrong shape.
_RANGE = frozenset(
    {
        "enum",
        "finite_number",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "literal_error",
        "multiple_of",
        "string_pattern_mismatch",
        "string_too_long",
        "string_too_short",
        "too_long",
        "too_short",
        "value_error",
    }
)


def register(app: Flask) -> None:
    """Answer every exception of `app` in the one shape."""

    @app.errorhandler(GatewayError)
    def own(error: GatewayError) -> Response:
        if error.status >= 500:
            log.warning("%s: %s", error.code, error)
        return response(error)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        code, text = _HTTP.get(status, ("refused", f"the request was refused with {status}"))
        answer = _answer(status, code, text)
        for header, value in error.get_headers():
            if header == "Allow":  # a 405 must say what is taken
                answer.headers[header] = value
        return answer

    @app.errorhandler(Exception)
    def bug(error: Exception) -> Response:
        # A ValidationError too: bodies go through invalid_body, so it is of a value of ours.
        log.error("unexpected error", exc_info=error)
        return _answer(500, GatewayError.code, _BUG)


def response(error: GatewayError) -> Response:
    """The HTTP answer of an error."""
    return _answer(error.status, error.code, str(error), error.retry_after_s, error.fields)


def invalid_body(error: ValidationError) -> Response:
    """The answer to a body, query or path that its model refuses. Never returns.

    Raises InvalidRequest (400) for a wrong shape: a key is missing, unknown or of another type;
    Invalid (422) where everything is readable and only values are out of range. Both name the keys
    and the ranges, never the values.
    """
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    kind = Invalid if all(one["type"] in _RANGE for one in faults) else InvalidRequest
    told = [_fault(one) for one in faults[:MAX_NAMED]]
    text = "; ".join(f"{one['field']}: {one['problem']}" for one in told[:3])
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    raise kind(text + more, fields={"faults": told})


def _fault(one: ErrorDetails) -> dict[str, str]:
    # A key that the client made up is in the location of an "extra" error, and so may be anything.
    where = ".".join(str(part)[:60] for part in one["loc"]) or "body"
    # The text of a validator of ours may quote; pydantic's own texts quote only what is allowed.
    problem = one["msg"].removeprefix("Value error, ")
    return {"field": where, "problem": problem}


def _answer(
    status: int,
    code: str,
    text: str,
    retry_after_s: float | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Response:
    body: dict[str, Any] = {"success": False, "error": _safe(text), "error_code": code}
    body["request_id"] = g.get("request_id", "-")
    if retry_after_s is not None:  # the header has whole seconds only
        body["retry_after_s"] = round(retry_after_s, 2)
    for key, value in (fields or {}).items():
        if key in _OWN_KEYS:
            continue
        told = json.dumps({key: value}, default=str)
        # A name in it, of a template or a model, may hold a trap word.
        if has_trap_word(told):
            log.warning("this field of an error is not shown to the client: %s", key)
        else:
            body |= json.loads(told)
    answer = jsonify(body)
    answer.status_code = status
    if retry_after_s is not None:
        answer.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if status == 401:
        answer.headers["WWW-Authenticate"] = _challenge()
    return answer


def _safe(text: str) -> str:
    if not has_trap_word(text):
        return text
    log.warning("this error text is not shown to the client: %s", text)
    return _NEUTRAL


def _challenge() -> str:
    # A browser asks its user for a key only where it gets this; a page needs one as well.
    if request.path in PAGES:
        return 'Basic realm="gateway", charset="UTF-8"'
    return "Bearer"

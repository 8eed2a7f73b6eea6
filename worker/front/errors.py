"""Every error as an HTTP answer, in the one shape that clients know.

`{"success": false, "error": text, "error_code": code, "request_id": id}`, never with status 200,
never with a traceback, never with a word of TRAP_WORDS.
"""

from __future__ import annotations

import logging
import math

from flask import Flask, Response, g, jsonify
from werkzeug.exceptions import HTTPException

from worker.errors import NEUTRAL_ERROR, Relayed, WorkerError, has_trap_word
from worker.protocol.messages import Failed

log = logging.getLogger(__name__)

_BUG = "unexpected error; the worker's log has it under this id"
_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    500: WorkerError.code,
}
_TEXTS = {
    400: "the request cannot be read",
    404: "there is no such route",
    405: "this route does not take this method",
    413: "the body is larger than this worker takes",
    500: _BUG,
}


def register(app: Flask) -> None:
    """Answer every exception of `app` in the contract's shape."""

    @app.errorhandler(WorkerError)
    def own(error: WorkerError) -> Response:
        return response(error)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        text = _TEXTS.get(status, f"the request was refused with status {status}")
        answer = _answer(status, _CODES.get(status, "refused"), text, None)
        for header, value in error.get_headers():
            if header == "Allow":  # a 405 must say what is taken
                answer.headers[header] = value
        return answer

    @app.errorhandler(Exception)
    def bug(error: Exception) -> Response:
        log.error("unexpected error", exc_info=error)
        return response(WorkerError(_BUG))


def response(error: WorkerError) -> Response:
    """The HTTP answer of an error."""
    return _answer(error.status, error.code, str(error), error.retry_after_s)


def body(code: str, text: str) -> dict[str, object]:
    """The JSON body of an error, free of the words that a client misreads."""
    if has_trap_word(text):
        # The text names a file, a model or a library's own words. The log keeps it whole.
        log.warning("this error text is not shown to the client: %s", text)
        text = NEUTRAL_ERROR
    return {"success": False, "error": text, "error_code": code, "request_id": g.request_id}


def relayed(failure: Failed) -> WorkerError:
    """An engine's error, to be raised here."""
    return Relayed(
        failure.error,
        status=failure.status,
        code=failure.code,
        retry_after_s=failure.retry_after_s,
    )


def _answer(status: int, code: str, text: str, retry_after_s: float | None) -> Response:
    told = body(code, text)
    if retry_after_s is not None:  # the header has whole seconds only
        told["retry_after_s"] = round(retry_after_s, 2)
    answer = jsonify(told)
    answer.status_code = status
    if retry_after_s is not None:
        answer.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer

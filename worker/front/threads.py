"""gunicorn's threaded worker, whose own errors have the contract's shape instead of a page."""

from __future__ import annotations

import json
import logging
import socket
import uuid
from typing import Any

from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.workers.gthread import ThreadWorker

log = logging.getLogger(__name__)


class FrontWorker(ThreadWorker):  # type: ignore[misc]
    """Answers what never becomes a request: an unreadable or over-long head."""

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        log.info("refused the head of a request: %s", type(exc).__name__)
        try:
            client.sendall(refusal(exc))
        except OSError as gone:
            log.info("the client did not wait for the answer: %s", gone)


def refusal(exc: Exception) -> bytes:
    """The whole HTTP answer, head included."""
    status, text = "400 Bad Request", "the head of the request cannot be read"
    if isinstance(exc, LimitRequestLine):
        status, text = "414 URI Too Long", "the request line is too long"
    elif isinstance(exc, LimitRequestHeaders):
        status, text = "431 Request Header Fields Too Large", "the headers are too large"
    body = json.dumps(
        {
            "success": False,
            "error": text,
            "error_code": "invalid_request",
            "request_id": uuid.uuid4().hex,
        }
    ).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body

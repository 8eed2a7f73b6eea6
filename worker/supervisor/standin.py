"""Answers on the port of a front that cannot start, so that whoever probes it learns why."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from worker.errors import has_trap_word
from worker.protocol.messages import ChildReport

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 5.0
CLOSE_POLL_S = 0.02  # `close` waits this long inside a tick


class HttpStandIn:
    """One small HTTP server per port. Orchestrator thread only; answering is on its threads."""

    def __init__(self, host: str):
        self._host = host
        self._servers: dict[int, ThreadingHTTPServer] = {}

    def open(self, port: int, report: Callable[[], ChildReport]) -> None:
        """Begin to answer on `port`; `report` is asked for every answer."""
        if port in self._servers:
            return
        try:
            server = _server_class(self._host)((self._host, port), _handler(report))
        except OSError as exc:
            log.error("cannot explain on port %d either: %s", port, exc)
            return
        server.daemon_threads = True
        self._servers[port] = server
        threading.Thread(
            target=server.serve_forever, args=(CLOSE_POLL_S,), name=f"stand-in {port}", daemon=True
        ).start()
        log.info("port %d explains why its front is down", port)

    def close(self, port: int) -> None:
        server = self._servers.pop(port, None)
        if server is not None:
            server.shutdown()
            server.server_close()


def answer(report: ChildReport) -> tuple[bytes, float | None]:
    """The body for every request, and its Retry-After. Pure but for the request id."""
    next_try = report.next_try_s
    when = (
        "it will not be tried again; correct the cause and restart the daemon"
        if next_try is None
        else f"next try in {math.ceil(next_try)} s"
    )
    text = f"{report.name} does not run: {report.cause}; failures: {report.failures}; {when}"
    if has_trap_word(text):
        text = f"{report.name} does not run; its log has the cause; {when}"
    body = {
        "success": False,
        "error": text,
        "error_code": "front_unavailable",
        "request_id": uuid.uuid4().hex,
        "status": "unavailable",
        "next_try_s": next_try,
    }
    return json.dumps(body).encode(), next_try


def _server_class(host: str) -> type[ThreadingHTTPServer]:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    return Server


def _handler(report: Callable[[], ChildReport]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = READ_TIMEOUT_S
        server_version = "verbatim"
        sys_version = ""

        def _explain(self) -> None:
            body, next_try = answer(report())
            self.send_response(503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            if next_try is not None:
                self.send_header("Retry-After", str(max(1, math.ceil(next_try))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_DELETE = do_OPTIONS = do_PUT = do_PATCH = _explain

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: probes come every few seconds, and the cause is in the log already."""

    return Handler

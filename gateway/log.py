"""One log format: time, level, process, request, message; the worker's, so that both read alike.

Prompts, answers and secrets are never logged; ids, counts, hashes and durations are.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar

_request_id: ContextVar[str] = ContextVar("request_id", default="-")


def set_request_id(request_id: str) -> None:
    """Put `request_id` into this thread's log lines until it is set again."""
    _request_id.set(request_id)


class _Format(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)s gateway [%(request_id)s] %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )


def _add_request_id(record: logging.LogRecord) -> bool:
    # It may be any text, and a line must stay a line.
    record.request_id = _request_id.get()[:128].encode("unicode_escape").decode()
    return True


def set_up(level: int = logging.INFO) -> None:
    """Send this process's log to standard error; called once, by a composition root."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format())
    handler.addFilter(_add_request_id)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("httpx", "httpcore", "alembic", "sqlalchemy.engine"):
        logging.getLogger(name).setLevel(logging.WARNING)  # URLs and statements may hold secrets
    logging.captureWarnings(True)

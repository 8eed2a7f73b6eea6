"""One log format for every process: time, level, process, request, message.

User text is never logged; ids, counts and durations are.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path

# Of one file, and older files kept beside it: of each process, the orchestrator's own included.
MAX_LOG_BYTES = 10 << 20
KEPT_LOGS = 3

_request_id: ContextVar[str] = ContextVar("request_id", default="-")


@contextmanager
def request_scope(request_id: str) -> Iterator[None]:
    """Put `request_id` into every log line written inside the block by this thread."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def set_request_id(request_id: str) -> None:
    """Put `request_id` into this thread's log lines until it is set again."""
    _request_id.set(request_id)


class _Format(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def __init__(self, process: str):
        super().__init__(
            f"%(asctime)s.%(msecs)03dZ %(levelname)s {process} [%(request_id)s] %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )


def _add_request_id(record: logging.LogRecord) -> bool:
    # From a list it may be any text, and a line must stay a line.
    record.request_id = _request_id.get()[:128].encode("unicode_escape").decode()
    return True


def set_up(process: str, level: int = logging.INFO) -> None:
    """Send this process's log to standard error; called once, by the composition root.

    process: role and name as `ps` shows them, such as "engine chat".
    """
    _use(logging.StreamHandler(sys.stderr), process, level)


def set_up_file(process: str, path: Path, level: int = logging.INFO) -> None:
    """Send this process's log to a file, because its terminal shows a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _use(RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS), process, level)


def _use(handler: logging.Handler, process: str, level: int) -> None:
    handler.setFormatter(_Format(process))
    handler.addFilter(_add_request_id)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # It tells every URL, and a signed one is a key.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.captureWarnings(True)

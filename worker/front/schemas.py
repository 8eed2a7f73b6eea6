"""Whether a JSON Schema may go to an engine: tried in a process of its own, with limits."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import OrderedDict

from worker.config import REPOSITORY
from worker.errors import Unsupported, WorkerError
from worker.front.admission import Admission
from worker.receipt import text_sha256

_AT_ONCE = 2
_REMEMBERED = 1000
# Of wall time. The program limits its own processor time to a second (worker/grammar.py); a busy
# machine may take longer for it.
_WAIT_S = 20.0


class SchemaCheck:
    """Remembers the schemas that were fine. Any thread; the lock guards the memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fine: OrderedDict[str, None] = OrderedDict()  # by hash, least recently asked first
        self._places = Admission(_AT_ONCE)

    def check(self, schema: str) -> None:
        """Raises Unsupported, or Busy while as many as may be are being tried."""
        name = text_sha256(schema)
        with self._lock:
            if name in self._fine:
                self._fine.move_to_end(name)
                return
        with self._places.place():
            _try(schema)
        with self._lock:
            self._fine[name] = None
            if len(self._fine) > _REMEMBERED:
                self._fine.popitem(last=False)


def _try(schema: str) -> None:
    command = [sys.executable, "-m", "worker.grammar"]
    try:
        tried = subprocess.run(
            command,
            input=schema,
            capture_output=True,
            encoding="utf-8",
            timeout=_WAIT_S,
            check=False,
            cwd=REPOSITORY,
        )
    except subprocess.TimeoutExpired:
        raise _too_much() from None
    if tried.returncode == 1 and tried.stdout:
        raise Unsupported(tried.stdout.strip())
    if tried.returncode < 0:  # ended by a signal: the kernel's, at a limit
        raise _too_much()
    if tried.returncode:
        # An abort for want of memory ends like this, too; what it said goes to the log.
        raise WorkerError(f"trying the schema ended with {tried.returncode}: {tried.stderr[-300:]}")


def _too_much() -> Unsupported:
    return Unsupported(
        "response_format: this schema takes more than a second or 2 GiB to prepare; use fewer or "
        "simpler patterns"
    )

"""A replica as a real process: the cache, and commands by lines of JSON on its standard input.

    python -m tests.gateway.replica '{"url": …, "state_dir": …, "listen": true}'

held {min}: what a request is given. loads: when each revision was swapped in, by the machine's
monotonic clock, which all processes share. status. Ends with its standard input.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gateway.cache.prompts import Prompts
from gateway.cache.record import LOADED
from gateway.errors import RevisionNotReached
from tests.gateway.cache_parts import emergency

REPOSITORY = Path(__file__).resolve().parents[2]


def main(raw: str) -> None:
    told = json.loads(raw)
    logging.getLogger().addHandler(logging.NullHandler())  # outages are what is tested here
    loads: list[tuple[int, float]] = []

    def observe(name: str, revision: int | None) -> None:
        if name == LOADED and revision is not None:
            loads.append((revision, time.monotonic()))

    prompts = Prompts(
        told["url"],
        Path(told["state_dir"]),
        emergency,
        listen=told.get("listen", True),
        observe=observe,
    )
    prompts.start()
    _say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "held":
            _say(_held(prompts, command.get("min")))
        elif command["op"] == "loads":
            taken = len(loads)
            _say({"loads": loads[:taken]})
            del loads[:taken]
        elif command["op"] == "status":
            _say(prompts.status())
        else:
            raise ValueError(command["op"])
    prompts.stop()


def _held(prompts: Prompts, min_revision: int | None) -> dict[str, Any]:
    started = time.monotonic()
    try:
        held = prompts.held(min_revision)
    except RevisionNotReached as exc:
        return {"error": exc.code, "waited_s": time.monotonic() - started, **exc.fields}
    return {
        "revision": held.snapshot.revision,
        "word": held.snapshot.negatives[0].negative_prompt,
        "level": held.level,
        "took_s": time.monotonic() - started,
    }


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class ReplicaProcess:
    """The parent's side. `_lock` makes a command and its answer one step; any thread may ask."""

    def __init__(self, url: str, state_dir: Path, *, listen: bool = True):
        told = json.dumps({"url": url, "state_dir": str(state_dir), "listen": listen})
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.replica", told],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        self._answer()

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def stop(self) -> int:
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            code = self._process.wait(20)
            self._process.stdout.close()
            return code

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the replica ended with {self._process.wait(5)}")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


if __name__ == "__main__":
    main(sys.argv[1])

"""Log files of children: each is written here alone, and rotates while its child runs.

A child says everything into a pipe, and the orchestrator copies. A child that wrote its file itself
could not begin a new one: a front is two processes with one output, and what a native library says,
or an interpreter that dies, goes to descriptor 2, past all logging. What waits in a pipe outlives
its child; it is lost only with the orchestrator itself, with which all children die.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from pathlib import Path

from worker.log import KEPT_LOGS, MAX_LOG_BYTES

_READ_BYTES = 64 << 10  # as much as a pipe holds
_TAIL_BYTES = 8 << 10


class ChildLogs:
    """One log for each child. The orchestrator's thread calls; a thread for each process copies."""

    def __init__(self, folder: Path, max_bytes: int = MAX_LOG_BYTES, kept: int = KEPT_LOGS) -> None:
        """max_bytes: of one file. kept: older files beside it, .1 the youngest."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._kept = kept
        self._files: dict[str, _LogFile] = {}
        self._outputs: dict[str, _Output] = {}  # of the last process of each name
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.log"

    def open(self, name: str) -> int:
        """A descriptor that a new process of this name writes to; the caller closes its own."""
        if name not in self._files:
            self._files[name] = _LogFile(self.path(name), self._max_bytes, self._kept)
        reading, writing = os.pipe()
        output = self._outputs[name] = _Output(reading, self._files[name])
        threading.Thread(target=output.copy_to_its_end, name=f"log {name}", daemon=True).start()
        return writing

    def last_words(self, name: str) -> str:
        """The last error that the last process of this name told of, shortened; for one that has
        ended."""
        output = self._outputs.get(name)
        if output is None:
            return ""
        output.copy_what_is_there()
        return pick_cause(output.tail.decode("utf-8", "replace").splitlines())

    def close(self) -> None:
        """Once all children have ended: write what they said last."""
        for output in self._outputs.values():
            output.copy_what_is_there()


class _LogFile:
    """A file that is put aside when it is full. What the disk does not take is counted, and told
    when it does again. Any thread."""

    def __init__(self, path: Path, max_bytes: int, kept: int):
        self._path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._lock = threading.Lock()
        self._lost_bytes = 0

    def write(self, lines: bytes) -> None:
        with self._lock:
            try:
                self._rotate_before(len(lines))
                if self._lost_bytes:
                    note = b"\n(up to %d bytes could not be written here)\n" % self._lost_bytes
                    self._append(note)
                    self._lost_bytes = 0
                self._append(lines)
            except OSError:
                self._lost_bytes += len(lines)

    def _rotate_before(self, more_bytes: int) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if not size or size + more_bytes <= self._max_bytes:
            return
        older = [self._path.with_suffix(f".log.{number}") for number in range(1, self._kept + 1)]
        for younger, old in reversed([*zip([self._path, *older], older, strict=False)]):
            if younger.exists():
                younger.replace(old)

    def _append(self, data: bytes) -> None:
        # Opened for each piece: a file that somebody has moved or removed is begun anew.
        with self._path.open("ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]


class _Output:
    """What one process says. The lock is held by whoever copies."""

    def __init__(self, descriptor: int, file: _LogFile):
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._file = file
        self._lock = threading.Lock()
        self._rest = b""  # a line that has no end yet
        self._ended = False
        self.tail = b""

    def copy_to_its_end(self) -> None:
        """On a thread of its own, which alone closes the pipe."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while not self._ended:
            poll.poll()
            with self._lock:
                self._copy()
        os.close(self._descriptor)

    def copy_what_is_there(self) -> None:
        """Now, and not when the thread comes to it; a line without an end, too."""
        with self._lock:
            while not self._ended and self._copy():
                pass
            if self._rest:
                self._file.write(self._rest)
            self._rest = b""

    def _copy(self) -> bool:
        """One piece of it. False when there is none at the moment, or none any more."""
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:  # somebody else has copied it
            return False
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        said = self._rest + data
        whole = said.rfind(b"\n") + 1
        if not data or len(said) - whole > _READ_BYTES:
            whole = len(said)
        if whole:
            self._file.write(said[:whole])
        self._rest = said[whole:]
        self._ended = not data
        return bool(data)


def pick_cause(lines: Sequence[str]) -> str:
    """The line that says why, of the last lines of a log: the last exception or error. Pure."""
    for line in reversed(lines):
        text = line.strip()
        if " CRITICAL " in text or " ERROR " in text or text.startswith(("Error:", "error:")):
            return text.split("] ", 1)[-1][:300]
        head = text.split(":", 1)[0]
        if head.replace(".", "").replace("_", "").isalnum() and head.endswith(("Error", "Exit")):
            return text[:300]
    return ""

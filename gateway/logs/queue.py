"""What waits to be written, bounded in entries and in bytes."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.values.logentry import LogBody, LogEntry

NODE_BYTES = 64  # of a dict's or list's place for one value, about
ENTRY_BYTES = 2048  # of an entry without its body, about

BODY_NOT_KEPT = "body_not_kept"


@dataclass(frozen=True, slots=True)
class Waiting:
    entry: LogEntry
    size_bytes: int
    added: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the start. queued = written + refused + what waits + what was dropped at the stop."""

    queued: int = 0
    written: int = 0
    dropped: int = 0  # never queued, or left at the stop
    bodies_dropped: int = 0  # queued without their texts
    refused: int = 0  # the database takes everything else, but not these

    def plus(self, **more: int) -> Counts:
        return replace(self, **{name: getattr(self, name) + by for name, by in more.items()})


class Queue:
    """Guarded by `changed`, which is notified of every change. Any thread adds; only the writer's
    takes away."""

    def __init__(self, max_entries: int, max_bytes: int):
        self.changed = threading.Condition()
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._waiting: deque[Waiting] = deque()
        self._bytes = 0
        self.counts = Counts()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, entry: LogEntry, now: float) -> bool:
        """False: full, and the entry is dropped. Where only its texts have no room, the numbers
        are kept."""
        size = ENTRY_BYTES + body_bytes(entry.body)
        with self.changed:
            if len(self._waiting) >= self._max_entries or (
                self._bytes + ENTRY_BYTES > self._max_bytes
            ):
                self.counts = self.counts.plus(dropped=1)
                return False
            bodies_dropped = 0
            if self._bytes + size > self._max_bytes:
                entry, size, bodies_dropped = without_body(entry), ENTRY_BYTES, 1
            self._waiting.append(Waiting(entry, size, now))
            self._bytes += size
            self.counts = self.counts.plus(queued=1, bodies_dropped=bodies_dropped)
            self.changed.notify_all()
            return True

    def head(self, most: int) -> tuple[LogEntry, ...]:
        """The oldest, which stay until `done`."""
        with self.changed:
            return tuple(self._waiting[number].entry for number in range(min(most, len(self))))

    def oldest(self) -> float | None:
        """When the oldest was added. The caller holds `changed`."""
        return self._waiting[0].added if self._waiting else None

    def done(self, number: int, **counted: int) -> None:
        """Take the `number` oldest away and count them."""
        with self.changed:
            for _ in range(number):
                self._bytes -= self._waiting.popleft().size_bytes
            self.counts = self.counts.plus(**counted)
            self.changed.notify_all()


def without_body(entry: LogEntry) -> LogEntry:
    """The numbers, with a flag that says that there were texts."""
    return replace(entry, body=None, flags=(*entry.flags, BODY_NOT_KEPT))


def body_bytes(body: LogBody | None) -> int:
    """Memory that a body holds, about; never far less."""
    if body is None:
        return 0
    size = sum(sys.getsizeof(one.content) + NODE_BYTES for one in body.messages)
    size += _bytes_of(body.request) + _bytes_of(body.trace) + sys.getsizeof(body.answer or "")
    return size + sum(_bytes_of(one.body) for one in body.objects)


def _bytes_of(value: Any) -> int:
    size, left = 0, [value]
    while left:
        one = left.pop()
        size += NODE_BYTES
        if isinstance(one, str):
            size += sys.getsizeof(one)
        elif isinstance(one, Mapping):
            left.extend(one.values())
        elif isinstance(one, Sequence):
            left.extend(one)
    return size

"""Who waits for device memory, in order of arrival.

In which order they are served is worker/vram/order.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worker.protocol.messages import Acquire
from worker.vram.order import MAX_HELD_S, MAX_OVERTAKEN, Waiting, next_request, without

PATIENCE_S = 10.0  # that a lease in use is waited for before it is asked to end


@dataclass(eq=False, slots=True)
class Waiter:
    """A question that has no answer yet."""

    holder: str
    asked: Acquire
    arrived: float
    requests: list[str]
    overtaken: int = 0
    why: str = ""  # the last reason that was written down

    def is_patient(self, now: float) -> bool:
        """Whether it leaves alone what is in use."""
        due = self.overtaken >= MAX_OVERTAKEN or now - self.arrived >= MAX_HELD_S
        return not due and now - self.arrived < PATIENCE_S


class Waiters:
    """Owner: the broker."""

    def __init__(self) -> None:
        self._queue: list[Waiter] = []

    def __iter__(self) -> Iterator[Waiter]:
        """In order of arrival; whoever iterates may remove."""
        return iter(list(self._queue))

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._queue

    def add(self, waiter: Waiter) -> None:
        self._queue.append(waiter)

    def remove(self, waiter: Waiter) -> None:
        """It wants nothing any more; nobody was overtaken."""
        self._queue.remove(waiter)

    def clear(self) -> None:
        self._queue.clear()

    def find(self, holder: str, number: int) -> Waiter | None:
        """The question that an engine gave this number."""
        fitting = (
            one for one in self._queue if one.holder == holder and one.asked.number == number
        )
        return next(fitting, None)

    def next(self, ready: frozenset[str], now: float) -> Waiter:
        """Whose turn it is. ready: tenants that are there."""
        return self._queue[next_request(self._as_order_sees(), ready, now)]

    def served(self, waiter: Waiter) -> None:
        """It has its answer: those that came before it were overtaken."""
        index = self._queue.index(waiter)
        left = without(self._as_order_sees(), index)
        self._queue.remove(waiter)
        for one, moved in zip(self._queue, left, strict=True):
            one.overtaken = moved.overtaken

    def report(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "holder": one.holder, "phase": one.asked.phase, "request_id": one.requests[0],
                "waited_s": round(now - one.arrived, 3), "why": one.why,
            }
            for one in self._queue
        ]  # fmt: skip

    def _as_order_sees(self) -> list[Waiting]:
        return [
            Waiting(
                id=number,
                arrived=one.arrived,
                models=frozenset(one.asked.ways[0].tenants),
                priority=one.asked.priority,
                overtaken=one.overtaken,
            )
            for number, one in enumerate(self._queue)
        ]

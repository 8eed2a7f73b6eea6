"""Which request is served next: first come, first served, within bounds that are proved. Pure.

Requests of models that are resident go first, because that saves swaps, but nobody waits for it
without end: `next_request` has the bound and why it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_OVERTAKEN = 8  # later requests that may go before one
MAX_HELD_S = 120.0  # a request that has waited this long is not overtaken any more


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue."""

    id: int
    arrived: float
    models: frozenset[str]
    priority: int = 0
    overtaken: int = 0  # times that one that came later went first


def next_request(waiting: Sequence[Waiting], warm: frozenset[str], now: float) -> int:
    """Index of the request to serve. waiting: in order of arrival; warm: models that are resident.

    The highest priority goes first; within it the oldest whose models are warm, else the oldest.
    But a request that is due, having been overtaken MAX_OVERTAKEN times or held MAX_HELD_S, goes
    before all that are not, the oldest due one first.

    Nothing is overtaken more than MAX_OVERTAKEN times. Only a request that came later overtakes,
    and it is chosen in one of two cases. Where nothing is due, everyone has been overtaken less
    than that, and is at most that after it. Where something is due, the oldest due one is chosen,
    so whoever is older than it is not due, and the same holds. Hence a request waits for those
    that were there when it came and for at most MAX_OVERTAKEN others.
    """
    for index, one in enumerate(waiting):
        if one.overtaken >= MAX_OVERTAKEN or now - one.arrived >= MAX_HELD_S:
            return index
    top = max(one.priority for one in waiting)
    first = -1
    for index, one in enumerate(waiting):
        if one.priority == top:
            if one.models <= warm:
                return index
            if first < 0:
                first = index
    return first


def without(waiting: Sequence[Waiting], index: int) -> list[Waiting]:
    """The queue after the request at `index` left it: those before it were overtaken."""
    before = [replace(one, overtaken=one.overtaken + 1) for one in waiting[:index]]
    return [*before, *waiting[index + 1 :]]


def in_order(waiting: Sequence[Waiting], warm: frozenset[str], now: float) -> list[Waiting]:
    """The whole queue as it would be served from now on, if nothing else came."""
    left, served = list(waiting), []
    while left:
        index = next_request(left, warm, now)
        served.append(left[index])
        warm |= left[index].models
        left = without(left, index)
    return served

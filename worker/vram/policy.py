"""What to move so that tenants can be resident together. Pure.

A tenant is what sits in device memory on its own: weights, a KV pool, a text encoder, a denoiser,
a VAE. Frozen values go in, with `now` as one of them; moves come out, or a refusal with numbers.
Whoever carries the moves out owns the device, the clock and the log.

A victim costs the seconds of moving it away, and those of bringing it back times the probability
that it is used again soon. The cheapest set that makes enough room is taken, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

SOON_S = 60.0  # "used again soon": within this time
CERTAINTY = 0.95  # what is known of the queue fades by this with every place further back
# A second that a higher priority waits for its tenants is worth this many of the one below: people
# wait for a chat, a job is fetched later.
PRIORITY_WEIGHT = 4.0
EXACT_CANDIDATES = 14  # that are searched exactly; among more, greedily


class Place(Enum):
    DEVICE = "resident"
    HOST = "parked"
    DISK = "on disk only"


class Kind(Enum):
    PARK = "park"  # device -> host memory
    DROP = "drop"  # the device's copy is given up; it comes back from disk
    SHRINK = "shrink"  # it keeps a part of its bytes
    WAKE = "wake"  # host memory -> device
    LOAD = "load"  # disk -> device


ARRIVALS = (Kind.WAKE, Kind.LOAD)


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    model: str
    size_bytes: int  # whole
    place: Place  # where what is absent is; DEVICE where nothing is, or a part was shrunk
    held_bytes: int = 0  # on the device now; less than `size_bytes` where it was shrunk
    floor_bytes: int = 1  # that it can work with; `size_bytes` where it cannot shrink
    in_use: bool = False  # computes or is being moved: not taken away
    pinned: bool = False  # never taken
    priority: int = 0  # of who uses it; higher is more urgent
    keep_until: float = 0.0  # monotonic seconds; certain to be used again before that
    last_used: float = 0.0
    uses: tuple[float, ...] = ()  # when earlier uses began, in order
    park_s: float = 0.0  # seconds to move it to host memory; 0 where a copy lies there
    wake_s: float = 0.0
    load_s: float = 0.0
    shrinks_in_use: bool = False  # what it has above its floor may be taken while it is in use

    @property
    def ready(self) -> bool:
        """Resident, and enough of it."""
        return self.held_bytes >= self.floor_bytes

    @property
    def absent_bytes(self) -> int:
        """What it takes more when it comes; nothing where it can work as it is."""
        return 0 if self.ready else self.size_bytes - self.held_bytes

    @property
    def back_s(self) -> float:
        """Seconds until what is absent is there."""
        whole = self.load_s if self.place is Place.DISK else self.wake_s
        return whole * self.absent_bytes / self.size_bytes

    @property
    def takable(self) -> bool:
        if self.in_use:
            return self.shrinks_in_use and self.held_bytes > self.floor_bytes and not self.pinned
        return self.held_bytes > 0 and not self.pinned


@dataclass(frozen=True, slots=True)
class Ahead:
    """A phase that is known to come."""

    tenants: tuple[str, ...]
    peak_bytes: int = 0
    can_stream: bool = False  # it does without them if it must: nothing is taken ahead for them


@dataclass(frozen=True, slots=True)
class State:
    tenants: tuple[Tenant, ...]
    free_bytes: int  # of the budget, by the ledger; less than 0 where the budget was cut
    host_free_bytes: int  # for parking; less than 0 likewise
    need: tuple[str, ...]  # tenants that have to be resident together
    need_bytes: int  # beside them: the peak of the phase
    now: float
    queue: tuple[Ahead, ...] = ()  # in order; the rest of the running requests first
    budget_bytes: int = 0  # of the card; only rules of other servers ask
    driver_free_bytes: int = 0  # as the driver says, late and noisy; likewise

    def needed(self) -> list[Tenant]:
        found = [one for one in self.tenants if one.id in self.need]
        if len(found) != len(set(self.need)):
            unknown = set(self.need) - {one.id for one in found}
            raise KeyError(f"no such tenant: {', '.join(sorted(unknown))}")
        return found


@dataclass(frozen=True, slots=True)
class Move:
    kind: Kind
    tenant: str
    bytes: int  # given back by park, drop, shrink; taken by wake, load


@dataclass(frozen=True, slots=True)
class Plan:
    """moves: in order; everything that makes room is before what takes it."""

    moves: tuple[Move, ...] = ()
    cost_s: float = 0.0  # waited for now, and expected later

    @property
    def victims(self) -> tuple[Move, ...]:
        return tuple(one for one in self.moves if one.kind not in ARRIVALS)


@dataclass(frozen=True, slots=True)
class Refusal:
    need_bytes: int  # of absent tenants and the peak
    free_bytes: int
    reachable_bytes: int  # free with everything taken that may be


Decide = Callable[[State], Plan | Refusal]
NOTHING = Plan()


class _Take(NamedTuple):
    """One way to take one tenant."""

    kind: Kind
    tenant: str
    bytes: int
    host_bytes: int
    cost_s: float


def decide(state: State) -> Plan | Refusal:
    """The cheapest moves after which `need` is resident with `need_bytes` free beside it.

    A pool that may shrink comes back whole where that costs nothing, else at its floor.
    """
    coming = [(one, one.absent_bytes) for one in state.needed() if not one.ready]
    if not coming and state.need_bytes <= state.free_bytes:
        return NOTHING
    wanted = sum(size for _, size in coming) + state.need_bytes
    if wanted > state.free_bytes:
        coming = [(one, one.floor_bytes - one.held_bytes) for one, _ in coming]
        wanted = sum(size for _, size in coming) + state.need_bytes
    arrivals = tuple(arrival(one, size) for one, size in coming)
    arrivals_s = sum(one.back_s for one, _ in coming)
    if wanted <= state.free_bytes:
        return Plan(arrivals, arrivals_s)
    ways = _ways(state)
    reachable = state.free_bytes + sum(max(way.bytes for way in each) for each in ways)
    if wanted > reachable:
        return Refusal(wanted, state.free_bytes, reachable)
    taken = _cheapest(ways, wanted - state.free_bytes, max(0, state.host_free_bytes))
    away = tuple(Move(one.kind, one.tenant, one.bytes) for one in taken)
    return Plan(away + arrivals, arrivals_s + sum(one.cost_s for one in taken))


def arrival(one: Tenant, size_bytes: int) -> Move:
    return Move(Kind.LOAD if one.place is Place.DISK else Kind.WAKE, one.id, size_bytes)


def next_to_wake(state: State) -> Move | None:
    """What to bring while a phase computes, if it fits without taking anything.

    It is the first absent tenant of the queue that leaves room for every phase before the one that
    needs it. Where the queue wants nothing more, it is the parked tenant whose absence would cost
    most, if it leaves room for the whole queue: an idle link costs nothing, and a tenant with a
    copy in host memory is parked again at once.

    need_bytes: the peak of the running phase, which `free_bytes` has left out already.
    """
    room = state.free_bytes
    if room <= 0:
        return None
    absent = {one.id: one for one in _absent(state) if not one.in_use}
    if not absent:
        return None
    for phase in state.queue:
        coming = 0
        for name in phase.tenants:
            if (one := absent.get(name)) is not None:
                if one.absent_bytes <= room:
                    return arrival(one, one.absent_bytes)
                coming += one.absent_bytes
        left = state.free_bytes - coming - max(0, phase.peak_bytes - state.need_bytes)
        room = min(room, left)
        if room <= 0:
            return None
    likely = [
        (chance_of_reuse(one, None, state.now) * PRIORITY_WEIGHT**one.priority * one.wake_s, one.id)
        for one in absent.values()
        if one.place is not Place.DISK and one.absent_bytes <= room
    ]
    if not likely:
        return None
    one = absent[max(likely)[1]]
    return arrival(one, one.absent_bytes)


def ahead_of_time(state: State) -> Plan:
    """The moves of the first phase of the queue that lacks something, where they can be made while
    the running phase computes. They are those that would be made when that phase begins: nothing
    else is taken, nothing that a phase before it needs, and the phases before it still fit.

    need_bytes: as for `next_to_wake`. Empty where it cannot be done, or where nothing is lacking.
    """
    absent = {one.id for one in _absent(state)}
    lacking = (i for i, phase in enumerate(state.queue) if absent.intersection(phase.tenants))
    index = next(lacking, None)
    if index is None or state.queue[index].can_stream:
        return NOTHING
    target, before = state.queue[index], state.queue[:index]
    then_bytes = state.free_bytes + state.need_bytes  # when the running phase is over
    plan = decide(
        replace(
            state, need=target.tenants, need_bytes=target.peak_bytes, free_bytes=then_bytes,
            queue=(*before, *state.queue[index + 1 :]),
        )
    )  # fmt: skip
    if isinstance(plan, Refusal):
        return NOTHING
    gained = sum(-one.bytes if one.kind in ARRIVALS else one.bytes for one in plan.moves)
    most = max((phase.peak_bytes for phase in before), default=0)
    if state.free_bytes + gained < 0 or then_bytes + gained < most:
        return NOTHING
    kept = {name for phase in before for name in phase.tenants}
    moving = {one.id for one in state.tenants if one.in_use and not one.ready}
    if any(one.tenant in kept or one.tenant in moving for one in plan.moves):
        return NOTHING
    return plan


def _absent(state: State) -> list[Tenant]:
    # Not by `ready`: this is asked at every event, and a property costs more than the comparison.
    return [one for one in state.tenants if one.held_bytes < one.floor_bytes]


def chance_of_reuse(one: Tenant, ahead: int | None, now: float) -> float:
    """0 to 1. ahead: how many known phases come before one that needs it; None: none does.

    From history: of the pauses that lasted as long as this one, how many ended within SOON_S.
    """
    if one.keep_until > now or ahead == 0:
        return 1.0
    age = now - one.last_used
    longer = within = 0
    for before, after in pairwise(one.uses):
        if after - before > age:
            longer += 1
            within += after - before <= age + SOON_S
    # Half a pause of each kind is assumed, and the longer it lasts the less of the short one.
    by_history = (within + 0.5 * SOON_S / (SOON_S + max(0.0, age))) / (longer + 1)
    return by_history if ahead is None else max(by_history, CERTAINTY**ahead)


def _ways(state: State) -> list[list[_Take]]:
    """For every tenant that may be taken, the ways to do it; the most bytes come last."""
    ahead: dict[str, int] = {}
    for place, phase in enumerate(state.queue):
        for name in phase.tenants:
            ahead.setdefault(name, place)
    takable = [one for one in state.tenants if one.takable]
    # Where host memory has room for them all, only the cheaper way to take a whole one counts.
    roomy = sum(one.size_bytes for one in takable) <= state.host_free_bytes
    found = []
    for one in takable:
        chance = chance_of_reuse(one, ahead.get(one.id), state.now)
        worth = chance * PRIORITY_WEIGHT**one.priority
        held, size, ways = one.held_bytes, one.size_bytes, []
        spare = held - one.floor_bytes
        if 0 < spare < held:
            back_s = one.wake_s * spare / size
            ways.append(_Take(Kind.SHRINK, one.id, spare, 0, worth * back_s + _tie(spare)))
        if one.id not in state.need and not one.in_use:
            park_s = one.park_s + worth * one.wake_s + _tie(held)
            drop_s = worth * one.load_s + _tie(held)
            if size <= state.host_free_bytes and not (roomy and drop_s < park_s):
                ways.append(_Take(Kind.PARK, one.id, held, size, park_s))
            if not (roomy and park_s <= drop_s):
                ways.append(_Take(Kind.DROP, one.id, held, 0, drop_s))
        if ways:
            found.append(ways)
    return found


def _tie(size_bytes: int) -> float:
    """Seconds, too few to matter, so that of equals fewer are taken, and smaller ones."""
    return 1e-6 + size_bytes * 1e-18


def _cheapest(ways: list[list[_Take]], short_bytes: int, host_bytes: int) -> list[_Take]:
    """Of the sets that free `short_bytes` and park within `host_bytes`, the one that costs least.

    Every cost is above 0, so no member of the cheapest set can be left out. All of `ways` together
    suffice: dropping needs no host memory.
    """
    # By the best price of a byte: what is still short costs at least the price of the next tenant.
    priced = sorted(
        (min(way.cost_s / way.bytes for way in each), each[0].tenant, each) for each in ways
    )
    if len(priced) > EXACT_CANDIDATES:
        return _greedy([each for _, _, each in priced], short_bytes, host_bytes)
    most = [0] * (len(priced) + 1)  # bytes that the tenants from here on can free
    for index in range(len(priced) - 1, -1, -1):
        most[index] = most[index + 1] + max(way.bytes for way in priced[index][2])
    best_s = float("inf")
    best: tuple[_Take, ...] = ()

    def search(index: int, short: int, host: int, cost_s: float, taken: tuple[_Take, ...]) -> None:
        nonlocal best_s, best
        if short <= 0:
            if cost_s < best_s:
                best_s, best = cost_s, taken
            return
        if most[index] < short or cost_s + short * priced[index][0] >= best_s:
            return
        for way in priced[index][2]:
            if way.host_bytes <= host:
                search(
                    index + 1, short - way.bytes, host - way.host_bytes,
                    cost_s + way.cost_s, (*taken, way),
                )  # fmt: skip
        search(index + 1, short, host, cost_s, taken)

    search(0, short_bytes, host_bytes, 0.0, ())
    return list(best)


def _greedy(ways: list[list[_Take]], short_bytes: int, host_bytes: int) -> list[_Take]:
    """In the order given until it suffices; then whatever turns out needless stays, dearest
    first."""
    taken: list[_Take] = []
    for each in ways:
        if short_bytes <= 0:
            break
        most = max(way.bytes for way in each)
        fitting = (way for way in each if way.bytes == most and way.host_bytes <= host_bytes)
        way = min(fitting, key=lambda one: one.cost_s)
        taken.append(way)
        short_bytes -= way.bytes
        host_bytes -= way.host_bytes
    for way in sorted(taken, key=lambda one: -one.cost_s):
        if short_bytes + way.bytes <= 0:
            taken.remove(way)
            short_bytes += way.bytes
    return taken


def cheapest_of(plans: Sequence[tuple[Plan | Refusal, float]]) -> int | None:
    """Which way to run a phase: the index of the plan that costs least together with the seconds
    that its way takes longer; None where all are refusals."""
    costs = [
        (plan.cost_s + longer_s, index)
        for index, (plan, longer_s) in enumerate(plans)
        if isinstance(plan, Plan)
    ]
    return min(costs)[1] if costs else None

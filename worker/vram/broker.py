"""Grants device memory to engines: who waits, who is asked to give way, who is refused.

Machinery only. What to move is `policy.decide`, who is next is `order.next_request`, who holds what
is the `Ledger`. Messages of engines go in, with `now`; messages to engines come out. It has no
socket, no clock and no log, so every course of events can be replayed.

How a phase gets its bytes: an engine asks (`Acquire`) with the ways in which it could run. The
cheapest way is chosen together with what has to go for it; who holds that is asked to give it back
(`Yield`) and says so (`Yielded`); only then are the bytes granted (`Granted`). Until a holder has
said so, or is dead, its bytes are its own, so two processes never hold the same ones.

A standing lease is kept while nobody else needs it, so a model that is resident starts without a
question. Its engine says when it begins and ends to compute (`Use`); asked to yield while it does,
it declines. Somebody who has waited PATIENCE_S for such a lease has it asked to begin nothing new
and to yield then, which bounds the wait by the longest deadline of what runs.

A lease whose work can be paused (a denoise, between two steps) is asked to end early for a more
urgent request that cannot have room otherwise (`Pause`), once it has been held for PAUSE_AFTER_S:
so each grant is worth a stretch of work.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from worker.protocol.messages import (
    Acquire,
    AlsoWaits,
    Brought,
    Declare,
    Granted,
    Message,
    Pause,
    Refused,
    Release,
    TenantSpec,
    Use,
    Way,
    Withdraw,
    Yield,
    Yielded,
)
from worker.vram import policy
from worker.vram.ledger import Lease, Ledger, StaleFence
from worker.vram.order import MAX_HELD_S, MAX_OVERTAKEN, Waiting, next_request, without
from worker.vram.pace import Paces
from worker.vram.policy import Ahead, Decide, Kind, Place, Plan, State

PATIENCE_S = 10.0  # that a lease in use is waited for before it is asked to end
DECLINED_S = 1.0  # that a tenant is left alone after its engine would not give it
GROW_AFTER_S = 2.0  # without a question or a move, before what was shrunk grows back
PAUSE_AFTER_S = 1.0  # that a lease is held, before it may be asked to pause for a more urgent one
KEPT_USES = 16  # of a tenant, for the probability that it is used again soon
KEPT_STORIES = 1000  # requests that can be explained
KEPT_EVENTS = 200  # of each
NEVER_S = 1e9  # seconds to park what cannot be parked: dropping it is always cheaper

Order = tuple[str, Message]  # (holder, what it is told)


@dataclass(slots=True)
class _Tenant:
    spec: TenantSpec
    holder: str
    leaving: int = 0  # bytes that its engine was asked to give back and has not yet
    move: int = 0  # an order to its engine that is not answered yet: nobody is granted it
    last_used: float = float("-inf")
    uses: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_USES))
    back_s: float = 0.0
    alone_until: float = float("-inf")
    taken_for: str = ""  # the request that it went for the last time
    keep_alive_s: float | None = None  # as the last request wished; None: its own


@dataclass(slots=True)
class _Waiter:
    holder: str
    asked: Acquire
    arrived: float
    overtaken: int
    requests: list[str]
    why: str = ""  # the last reason that was written down


@dataclass(slots=True)
class _Granted:
    lease: Lease
    number: int
    requests: list[str]
    phase: str
    busy: bool
    standing: bool
    since: float
    arrivals: dict[str, int]  # bytes of tenants that its engine has to bring
    asked: Acquire
    way: str
    brought_s: float = 0.0
    pause_asked: bool = False


@dataclass(frozen=True, slots=True)
class _Move:
    tenant: str
    kind: str
    bytes: int
    requests: tuple[str, ...]
    began: float


class Broker:
    """Owner of the ledger. Orchestrator thread only."""

    def __init__(self, budget_bytes: int, decide: Decide = policy.decide):
        self.ledger = Ledger(budget_bytes)
        self.counters = dict.fromkeys(
            ("granted", "refused", "withdrawn", "stale", "declined", "parked", "dropped",
             "shrunk", "grown", "brought", "paused", "moved_bytes", "brought_bytes"), 0
        )  # fmt: skip
        self.waited_s = 0.0  # of all grants together
        self.paces = Paces()
        self._decide = decide
        self._epochs: dict[str, int] = {}
        self._last_epoch = 0
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: list[_Waiter] = []
        self._granted: dict[int, _Granted] = {}
        self._moves: dict[int, _Move] = {}
        self._last_move = 0
        self._quiet_since = float("-inf")
        self._untold: list[Order] = []
        self._stories: OrderedDict[str, list[tuple[float, dict[str, Any]]]] = OrderedDict()
        self._takes: dict[type[Message], Callable[[str, Any, float], list[Order]]] = {
            Declare: self._declare,
            Acquire: self._acquire,
            AlsoWaits: self._also_waits,
            Withdraw: self._withdraw,
            Brought: self._brought,
            Use: self._use,
            Release: self._release,
            Yielded: self._yielded,
        }

    # --- what the orchestrator calls -------------------------------------------------------------

    def join(self, holder: str, fixed_bytes: int | None) -> int:
        """A process begins; returns its epoch. What it had before is void.

        fixed_bytes: what it takes for itself before the first tensor, such as a CUDA context;
        None: as much as before.
        """
        if holder in self._epochs:
            self._untold += self.leave(holder, max(self._quiet_since, 0.0))
        if fixed_bytes is not None:
            self.ledger.join(holder, fixed_bytes)
        self._last_epoch += 1
        self._epochs[holder] = self._last_epoch
        return self._last_epoch

    def leave(self, holder: str, now: float) -> list[Order]:
        """A process has ended, and everything it held with it."""
        self._epochs.pop(holder, None)
        gone = {name for name, one in self._tenants.items() if one.holder == holder}
        for lease in self.ledger.leave(holder):
            granted = self._granted.pop(lease.fence)
            self._tell(granted.requests, now, "void", why=f"{holder} has ended")
        for waiter in [one for one in self._waiting if one.holder == holder]:
            self._waiting.remove(waiter)
            self._tell(waiter.requests, now, "void", why=f"{holder} has ended")
        for name in gone:
            del self._tenants[name]
        self._moves = {n: move for n, move in self._moves.items() if move.tenant not in gone}
        return self._serve(now)

    def take(self, holder: str, message: Message, now: float) -> list[Order]:
        """A message of an engine. One of an earlier epoch or with a void fence changes nothing."""
        handler = self._takes.get(type(message))
        if handler is None:
            return self._told()
        try:
            if getattr(message, "epoch", None) != self._epochs.get(holder, 0):
                raise StaleFence(f"{holder} says it from an earlier life")
            return self._told() + handler(holder, message, now)
        except StaleFence:
            self.counters["stale"] += 1
            return self._told()

    def _told(self) -> list[Order]:
        untold, self._untold = self._untold, []
        return untold

    def tick(self, now: float) -> list[Order]:
        """What only time brings: deadlines, the end of patience, growing back."""
        orders = self._told()
        for waiter in list(self._waiting):
            deadline_s = waiter.asked.deadline_s
            if deadline_s is not None and now - waiter.arrived > deadline_s:
                why = f"no device memory came free within {deadline_s:g} s: {self._why(waiter)}"
                orders.append(self._refuse(waiter, why, now))
        orders += self._serve(now)
        if not self._waiting and not self._moves and now - self._quiet_since >= GROW_AFTER_S:
            orders += self._grow(now)
        return orders

    # --- messages --------------------------------------------------------------------------------

    def _declare(self, holder: str, message: Declare, now: float) -> list[Order]:
        named = {spec.id for spec in message.tenants}
        for name in [
            name
            for name, one in self._tenants.items()
            if one.holder == holder and one.spec.model == message.model and name not in named
        ]:
            for granted in [g for g in self._granted.values() if name in g.lease.tenants]:
                self._close(granted)
            self.ledger.hold(name, holder, 0)
            del self._tenants[name]
            self._moves = {n: move for n, move in self._moves.items() if move.tenant != name}
        for spec in message.tenants:
            known = self._tenants.get(spec.id)
            if known is None:
                self._tenants[spec.id] = _Tenant(spec, holder, back_s=spec.back_s)
            elif known.holder == holder:
                known.spec = spec
        orders = [
            self._refuse(waiter, f"{message.model} has been unloaded", now)
            for waiter in list(self._waiting)
            if not all(name in self._tenants for way in waiter.asked.ways for name in way.tenants)
        ]
        return orders + self._serve(now)

    def _acquire(self, holder: str, message: Acquire, now: float) -> list[Order]:
        waiter = _Waiter(holder, message, now, 0, [message.request_id])
        unknown = sorted(
            {name for way in message.ways for name in way.tenants if not self._owns(holder, name)}
        )
        if unknown or not message.ways:
            what = ", ".join(unknown) or "a phase without a way to run it"
            return [self._refuse(waiter, f"not declared: {what}", now)]
        if message.standing and any(way.peak_bytes for way in message.ways):
            why = "a standing lease is of tenants, which can be asked back; a peak cannot"
            return [self._refuse(waiter, why, now)]
        self._waiting.append(waiter)
        self._quiet_since = now
        absent = {
            name: self._tenants[name].taken_for
            for name in message.ways[0].tenants
            if self.ledger.held(name) < self._tenants[name].spec.floor_bytes
        }
        self._tell(
            waiter.requests, now, "asked", phase=message.phase, absent=[*absent],
            taken_before_for=sorted({one for one in absent.values() if one}),
            peak_bytes=message.ways[0].peak_bytes,
        )  # fmt: skip
        orders = self._serve(now)
        if message.free_only and waiter in self._waiting:
            orders.append(self._refuse(waiter, "others wait for room", now))
        return orders

    def _also_waits(self, holder: str, message: AlsoWaits, now: float) -> list[Order]:
        groups = [
            *(w.requests for w in self._waiting
              if w.holder == holder and w.asked.number == message.number),
            *(g.requests for g in self._granted.values()
              if g.lease.holder == holder and g.number == message.number),
        ]  # fmt: skip
        for requests in groups:
            story = list(self._stories.get(requests[0], []))
            requests.append(message.request_id)
            own = self._story(message.request_id)
            own[:] = sorted([*story, *own], key=lambda event: event[0])[:KEPT_EVENTS]
        return []

    def _withdraw(self, holder: str, message: Withdraw, now: float) -> list[Order]:
        for waiter in list(self._waiting):
            if waiter.holder == holder and waiter.asked.number == message.number:
                self._waiting.remove(waiter)
                self.counters["withdrawn"] += 1
                self._tell(waiter.requests, now, "withdrawn")
                answer = Refused(number=message.number, error="withdrawn")
                return [(holder, answer), *self._serve(now)]
        return []  # it has been answered, and the engine gives a grant back when it comes

    def _brought(self, holder: str, message: Brought, now: float) -> list[Order]:
        lease = self.ledger.lease(message.fence, holder)
        if message.tenant not in lease.tenants:
            raise StaleFence(f"{message.tenant} is not of lease {message.fence}")
        tenant = self._tenants[message.tenant]
        granted = self._granted[message.fence]
        granted.brought_s += message.seconds
        if not message.held_bytes:
            self._not_brought(granted, message.tenant)
        else:
            before = self.ledger.held(message.tenant)
            self.ledger.hold(message.tenant, holder, min(message.held_bytes, before))
            for one in self._granted.values():
                one.arrivals.pop(message.tenant, None)
            if message.seconds > 0:  # else it was there already
                tenant.back_s = message.seconds
            self.counters["brought"] += 1
            self.counters["brought_bytes"] += message.held_bytes
        self._tell(
            self._granted[message.fence].requests, now, "brought", tenant=message.tenant,
            bytes=message.held_bytes, seconds=round(message.seconds, 4),
        )  # fmt: skip
        return self._serve(now)

    def _use(self, holder: str, message: Use, now: float) -> list[Order]:
        lease = self.ledger.lease(message.fence, holder)
        self._granted[message.fence].busy = message.busy
        self._used(lease.tenants, now, begins=message.busy, keep_alive_s=message.keep_alive_s)
        return [] if message.busy else self._serve(now)

    def _release(self, holder: str, message: Release, now: float) -> list[Order]:
        lease = self.ledger.lease(message.fence, holder)
        granted = self._granted[message.fence]
        self._used(lease.tenants, now, begins=False, keep_alive_s=message.keep_alive_s)
        self._close(granted)
        asked = granted.asked
        took_s = now - granted.since - granted.brought_s
        if message.done and granted.way == "whole":
            self.paces.learn(asked.model, asked.phase, asked.pixels, asked.work, took_s)
        self._tell(
            granted.requests, now, "released", phase=granted.phase,
            seconds=round(now - granted.since, 4),
        )  # fmt: skip
        return self._serve(now)

    def _yielded(self, holder: str, message: Yielded, now: float) -> list[Order]:
        tenant = self._tenants.get(message.tenant)
        if message.move == 0 and tenant is not None and tenant.holder == holder:
            return self._gave_by_itself(tenant, message, now)
        move = self._moves.get(message.move)
        if (
            move is None
            or tenant is None
            or move.tenant != message.tenant
            or tenant.holder != holder
        ):
            raise StaleFence(f"move {message.move} is not under way")
        del self._moves[message.move]
        tenant.leaving = tenant.move = 0
        self._quiet_since = now
        before = self.ledger.held(message.tenant)
        held = min(message.held_bytes, before)
        self.ledger.hold(message.tenant, holder, held)
        if move.kind == "grow":
            self.counters["grown"] += 1
            self._end_leases_without(tenant)
        elif held == before:
            tenant.alone_until = now + DECLINED_S
            self.counters["declined"] += 1
        else:
            past = {"park": "parked", "drop": "dropped", "shrink": "shrunk"}[move.kind]
            self.counters[past] += 1
            self.counters["moved_bytes"] += before - held
            tenant.taken_for = move.requests[0] if move.requests else ""
            self._tell(
                move.requests, now, past, tenant=message.tenant, holder=holder,
                bytes=before - held, seconds=round(message.seconds, 4),
                waited_for_it_s=round(now - move.began, 4),
            )  # fmt: skip
            self._end_leases_without(tenant)
        return self._serve(now)

    def _gave_by_itself(self, tenant: _Tenant, message: Yielded, now: float) -> list[Order]:
        """What an engine gives back without being asked: by hand, or because another part went."""
        if tenant.move and self._moves[tenant.move].kind == "grow":
            return []  # it answers the order to grow, which it had not seen, next
        # What it is still to bring was granted before it said this, and stays granted.
        arriving = self.arriving_bytes(message.tenant)
        there = self.ledger.held(message.tenant) - arriving
        kept = min(message.held_bytes, there) + arriving
        self.ledger.hold(message.tenant, tenant.holder, kept)
        tenant.leaving = min(tenant.leaving, kept)  # an order that is under way is answered, too
        self._end_leases_without(tenant)
        return self._serve(now)

    def _end_leases_without(self, tenant: _Tenant) -> None:
        name = tenant.spec.id
        if self.ledger.held(name) < tenant.spec.floor_bytes:
            for granted in [g for g in self._granted.values() if name in g.lease.tenants]:
                self._close(granted)

    # --- decisions -------------------------------------------------------------------------------

    def _serve(self, now: float) -> list[Order]:
        """Grant to whoever is next, until one has to wait. It keeps its place."""
        orders: list[Order] = []
        while self._waiting:
            ready = frozenset(
                name
                for name, one in self._tenants.items()
                if self.ledger.held(name) >= one.spec.floor_bytes and not one.move
            )
            queue = [self._in_queue(n, waiter) for n, waiter in enumerate(self._waiting)]
            index = next_request(queue, ready, now)
            waiter = self._waiting[index]
            outcome = self._try(waiter, now)
            orders += outcome
            if waiter in self._waiting and not _ends(outcome):
                for other in self._waiting:
                    if other is not waiter and not other.why:
                        self._note_wait(other, now)
                break
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                for left, moved in zip(self._waiting, without(queue, index), strict=True):
                    left.overtaken = moved.overtaken
        return orders

    def _in_queue(self, number: int, waiter: _Waiter) -> Waiting:
        return Waiting(
            id=number,
            arrived=waiter.arrived,
            models=frozenset(waiter.asked.ways[0].tenants),
            priority=waiter.asked.priority,
            overtaken=waiter.overtaken,
        )

    def _try(self, waiter: _Waiter, now: float) -> list[Order]:
        """Grant, refuse, or ask others to make room."""
        ways = waiter.asked.ways
        due = waiter.overtaken >= MAX_OVERTAKEN or now - waiter.arrived >= MAX_HELD_S
        patient = not due and now - waiter.arrived < PATIENCE_S
        chosen = self._choose(waiter, now, patient=True)
        if chosen is None and not patient:
            chosen = self._choose(waiter, now, patient=False)
        if chosen is None:
            if waiter.asked.free_only:
                return [self._refuse(waiter, "there is no room for it now", now)]
            if (why := self._impossible(waiter, now)) is not None:
                return [self._refuse(waiter, why, now)]
            self._note_wait(waiter, now)
            return self._ask_to_pause(waiter, now)
        index, plan = chosen
        way = ways[index]
        if waiter.asked.free_only and plan.victims:
            return [self._refuse(waiter, "something would have to move for it", now)]
        orders = [self._ask_away(waiter, move, now) for move in plan.victims]
        arrivals = {m.tenant: m.bytes for m in plan.moves if m.kind in policy.ARRIVALS}
        if sum(arrivals.values()) + way.peak_bytes > self.ledger.free_bytes or any(
            self._tenants[name].move for name in way.tenants
        ):
            return orders  # what was asked away comes back by `Yielded`
        assert not orders, "what is taken away is not free before it is given back"
        return [self._grant(waiter, index, arrivals, now)]

    def _choose(self, waiter: _Waiter, now: float, *, patient: bool) -> tuple[int, Plan] | None:
        """The way that costs least, and its moves; None where no way can be had now."""
        plans = [
            (self._decide(self._state(waiter, way, now, patient=patient)), way.longer_s)
            for way in waiter.asked.ways
        ]
        index = policy.cheapest_of(plans)
        if index is None:
            return None
        plan = plans[index][0]
        assert isinstance(plan, Plan)
        return index, plan

    def _settling(self) -> set[str]:
        """Tenants of leases whose engines still bring something: they stay as they were granted."""
        return {
            name
            for granted in self._granted.values()
            if granted.arrivals
            for name in granted.lease.tenants
        }

    def _state(self, waiter: _Waiter, way: Way, now: float, *, patient: bool) -> State:
        used, settling = self._in_use(patient=patient), self._settling()
        tenants = tuple(
            self._as_policy_sees(
                name, one, name in used, fixed=name in settling or now < one.alone_until
            )
            for name, one in self._tenants.items()
        )
        others = (one for one in self._waiting if one is not waiter)
        return State(
            tenants=tenants,
            free_bytes=self.ledger.free_bytes + sum(one.leaving for one in self._tenants.values()),
            host_free_bytes=1 << 62,  # host copies were counted when they were made
            need=way.tenants,
            need_bytes=way.peak_bytes,
            now=now,
            queue=tuple(
                Ahead(one.asked.ways[0].tenants, one.asked.ways[0].peak_bytes) for one in others
            ),
            budget_bytes=self.ledger.budget_bytes,
        )

    def _as_policy_sees(self, name: str, one: _Tenant, used: bool, *, fixed: bool) -> policy.Tenant:
        """used: it computes, and only what it has above its floor may go. fixed: nothing may."""
        fixed = fixed or one.move > 0
        spec = one.spec
        held = self.ledger.held(name) - one.leaving
        place = Place.DEVICE if held else Place.HOST if spec.host_copy else Place.DISK
        return policy.Tenant(
            id=name,
            model=spec.model,
            size_bytes=spec.size_bytes,
            place=place,
            held_bytes=held,
            floor_bytes=spec.floor_bytes,
            in_use=used or fixed,
            shrinks_in_use=used and not fixed,
            pinned=spec.pinned,
            priority=spec.priority,
            keep_until=one.last_used
            + (spec.keep_alive_s if one.keep_alive_s is None else one.keep_alive_s),
            last_used=one.last_used,
            uses=tuple(one.uses),
            park_s=0.0 if spec.host_copy else NEVER_S,
            wake_s=one.back_s,
            load_s=one.back_s + (NEVER_S if spec.host_copy else 0.0),
        )

    def _in_use(self, *, patient: bool) -> set[str]:
        """Tenants that are not to be taken now. Without patience a standing lease is asked to end,
        so only what ends by itself is left alone."""
        return {
            name
            for granted in self._granted.values()
            if granted.busy and (patient or not granted.standing)
            for name in granted.lease.tenants
        }

    def _impossible(self, waiter: _Waiter, now: float) -> str | None:
        """Why it could not be granted even if everything ended that runs; None where it could."""
        idle = self.ledger.free_bytes + sum(g.lease.peak_bytes for g in self._granted.values())
        idle += sum(one.leaving for one in self._tenants.values())
        refusals = []
        for way in waiter.asked.ways:
            state = State(
                tenants=tuple(
                    replace(self._as_policy_sees(name, one, used=False, fixed=False), in_use=False)
                    for name, one in self._tenants.items()
                ),
                free_bytes=idle, host_free_bytes=1 << 62, need=way.tenants,
                need_bytes=way.peak_bytes, now=now,
            )  # fmt: skip
            outcome = self._decide(state)
            if isinstance(outcome, Plan):
                return None
            refusals.append((way, outcome))
        way, least = min(refusals, key=lambda one: one[1].need_bytes - one[1].reachable_bytes)
        pinned = sorted(name for name, one in self._tenants.items() if one.spec.pinned)
        return (
            f"{waiter.asked.phase} ({way.name}) needs {_gib(least.need_bytes)} more, and "
            f"{_gib(max(0, least.reachable_bytes))} of {_gib(self.ledger.budget_bytes)} are "
            "reachable with everything moved that may be"
            + (f"; pinned: {', '.join(pinned)}" if pinned else "")
        )

    def _ask_to_pause(self, waiter: _Waiter, now: float) -> list[Order]:
        """Ask the least urgent work that can be paused to end after its step, for somebody more
        urgent who cannot have room otherwise. It comes back into the queue by itself."""
        pausable = [
            granted
            for granted in self._granted.values()
            if granted.asked.pausable
            and granted.asked.priority < waiter.asked.priority
            and now - granted.since >= PAUSE_AFTER_S
        ]
        if not pausable or any(granted.pause_asked for granted in pausable):
            return []
        granted = min(pausable, key=lambda one: (one.asked.priority, -one.lease.fence))
        granted.pause_asked = True
        self.counters["paused"] += 1
        self._tell(waiter.requests, now, "asked to pause", phase=granted.phase,
                   of=granted.requests[0])  # fmt: skip
        self._tell(granted.requests, now, "asked to pause", for_request=waiter.requests[0])
        return [(granted.lease.holder, Pause(fence=granted.lease.fence))]

    def _ask_away(self, waiter: _Waiter, move: policy.Move, now: float) -> Order:
        tenant = self._tenants[move.tenant]
        self._last_move += 1
        kind = {Kind.PARK: "park", Kind.DROP: "drop", Kind.SHRINK: "shrink"}[move.kind]
        in_use = move.tenant in self._in_use(patient=True)
        tenant.leaving, tenant.move = move.bytes, self._last_move
        self._moves[self._last_move] = _Move(
            move.tenant, kind, move.bytes, tuple(waiter.requests), now
        )
        self._tell(
            waiter.requests, now, f"asked to {kind}", tenant=move.tenant, holder=tenant.holder,
            bytes=move.bytes, in_use=in_use,
        )  # fmt: skip
        return tenant.holder, Yield(
            move=self._last_move,
            tenant=move.tenant,
            kind=kind,
            held_bytes=self.ledger.held(move.tenant) - move.bytes,
            wait=in_use,
        )

    def _grant(self, waiter: _Waiter, index: int, arrivals: dict[str, int], now: float) -> Order:
        way = waiter.asked.ways[index]
        for name, size in arrivals.items():
            self.ledger.hold(name, waiter.holder, self.ledger.held(name) + size)
        lease = self.ledger.open(waiter.holder, way.tenants, way.peak_bytes)
        self._granted[lease.fence] = _Granted(
            lease, waiter.asked.number, waiter.requests, waiter.asked.phase, True,
            waiter.asked.standing, now, arrivals, waiter.asked,
            way.name,
        )  # fmt: skip
        self._used(way.tenants, now, begins=True)
        self._quiet_since = now
        self.counters["granted"] += 1
        self.waited_s += now - waiter.arrived
        self._tell(
            waiter.requests, now, "granted", phase=waiter.asked.phase, way=way.name,
            exactness=way.exactness, waited_s=round(now - waiter.arrived, 4), to_bring=[*arrivals],
        )  # fmt: skip
        return waiter.holder, Granted(
            number=waiter.asked.number,
            fence=lease.fence,
            way=index,
            held_bytes={name: self.ledger.held(name) for name in way.tenants},
        )

    def _refuse(self, waiter: _Waiter, why: str, now: float) -> Order:
        if waiter in self._waiting:
            self._waiting.remove(waiter)
        self.counters["refused"] += 1
        self._tell(waiter.requests, now, "refused", why=why)
        return waiter.holder, Refused(number=waiter.asked.number, error=why)

    def _note_wait(self, waiter: _Waiter, now: float) -> None:
        why = self._why(waiter)
        if why != waiter.why:
            waiter.why = why
            self._tell(waiter.requests, now, "waits", why=why)

    def _why(self, waiter: _Waiter) -> str:
        busy = sorted(
            f"{granted.phase} of {granted.requests[0]}"
            for granted in self._granted.values()
            if granted.busy
        )
        before = [one for one in self._waiting if one is not waiter]
        free = self.ledger.free_bytes
        return f"{_gib(max(0, free))} are free; in use by {', '.join(busy) or 'nobody'}" + (
            f"; {len(before)} others wait" if before else ""
        )

    def _grow(self, now: float) -> list[Order]:
        """Give a pool back what was taken from it, where nobody else wants it."""
        settling = self._settling()
        for name, one in self._tenants.items():
            held = self.ledger.held(name)
            missing = one.spec.size_bytes - held
            if (
                one.move
                or name in settling
                or not one.spec.floor_bytes <= held < one.spec.size_bytes
            ):
                continue
            if missing <= self.ledger.free_bytes:
                self.ledger.hold(name, one.holder, one.spec.size_bytes)
                self._last_move += 1
                one.move = self._last_move
                self._moves[self._last_move] = _Move(name, "grow", missing, (), now)
                grow = Yield(
                    move=self._last_move, tenant=name, kind="grow",
                    held_bytes=one.spec.size_bytes,
                )  # fmt: skip
                return [(one.holder, grow)]
        return []

    # --- reports ---------------------------------------------------------------------------------

    def explain(self, request_id: str) -> list[dict[str, Any]] | None:
        """What happened to the memory of a request, in order; t_s from its first event."""
        story = self._stories.get(request_id)
        if not story:
            return None
        began = story[0][0]
        return [{"t_s": round(at - began, 4), **event} for at, event in story]

    def tenants(self) -> list[dict[str, Any]]:
        used = self._in_use(patient=True)
        return [
            {
                "tenant": name, "model": one.spec.model, "holder": one.holder,
                "size_bytes": one.spec.size_bytes, "held_bytes": self.ledger.held(name),
                "in_use": name in used, "pinned": one.spec.pinned, "leaving_bytes": one.leaving,
                "taken_for": one.taken_for,
            }
            for name, one in self._tenants.items()
        ]  # fmt: skip

    def leases(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "fence": fence, "holder": one.lease.holder, "phase": one.phase,
                "request_id": one.requests[0], "peak_bytes": one.lease.peak_bytes,
                "busy": one.busy, "standing": one.standing, "age_s": round(now - one.since, 3),
            }
            for fence, one in self._granted.items()
        ]  # fmt: skip

    def waiting(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "holder": one.holder, "phase": one.asked.phase, "request_id": one.requests[0],
                "waited_s": round(now - one.arrived, 3), "why": one.why,
            }
            for one in self._waiting
        ]  # fmt: skip

    def playable(self) -> Broker:
        """A copy to play with; without the stories, which are long."""
        stories, self._stories = self._stories, OrderedDict()
        try:
            return deepcopy(self)
        finally:
            self._stories = stories

    def knows(self, holder: str) -> bool:
        return holder in self._epochs

    def epoch(self, holder: str) -> int:
        return self._epochs[holder]

    def has(self, tenant: str) -> bool:
        return tenant in self._tenants

    def arriving_bytes(self, tenant: str) -> int:
        """That were granted and are not there yet."""
        return sum(granted.arrivals.get(tenant, 0) for granted in self._granted.values())

    def back_s(self, tenant: str) -> float:
        """Seconds until a tenant that is away is there again."""
        return self._tenants[tenant].back_s

    def finish_all(self) -> None:
        """As if everything that runs or moves had come to its end, and nobody waited. For copies
        that are only asked questions."""
        self._waiting.clear()
        for move in list(self._moves.values()):
            tenant = self._tenants[move.tenant]
            left = self.ledger.held(move.tenant) - tenant.leaving
            self.ledger.hold(move.tenant, tenant.holder, left)
            tenant.leaving = 0
            self._end_leases_without(tenant)
        self._moves.clear()
        for tenant in self._tenants.values():
            tenant.move = 0
            tenant.alone_until = float("-inf")
        for granted in list(self._granted.values()):
            granted.busy = False
            granted.arrivals.clear()
            if not granted.standing:
                self._close(granted)

    def is_quiet(self, holder: str) -> bool:
        """Nothing of this process computes or moves: what it holds is what it was granted."""
        return not any(
            one.busy for one in self._granted.values() if one.lease.holder == holder
        ) and not any(
            one.move or self.arriving_bytes(name)
            for name, one in self._tenants.items()
            if one.holder == holder
        )

    def check(self) -> None:
        """What must hold between two messages. AssertionError says what does not."""
        assert self.ledger.free_bytes >= 0 or not (self._granted or self._tenants), "over-commit"
        assert {one.fence for one in self.ledger.leases} == set(self._granted), "leases disagree"
        moving = {one.move: name for name, one in self._tenants.items() if one.move}
        asked = {number: move.tenant for number, move in self._moves.items()}
        assert moving == asked, "orders and tenants that move disagree"
        assert all(one.move for one in self._tenants.values() if one.leaving), "nobody asked it"
        assert all(self.ledger.held(name) >= 0 for name in self._tenants), "less than nothing"

    # --- small things ----------------------------------------------------------------------------

    def _owns(self, holder: str, name: str) -> bool:
        return name in self._tenants and self._tenants[name].holder == holder

    def _used(
        self, names: Iterable[str], now: float, *, begins: bool, keep_alive_s: float | None = None
    ) -> None:
        for name in names:
            if (one := self._tenants.get(name)) is not None:
                one.last_used = now
                one.keep_alive_s = keep_alive_s
                if begins:
                    one.uses.append(now)

    def _close(self, granted: _Granted) -> None:
        self.ledger.close(granted.lease.fence)
        del self._granted[granted.lease.fence]
        for name in list(granted.arrivals):
            self._not_brought(granted, name)

    def _not_brought(self, granted: _Granted, name: str) -> None:
        """What a lease was to bring and did not. Another lease that relies on it is to, then."""
        size = granted.arrivals.pop(name, 0)
        tenant = self._tenants[name]
        for other in self._granted.values():
            if other is not granted and name in other.lease.tenants:
                other.arrivals[name] = other.arrivals.get(name, 0) + size
                return
        self.ledger.hold(name, tenant.holder, self.ledger.held(name) - size)

    def _story(self, request_id: str) -> list[tuple[float, dict[str, Any]]]:
        story = self._stories.setdefault(request_id, [])
        self._stories.move_to_end(request_id)
        while len(self._stories) > KEPT_STORIES:
            self._stories.popitem(last=False)
        return story

    def _tell(self, requests: Sequence[str], now: float, what: str, **facts: Any) -> None:
        for request_id in requests:
            story = self._story(request_id)
            if len(story) < KEPT_EVENTS:
                story.append((now, {"what": what, **facts}))


def _ends(orders: Sequence[Order]) -> bool:
    return any(isinstance(message, Granted | Refused) for _, message in orders)


def _gib(size_bytes: int) -> str:
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.2f} GiB"
    return f"{size_bytes / (1 << 20):.1f} MiB"

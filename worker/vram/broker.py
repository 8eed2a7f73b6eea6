"""Grants device memory to engines: who waits, who is asked to give way, who is refused.

Machinery only. What to move is `policy.decide`, who is next is `order.next_request`, who holds what
is the `Ledger`; what is kept beside that lies in worker/vram/lending. Messages of engines go in,
with `now`; messages to engines come out. It has no socket, no clock and no log, so every course of
events can be replayed.

How a phase gets its bytes: an engine asks (`Acquire`) with the ways in which it could run. The
cheapest way is chosen together with what has to go for it; who holds that is asked to give it back
(`Yield`) and says so (`Yielded`); only then are the bytes granted (`Granted`). Until a holder has
said so, or is dead, its bytes are its own, so two processes never hold the same ones.

A standing lease is kept while nobody else needs it, so a model that is resident starts without a
question. Its engine says when it begins and ends to compute (`Use`); asked to yield while it does,
it declines. Somebody who has waited PATIENCE_S for such a lease has it asked to begin nothing new
and to yield then, which bounds the wait by the longest deadline of what runs.

Who has given up takes his question back (`Withdraw`): only his engine knows until when somebody
wants the answer. Where nobody waits any more, what was to yield when its work has ended is told
that it may stay (`Stay`).

A pool that was shrunk grows back when it is quiet, or at once for a request that it is too small
for: its engine asks with the bytes that it needs at the least (`Acquire.least_bytes`), and waits
in the queue like everybody.

A lease whose work can be paused (a denoise, between two steps) is asked to end early for a more
urgent request that cannot have room otherwise (`Pause`), once it has been held for PAUSE_AFTER_S:
so each grant is worth a stretch of work.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from worker.protocol.messages import (
    Acquire,
    AlsoWaits,
    Brought,
    Declare,
    Message,
    Refused,
    Release,
    Took,
    Use,
    Withdraw,
    Yielded,
)
from worker.vram import policy
from worker.vram.ledger import Ledger, StaleFence
from worker.vram.lending.books import Books
from worker.vram.lending.choices import Choices
from worker.vram.lending.service import Order as Order
from worker.vram.lending.service import Service
from worker.vram.lending.stories import Stories
from worker.vram.lending.tenants import Tenant
from worker.vram.lending.waiters import Waiter
from worker.vram.pace import Paces
from worker.vram.policy import Decide

DECLINED_S = 1.0  # that a tenant is left alone after its engine would not give it
PAST = {"park": "parked", "drop": "dropped", "shrink": "shrunk"}


class Broker:
    """Owner of the ledger and of all that is kept beside it. Orchestrator thread only."""

    def __init__(self, budget_bytes: int, decide: Decide = policy.decide):
        self._books = Books(budget_bytes)
        self._tenants, self._waiters = self._books.tenants, self._books.waiters
        self._grants, self._moves = self._books.grants, self._books.moves
        self._service = Service(self._books, Choices(decide, self._books))
        self.paces = Paces()
        self._epochs: dict[str, int] = {}
        self._last_epoch = 0
        self._untold: list[Order] = []
        self._takes: dict[type[Message], Callable[[str, Any, float], list[Order]]] = {
            Declare: self._declare,
            Acquire: self._acquire,
            AlsoWaits: self._also_waits,
            Withdraw: self._withdraw,
            Brought: self._brought,
            Use: self._use,
            Release: self._release,
            Took: self._took,
            Yielded: self._yielded,
        }

    @property
    def ledger(self) -> Ledger:
        return self._books.ledger

    @property
    def counters(self) -> dict[str, int]:
        return self._books.counters

    @property
    def waited_s(self) -> float:
        """Of all grants together."""
        return self._books.waited_s

    # --- what the orchestrator calls -------------------------------------------------------------

    def join(self, holder: str, fixed_bytes: int | None) -> int:
        """A process begins; returns its epoch. What it had before is void.

        fixed_bytes: what it takes for itself before the first tensor, such as a CUDA context;
        None: as much as before.
        """
        if holder in self._epochs:
            self._untold += self.leave(holder, max(self._books.quiet_since, 0.0))
        if fixed_bytes is not None:
            self.ledger.join(holder, fixed_bytes)
        self._last_epoch += 1
        self._epochs[holder] = self._last_epoch
        return self._last_epoch

    def leave(self, holder: str, now: float) -> list[Order]:
        """A process has ended, and everything it held with it."""
        self._epochs.pop(holder, None)
        for grant in self._grants.void_of(holder):
            self._books.stories.tell(grant.requests, now, "void", why=f"{holder} has ended")
        for waiter in self._waiters:
            if waiter.holder == holder:
                self._waiters.remove(waiter)
                self._books.stories.tell(waiter.requests, now, "void", why=f"{holder} has ended")
        gone = self._tenants.of(holder)
        for name in gone:
            del self._tenants[name]
        self._moves.forget(gone)
        return self._service.serve(now)

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

    def tick(self, now: float) -> list[Order]:
        """What only time brings: the end of patience, and growing back."""
        return self._told() + self._service.serve(now) + self._service.grow(now)

    def _told(self) -> list[Order]:
        untold, self._untold = self._untold, []
        return untold

    # --- messages --------------------------------------------------------------------------------

    def _declare(self, holder: str, message: Declare, now: float) -> list[Order]:
        named = {spec.id for spec in message.tenants}
        for name in self._tenants.of(holder):
            if self._tenants[name].spec.model == message.model and name not in named:
                self._grants.close_with(name)
                self.ledger.hold(name, holder, 0)
                del self._tenants[name]
                self._moves.forget([name])
        self._tenants.declare(holder, message.tenants)
        orders = [
            self._service.refuse(waiter, f"{message.model} has been unloaded", now)
            for waiter in self._waiters
            if not all(name in self._tenants for way in waiter.asked.ways for name in way.tenants)
        ]
        return orders + self._service.serve(now)

    def _acquire(self, holder: str, message: Acquire, now: float) -> list[Order]:
        waiter = Waiter(holder, message, now, [message.request_id])
        named = {name for way in message.ways for name in way.tenants}
        unknown = sorted(name for name in named if not self._tenants.owns(holder, name))
        if unknown or not message.ways:
            what = ", ".join(unknown) or "a phase without a way to run it"
            return [self._service.refuse(waiter, f"not declared: {what}", now)]
        if message.standing and any(way.peak_bytes for way in message.ways):
            why = "a standing lease is of tenants, which can be asked back; a peak cannot"
            return [self._service.refuse(waiter, why, now)]
        for name, least in message.least_bytes.items():
            if name not in named or least > self._tenants[name].spec.size_bytes:
                why = f"{least} bytes of {name}, which has less or is not asked for"
                return [self._service.refuse(waiter, why, now)]
        self._waiters.add(waiter)
        self._books.quiet_since = now
        absent = {
            name: self._tenants[name].taken_for
            for name in message.ways[0].tenants
            if self.ledger.held(name)
            < max(self._tenants[name].spec.floor_bytes, message.least_bytes.get(name, 0))
        }
        self._books.stories.tell(
            waiter.requests, now, "asked", phase=message.phase, absent=[*absent],
            taken_before_for=sorted({one for one in absent.values() if one}),
            peak_bytes=message.ways[0].peak_bytes,
        )  # fmt: skip
        orders = self._service.serve(now)
        if message.free_only and waiter in self._waiters:
            orders.append(self._service.refuse(waiter, "others wait for room", now))
        return orders

    def _also_waits(self, holder: str, message: AlsoWaits, now: float) -> list[Order]:
        for asker in (
            self._waiters.find(holder, message.number),
            self._grants.numbered(holder, message.number),
        ):
            if asker is not None:
                self._books.stories.join(message.request_id, asker.requests[0])
                asker.requests.append(message.request_id)
        return []

    def _withdraw(self, holder: str, message: Withdraw, now: float) -> list[Order]:
        waiter = self._waiters.find(holder, message.number)
        if waiter is None:
            return []  # it has been answered, and the engine gives a grant back when it comes
        self._waiters.remove(waiter)
        self.counters["withdrawn"] += 1
        self._books.stories.tell(waiter.requests, now, "withdrawn")
        answer = Refused(number=message.number, error="withdrawn")
        return [(holder, answer), *self._service.serve(now)]

    def _brought(self, holder: str, message: Brought, now: float) -> list[Order]:
        grant = self._grants.find(message.fence, holder)
        if message.tenant not in grant.lease.tenants:
            raise StaleFence(f"{message.tenant} is not of lease {message.fence}")
        grant.brought_s += message.seconds
        self._grants.brought(grant, message.tenant, message.held_bytes)
        if message.held_bytes:
            if message.seconds > 0:  # else it was there already
                self._tenants[message.tenant].back_s = message.seconds
            self.counters["brought"] += 1
            self.counters["brought_bytes"] += message.held_bytes
        self._books.stories.tell(
            grant.requests, now, "brought", tenant=message.tenant,
            bytes=message.held_bytes, seconds=round(message.seconds, 4),
        )  # fmt: skip
        return self._service.serve(now)

    def _use(self, holder: str, message: Use, now: float) -> list[Order]:
        grant = self._grants.find(message.fence, holder)
        grant.busy = message.busy
        self._tenants.used(
            grant.lease.tenants, now, begins=message.busy, keep_alive_s=message.keep_alive_s
        )
        return [] if message.busy else self._service.serve(now)

    def _release(self, holder: str, message: Release, now: float) -> list[Order]:
        grant = self._grants.find(message.fence, holder)
        self._tenants.used(
            grant.lease.tenants, now, begins=False, keep_alive_s=message.keep_alive_s
        )
        self._grants.close(grant)
        asked, held_s = grant.asked, now - grant.since
        if message.done:
            way = next(one for one in asked.ways if one.name == grant.way)
            took_s = held_s - grant.brought_s - way.longer_s
            self.paces.learn(asked.model, asked.phase, asked.pixels, asked.work, took_s, way.name)
        self._books.stories.tell(
            grant.requests, now, "released", phase=asked.phase, seconds=round(held_s, 4)
        )
        return self._service.serve(now)

    def _took(self, _: str, message: Took, now: float) -> list[Order]:
        self.paces.learn(
            message.model, message.phase, message.pixels, message.work, message.seconds
        )
        return []

    def _yielded(self, holder: str, message: Yielded, now: float) -> list[Order]:
        name = message.tenant
        if message.move == 0 and self._tenants.owns(holder, name):
            return self._gave_by_itself(self._tenants[name], message, now)
        move = self._moves.answered(message.move, name, holder)
        tenant = self._tenants[name]
        self._books.quiet_since = now
        before = self.ledger.held(name)
        held = min(message.held_bytes, before)
        self.ledger.hold(name, holder, held)
        if move.kind == "grow":
            self.counters["grown"] += 1
            self._grants.close_without_floor(name)
        elif held == before:
            if not move.may_stay:
                tenant.alone_until = now + DECLINED_S
                self.counters["declined"] += 1
        else:
            self.counters[PAST[move.kind]] += 1
            self.counters["moved_bytes"] += before - held
            tenant.taken_for = move.requests[0] if move.requests else ""
            self._books.stories.tell(
                move.requests, now, PAST[move.kind], tenant=name, holder=holder,
                bytes=before - held, seconds=round(message.seconds, 4),
                waited_for_it_s=round(now - move.began, 4),
            )  # fmt: skip
            self._grants.close_without_floor(name)
        return self._service.serve(now)

    def _gave_by_itself(self, tenant: Tenant, message: Yielded, now: float) -> list[Order]:
        """What an engine gives back without being asked: by hand, or because another part went."""
        name = message.tenant
        if self._moves.grows(name):
            return []  # it answers the order to grow, which it had not seen, next
        # What it is still to bring was granted before it said this, and stays granted.
        arriving = self._grants.arriving_bytes(name)
        kept = min(message.held_bytes, self.ledger.held(name) - arriving) + arriving
        self.ledger.hold(name, tenant.holder, kept)
        tenant.leaving = min(tenant.leaving, kept)  # an order that is under way is answered, too
        self._grants.close_without_floor(name)
        return self._service.serve(now)

    # --- reports ---------------------------------------------------------------------------------

    def explain(self, request_id: str) -> list[dict[str, Any]] | None:
        """What happened to the memory of a request, in order; t_s from its first event."""
        return self._books.stories.of(request_id)

    def tenants(self) -> list[dict[str, Any]]:
        used = self._grants.in_use(patient=True)
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
        return self._grants.report(now)

    def waiting(self, now: float) -> list[dict[str, Any]]:
        return self._waiters.report(now)

    def knows(self, holder: str) -> bool:
        return holder in self._epochs

    def epoch(self, holder: str) -> int:
        return self._epochs[holder]

    def has(self, tenant: str) -> bool:
        return tenant in self._tenants

    def arriving_bytes(self, tenant: str) -> int:
        """That were granted and are not there yet."""
        return self._grants.arriving_bytes(tenant)

    def back_s(self, tenant: str) -> float:
        """Seconds until a tenant that is away is there again."""
        return self._tenants[tenant].back_s

    def is_quiet(self, holder: str) -> bool:
        """Nothing of this process computes or moves: what it holds is what it was granted."""
        return not any(one.busy for one in self._grants if one.lease.holder == holder) and not any(
            self._tenants[name].move or self.arriving_bytes(name)
            for name in self._tenants.of(holder)
        )

    def check(self) -> None:
        """What must hold between two messages. AssertionError says what does not."""
        self._books.check()

    # --- copies that are only asked questions ----------------------------------------------------

    def playable(self) -> Broker:
        """A copy to play with; without the stories, which are long."""
        stories, self._books.stories = self._books.stories, Stories()
        try:
            return deepcopy(self)
        finally:
            self._books.stories = stories

    def finish_all(self) -> None:
        """As if everything that runs or moves had come to its end, and nobody waited."""
        self._waiters.clear()
        for name in self._moves.end_all():
            self._grants.close_without_floor(name)
        for tenant in self._tenants.values():
            tenant.alone_until = float("-inf")
        self._grants.end_all()

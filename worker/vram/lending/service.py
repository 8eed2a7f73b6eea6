"""Serving those who wait: grants, refusals, and what others are asked for so that there is room."""

from __future__ import annotations

from worker.protocol.messages import Granted, Message, Pause, Refused
from worker.vram import policy
from worker.vram.lending.books import Books
from worker.vram.lending.choices import Choices
from worker.vram.lending.waiters import Waiter
from worker.vram.policy import Kind

GROW_AFTER_S = 2.0  # without a question or a move, before what was shrunk grows back
KINDS = {Kind.PARK: "park", Kind.DROP: "drop", Kind.SHRINK: "shrink"}

Order = tuple[str, Message]  # (holder, what it is told)


class Service:
    """Carries out what the order of the queue and the policy say. Owner: the broker."""

    def __init__(self, books: Books, choices: Choices):
        self._books = books
        self._choices = choices

    def serve(self, now: float) -> list[Order]:
        """Grant to whoever is next, until one has to wait. It keeps its place."""
        orders: list[Order] = []
        waiters = self._books.waiters
        while waiters:
            waiter = waiters.next(self._ready(), now)
            told, answer = self._try(waiter, now)
            orders += told
            if answer is None:
                for other in waiters:
                    if other is not waiter and not other.why:
                        self._note_wait(other, now)
                break
            orders.append(answer)
        if not waiters:
            orders += self._let_stay(now)
        return orders

    def grow(self, now: float) -> list[Order]:
        """Give a pool back what was taken from it, where it is quiet and nobody wants it."""
        books = self._books
        if books.waiters or books.moves or now - books.quiet_since < GROW_AFTER_S:
            return []
        settling = books.grants.settling()
        for name, one in books.tenants.items():
            held, size = books.ledger.held(name), one.spec.size_bytes
            shrunk = one.spec.floor_bytes <= held < size
            if shrunk and name not in settling and size - held <= books.ledger.free_bytes:
                return [(one.holder, books.moves.grow(name, now))]
        return []

    def refuse(self, waiter: Waiter, why: str, now: float) -> Order:
        """Whether it waits or has only just asked."""
        books = self._books
        if waiter in books.waiters:
            books.waiters.remove(waiter)
        books.counters["refused"] += 1
        books.stories.tell(waiter.requests, now, "refused", why=why)
        return waiter.holder, Refused(number=waiter.asked.number, error=why)

    def _ready(self) -> frozenset[str]:
        """Tenants that are there and stay."""
        return frozenset(
            name
            for name, one in self._books.tenants.items()
            if self._books.ledger.held(name) >= one.spec.floor_bytes and not one.move
        )

    def _try(self, waiter: Waiter, now: float) -> tuple[list[Order], Order | None]:
        """What others are asked for to make room, and the answer; None while it has to wait."""
        free_only = waiter.asked.free_only
        chosen = self._choices.best(waiter, now, patient=True)
        if chosen is None and not waiter.is_patient(now):
            chosen = self._choices.best(waiter, now, patient=False)
        if chosen is None:
            if free_only:
                return [], self.refuse(waiter, "there is no room for it now", now)
            if (why := self._choices.why_never(waiter, now)) is not None:
                return [], self.refuse(waiter, why, now)
            self._note_wait(waiter, now)
            return self._ask_to_pause(waiter, now), None
        index, plan = chosen
        way = waiter.asked.ways[index]
        if free_only and plan.victims:
            return [], self.refuse(waiter, "something would have to move for it", now)
        orders = [self._ask_away(waiter, move, now) for move in plan.victims]
        arrivals = {m.tenant: m.bytes for m in plan.moves if m.kind in policy.ARRIVALS}
        if sum(arrivals.values()) + way.peak_bytes > self._books.ledger.free_bytes or any(
            self._books.tenants[name].move for name in way.tenants
        ):
            return orders, None  # what was asked away comes back by `Yielded`
        assert not orders, "what is taken away is not free before it is given back"
        return [], self._grant(waiter, index, arrivals, now)

    def _grant(self, waiter: Waiter, index: int, arrivals: dict[str, int], now: float) -> Order:
        books, asked, way = self._books, waiter.asked, waiter.asked.ways[index]
        grant = books.grants.open(waiter, index, arrivals, now)
        books.waiters.served(waiter)
        books.tenants.used(way.tenants, now, begins=True)
        books.quiet_since = now
        books.counters["granted"] += 1
        books.waited_s += now - waiter.arrived
        books.stories.tell(
            waiter.requests, now, "granted", phase=asked.phase, way=way.name,
            exactness=way.exactness, waited_s=round(now - waiter.arrived, 4), to_bring=[*arrivals],
        )  # fmt: skip
        return waiter.holder, Granted(
            number=asked.number,
            fence=grant.lease.fence,
            way=index,
            held_bytes={name: books.ledger.held(name) for name in way.tenants},
        )

    def _note_wait(self, waiter: Waiter, now: float) -> None:
        why = self._choices.why_not_now()
        if why != waiter.why:
            waiter.why = why
            self._books.stories.tell(waiter.requests, now, "waits", why=why)

    def _ask_away(self, waiter: Waiter, move: policy.Move, now: float) -> Order:
        books, kind = self._books, KINDS[move.kind]
        holder = books.tenants[move.tenant].holder
        in_use = move.tenant in books.grants.in_use(patient=True)
        books.stories.tell(
            waiter.requests, now, f"asked to {kind}", tenant=move.tenant, holder=holder,
            bytes=move.bytes, in_use=in_use,
        )  # fmt: skip
        return holder, books.moves.ask_away(
            kind, move.tenant, move.bytes, waiter.requests, now, wait=in_use
        )

    def _let_stay(self, now: float) -> list[Order]:
        """Nobody waits any more: whoever was to go when its work has ended goes on instead."""
        books = self._books
        orders: list[Order] = []
        for move, stay in books.moves.let_stay():
            books.stories.tell(move.requests, now, "may stay", tenant=move.tenant)
            orders.append((books.tenants[move.tenant].holder, stay))
        return orders

    def _ask_to_pause(self, waiter: Waiter, now: float) -> list[Order]:
        """Ask the least urgent work that can be paused to end after its step, for somebody more
        urgent who cannot have room otherwise. It comes back into the queue by itself."""
        books = self._books
        grant = books.grants.to_pause_for(waiter.asked, now)
        if grant is None:
            return []
        grant.pause_asked = True
        books.counters["paused"] += 1
        books.stories.tell(
            waiter.requests, now, "asked to pause", phase=grant.asked.phase, of=grant.requests[0]
        )
        books.stories.tell(grant.requests, now, "asked to pause", for_request=waiter.requests[0])
        return [(grant.lease.holder, Pause(fence=grant.lease.fence))]

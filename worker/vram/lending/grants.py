"""Leases that are open: what was granted to whom, and what of it is still to be brought."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worker.protocol.messages import Acquire
from worker.vram.ledger import Lease, Ledger
from worker.vram.lending.tenants import Tenants
from worker.vram.lending.waiters import Waiter

PAUSE_AFTER_S = 1.0  # that a lease is held, before it may be asked to pause for a more urgent one


@dataclass(eq=False, slots=True)
class Grant:
    """A lease and the question that it answers."""

    lease: Lease
    asked: Acquire
    requests: list[str]
    way: str
    since: float
    arrivals: dict[str, int]  # bytes of tenants that its engine has to bring
    busy: bool = True
    brought_s: float = 0.0
    pause_asked: bool = False


class Grants:
    """By fence, in the order in which they were granted. Owner: the broker."""

    def __init__(self, ledger: Ledger, tenants: Tenants):
        self._ledger = ledger
        self._tenants = tenants
        self._grants: dict[int, Grant] = {}

    def __iter__(self) -> Iterator[Grant]:
        """Whoever iterates may close."""
        return iter(list(self._grants.values()))

    def open(self, waiter: Waiter, index: int, arrivals: dict[str, int], now: float) -> Grant:
        """Grant a way and what has to come for it. The caller has seen that the bytes are free."""
        way = waiter.asked.ways[index]
        for name, size in arrivals.items():
            self._ledger.hold(name, waiter.holder, self._ledger.held(name) + size)
        lease = self._ledger.open(waiter.holder, way.tenants, way.peak_bytes)
        grant = Grant(lease, waiter.asked, waiter.requests, way.name, now, dict(arrivals))
        self._grants[lease.fence] = grant
        return grant

    def find(self, fence: int, holder: str) -> Grant:
        """Raises StaleFence for a lease that is void or somebody else's."""
        return self._grants[self._ledger.lease(fence, holder).fence]

    def numbered(self, holder: str, number: int) -> Grant | None:
        """The answer to the question that an engine gave this number."""
        fitting = (
            one
            for one in self._grants.values()
            if one.lease.holder == holder and one.asked.number == number
        )
        return next(fitting, None)

    def brought(self, grant: Grant, tenant: str, held_bytes: int) -> None:
        """A tenant of a lease is there, with so many bytes; with 0 it could not be brought."""
        if not held_bytes:
            self._not_brought(grant, tenant)
            return
        more = 0  # that leases bring which were granted later, to those bytes
        for one in self._grants.values():
            if one.lease.fence <= grant.lease.fence:
                one.arrivals.pop(tenant, None)
            else:
                more += one.arrivals.get(tenant, 0)
        kept = min(held_bytes + more, self._ledger.held(tenant))
        self._ledger.hold(tenant, grant.lease.holder, kept)

    def close(self, grant: Grant) -> None:
        self._ledger.close(grant.lease.fence)
        del self._grants[grant.lease.fence]
        for name in list(grant.arrivals):
            self._not_brought(grant, name)

    def close_with(self, tenant: str) -> None:
        """A tenant is gone, and every lease of it."""
        for grant in self:
            if tenant in grant.lease.tenants:
                self.close(grant)

    def close_without_floor(self, tenant: str) -> None:
        """A tenant has less; leases of it end where less is there than it works with, but for
        those that were granted with what is on its way."""
        there = self._ledger.held(tenant) - self.arriving_bytes(tenant)
        if there >= self._tenants[tenant].spec.floor_bytes:
            return
        bringing = [fence for fence, one in self._grants.items() if one.arrivals.get(tenant)]
        for grant in self:
            older = not bringing or grant.lease.fence < min(bringing)
            if older and tenant in grant.lease.tenants:
                self.close(grant)

    def void_of(self, holder: str) -> list[Grant]:
        """A process has ended: its leases are void, and the ledger has forgotten all that it had.
        Returns them."""
        return [self._grants.pop(lease.fence) for lease in self._ledger.leave(holder)]

    def end_all(self) -> None:
        """As if what runs had ended."""
        for grant in self:
            grant.busy = False
            grant.arrivals.clear()
            if not grant.asked.standing:
                self.close(grant)

    def in_use(self, *, patient: bool) -> set[str]:
        """Tenants that are not to be taken now. Without patience a standing lease is asked to end,
        so only what ends by itself is left alone."""
        return {
            name
            for grant in self._grants.values()
            if grant.busy and (patient or not grant.asked.standing)
            for name in grant.lease.tenants
        }

    def settling(self) -> set[str]:
        """Tenants that stay as they were granted: of leases whose engines still bring something,
        and those of which a phase needs more than their floor."""
        coming = {
            name
            for grant in self._grants.values()
            if grant.arrivals
            for name in grant.lease.tenants
        }
        return coming.union(
            *(one.asked.least_bytes for one in self._grants.values() if not one.asked.standing)
        )

    def arriving_bytes(self, tenant: str) -> int:
        """That were granted and are not there yet."""
        return sum(grant.arrivals.get(tenant, 0) for grant in self._grants.values())

    def peak_bytes(self) -> int:
        """Of all phases that run."""
        return sum(grant.lease.peak_bytes for grant in self._grants.values())

    def to_pause_for(self, asked: Acquire, now: float) -> Grant | None:
        """The least urgent work that can be paused for something more urgent; None where there is
        none, or where some has been asked already."""
        pausable = [
            grant
            for grant in self._grants.values()
            if grant.asked.pausable
            and grant.asked.priority < asked.priority
            and now - grant.since >= PAUSE_AFTER_S
        ]
        if not pausable or any(grant.pause_asked for grant in pausable):
            return None
        return min(pausable, key=lambda one: (one.asked.priority, -one.lease.fence))

    def report(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "fence": fence, "holder": one.lease.holder, "phase": one.asked.phase,
                "request_id": one.requests[0], "peak_bytes": one.lease.peak_bytes,
                "busy": one.busy, "standing": one.asked.standing,
                "age_s": round(now - one.since, 3),
            }
            for fence, one in self._grants.items()
        ]  # fmt: skip

    def check(self) -> None:
        """The ledger has the same leases."""
        assert {one.fence for one in self._ledger.leases} == set(self._grants), "leases disagree"

    def _not_brought(self, grant: Grant, name: str) -> None:
        """What a lease was to bring and did not. A lease that was granted after it and cannot do
        without is to, then: it counts on it."""
        size = grant.arrivals.pop(name, 0)
        tenant, left = self._tenants[name], self._ledger.held(name) - size
        for other in self._grants.values():
            least = max(tenant.spec.floor_bytes, other.asked.least_bytes.get(name, 0))
            counts_on_it = name in other.lease.tenants and other.lease.fence > grant.lease.fence
            if counts_on_it and left < least:
                other.arrivals[name] = other.arrivals.get(name, 0) + size
                return
        self._ledger.hold(name, tenant.holder, left)

"""Which way a waiter may have, what has to go for it, and why not.

The device as the policy sees it: the policy itself is worker/vram/policy.py.
"""

from __future__ import annotations

from dataclasses import replace

from worker.protocol.messages import Way
from worker.vram import policy
from worker.vram.lending.books import Books
from worker.vram.lending.waiters import Waiter
from worker.vram.policy import Ahead, Decide, Plan, State
from worker.vram.ways import RELUCTANCE_S

ENOUGH_BYTES = 1 << 62  # of host memory: host copies were counted when they were made


class Choices:
    """Reads what the broker keeps and asks the policy. Changes nothing."""

    def __init__(self, decide: Decide, books: Books):
        self._decide = decide
        self._ledger = books.ledger
        self._tenants = books.tenants
        self._grants = books.grants
        self._waiters = books.waiters

    def best(self, waiter: Waiter, now: float, *, patient: bool) -> tuple[int, Plan] | None:
        """The way that costs least, by its index, and its moves; None where none can be had now.

        patient: leases in use are left alone, the standing ones too.
        """
        plans = [
            (
                self._decide(self._state(waiter, way, now, patient=patient)),
                way.longer_s + RELUCTANCE_S[way.exactness],
            )
            for way in waiter.asked.ways
        ]
        index = policy.cheapest_of(plans)
        if index is None:
            return None
        plan = plans[index][0]
        assert isinstance(plan, Plan)
        return index, plan

    def why_never(self, waiter: Waiter, now: float) -> str | None:
        """Why it could not be granted even if everything ended that runs; None where it could."""
        idle = self._ledger.free_bytes + self._grants.peak_bytes() + self._tenants.leaving_bytes
        tenants = tuple(
            replace(self._seen(name, waiter, used=False, fixed=False), in_use=False)
            for name in self._tenants
        )
        refusals = []
        for way in waiter.asked.ways:
            state = State(
                tenants=tenants, free_bytes=idle, host_free_bytes=ENOUGH_BYTES, need=way.tenants,
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
            f"{_gib(max(0, least.reachable_bytes))} of {_gib(self._ledger.budget_bytes)} are "
            "reachable with everything moved that may be"
            + (f"; pinned: {', '.join(pinned)}" if pinned else "")
        )

    def why_not_now(self) -> str:
        """Who has what somebody waits for."""
        busy = sorted(f"{one.asked.phase} of {one.requests[0]}" for one in self._grants if one.busy)
        before = len(self._waiters) - 1
        free = self._ledger.free_bytes
        return f"{_gib(max(0, free))} are free; in use by {', '.join(busy) or 'nobody'}" + (
            f"; {before} others wait" if before else ""
        )

    def _state(self, waiter: Waiter, way: Way, now: float, *, patient: bool) -> State:
        used, settling = self._grants.in_use(patient=patient), self._grants.settling()
        return State(
            tenants=tuple(
                self._seen(
                    name,
                    waiter,
                    used=name in used,
                    fixed=name in settling or now < one.alone_until,
                )
                for name, one in self._tenants.items()
            ),
            free_bytes=self._ledger.free_bytes + self._tenants.leaving_bytes,
            host_free_bytes=ENOUGH_BYTES,
            need=way.tenants,
            need_bytes=way.peak_bytes,
            now=now,
            queue=tuple(
                Ahead(one.asked.ways[0].tenants, one.asked.ways[0].peak_bytes)
                for one in self._waiters
                if one is not waiter
            ),
            budget_bytes=self._ledger.budget_bytes,
        )

    def _seen(self, name: str, waiter: Waiter, *, used: bool, fixed: bool) -> policy.Tenant:
        """A tenant as the policy sees it for this waiter."""
        return self._tenants[name].as_policy_sees(
            self._ledger.held(name), used=used, fixed=fixed,
            least_bytes=waiter.asked.least_bytes.get(name, 0),
        )  # fmt: skip


def _gib(size_bytes: int) -> str:
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.2f} GiB"
    return f"{size_bytes / (1 << 20):.1f} MiB"

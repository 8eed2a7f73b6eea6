"""Who holds which bytes of the device. Pure bookkeeping: no decision, no clock, no device."""

from __future__ import annotations

from dataclasses import dataclass


class StaleFence(Exception):
    """A lease that is void: it was released, taken back, or its holder has died."""


class OverCommit(Exception):
    """More bytes than are free. A fault of the caller, which has to look first."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Bytes of one phase, and the tenants that stay while it lasts."""

    fence: int
    holder: str
    tenants: tuple[str, ...]
    peak_bytes: int


class Ledger:
    """Bytes of tenants, of phases and of processes. They never exceed the budget.

    One owner: the broker. Fencing numbers rise and are never used twice, so whoever still has an
    old one is recognised.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._fixed: dict[str, int] = {}  # by holder
        self._held: dict[str, tuple[str, int]] = {}  # tenant -> (holder, bytes)
        self._leases: dict[int, Lease] = {}
        self._last_fence = 0

    @property
    def free_bytes(self) -> int:
        """Less than 0 only where processes alone take more than there is."""
        return self.budget_bytes - (
            sum(self._fixed.values())
            + sum(size for _, size in self._held.values())
            + sum(lease.peak_bytes for lease in self._leases.values())
        )

    @property
    def leases(self) -> tuple[Lease, ...]:
        """In the order in which they were granted."""
        return tuple(self._leases.values())

    def join(self, holder: str, fixed_bytes: int) -> None:
        """A process begins. fixed_bytes: that it takes for itself, such as a CUDA context."""
        self._fixed[holder] = fixed_bytes

    def leave(self, holder: str) -> tuple[Lease, ...]:
        """A process has ended: everything of it is void. Returns the leases it had.

        What it takes for itself stays reserved, for the one that is started in its place.
        """
        self._held = {name: one for name, one in self._held.items() if one[0] != holder}
        gone = tuple(lease for lease in self._leases.values() if lease.holder == holder)
        for lease in gone:
            del self._leases[lease.fence]
        return gone

    def held(self, tenant: str) -> int:
        return self._held[tenant][1] if tenant in self._held else 0

    def held_by(self, holder: str) -> int:
        """Bytes of all its tenants and phases, without those that it takes for itself."""
        return sum(size for who, size in self._held.values() if who == holder) + sum(
            lease.peak_bytes for lease in self._leases.values() if lease.holder == holder
        )

    def hold(self, tenant: str, holder: str, size_bytes: int) -> None:
        """Set a tenant's bytes. Raises OverCommit when it grows by more than is free."""
        growth = size_bytes - self.held(tenant)
        if growth > max(0, self.free_bytes):
            raise OverCommit(f"{tenant}: {growth} bytes more, {self.free_bytes} are free")
        if size_bytes:
            self._held[tenant] = (holder, size_bytes)
        else:
            self._held.pop(tenant, None)

    def open(self, holder: str, tenants: tuple[str, ...], peak_bytes: int) -> Lease:
        """Grant a phase. Raises OverCommit."""
        if peak_bytes > max(0, self.free_bytes):
            raise OverCommit(f"a phase of {peak_bytes} bytes, {self.free_bytes} are free")
        self._last_fence += 1
        lease = Lease(self._last_fence, holder, tenants, peak_bytes)
        self._leases[lease.fence] = lease
        return lease

    def lease(self, fence: int, holder: str) -> Lease:
        """Raises StaleFence for one that is void or somebody else's."""
        lease = self._leases.get(fence)
        if lease is None or lease.holder != holder:
            raise StaleFence(f"lease {fence} is void")
        return lease

    def close(self, fence: int) -> None:
        """A phase is over."""
        del self._leases[fence]

"""What sits in device memory by itself, of every engine, and what is known of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from worker.protocol.messages import TenantSpec
from worker.vram import policy
from worker.vram.policy import Place

KEPT_USES = 16  # of a tenant, for the probability that it is used again soon
NEVER_S = 1e9  # seconds to park what cannot be parked: dropping it is always cheaper


@dataclass(slots=True)
class Tenant:
    spec: TenantSpec
    holder: str
    back_s: float  # seconds until it is there again, as far as is known
    leaving: int = 0  # bytes that its engine was asked to give back and has not yet
    move: int = 0  # an order to its engine that is not answered yet: nobody is granted it
    last_used: float = float("-inf")
    uses: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_USES))
    alone_until: float = float("-inf")
    taken_for: str = ""  # the request that it went for the last time
    keep_alive_s: float | None = None  # as the last request wished; None: its own

    def as_policy_sees(
        self, held_bytes: int, *, used: bool, fixed: bool, least_bytes: int = 0
    ) -> policy.Tenant:
        """held_bytes: by the ledger. used: it computes, and only what it has above its floor may
        go. fixed: nothing may. least_bytes: its floor for whoever asks, where that is higher."""
        fixed = fixed or self.move > 0
        spec = self.spec
        held = held_bytes - self.leaving
        keep_alive_s = spec.keep_alive_s if self.keep_alive_s is None else self.keep_alive_s
        return policy.Tenant(
            id=spec.id,
            model=spec.model,
            size_bytes=spec.size_bytes,
            place=Place.DEVICE if held else Place.HOST if spec.host_copy else Place.DISK,
            held_bytes=held,
            floor_bytes=max(spec.floor_bytes, least_bytes),
            in_use=used or fixed,
            shrinks_in_use=used and not fixed,
            pinned=spec.pinned,
            priority=spec.priority,
            keep_until=self.last_used + keep_alive_s,
            last_used=self.last_used,
            uses=tuple(self.uses),
            park_s=0.0 if spec.host_copy else NEVER_S,
            wake_s=self.back_s,
            load_s=self.back_s + (NEVER_S if spec.host_copy else 0.0),
        )


class Tenants(dict[str, Tenant]):
    """By id. Owner: the broker."""

    def declare(self, holder: str, specs: Sequence[TenantSpec]) -> None:
        """Make an engine's tenants known. What is another's stays as it is."""
        for spec in specs:
            known = self.get(spec.id)
            if known is None:
                self[spec.id] = Tenant(spec, holder, back_s=spec.back_s)
            elif known.holder == holder:
                known.spec = spec

    def of(self, holder: str) -> list[str]:
        return [name for name, one in self.items() if one.holder == holder]

    def owns(self, holder: str, name: str) -> bool:
        return name in self and self[name].holder == holder

    @property
    def leaving_bytes(self) -> int:
        """That engines were asked to give back and have not yet."""
        return sum(one.leaving for one in self.values())

    def used(
        self, names: Iterable[str], now: float, *, begins: bool, keep_alive_s: float | None = None
    ) -> None:
        """A use of these begins or ends."""
        for name in names:
            if (one := self.get(name)) is not None:
                one.last_used = now
                one.keep_alive_s = keep_alive_s
                if begins:
                    one.uses.append(now)

"""Whether a request fits beside what is resident, decided before the device is touched. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """What sits in device memory on its own."""

    name: str
    model: str
    size_bytes: int
    movable: bool  # an idle model that may be unloaded for another; never one that is pinned


@dataclass(frozen=True, slots=True)
class Need:
    """A phase of a request, in bytes beside the tenants."""

    name: str
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    name: str
    tenants_bytes: int
    peak_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.tenants_bytes + self.peak_bytes

    @property
    def short_bytes(self) -> int:
        """Bytes that are missing; 0 where it fits."""
        return max(0, self.total_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """unload: models that have to go first, least bytes that suffice. Nothing else is done to make
    room, so what comes out is what comes out with everything resident: exactness "bit"."""

    phases: tuple[PlannedPhase, ...]
    unload: tuple[str, ...]
    exactness: str = "bit"

    @property
    def fits(self) -> bool:
        return all(phase.short_bytes == 0 for phase in self.phases)

    @property
    def short_bytes(self) -> int:
        """Of the worst phase, with everything unloaded that may go."""
        return max((phase.short_bytes for phase in self.phases), default=0)


def plan(needs: Sequence[Need], tenants: Sequence[Tenant], budget_bytes: int) -> Plan:
    """The plan with the least to unload.

    tenants: all that would be resident, the request's own among them (not movable).
    """
    best: Plan | None = None
    for gone in _by_size(_movable(tenants)):
        staying = sum(one.size_bytes for one in tenants if one.model not in gone)
        phases = tuple(
            PlannedPhase(need.name, staying, need.peak_bytes, budget_bytes) for need in needs
        )
        best = Plan(phases, gone)
        if best.fits:
            return best
    assert best is not None, "nothing unloaded is the first set that is tried"
    return best  # everything that may go is gone, and it does not fit


def _movable(tenants: Sequence[Tenant]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for one in tenants:
        if one.movable:
            sizes[one.model] = sizes.get(one.model, 0) + one.size_bytes
    return sizes


def _by_size(models: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Every set of models, least bytes first. A pod has less than ten."""
    sets: list[tuple[str, ...]] = [()]
    for model in models:
        sets += [(*one, model) for one in sets]
    return sorted(sets, key=lambda one: (sum(models[model] for model in one), len(one), one))

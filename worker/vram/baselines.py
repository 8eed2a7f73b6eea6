"""The rules of eight other servers behind the signature of `policy.decide`, to compare with. Pure.

Each is written from a short description of the server's rule, not from its code, and is no more
than that: what admits, by which estimate, and who goes first. Servers that know whole models
only load and take all tenants of a model as one. Where even everything idle does not suffice by a
rule's own estimate, it goes ahead once nothing else is left on the device, as these servers do.
Whole models are dropped and read from disk again: that the system may have kept the files in
memory is left out, and makes these rules look slower than they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from worker.vram.policy import Decide, Kind, Move, Plan, Refusal, State, Tenant, arrival

GB = 10**9
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Unit:
    """What a rule moves as one: a model, or a single tenant."""

    name: str
    tenants: tuple[Tenant, ...]
    needed: bool

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.tenants)

    @property
    def held_bytes(self) -> int:
        return sum(one.held_bytes for one in self.tenants)

    @property
    def absent_bytes(self) -> int:
        return sum(one.absent_bytes for one in self.tenants)

    @property
    def last_used(self) -> float:
        return max(one.last_used for one in self.tenants)

    @property
    def idle(self) -> bool:
        """Resident, at least in part, and may be taken."""
        busy = any(one.in_use or one.pinned for one in self.tenants)
        return self.held_bytes > 0 and not self.needed and not busy


def ollama(state: State) -> Plan | Refusal:
    """Fits where weights and KV are at most 80 % of what the driver says is free. Else the idle
    model of the shortest keep-alive goes, then by name, one after the other, without a look at
    whether it frees enough."""
    models = _models(state)
    order = sorted(
        (one for one in models if one.idle),
        key=lambda one: (max(part.keep_until for part in one.tenants), one.name),
    )
    free = state.driver_free_bytes
    return _one_by_one(
        state, models, order,
        lambda gone: _absent(models) <= 0.8 * (free + _held(gone)) or not _absent(models),
    )  # fmt: skip


def localai(state: State) -> Plan | Refusal:
    """A number of models, and a reclaimer above 95 % of the memory; least recently used first."""
    models = _models(state)
    order = sorted((one for one in models if one.idle), key=lambda one: one.last_used)
    limit = _safe_count(state, models)
    used = state.budget_bytes - state.driver_free_bytes

    def enough(gone: Sequence[Unit]) -> bool:
        left = used - _held(gone) + _absent(models)
        return _count(models, gone) <= limit and left <= 0.95 * state.budget_bytes

    return _one_by_one(state, models, order, enough)


def llama_swap(state: State) -> Plan | Refusal:
    """Sets that a human declared may be resident together: here all that fit in whole models with
    4 GiB to compute. What is outside goes, so that the least declared cost (bytes) goes."""
    models = _models(state)
    idle = [one for one in models if one.idle]
    stays = sum(one.size_bytes for one in models if one.needed or (_on(one) and not one.idle))
    alone = all(one.needed or one.idle or not _on(one) for one in models)
    for gone in sorted(_subsets(idle), key=lambda one: (_held(one), len(one))):
        kept = sum(one.size_bytes for one in idle if one not in gone)
        everything = len(gone) == len(idle)
        if stays + kept + 4 * GIB <= state.budget_bytes or (everything and alone):
            return _plan(models, gone, Kind.DROP)
    return _refused(state, models, idle)


def ray_multiplex(state: State) -> Plan | Refusal:
    """A number of models; the least recently used goes."""
    models = _models(state)
    order = sorted((one for one in models if one.idle), key=lambda one: one.last_used)
    limit = _safe_count(state, models)
    return _one_by_one(state, models, order, lambda gone: _count(models, gone) <= limit)


def static_share(state: State) -> Plan | Refusal:
    """vLLM, SGLang: what came first has its share of the card, and nothing is ever taken. Here the
    share is a whole model and the peak, so that more than one model has a chance."""
    models = _models(state)
    if _absent(models) + state.need_bytes <= state.free_bytes:
        return _plan(models, (), Kind.DROP)
    return _refused(state, models, ())


def comfyui(state: State) -> Plan | Refusal:
    """Sizes x 1.1 and the greater of 1.2 GB and the estimate of the operation. The most offloaded
    go first, then those that the graph does not refer to, then the smallest; to host memory, and
    the last one only in part."""
    parts = _parts(state)
    coming = {name for phase in state.queue[:2] for name in phase.tenants}
    wanted = int(1.1 * _absent(parts)) + max(12 * GB // 10, state.need_bytes)
    short = wanted - state.driver_free_bytes
    order = sorted(
        (one for one in parts if one.idle),
        key=lambda one: (one.held_bytes - one.size_bytes, one.name in coming, one.size_bytes),
    )
    moves: list[Move] = []
    host = state.host_free_bytes
    for one in order:
        if short <= 0:
            break
        tenant = one.tenants[0]
        if short < one.held_bytes and tenant.size_bytes <= host:
            moves.append(Move(Kind.SHRINK, one.name, short))
        else:
            kind = Kind.PARK if tenant.size_bytes <= host else Kind.DROP
            moves.append(Move(kind, one.name, one.held_bytes))
            host -= tenant.size_bytes if kind is Kind.PARK else 0
        short -= one.held_bytes
    if short > 0 and not _alone(parts):
        return _refused(state, parts, order)
    return Plan((*moves, *_arrivals(parts)))


def invokeai(state: State) -> Plan | Refusal:
    """Driver free less the greater of 3 GB and the operation's estimate; everything unlocked goes,
    smallest first, until it fits; to host memory."""
    parts = _parts(state)
    order = sorted((one for one in parts if one.idle), key=lambda one: one.size_bytes)
    room = state.driver_free_bytes - max(3 * GB, state.need_bytes)
    return _one_by_one(
        state, parts, order, lambda gone: _absent(parts) <= room + _held(gone), Kind.PARK
    )


def components_manager(state: State) -> Plan | Refusal:
    """diffusers: a flat margin of 3 GB beside what comes; the smallest combination of parts that
    suffices goes to host memory."""
    parts = _parts(state)
    idle = [one for one in parts if one.idle]
    short = _absent(parts) + 3 * GB - state.driver_free_bytes
    if not _absent(parts) or short <= 0:  # its hook asks only when a part has to come
        return _plan(parts, (), Kind.PARK, state.host_free_bytes)
    enough = [one for one in _subsets(idle) if _held(one) >= short]
    if enough:
        gone = min(enough, key=lambda one: (_held(one), len(one)))
        return _plan(parts, gone, Kind.PARK, state.host_free_bytes)
    if _alone(parts):
        return _plan(parts, idle, Kind.PARK, state.host_free_bytes)
    return _refused(state, parts, idle)


def rules() -> dict[str, Decide]:
    """By the server's name."""
    return {
        "Ollama": ollama,
        "LocalAI": localai,
        "llama-swap": llama_swap,
        "ComfyUI": comfyui,
        "InvokeAI": invokeai,
        "diffusers": components_manager,
        "Ray Serve": ray_multiplex,
        "vLLM/SGLang": static_share,
    }


def whole_model_rules() -> frozenset[str]:
    return frozenset({"Ollama", "LocalAI", "llama-swap", "Ray Serve", "vLLM/SGLang"})


def _models(state: State) -> list[Unit]:
    wanted = {one.model for one in state.needed()}
    grouped: dict[str, list[Tenant]] = {}
    for one in state.tenants:
        grouped.setdefault(one.model, []).append(one)
    return [Unit(name, tuple(parts), name in wanted) for name, parts in grouped.items()]


def _parts(state: State) -> list[Unit]:
    return [Unit(one.id, (one,), one.id in state.need) for one in state.tenants]


def _on(unit: Unit) -> bool:
    return unit.held_bytes > 0


def _alone(units: Iterable[Unit]) -> bool:
    """Whether nothing would stay beside what is needed, if all that is idle went."""
    return all(one.needed or one.idle or not _on(one) for one in units)


def _absent(units: Iterable[Unit]) -> int:
    return sum(one.absent_bytes for one in units if one.needed)


def _held(units: Iterable[Unit]) -> int:
    return sum(one.held_bytes for one in units)


def _count(models: Sequence[Unit], gone: Sequence[Unit]) -> int:
    """Models that would be resident."""
    return sum(one.needed or (_on(one) and one not in gone) for one in models)


def _safe_count(state: State, models: Sequence[Unit]) -> int:
    """The number that a careful operator sets: so many fit with 4 GiB to compute, whichever they
    are."""
    room, count = state.budget_bytes - 4 * GIB, 0
    for size in sorted((one.size_bytes for one in models), reverse=True):
        room -= size
        if room < 0:
            break
        count += 1
    return max(1, count)


def _subsets(units: Sequence[Unit]) -> Iterable[tuple[Unit, ...]]:
    for count in range(len(units) + 1):
        yield from combinations(units, count)


def _one_by_one(
    state: State,
    units: Sequence[Unit],
    order: Sequence[Unit],
    enough: Callable[[Sequence[Unit]], bool],
    kind: Kind = Kind.DROP,
) -> Plan | Refusal:
    """In `order` until it is `enough`."""
    for count in range(len(order) + 1):
        if enough(order[:count]):
            return _plan(units, order[:count], kind, state.host_free_bytes)
    if _alone(units):
        return _plan(units, order, kind, state.host_free_bytes)
    return _refused(state, units, order)


def _plan(units: Sequence[Unit], gone: Sequence[Unit], kind: Kind, host_bytes: int = 0) -> Plan:
    moves: list[Move] = []
    for one in (part for unit in gone for part in unit.tenants if part.held_bytes):
        parks = kind is Kind.PARK and one.size_bytes <= host_bytes
        host_bytes -= one.size_bytes if parks else 0
        moves.append(Move(kind if parks else Kind.DROP, one.id, one.held_bytes))
    return Plan((*moves, *_arrivals(units)))


def _arrivals(units: Sequence[Unit]) -> list[Move]:
    coming = (part for unit in units if unit.needed for part in unit.tenants if not part.ready)
    return [arrival(one, one.absent_bytes) for one in coming]


def _refused(state: State, units: Sequence[Unit], order: Sequence[Unit]) -> Refusal:
    return Refusal(
        _absent(units) + state.need_bytes, state.free_bytes, state.free_bytes + _held(order)
    )

"""What the broker would do for a job, played through on a copy of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from worker.protocol.messages import (
    Acquire,
    Brought,
    Declare,
    Granted,
    PhasePlan,
    PhaseWays,
    Refused,
    Release,
    TenantSpec,
    Yield,
    Yielded,
)
from worker.vram.broker import Broker

PLAYER = "plan"  # the request that the copy hears of


def dry_run(
    broker: Broker,
    holder: str,
    tenants: Sequence[TenantSpec],
    phases: Sequence[PhaseWays],
    now: float,
) -> list[PhasePlan]:
    """Each phase as it would be granted after what runs now has ended. `broker` stays as it is.

    holder: the engine that would ask. tenants: of the job's model, for an engine that has not
    loaded it. Ends with the first phase that is refused.
    """
    copy = broker.playable()
    if not copy.knows(holder):
        copy.join(holder, None)
    copy.finish_all()
    epoch = copy.epoch(holder)
    missing = [spec for spec in tenants if not copy.has(spec.id)]
    for model in dict.fromkeys(spec.model for spec in missing):
        own = tuple(spec for spec in tenants if spec.model == model)
        copy.take(holder, Declare(epoch=epoch, model=model, tenants=own), now)
    made = []
    for number, phase in enumerate(phases, 1):
        asked = Acquire(
            epoch=epoch, number=-number, request_id=PLAYER, phase=phase.name, ways=phase.ways,
            least_bytes=phase.least_bytes,
        )  # fmt: skip
        played = _play(copy, holder, asked, now) if phase.ways else _on_the_host(copy, phase.name)
        work_s = broker.paces.estimate(
            phase.model, phase.name, phase.pixels, phase.work, played.way
        )
        made.append(msgspec.structs.replace(played, work_s=work_s))
        if played.refused is not None:
            break
    return made


def _on_the_host(broker: Broker, name: str) -> PhasePlan:
    free_bytes = broker.ledger.free_bytes
    return PhasePlan(name=name, way="host", exactness="bit", peak_bytes=0, free_bytes=free_bytes)


def _play(broker: Broker, holder: str, asked: Acquire, now: float) -> PhasePlan:
    """Ask, have everybody do at once what they are told, and give the lease back."""
    moves: list[dict[str, object]] = []
    orders = broker.take(holder, asked, now)
    while True:
        following = []
        for who, order in orders:
            match order:
                case Yield():
                    held = broker.ledger.held(order.tenant)
                    moves.append(
                        {
                            "move": order.kind, "tenant": order.tenant,
                            "bytes": held - order.held_bytes,
                        }
                    )  # fmt: skip
                    done = Yielded(
                        epoch=broker.epoch(who),
                        move=order.move, tenant=order.tenant, held_bytes=order.held_bytes,
                        seconds=0.0,
                    )  # fmt: skip
                    following += broker.take(who, done, now)
                case Refused() if order.number == asked.number:
                    return _refused(broker, asked, order.error, moves)
                case Granted() if order.number == asked.number:
                    return _granted(broker, holder, asked, order, moves, now)
        if not following:
            return _refused(broker, asked, "it would wait, and nothing says for how long", moves)
        orders = following


def _refused(broker: Broker, asked: Acquire, why: str, moves: list[dict[str, object]]) -> PhasePlan:
    return PhasePlan(
        name=asked.phase, way=asked.ways[0].name, exactness="", refused=why, moves=tuple(moves),
        peak_bytes=asked.ways[0].peak_bytes, free_bytes=broker.ledger.free_bytes,
    )  # fmt: skip


def _granted(
    broker: Broker, holder: str, asked: Acquire, granted: Granted, moves: list[dict[str, object]],
    now: float,
) -> PhasePlan:  # fmt: skip
    way = asked.ways[granted.way]
    seconds = way.longer_s
    brought = []
    for name in way.tenants:
        if (size := broker.arriving_bytes(name)) > 0:
            back_s = broker.back_s(name)
            seconds += back_s
            brought.append({"move": "bring", "tenant": name, "bytes": size, "seconds": back_s})
            broker.take(
                holder,
                Brought(
                    epoch=broker.epoch(holder),
                    fence=granted.fence, tenant=name, held_bytes=granted.held_bytes[name],
                    seconds=back_s,
                ),
                now,
            )  # fmt: skip
    plan = PhasePlan(
        name=asked.phase,
        way=way.name,
        exactness=way.exactness,
        tenants=way.tenants,
        tenants_bytes=sum(granted.held_bytes.values()),
        peak_bytes=way.peak_bytes,
        free_bytes=broker.ledger.free_bytes,
        seconds=seconds,
        moves=(*moves, *brought),
    )
    broker.take(holder, Release(epoch=broker.epoch(holder), fence=granted.fence), now)
    return plan

"""A day of requests on a simulated card under a policy: events in the order of a virtual clock.

Time is virtual: the next event's time is the time. An engine is a lane that works at one request
after the other, phase by phase; moves of both lanes share one link. Failures are injected.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from worker.vram.order import Waiting, in_order, next_request, without
from worker.vram.policy import (
    ARRIVALS,
    Ahead,
    Decide,
    Kind,
    Move,
    Plan,
    State,
    ahead_of_time,
    cheapest_of,
    next_to_wake,
)
from worker.vram.simdevice import SimDevice
from worker.vram.traces import STREAM_BYTES, Card, Request, Trace, with_slack

KNOWN_REQUESTS = 6  # of the queue, that a policy is told of
RESTART_S = 5.0  # an engine after an error that only a new process gets rid of


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule and what the server around it can do."""

    name: str
    decide: Decide
    collates: bool = False  # orders the queue by `next_request`, else first come, first served
    looks_ahead: bool = False
    streams: bool = False
    keep_alive_s: float = 0.0
    pins: frozenset[str] = frozenset()  # tenants that are brought at the start and stay


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities for every phase."""

    out_of_memory: float = 0.0
    sticky: float = 0.0


@dataclass(slots=True)
class Result:
    swap_s: float = 0.0  # that requests stood still for moves, and that streaming took
    waits_s: list[float] = field(default_factory=list)  # of each: all that was not computing
    evictions: int = 0
    reloads: int = 0  # arrivals of what had been on the device before
    llm_evictions: int = 0
    llm_reloads: int = 0
    refusals: int = 0
    over_commits: int = 0
    injected: int = 0  # failures
    events: int = 0
    videos: int = 0  # that encode
    umt5_s: float = 0.0  # resident, all in all
    served: int = 0


class Lane:
    """An engine's queue and the request it works at."""

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self.current: Request | None = None
        self.phase = 0
        self.doing = ""  # "" | moving | computing | restarting
        self.names: tuple[str, ...] = ()  # of the phase
        self.planned_bytes = 0
        self.taken_bytes = 0
        self.streamed_s = 0.0  # that the phase takes longer, because it streams
        self.factor = 1.0  # on the next plan's peak, after memory ran out
        self.rescued = False
        self.computed_s = 0.0


class Simulation:
    """One trace under one policy on one card."""

    def __init__(
        self,
        card: Card,
        trace: Trace,
        policy: Policy,
        *,
        serial: bool = False,
        noise: bool = True,
        faults: Faults | None = None,
    ):
        """serial: one request at a time; else the chat engine works beside the media engine."""
        self.card = card
        self.trace = trace
        self.policy = policy
        self.device = SimDevice(card, trace, trace.seed, noise=noise)
        self.result = Result(videos=sum(one.phases[0].streamed for one in trace.requests))
        self.now = 0.0
        self.result.swap_s += sum(self.device.pin(name) for name in policy.pins)
        self._faults = faults or Faults()
        self._chance = random.Random(f"faults {trace.seed}")
        self._requests = {one.id: one for one in trace.requests}
        lane = Lane()
        self._lanes = {"chat": lane, "media": lane if serial else Lane()}
        self._order = [lane] if serial else [*self._lanes.values()]
        heads = (".weights", ".unet", ".dit")
        self._heads = [slot for name, slot in self.device.slots.items() if name.endswith(heads)]
        self._numbers = count()
        self._events: list[tuple[float, int, str, object]] = []
        for one in trace.requests:
            self._at(one.arrived, "arrive", one)

    def run(self) -> Result:
        while self._events:
            self.step()
        self.result.over_commits = self.device.over_commits
        umt5 = self.device.slots["wan.umt5"]
        if umt5.held_bytes:
            self.result.umt5_s += self.now - umt5.arrived_at
        return self.result

    def step(self) -> None:
        """One event."""
        self.now, _, kind, about = heapq.heappop(self._events)
        self.result.events += 1
        self.device.over_committed()
        match about:
            case Request():
                self._lanes[about.engine].waiting.append(
                    Waiting(about.id, about.arrived, about.models, about.priority)
                )
            case Lane() if kind == "moved":
                self._compute(about)
            case Lane() if kind == "computed":
                self._computed(about)
            case Lane():
                about.doing = ""
            case int():
                self.device.leaving_bytes -= about
            case str():
                self.device.hold((about,), -1)
                self._look_ahead()
        self._begin()

    def _at(self, time: float, kind: str, about: object) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), kind, about))

    def _begin(self) -> None:
        """Every lane that stands goes on if it can; the request that came first, first."""
        standing = [
            lane for lane in self._order if not lane.doing and (lane.current or lane.waiting)
        ]
        if len(standing) > 1:
            standing.sort(key=lambda lane: self._since(lane))
        for lane in standing:
            while not lane.doing and (lane.current or lane.waiting):
                if lane.current is None:
                    self._take(lane)
                if not self._try(lane):
                    break

    def _since(self, lane: Lane) -> tuple[bool, float]:
        if lane.current is not None:
            return lane.phase == 0, lane.current.arrived
        return True, lane.waiting[0].arrived

    def _take(self, lane: Lane) -> None:
        index = 0
        if self.policy.collates and len(lane.waiting) > 1:
            index = next_request(lane.waiting, self._warm(), self.now)
        lane.current = self._requests[lane.waiting[index].id]
        lane.waiting = without(lane.waiting, index)
        lane.phase, lane.computed_s = 0, 0.0

    def _warm(self) -> frozenset[str]:
        """Models of which the denoiser or the weights, the greatest part, are resident."""
        return frozenset(one.model for one in self._heads if one.held_bytes >= one.floor_bytes)

    def _try(self, lane: Lane) -> bool:
        """Plan the lane's phase and move. False: it has to wait for the other lane."""
        assert lane.current is not None
        phase = lane.current.phases[lane.phase]
        peak = with_slack(int(phase.peak_bytes * lane.factor))
        queue = self._known(lane)
        ways = [(phase.tenants, peak, 0.0)]
        if phase.streamed and self.policy.streams:
            ways.append(((), peak + STREAM_BYTES, self.device.streaming_s(phase.tenants)))
        states = [self._state(names, need, queue) for names, need, _ in ways]
        plans = [self.policy.decide(state) for state in states]
        best = cheapest_of([(plan, way[2]) for plan, way in zip(plans, ways, strict=True)])
        if best is None:
            moving = max(self.device.link_free_at, self.device.disk_free_at) > self.now
            if moving or any(other.doing for other in self._order):
                return False
            self._refuse(lane)
            return True
        plan = plans[best]
        assert isinstance(plan, Plan)
        lane.names, lane.planned_bytes, longer_s = ways[best]
        lane.streamed_s = longer_s
        self._carry_out(lane, plan)
        if longer_s:  # after the plan, which has reckoned with the host memory as it was
            self.device.stream(phase.tenants)
        return True

    def _state(self, names: tuple[str, ...], need_bytes: int, queue: tuple[Ahead, ...]) -> State:
        device = self.device
        keep = self.policy.keep_alive_s
        return State(
            tuple([slot.view or device.view(slot, keep) for slot in device.slots.values()]),
            device.free_bytes, device.host_free_bytes, names, need_bytes, self.now, queue,
            self.card.budget_bytes, device.driver_free_bytes(self.now),
        )  # fmt: skip

    def _known(self, lane: Lane) -> tuple[Ahead, ...]:
        """The lane's own next phases, the other lane's, then those of the requests that wait."""
        found: list[Ahead] = []
        for one in (lane, *(other for other in self._order if other is not lane)):
            if one.current is not None:
                found += one.current.ahead[one.phase + (one is lane) :]
        for one in self._order:
            waiting = one.waiting
            if self.policy.collates and len(waiting) > 1:
                waiting = in_order(waiting[:KNOWN_REQUESTS], self._warm(), self.now)
            for each in waiting[:KNOWN_REQUESTS]:
                found += self._requests[each.id].ahead
        return tuple(found)

    def _carry_out(self, lane: Lane, plan: Plan) -> None:
        device = self.device
        end = self._move_all(plan.moves) if plan.moves else self.now
        for name in lane.names:
            end = max(end, device.slots[name].ready_at)
        self.result.swap_s += end - self.now
        device.hold(lane.names, 1)
        device.planned_bytes += lane.planned_bytes
        lane.doing = "moving"
        if end > self.now:
            self._at(end, "moved", lane)
        else:
            self._compute(lane)

    def _move_all(self, moves: Sequence[Move]) -> float:
        """What goes first, then what comes; returns when all is there.

        The link copies one thing at a time, and the disk reads one; they do not wait for each
        other, because a load needs little of the link.
        """
        device = self.device
        gained, link, disk = 0, max(self.now, device.link_free_at), device.disk_free_at
        away = end = self.now
        for move in moves:
            self._count(move)
            slot = device.slots[move.tenant]
            reads = move.kind is Kind.LOAD and not slot.is_pool
            seconds = device.move(move, self.now)
            if move.kind not in ARRIVALS:
                gained += move.bytes
                if seconds:
                    link = away = link + seconds
                continue
            gained -= move.bytes
            if reads:
                slot.ready_at = disk = max(disk, away) + seconds
            else:
                slot.ready_at = link = link + seconds
            end = max(end, slot.ready_at)
            device.hold((move.tenant,), 1)
            self._at(slot.ready_at, "brought", move.tenant)
        if away > self.now and gained > 0:  # nobody may have this room before it is empty
            device.leaving_bytes += gained
            self._at(away, "left", gained)
        if link > self.now:
            device.link_free_at = link
        device.disk_free_at = disk
        return max(end, away)

    def _count(self, move: Move) -> None:
        slot = self.device.slots[move.tenant]
        llm = move.tenant == "chat.weights"
        if move.kind in ARRIVALS:
            self.result.reloads += slot.arrivals > 0
            self.result.llm_reloads += llm and slot.arrivals > 0
            return
        if slot.is_pool and move.kind is Kind.SHRINK:
            return
        self.result.evictions += 1
        self.result.llm_evictions += llm
        if move.tenant == "wan.umt5" and move.bytes == slot.held_bytes:
            self.result.umt5_s += self.now - slot.arrived_at

    def _compute(self, lane: Lane) -> None:
        assert lane.current is not None
        device = self.device
        phase = lane.current.phases[lane.phase]
        lane.taken_bytes = device.take(lane.planned_bytes)
        if device.over_committed():
            self._rescue(lane)
            return
        dice = self._chance.random()
        if dice < self._faults.out_of_memory + self._faults.sticky:
            self.result.injected += 1
            self._end(lane)
            lane.factor = 1.25
            if dice < self._faults.sticky:
                self._die(lane)
            else:
                lane.doing = ""
            return
        device.begin_phase(lane.names, self.now)
        lane.doing = "computing"
        seconds = phase.seconds / self.card.speed
        lane.computed_s += seconds
        self.result.swap_s += lane.streamed_s
        self._at(self.now + seconds + lane.streamed_s, "computed", lane)
        self._look_ahead()

    def _end(self, lane: Lane) -> None:
        """The phase gives back what it took."""
        device = self.device
        device.hold(lane.names, -1)
        device.planned_bytes -= lane.planned_bytes
        device.taken_bytes -= lane.taken_bytes
        device.freed(lane.taken_bytes, self.now)
        lane.planned_bytes = lane.taken_bytes = 0

    def _rescue(self, lane: Lane) -> None:
        """Memory ran out: everything idle goes, once; then the request fails."""
        self._end(lane)
        lane.doing = ""
        if lane.rescued:
            self._refuse(lane)
            return
        lane.rescued = True
        host, seconds = self.device.host_free_bytes, 0.0
        for slot in self.device.slots.values():
            if slot.held_bytes and not slot.users and slot.name not in lane.names:
                parks = slot.size_bytes <= host
                host -= slot.size_bytes if parks else 0
                move = Move(Kind.PARK if parks else Kind.DROP, slot.name, slot.held_bytes)
                self._count(move)
                seconds += self.device.move(move, self.now)
        self.result.swap_s += seconds
        lane.doing = "restarting"
        self._at(self.now + seconds, "restarted", lane)

    def _die(self, lane: Lane) -> None:
        """An error that only a new process gets rid of. No other lane has the engine's tenants."""
        assert lane.current is not None
        self.device.lose(lane.current.engine == "chat", self.now)
        lane.doing = "restarting"
        self._at(self.now + RESTART_S, "restarted", lane)

    def _computed(self, lane: Lane) -> None:
        assert lane.current is not None
        self._end(lane)
        lane.doing, lane.factor, lane.rescued = "", 1.0, False
        lane.phase += 1
        if lane.phase < len(lane.current.phases):
            return
        request = lane.current
        self.result.served += 1
        self.result.waits_s.append(self.now - request.arrived - lane.computed_s)
        lane.current = None
        if not any(other.current or other.waiting for other in self._order):
            self.device.grow_pools()  # nothing else wants the room now

    def _refuse(self, lane: Lane) -> None:
        self.result.refusals += 1
        lane.current, lane.doing, lane.factor, lane.rescued = None, "", 1.0, False

    def _look_ahead(self) -> None:
        """Bring what comes next while the link has nothing to do and something computes."""
        running = [one for one in self._order if one.doing == "computing"]
        if not self.policy.looks_ahead or not running or self.device.link_free_at > self.now:
            return
        peak = min(one.planned_bytes for one in running)
        state = self._state((), peak, self._known(running[0]))
        plan = ahead_of_time(state)
        move = next_to_wake(state) if not plan.moves else None
        moves = plan.moves if move is None else (move,)
        if self.device.disk_free_at <= self.now or all(one.kind is not Kind.LOAD for one in moves):
            self._move_all(moves)


def simulate(
    card: Card, trace: Trace, policies: Sequence[Policy], *, faults: Faults | None = None
) -> Mapping[str, Result]:
    """By policy, everything else being equal."""
    return {
        policy.name: Simulation(card, trace, policy, faults=faults).run() for policy in policies
    }

"""A card that does not exist: its memory, its link and the host memory beside it. Pure, seeded.

What is modelled: allocations in steps of 2 MiB, fragmentation of what a phase takes, a driver whose
free counter is up to 1.5 s late after something is freed, others on the card that take 20 % more
or less from event to event, one link that copies one thing at a time, a disk likewise, and host
memory that can run out. Weights do not change, so a tenant's copy in host memory stays there while
it is resident, until parking something else needs the room; with a copy, parking moves nothing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from worker.vram.policy import ARRIVALS, Kind, Move, Place, Tenant
from worker.vram.traces import (
    FRAGMENTATION,
    GIB,
    KV_FLOOR_BYTES,
    MORE_PARTS,
    NOISE,
    OTHERS_BYTES,
    PARTS,
    Card,
    Trace,
    gib,
)

LAG_S = 1.5  # at most, until the driver shows what was freed
KEPT_USES = 8
KV_REFILL_S = 0.3  # a dropped KV pool comes back empty: prefixes are computed again


class Slot:
    """A tenant as it is. SimDevice changes it; `ready_at` is whoever's that orders the moves."""

    def __init__(self, name: str, size_bytes: int, floor_bytes: int, priority: int):
        self.name = name
        self.model = name.partition(".")[0]
        self.size_bytes = size_bytes
        self.floor_bytes = floor_bytes
        self.priority = priority
        self.place = Place.DISK
        self.held_bytes = 0
        self.copy = False  # a copy of all of it lies in host memory
        self.pinned = False
        self.users = 0  # phases that compute with it, moves of it
        self.ready_at = 0.0
        self.arrived_at = 0.0
        self.arrivals = 0
        self.last_used = 0.0
        self.uses: deque[float] = deque(maxlen=KEPT_USES)
        self.view: Tenant | None = None  # None: changed since it was made

    @property
    def is_pool(self) -> bool:
        return self.floor_bytes < self.size_bytes


class SimDevice:
    """The card, its link and the host memory. Changes only through its methods."""

    def __init__(self, card: Card, trace: Trace, seed: int, *, noise: bool = True):
        self.card = card
        self.slots = {
            name: Slot(name, gib(size), gib(size), int(name == "chat.weights"))
            for name, size in {**PARTS, **(MORE_PARTS if trace.more_parts else {})}.items()
        }
        self.slots["chat.kv"] = Slot("chat.kv", card.kv_bytes, KV_FLOOR_BYTES, 1)
        self.disk_bytes_s = trace.disk_bytes_s
        self.host_bytes = trace.host_bytes
        self.held_bytes = 0
        self.planned_bytes = 0  # of phases
        self.taken_bytes = 0  # of phases, as fragmentation made it
        self.leaving_bytes = 0  # being copied away
        self.link_free_at = 0.0
        self.disk_free_at = 0.0
        self.over_commits = 0
        self._chance = random.Random(f"device {seed}")
        self._noise = noise
        self._others = float(OTHERS_BYTES)
        self._late: deque[tuple[float, int]] = deque()  # freed, and not shown before that time
        self._host_free_bytes: int | None = None  # None: something moved since
        self._park_all()

    def _park_all(self) -> None:
        """As after a start that has read everything that host memory has room for."""
        for slot in self.slots.values():
            if slot.size_bytes <= self.host_free_bytes:
                slot.place, slot.copy = Place.HOST, True
                self._host_free_bytes = None

    @property
    def free_bytes(self) -> int:
        """By the ledger."""
        held = self.held_bytes + self.planned_bytes + self.leaving_bytes
        return self.card.budget_bytes - held

    @property
    def host_free_bytes(self) -> int:
        """Copies of what is resident count as free: they are given up for a parked tenant."""
        if self._host_free_bytes is None:
            parked = (
                slot.size_bytes
                for slot in self.slots.values()
                if slot.copy and slot.held_bytes < slot.floor_bytes
            )
            self._host_free_bytes = self.host_bytes - sum(parked)
        return self._host_free_bytes

    @property
    def used_bytes(self) -> float:
        return self.held_bytes + self.taken_bytes + self.leaving_bytes + self._others

    def driver_free_bytes(self, now: float) -> int:
        while self._late and self._late[0][0] <= now:
            self._late.popleft()
        late = sum(size for _, size in self._late)
        return int(self.card.usable_bytes - self.used_bytes) - late

    def over_committed(self) -> bool:
        """Looks at the card: at every event, and where a phase takes its memory."""
        if self._noise:
            self._others = OTHERS_BYTES * (1 + NOISE * (2 * self._chance.random() - 1))
        over = self.used_bytes > self.card.usable_bytes
        self.over_commits += over
        return over

    def view(self, slot: Slot, keep_alive_s: float) -> Tenant:
        if slot.view is None:
            link_s = slot.size_bytes / self.card.link_bytes_s
            load_s = KV_REFILL_S if slot.is_pool else slot.size_bytes / self.disk_bytes_s
            slot.view = Tenant(
                slot.name, slot.model, slot.size_bytes, slot.place, slot.held_bytes,
                slot.floor_bytes, slot.users > 0, slot.pinned, slot.priority,
                slot.last_used + keep_alive_s, slot.last_used, tuple(slot.uses),
                0.0 if slot.copy else link_s, link_s, load_s,
            )  # fmt: skip
        return slot.view

    def pin(self, name: str) -> float:
        """Bring a tenant to stay; returns the seconds that it takes."""
        slot = self.slots[name]
        slot.pinned = True
        kind = Kind.WAKE if slot.place is Place.HOST else Kind.LOAD
        return self.move(Move(kind, name, slot.size_bytes), 0.0)

    def grow_pools(self) -> None:
        """What was shrunk has its bytes again where they are free."""
        for slot in self.slots.values():
            more = slot.size_bytes - slot.held_bytes
            if slot.is_pool and slot.held_bytes and 0 < more <= self.free_bytes:
                slot.held_bytes += more
                self.held_bytes += more
                slot.view = None

    def hold(self, names: Sequence[str], by: int) -> None:
        for name in names:
            self.slots[name].users += by
            self.slots[name].view = None

    def begin_phase(self, names: Sequence[str], now: float) -> None:
        for name in names:
            slot = self.slots[name]
            slot.last_used = now
            slot.uses.append(now)
            slot.view = None

    def take(self, planned_bytes: int) -> int:
        """A phase's memory beside the tenants; returns what it really takes."""
        share = self._chance.random() if self._noise else 0.0
        least = planned_bytes / (1 + FRAGMENTATION)
        taken = min(planned_bytes, gib(least * (1 + share * FRAGMENTATION) / GIB))
        self.taken_bytes += taken
        return taken

    def freed(self, size_bytes: int, now: float) -> None:
        lag = LAG_S * self._chance.random() if self._noise else 0.0
        visible = max(now + lag, self._late[-1][0] if self._late else 0.0)
        self._late.append((visible, size_bytes))

    def move(self, move: Move, now: float) -> float:
        """Carry it out in the books; returns the seconds it takes on the link."""
        slot = self.slots[move.tenant]
        slot.view = self._host_free_bytes = None
        if move.kind in ARRIVALS:
            return self._bring(slot, move, now)
        slot.held_bytes -= move.bytes
        self.held_bytes -= move.bytes
        self.freed(move.bytes, now)
        if slot.is_pool and move.kind is Kind.SHRINK:
            return 0.0
        if move.kind is Kind.DROP:
            slot.place, slot.copy = Place.DISK, False
            return 0.0
        seconds = 0.0 if slot.copy else move.bytes / self.card.link_bytes_s
        slot.copy = True
        self._make_host_room()
        if not slot.held_bytes:
            slot.place = Place.HOST
        return seconds

    def streaming_s(self, names: Sequence[str]) -> float:
        """How much longer a phase takes whose tenants are streamed, from host memory or disk."""
        disk_bytes = sum(
            one.size_bytes for one in map(self.slots.__getitem__, names) if not one.copy
        )
        return max(self.card.stream_s, disk_bytes / self.disk_bytes_s)

    def stream(self, names: Sequence[str]) -> None:
        """What was read from disk for it stays in host memory where there is room."""
        for slot in (self.slots[name] for name in names):
            if slot.place is Place.DISK and slot.size_bytes <= self.host_free_bytes:
                slot.place, slot.copy, slot.view = Place.HOST, True, None
                self._host_free_bytes = None
                self._make_host_room()

    def _bring(self, slot: Slot, move: Move, now: float) -> float:
        if slot.held_bytes == 0:
            slot.arrived_at = now
        slot.arrivals += 1
        slot.held_bytes += move.bytes
        self.held_bytes += move.bytes
        slot.place = Place.DEVICE
        if slot.is_pool:
            slot.copy = False  # it changes
        if move.kind is Kind.WAKE:
            return move.bytes / self.card.link_bytes_s
        if slot.is_pool:
            return KV_REFILL_S
        copies = sum(one.size_bytes for one in self.slots.values() if one.copy)
        slot.copy = copies + slot.size_bytes <= self.host_bytes
        return move.bytes / min(self.disk_bytes_s, self.card.link_bytes_s)

    def _make_host_room(self) -> None:
        """Copies of what is resident go, of the one used last first: it is parked last."""
        copies = [one for one in self.slots.values() if one.copy]
        too_many = sum(one.size_bytes for one in copies) - self.host_bytes
        for one in sorted(copies, key=lambda one: -one.last_used):
            if too_many > 0 and one.held_bytes >= one.floor_bytes:
                one.copy, one.view = False, None
                too_many -= one.size_bytes

    def lose(self, chat: bool, now: float) -> None:
        """An engine died: what it held, on the device and beside it, is on disk only."""
        self._host_free_bytes = None
        for slot in self.slots.values():
            if (slot.model == "chat") is chat:
                self.held_bytes -= slot.held_bytes
                self.freed(slot.held_bytes, now)
                slot.held_bytes, slot.place, slot.copy, slot.view = 0, Place.DISK, False, None
                slot.arrivals = 0

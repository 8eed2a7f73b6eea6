"""A process that borrows device memory and writes down how much it believes it has.

Started by test_three_processes.py, as `python -m tests.integration.borrower` with the arguments
of `Borrower`. What it borrows is a number: nothing is allocated.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from random import Random

from worker.engine.host import EngineHost, Outbox, Report, Ticket
from worker.engine.leases import Leases, Question
from worker.errors import OutOfDeviceMemory
from worker.lifeline import die_with_any_thread, die_with_parent
from worker.protocol.messages import Message, TenantSpec, Way, Yield
from worker.protocol.transport import socket_path

BUDGET = 1000  # bytes
PROCESS = 20  # that each process takes for itself
SLOTS = 3
WHOLE = BUDGET - SLOTS * PROCESS
WEIGHTS, POOL, POOL_FLOOR = 200, 150, 50
PEAKS = (50, 750)


class Book:
    """What each process believes it has, in a file that all of them map.

    A slot is two words: how often it was written with the bytes, and how much was done. Only its
    process writes it, or the test when that is dead.
    """

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(16 * SLOTS))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("Q")

    def write(self, slot: int, held_bytes: int) -> None:
        written = (self._words[2 * slot] >> 32) + 1
        self._words[2 * slot] = written << 32 | held_bytes  # one store: nobody sees half of it

    def held(self, slot: int) -> int:
        return self._words[2 * slot] & 0xFFFF_FFFF

    def total(self) -> int:
        """What all of them believed to have at one moment: nothing was written between two looks
        that saw the same."""
        while True:
            first = [self._words[2 * slot] for slot in range(SLOTS)]
            if first == [self._words[2 * slot] for slot in range(SLOTS)]:
                return sum(word & 0xFFFF_FFFF for word in first)

    def advance(self, slot: int) -> None:
        self._words[2 * slot + 1] += 1

    def done(self, slot: int) -> int:
        return self._words[2 * slot + 1]

    def close(self) -> None:
        self._words.release()
        self._map.close()


class GaveUp(Exception):
    """Nobody wants the answer any more."""


class Borrower:
    """An engine of one model of two parts. Engine thread only."""

    def __init__(
        self, outbox: Outbox, leases: Leases, book: Book, slot: int, seed: int, *, keeps: bool
    ):
        """keeps: it takes all there is, and does not give it back while it lives."""
        self._outbox = outbox
        self._leases = leases
        self._book = book
        self._slot = slot
        self._random = Random(seed)
        self._keeps = keeps
        self._weights, self._pool = f"m{slot}.weights", f"m{slot}.pool"
        self._held = {self._weights: 0, self._pool: 0}
        self._in_use: tuple[str, ...] = ()
        self._peak_bytes = 0
        self._write()
        sizes = ((self._weights, WEIGHTS, WEIGHTS), (self._pool, POOL, POOL_FLOOR))
        leases.declare(
            f"m{slot}",
            [
                TenantSpec(
                    id=tenant, model=f"m{slot}", size_bytes=size, floor_bytes=floor,
                    host_copy=True, back_s=0.001,
                )
                for tenant, size, floor in sizes
            ],
            self,
        )  # fmt: skip

    # --- what the host asks ---

    def submit(self, ticket: Ticket, message: Message) -> None:
        self._leases.take(message)

    def cancel(self, ticket: Ticket) -> None:
        """Nobody asks it for anything."""

    def report(self) -> Report:
        return Report(status="ready")

    def step(self) -> bool:
        """One phase, or what comes of it."""
        if not self._leases.connected:
            return False
        try:
            ways, least = self._ways(), {}
            if self._pool in ways[0].tenants:
                least[self._pool] = self._random.randint(POOL_FLOOR, POOL)
            with self._leases.phase("job", "phase", ways, self._wait, least_bytes=least) as lease:
                self._compute(lease)
        except (GaveUp, OutOfDeviceMemory):
            return True
        self._book.advance(self._slot)
        self._outbox.wait(self._random.uniform(0.0, 0.004))
        return True

    # --- what the broker asks ---

    def give_back(self, order: Yield) -> int:
        held = self._held[order.tenant]
        if order.kind == "grow":
            self._held[order.tenant] = order.held_bytes if held else 0
        else:
            assert order.kind == "shrink" or order.tenant not in self._in_use, order
            self._held[order.tenant] = min(held, order.held_bytes)
        self._write()
        return self._held[order.tenant]

    # --- what it does ---

    def _ways(self) -> list[Way]:
        if self._keeps:
            return [Way(name="whole", tenants=(), peak_bytes=WHOLE)]
        peak = self._random.randint(*PEAKS)
        tenants = self._random.choice(
            [(self._weights, self._pool), (self._weights,), (self._pool,), ()]
        )
        streamed = Way(name="streamed", tenants=(), peak_bytes=peak + 100, longer_s=0.001)
        return [Way(name="whole", tenants=tenants, peak_bytes=peak), streamed]

    def _wait(self) -> None:
        if not self._keeps and self._random.random() < 0.03:
            raise GaveUp
        self._outbox.wait(0.05)

    def _compute(self, lease: Question) -> None:
        assert lease.granted is not None
        self._in_use, self._peak_bytes = lease.way.tenants, lease.way.peak_bytes
        self._write()
        try:
            for tenant in lease.way.tenants:
                if self._held[tenant] >= lease.asked.least_bytes.get(tenant, 1):
                    continue
                if self._random.random() < 0.1:
                    self._leases.brought(lease, tenant, 0, 0.0)
                    raise GaveUp
                self._held[tenant] = lease.granted.held_bytes[tenant]
                self._write()
                self._leases.brought(lease, tenant, self._held[tenant], 0.001)
            self._outbox.wait(self._random.uniform(0.0, 0.006))
            while self._keeps:
                self._outbox.wait(1.0)
        finally:
            self._in_use, self._peak_bytes = (), 0
            self._write()

    def _write(self) -> None:
        held = PROCESS + self._peak_bytes + sum(self._held.values())
        self._book.write(self._slot, held)


def main(name: str, state_dir: str, book: str, slot: str, seed: str, keeps: str) -> None:
    die_with_parent()
    die_with_any_thread()
    host = EngineHost(socket_path(Path(state_dir), name), name)
    leases = Leases(host.to_broker)
    pages = Book(Path(book))
    host.run(
        lambda outbox: Borrower(
            outbox, leases, pages, int(slot), int(seed), keeps=keeps == "keeps"
        ),
        lambda: "cpu",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""All that the broker keeps, in one place."""

from __future__ import annotations

from worker.vram.ledger import Ledger
from worker.vram.lending.grants import Grants
from worker.vram.lending.moves import Moves
from worker.vram.lending.stories import Stories
from worker.vram.lending.tenants import Tenants
from worker.vram.lending.waiters import Waiters

COUNTERS = (
    "granted", "refused", "withdrawn", "stale", "declined", "parked", "dropped", "shrunk",
    "grown", "brought", "paused", "moved_bytes", "brought_bytes",
)  # fmt: skip


class Books:
    """Who holds what, who waits, who was asked for what. Owner: the broker."""

    def __init__(self, budget_bytes: int):
        self.ledger = Ledger(budget_bytes)
        self.tenants = Tenants()
        self.waiters = Waiters()
        self.grants = Grants(self.ledger, self.tenants)
        self.moves = Moves(self.ledger, self.tenants)
        self.stories = Stories()
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.waited_s = 0.0  # of all grants together
        self.quiet_since = float("-inf")  # when somebody asked or something moved, the last time

    def check(self) -> None:
        """What must hold between two messages. AssertionError says what does not."""
        ledger, tenants = self.ledger, self.tenants
        assert ledger.free_bytes >= 0 or not (ledger.leases or tenants), "over-commit"
        assert all(ledger.held(name) >= 0 for name in tenants), "less than nothing"
        self.grants.check()
        self.moves.check()

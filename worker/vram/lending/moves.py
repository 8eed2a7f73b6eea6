"""Orders to engines that are not answered yet: who was asked to give back what, and for whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.protocol.messages import Stay, Yield
from worker.vram.ledger import Ledger, StaleFence
from worker.vram.lending.tenants import Tenants


@dataclass(slots=True)
class Move:
    tenant: str
    kind: str  # park | drop | shrink | grow
    bytes: int
    requests: tuple[str, ...]  # that it is for
    began: float
    wait: bool = False  # it may be put off until nothing computes with the tenant
    may_stay: bool = False  # and is not needed any more


class Moves:
    """By number. While a tenant has an order it has no other. Owner: the broker."""

    def __init__(self, ledger: Ledger, tenants: Tenants):
        self._ledger = ledger
        self._tenants = tenants
        self._moves: dict[int, Move] = {}
        self._last = 0

    def __bool__(self) -> bool:
        return bool(self._moves)

    def ask_away(
        self, kind: str, tenant: str, size_bytes: int, requests: Sequence[str], now: float,
        *, wait: bool,
    ) -> Yield:  # fmt: skip
        """Ask for bytes of a tenant. wait: once nothing computes with it."""
        self._tenants[tenant].leaving = size_bytes
        held = self._ledger.held(tenant) - size_bytes
        return self._order(Move(tenant, kind, size_bytes, tuple(requests), now, wait), held)

    def grow(self, tenant: str, now: float) -> Yield:
        """Give a tenant its whole size. The caller has seen that the bytes are free."""
        one = self._tenants[tenant]
        missing = one.spec.size_bytes - self._ledger.held(tenant)
        self._ledger.hold(tenant, one.holder, one.spec.size_bytes)
        return self._order(Move(tenant, "grow", missing, (), now), one.spec.size_bytes)

    def grows(self, tenant: str) -> bool:
        """Whether its order is to grow."""
        number = self._tenants[tenant].move
        return number > 0 and self._moves[number].kind == "grow"

    def let_stay(self) -> list[tuple[Move, Stay]]:
        """What was put off is not needed any more. Each is told once."""
        found = []
        for number, move in self._moves.items():
            if move.wait and not move.may_stay:
                move.may_stay = True
                found.append((move, Stay(move=number, tenant=move.tenant)))
        return found

    def answered(self, number: int, tenant: str, holder: str) -> Move:
        """An order was carried out, or was not. Raises StaleFence where it is not under way."""
        move, one = self._moves.get(number), self._tenants.get(tenant)
        if move is None or one is None or move.tenant != tenant or one.holder != holder:
            raise StaleFence(f"move {number} is not under way")
        del self._moves[number]
        one.leaving = one.move = 0
        return move

    def forget(self, tenants: Iterable[str]) -> None:
        """These are gone, and with them what was asked of them."""
        gone = {*tenants}
        self._moves = {n: move for n, move in self._moves.items() if move.tenant not in gone}

    def end_all(self) -> list[str]:
        """As if everybody had done what he was told. Returns the tenants."""
        moved = [move.tenant for move in self._moves.values()]
        for name in moved:
            one = self._tenants[name]
            self._ledger.hold(name, one.holder, self._ledger.held(name) - one.leaving)
            one.leaving = one.move = 0
        self._moves.clear()
        return moved

    def check(self) -> None:
        """Tenants and orders agree."""
        moving = {one.move: name for name, one in self._tenants.items() if one.move}
        asked = {number: move.tenant for number, move in self._moves.items()}
        assert moving == asked, "orders and tenants that move disagree"
        assert all(one.move for one in self._tenants.values() if one.leaving), "nobody asked it"

    def _order(self, move: Move, held_bytes: int) -> Yield:
        self._last += 1
        self._moves[self._last] = move
        self._tenants[move.tenant].move = self._last
        return Yield(
            move=self._last, tenant=move.tenant, kind=move.kind, held_bytes=held_bytes,
            wait=move.wait,
        )  # fmt: skip

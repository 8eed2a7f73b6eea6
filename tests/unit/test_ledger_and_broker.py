"""Who is granted device memory, who is asked to give way, and who is told why it does not go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.leases import Leases
from worker.protocol.messages import (
    Acquire,
    AlsoWaits,
    Brought,
    Declare,
    Granted,
    Hello,
    Message,
    Pause,
    PhaseWays,
    Refused,
    Release,
    Stay,
    TenantSpec,
    Use,
    Way,
    Withdraw,
    Yield,
    Yielded,
)
from worker.vram.broker import DECLINED_S, Broker, Order
from worker.vram.dryrun import dry_run
from worker.vram.ledger import Ledger, OverCommit, StaleFence
from worker.vram.lending.grants import PAUSE_AFTER_S
from worker.vram.lending.service import GROW_AFTER_S
from worker.vram.lending.waiters import PATIENCE_S
from worker.vram.order import MAX_HELD_S, MAX_OVERTAKEN

GIB = 2**30


def spec(
    tenant: str,
    size_gib: int,
    *,
    floor_gib: int | None = None,
    pinned: bool = False,
    host_copy: bool = True,
    back_s: float = 1.0,
) -> TenantSpec:
    return TenantSpec(
        id=tenant, model=tenant.partition(".")[0], size_bytes=size_gib * GIB,
        floor_bytes=(size_gib if floor_gib is None else floor_gib) * GIB, host_copy=host_copy,
        pinned=pinned, back_s=back_s,
    )  # fmt: skip


def way(tenants: str = "", peak_gib: int = 0, *, name: str = "whole", longer_s: float = 0.0) -> Way:
    return Way(
        name=name, tenants=tuple(tenants.split()), peak_bytes=peak_gib * GIB, longer_s=longer_s
    )


class Card:
    """A broker with a clock by hand. The test plays the engines; requests are called by their ids.

    What the broker tells is given back as lines, such as "chat: park chat.weights", and
    "chat: wait, park chat.weights" where it shall be done when what uses it has ended.
    """

    def __init__(self, budget_gib: int = 10, engines: Sequence[str] = ("chat", "media")):
        self.broker = Broker(budget_gib * GIB)
        self.now = 1000.0
        self.epochs = {name: self.broker.join(name, 0) for name in engines}
        self.grants: dict[str, Granted] = {}
        self.refusals: dict[str, str] = {}
        self.granted_in_order: list[str] = []
        self.orders: dict[str, Yield] = {}  # the last one about a tenant
        self._holders: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._specs: dict[str, TenantSpec] = {}

    @property
    def free_gib(self) -> float:
        return self.broker.ledger.free_bytes / GIB

    def held_gib(self, tenant: str) -> float:
        return self.broker.ledger.held(tenant) / GIB

    def state(self) -> Any:
        """All that a message could change, but the counters."""
        broker = self.broker
        return broker.tenants(), broker.leases(0.0), broker.waiting(0.0), broker.ledger.free_bytes

    # --- what engines say ---

    def say(self, holder: str, message: Message) -> list[str]:
        return self._hear(self.broker.take(holder, message, self.now))

    def declare(self, holder: str, *specs: TenantSpec) -> list[str]:
        self._specs |= {one.id: one for one in specs}
        return self.say(
            holder, Declare(epoch=self.epochs[holder], model=specs[0].model, tenants=specs)
        )

    def unload(self, holder: str, model: str) -> list[str]:
        return self.say(holder, Declare(epoch=self.epochs[holder], model=model, tenants=()))

    def ask(self, holder: str, request: str, *ways: Way, **more: Any) -> list[str]:
        self._holders[request] = holder
        self._numbers[request] = len(self._numbers) + 1
        return self.say(
            holder,
            Acquire(
                epoch=self.epochs[holder], number=self._numbers[request], request_id=request,
                phase="denoise", ways=ways, **more,
            ),
        )  # fmt: skip

    def also(self, request: str, other: str) -> list[str]:
        holder, number = self._holders[request], self._numbers[request]
        return self.say(
            holder, AlsoWaits(epoch=self.epochs[holder], number=number, request_id=other)
        )

    def withdraw(self, request: str) -> list[str]:
        holder, number = self._holders[request], self._numbers[request]
        return self.say(holder, Withdraw(epoch=self.epochs[holder], number=number))

    def bring(self, request: str, tenant: str, held_gib: int | None = None) -> list[str]:
        """0 GiB: it could not be brought; None: as it was granted."""
        grant = self.grants[request]
        held = grant.held_bytes[tenant] if held_gib is None else held_gib * GIB
        seconds = self._specs[tenant].back_s if held else 0.0
        return self.say(
            self._holders[request],
            Brought(
                epoch=self.epochs[self._holders[request]],
                fence=grant.fence,
                tenant=tenant,
                held_bytes=held,
                seconds=seconds,
            ),
        )

    def use(self, request: str, *, busy: bool) -> list[str]:
        return self.say(
            self._holders[request],
            Use(
                epoch=self.epochs[self._holders[request]],
                fence=self.grants[request].fence,
                busy=busy,
            ),
        )

    def release(self, request: str) -> list[str]:
        return self.say(
            self._holders[request],
            Release(epoch=self.epochs[self._holders[request]], fence=self.grants[request].fence),
        )

    def give(self, holder: str, tenant: str, held_gib: int | None = None) -> list[str]:
        """Answer the last order about a tenant; None: as it was asked."""
        order = self.orders[tenant]
        held = order.held_bytes if held_gib is None else held_gib * GIB
        return self.say(holder, self.yielded(holder, order.move, tenant, held))

    def give_unasked(self, holder: str, tenant: str, held_gib: int) -> list[str]:
        return self.say(holder, self.yielded(holder, 0, tenant, held_gib * GIB))

    def yielded(self, holder: str, move: int, tenant: str, held_bytes: int) -> Yielded:
        return Yielded(
            epoch=self.epochs[holder], move=move, tenant=tenant, held_bytes=held_bytes, seconds=0.1
        )

    # --- what is not said ---

    def after(self, seconds: float) -> list[str]:
        self.now += seconds
        return self._hear(self.broker.tick(self.now))

    def die(self, holder: str) -> list[str]:
        return self._hear(self.broker.leave(holder, self.now))

    def begin(self, holder: str) -> None:
        self.epochs[holder] = self.broker.join(holder, 0)

    # --- where a test begins ---

    def resident(self, holder: str, *specs: TenantSpec) -> None:
        """A model's tenants are on the device, and idle."""
        self.standing(holder, f"load {specs[0].model}", *specs)
        self.release(f"load {specs[0].model}")

    def standing(self, holder: str, request: str, *specs: TenantSpec) -> None:
        """A model's tenants are on the device under a standing lease that is not used now."""
        self.declare(holder, *specs)
        self.ask(holder, request, way(" ".join(one.id for one in specs)), standing=True)
        for one in specs:
            self.bring(request, one.id)
        self.use(request, busy=False)

    def _hear(self, orders: list[Order]) -> list[str]:
        self.broker.check()
        return [f"{holder}: {self._line(holder, message)}" for holder, message in orders]

    def _line(self, holder: str, message: Message) -> str:
        match message:
            case Granted(number=number):
                request = self._request(number)
                self.grants[request] = message
                self.granted_in_order.append(request)
                return f"granted {request}"
            case Refused(number=number, error=error):
                self.refusals[self._request(number)] = error
                return f"refused {self._request(number)}"
            case Yield(kind=kind, tenant=tenant, wait=wait):
                self.orders[tenant] = message
                return f"{'wait, ' if wait else ''}{kind} {tenant}"
            case Stay(tenant=tenant, move=move):
                assert self.orders[tenant].move == move
                return f"stay {tenant}"
            case Pause(fence=fence):
                paused = next(name for name, one in self.grants.items() if one.fence == fence)
                return f"pause {paused}"
        raise AssertionError(f"an engine is not told this: {message}")

    def _request(self, number: int) -> str:
        return next(request for request, one in self._numbers.items() if one == number)


@pytest.fixture
def card() -> Card:
    """10 GiB, for a chat engine and a media engine."""
    return Card()


# --- the ledger -----------------------------------------------------------------------------------


def test_a_ledger_counts_processes_tenants_and_phases() -> None:
    ledger = Ledger(10)
    ledger.join("chat", 1)
    ledger.hold("weights", "chat", 4)
    lease = ledger.open("chat", ("weights",), 2)

    assert ledger.free_bytes == 3
    assert (ledger.held("weights"), ledger.held("another")) == (4, 0)
    assert (ledger.held_by("chat"), ledger.held_by("media")) == (6, 0)
    assert ledger.leases == (lease,)
    assert ledger.lease(lease.fence, "chat") == lease


def test_a_ledger_refuses_more_than_is_free_and_stays_as_it_was() -> None:
    ledger = Ledger(10)
    ledger.hold("weights", "chat", 6)

    with pytest.raises(OverCommit, match="5 bytes more, 4 are free"):
        ledger.hold("unet", "media", 5)
    with pytest.raises(OverCommit, match="5 bytes, 4 are free"):
        ledger.open("media", (), 5)
    with pytest.raises(OverCommit):
        ledger.hold("weights", "chat", 11)

    assert (ledger.free_bytes, ledger.leases) == (4, ())
    ledger.hold("weights", "chat", 10)
    assert ledger.free_bytes == 0


def test_where_processes_take_more_than_there_is_nothing_is_granted_but_things_shrink() -> None:
    ledger = Ledger(10)
    ledger.hold("weights", "chat", 6)
    ledger.join("media", 5)

    assert ledger.free_bytes == -1
    assert ledger.open("media", (), 0).peak_bytes == 0
    with pytest.raises(OverCommit):
        ledger.open("media", (), 1)
    ledger.hold("weights", "chat", 5)
    assert ledger.free_bytes == 0


def test_fencing_numbers_rise_and_are_never_used_twice() -> None:
    ledger = Ledger(10)

    first, second = ledger.open("chat", (), 1), ledger.open("chat", (), 1)
    ledger.close(second.fence)
    third = ledger.open("media", (), 1)
    ledger.leave("media")
    fourth = ledger.open("media", (), 1)

    fences = [one.fence for one in (first, second, third, fourth)]
    assert all(before < after for before, after in pairwise(fences))


def test_a_lease_is_void_for_everyone_but_its_holder_and_after_its_end() -> None:
    ledger = Ledger(10)
    lease = ledger.open("chat", (), 1)

    with pytest.raises(StaleFence):
        ledger.lease(lease.fence, "media")
    ledger.close(lease.fence)
    with pytest.raises(StaleFence):
        ledger.lease(lease.fence, "chat")


def test_everything_of_a_process_that_ends_is_free_again() -> None:
    ledger = Ledger(10)
    ledger.join("chat", 0)
    ledger.hold("weights", "chat", 4)
    ledger.hold("unet", "media", 1)
    lease = ledger.open("chat", ("weights",), 2)

    assert ledger.leave("chat") == (lease,)
    assert ledger.free_bytes == 9
    assert ledger.leave("chat") == ()


# --- grants ---------------------------------------------------------------------------------------


def test_what_fits_is_granted_at_once(card: Card) -> None:
    card.declare("media", spec("sdxl.unet", 4))

    told = card.ask("media", "job", way("sdxl.unet", 3))

    assert told == ["media: granted job"]
    assert card.grants["job"].held_bytes == {"sdxl.unet": 4 * GIB}
    assert card.free_gib == 3


def test_a_phase_without_tenants_takes_its_peak_and_gives_it_back(card: Card) -> None:
    assert card.ask("media", "job", way(peak_gib=10)) == ["media: granted job"]
    assert card.ask("chat", "talk", way(peak_gib=1)) == []

    assert card.release("job") == ["chat: granted talk"]
    card.release("talk")
    assert card.free_gib == 10


def test_a_tenant_stays_after_its_phase_and_the_next_one_finds_it(card: Card) -> None:
    card.resident("media", spec("sdxl.unet", 4))

    card.ask("media", "job", way("sdxl.unet", 6))

    assert card.broker.explain("job")[-1]["to_bring"] == []  # type: ignore[index]
    assert card.held_gib("sdxl.unet") == 4


def test_the_cheapest_idle_tenant_is_asked_and_the_grant_comes_after_it_has_yielded(
    card: Card,
) -> None:
    card.resident("chat", spec("large.weights", 5, back_s=3.0))
    card.resident("chat", spec("small.weights", 4, back_s=0.5))

    assert card.ask("media", "job", way(peak_gib=3)) == ["chat: park small.weights"]
    assert card.orders["small.weights"].held_bytes == 0
    for _ in range(20):  # it takes two seconds to park, and nobody else is bothered meanwhile
        assert card.after(0.1) == []
    assert card.held_gib("small.weights") == 4  # it is still its own

    assert card.give("chat", "small.weights") == ["media: granted job"]
    assert card.free_gib == 2


def test_what_has_no_copy_in_host_memory_is_dropped(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 8, host_copy=False))

    assert card.ask("media", "job", way(peak_gib=3)) == ["chat: drop qwen.weights"]


def test_several_are_asked_where_one_does_not_suffice_and_all_have_to_answer(card: Card) -> None:
    card.resident("chat", spec("a.weights", 5))
    card.resident("chat", spec("b.weights", 5))

    assert card.ask("media", "job", way(peak_gib=8)) == [
        "chat: park a.weights", "chat: park b.weights"
    ]  # fmt: skip
    assert card.give("chat", "b.weights") == []
    assert card.give("chat", "a.weights") == ["media: granted job"]


def test_a_way_that_needs_no_victim_is_taken_before_one_that_costs_more_seconds(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 8, back_s=3.0))
    card.declare("media", spec("sdxl.vae", 1))
    whole = way("sdxl.vae", 6)

    told = card.ask("media", "job", whole, way("sdxl.vae", 1, name="tiled", longer_s=0.5))
    assert told == ["media: granted job"]
    assert card.grants["job"].way == 1
    card.release("job")

    told = card.ask("media", "slow", whole, way("sdxl.vae", 1, name="tiled", longer_s=60.0))
    assert told == ["chat: park qwen.weights"]


def test_a_tenant_that_leaves_is_brought_again_for_whoever_asks_for_it(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.ask("media", "job", way(peak_gib=8))

    told = card.ask("chat", "talk", way("qwen.weights", 1), priority=1)
    assert told == []  # it is not granted what is on its way out
    told = card.give("chat", "qwen.weights")

    assert told == ["chat: granted talk"]
    assert card.broker.explain("talk")[-1]["to_bring"] == ["qwen.weights"]  # type: ignore[index]


def test_a_tenant_that_leaves_for_nobody_any_more_is_granted_only_when_it_has_left(
    card: Card,
) -> None:
    card.resident("chat", spec("qwen.weights", 4))
    card.ask("media", "job", way(peak_gib=8))
    card.withdraw("job")

    assert card.ask("chat", "talk", way("qwen.weights")) == []
    assert card.give("chat", "qwen.weights") == ["chat: granted talk"]
    assert card.held_gib("qwen.weights") == 4
    assert card.broker.explain("talk")[-1]["to_bring"] == ["qwen.weights"]  # type: ignore[index]


def test_a_tenant_that_could_not_be_brought_is_not_counted(card: Card) -> None:
    card.declare("media", spec("sdxl.unet", 4))
    card.ask("media", "job", way("sdxl.unet", 3))

    card.bring("job", "sdxl.unet", 0)
    card.release("job")

    assert card.free_gib == 10


def test_a_question_about_a_tenant_of_nobody_or_of_another_is_refused_by_name(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 4))

    assert card.ask("media", "job", way("qwen.weights sdxl.unet")) == ["media: refused job"]
    assert card.refusals["job"] == "not declared: qwen.weights, sdxl.unet"
    assert card.ask("media", "empty") == ["media: refused empty"]
    assert card.broker.waiting(card.now) == []


# --- what is in use -------------------------------------------------------------------------------


def test_a_standing_lease_in_use_is_not_taken(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    card.use("lane", busy=True)

    assert card.ask("media", "job", way(peak_gib=8)) == []
    assert card.after(PATIENCE_S - 0.1) == []
    assert "in use by denoise of lane" in card.broker.waiting(card.now)[0]["why"]

    assert card.use("lane", busy=False) == ["chat: park qwen.weights"]
    assert card.give("chat", "qwen.weights") == ["media: granted job"]


def test_a_standing_lease_begins_and_ends_its_use_without_a_question(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    before = card.broker.counters["granted"]

    for _ in range(100):
        assert card.use("lane", busy=True) == []
        assert card.use("lane", busy=False) == []

    assert card.broker.counters["granted"] == before


def test_a_declined_tenant_is_asked_again_but_not_at_once(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    assert card.ask("media", "job", way(peak_gib=8)) == ["chat: park qwen.weights"]

    # Its engine began to compute before the order came.
    assert card.use("lane", busy=True) == []
    assert card.give("chat", "qwen.weights", 6) == []
    assert card.use("lane", busy=False) == []  # it is idle again, and left alone all the same
    told = [line for _ in range(9) for line in card.after(DECLINED_S / 10)]

    assert told == []
    assert card.after(DECLINED_S / 10 + 0.01) == ["chat: park qwen.weights"]
    assert card.broker.counters["declined"] == 1
    assert card.give("chat", "qwen.weights") == ["media: granted job"]


def test_whoever_waits_too_long_has_the_lease_in_use_asked_to_end(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=8))
    card.after(PATIENCE_S - 0.1)

    assert card.after(0.1) == ["chat: wait, park qwen.weights"]
    assert [line for _ in range(50) for line in card.after(0.1)] == []
    assert card.use("lane", busy=False) == []
    assert card.give("chat", "qwen.weights") == ["media: granted job"]

    # The lease ended with its tenant: what is said with it now means nothing.
    stale = card.broker.counters["stale"]
    card.use("lane", busy=True)
    assert card.broker.counters["stale"] == stale + 1


def test_the_tenants_of_a_phase_in_use_are_never_taken(card: Card) -> None:
    card.declare("media", spec("sdxl.unet", 4))
    card.ask("media", "job", way("sdxl.unet", 4))
    card.bring("job", "sdxl.unet")

    assert card.ask("chat", "talk", way(peak_gib=3), priority=9) == []
    for _ in range(30):
        assert card.after(MAX_HELD_S / 10) == []

    assert card.release("job") == ["chat: granted talk"]


def test_work_that_can_be_paused_is_for_somebody_more_urgent_and_goes_on_after_it(
    card: Card,
) -> None:
    card.declare("media", spec("wan.transformer", 4))
    card.ask("media", "film", way("wan.transformer", 4), pausable=True)
    card.bring("film", "wan.transformer")

    assert card.ask("chat", "talk", way(peak_gib=8), priority=1) == []  # a stretch of work first
    assert card.after(PAUSE_AFTER_S) == ["media: pause film"]
    assert card.after(PAUSE_AFTER_S) == []  # once
    assert card.release("film") == ["media: park wan.transformer"]
    assert card.give("media", "wan.transformer") == ["chat: granted talk"]
    assert card.ask("media", "rest of the film", way("wan.transformer", 4), pausable=True) == []
    assert card.release("talk") == ["media: granted rest of the film"]
    assert card.broker.counters["paused"] == 1


def test_work_is_not_paused_for_its_equals_nor_where_there_is_room(card: Card) -> None:
    card.declare("media", spec("wan.transformer", 4))
    card.ask("media", "film", way("wan.transformer", 4), pausable=True)
    card.bring("film", "wan.transformer")
    card.after(PAUSE_AFTER_S)

    assert card.ask("chat", "small talk", way(peak_gib=2), priority=9) == [
        "chat: granted small talk"
    ]
    assert card.ask("chat", "talk", way(peak_gib=8), priority=0) == []
    assert card.after(PAUSE_AFTER_S) == []


def test_a_pinned_tenant_is_never_taken(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 4, pinned=True))
    card.resident("chat", spec("other.weights", 4, back_s=100.0))

    assert card.ask("media", "job", way(peak_gib=5)) == ["chat: park other.weights"]
    card.give("chat", "other.weights")
    card.release("job")

    assert card.ask("media", "large", way(peak_gib=7)) == ["media: refused large"]
    assert card.refusals["large"].endswith("; pinned: qwen.weights")


# --- pools ----------------------------------------------------------------------------------------


def test_a_pool_in_use_shrinks_to_its_floor_and_grows_back_when_it_is_quiet(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)

    assert card.ask("media", "job", way(peak_gib=7)) == ["chat: wait, shrink qwen.pool"]
    assert card.orders["qwen.pool"].held_bytes == 2 * GIB
    assert card.give("chat", "qwen.pool") == ["media: granted job"]
    assert card.after(10 * GROW_AFTER_S) == []  # there is no room
    card.release("job")

    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]
    assert card.orders["qwen.pool"].held_bytes == 6 * GIB
    assert card.held_gib("qwen.pool") == 6  # it may take them from now on, so nobody else may
    assert card.give("chat", "qwen.pool") == []
    assert card.after(10 * GROW_AFTER_S) == []
    assert card.broker.counters["grown"] == 1
    assert card.use("lane", busy=False) == []  # its lease was never touched


def test_a_pool_does_not_grow_while_somebody_asks_or_waits(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool")
    card.release("job")

    for number in range(5):
        assert card.after(0.9 * GROW_AFTER_S) == []
        card.ask("media", f"next {number}", way(peak_gib=1))
        card.release(f"next {number}")

    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]


def test_a_pool_that_could_not_grow_is_counted_as_it_is_and_tried_again(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool", 2)
    card.release("job")
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]

    card.give("chat", "qwen.pool", 2)

    assert (card.held_gib("qwen.pool"), card.free_gib) == (2, 8)
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]


def test_a_pool_that_was_gone_when_it_was_to_grow_takes_its_lease_with_it(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool", 2)
    card.release("job")
    card.after(GROW_AFTER_S)

    card.give("chat", "qwen.pool", 0)

    assert card.broker.leases(card.now) == []
    assert card.free_gib == 10


def test_a_pool_in_use_is_never_taken_below_its_floor(card: Card) -> None:
    card.declare("media", spec("wan.cache", 6, floor_gib=2))
    card.ask("media", "job", way("wan.cache"))
    card.bring("job", "wan.cache")

    assert card.ask("chat", "talk", way(peak_gib=9)) == []
    for _ in range(30):
        assert card.after(MAX_HELD_S / 10) == []
    card.withdraw("talk")
    assert card.ask("chat", "shorter", way(peak_gib=8)) == ["media: wait, shrink wan.cache"]
    card.give("media", "wan.cache")
    assert card.ask("chat", "another", way(peak_gib=1)) == []  # what is left is the floor

    assert card.release("job") == ["media: park wan.cache"]


def test_a_pool_comes_at_its_floor_where_more_would_cost_somebody_else_his_place(
    card: Card,
) -> None:
    card.resident("media", spec("sdxl.unet", 5))
    card.declare("chat", spec("qwen.pool", 6, floor_gib=2))

    assert card.ask("chat", "lane", way("qwen.pool")) == ["chat: granted lane"]
    assert card.grants["lane"].held_bytes == {"qwen.pool": 2 * GIB}


# --- room for a request that a shrunk pool is too small for ---------------------------------------


def shrunk(card: Card) -> None:
    """A pool of 6 GiB in use that has 2, beside a job of 7 of the 10."""
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool")


def ask_for_room(card: Card, request: str, least_gib: int) -> list[str]:
    least = {"qwen.pool": least_gib * GIB}
    return card.ask("chat", request, way("qwen.pool"), least_bytes=least, priority=1)


def test_room_is_had_as_soon_as_the_bytes_are_free_not_when_it_is_quiet(card: Card) -> None:
    shrunk(card)
    assert ask_for_room(card, "long", 5) == []
    assert card.ask("media", "next", way(peak_gib=7)) == []

    assert card.release("job") == ["chat: granted long"]
    assert card.grants["long"].held_bytes == {"qwen.pool": 6 * GIB}  # whole, for it costs nothing
    assert card.held_gib("qwen.pool") == 6
    # The next job comes after it, and has the pool shrink again as far as its engine lets it.
    assert card.bring("long", "qwen.pool") == []
    assert card.release("long") == ["chat: wait, shrink qwen.pool"]
    assert card.broker.counters["grown"] == 0


def test_room_is_no_more_than_is_needed_where_others_would_have_to_go(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool")
    card.release("job")
    card.resident("media", spec("sdxl.unet", 5))

    assert ask_for_room(card, "long", 5) == ["chat: granted long"]
    assert card.grants["long"].held_bytes == {"qwen.pool": 5 * GIB}
    card.bring("long", "qwen.pool")
    card.release("long")
    assert ask_for_room(card, "longer", 6) == ["media: park sdxl.unet"]
    assert card.give("media", "sdxl.unet") == ["chat: granted longer"]


def test_room_that_could_not_be_brought_goes_back(card: Card) -> None:
    shrunk(card)
    ask_for_room(card, "long", 5)
    card.release("job")

    card.bring("long", "qwen.pool", 0)
    card.release("long")

    assert (card.held_gib("qwen.pool"), card.free_gib) == (2, 8)
    assert card.use("lane", busy=False) == []  # its lease was never touched


def test_room_that_could_not_be_brought_is_not_left_to_a_lease_that_is_older(card: Card) -> None:
    """Its pool counted as on its way for ever, and was never shrunk nor grown again."""
    card.declare("chat", spec("qwen.pool", 6, floor_gib=2))
    least = {"qwen.pool": 5 * GIB}
    card.ask("chat", "lane", way("qwen.pool"), least_bytes=least, standing=True)
    card.bring("lane", "qwen.pool")
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool", 2)
    ask_for_room(card, "long", 5)
    card.release("job")

    card.bring("long", "qwen.pool", 0)
    card.release("long")

    assert card.held_gib("qwen.pool") == 2
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]


def test_room_that_is_there_already_stays_until_the_engine_knows_it(card: Card) -> None:
    """Its engine had not heard of the grant when it was told to shrink, and grew afterwards."""
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)
    assert ask_for_room(card, "long", 5) == ["chat: granted long"]

    assert card.ask("media", "job", way(peak_gib=7)) == []
    assert card.release("long") == ["chat: wait, shrink qwen.pool"]


def test_a_pool_that_goes_while_room_is_on_its_way_takes_the_older_lease_with_it(
    card: Card,
) -> None:
    shrunk(card)
    ask_for_room(card, "long", 5)
    card.release("job")
    assert card.broker.arriving_bytes("qwen.pool") == 4 * GIB

    card.give_unasked("chat", "qwen.pool", 0)

    assert [one["request_id"] for one in card.broker.leases(card.now)] == ["long"]
    assert card.held_gib("qwen.pool") == 4  # that it is still to bring
    card.release("long")
    assert card.free_gib == 10


def test_what_is_there_before_more_of_it_comes_does_not_take_that_away(card: Card) -> None:
    """The older lease said what it had brought, and the room that came after it was forgotten."""
    card.declare("chat", spec("qwen.pool", 6, floor_gib=2))
    card.ask("media", "job", way(peak_gib=8))
    card.ask("chat", "lane", way("qwen.pool"), standing=True)
    card.release("job")
    ask_for_room(card, "long", 5)
    assert card.grants["lane"].held_bytes == {"qwen.pool": 2 * GIB}
    assert card.grants["long"].held_bytes == {"qwen.pool": 6 * GIB}

    card.bring("lane", "qwen.pool")
    assert card.held_gib("qwen.pool") == 6
    card.bring("long", "qwen.pool")
    assert card.held_gib("qwen.pool") == 6


def test_room_that_is_not_wanted_any_more_moves_nothing(card: Card) -> None:
    shrunk(card)
    ask_for_room(card, "long", 5)

    assert card.withdraw("long") == ["chat: refused long"]
    assert card.release("job") == []
    assert card.held_gib("qwen.pool") == 2
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]


def test_room_that_can_never_be_is_refused_with_the_numbers(card: Card) -> None:
    card.resident("media", spec("wan.dit", 5, pinned=True))
    card.standing("chat", "lane", spec("qwen.weights", 2), spec("qwen.pool", 6, floor_gib=2))

    # 10 with 5 that are pinned and 2 of the model's own weights, which its pool is nothing without.
    told = card.ask(
        "chat", "long", way("qwen.weights qwen.pool"), least_bytes={"qwen.pool": 4 * GIB}
    )

    assert told == ["chat: refused long"]
    assert "needs 2.00 GiB more, and 1.00 GiB of 10.00 GiB" in card.refusals["long"]


def test_more_than_a_pool_ever_has_is_refused(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))

    assert ask_for_room(card, "long", 7) == ["chat: refused long"]
    assert ask_for_room(card, "short", 6) == ["chat: granted short"]


def test_whoever_waits_for_room_has_work_paused_and_lanes_ended_like_everybody(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)
    card.declare("media", spec("wan.dit", 5))
    card.ask("media", "film", way("wan.dit", 2), pausable=True)
    card.give("chat", "qwen.pool")
    card.bring("film", "wan.dit")

    assert ask_for_room(card, "long", 6) == []
    assert card.after(PAUSE_AFTER_S) == ["media: pause film"]
    assert card.release("film") == ["media: park wan.dit"]
    assert card.give("media", "wan.dit") == ["chat: granted long"]


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 30.0)), min_size=4, max_size=12),
    least_gib=st.integers(3, 6),
    comes_in=st.integers(0, 3),
)
def test_a_long_request_waits_for_what_runs_and_for_nothing_that_comes_after_it(
    jobs: list[tuple[int, float]], least_gib: int, comes_in: int
) -> None:
    """Jobs follow each other without a pause, so that it is never quiet."""
    card = Card()
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.use("lane", busy=True)

    def hear(told: list[str]) -> None:
        """The pool does what it is told, but keeps what a request was promised."""
        for line in told:
            if line.endswith(("shrink qwen.pool", "grow qwen.pool")):
                kept = least_gib if "long" in card.grants else 2
                held = max(kept, card.orders["qwen.pool"].held_bytes // GIB)
                hear(card.give("chat", "qwen.pool", held))
            if line == "chat: granted long":
                assert card.grants["long"].held_bytes["qwen.pool"] >= least_gib * GIB
                hear(card.bring("long", "qwen.pool"))
                hear(card.release("long"))
        assert card.free_gib >= 0

    for number, (peak_gib, seconds) in enumerate(jobs):
        name = f"job {number}"
        hear(card.ask("media", name, way(peak_gib=peak_gib)))
        hear(card.after(seconds / 2))
        if number == comes_in:
            hear(ask_for_room(card, "long", least_gib))
        hear(card.after(seconds / 2))
        hear(card.release(name) if name in card.grants else card.withdraw(name))

    came_before = {f"job {number}" for number in range(comes_in + 1)}
    served = card.granted_in_order[: card.granted_in_order.index("long")]
    assert {*served} <= came_before | {"lane"}


# --- refusals -------------------------------------------------------------------------------------


def test_what_would_not_fit_with_everything_idle_is_refused_with_the_numbers(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 3, pinned=True))
    card.standing("chat", "lane", spec("other.weights", 2))
    card.use("lane", busy=True)
    card.ask("media", "running", way(peak_gib=1))
    card.declare("media", spec("wan.dit", 5))

    # 10 with 3 that are pinned: 7, whatever runs now.
    assert card.ask("media", "job", way("wan.dit", 3)) == ["media: refused job"]
    assert card.refusals["job"] == (
        "denoise (whole) needs 8.00 GiB more, and 7.00 GiB of 10.00 GiB are reachable with "
        "everything moved that may be; pinned: qwen.weights"
    )
    assert card.broker.counters["refused"] == 1
    assert card.ask("media", "less", way("wan.dit", 2)) == []  # that waits


def test_what_leaves_for_another_is_reachable(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.ask("media", "running", way(peak_gib=3))
    card.ask("media", "job", way(peak_gib=4))

    # 10, once the job that runs is over and the weights have left.
    assert card.ask("chat", "talk", way(peak_gib=10), priority=1) == []
    assert card.ask("chat", "large", way(peak_gib=11), priority=2) == ["chat: refused large"]


def test_a_refusal_names_the_way_that_lacks_the_least(card: Card) -> None:
    assert card.ask(
        "media", "job", way(peak_gib=20), way(peak_gib=12, name="tiled"), way(peak_gib=15)
    ) == ["media: refused job"]

    assert card.refusals["job"] == (
        "denoise (tiled) needs 12.00 GiB more, and 10.00 GiB of 10.00 GiB are reachable with "
        "everything moved that may be"
    )


def test_what_processes_take_for_themselves_is_not_reachable() -> None:
    card = Card()
    card.broker.join("other", 2 * GIB)

    assert card.ask("media", "job", way(peak_gib=9)) == ["media: refused job"]
    assert "8.00 GiB of 10.00 GiB are reachable" in card.refusals["job"]


def test_nobody_waits_for_ever_for_the_peak_of_a_standing_lease_that_is_idle(card: Card) -> None:
    card.ask("chat", "lane", way(peak_gib=6), standing=True)
    if "lane" in card.grants:
        card.use("lane", busy=False)

    card.ask("media", "job", way(peak_gib=8))
    card.after(PATIENCE_S)
    card.after(MAX_HELD_S)

    assert card.broker.waiting(card.now) == []


# --- the order ------------------------------------------------------------------------------------


def serve_all(card: Card) -> list[str]:
    """Let each request end as soon as it was granted; in which order they were."""
    served = 0
    while served < len(card.granted_in_order):
        card.release(card.granted_in_order[served])
        served += 1
    return card.granted_in_order


def test_the_first_to_come_is_the_first_to_be_served(card: Card) -> None:
    for number in range(6):
        card.ask(("chat", "media")[number % 2], f"r{number}", way(peak_gib=8))
        card.after(0.1)

    assert serve_all(card) == [f"r{number}" for number in range(6)]


def test_a_higher_priority_is_served_first(card: Card) -> None:
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "next", way(peak_gib=8))
    card.ask("chat", "talk", way(peak_gib=8), priority=1)
    card.ask("chat", "more", way(peak_gib=8), priority=1)

    assert serve_all(card) == ["job", "talk", "more", "next"]


def test_whoever_is_next_keeps_his_place_when_a_smaller_one_would_fit(card: Card) -> None:
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "large", way(peak_gib=8))

    assert card.ask("chat", "small", way(peak_gib=1)) == []
    assert card.release("job") == ["media: granted large", "chat: granted small"]


def test_nobody_is_overtaken_more_often_than_the_bound(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 2))
    card.declare("media", spec("wan.dit", 5))
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "cold", way("wan.dit", 1))
    warm = [f"talk {number}" for number in range(MAX_OVERTAKEN + 4)]
    for request in warm:
        card.ask("chat", request, way("qwen.weights", 8))

    card.release("job")
    for number in range(MAX_OVERTAKEN):
        assert card.granted_in_order[-1] == warm[number]
        card.release(warm[number])

    assert card.granted_in_order[-1] == "cold"


def test_whoever_has_waited_very_long_is_not_overtaken_any_more(card: Card) -> None:
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "old", way(peak_gib=8))
    card.after(MAX_HELD_S)
    card.ask("chat", "talk", way(peak_gib=8), priority=5)

    assert serve_all(card)[-2:] == ["old", "talk"]


# --- withdrawals ----------------------------------------------------------------------------------


def test_a_question_that_is_withdrawn_while_it_waits_loads_nothing(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 8))
    card.declare("media", spec("sdxl.unet", 4))
    assert card.ask("media", "job", way("sdxl.unet")) == ["chat: park qwen.weights"]

    assert card.withdraw("job") == ["media: refused job"]
    assert card.give("chat", "qwen.weights") == []

    assert card.free_gib == 10
    assert card.broker.counters["withdrawn"] == 1
    assert "job" not in card.granted_in_order


def test_a_question_that_is_withdrawn_lets_the_next_one_through(card: Card) -> None:
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "large", way(peak_gib=8))
    card.ask("chat", "small", way(peak_gib=2))

    assert card.withdraw("large") == ["media: refused large", "chat: granted small"]


def test_what_was_to_go_when_its_work_has_ended_may_stay_when_the_question_is_withdrawn(
    card: Card,
) -> None:
    """A model was drained, and nobody could use it meanwhile, for a request that had given up."""
    card.standing("chat", "lane", spec("qwen.weights", 6))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=8))
    assert card.after(PATIENCE_S) == ["chat: wait, park qwen.weights"]

    assert card.withdraw("job") == ["media: refused job", "chat: stay qwen.weights"]
    assert card.after(1.0) == []  # it is told once
    assert card.give("chat", "qwen.weights", 6) == []

    assert card.broker.counters["declined"] == 0
    assert card.broker.counters["moved_bytes"] == 0
    card.use("lane", busy=False)
    assert card.ask("media", "next", way(peak_gib=8)) == ["chat: park qwen.weights"]  # at once
    assert [event["what"] for event in card.broker.explain("job") or []] == [
        "asked", "waits", "asked to park", "withdrawn", "may stay",
    ]  # fmt: skip


def test_what_was_to_go_may_stay_when_its_room_came_from_elsewhere(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 2))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "next", way(peak_gib=7))
    card.release("job")
    card.release("next")
    card.ask("media", "large", way(peak_gib=9))
    assert card.after(PATIENCE_S) == ["chat: wait, park qwen.weights"]

    assert card.withdraw("large") == ["media: refused large", "chat: stay qwen.weights"]


def test_an_order_is_not_taken_back_while_somebody_else_waits(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=8))
    card.ask("media", "next", way(peak_gib=8))
    card.after(PATIENCE_S)

    assert card.withdraw("job") == ["media: refused job"]
    card.use("lane", busy=False)
    assert card.give("chat", "qwen.weights") == ["media: granted next"]


def test_what_was_given_before_it_might_stay_is_counted(card: Card) -> None:
    chat = Engine(card, "chat")
    chat.declare(spec("qwen.weights", 6))
    lane = chat.leases.ask("talk", "chat", [way("qwen.weights")], standing=True)
    chat.settle()
    chat.leases.brought(lane, "qwen.weights", 6 * GIB, 1.0)
    chat.settle()
    chat.gives = lambda order: None  # it computes
    card.ask("media", "job", way(peak_gib=8))
    card.after(PATIENCE_S)
    chat.takes([card.orders["qwen.weights"]])

    chat.leases.gave("qwen.weights", 0)  # it has ended, and at the same time
    card.withdraw("job")
    order = card.orders["qwen.weights"]
    chat.takes([Stay(move=order.move, tenant=order.tenant)])
    chat.settle()

    assert card.held_gib("qwen.weights") == 0
    assert card.broker.counters["parked"] == 1


def test_an_engine_that_may_keep_what_it_put_off_says_what_it_has(card: Card) -> None:
    chat = Engine(card, "chat")
    chat.declare(spec("qwen.weights", 6))
    lane = chat.leases.ask("talk", "chat", [way("qwen.weights")], standing=True)
    chat.settle()
    chat.leases.brought(lane, "qwen.weights", 6 * GIB, 1.0)
    chat.settle()
    chat.gives = lambda order: None
    card.ask("media", "job", way(peak_gib=8))
    card.after(PATIENCE_S)
    order = card.orders["qwen.weights"]
    chat.takes([order])
    assert chat.leases.is_wanted("qwen.weights") == order

    card.withdraw("job")
    chat.takes([Stay(move=order.move, tenant=order.tenant)])
    chat.settle()

    assert chat.leases.is_wanted("qwen.weights") is None
    assert card.held_gib("qwen.weights") == 6
    assert not card.broker._moves


class Engine:
    """An engine's side with the messages in both directions held back: what crosses, crosses."""

    def __init__(self, card: Card, name: str):
        self.card, self.name = card, name
        self.said: list[Message] = []
        self.leases = Leases(self.said.append, lambda: card.now)
        self.leases.take(Hello(peer="orchestrator", epoch=card.epochs[name]))
        self.gives: Callable[[Yield], int | None] = lambda order: order.held_bytes

    def give_back(self, order: Yield) -> int | None:
        return self.gives(order)

    def held_bytes(self, tenant: str) -> int:
        """Nothing has left that was put off."""
        return self.card.broker.ledger.held(tenant)

    def declare(self, *specs: TenantSpec) -> None:
        self.leases.declare(specs[0].model, specs, self)

    def heard(self) -> list[Message]:
        """What it said so far arrives; the answers to it are on their way."""
        said, self.said[:] = list(self.said), []
        return [
            order
            for message in said
            for holder, order in self.card.broker.take(self.name, message, self.card.now)
            if holder == self.name
        ]

    def takes(self, orders: list[Message]) -> None:
        for order in orders:
            assert self.leases.take(order)

    def settle(self) -> None:
        """Until nothing is on its way."""
        while self.said:
            self.takes(self.heard())
        self.card.broker.check()


def test_a_question_that_is_withdrawn_when_its_grant_is_on_its_way_loads_nothing(
    card: Card,
) -> None:
    media = Engine(card, "media")
    media.declare(spec("sdxl.unet", 4))
    question = media.leases.ask("job", "denoise", [way("sdxl.unet", 3)])
    on_their_way = media.heard()
    assert card.free_gib == 3

    media.leases.withdraw(question)
    media.takes(on_their_way)
    media.settle()

    assert card.free_gib == 10
    assert card.broker.leases(card.now) == []


def test_a_withdrawal_that_crosses_a_refusal_is_nothing(card: Card) -> None:
    media = Engine(card, "media")
    question = media.leases.ask("job", "denoise", [way(peak_gib=11)])
    on_their_way = media.heard()

    media.leases.withdraw(question)
    media.takes(on_their_way)
    media.settle()

    assert question.refused is not None
    assert card.broker.counters["withdrawn"] == 0
    assert media.leases._unwanted == set()


# --- what is void ---------------------------------------------------------------------------------


def void_messages(card: Card) -> dict[str, tuple[str, Message]]:
    """Messages that mean nothing any more, in a card with a running job and an idle model."""
    job, over = card.grants["job"].fence, card.grants["over"].fence
    old = card.epochs["media"] - 1
    brought = partial(Brought, epoch=card.epochs["media"], held_bytes=0, seconds=1.0)
    return {
        "a lease that ended is released": (
            "media", Release(epoch=card.epochs["media"], fence=over)),
        "a lease that ended is used": (
            "media", Use(epoch=card.epochs["media"], fence=over, busy=True)),
        "a lease that never was": (
            "media", Release(epoch=card.epochs["media"], fence=job + 100)),
        "the lease of another": (
            "chat", Release(epoch=card.epochs["chat"], fence=job)),
        "brought for a lease that ended": (
            "media", brought(fence=over, tenant="sdxl.unet")
        ),
        "brought what is not of the lease": (
            "media", brought(fence=job, tenant="sdxl.vae")
        ),
        "yielded what nobody asked for": (
            "media", card.yielded("media", 99, "sdxl.unet", 0)
        ),
        "yielded what is of another": (
            "chat", card.yielded("chat", 0, "sdxl.unet", 0)
        ),
        "declared by an earlier process": (
            "media", Declare(epoch=old, model="sdxl", tenants=())
        ),
        "asked by an earlier process": (
            "media",
            Acquire(epoch=old, number=77, request_id="x", phase="decode", ways=(way(),)),
        ),
        "joined by an earlier process": (
            "media", AlsoWaits(epoch=old, number=1, request_id="x")
        ),
        "withdrawn by an earlier process": ("media", Withdraw(epoch=old, number=1)),
    }  # fmt: skip


def card_with_a_job() -> Card:
    card = Card()
    card.declare("media", spec("sdxl.unet", 4), spec("sdxl.vae", 1))
    card.ask("media", "over", way("sdxl.vae"))
    card.bring("over", "sdxl.vae")
    card.release("over")
    card.ask("media", "job", way("sdxl.unet", 2))
    card.bring("job", "sdxl.unet")
    card.ask("media", "waits", way(peak_gib=9))
    return card


@pytest.mark.parametrize("what", void_messages(card_with_a_job()))
def test_a_void_message_changes_nothing_and_is_counted(what: str) -> None:
    card = card_with_a_job()
    before, stale = card.state(), card.broker.counters["stale"]

    told = card.say(*void_messages(card)[what])

    assert told == []
    assert card.state() == before
    assert card.broker.counters["stale"] == stale + 1


def test_a_yield_that_was_answered_is_not_answered_twice(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.ask("media", "job", way(peak_gib=8))
    card.give("chat", "qwen.weights")
    card.release("job")
    card.ask("chat", "talk", way("qwen.weights"))
    card.bring("talk", "qwen.weights")
    before = card.state()

    assert card.give("chat", "qwen.weights") == []

    assert card.state() == before
    assert card.broker.counters["stale"] == 1


def test_another_process_cannot_answer_for_whom_was_asked(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.ask("media", "job", way(peak_gib=8))
    before = card.state()

    assert card.give("media", "qwen.weights") == []

    assert card.state() == before
    assert card.broker.counters["stale"] == 1


@pytest.mark.parametrize("began_again", [False, True])
def test_the_last_words_of_a_dead_process_change_nothing_and_are_counted(
    card: Card, began_again: bool
) -> None:
    media = Engine(card, "media")
    unet = spec("sdxl.unet", 4)
    media.declare(unet)
    question = media.leases.ask("job", "denoise", [way("sdxl.unet", 2)])
    waits = media.leases.ask("next", "denoise", [way(peak_gib=9)])
    media.settle()
    media.leases.brought(question, "sdxl.unet", unet.size_bytes, 1.0)
    media.settle()
    assert waits.granted is None

    media.leases.release(question)
    media.leases.gave("sdxl.unet", 0)
    media.leases.use(question, busy=False)
    media.leases.withdraw(waits)
    media.leases.ask("another", "denoise", [way("sdxl.unet")])
    media.leases.forget("sdxl")
    card.die("media")
    if began_again:
        card.begin("media")
        card.declare("media", unet)
        card.ask("media", "again", way("sdxl.unet", 2))
        card.bring("again", "sdxl.unet")
    before, stale, said = card.state(), card.broker.counters["stale"], len(media.said)

    assert media.heard() == []

    assert card.state() == before
    assert card.broker.counters["stale"] == stale + said


# --- a process that dies --------------------------------------------------------------------------


def test_the_bytes_of_a_dead_process_are_free_at_once_and_whoever_waits_has_them(
    card: Card,
) -> None:
    card.resident("media", spec("wan.dit", 3))
    card.ask("media", "job", way("wan.dit", 5))
    card.ask("media", "next", way(peak_gib=9))
    card.ask("chat", "talk", way(peak_gib=9))
    assert card.granted_in_order == ["load wan", "job"]

    assert card.die("media") == ["chat: granted talk"]
    assert card.free_gib == 1
    assert [one["request_id"] for one in card.broker.waiting(card.now)] == []
    assert card.broker.explain("job")[-1]["what"] == "void"  # type: ignore[index]


def test_a_process_that_dies_while_it_was_to_yield_is_not_waited_for(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 8))
    assert card.ask("media", "job", way(peak_gib=9)) == ["chat: park qwen.weights"]

    assert card.die("chat") == ["media: granted job"]


def test_a_process_that_begins_again_has_nothing(card: Card) -> None:
    card.resident("media", spec("wan.dit", 8))
    before = card.epochs["media"]
    card.die("media")
    card.begin("media")

    assert card.epochs["media"] > before
    assert (card.free_gib, card.broker.tenants()) == (10, [])
    assert card.ask("media", "job", way("wan.dit")) == ["media: refused job"]


def test_a_process_that_begins_again_finds_room_for_itself() -> None:
    """It was granted to others while the process was away."""
    broker = Broker(10)
    epochs = {name: broker.join(name, 2) for name in ("chat", "media")}
    broker.leave("media", 0.0)
    for number in range(1, 11):  # whatever may be had
        ask = Acquire(
            epoch=epochs["chat"], number=number, request_id="r", phase="decode",
            ways=(Way(name="whole", tenants=(), peak_bytes=1),),
        )  # fmt: skip
        broker.take("chat", ask, 0.0)

    broker.join("media", 2)

    broker.check()
    assert broker.ledger.free_bytes >= 0


def test_a_name_that_begins_twice_is_taken_to_have_ended_between() -> None:
    card = Card()
    card.ask("media", "job", way(peak_gib=8))
    card.ask("chat", "talk", way(peak_gib=8))

    card.begin("media")
    told = card.after(0.1)

    # Whoever was granted something has been told so; nobody is, who has not.
    held = [one["request_id"] for one in card.broker.leases(card.now)]
    assert held == [request for request in card.granted_in_order if request != "job"]
    assert told == ["chat: granted talk"]


# --- explanations ---------------------------------------------------------------------------------


def test_what_happened_to_a_request_is_told_in_order_with_bytes_and_seconds(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    card.use("lane", busy=True)
    card.declare("media", spec("sdxl.unet", 4))
    card.ask("media", "job", way("sdxl.unet", 3))
    card.after(1.0)
    card.use("lane", busy=False)
    card.after(0.5)
    card.give("chat", "qwen.weights")
    card.after(2.0)
    card.bring("job", "sdxl.unet")
    card.after(3.0)
    card.release("job")

    assert card.broker.explain("job") == [
        {"t_s": 0.0, "what": "asked", "phase": "denoise", "absent": ["sdxl.unet"],
         "taken_before_for": [], "peak_bytes": 3 * GIB},
        {"t_s": 0.0, "what": "waits", "why": "4.00 GiB are free; in use by denoise of lane"},
        {"t_s": 1.0, "what": "asked to park", "tenant": "qwen.weights", "holder": "chat",
         "bytes": 6 * GIB, "in_use": False},
        {"t_s": 1.5, "what": "parked", "tenant": "qwen.weights", "holder": "chat",
         "bytes": 6 * GIB, "seconds": 0.1, "waited_for_it_s": 0.5},
        {"t_s": 1.5, "what": "granted", "phase": "denoise", "way": "whole", "exactness": "bit",
         "waited_s": 1.5, "to_bring": ["sdxl.unet"]},
        {"t_s": 3.5, "what": "brought", "tenant": "sdxl.unet", "bytes": 4 * GIB, "seconds": 1.0},
        {"t_s": 6.5, "what": "released", "phase": "denoise", "seconds": 5.0},
    ]  # fmt: skip


def test_a_request_learns_for_whom_its_tenants_were_taken(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.ask("media", "job", way(peak_gib=8))
    card.give("chat", "qwen.weights")
    card.release("job")

    card.ask("chat", "talk", way("qwen.weights"))

    assert card.broker.explain("talk")[0]["taken_before_for"] == ["job"]  # type: ignore[index]


def test_everyone_who_waits_for_one_answer_is_told_the_same_story(card: Card) -> None:
    card.ask("media", "job", way(peak_gib=8))
    card.ask("chat", "talk", way(peak_gib=8))
    card.also("talk", "second")
    card.after(1.0)
    card.release("job")
    card.also("talk", "third")

    story = card.broker.explain("talk")
    assert [event["what"] for event in story or []] == ["asked", "waits", "granted"]
    assert card.broker.explain("second") == story
    assert card.broker.explain("third") == story


def test_a_story_stays_in_order_when_a_request_joins_another_after_one_of_its_own(
    card: Card,
) -> None:
    card.ask("chat", "both", way(peak_gib=1))
    card.release("both")
    card.after(5.0)
    card.ask("media", "job", way(peak_gib=8))
    card.ask("chat", "talk", way(peak_gib=8))
    card.after(1.0)
    card.also("talk", "both")

    times = [event["t_s"] for event in card.broker.explain("both") or []]
    assert times == sorted(times)
    assert times[0] == 0


def test_of_an_unknown_request_nothing_is_told(card: Card) -> None:
    assert card.broker.explain("nobody") is None


@pytest.mark.parametrize("end", ["refused", "withdrawn", "void"])
def test_a_story_ends_with_why_nothing_was_granted(card: Card, end: str) -> None:
    card.ask("media", "job", way(peak_gib=8))
    card.declare("chat", spec("qwen.weights", 4))
    card.ask("chat", "talk", way("qwen.weights", 4))
    if end == "refused":
        card.unload("chat", "qwen")
    elif end == "withdrawn":
        card.withdraw("talk")
    else:
        card.die("chat")

    assert card.broker.explain("talk")[-1]["what"] == end  # type: ignore[index]


# --- what users of other servers complain of ------------------------------------------------------


def test_a_cancelled_load_leaves_nothing_behind_that_others_wait_for(card: Card) -> None:
    """Elsewhere a load whose client has hung up kept the scheduler waiting for ever."""
    card.resident("chat", spec("qwen.weights", 6))
    card.declare("media", spec("wan.dit", 8))

    for number in range(5):
        card.ask("media", f"job {number}", way("wan.dit", 1))
        if number % 2:
            card.withdraw(f"job {number}")  # while others make room for it
            card.give("chat", "qwen.weights")
        else:
            card.give("chat", "qwen.weights")
            card.release(f"job {number}")  # while it loads: `wan.dit` was never brought
        assert card.free_gib == 10
        card.ask("chat", f"talk {number}", way("qwen.weights", 2))
        assert card.granted_in_order[-1] == f"talk {number}"
        card.bring(f"talk {number}", "qwen.weights")
        card.release(f"talk {number}")


def test_a_resident_model_answers_while_another_one_loads(card: Card) -> None:
    """Elsewhere one lock around all loads made a loaded model wait for a file of another."""
    card.standing("chat", "lane", spec("qwen.weights", 4))
    card.declare("media", spec("wan.dit", 4))
    card.ask("media", "job", way("wan.dit", 1))  # which takes a minute to read

    for number in range(60):
        card.after(1.0)
        assert card.use("lane", busy=True) == []
        assert card.ask("chat", f"talk {number}", way("qwen.weights", 1)) == [
            f"chat: granted talk {number}"
        ]
        card.release(f"talk {number}")
        card.use("lane", busy=False)


def test_a_resident_model_answers_while_another_one_waits_for_room(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 4))
    card.resident("media", spec("sdxl.unet", 2))
    card.declare("media", spec("wan.dit", 6))
    card.use("lane", busy=True)
    card.ask("media", "now", way(peak_gib=3))
    card.ask("media", "job", way("wan.dit", 1))

    assert card.ask("chat", "talk", way("qwen.weights", 1)) == ["chat: granted talk"]


def test_an_unload_gives_every_byte_back_and_whoever_waits_has_them(card: Card) -> None:
    """Elsewhere a model was gone from the list, and its memory from the card."""
    card.standing("chat", "lane", spec("qwen.weights", 6), spec("qwen.pool", 2, floor_gib=1))
    card.use("lane", busy=True)
    assert card.ask("media", "job", way(peak_gib=10)) == []

    assert card.unload("chat", "qwen") == ["media: granted job"]
    card.release("job")

    assert (card.free_gib, card.broker.tenants(), card.broker.leases(card.now)) == (10, [], [])


def test_an_unload_while_the_model_was_to_yield_is_an_answer(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.ask("media", "job", way(peak_gib=8))

    assert card.unload("chat", "qwen") == ["media: granted job"]

    card.declare("chat", spec("qwen.weights", 6))
    assert card.give("chat", "qwen.weights") == []  # late, and of the model that is gone
    assert card.broker.counters["stale"] == 1


def test_a_question_about_a_model_that_is_unloaded_is_refused(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 2))
    card.ask("media", "job", way(peak_gib=8))
    card.ask("chat", "talk", way("qwen.weights", 3))

    assert card.unload("chat", "qwen") == ["chat: refused talk"]

    card.release("job")
    assert card.free_gib == 10


# --- two processes that both believe they have the memory -----------------------------------------


def test_a_load_that_is_cancelled_and_wanted_again_before_its_grant_came_is_counted(
    card: Card,
) -> None:
    chat = Engine(card, "chat")
    chat.declare(spec("qwen.weights", 6))
    lane = [way("qwen.weights")]
    first = chat.leases.ask("talk", "chat", lane, standing=True)
    on_their_way = chat.heard()

    chat.leases.withdraw(first)
    second = chat.leases.ask("more", "chat", lane, standing=True)
    on_their_way += chat.heard()
    chat.takes(on_their_way)
    chat.settle()
    assert second.granted is not None
    chat.leases.brought(second, "qwen.weights", 6 * GIB, 1.0)
    chat.settle()

    assert card.held_gib("qwen.weights") == 6


def test_what_two_phases_wait_for_is_counted_when_the_one_that_would_bring_it_is_cancelled(
    card: Card,
) -> None:
    card.declare("media", spec("sdxl.unet", 4))
    card.ask("media", "first", way("sdxl.unet", 1))
    card.ask("media", "second", way("sdxl.unet", 1))

    card.release("first")
    card.bring("second", "sdxl.unet")

    assert card.held_gib("sdxl.unet") == 4


def test_what_two_phases_wait_for_is_counted_when_the_first_could_not_bring_it(
    card: Card,
) -> None:
    card.declare("media", spec("sdxl.unet", 4))
    card.ask("media", "first", way("sdxl.unet", 1))
    card.ask("media", "second", way("sdxl.unet", 1))

    card.bring("first", "sdxl.unet", 0)
    card.bring("second", "sdxl.unet", 4)

    assert card.held_gib("sdxl.unet") == 4


def test_a_lease_that_ends_while_its_pool_grows_leaves_the_pool_counted(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool", 2)
    card.release("job")
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]

    card.release("lane")
    assert card.held_gib("qwen.pool") == 6
    card.give("chat", "qwen.pool")

    assert card.held_gib("qwen.pool") == 6


def test_a_pool_that_was_given_back_just_before_it_was_to_grow_is_counted_as_it_grew(
    card: Card,
) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.ask("media", "job", way(peak_gib=6))
    card.give("chat", "qwen.pool", 4)
    card.release("job")
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]

    # It has given back 2 GiB of its own accord before the order came, and then obeys.
    card.give_unasked("chat", "qwen.pool", 2)
    card.ask("media", "large", way(peak_gib=8))
    card.give("chat", "qwen.pool")

    in_use = [one["request_id"] for one in card.broker.leases(card.now)]
    assert card.held_gib("qwen.pool") == 6 or "large" not in in_use


def test_a_pool_that_was_given_back_before_it_was_to_grow_is_counted_when_it_is_brought_again(
    card: Card,
) -> None:
    card.standing("chat", "lane", spec("qwen.pool", 6, floor_gib=2))
    card.ask("media", "job", way(peak_gib=7))
    card.give("chat", "qwen.pool", 2)
    card.release("job")
    assert card.after(GROW_AFTER_S) == ["chat: grow qwen.pool"]

    # All of this was said before the order came.
    card.give_unasked("chat", "qwen.pool", 0)
    card.ask("chat", "again", way("qwen.pool"), standing=True)
    # There is nothing that could grow; then the answer to its question comes, and is obeyed.
    card.give("chat", "qwen.pool", 0)
    brought = card.grants["again"].held_bytes["qwen.pool"]
    card.bring("again", "qwen.pool")

    assert card.broker.ledger.held("qwen.pool") == brought


def test_an_order_that_crosses_what_was_given_by_itself_is_not_forgotten(card: Card) -> None:
    card.resident("chat", spec("qwen.pool", 8, floor_gib=2))
    assert card.ask("media", "job", way(peak_gib=9)) == ["chat: park qwen.pool"]

    card.give_unasked("chat", "qwen.pool", 4)
    told = card.give("chat", "qwen.pool")

    assert told == ["media: granted job"]
    assert (card.held_gib("qwen.pool"), card.free_gib) == (0, 1)


# --- what a request wishes ------------------------------------------------------------------------


def test_a_model_is_kept_for_as_long_as_its_last_request_wished(card: Card) -> None:
    for engine, model, back_s in (("chat", "qwen", 1.0), ("media", "sdxl", 2.0)):
        card.standing(engine, model, spec(f"{model}.weights", 4, back_s=back_s))
        card.use(model, busy=True)
    wish = Use(
        epoch=card.epochs["chat"], fence=card.grants["qwen"].fence, busy=False, keep_alive_s=600.0
    )
    card.say("chat", wish)
    card.use("sdxl", busy=False)
    card.after(300.0)

    # By what it costs to bring it back alone, the other one would go.
    assert card.ask("media", "job", way(peak_gib=4)) == ["media: park sdxl.weights"]


def test_what_is_wanted_ahead_moves_nothing_and_does_not_wait(card: Card) -> None:
    card.resident("chat", spec("qwen.weights", 6))
    card.declare("media", spec("sdxl.unet", 5), spec("sdxl.vae", 3))

    assert card.ask("media", "unet", way("sdxl.unet"), free_only=True) == ["media: refused unet"]
    assert card.ask("media", "vae", way("sdxl.vae"), free_only=True) == ["media: granted vae"]
    assert card.held_gib("qwen.weights") == 6


# --- what is planned, and what is learned ---------------------------------------------------------


def plans(card: Card, peak_gib: int) -> list[str | None]:
    phase = PhaseWays(name="decode", ways=(way(peak_gib=peak_gib),))
    return [one.refused for one in dry_run(card.broker, "media", [], [phase], card.now)]


def test_a_plan_can_be_made_right_after_an_engine_declined(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.weights", 6))
    card.ask("media", "job", way(peak_gib=8))
    card.give("chat", "qwen.weights", 6)

    assert plans(card, 8) == [None]
    assert plans(card, 11) != [None]


def test_a_pool_is_left_alone_while_the_rest_of_its_lease_is_brought(card: Card) -> None:
    weights, pool = spec("qwen.weights", 4), spec("qwen.kv", 4, floor_gib=1)
    card.declare("chat", weights, pool)
    card.ask("chat", "talk", way("qwen.weights qwen.kv"), standing=True)

    assert card.ask("media", "job", way(peak_gib=4)) == []
    card.bring("talk", "qwen.weights")
    assert card.bring("talk", "qwen.kv") == ["chat: wait, shrink qwen.kv"]


def test_a_pool_that_could_not_shrink_is_left_alone_for_a_second(card: Card) -> None:
    card.standing("chat", "lane", spec("qwen.kv", 6, floor_gib=1))
    card.use("lane", busy=True)
    card.ask("media", "job", way(peak_gib=6))

    assert card.give("chat", "qwen.kv", 6) == []
    assert card.after(DECLINED_S / 2) == []
    assert card.after(DECLINED_S) == ["chat: wait, shrink qwen.kv"]


@pytest.mark.parametrize("done", [True, False])
def test_only_a_phase_that_came_to_its_end_is_learned_from(card: Card, done: bool) -> None:
    card.ask("media", "job", way(peak_gib=1), model="sdxl", pixels=100, work=10.0)
    card.after(20.0)
    fence = card.grants["job"].fence
    card.say("media", Release(epoch=card.epochs["media"], fence=fence, done=done))

    known = card.broker.paces.estimate("sdxl", "denoise", 100, 1.0)
    assert (known is not None) == done

"""Engines that ask, compute, yield, load, unload and die in any order, around one broker.

Each engine has its real `Leases`; what is on its device is written down beside them. Messages wait
in queues until the machine delivers them, so whatever can cross does cross. After every step the
bytes that are really on the device are within the budget.

VERBATIM_EXAMPLES is how many courses of events are tried; the default takes about 20 seconds.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from worker.engine.leases import Leases, Question
from worker.protocol.messages import Granted, Hello, Message, Refused, TenantSpec, Way, Yield
from worker.vram.broker import Broker, Order

EXAMPLES = int(os.environ.get("VERBATIM_EXAMPLES", "300"))
STEPS = 60
BUDGET = 100  # bytes
PROCESS = 3  # bytes that a process takes for itself
NAMES = ("chat", "media", "other")
MODELS = ("one", "two")

T = TypeVar("T")
Sizes = tuple[int, int, bool, bool]  # of a tenant: size, floor, host copy, pinned
WaySizes = tuple[int, int, float]  # which tenants (bits), peak, how much longer it takes


@dataclass(eq=False)
class Work:
    """A question of an engine, and what it does with the answer."""

    question: Question
    cancelled: bool = False
    busy: bool = False  # computes, or brings what it computes with
    over: bool = False  # refused, released, or its lease has gone with a tenant
    came: bool = False  # all that it was granted has been there

    @property
    def standing(self) -> bool:
        return self.question.asked.standing

    @property
    def has_lease(self) -> bool:
        return self.question.granted is not None and not self.over

    @property
    def waits(self) -> bool:
        return self.question.granted is None and not self.over

    def names(self, tenant: str) -> bool:
        return any(tenant in way.tenants for way in self.question.asked.ways)


class Engine:
    """A process: what it was told, what it has said, and what is really on its device."""

    def __init__(self, machine: Machine, name: str, epoch: int):
        self.name = name
        self.told: deque[Message] = deque([Hello(peer="orchestrator", epoch=epoch)])
        self.said: deque[Message] = deque()
        self.leases = Leases(self.said.append, lambda: machine.now)
        self.specs: dict[str, TenantSpec] = {}
        self.device: dict[str, int] = {}
        self.work: list[Work] = []
        self.puts_off = False  # what it could do at once
        self.fails = False  # to grow

    @property
    def device_bytes(self) -> int:
        peaks = sum(one.question.way.peak_bytes for one in self.work if one.busy)
        return PROCESS + sum(self.device.values()) + peaks

    def held(self, tenant: str) -> int:
        return self.device.get(tenant, 0)

    def held_bytes(self, tenant: str) -> int:
        """What `Leases` asks the owner of a tenant."""
        return self.held(tenant)

    def users(self, tenant: str) -> list[Work]:
        return [one for one in self.work if one.busy and tenant in one.question.way.tenants]

    def missing(self, work: Work) -> list[str]:
        return [
            tenant
            for tenant in work.question.way.tenants
            if self.held(tenant) < max(self.specs[tenant].floor_bytes, self._least(work, tenant))
        ]

    def _least(self, work: Work, tenant: str) -> int:
        """A standing lease has what it asked for when it begins, and may lose it later."""
        if work.standing and work.came:
            return 0
        return work.question.asked.least_bytes.get(tenant, 0)

    def hear(self) -> None:
        """Take one message."""
        message = self.told.popleft()
        assert self.leases.take(message)
        for one in self.work:
            if isinstance(message, Granted) and one.question.granted is message:
                one.over, one.busy = one.cancelled, not one.cancelled
            if isinstance(message, Refused) and one.question.refused is message:
                one.over = True
        self._note_what_came()

    def _note_what_came(self) -> None:
        for one in self.work:
            one.came |= one.busy and not self.missing(one)

    def give_back(self, order: Yield) -> int | None:
        """What `Leases` asks the owner of a tenant to do."""
        spec, held = self.specs[order.tenant], self.held(order.tenant)
        if order.kind == "grow":
            assert order.held_bytes <= spec.size_bytes
            if held and self.puts_off:
                return None
            return self._obey(order) if held and not self.fails else held
        if not held:  # it is of a tenant that was unloaded and declared again meanwhile
            return 0
        assert not spec.pinned, "a pinned tenant was to be taken"
        users = self.users(order.tenant)
        if order.kind == "shrink":
            assert order.held_bytes >= spec.floor_bytes, "a pool was to shrink below its floor"
            return None if users and order.wait and self.puts_off else self._obey(order)
        assert order.held_bytes == 0
        assert all(one.standing for one in users), "the tenant of a running phase was to be taken"
        if users:
            return None if order.wait else held
        return self._obey(order)

    def _obey(self, order: Yield) -> int:
        grows = order.kind == "grow"
        self.device[order.tenant] = (max if grows else min)(
            self.held(order.tenant), order.held_bytes
        )
        self._forget_leases_without(order.tenant)
        return self.held(order.tenant)

    def _forget_leases_without(self, tenant: str) -> None:
        if self.held(tenant) >= self.specs[tenant].floor_bytes:
            return
        for one in self.work:
            if one.has_lease and tenant in one.question.way.tenants:
                assert not one.busy
                one.over = True

    def answer_what_was_put_off(self, tenant: str) -> None:
        order = self.leases.is_wanted(tenant)
        if order is not None and (order.kind == "grow" or not self.users(tenant)):
            self.leases.gave(tenant, self._obey(order) if self.held(tenant) else 0)

    def may_begin(self, work: Work) -> bool:
        if not work.has_lease or not work.standing or work.busy:
            return False
        asked_away = [self.leases.is_wanted(tenant) for tenant in work.question.way.tenants]
        return not self.missing(work) and not any(
            order is not None and order.kind != "grow" for order in asked_away
        )

    def begin(self, work: Work) -> None:
        work.busy = True
        self.leases.use(work.question, busy=True)

    def end(self, work: Work) -> None:
        """A phase is over; what runs under a standing lease ends, and the lease stays."""
        work.busy = False
        if work.standing:
            self.leases.use(work.question, busy=False)
        else:
            work.over = True
            self.leases.release(work.question)
        self._answer_for(work)

    def bring(self, work: Work, tenant: str, *, works: bool) -> None:
        assert work.question.granted is not None
        if works:
            self.device[tenant] = work.question.granted.held_bytes[tenant]
            self.leases.brought(work.question, tenant, self.device[tenant], 1.0)
            self._note_what_came()
        else:
            self.leases.brought(work.question, tenant, 0, 0.0)
            self.cancel(work)

    def cancel(self, work: Work) -> None:
        had_lease = work.has_lease
        work.cancelled, work.busy, work.over = True, False, had_lease
        self.leases.withdraw(work.question)
        if had_lease:
            self._answer_for(work)

    def _answer_for(self, work: Work) -> None:
        for tenant in work.question.way.tenants:
            order = self.leases.is_wanted(tenant)
            if order is not None and order.kind != "grow":
                self.answer_what_was_put_off(tenant)

    def unload(self, model: str) -> None:
        gone = [tenant for tenant, spec in self.specs.items() if spec.model == model]
        for one in self.work:
            if not one.over and not one.cancelled and any(one.names(tenant) for tenant in gone):
                self.cancel(one)
        for tenant in gone:
            self.device.pop(tenant, None)
            del self.specs[tenant]
        self.leases.forget(model)

    def may_give(self, tenant: str) -> bool:
        """Nothing computes with it. It may also say once more that it is gone."""
        return not self.users(tenant)

    def give(self, tenant: str, *, wholly: bool) -> None:
        self.device[tenant] = (
            0 if wholly else min(self.held(tenant), self.specs[tenant].floor_bytes)
        )
        self._forget_leases_without(tenant)
        self.leases.gave(tenant, self.held(tenant))


@st.composite
def tenant_sizes(draw: st.DrawFn) -> Sizes:
    size = draw(st.sampled_from((30, 12, 20, 45, 7)))
    floor = draw(st.sampled_from((size, size // 3, size)))
    return size, floor, draw(st.booleans()), draw(st.sampled_from((False,) * 6 + (True,)))


PARTS = st.lists(tenant_sizes(), min_size=1, max_size=2)
ENGINE = st.integers(0, len(NAMES) - 1)
PICK = st.integers(0, 7)
SELDOM = st.sampled_from((False, False, False, True))
# What is delivered after a step: nothing, what the engine said, or all to it and from it.
HEARD = st.sampled_from(("nothing", "said", "all", "all"))
WAYS = st.lists(
    st.tuples(
        st.sampled_from((3, 1, 2, 0, 5, 15)),
        st.sampled_from((20, 0, 50, 70, 8)),
        st.sampled_from((0.0, 0.5, 30.0)),
    ),
    min_size=1,
    max_size=3,
)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.broker = Broker(BUDGET)
        self.engines: dict[str, Engine] = {}
        self.unreaped: set[str] = set()
        self.last_words: list[tuple[str, deque[Message]]] = []  # of processes that died
        self.last_fence = 0
        self.asked = 0

    @initialize(
        parts=st.tuples(PARTS, PARTS, PARTS),
        resident=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    )
    def all_begin(self, parts: tuple[list[Sizes], ...], resident: tuple[bool, ...]) -> None:
        for sizes in parts:  # all of them before anything is granted, as the supervisor does
            self.begins(sizes, loads=False)
        for number, loads in enumerate(resident):
            if loads:
                self._load(number)

    # --- what engines do --------------------------------------------------------------------------

    @rule(number=ENGINE, model=st.sampled_from(MODELS), sizes=PARTS)
    def declares(self, number: int, model: str, sizes: list[Sizes]) -> None:
        engine = self.engines.get(NAMES[number])
        if engine is None or any(spec.model.endswith(model) for spec in engine.specs.values()):
            return
        specs = [
            TenantSpec(
                id=f"{engine.name}.{model}.{part}", model=f"{engine.name}.{model}",
                size_bytes=size, floor_bytes=floor, host_copy=host_copy, pinned=pinned,
                back_s=size / 10,
            )
            for part, (size, floor, host_copy, pinned) in enumerate(sizes)
        ]  # fmt: skip
        engine.specs |= {spec.id: spec for spec in specs}
        engine.leases.declare(f"{engine.name}.{model}", specs, engine)

    # Several rules ask, because hypothesis leaves some rules out of every course of events.

    @rule(number=ENGINE, ways=WAYS, heard=HEARD)
    def asks_for_a_phase(self, number: int, ways: list[WaySizes], heard: str) -> None:
        self._ask(number, ways, heard)

    @rule(number=ENGINE, ways=WAYS, heard=HEARD)
    def asks_with_priority(self, number: int, ways: list[WaySizes], heard: str) -> None:
        self._ask(number, ways, heard, priority=1)

    @rule(number=ENGINE, pick=PICK, more=st.sampled_from((1, 5, 100)), standing=SELDOM, heard=HEARD)
    def asks_for_room(
        self, number: int, pick: int, more: int, standing: bool, heard: str
    ) -> None:  # fmt: skip
        """A request came that a pool is too small for. standing: the pool is away, and to come
        with room."""
        engine = self.engines.get(NAMES[number])
        pools = [] if engine is None else [
            (bit, spec)
            for bit, spec in enumerate(engine.specs.values())
            if spec.floor_bytes < spec.size_bytes
        ]  # fmt: skip
        if pools:
            bit, spec = _pick(pools, pick)
            least = min(spec.floor_bytes + more, spec.size_bytes)
            self._ask(
                number, [(1 << bit, 0, 0.0)], heard,
                priority=1, least_bytes={spec.id: least}, standing=standing,
            )  # fmt: skip

    @rule(number=ENGINE, peak=st.sampled_from((80, 91, 60, 40)), heard=HEARD)
    def asks_for_much(self, number: int, peak: int, heard: str) -> None:
        self._ask(number, [(0, peak, 0.0)], heard)

    @rule(number=ENGINE, ways=WAYS, heard=HEARD)
    def asks_for_a_standing_lease(self, number: int, ways: list[WaySizes], heard: str) -> None:
        # What a standing lease computes with is part of its tenants: an idle one has nothing else
        # that it could be asked for.
        self._ask(number, [(bits, 0, longer_s) for bits, _, longer_s in ways], heard, standing=True)

    @rule(number=ENGINE, bits=st.sampled_from((1, 2, 3)), heard=HEARD)
    def asks_ahead(self, number: int, bits: int, heard: str) -> None:
        self._ask(number, [(bits, 0, 0.0)], heard, free_only=True)

    def _ask(
        self,
        number: int,
        ways: list[WaySizes],
        heard: str,
        *,
        priority: int = 0,
        least_bytes: dict[str, int] | None = None,
        standing: bool = False,
        free_only: bool = False,
    ) -> None:
        engine = self.engines.get(NAMES[number])
        if engine is None or not engine.leases.connected:
            return
        tenants = [*engine.specs]
        self.asked += 1
        question = engine.leases.ask(
            f"r{self.asked}",
            "phase",
            [
                Way(
                    name=f"way {index}",
                    tenants=tuple(one for bit, one in enumerate(tenants) if bits >> bit & 1),
                    peak_bytes=peak,
                    longer_s=longer_s,
                )
                for index, (bits, peak, longer_s) in enumerate(ways)
            ],
            priority=priority,
            least_bytes=least_bytes,
            standing=standing,
            free_only=free_only,
        )
        engine.work.append(Work(question))
        self._deliver(engine, heard)

    @rule(pick=PICK)
    def somebody_joins_a_question(self, pick: int) -> None:
        engine, work = self._some_work(pick, lambda _, work: not work.over)
        if engine is not None and work is not None:
            self.asked += 1
            engine.leases.also(work.question, f"r{self.asked}")

    @rule(pick=PICK, count=st.integers(1, 2), fails=SELDOM, heard=HEARD)
    def brings(self, pick: int, count: int, fails: bool, heard: str) -> None:
        engine, work = self._some_work(
            pick, lambda engine, work: work.busy and bool(engine.missing(work))
        )
        if engine is not None and work is not None:
            for tenant in engine.missing(work)[:count]:
                if work.has_lease:
                    engine.bring(work, tenant, works=not fails)
            self._deliver(engine, heard)

    @rule(pick=PICK)
    def runs_to_its_end(self, pick: int) -> None:
        engine, work = self._some_work(pick, lambda _, work: work.busy)
        if engine is not None and work is not None:
            self._run_to_its_end(engine, work)

    @rule(pick=PICK, heard=HEARD)
    def begins_to_compute(self, pick: int, heard: str) -> None:
        engine, work = self._some_work(pick, lambda engine, work: engine.may_begin(work))
        if engine is not None and work is not None:
            engine.begin(work)
            self._deliver(engine, heard)

    @rule(pick=PICK, heard=HEARD)
    def ends_computing(self, pick: int, heard: str) -> None:
        engine, work = self._some_work(
            pick, lambda engine, work: work.busy and not engine.missing(work)
        )
        if engine is not None and work is not None:
            engine.end(work)
            self._deliver(engine, heard)

    @rule(pick=PICK, heard=HEARD)
    def cancels(self, pick: int, heard: str) -> None:
        engine, work = self._some_work(pick, lambda _, work: not work.over and not work.cancelled)
        if engine is not None and work is not None:
            engine.cancel(work)
            self._deliver(engine, heard)

    @rule(pick=PICK)
    def answers_what_it_put_off(self, pick: int) -> None:
        found = [
            (engine, tenant)
            for engine in self.engines.values()
            for tenant in engine.specs
            if engine.leases.is_wanted(tenant) is not None
        ]
        if found:
            engine, tenant = _pick(found, pick)
            engine.answer_what_was_put_off(tenant)

    @rule(pick=PICK, wholly=st.booleans(), heard=HEARD)
    def gives_without_being_asked(self, pick: int, wholly: bool, heard: str) -> None:
        found = [
            (engine, tenant)
            for engine in self.engines.values()
            for tenant in engine.specs
            if engine.leases.connected and engine.may_give(tenant)
        ]
        if found:
            engine, tenant = _pick(found, pick)
            engine.give(tenant, wholly=wholly)
            self._deliver(engine, heard)

    @rule(number=ENGINE, model=st.sampled_from(MODELS), really=SELDOM)
    def unloads(self, number: int, model: str, really: bool) -> None:
        engine = self.engines.get(NAMES[number])
        if engine is None or not engine.leases.connected or not really:
            return
        if any(spec.model.endswith(model) for spec in engine.specs.values()):
            engine.unload(f"{engine.name}.{model}")

    @rule(number=ENGINE, puts_off=st.booleans(), fails=st.booleans())
    def changes_its_mood(self, number: int, puts_off: bool, fails: bool) -> None:
        if (engine := self.engines.get(NAMES[number])) is not None:
            engine.puts_off, engine.fails = puts_off, fails

    # --- processes --------------------------------------------------------------------------------

    @rule(number=ENGINE, gives=st.booleans())
    def is_killed(self, number: int, gives: bool) -> None:
        """gives: it said just before that it had given things back."""
        if (engine := self.engines.pop(NAMES[number], None)) is not None:
            for tenant in engine.specs if gives else ():
                if engine.may_give(tenant):
                    engine.give(tenant, wholly=True)
            self.unreaped.add(engine.name)
            self.last_words.append((engine.name, engine.said))

    @precondition(lambda self: self.unreaped)
    @rule()
    def is_reaped(self) -> None:
        name = min(self.unreaped)
        self.unreaped.remove(name)
        self._route(self.broker.leave(name, self.now))

    @precondition(lambda self: len(self.engines) + len(self.unreaped) < len(NAMES))
    @rule(sizes=PARTS, loads=st.booleans())
    def begins(self, sizes: list[Sizes], loads: bool) -> None:
        name = next(one for one in NAMES if one not in self.engines and one not in self.unreaped)
        number = NAMES.index(name)
        self.engines[name] = Engine(self, name, self.broker.join(name, PROCESS))
        self.declares(number, MODELS[0], sizes)
        if loads:
            self._load(number)

    # --- messages and time ------------------------------------------------------------------------

    @rule(number=ENGINE, count=st.integers(1, 3))
    def the_broker_hears(self, number: int, count: int) -> None:
        engine = self.engines.get(NAMES[number])
        for _ in range(count if engine is not None else 0):
            assert engine is not None
            if engine.said:
                self._broker_takes(engine.name, engine.said.popleft())

    @rule(number=ENGINE, count=st.integers(1, 3))
    def an_engine_hears(self, number: int, count: int) -> None:
        engine = self.engines.get(NAMES[number])
        for _ in range(count if engine is not None else 0):
            assert engine is not None
            if engine.told:
                engine.hear()

    @precondition(lambda self: any(words for _, words in self.last_words))
    @rule(pick=PICK, count=st.integers(1, 3))
    def the_broker_hears_last_words(self, pick: int, count: int) -> None:
        name, words = _pick([one for one in self.last_words if one[1]], pick)
        for _ in range(min(count, len(words))):
            self._broker_takes(name, words.popleft())

    @rule()
    def deliver_everything(self) -> None:
        while any(engine.said or engine.told for engine in self.engines.values()):
            for engine in self.engines.values():
                while engine.said:
                    self._broker_takes(engine.name, engine.said.popleft())
                while engine.told:
                    engine.hear()

    @rule(seconds=st.sampled_from((0.1, 0.6, 1.1)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._route(self.broker.tick(self.now))

    @rule(seconds=st.sampled_from((2.5, 11.0, 130.0)))
    def much_time_passes(self, seconds: float) -> None:
        self.time_passes(seconds)

    @rule()
    def it_is_quiet(self) -> None:
        """Everything ends that runs; what grows back is told so."""
        self._everything_ends()
        self.much_time_passes(2.5)

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def no_more_bytes_are_on_the_device_than_there_are(self) -> None:
        assert sum(engine.device_bytes for engine in self.engines.values()) <= BUDGET

    @invariant()
    def nothing_is_on_the_device_that_the_ledger_does_not_know(self) -> None:
        ledger = self.broker.ledger
        leases = {one.fence: one for one in ledger.leases}
        for engine in self.engines.values():
            for tenant, held in engine.device.items():
                assert held <= ledger.held(tenant), tenant
            for one in engine.work:
                if one.busy:
                    assert one.question.granted is not None
                    lease = leases[one.question.granted.fence]
                    assert lease.peak_bytes == one.question.way.peak_bytes

    @invariant()
    def the_ledger_is_within_the_budget(self) -> None:
        self.broker.check()
        assert self.broker.ledger.free_bytes >= 0

    def teardown(self) -> None:
        """When everything ends that runs, everybody has an answer, and the ledger is the truth."""
        while self.unreaped:
            self.is_reaped()
        for name, words in self.last_words:
            while words:
                self._broker_takes(name, words.popleft())
        rounds, quiet = 2 * self.asked + 30, 0
        while quiet < 5:  # seconds, in which pools may grow
            assert rounds, f"they wait for ever: {self.broker.waiting(self.now)}"
            rounds -= 1
            before = self.broker.counters.copy()
            self._everything_ends()
            self.time_passes(1.0)
            self.deliver_everything()
            self.no_more_bytes_are_on_the_device_than_there_are()
            self.nothing_is_on_the_device_that_the_ledger_does_not_know()
            self.the_ledger_is_within_the_budget()
            idle = not any(one.waits or one.busy for one in self._all_work())
            quiet = quiet + 1 if idle and self.broker.counters == before else 0
        self._the_ledger_is_the_truth()

    def _everything_ends(self) -> None:
        for engine in self.engines.values():
            engine.puts_off = engine.fails = False
        self.deliver_everything()
        for engine in self.engines.values():
            for one in engine.work:
                if one.busy:
                    self._run_to_its_end(engine, one)
            for tenant in engine.specs:
                engine.answer_what_was_put_off(tenant)
        self.deliver_everything()

    def _the_ledger_is_the_truth(self) -> None:
        broker = self.broker
        assert broker.waiting(self.now) == []
        really = {
            tenant: held
            for engine in self.engines.values()
            for tenant, held in engine.device.items()
            if held
        }
        held = {one["tenant"]: one["held_bytes"] for one in broker.tenants() if one["held_bytes"]}
        assert held == really
        mine = {
            one.question.granted.fence
            for one in self._all_work()
            if one.has_lease and one.question.granted is not None
        }
        assert {one.fence for one in broker.ledger.leases} == mine
        for number in range(1, self.asked + 1):
            times = [event["t_s"] for event in broker.explain(f"r{number}") or []]
            assert times == sorted(times)

    # --- how it goes ------------------------------------------------------------------------------

    def _load(self, number: int) -> None:
        """Bring all tenants under a standing lease, if it is granted at once."""
        self.deliver_everything()
        self.asks_for_a_standing_lease(number, [(15, 0, 0.0)], "all")
        engine = self.engines[NAMES[number]]
        for work in engine.work:
            if work.busy:
                self._run_to_its_end(engine, work)

    def _run_to_its_end(self, engine: Engine, work: Work) -> None:
        for tenant in engine.missing(work):
            engine.bring(work, tenant, works=True)
        engine.end(work)
        self._deliver(engine, "all")

    def _deliver(self, engine: Engine, heard: str) -> None:
        while heard != "nothing" and engine.said:
            self._broker_takes(engine.name, engine.said.popleft())
            while heard == "all" and engine.told:
                engine.hear()

    def _all_work(self) -> list[Work]:
        return [one for engine in self.engines.values() for one in engine.work]

    def _some_work(
        self, pick: int, fits: Callable[[Engine, Work], bool]
    ) -> tuple[Engine, Work] | tuple[None, None]:
        found = [
            (engine, one)
            for engine in self.engines.values()
            for one in engine.work
            if fits(engine, one)
        ]
        return _pick(found, pick) if found else (None, None)

    def _broker_takes(self, holder: str, message: Message) -> None:
        self._route(self.broker.take(holder, message, self.now))

    def _route(self, orders: Sequence[Order]) -> None:
        for holder, message in orders:
            if isinstance(message, Granted):
                assert message.fence > self.last_fence, "a fencing number did not rise"
                self.last_fence = message.fence
            if isinstance(message, Yield):
                self._check_order(message)
            if (engine := self.engines.get(holder)) is not None:
                engine.told.append(message)

    def _check_order(self, order: Yield) -> None:
        """Of what is in use only a pool may shrink, or a standing lease be asked to end."""
        if order.kind == "grow":
            return
        reports = {one["fence"]: one for one in self.broker.leases(self.now)}
        uses = [
            reports[lease.fence]
            for lease in self.broker.ledger.leases
            if order.tenant in lease.tenants and reports[lease.fence]["busy"]
        ]
        assert order.wait == bool(uses)
        assert order.kind == "shrink" or all(one["standing"] for one in uses)


def _pick(found: Sequence[T], pick: int) -> T:
    return found[pick % len(found)]


def test_two_processes_never_hold_the_same_bytes_and_nobody_waits_for_ever() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )

"""An engine's side of the broker: it asks for device memory, and gives it back when asked.

No byte is taken without a lease. What is asked of the engine (`Yield`) is carried out by the
owner of the tenant, on the engine thread, between two steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from worker.errors import OutOfDeviceMemory
from worker.protocol.messages import (
    Acquire,
    AlsoWaits,
    Brought,
    Declare,
    Granted,
    Hello,
    Message,
    Pause,
    Refused,
    Release,
    Stay,
    TenantSpec,
    Took,
    Use,
    Way,
    Withdraw,
    Yield,
    Yielded,
)
from worker.vram.broker import Broker

log = logging.getLogger(__name__)

ALONE = "engine"  # how an engine without an orchestrator is called in its own ledger


class Owner(Protocol):
    """Who holds tenants on the device."""

    def give_back(self, order: Yield) -> int | None:
        """Carry it out and say how many bytes the tenant has now; None: later, `Leases.gave`."""
        ...

    def held_bytes(self, tenant: str) -> int:
        """What a tenant has on the device now."""
        ...


@dataclass(slots=True)
class Question:
    """An `Acquire` and what has become of it."""

    asked: Acquire
    began: float
    granted: Granted | None = None
    refused: Refused | None = None
    failed: bool = False  # what was computed with it came to nothing
    wanted_back: bool = False  # somebody more urgent waits: to be released after the current step

    @property
    def way(self) -> Way:
        """The one that was granted."""
        assert self.granted is not None, "it has not been granted"
        return self.asked.ways[self.granted.way]


@dataclass(slots=True)
class _Later:
    order: Yield
    began: float


@dataclass(slots=True)
class Leases:
    """Questions and leases of one engine. Engine thread only.

    send: gives a message to the broker; it may answer through `take` before it returns.
    epoch: 0 until the orchestrator has said hello; until then nothing can be asked.
    """

    send: Callable[[Message], None]
    clock: Callable[[], float] = time.monotonic
    epoch: int = 0
    _owners: dict[str, Owner] = field(default_factory=dict)
    _questions: dict[int, Question] = field(default_factory=dict)
    _unwanted: set[int] = field(default_factory=set)
    _open: dict[int, Question] = field(default_factory=dict)  # granted and pausable, by fence
    _later: dict[str, _Later] = field(default_factory=dict)
    _specs: dict[str, tuple[TenantSpec, ...]] = field(default_factory=dict)
    _last_number: int = 0

    @property
    def connected(self) -> bool:
        return self.epoch != 0

    def take(self, message: Message) -> bool:
        """A message of the broker. False for one that is none."""
        match message:
            case Hello():
                self._greet(message)
            case Granted():
                self._granted(message)
            case Refused():
                self._unwanted.discard(message.number)
                if (question := self._questions.pop(message.number, None)) is not None:
                    question.refused = message
            case Pause():
                if (question := self._open.get(message.fence)) is not None:
                    question.wanted_back = True
            case Yield():
                self._give_back(message)
            case Stay():
                self._stay(message)
            case _:
                return False
        return True

    def declare(self, model: str, specs: Sequence[TenantSpec], owner: Owner) -> None:
        """Make a model's tenants known. None of them holds anything yet."""
        self._specs[model] = tuple(specs)
        self._owners |= {spec.id: owner for spec in specs}
        if self.connected:
            self.send(Declare(epoch=self.epoch, model=model, tenants=tuple(specs)))

    def forget(self, model: str) -> None:
        """A model's tenants are gone, and with them what they held."""
        gone = {spec.id for spec in self._specs.get(model, ())}
        for question in list(self._questions.values()):
            if any(gone.intersection(way.tenants) for way in question.asked.ways):
                self.withdraw(question)
        for spec in self._specs.pop(model, ()):
            del self._owners[spec.id]
            self._later.pop(spec.id, None)
        self.send(Declare(epoch=self.epoch, model=model, tenants=()))

    def ask(
        self,
        request_id: str,
        phase: str,
        ways: Sequence[Way],
        *,
        priority: int = 0,
        least_bytes: dict[str, int] | None = None,
        standing: bool = False,
        free_only: bool = False,
        pausable: bool = False,
        model: str = "",
        pixels: int = 0,
        work: float = 1.0,
    ) -> Question:
        """Ask for a lease; the answer comes into the question, maybe much later: whoever does not
        want it any more has to `withdraw` it. least_bytes: of tenants that shrink, where more than
        their floor is needed. The last three: what its seconds depend on
        (worker/protocol/messages.py)."""
        assert self.connected, "the orchestrator has not said hello"
        request_id = _as_client_knows(request_id)
        self._last_number += 1
        asked = Acquire(
            epoch=self.epoch, number=self._last_number, request_id=request_id, phase=phase,
            ways=tuple(ways), priority=priority, least_bytes=least_bytes or {}, standing=standing,
            free_only=free_only, pausable=pausable,
            model=model, pixels=pixels, work=work,
        )  # fmt: skip
        question = Question(asked, self.clock())
        self._questions[asked.number] = question
        self.send(asked)
        return question

    def also(self, question: Question, request_id: str) -> None:
        """Another request waits for the same answer."""
        number, known = question.asked.number, _as_client_knows(request_id)
        self.send(AlsoWaits(epoch=self.epoch, number=number, request_id=known))

    def withdraw(self, question: Question) -> None:
        """Nobody wants the answer any more."""
        number = question.asked.number
        if question.granted is not None:
            self.release(question)
        elif number in self._questions:
            self._unwanted.add(number)  # a grant may be on its way
            self.send(Withdraw(epoch=self.epoch, number=number))

    def brought(self, question: Question, tenant: str, held_bytes: int, seconds: float) -> None:
        """A tenant of a lease is there; 0 bytes: it could not be brought."""
        assert question.granted is not None
        self.send(
            Brought(
                epoch=self.epoch,
                fence=question.granted.fence, tenant=tenant, held_bytes=held_bytes,
                seconds=seconds,
            )
        )  # fmt: skip

    def use(self, question: Question, *, busy: bool, keep_alive_s: float | None = None) -> None:
        """Say that a standing lease is computed with, or no longer. keep_alive_s: its tenants
        leave last for so long; None: as they were declared."""
        assert question.granted is not None
        fence = question.granted.fence
        self.send(Use(epoch=self.epoch, fence=fence, busy=busy, keep_alive_s=keep_alive_s))

    def release(
        self, question: Question, keep_alive_s: float | None = None, *, done: bool = True
    ) -> None:
        """A phase is over. keep_alive_s: as for `use`. done: it came to its end."""
        assert question.granted is not None
        fence = question.granted.fence
        self._open.pop(fence, None)
        self.send(Release(epoch=self.epoch, fence=fence, keep_alive_s=keep_alive_s, done=done))

    def took(self, model: str, phase: str, pixels: int, work: float, seconds: float) -> None:
        """Tell how long a phase took that needs no device memory, as `ask` has the others."""
        self.send(
            Took(
                epoch=self.epoch, model=model, phase=phase, pixels=pixels, work=work,
                seconds=seconds,
            )
        )  # fmt: skip

    def gave(self, tenant: str, held_bytes: int) -> None:
        """A tenant has less now: what `give_back` put off, or without having been asked."""
        later = self._later.pop(tenant, None)
        if later is None:
            self._yielded(0, tenant, held_bytes, 0.0)
            self._ask_again_for(tenant)
            return
        self._yielded(later.order.move, tenant, held_bytes, self.clock() - later.began)

    def _ask_again_for(self, tenant: str) -> None:
        """A grant that is under way may count on what has just been given back."""
        for number, question in list(self._questions.items()):
            named = any(tenant in way.tenants for way in question.asked.ways)
            if number not in self._questions or number in self._unwanted or not named:
                continue
            self._questions[number] = Question(question.asked, question.began)
            self._unwanted.add(number)
            self.send(Withdraw(epoch=self.epoch, number=number))
            self._last_number += 1
            question.asked = msgspec.structs.replace(question.asked, number=self._last_number)
            self._questions[self._last_number] = question
            self.send(question.asked)

    def is_wanted(self, tenant: str) -> Yield | None:
        """The order that was put off, if there is one."""
        later = self._later.get(tenant)
        return later.order if later is not None else None

    @contextmanager
    def phase(
        self,
        request_id: str,
        name: str,
        ways: Sequence[Way],
        wait: Callable[[], None],
        keep_alive_s: float | None = None,
        **more: Any,
    ) -> Iterator[Question]:
        """Hold a lease while the block runs. wait: takes messages, and may raise to give up.
        more: as `ask` takes it.

        Raises OutOfDeviceMemory when it is refused.
        """
        question = self.ask(request_id, name, ways, **more)
        try:
            while question.granted is None:
                if question.refused is not None:
                    raise OutOfDeviceMemory(question.refused.error)
                wait()
        except BaseException:
            self.withdraw(question)
            raise
        done = False
        try:
            yield question
            done = not question.failed
        finally:
            self.release(question, keep_alive_s, done=done)

    def _greet(self, hello: Hello) -> None:
        self.epoch = hello.epoch
        for model, specs in self._specs.items():
            self.send(Declare(epoch=self.epoch, model=model, tenants=specs))

    def _granted(self, message: Granted) -> None:
        question = self._questions.pop(message.number, None)
        if question is None:
            log.error("a lease that nobody asked for: %s", message)
            return
        question.granted = message
        if question.asked.pausable:
            self._open[message.fence] = question
        if message.number in self._unwanted:
            self._unwanted.discard(message.number)
            self.release(question)

    def _give_back(self, order: Yield) -> None:
        owner = self._owners.get(order.tenant)
        began = self.clock()
        held: int | None = 0
        if owner is not None:
            try:
                held = owner.give_back(order)
            except RuntimeError as exc:  # out of memory, above all; what runs goes on
                log.error("%s %s: %s", order.kind, order.tenant, exc)
                held = owner.held_bytes(order.tenant)
        if held is None:
            self._later[order.tenant] = _Later(order, began)
            return
        self._yielded(order.move, order.tenant, held, self.clock() - began)

    def _stay(self, message: Stay) -> None:
        """Nobody waits for what was put off. Nothing to do where it has been given already."""
        later = self._later.get(message.tenant)
        if later is not None and later.order.move == message.move:
            self.gave(message.tenant, self._owners[message.tenant].held_bytes(message.tenant))

    def _yielded(self, move: int, tenant: str, held_bytes: int, seconds: float) -> None:
        self.send(
            Yielded(
                epoch=self.epoch, move=move, tenant=tenant, held_bytes=held_bytes, seconds=seconds
            )
        )


def _as_client_knows(request_id: str) -> str:
    """A front tells requests apart that have the same id by what it adds behind a #."""
    return request_id.partition("#")[0]


def alone(budget_bytes: int, clock: Callable[[], float] = time.monotonic) -> Leases:
    """Leases of an engine that has the device to itself: its own broker, no other process."""
    broker = Broker(budget_bytes)

    def send(message: Message) -> None:
        for _, order in broker.take(ALONE, message, clock()):
            leases.take(order)

    leases = Leases(send, clock)
    leases.take(Hello(peer=ALONE, epoch=broker.join(ALONE, 0)))
    return leases

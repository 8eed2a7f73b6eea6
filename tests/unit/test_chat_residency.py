"""Chat models that come to the device and leave it: no answer changes, and none is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_chat_engine import BLOCK_BYTES, MODEL, PROMPTS, SYSTEM, Bench
from worker.engine.chat.model import LanguageModel
from worker.engine.host import Ticket
from worker.engine.leases import Leases, alone
from worker.protocol.messages import (
    Acquire,
    Brought,
    Declare,
    Failed,
    Generated,
    Granted,
    Hello,
    LoadModel,
    Message,
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
from worker.vram.broker import Broker

BASE = "demo-base"


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["loaded again", "parked"])
def parks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways for weights to be away; the second as on a card, with a CPU's memory."""
    if request.param:
        monkeypatch.setattr(LanguageModel, "parks", staticmethod(lambda device: True))
    return bool(request.param)


class ByHand:
    """A broker whose answers a test gives."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.leases = Leases(self.said.append)
        self.leases.take(Hello(peer="orchestrator", epoch=7))
        self._fence = 0

    def of(self, kind: type[Message]) -> list[Message]:
        return [one for one in self.said if isinstance(one, kind)]

    def sizes(self, model: str) -> dict[str, int]:
        [declared] = [one for one in self.of(Declare) if one.model == model]
        return {spec.id: spec.size_bytes for spec in declared.tenants}

    def grant(self, model: str, **held_bytes: int) -> int:
        """The last question about a model, whole unless it is said; returns the fence."""
        [*_, asked] = [one for one in self.of(Acquire) if f"{model}.weights" in one.ways[0].tenants]
        self._fence += 1
        held = self.sizes(model) | {f"{model}.{part}": size for part, size in held_bytes.items()}
        self.leases.take(Granted(number=asked.number, fence=self._fence, way=0, held_bytes=held))
        return self._fence

    def shrink(self, model: str) -> int:
        """A pool to the least that it works with, as far as its sequences let it."""
        [declared] = [one for one in self.of(Declare) if one.model == model]
        [least] = [spec.floor_bytes for spec in declared.tenants if spec.id == f"{model}.kv"]
        held = self.yielded(self.ask_back(f"{model}.kv", "shrink", least, wait=True))
        assert held is not None
        return held

    @property
    def last_asked(self) -> Acquire:
        [*_, asked] = self.of(Acquire)
        assert isinstance(asked, Acquire)
        return asked

    def ask_back(self, tenant: str, kind: str, held_bytes: int = 0, *, wait: bool = False) -> int:
        """Returns the number of the move."""
        move = 100 + len(self.said)
        self.leases.take(
            Yield(move=move, tenant=tenant, kind=kind, held_bytes=held_bytes, wait=wait)
        )
        return move

    def yielded(self, move: int) -> int | None:
        """The bytes that the tenant has after a move; None: not said yet."""
        found = [one.held_bytes for one in self.of(Yielded) if one.move == move]
        return found[0] if found else None


def text(message: Message) -> str:
    assert isinstance(message, Generated), message
    return message.text


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a model says that never moves."""
    bench = Bench(tmp_path_factory.mktemp("right"))
    for index in range(8):
        bench.ask(str(index), PROMPTS[index])
    return {name: text(one) for name, one in bench.run().items()}


def run_some(bench: Bench, steps: int) -> None:
    for _ in range(steps):
        bench.engine.step()
        bench.is_loading()


def test_a_pool_that_shrinks_and_grows_under_running_answers_changes_none(
    tmp_path: Path, right: dict[str, str]
) -> None:
    bench = Bench(tmp_path, kv_blocks=400, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    for index in range(8):
        bench.ask(str(index), PROMPTS[index])
    whole = broker.sizes(MODEL)[f"{MODEL}.kv"]
    run_some(bench, 6)
    assert broker.yielded(broker.ask_back(f"{MODEL}.kv", "shrink", whole // 2)) < whole
    run_some(bench, 6)
    assert broker.yielded(broker.ask_back(f"{MODEL}.kv", "grow", whole)) == whole

    assert {name: text(one) for name, one in bench.run().items()} == right


def test_a_pool_is_not_shrunk_below_what_a_running_answer_may_need(tmp_path: Path) -> None:
    bench = Bench(tmp_path, kv_blocks=400, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    bench.ask("long", PROMPTS[0], max_tokens=3000)
    run_some(bench, 4)

    held = broker.yielded(broker.ask_back(f"{MODEL}.kv", "shrink", 0))

    needed = bench.model.needed_pool_bytes
    assert held is not None
    assert held >= needed > 0


def test_a_model_that_left_while_idle_comes_back_with_the_next_request(
    tmp_path: Path, right: dict[str, str], parks: bool
) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases, pinned=["You draw."])
    broker.grant(MODEL)
    bench.ask("0", PROMPTS[0])
    bench.run()

    kind = "park" if parks else "drop"
    assert broker.yielded(broker.ask_back(f"{MODEL}.weights", kind)) == 0
    pool = broker.sizes(MODEL)[f"{MODEL}.kv"] if parks else 0
    assert bench.engine.report().gauges["device_bytes_held"] == pool  # type: ignore[index]
    bench.ask("1", PROMPTS[1])
    run_some(bench, 3)
    assert "1" not in bench.outbox.sent  # it waits for its lease
    broker.grant(MODEL)

    results = bench.run()
    assert [text(results[name]) for name in "01"] == [right[name] for name in "01"]


def test_a_pool_that_left_alone_comes_back_too(
    tmp_path: Path, right: dict[str, str], parks: bool
) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases, pinned=["You draw."])
    broker.grant(MODEL)
    bench.ask("0", PROMPTS[0])
    bench.run()

    assert broker.yielded(broker.ask_back(f"{MODEL}.kv", "drop")) == 0
    bench.ask("1", PROMPTS[1])
    run_some(bench, 2)
    broker.grant(MODEL)

    assert text(bench.run()["1"]) == right["1"]
    assert bench.model.pool.cached > 0  # the pinned beginning, computed again


def test_a_model_in_use_declines_and_when_it_is_to_wait_ends_first(
    tmp_path: Path, right: dict[str, str]
) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    bench.ask("0", PROMPTS[0])
    run_some(bench, 3)
    size = broker.sizes(MODEL)[f"{MODEL}.weights"]

    assert broker.yielded(broker.ask_back(f"{MODEL}.weights", "drop")) == size
    move = broker.ask_back(f"{MODEL}.weights", "drop", wait=True)
    bench.ask("1", PROMPTS[1])
    bench.run()

    assert text(bench.outbox.sent["0"][-1]) == right["0"]
    assert broker.yielded(move) == 0
    assert "1" not in bench.outbox.sent
    broker.grant(MODEL)
    assert text(bench.run()["1"]) == right["1"]


def test_use_is_told_when_it_begins_and_when_it_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    fence = broker.grant(MODEL)
    bench.ask("0", PROMPTS[0])
    bench.ask("1", PROMPTS[1])
    bench.run()

    assert [one.busy for one in broker.of(Use) if one.fence == fence] == [False, True, False]


def test_a_model_that_is_here_answers_while_another_waits_for_its_place(
    tmp_path: Path, right: dict[str, str]
) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    bench.ask("base", PROMPTS[0], model=BASE)
    bench.ask("0", PROMPTS[0])

    assert text(bench.run()["0"]) == right["0"]
    assert "base" not in bench.outbox.sent
    broker.grant(BASE)
    assert isinstance(bench.run()["base"], Generated)


def test_a_request_that_goes_away_while_it_waits_takes_its_question_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    run_some(bench, 3)
    first, second = bench.ask("a", PROMPTS[0], model=BASE), bench.ask("b", PROMPTS[0], model=BASE)
    run_some(bench, 2)

    bench.engine.cancel(first)
    assert broker.of(Withdraw) == []
    bench.engine.cancel(second)
    assert len(broker.of(Withdraw)) == 1
    broker.grant(BASE)  # it was under way
    run_some(bench, 3)
    assert BASE not in bench.engine._models


def test_a_load_by_hand_that_nobody_waits_for_any_more_takes_its_question_back(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    run_some(bench, 3)
    bench.send(LoadModel(request_id="load", model=BASE))
    run_some(bench, 2)
    assert broker.of(Withdraw) == []

    bench.engine.cancel(Ticket(b"peer", "load"))

    assert [one.number for one in broker.of(Withdraw)] == [broker.last_asked.number]
    assert BASE not in bench.engine._models


def test_a_refusal_reaches_those_who_wait_with_its_numbers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    run_some(bench, 3)
    bench.ask("a", PROMPTS[0], model=BASE)
    run_some(bench, 2)
    [*_, asked] = broker.of(Acquire)
    broker.leases.take(Refused(number=asked.number, error="needs 9.00 GiB more, 1.00 GiB are"))

    [failed] = [one for one in bench.run().values() if isinstance(one, Failed)]
    assert failed.code == "out_of_device_memory"
    assert "needs 9.00 GiB more" in failed.error


def test_a_deadline_ends_a_request_that_waits_for_its_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    run_some(bench, 3)
    bench.ask("a", PROMPTS[0], model=BASE, deadline_s=10.0)
    run_some(bench, 2)
    bench.now += 11

    ended = bench.run()["a"]
    assert isinstance(ended, Failed)
    assert ended.code == "deadline_exceeded"
    assert len(broker.of(Withdraw)) == 1


def test_two_models_share_a_device_that_holds_one_of_them(
    tmp_path: Path, right: dict[str, str]
) -> None:
    Bench(tmp_path, kv_blocks=100, leases=(broker := ByHand()).leases)
    size = sum(broker.sizes(MODEL).values())
    now = [0.0]
    bench = Bench(tmp_path, kv_blocks=100, leases=alone(size + 1000, lambda: now[0]))
    for index in range(4):
        bench.ask(str(index), PROMPTS[index], model=(MODEL, BASE)[index % 2])
        now[0] += 60.0
        answer = bench.run()[str(index)]
        assert text(answer) == right[str(index)]
        held = bench.engine.report().gauges["device_bytes_held"]  # type: ignore[index]
        assert 0 < held <= size + 1000


def test_the_ways_of_the_question_name_weights_and_pool(tmp_path: Path) -> None:
    Bench(tmp_path, leases=(broker := ByHand()).leases)
    [asked] = broker.of(Acquire)

    assert asked.ways == (
        Way(name="whole", tenants=(f"{MODEL}.weights", f"{MODEL}.kv"), peak_bytes=0),
    )
    assert asked.standing
    assert asked.priority == 1


def test_a_model_that_loads_does_not_hold_up_another_that_is_here(
    tmp_path: Path, right: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    gate = threading.Event()
    load = bench.engine._models._load

    def slow(spec: Any) -> LanguageModel:
        assert gate.wait(60)
        return load(spec)

    monkeypatch.setattr(bench.engine._models, "_load", slow)
    bench.ask("base", PROMPTS[1], model=BASE)
    for index in range(8):
        bench.ask(str(index), PROMPTS[index])
    while sum(isinstance(one[-1], Generated) for one in bench.outbox.sent.values()) < 8:
        bench.engine.step()

    assert {name: text(bench.outbox.sent[name][-1]) for name in right} == right
    assert "base" not in bench.outbox.sent
    gate.set()
    assert text(bench.run()["base"]) == right["1"]


def test_an_answer_does_not_depend_on_the_default_type_that_loading_changes(
    tmp_path: Path, right: dict[str, str]
) -> None:
    bench = Bench(tmp_path)
    torch.set_default_dtype(torch.float16)
    try:
        for index in range(4):
            bench.ask(str(index), PROMPTS[index])
        bench.ask(
            "penalties", PROMPTS[0], temperature=0.9, repetition_penalty=1.1, seed=3,
            presence_penalty=0.3, frequency_penalty=0.2, top_k=40, min_p=0.01,
        )  # fmt: skip
        half = bench.run()
    finally:
        torch.set_default_dtype(torch.float32)
    bench.ask(
        "again", PROMPTS[0], temperature=0.9, repetition_penalty=1.1, seed=3,
        presence_penalty=0.3, frequency_penalty=0.2, top_k=40, min_p=0.01,
    )  # fmt: skip

    assert {name: text(half[name]) for name in "0123"} == {name: right[name] for name in "0123"}
    assert text(bench.run()["again"]) == text(half["penalties"])


# --- requests that a shrunk pool is too small for -------------------------------------------------

# Of a pool of 100 blocks a quarter is left; with the prompt this needs more.
LONG = {"max_tokens": 700, "stop": ["zz"]}


@pytest.fixture(scope="module")
def right_long(tmp_path_factory: pytest.TempPathFactory) -> str:
    bench = Bench(tmp_path_factory.mktemp("right long"), kv_blocks=100)
    bench.ask("long", PROMPTS[9], **LONG)
    return text(bench.run()["long"])


@pytest.fixture
def shrunk(tmp_path: Path) -> tuple[Bench, ByHand]:
    bench = Bench(tmp_path, kv_blocks=100, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    run_some(bench, 2)
    broker.shrink(MODEL)
    assert bench.model.pool.count == 25
    return bench, broker


def needed_bytes(bench: Bench, name: str) -> int:
    """That the pool and its passes take for a request."""
    request = bench.engine._turns.of_ticket(Ticket(b"peer", name))
    assert request is not None
    peak = bench.engine._residency.lane(MODEL).sizes.pass_peak
    return bench.model.pool_bytes_for(request.sequence) + peak


def test_room_is_asked_for_at_once_and_shorter_requests_go_on(
    shrunk: tuple[Bench, ByHand], right: dict[str, str], right_long: str
) -> None:
    bench, broker = shrunk
    bench.ask("long", PROMPTS[9], **LONG)
    bench.ask("0", PROMPTS[0])
    bench.engine.step()
    needed = needed_bytes(bench, "long")

    asked = broker.last_asked
    assert (asked.phase, asked.request_id) == ("pool", "long")
    assert (asked.standing, asked.priority) == (False, 1)
    assert asked.ways[0].tenants == (f"{MODEL}.weights", f"{MODEL}.kv")
    assert asked.least_bytes == {f"{MODEL}.kv": needed}
    assert text(bench.run()["0"]) == right["0"]
    assert "long" not in bench.outbox.sent
    assert len(broker.of(Acquire)) == 2  # it is asked for once

    fence = broker.grant(MODEL, kv=needed)
    assert text(bench.run()["long"]) == right_long
    brought = [one for one in broker.of(Brought) if one.fence == fence]
    assert [(one.tenant, one.held_bytes) for one in brought] == [(f"{MODEL}.kv", needed)]
    assert [one.fence for one in broker.of(Release)] == [fence]


def test_a_pool_that_grew_for_a_request_is_not_shrunk_again_before_it_begins(
    tmp_path: Path, right_long: str
) -> None:
    bench = Bench(tmp_path, kv_blocks=100, leases=(broker := ByHand()).leases, max_running=1)
    broker.grant(MODEL)
    bench.ask("first", PROMPTS[0], max_tokens=30)
    run_some(bench, 2)
    broker.shrink(MODEL)
    bench.ask("long", PROMPTS[9], **LONG)
    bench.engine.step()
    needed = needed_bytes(bench, "long")
    broker.grant(MODEL, kv=needed)
    bench.engine.step()
    assert bench.engine.report().active == 1  # it still waits for the first one to end

    assert broker.shrink(MODEL) == needed
    assert text(bench.run()["long"]) == right_long
    assert broker.shrink(MODEL) < needed


def test_room_that_can_never_be_had_is_a_503_with_the_numbers_and_others_go_on(
    shrunk: tuple[Bench, ByHand], right: dict[str, str]
) -> None:
    bench, broker = shrunk
    bench.ask("long", PROMPTS[9], **LONG)
    bench.ask("0", PROMPTS[0])
    bench.engine.step()
    broker.leases.take(
        Refused(number=broker.last_asked.number, error="pool (whole) needs 9.00 GiB more")
    )

    results = bench.run()

    failure = results["long"]
    assert isinstance(failure, Failed)
    assert (failure.status, failure.code) == (503, "out_of_device_memory")
    assert "needs 9.00 GiB more" in failure.error
    assert text(results["0"]) == right["0"]


def test_room_that_does_not_come_by_the_deadline_is_a_503_with_the_numbers(
    shrunk: tuple[Bench, ByHand],
) -> None:
    bench, broker = shrunk
    bench.ask("long", PROMPTS[9], deadline_s=20.0, **LONG)
    bench.engine.step()
    bench.now += 21

    failure = bench.run()["long"]

    assert isinstance(failure, Failed)
    assert (failure.status, failure.code) == (503, "out_of_device_memory")
    assert "take 2.5 MiB of the KV pool, of which others left 1.2 MiB of 4.7 MiB" in failure.error
    assert "deadline of 20 s" in failure.error
    assert [one.number for one in broker.of(Withdraw)] == [broker.last_asked.number]


def test_a_request_that_goes_away_takes_its_question_for_room_back_and_the_next_asks_anew(
    shrunk: tuple[Bench, ByHand],
) -> None:
    bench, broker = shrunk
    first = bench.ask("long", PROMPTS[9], **LONG)
    bench.ask("longer", PROMPTS[9], **(LONG | {"max_tokens": 800}))
    bench.engine.step()
    question = broker.last_asked
    assert question.request_id == "long"

    bench.engine.cancel(first)
    bench.engine.step()

    assert [one.number for one in broker.of(Withdraw)] == [question.number]
    assert broker.last_asked.request_id == "longer"
    assert broker.last_asked.least_bytes != question.least_bytes
    # The answer to the first question was under way: it is given back, and nothing grows for it.
    broker.leases.take(
        Granted(number=question.number, fence=50, way=0, held_bytes=broker.sizes(MODEL))
    )
    bench.engine.step()
    assert [one.fence for one in broker.of(Release)] == [50]
    assert bench.model.pool.count == 25


def test_a_pool_that_could_not_grow_is_given_back_and_ends_that_request_alone(
    shrunk: tuple[Bench, ByHand], right: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, broker = shrunk
    bench.ask("long", PROMPTS[9], **LONG)
    bench.ask("0", PROMPTS[0])
    bench.engine.step()

    def too_much(pool_bytes: int) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(bench.model, "resize", too_much)
        fence = broker.grant(MODEL)
        bench.engine.step()

    results = bench.run()
    assert isinstance(results["long"], Failed)
    assert results["long"].code == "out_of_device_memory"
    assert text(results["0"]) == right["0"]
    assert [(one.tenant, one.held_bytes) for one in broker.of(Brought) if one.fence == fence] == [
        (f"{MODEL}.kv", 0)
    ]


def test_a_model_that_is_to_leave_does_not_wait_for_a_request_that_waits_for_room(
    shrunk: tuple[Bench, ByHand], right: dict[str, str], right_long: str
) -> None:
    """It stayed until the deadline of that request, and nothing new could begin meanwhile."""
    bench, broker = shrunk
    bench.ask("0", PROMPTS[0])
    bench.ask("long", PROMPTS[9], **LONG)
    bench.ask("longer", PROMPTS[10], **(LONG | {"max_tokens": 800}))
    bench.engine.step()
    needed = needed_bytes(bench, "long")
    assert broker.last_asked.phase == "pool"

    move = broker.ask_back(f"{MODEL}.weights", "drop", wait=True)
    bench.run()

    assert broker.yielded(move) == 0
    assert list(bench.outbox.sent) == ["0"]
    assert len(broker.of(Withdraw)) == 1
    # It comes back with room for what waits first.
    assert (broker.last_asked.phase, broker.last_asked.request_id) == ("chat", "long")
    assert broker.last_asked.least_bytes == {f"{MODEL}.kv": needed}
    broker.grant(MODEL, kv=needed)
    assert text(bench.run()["long"]) == right_long
    assert (broker.last_asked.phase, broker.last_asked.request_id) == ("pool", "longer")


@pytest.mark.parametrize("way", ["asked to grow", "given room"])
def test_a_pinned_prompt_that_had_no_room_is_pinned_when_the_pool_has_grown_and_nothing_runs(
    tmp_path: Path, way: str
) -> None:
    """It was pinned only where nothing ran at the moment in which the pool grew."""
    broker = ByHand()
    bench = Bench(tmp_path, kv_blocks=100, leases=broker.leases, pinned=[SYSTEM * 5])
    whole = broker.sizes(MODEL)[f"{MODEL}.kv"]
    broker.grant(MODEL, kv=whole // 4)
    bench.ask("0", PROMPTS[0])
    run_some(bench, 4)
    assert bench.model.pool.pinned == frozenset()

    if way == "asked to grow":
        assert broker.yielded(broker.ask_back(f"{MODEL}.kv", "grow", whole)) == whole
    else:
        bench.ask("long", PROMPTS[9], **LONG)
        bench.engine.step()
        broker.grant(MODEL)
    assert bench.model.pool.pinned == frozenset()  # something runs
    bench.run()

    beginning = bench.model.reader.beginning(SYSTEM * 5)
    assert len(bench.model.pool.pinned) == len(beginning) // 16 > 25


# --- requests that are given up -------------------------------------------------------------------


def test_a_model_that_was_to_leave_goes_on_when_nobody_wants_its_place_any_more(
    tmp_path: Path, right: dict[str, str]
) -> None:
    bench = Bench(tmp_path, leases=(broker := ByHand()).leases)
    broker.grant(MODEL)
    bench.ask("0", PROMPTS[0])
    run_some(bench, 3)
    size = broker.sizes(MODEL)[f"{MODEL}.weights"]
    move = broker.ask_back(f"{MODEL}.weights", "drop", wait=True)
    bench.ask("1", PROMPTS[1])
    run_some(bench, 2)
    assert bench.engine.report().waiting == 1  # it begins nothing new

    broker.leases.take(Stay(move=move, tenant=f"{MODEL}.weights"))

    assert broker.yielded(move) == size
    results = bench.run()
    assert [text(results[name]) for name in "01"] == [right[name] for name in "01"]
    assert len(broker.of(Acquire)) == 1


class Shared:
    """A real broker between the chat engine and a media engine that the test plays."""

    def __init__(self, budget_bytes: int):
        self.now = 0.0
        self.broker = Broker(budget_bytes)
        self.media = self.broker.join("media", 0)
        self.leases = Leases(self._from_chat, lambda: self.now)
        self.leases.take(Hello(peer="orchestrator", epoch=self.broker.join("chat", 0)))
        self.told: list[Message] = []  # the media engine
        self._numbers = 0

    def ask(self, peak_bytes: int, tenants: tuple[str, ...] = (), **more: Any) -> int:
        """For the media engine; returns the question's number."""
        self._numbers += 1
        way = Way(name="whole", tenants=tenants, peak_bytes=peak_bytes)
        self.say(
            Acquire(
                epoch=self.media, number=self._numbers, request_id=f"job {self._numbers}",
                phase="denoise", ways=(way,), **more,
            )
        )  # fmt: skip
        return self._numbers

    def holds(self, number: int) -> bool:
        return any(isinstance(one, Granted) and one.number == number for one in self.told)

    def release(self, number: int) -> None:
        [fence] = [
            one.fence for one in self.told if isinstance(one, Granted) and one.number == number
        ]
        self.say(Release(epoch=self.media, fence=fence))

    def say(self, message: Message) -> None:
        self._route(self.broker.take("media", message, self.now))

    def after(self, seconds: float) -> None:
        self.now += seconds
        self._route(self.broker.tick(self.now))

    def _from_chat(self, message: Message) -> None:
        self._route(self.broker.take("chat", message, self.now))

    def _route(self, orders: list[tuple[str, Message]]) -> None:
        for holder, order in orders:
            self.broker.check()
            if holder == "media":
                self.told.append(order)
            else:
                self.leases.take(order)


@pytest.fixture
def sizes(tmp_path: Path) -> dict[str, int]:
    """Of the model's tenants, with a pool of 100 blocks."""
    Bench(tmp_path / "sizes", kv_blocks=100, leases=(broker := ByHand()).leases)
    return broker.sizes(MODEL)


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_a_request_that_was_given_up_leaves_the_queue_and_nothing_is_moved_for_it(
    tmp_path: Path, sizes: dict[str, int], how: str
) -> None:
    budget = 2 * sum(sizes.values())
    shared = Shared(budget)
    unet = TenantSpec(
        id="sdxl.unet", model="sdxl", size_bytes=1000, floor_bytes=1000, host_copy=True, back_s=1.0
    )
    shared.say(Declare(epoch=shared.media, model="sdxl", tenants=(unet,)))
    # All is in use but the model that comes first, with the least of its pool.
    least = sizes[f"{MODEL}.weights"] + sizes[f"{MODEL}.kv"] - 75 * BLOCK_BYTES
    job = shared.ask(budget - least - 1000, ("sdxl.unet",))
    bench = Bench(tmp_path, kv_blocks=100, leases=shared.leases)
    bench.ask("0", PROMPTS[0], max_tokens=150)
    ticket = bench.ask("base", PROMPTS[0], model=BASE, deadline_s=5.0)
    run_some(bench, 3)
    assert [one["request_id"] for one in shared.broker.waiting(0.0)] == ["base"]

    bench.now += 6
    shared.after(6)
    if how == "cancelled":
        bench.engine.cancel(ticket)
    bench.run()

    failure = bench.outbox.sent["base"][-1]
    assert isinstance(failure, Failed)
    assert failure.code == ("deadline_exceeded" if how == "deadline" else "cancelled")
    assert shared.broker.waiting(0.0) == []
    what = [event["what"] for event in shared.broker.explain("base") or []]
    assert what == ["asked", "waits", "withdrawn"]
    shared.release(job)
    shared.after(1.0)
    run_some(bench, 3)
    assert [type(one) for one in shared.told] == [Granted]  # nobody was asked for anything
    assert BASE not in bench.engine._models
    assert shared.broker.counters["moved_bytes"] == 0
    assert shared.broker.counters["withdrawn"] == 1


def test_a_long_request_is_not_kept_waiting_by_jobs_that_follow_each_other(
    tmp_path: Path, sizes: dict[str, int], right: dict[str, str], right_long: str
) -> None:
    """The pool grew back only when nobody had asked for anything for two seconds."""
    budget = sum(sizes.values()) + sizes[f"{MODEL}.kv"] // 4
    shared = Shared(budget)
    bench = Bench(tmp_path, kv_blocks=100, leases=shared.leases)
    bench.ask("0", PROMPTS[0], max_tokens=40)  # so that the model is in use
    run_some(bench, 2)
    job = shared.ask(sizes[f"{MODEL}.kv"] // 4 * 3)
    assert shared.holds(job)
    assert bench.model.pool.count < 100
    bench.ask("long", PROMPTS[9], **LONG)
    waited = 0

    while "long" not in bench.outbox.sent:
        run_some(bench, 5)
        shared.after(1.0)
        if shared.holds(job):
            following = shared.ask(sizes[f"{MODEL}.kv"] // 4 * 3)  # before it has ended
            shared.release(job)
            job = following
            waited += not bench.model.scheduler.running
        assert bench.engine.report().gauges["device_bytes_held"] <= budget  # type: ignore[index]
        assert shared.now < 200

    assert text(bench.outbox.sent["long"][-1]) == right_long
    granted = [
        event["waited_s"]
        for event in shared.broker.explain("long") or []
        if event["what"] == "granted"
    ]
    assert granted == [1.0]  # for the job that ran when it came

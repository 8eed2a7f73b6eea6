"""Chat models that come to the device and leave it: no answer changes, and none is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_chat_engine import MODEL, PROMPTS, Bench
from worker.engine.chat.model import LanguageModel
from worker.engine.leases import Leases, alone
from worker.protocol.messages import (
    Acquire,
    Declare,
    Failed,
    Generated,
    Granted,
    Hello,
    Message,
    Refused,
    Use,
    Way,
    Withdraw,
    Yield,
    Yielded,
)

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

    def grant(self, model: str) -> int:
        """The last question about a model; returns the fence."""
        [*_, asked] = [one for one in self.of(Acquire) if f"{model}.weights" in one.ways[0].tenants]
        self._fence += 1
        self.leases.take(
            Granted(number=asked.number, fence=self._fence, way=0, held_bytes=self.sizes(model))
        )
        return self._fence

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

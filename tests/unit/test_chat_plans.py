"""A chat request is planned as it would run: its tokens, its part of the pool, what it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.unit.test_chat_engine import BLOCK_BYTES, MODEL, SYSTEM, Bench
from tests.unit.test_chat_residency import ByHand
from worker.engine.chat.forecast import Answer, Pace, answer_span
from worker.engine.host import Ticket
from worker.protocol.messages import (
    ChatMessage,
    ChatPlanned,
    Failed,
    Generated,
    LoadModel,
    PlanChat,
    UnloadModel,
)
from worker.vram.planner import chat_phase

BASE = "demo-base"
BLOCKS = 64  # 1024 tokens


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, kv_blocks=BLOCKS)


def plan(
    bench: Bench,
    prompt: str,
    max_tokens: int = 8,
    *,
    model: str = MODEL,
    deterministic: bool = False,
) -> ChatPlanned | Failed:
    """Of the same messages as `Bench.ask` has."""
    bench.outbox.sent.pop("plan", None)
    message = PlanChat(
        request_id="plan", model=model, max_tokens=max_tokens, deterministic=deterministic,
        messages=(ChatMessage("system", SYSTEM), ChatMessage("user", prompt)),
    )  # fmt: skip
    bench.engine.submit(Ticket(b"peer", "plan"), message)
    [answer] = bench.outbox.sent["plan"]
    assert isinstance(answer, ChatPlanned | Failed)
    return answer


def planned(bench: Bench, prompt: str, **more: object) -> ChatPlanned:
    answer = plan(bench, prompt, **more)  # type: ignore[arg-type]
    assert isinstance(answer, ChatPlanned), answer
    return answer


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_planned_is_what_runs(deterministic: bool, bench: Bench) -> None:
    bench.ask("first", "a red cube", deterministic=deterministic)
    bench.run()

    before = planned(bench, "a blue star on the table", deterministic=deterministic)
    bench.ask("second", "a blue star on the table", deterministic=deterministic)
    done = bench.run()["second"]

    assert isinstance(done, Generated)
    assert before.prompt_tokens == done.prompt_tokens
    assert before.cached_tokens == done.receipt["prompt_tokens_cached"] > 0
    assert before.context_tokens == done.receipt["context_tokens"] == bench.model.context_tokens
    assert before.max_tokens == 8
    assert before.kv_bytes == -(-(done.prompt_tokens + 8 - 1) // 16) * BLOCK_BYTES
    assert before.pool_bytes == before.whole_pool_bytes == BLOCKS * BLOCK_BYTES


def test_planning_runs_nothing_and_takes_no_block(bench: Bench) -> None:
    planned(bench, "a red cube")

    assert bench.model.pool.used == bench.model.pool.cached == 0
    assert not any(bench.model.scheduler)
    assert not bench.engine.step()


def test_near_the_end_of_the_context_the_answer_has_what_is_left(bench: Bench) -> None:
    words = BLOCKS * 16 - planned(bench, "").prompt_tokens
    texts = ["red " * count for count in range(words - 30, words + 30)]
    room = {text: plan(bench, text, max_tokens=50) for text in texts}
    fitting = {
        text: one.context_tokens - one.prompt_tokens
        for text, one in room.items()
        if isinstance(one, ChatPlanned)
    }
    assert min(fitting.values()) == 1
    assert {one.max_tokens for one in room.values() if isinstance(one, ChatPlanned)} == {
        min(50, left) for left in fitting.values()
    }
    last = min(fitting, key=lambda text: fitting[text])
    found = room[last]
    assert isinstance(found, ChatPlanned)
    assert found.kv_bytes <= found.whole_pool_bytes

    over = next(text for text in texts if text not in fitting)
    refused = room[over]
    bench.ask("over", over)
    really = bench.run()["over"]

    assert isinstance(refused, Failed)
    assert isinstance(really, Failed)
    assert (refused.code, refused.status, refused.error) == (
        really.code, really.status, really.error
    )  # fmt: skip
    assert refused.status == 413
    assert f"{BLOCKS * 16}" in refused.error


def test_a_model_that_is_not_loaded_is_planned_as_it_would_be(bench: Bench) -> None:
    away = planned(bench, "a red cube", model=BASE)
    assert (away.pool_bytes, away.cached_tokens) == (0, 0)
    bench.send(LoadModel(request_id="load", model=BASE))
    bench.run()

    there = planned(bench, "a red cube", model=BASE)

    assert there.pool_bytes == there.whole_pool_bytes
    assert msgspec.structs.replace(there, pool_bytes=0) == away
    bench.send(UnloadModel(request_id="unload", model=BASE))
    bench.run()
    assert planned(bench, "a red cube", model=BASE) == away


def test_a_request_for_which_a_pool_was_shrunk_too_far_asks_for_what_was_planned(
    tmp_path: Path,
) -> None:
    broker = ByHand()
    bench = Bench(tmp_path, kv_blocks=BLOCKS, leases=broker.leases)
    broker.grant(MODEL)
    bench.run()
    broker.shrink(MODEL)
    long = "red " * 400

    found = planned(bench, long)
    bench.ask("long", long)
    bench.engine.step()

    assert found.pool_bytes < found.kv_bytes <= found.whole_pool_bytes
    sizes = broker.sizes(MODEL)
    passes = sizes[f"{MODEL}.kv"] - found.whole_pool_bytes
    phase = chat_phase(MODEL, found.kv_bytes + passes)
    assert broker.last_asked.ways == phase.ways
    assert broker.last_asked.least_bytes == phase.least_bytes


# --- seconds -------------------------------------------------------------------------------------


class Ticking(Bench):
    """Each look at the clock takes a hundredth of a second."""

    @property
    def now(self) -> float:
        self._now += 0.01
        return self._now

    @now.setter
    def now(self, value: float) -> None:
        self._now = value


def test_seconds_are_told_once_something_ran(tmp_path: Path) -> None:
    bench = Ticking(tmp_path, kv_blocks=BLOCKS)
    assert planned(bench, "a red cube").seconds is None
    bench.ask("first", "a red cube")
    bench.run()

    found = planned(bench, "a red cube")

    assert found.seconds is not None
    low, high = found.seconds
    assert 0 < low < high
    # A prompt of which nothing is cached may take longer.
    other = planned(bench, "a red cube", deterministic=True)
    assert other.seconds is not None
    assert other.seconds[1] > high


def test_an_answer_lasts_as_long_as_those_before_it() -> None:
    pace = Pace(pass_s=0.1, prompt_token_s=0.01)
    assert answer_span(pace, 100, 10) is None
    for tokens, first_s, rest_s in ((11, 0.1, 1.0), (21, 0.2, 4.0), (31, 0.3, 3.0)):
        pace = pace.after_answer(Answer(tokens, 100, first_s, rest_s))
    # As few tokens as the fewest, as quick as the quickest; and the contrary, with the prompt.
    low, high = 0.1 + 10 * 0.1, 0.3 + 30 * 0.2
    assert answer_span(pace, 0, 50) == (pytest.approx(low / 1.25), pytest.approx(high * 1.25))
    assert answer_span(pace, 100, 50) == (
        pytest.approx(low / 1.25), pytest.approx((high + 1) * 1.25)
    )  # fmt: skip
    low, high = 0.1 + 4 * 0.1, 0.3 + 4 * 0.2
    assert answer_span(pace, 0, 5) == (pytest.approx(low / 1.25), pytest.approx(high * 1.25))
    # One that was cut says only that the next one may be, too.
    pace = pace.after_answer(Answer(40, 40, 0.1, 3.9))
    low, high = 0.1 + 10 * 0.1, 0.3 + 49 * 0.2
    assert answer_span(pace, 0, 50) == (pytest.approx(low / 1.25), pytest.approx(high * 1.25))


def test_of_answers_only_the_last_ones_count() -> None:
    pace = Pace().after_answer(Answer(90, 90, 9.0, 900.0))
    for _ in range(32):
        pace = pace.after_answer(Answer(1, 90, 1.0, 0.0))

    assert answer_span(pace, 0, 50) == (pytest.approx(1 / 1.25), pytest.approx(1.25))
    assert len(pace.answers) == 32

"""Passes that are recorded and replayed: which, on what memory, and until when.

In the place of CUDA graphs is a tape of operations on the memory they were done on (tests/card.py).
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import tests.card
from tests.card import HostAccess, Tapes, _is
from worker.engine.chat.attention import NAME, PagedKV, register
from worker.engine.chat.cache import blocks_for
from worker.engine.chat.forward import Forward
from worker.engine.chat.graphs import (
    PASSES_BEFORE,
    PassGraphs,
    Recorder,
    Shape,
    _Inputs,
    can_record,
    shape_for,
)
from worker.engine.chat.runner import Runner
from worker.engine.chat.scheduler import Piece, TokenSequence
from worker.engine.chat.varlen import varlen_pass
from worker.engine.parking import Parked
from worker.vram.phases import PAGE_TOKENS, TOKEN_BUCKETS, row_buckets

CPU = torch.device("cpu")
LAYERS, HEADS, QUERY_HEADS, SIZE, VOCABULARY = 2, 2, 4, 16, 99
PAGES, MOST = 12, 6


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", tests.card.varlen_attn)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_model(layers: int = LAYERS) -> Any:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=QUERY_HEADS * SIZE, intermediate_size=96,
        num_hidden_layers=layers, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    config._attn_implementation = NAME
    register()
    return Qwen2ForCausalLM(config).eval()


def a_pool(blocks: int = PAGES) -> PagedKV:
    kv = PagedKV(
        layers=LAYERS, heads=HEADS, head_size=SIZE, blocks=blocks, dtype=torch.float32,
        device=CPU, block_tokens=PAGE_TOKENS, pages=True,
    )  # fmt: skip
    fill(kv)
    return kv


def fill(kv: PagedKV) -> None:
    generator = torch.Generator().manual_seed(1)
    for one in (*kv.keys, *kv.values):
        one.copy_(torch.randn(one.shape, generator=generator))


def decoding(tokens: int, blocks: list[int]) -> Piece:
    sequence = TokenSequence([3] * (tokens - 1), 900, block_tokens=PAGE_TOKENS)
    sequence.ids.append(tokens % VOCABULARY)
    sequence.blocks = blocks
    assert len(blocks) == blocks_for(tokens, PAGE_TOKENS)
    return Piece(sequence, tokens - 1, tokens)


def prompt(begin: int, end: int, blocks: list[int], more: int = 0) -> Piece:
    """more: tokens of it that a later pass computes."""
    ids = [at % VOCABULARY for at in range(end + more)]
    sequence = TokenSequence(ids, 9, block_tokens=PAGE_TOKENS)
    sequence.blocks = blocks
    return Piece(sequence, begin, end)


ROWS = [decoding(300, [4, 1]), decoding(12, [0]), decoding(256, [7])]
MIXED = [*ROWS, prompt(250, 300, [9, 3]), prompt(0, 20, [5], more=9)]


class Graphs(PassGraphs):
    """Over a pool and a model of its own, on tape."""

    def __init__(
        self, recorder: Callable[[torch.device], Recorder] = Tapes, blocks: int = PAGES,
        model: Any = None,
    ):  # fmt: skip
        self.kv = a_pool(blocks)
        self.forward = Forward("model", model or a_model(), CPU)
        super().__init__(
            self.forward, self.kv, most_rows=MOST, pages=4, vocabulary=VOCABULARY, recorder=recorder
        )

    def replays(self, pieces: list[Piece]) -> torch.Tensor:
        """Logits of a recorded pass, once it is recorded."""
        with torch.inference_mode():
            for _ in range(PASSES_BEFORE):
                assert self.run(pieces) is None
            logits = self.run(pieces)
        assert logits is not None
        return logits.clone()

    def as_written(self, pieces: list[Piece]) -> torch.Tensor:
        with torch.inference_mode():
            return self.forward(varlen_pass(self.kv, pieces))


# --- which passes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, (2,)), (2, (2,)), (3, (2, 3)), (6, (2, 4, 6)), (32, (2, 4, 8, 16, 32)),
     (48, (2, 4, 8, 16, 32, 48))],
)  # fmt: skip
def test_rows_are_powers_of_two_and_as_many_as_there_may_be(
    most: int, buckets: tuple[int, ...]
) -> None:
    assert row_buckets(most) == buckets


@given(st.integers(1, 200), st.integers(1, 200))
def test_padding_at_most_doubles_the_rows(rows: int, more: int) -> None:
    buckets = row_buckets(rows + more)
    assert buckets[-1] >= rows
    bucket = next(one for one in buckets if one >= rows)
    assert bucket <= max(2, 2 * rows - 1)


def test_a_shape_is_the_least_that_holds_the_pieces() -> None:
    one = decoding(12, [0])
    assert shape_for([one], MOST) == Shape(2, 2, single=True)
    assert shape_for([one] * 5, MOST) == Shape(6, 6, single=True)
    assert shape_for([one] * 7, MOST) is None
    assert shape_for([prompt(0, 1, [0])], MOST) == Shape(16, 7, single=False)
    assert shape_for([one, prompt(0, 16, [0])], MOST) == Shape(32, 7, single=False)
    assert shape_for([prompt(0, 256, [0])], MOST) == Shape(256, 7, single=False)
    assert shape_for([prompt(0, 257, [0, 1])], MOST) is None


def test_no_padding_is_more_than_a_page() -> None:
    """It is one row, and all of it lies in the scratch block."""
    least = [1, *(below + 1 for below in TOKEN_BUCKETS)]
    assert all(
        bucket - least <= PAGE_TOKENS for least, bucket in zip(least, TOKEN_BUCKETS, strict=False)
    )


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [ROWS[:1], ROWS[:2], ROWS, MIXED, MIXED[3:4]])
def test_a_recorded_pass_computes_what_the_written_one_does(pieces: list[Piece]) -> None:
    graphs = Graphs()
    right = graphs.as_written(pieces)
    stored = [one[: graphs.kv.blocks].clone() for one in (*graphs.kv.keys, *graphs.kv.values)]
    fill(graphs.kv)

    logits = graphs.replays(pieces)

    sampled = sum(piece.samples for piece in pieces)
    assert logits.shape == (sampled, VOCABULARY)
    torch.testing.assert_close(logits, right[:sampled])
    for one, was in zip((*graphs.kv.keys, *graphs.kv.values), stored, strict=True):
        torch.testing.assert_close(one[: graphs.kv.blocks], was)


def test_one_recording_serves_all_passes_of_its_shape() -> None:
    """Other tokens, other places, other lengths, fewer rows; what was there before is no part."""
    graphs = Graphs()
    graphs.replays(MIXED)
    graphs.replays(ROWS)
    passes = [
        [decoding(513, [8, 2, 6]), decoding(1, [10]), decoding(511, [3, 9]), decoding(30, [11])],
        ROWS,
        [decoding(40, [5]), decoding(257, [2, 7]), decoding(31, [1])],
        [prompt(440, 550, [6, 10, 4]), decoding(100, [2])],
        [prompt(0, 90, [3]), prompt(100, 101, [8]), prompt(255, 257, [1, 0])],
        MIXED,
    ]
    recorded = graphs.recorded
    with torch.inference_mode():
        for pieces in passes:
            right = graphs.as_written(pieces)
            for one in (*graphs.kv.keys, *graphs.kv.values):
                one[graphs.kv.scratch] = torch.nan if pieces is passes[0] else 0.5
            logits = graphs.run(pieces)
            assert logits is not None
            torch.testing.assert_close(logits, right[: len(logits)])
    assert graphs.recorded == recorded


def test_places_of_logits_of_a_longer_pass_are_none_in_a_shorter_one() -> None:
    graphs = Graphs()
    long = [prompt(0, 120, [0]), prompt(0, 130, [1])]
    short = [prompt(0, 5, [2])]
    graphs.replays(long)
    right = graphs.as_written(short)
    torch.testing.assert_close(graphs.replays(short), right[:1])


def test_padding_writes_to_the_scratch_block_alone() -> None:
    graphs = Graphs()
    graphs.replays(ROWS)
    graphs.replays(MIXED)
    kv = graphs.kv
    fill(kv)
    before = [one.clone() for one in (*kv.keys, *kv.values)]
    with torch.inference_mode():
        for pieces in (ROWS, MIXED):
            assert graphs.run(pieces) is not None
    own = {
        piece.sequence.blocks[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
        for piece in MIXED
        for at in range(piece.begin, piece.end)
    }
    others = [slot for slot in range(kv.blocks * PAGE_TOKENS) if slot not in own]
    for one, was in zip((*kv.keys, *kv.values), before, strict=True):
        assert torch.equal(one.flatten(0, 1)[others], was.flatten(0, 1)[others])


# --- when -----------------------------------------------------------------------------------------


def test_a_shape_is_recorded_once_some_passes_of_it_have_come() -> None:
    graphs = Graphs()
    with torch.inference_mode():
        for _ in range(PASSES_BEFORE):
            assert graphs.run(ROWS) is None
            assert graphs.run(ROWS[:1]) is None
        assert graphs.recorded == 0
        assert graphs.run(ROWS) is not None
        assert graphs.recorded == 1
        assert graphs.run(ROWS[:1]) is not None
        assert graphs.recorded == 2


def test_a_runner_replays_what_is_recorded_and_never_in_the_deterministic_lane() -> None:
    tapes: list[Tapes] = []

    def made(device: torch.device) -> Tapes:
        tapes.append(Tapes(device))
        return tapes[-1]

    graphs = Graphs(made)
    runner = Runner(graphs.forward, graphs.kv, graphs)
    right = graphs.as_written(ROWS)
    for number in range(PASSES_BEFORE + 3):
        rows = runner.run(ROWS)
        torch.testing.assert_close(torch.stack(rows), right[:3])
        assert sum(one.replays for one in tapes) == max(0, number + 1 - PASSES_BEFORE)
    for piece in ROWS:
        piece.sequence.deterministic = True
    try:
        exact = runner.run(ROWS)
    finally:
        for piece in ROWS:
            piece.sequence.deterministic = False
    assert sum(one.replays for one in tapes) == 3
    torch.testing.assert_close(torch.stack(exact), right[:3])


def test_a_pass_that_samples_nothing_is_replayed_once() -> None:
    graphs = Graphs()
    runner = Runner(graphs.forward, graphs.kv, graphs)
    piece = prompt(0, 20, [5], more=9)
    calls = 0
    written = graphs.forward._run

    def counting(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return written(*given)

    graphs.forward._run = counting
    for _ in range(PASSES_BEFORE + 1):
        assert runner.run([piece]) == []
    assert graphs.recorded == 1
    before = calls
    assert runner.run([piece]) == []
    assert calls == before


# --- until when -----------------------------------------------------------------------------------


def test_a_pool_of_another_size_is_recorded_anew() -> None:
    graphs = Graphs()
    runner = Runner(graphs.forward, graphs.kv, graphs)
    graphs.replays(ROWS)
    old = [*graphs.kv.keys, *graphs.kv.values]

    runner.forget_graphs()
    graphs.kv.resize(PAGES - 1, {block: block for block in range(PAGES - 1)})
    for one in old:
        one.fill_(torch.nan)  # that memory is another's now

    assert graphs.recorded == 0
    torch.testing.assert_close(graphs.replays(ROWS), graphs.as_written(ROWS)[:3])


def test_without_forgetting_it_would_compute_on_memory_that_is_another_s() -> None:
    """That the tape shows what the test above is for."""
    graphs = Graphs()
    graphs.replays(ROWS)
    old = [*graphs.kv.keys, *graphs.kv.values]
    graphs.kv.resize(PAGES - 1, {block: block for block in range(PAGES - 1)})
    for one in old:
        one.fill_(torch.nan)
    with torch.inference_mode():
        logits = graphs.run(ROWS)
    assert logits is not None
    assert logits.isnan().any()


def test_resizing_through_the_runner_forgets() -> None:
    from worker.engine.chat.cache import BlockPool
    from worker.engine.chat.scheduler import Scheduler

    graphs = Graphs()
    runner = Runner(graphs.forward, graphs.kv, graphs)
    graphs.replays(ROWS)
    pool = BlockPool(PAGES, PAGE_TOKENS)
    runner.resize(Scheduler(pool, max_running=MOST, pass_tokens=99), pool, 20)
    assert graphs.recorded == 0
    assert graphs.kv.blocks == 20


def test_weights_that_left_and_came_back_are_recorded_anew() -> None:
    model = a_model()
    parked = Parked(model, CPU, name="model")
    parked.wake()
    graphs = Graphs(model=model)
    right = graphs.replays(ROWS)
    old = [one.detach() for one in model.parameters()]

    graphs.forget()  # as LanguageModel.park does
    parked.park()
    with torch.inference_mode():
        for one in old:
            one.fill_(torch.nan)
    parked.wake()

    assert all(
        one.data_ptr() != was.data_ptr() for one, was in zip(model.parameters(), old, strict=True)
    )
    torch.testing.assert_close(graphs.replays(ROWS), right)


def test_what_is_forgotten_is_freed() -> None:
    graphs = Graphs()
    graphs.replays(ROWS)
    graphs.replays(MIXED)
    gone = [
        weakref.ref(one)
        for one in (graphs._recorder, graphs._inputs, graphs._logits, *graphs._replays.values())
    ]
    assert all(one() is not None for one in gone)

    graphs.forget()

    gc.collect()
    assert [one() for one in gone] == [None] * 5


def test_compiled_code_is_recorded_in_the_place_of_the_other() -> None:
    graphs = Graphs()
    right = graphs.replays(ROWS)
    calls = 0

    def compiled(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits: torch.Tensor = graphs.forward._run(*given)
        return logits

    graphs.forward._compiled = compiled  # as the compiling thread does

    torch.testing.assert_close(graphs.replays(ROWS), right)
    assert calls == 2  # to warm up, and on tape


# --- when it cannot be ----------------------------------------------------------------------------


class Failing:
    """A Recorder that fails as often as it is told, once the work is done."""

    def __init__(self, error: Exception):
        self.error: Exception | None = error
        self.asked = 0

    def __call__(self, device: torch.device) -> Recorder:
        self._tapes = Tapes(device)
        return self

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.asked += 1
        replay = self._tapes.record(work)
        if self.error is not None:
            raise self.error
        return replay


def test_without_memory_nothing_is_recorded_until_something_has_moved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = Failing(torch.OutOfMemoryError("tried to allocate 2 GiB"))
    graphs = Graphs(failing)
    with torch.inference_mode():
        for _ in range(PASSES_BEFORE + 5):
            assert graphs.run(ROWS) is None
    assert failing.asked == 1
    assert "no memory to record passes" in caplog.text

    failing.error = None
    graphs.forget()

    torch.testing.assert_close(graphs.replays(ROWS), graphs.as_written(ROWS)[:3])


def test_what_cannot_be_recorded_is_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(RuntimeError("operation not permitted when stream is capturing"))
    graphs = Graphs(failing)
    runner = Runner(graphs.forward, graphs.kv, graphs)
    right = graphs.as_written(ROWS)
    for _ in range(PASSES_BEFORE + 5):
        torch.testing.assert_close(torch.stack(runner.run(ROWS)), right[:3])
    graphs.forget()
    for _ in range(PASSES_BEFORE + 5):
        runner.run(ROWS)
    assert failing.asked == 1
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "cannot be recorded" in record.getMessage()
    assert record.exc_info is not None


def test_frequencies_that_depend_on_positions_are_not_recorded() -> None:
    plain = Qwen2Config()
    assert can_record(plain)
    for kind, can in (("yarn", True), ("linear", True), ("dynamic", False)):
        rotary = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e6}
        assert can_record(Qwen2Config(rope_parameters=rotary)) is can


# --- that a card could record it ------------------------------------------------------------------


def test_the_tape_refuses_what_reads_or_brings_numbers_of_the_host() -> None:
    number = torch.ones(3)
    for work in (
        lambda: number.sum().item(),
        lambda: bool(number.all()),
        lambda: number + torch.tensor([1.0, 2.0, 3.0]),
        lambda: number[number > 0.5],
        lambda: number.nonzero(),
    ):
        with pytest.raises(HostAccess), tests.card.Tape():
            work()


def test_the_model_reads_no_number_of_the_device_in_any_pass() -> None:
    """Nor while it runs as it is written: each would be a wait for the card."""
    graphs = Graphs()
    paged = varlen_pass(graphs.kv, MIXED)
    with torch.inference_mode(), tests.card.Tape() as tape:
        graphs.forward(paged)
    assert len(tape.operations) > 50


class OnOneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Asserts that everything is computed from tensors on one device that is not the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.computing = 0  # operations that are more than another view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not tests.card.needs_host(func, args), func
        if func is torch.ops.verbatim.attend.default:
            with self:
                return tests.card._attend(*args)
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, out)):
            if _is(one):
                assert one.device.type == "meta", (func, one.device)
        self.names.append(str(func))
        given = {tests.card._memory(one) for one in tree_leaves((args, kwargs)) if _is(one)}
        made = [tests.card._memory(one) for one in tree_leaves(out) if _is(one)]
        self.computing += func._schema.is_mutable or not given.issuperset(made)
        return out


@pytest.mark.parametrize("shape", [Shape(8, 8, True), Shape(64, 9, False)])
def test_a_pass_touches_nothing_but_its_device_and_torchs_kernel_takes_its_arguments(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Qwen2.5-7B's heads, types and vocabulary, on tensors without content: what reads a
    number of one raises, and so does what mixes them with the host's."""
    monkeypatch.undo()  # torch's own varlen_attn
    card = torch.device("meta")
    config = Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=2,
        num_attention_heads=28, num_key_value_heads=4,
    )  # fmt: skip
    config._attn_implementation = NAME
    register()
    with card, torch.inference_mode():
        model = Qwen2ForCausalLM(config).eval().to(torch.bfloat16)
        kv = PagedKV(
            layers=2, heads=4, head_size=128, blocks=20, dtype=torch.bfloat16, device=card,
            block_tokens=PAGE_TOKENS, pages=True,
        )  # fmt: skip
        inputs = _Inputs(kv, TOKEN_BUCKETS[-1], 9, pages=128)
        paged = inputs.of(shape, 8)
        forward = Forward("model", model, card)
        with OnOneDevice() as looked:
            logits = forward(paged)
    assert logits.shape == (8, config.vocab_size)
    assert looked.names.count("torch_attn._varlen_attn.default") == 2
    assert looked.names.count("aten.index_copy_.default") == 4
    assert looked.computing <= 2 * 40 + 21  # docs/decisions/0015 has the numbers

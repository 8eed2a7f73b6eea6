"""Chat on a card: attention over pages and recorded passes, as they are. Skipped without one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from worker.engine.chat import varlen
from worker.engine.chat.attention import NAME, PagedKV, register
from worker.engine.chat.cache import BlockPool, blocks_for
from worker.engine.chat.forward import Forward
from worker.engine.chat.gathered import GatheredPass
from worker.engine.chat.graphs import PASSES_BEFORE, PassGraphs
from worker.engine.chat.runner import Runner
from worker.engine.chat.scheduler import Piece, Scheduler, TokenSequence
from worker.engine.chat.varlen import can_attend, varlen_pass
from worker.engine.parking import Parked
from worker.vram.phases import PAGE_TOKENS, TOKEN_BUCKETS, graph_phase, row_buckets
from worker.vram.probe import device_memory, first_card
from worker.vram.sizes import Peaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(first_card() is None, reason="no NVIDIA card"),
]

CARD = torch.device("cuda")
DTYPE = torch.bfloat16
LAYERS, HEADS, QUERY_HEADS, SIZE, VOCABULARY, MOST = 4, 4, 28, 128, 32_000, 32
OFF = 0.03  # of the largest logit, in bfloat16


@torch.inference_mode(False)
def a_model() -> Any:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=QUERY_HEADS * SIZE, intermediate_size=4096,
        num_hidden_layers=LAYERS, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    config._attn_implementation = NAME
    register()
    return Qwen2ForCausalLM(config).eval().to(CARD, DTYPE)


class Serving:
    """A scheduler and a runner on the card."""

    def __init__(self, model: Any, *, pages: bool = True, graphs: bool = True, blocks: int = 96):
        self.kv = PagedKV(
            layers=LAYERS, heads=HEADS, head_size=SIZE, blocks=blocks, dtype=DTYPE, device=CARD,
            block_tokens=PAGE_TOKENS, pages=pages,
        )  # fmt: skip
        self.forward = Forward("model", model, CARD)
        self.graphs = None
        if graphs:
            self.graphs = PassGraphs(
                self.forward, self.kv, most_rows=MOST, pages=16, vocabulary=VOCABULARY
            )
        self.runner = Runner(self.forward, self.kv, self.graphs)
        self.pool = BlockPool(blocks, PAGE_TOKENS)
        self.scheduler = Scheduler(self.pool, max_running=MOST, pass_tokens=2048)
        self.logits: dict[tuple[int, ...], torch.Tensor] = {}

    def serve(self, asks: list[tuple[list[int], int]], *, deterministic: bool = False) -> None:
        """Logits after each text, of all of them together. The next token is the text's hash, so
        that what rounds otherwise makes no other text."""
        for ids, limit in asks:
            self.scheduler.add(
                TokenSequence(ids, limit, deterministic=deterministic, block_tokens=PAGE_TOKENS)
            )
        while any(self.scheduler):
            pieces = self.scheduler.plan().pieces
            rows = iter(self.runner.run(pieces))
            for piece in pieces:
                self.scheduler.computed(piece)
                if not piece.samples:
                    continue
                sequence, row = piece.sequence, next(rows)
                text = tuple(sequence.ids)
                if sequence.deterministic == deterministic:
                    self.logits[text] = row.float().cpu().clone()
                sequence.ids.append(sum(text[-5:]) * 31 % VOCABULARY)
                if len(sequence.ids) - sequence.prompt_tokens == sequence.limit:
                    self.scheduler.remove(sequence)


def asks(seed: int, count: int, longest: int = 700) -> list[tuple[list[int], int]]:
    chance = random.Random(seed)
    common = [chance.randrange(VOCABULARY) for _ in range(longest)]
    return [
        (
            common[: chance.randint(1, longest)]
            + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 80))],
            chance.randint(8, 40),
        )
        for _ in range(count)
    ]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= OFF * other.abs().max())


@pytest.mark.parametrize(
    ("heads", "query_heads", "size"), [(4, 28, 128), (2, 14, 64), (8, 8, 256), (2, 6, 80)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_this_torch_attends_over_pages(
    heads: int, query_heads: int, size: int, dtype: torch.dtype
) -> None:
    can_attend.cache_clear()
    assert can_attend(CARD, dtype, heads, query_heads, size)
    assert varlen._trial(CARD, dtype, heads, query_heads, size) < varlen.TOLERANCE


@torch.inference_mode()
def test_recorded_passes_passes_over_pages_and_gathered_ones_give_the_same_logits() -> None:
    model = a_model()
    found = []
    for pages, graphs in ((True, True), (True, False), (False, False)):
        serving = Serving(model, pages=pages, graphs=graphs)
        for seed in (1, 7):
            serving.serve(asks(seed, 40))
        found.append(serving.logits)
        if serving.graphs is not None:
            assert serving.graphs.recorded >= 3
    for text, row in found[0].items():
        assert close(row, found[1][text])
        assert close(row, found[2][text])


@torch.inference_mode()
def test_no_pass_waits_for_the_card() -> None:
    serving = Serving(a_model(), graphs=False)
    sequence = TokenSequence([7] * 300, 5, block_tokens=PAGE_TOKENS)
    sequence.blocks = [3, 1]
    for paged in (
        varlen_pass(serving.kv, [Piece(sequence, 0, 300)]),
        GatheredPass(Serving(a_model(), pages=False).kv, [Piece(sequence, 0, 300)]),
    ):
        serving.forward(paged)
        torch.cuda.set_sync_debug_mode("error")
        try:
            serving.forward(paged)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def decoding(block: int) -> Piece:
    sequence = TokenSequence([7] * 39, 5, block_tokens=PAGE_TOKENS)
    sequence.ids.append(8)
    sequence.blocks = [block]
    return Piece(sequence, 39, 40)


def prompt(tokens: int) -> Piece:
    sequence = TokenSequence([7] * tokens, 5, block_tokens=PAGE_TOKENS)
    sequence.blocks = [*range(40, 40 + blocks_for(tokens, PAGE_TOKENS))]
    return Piece(sequence, 0, tokens)


@torch.inference_mode()
def test_all_recorded_passes_hold_no_more_than_is_asked_for_them(tmp_path: Path) -> None:
    model = a_model()
    graphs = Serving(model).graphs
    assert graphs is not None
    passes = [[decoding(row) for row in range(rows)] for rows in row_buckets(MOST)]
    passes += [[prompt(tokens)] for tokens in TOKEN_BUCKETS]
    for pieces in passes:  # what libraries take for themselves
        graphs._forward(varlen_pass(graphs._kv, pieces))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved, free = torch.cuda.memory_reserved(), device_memory("cuda").free_bytes

    for pieces in passes:
        for _ in range(PASSES_BEFORE):
            assert graphs.run(pieces) is None
        assert graphs.run(pieces) is not None

    torch.cuda.synchronize()
    asked = Peaks(tmp_path).of_phase(graph_phase(model.config.to_dict(), "bfloat16", MOST, 0))
    taken = free - device_memory("cuda").free_bytes
    print(
        f"recorded {graphs.recorded} passes: {taken >> 20} MiB of {asked >> 20} that are asked for"
    )
    assert graphs.recorded == len(passes)
    assert torch.cuda.memory_reserved() - reserved <= asked
    assert taken <= asked

    graphs.forget()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved


@torch.inference_mode()
def test_recorded_passes_are_made_anew_when_pool_and_weights_have_moved() -> None:
    model = a_model()
    parked = Parked(model, CARD, name="model")
    parked.wake()
    serving = Serving(model)
    assert serving.graphs is not None
    serving.serve(asks(2, 20))
    first = serving.logits

    serving.runner.resize(serving.scheduler, serving.pool, 40)
    serving.runner.forget_graphs()
    parked.park()
    other = torch.full((1 << 28,), torch.nan, device=CARD)  # where the weights were, perhaps
    parked.wake()
    assert serving.graphs.recorded == 0
    serving.pool.drop_cached()
    serving.logits = {}
    serving.serve(asks(2, 20))

    assert serving.graphs.recorded > 0
    assert other.isnan().all()
    for text, row in serving.logits.items():
        assert close(row, first[text])


@torch.inference_mode()
def test_a_smaller_pool_gives_its_memory_back_to_the_driver() -> None:
    kv = Serving(a_model(), graphs=False, blocks=600).kv
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = device_memory("cuda").free_bytes
    one = sum(one.nbytes for one in (*kv.keys, *kv.values)) // 601

    kv.resize(200, {block: block for block in range(200)})

    torch.cuda.synchronize()
    assert device_memory("cuda").free_bytes - free >= 0.9 * 400 * one


@torch.inference_mode()
def test_bits_of_the_deterministic_lane_do_not_depend_on_the_crowd() -> None:
    model, wanted = a_model(), asks(3, 8, longest=600)
    alone = Serving(model)
    for ask in wanted:
        alone.serve([ask], deterministic=True)
    crowded = Serving(model)
    for ids, limit in asks(4, 12):
        crowded.scheduler.add(TokenSequence(ids, limit, block_tokens=PAGE_TOKENS))
    crowded.serve(wanted, deterministic=True)

    assert alone.logits.keys() == crowded.logits.keys()
    assert len(alone.logits) > 50
    for text, row in alone.logits.items():
        assert torch.equal(row, crowded.logits[text])

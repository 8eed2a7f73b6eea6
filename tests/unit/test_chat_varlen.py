"""Passes over pages: what the kernel is told, and that its answers are those of the other way.

FlashAttention is stood in for (tests/card.py); what only a card can show is in tests/gpu.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

import tests.card
from tests.unit.test_chat_engine import PROMPTS, Bench, hashes
from worker.catalog import chat_catalog
from worker.config import load_settings
from worker.engine.chat import varlen
from worker.engine.chat.attention import NAME, PagedKV, register
from worker.engine.chat.cache import BlockPool, blocks_for
from worker.engine.chat.forward import Forward
from worker.engine.chat.graphs import PassGraphs
from worker.engine.chat.model import LanguageModel, PromptReader
from worker.engine.chat.runner import DECODING_ROWS, Runner
from worker.engine.chat.scheduler import Piece, Scheduler, TokenSequence
from worker.engine.chat.varlen import can_attend, laid_out, sums, varlen_pass
from worker.vram.peak import Peak, Question
from worker.vram.phases import GRAPH_BYTES, PAGE_TOKENS, block_tokens, reads_pages
from worker.vram.planner import ChatBytes, Sizer
from worker.vram.sizes import Peaks

CPU = torch.device("cpu")
HEADS, QUERY_HEADS, SIZE, LAYERS, VOCABULARY = 2, 6, 8, 2, 99


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", tests.card.varlen_attn)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pages of 16 tokens, so that a short text has many. The kernel takes none."""
    monkeypatch.setattr(tests.card, "page_multiple", lambda: 16)
    # Of which no pass is padded by more than a page.
    monkeypatch.setattr("worker.engine.chat.graphs.TOKEN_BUCKETS", (8, 16, 32))
    return 16


def a_pool(blocks: int, page: int = PAGE_TOKENS, *, pages: bool = True, layers: int = 1) -> PagedKV:
    kv = PagedKV(
        layers=layers, heads=HEADS, head_size=SIZE, blocks=blocks, dtype=torch.float32,
        device=CPU, block_tokens=page, pages=pages,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for one in (*kv.keys, *kv.values):
        one.copy_(torch.randn(one.shape, generator=generator))
    return kv


def a_piece(begin: int, end: int, tokens: int, blocks: list[int], page: int) -> Piece:
    """Of a sequence of so many tokens."""
    sequence = TokenSequence([7] * tokens, 5, block_tokens=page)
    sequence.blocks = blocks
    return Piece(sequence, begin, end)


# --- what the kernel is told ----------------------------------------------------------------------


@st.composite
def mixes(draw: st.DrawFn) -> list[Piece]:
    """Decoding rows and pieces of prompts over pages of 16 tokens, each block of one sequence."""
    free = iter(draw(st.permutations(range(200))))
    pieces = []
    for _ in range(draw(st.integers(1, 6))):
        end = draw(st.integers(1, 100))
        begin = draw(st.integers(0, end - 1))
        tokens = draw(st.integers(end, 110))
        blocks = [next(free) for _ in range(blocks_for(tokens, 16))]
        pieces.append(a_piece(begin, end, tokens, blocks, 16))
    return pieces


@settings(max_examples=200, deadline=None)
@given(mixes(), st.integers(0, 16), st.integers(0, 3))
def test_every_token_has_a_place_and_only_padding_goes_to_the_scratch_block(
    pieces: list[Piece], padding: int, empty: int
) -> None:
    kv = a_pool(200, 16)
    count = sum(piece.end - piece.begin for piece in pieces)
    tokens, rows = count + padding, len(pieces) + (padding > 0) + empty

    one = laid_out(pieces, kv, tokens=tokens, rows=rows, single=False)

    assert len(one.ids) == len(one.positions) == len(one.slots) == tokens
    assert len(one.begins) == rows + 1
    assert len(one.lengths) == len(one.tables) == rows
    for piece, begin, end, length in zip(
        pieces, one.begins, one.begins[1:], one.lengths, strict=False
    ):
        assert end - begin == piece.end - piece.begin
        assert length == piece.end
        assert one.positions[begin:end] == [*range(piece.begin, piece.end)]
        for at, slot in zip(range(piece.begin, piece.end), one.slots[begin:end], strict=True):
            assert divmod(slot, 16) == (piece.sequence.blocks[at // 16], at % 16)
    assert one.begins[-1] == tokens
    assert [slot // 16 for slot in one.slots[count:]] == [kv.scratch] * padding
    assert one.lengths[len(pieces) :] == [padding] * (padding > 0) + [0] * empty
    assert len(set(one.slots)) == tokens
    ends = [end - 1 for end, piece in zip(one.begins[1:], pieces, strict=False) if piece.samples]
    assert one.sampled == ends


def test_more_padding_than_the_scratch_block_holds_is_refused() -> None:
    kv, piece = a_pool(4, 16), a_piece(0, 3, 3, [0], 16)
    with pytest.raises(AssertionError):
        laid_out([piece], kv, tokens=20, rows=2, single=False)
    assert laid_out([piece], kv, tokens=19, rows=2, single=False).slots[-1] == 4 * 16 + 15


@settings(max_examples=100, deadline=None)
@given(mixes())
def test_a_pass_over_pages_attends_as_each_of_its_pieces_would_alone(pieces: list[Piece]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", tests.card.varlen_attn)
        patch.setattr(tests.card, "page_multiple", lambda: 16)
        attends_as_alone(pieces, a_pool(200, 16))


def attends_as_alone(pieces: list[Piece], kv: PagedKV) -> None:
    before = [one.clone() for one in (kv.keys[0], kv.values[0])]
    paged = varlen_pass(kv, pieces)
    count = paged.ids.shape[1]
    # As a model hands them over: a token's heads side by side.
    query = torch.randn(1, count, QUERY_HEADS, SIZE).transpose(1, 2)
    key, value = torch.randn(2, 1, count, HEADS, SIZE).transpose(2, 3)

    out = paged.attend(0, query, key, value, SIZE**-0.5)

    assert out.shape == (1, count, QUERY_HEADS, SIZE)
    begin, written = 0, set()
    for piece in pieces:
        end = begin + piece.end - piece.begin
        whole = []
        for pages, new in ((kv.keys[0], key), (kv.values[0], value)):
            own = pages[piece.sequence.blocks].flatten(0, 1)[: piece.end]
            assert torch.equal(own[piece.begin :], new[0, :, begin:end].transpose(0, 1))
            whole.append(own.transpose(0, 1)[None])
        mask = torch.ones(end - begin, piece.end, dtype=torch.bool).tril(piece.begin)
        alone = scaled_dot_product_attention(
            query[:, :, begin:end], *whole, attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(out[:, begin:end], alone.transpose(1, 2))
        written |= set(paged._rows.slots[begin:end].tolist())
        begin = end
    others = [slot for slot in range(kv.blocks * kv.block_tokens) if slot not in written]
    for pages, was in zip((kv.keys[0], kv.values[0]), before, strict=True):
        assert torch.equal(pages.flatten(0, 1)[others], was.flatten(0, 1)[others])


@pytest.mark.parametrize("rows", [3, 16])
def test_padded_decoding_rows_have_one_token_each(rows: int) -> None:
    kv = a_pool(4)
    pieces = [a_piece(255, 256, 256, [2], 256), a_piece(300, 301, 301, [3, 0], 256)]
    paged = varlen_pass(kv, pieces, fixed_rows=rows)

    assert paged._rows.single
    assert paged._rows.begins.tolist() == [*range(rows + 1)]
    assert paged._rows.lengths.tolist() == [256, 301] + [1] * (rows - 2)
    assert paged.kept.tolist() == [*range(rows)]
    assert set(paged._rows.tables[2:, 0].tolist()) == {kv.scratch}
    attends_as_alone(pieces, kv)


def test_a_token_alone_is_padded_to_two() -> None:
    kv = a_pool(2)
    paged = varlen_pass(kv, [a_piece(299, 300, 300, [1, 0], 256)])
    assert paged.ids.shape == (1, 2)
    assert paged.kept.tolist() == [0, 0]
    assert paged._rows.slots.tolist() == [43, 2 * 256]  # token 299 is the 44th of page 0


# --- whether it is to be had ----------------------------------------------------------------------


def test_pages_are_for_cards_and_for_types_and_heads_that_flash_attention_takes() -> None:
    assert reads_pages("cuda", "bfloat16", 128)
    assert reads_pages("cuda", "float16", 256)
    assert not reads_pages("cuda", "float32", 128)
    assert not reads_pages("cuda", "bfloat16", 264)
    assert not reads_pages("cuda", "bfloat16", 100)
    assert not reads_pages("cpu", "bfloat16", 128)
    assert block_tokens("cuda", "bfloat16", 128) == PAGE_TOKENS
    assert block_tokens("cuda", "float32", 128) == block_tokens("cpu", "bfloat16", 128) == 16


def trial(monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(varlen, "_has_kernel", lambda device: True)
    monkeypatch.setattr(varlen, "_trial", lambda *given: trial_of(CPU, *given[1:]))
    can_attend.cache_clear()
    return can_attend(torch.device("cuda"), torch.float32, HEADS, QUERY_HEADS, SIZE)


trial_of = varlen._trial


def test_a_kernel_that_attends_rightly_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial(monkeypatch)
    assert trial_of(CPU, torch.float32, HEADS, QUERY_HEADS, SIZE) < 1e-5


def test_a_kernel_that_writes_all_rows_to_the_first_ones_place_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def at_the_first_place(query: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        out = tests.card.varlen_attn(query, *given, **more)
        begins = given[2].tolist()
        if more["window_size"] == (-1, -1):
            out[: begins[1]], out[begins[1] :] = out[begins[-2] : begins[-1]].clone(), 0
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", at_the_first_place)
    assert not trial(monkeypatch)
    assert "blocks are gathered" in caplog.text


def test_a_kernel_without_pages_is_not_taken_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("block_table is only supported with FA3")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", refuses)
    assert not trial(monkeypatch)
    assert "only supported with FA3" in caplog.text


def test_a_cpu_has_no_kernel_and_nothing_is_tried() -> None:
    assert not can_attend(CPU, torch.bfloat16, HEADS, QUERY_HEADS, SIZE)


# --- the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [False, True])
def test_what_is_parked_or_moved_is_what_was_there(pages: bool) -> None:
    kv = a_pool(6, 16, pages=pages, layers=2)

    def block(number: int) -> list[torch.Tensor]:
        return [one.select(0 if pages else 1, number).clone() for one in (*kv.keys, *kv.values)]

    two, five = block(2), block(5)
    kept = kv.read([5, 2])
    kv.wipe([2, 5])
    assert not any(one.any() for one in block(2))
    kv.write([0, 1, 3], kept)  # one more than there were

    assert all(map(torch.equal, block(0), five))
    assert all(map(torch.equal, block(1), two))
    kv.resize(2, {1: 0, 0: 1})
    assert kv.blocks == 2
    assert all(map(torch.equal, block(0), two))
    assert all(map(torch.equal, block(1), five))
    kv.resize(0, {})
    assert all(one.numel() == 0 for one in (*kv.keys, *kv.values))


def test_a_pools_bytes_are_those_of_its_blocks_and_a_page_for_padding() -> None:
    kv = a_pool(5, layers=3)
    size = PagedKV.block_bytes(
        layers=3, heads=HEADS, head_size=SIZE, dtype=torch.float32, block_tokens=PAGE_TOKENS
    )
    assert sum(one.nbytes for one in (*kv.keys, *kv.values)) == 6 * size


# --- against transformers' own generate -----------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The library's, and the same with our attention."""
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=QUERY_HEADS * SIZE, intermediate_size=96,
        num_hidden_layers=LAYERS, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS,
        bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    plain = Qwen2ForCausalLM(config).eval()
    plain.generation_config.pad_token_id = 0
    ours = copy.deepcopy(plain)
    register()
    ours.set_attn_implementation(NAME)
    return plain, ours


class Serving:
    """A scheduler and a runner over a pool, that move sequences as the engine does."""

    def __init__(
        self, model: Any, blocks: int, page: int, *, pages: bool, pass_tokens: int,
        graphs: bool = False, most: int = 6,
    ):  # fmt: skip
        kv = a_pool(blocks, page, pages=pages, layers=LAYERS)
        forward = Forward("model", model, CPU)
        self.graphs = None
        if graphs:
            self.graphs = PassGraphs(
                forward, kv, most_rows=most, pages=blocks_for(600, page), vocabulary=VOCABULARY,
                recorder=tests.card.Tapes,
            )  # fmt: skip
        self.kv = kv
        self.page = page
        self.runner = Runner(forward, kv, self.graphs)
        self.pool = BlockPool(blocks, page)
        self.scheduler = Scheduler(self.pool, max_running=most, pass_tokens=pass_tokens)
        self.most_parked = 0
        self.cached = 0

    def add(self, ids: list[int], limit: int, *, deterministic: bool = False) -> TokenSequence:
        sequence = TokenSequence(ids, limit, deterministic=deterministic, block_tokens=self.page)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.most_parked = max(self.most_parked, self.scheduler.parked)
        for sequence, had in plan.park:
            self.runner.park(sequence, had)
        for sequence in plan.resume:
            self.runner.resume(sequence)
        rows = self.runner.run(plan.pieces) if plan.pieces else []
        for piece in plan.pieces:
            self.scheduler.computed(piece)
        sampled = [piece.sequence for piece in plan.pieces if piece.samples]
        for sequence, row in zip(sampled, rows, strict=True):
            if not sequence.decoding:
                self.cached += sequence.cached
            sequence.ids.append(int(row.argmax()))
            if len(sequence.ids) - sequence.prompt_tokens == sequence.limit:
                self.scheduler.remove(sequence)
        self.pool.check()

    def resize(self, blocks: int) -> None:
        self.runner.resize(self.scheduler, self.pool, blocks)


def requests(seed: int, count: int, longest: int, most: int = 12) -> list[tuple[list[int], int]]:
    """Prompts, half of which begin alike, and how many tokens each wants, at most `most`."""
    chance = random.Random(seed)
    common = [chance.randrange(VOCABULARY) for _ in range(longest)]
    found = []
    for number in range(count):
        ids = [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, longest))]
        ids = common[: chance.randint(1, longest)] + ids if number % 2 else ids
        found.append((ids, chance.randint(1, most)))
    return found


def generated(plain: Any, ids: list[int], count: int) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        made = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
        )
    tokens: list[int] = made[0].tolist()
    return tokens


@pytest.mark.timeout(300)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_texts_are_those_of_generate_whatever_is_mixed_parked_found_and_resized(
    seed: int, graphs: bool, models: tuple[Any, Any], small_pages: int
) -> None:
    plain, ours = models
    chance = random.Random(seed)
    asks = requests(seed, 12, 40, most=35)
    serving = Serving(ours, 40, small_pages, pages=True, pass_tokens=29, graphs=graphs)
    sequences: list[TokenSequence] = []
    recorded = steps = 0
    with torch.inference_mode():
        for number, (ids, limit) in enumerate(asks):
            sequences.append(serving.add(ids, limit, deterministic=number % 5 == 4))
            for _ in range(chance.randint(0, 3)):
                serving.step()
        while any(serving.scheduler):
            serving.step()
            steps += 1
            if steps % 20 == 0:
                serving.resize(chance.choice([8, 11]) if steps % 40 else 40)
            recorded = max(recorded, serving.graphs.recorded if serving.graphs else 0)
    assert serving.most_parked > 0
    assert serving.cached > 0
    assert (recorded > 0) == graphs
    for sequence, (ids, limit) in zip(sequences, asks, strict=True):
        assert sequence.ids == generated(plain, ids, limit)


def test_texts_over_whole_pages_are_those_over_gathered_blocks(models: tuple[Any, Any]) -> None:
    _, ours = models
    chance = random.Random(9)
    common = [chance.randrange(VOCABULARY) for _ in range(300)]
    asks = [
        (common[: 300 - 20 * at] + ids, limit) for at, (ids, limit) in enumerate(requests(9, 6, 90))
    ]
    found = []
    for pages in (True, False):
        serving = Serving(ours, 30, PAGE_TOKENS, pages=pages, pass_tokens=300)
        sequences = [serving.add(ids, limit) for ids, limit in asks]
        with torch.inference_mode():
            while any(serving.scheduler):
                serving.step()
        assert serving.cached >= PAGE_TOKENS
        found.append([sequence.ids for sequence in sequences])
    assert found[0] == found[1]


# --- the deterministic lane -----------------------------------------------------------------------


def test_bits_of_the_deterministic_lane_do_not_depend_on_who_else_is_served(
    models: tuple[Any, Any], small_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the shapes in which it is computed, which on a card is what decides."""
    _, ours = models
    shapes: dict[tuple[int, ...], set[tuple[Any, ...]]] = {}
    bits: dict[tuple[int, ...], set[bytes]] = {}
    asks = requests(3, 6, 90)
    for crowd in (0, 5):
        serving = Serving(ours, 90, small_pages, pages=True, pass_tokens=70, most=12)
        run, attend = serving.runner.run, varlen.attend
        seen: list[tuple[Any, ...]] = []

        def looking(query: Any, *given: Any, attend: Any = attend, seen: Any = seen) -> Any:
            rows = given[2]
            seen.append((tuple(query.shape), rows.most_tokens, len(rows.lengths)))
            return attend(query, *given)

        monkeypatch.setattr(varlen, "attend", looking)

        def recording(
            pieces: Any, run: Any = run, seen: Any = seen, alone: bool = not crowd
        ) -> Any:
            rows = run(pieces)
            sampled = [piece for piece in pieces if piece.samples]
            for piece, row in zip(sampled, rows, strict=True):
                if piece.sequence.deterministic:
                    text = tuple(piece.sequence.ids)
                    bits.setdefault(text, set()).add(row.numpy().tobytes())
                    if alone:
                        shapes.setdefault(text, set()).add(seen[-1])
            return rows

        monkeypatch.setattr(serving.runner, "run", recording)
        with torch.inference_mode():
            for number, (ids, limit) in enumerate(asks):
                serving.add(ids, limit, deterministic=True)
                for other in range(crowd):
                    serving.add(ids[other:] or [1], 3)
                if not crowd or number % 2:
                    while any(serving.scheduler):
                        serving.step()
            while any(serving.scheduler):
                serving.step()
        monkeypatch.setattr(varlen, "attend", attend)
    assert len(bits) > 20
    assert all(len(found) == 1 for found in bits.values())
    decoded = {shape for found in shapes.values() for shape in found if shape[1] == 1}
    assert decoded == {((DECODING_ROWS, QUERY_HEADS, SIZE), 1, DECODING_ROWS)}


# --- the engine -----------------------------------------------------------------------------------


def on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded from now on have pages and record passes, as on a card."""
    for name in ("reads_pages", "can_attend"):
        monkeypatch.setattr(f"worker.engine.chat.model.{name}", lambda *_: True)
    monkeypatch.setattr(PassGraphs.__init__, "__kwdefaults__", {"recorder": tests.card.Tapes})


def test_a_model_forgets_what_it_recorded_before_its_weights_or_its_pool_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pages: int
) -> None:
    on_pages(monkeypatch)
    spec = chat_catalog(load_settings("demo", {})).default("chat")
    model = LanguageModel(
        spec, CPU, tmp_path, PromptReader(spec), kv_bytes=1 << 20, max_running=4, parks=True
    )

    def recorded() -> int:
        graphs = model.runner._graphs
        assert graphs is not None
        return graphs.recorded

    def use() -> list[int]:
        sequence = TokenSequence([5, 6, 7], 9, block_tokens=small_pages)
        model.scheduler.add(sequence)
        while any(model.scheduler):
            pieces = model.scheduler.plan().pieces
            for row, piece in zip(model.runner.run(pieces), pieces, strict=True):
                model.scheduler.computed(piece)
                sequence.ids.append(int(row.argmax()))
            if len(sequence.ids) == 12:
                model.scheduler.remove(sequence)
        assert recorded() > 0
        return sequence.ids

    for leave, come_back in (
        (model.park, model.wake),
        (lambda: model.resize(0), lambda: model.resize(1 << 20)),
        (model.close, lambda: None),
    ):
        model.wake()
        model.resize(1 << 20)
        before = use()
        leave()
        assert recorded() == 0
        come_back()
        model.pool.drop_cached()
        assert use() == before


@pytest.mark.timeout(600)
def test_an_engine_over_pages_with_recorded_passes_answers_as_it_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pages: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    answers = []
    for pages in (False, True):
        if pages:
            on_pages(monkeypatch)
        bench = Bench(tmp_path, kv_blocks=120, max_running=6)
        for index, prompt in enumerate(PROMPTS[:20]):
            bench.ask(str(index), prompt, deterministic=index % 10 == 9)
        bench.run()
        for index in range(20, 30):  # found but for the last words
            bench.ask(str(index), f"{index} red cubes")
            bench.run()
        answers.append(hashes(bench.run(), 30))
        assert bench.model.runner._kv.pages == pages
    assert answers[0] == answers[1]
    assert "recorded passes of 6 tokens in 6 rows" in caplog.text  # as many as there may be
    assert "recorded passes of 32 tokens in 7 rows" in caplog.text


def test_sums_are_of_what_is_before() -> None:
    assert sums([3, 0, 5]) == [0, 3, 3, 8]
    assert sums([]) == [0]


# --- what is asked for on a card ------------------------------------------------------------------


class PeaksByTokens(Peaks):
    """A pass takes 1 KiB for each of its tokens."""

    def ask(self, questions: Sequence[Question]) -> list[Peak]:
        return [
            Peak(weight_bytes=9, parked_bytes=9, streamed_bytes=9, peak_bytes=one.tokens << 10)
            for one in questions
        ]


def sizes_on_a_card(dtype: str) -> ChatBytes:
    spec = replace(chat_catalog(load_settings("gpu-24gb", {})).specs[0], dtype=dtype)
    peaks = PeaksByTokens(Path("nowhere"))
    return Sizer(peaks, "cuda", kv_bytes=2 << 30, max_running=32).chat(spec)


def test_a_card_is_asked_for_whole_pages_and_for_what_recorded_passes_hold() -> None:
    sizes = sizes_on_a_card("bfloat16")

    page = 2 * 28 * 4 * 128 * 2 * PAGE_TOKENS
    assert sizes.pool == (2 << 30) // page * page
    assert sizes.least_pool % page == 0
    # Of 2 to 32 rows and of 16 to 256 tokens; the block of padding; the logits of 32 rows.
    recorded = 10 * GRAPH_BYTES + page + 32 * 152_064 * 2
    assert sizes.pass_peak == (2048 << 10) + (256 << 10) + recorded


def test_where_pages_are_not_read_nothing_is_asked_for_recorded_passes() -> None:
    sizes = sizes_on_a_card("float32")

    assert sizes.pass_peak == 2048 << 10
    assert sizes.pool % (2 * 28 * 4 * 128 * 4 * 16) == 0

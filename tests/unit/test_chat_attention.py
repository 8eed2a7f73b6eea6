"""Attention over blocks against the library's own over whole sequences."""

from __future__ import annotations

import math
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.chat import kernels as kernel_module
from worker.engine.chat.attention import PagedKV
from worker.engine.chat.cache import BLOCK_TOKENS, blocks_for
from worker.engine.chat.gathered import GatheredPass
from worker.engine.chat.kernels import can_decode, load
from worker.engine.chat.scheduler import Piece, TokenSequence

HEADS, QUERY_HEADS, SIZE = 2, 6, 8


def decoding(tokens: int, blocks: list[int], *, deterministic: bool = False) -> TokenSequence:
    """A sequence whose last token is to be computed."""
    sequence = TokenSequence([1] * (tokens - 1), 5, deterministic=deterministic)
    sequence.ids.append(1)
    sequence.computed = tokens - 1
    sequence.blocks = blocks
    assert len(blocks) == blocks_for(tokens)
    return sequence


def a_pool(blocks: int, size: int = SIZE, dtype: torch.dtype = torch.float32) -> PagedKV:
    kv = PagedKV(
        layers=1, heads=HEADS, head_size=size, blocks=blocks, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for one in (*kv.keys, *kv.values):
        one.copy_(torch.randn(one.shape, generator=generator))
    return kv


def of_all_lengths(kv: PagedKV) -> list[TokenSequence]:
    """Rows with blocks of their own; in every other block of the pool is what is no number."""
    free = iter(range(1, kv.blocks))
    lengths = (5, 16, 17, 40, 150, 33)
    sequences = [
        decoding(length, [next(free) for _ in range(blocks_for(length))]) for length in lengths
    ]
    used = {block for sequence in sequences for block in sequence.blocks}
    for block in {*range(kv.blocks)} - used:
        kv.keys[0][:, block] = kv.values[0][:, block] = math.nan
    return sequences


def check(kv: PagedKV, sequences: list[TokenSequence], paged: GatheredPass, off: float) -> None:
    """Each row's attention is that of its sequence alone, and padding is zero.

    off: the greatest difference from the library's attention in double precision.
    """
    rows, dtype = paged.ids.shape[1], kv.keys[0].dtype
    size = kv.keys[0].shape[-1]
    query = torch.randn(1, QUERY_HEADS, rows, size).to(dtype)
    # As a model hands them over: a token's heads side by side.
    key, value = torch.randn(2, 1, rows, HEADS, size).to(dtype).transpose(2, 3)

    out = paged.attend(0, query, key, value, size**-0.5)

    assert sorted(len(piece.sequence.ids) for piece in paged.order) == sorted(
        len(one.ids) for one in sequences
    )
    for row, piece in enumerate(paged.order):
        blocks, tokens = piece.sequence.blocks, piece.end
        last = (tokens - 1) % BLOCK_TOKENS
        assert torch.equal(kv.keys[0][:, blocks[-1], last], key[0, :, row])
        assert torch.equal(kv.values[0][:, blocks[-1], last], value[0, :, row])
        whole = [
            one[:, blocks].reshape(1, HEADS, -1, size)[:, :, :tokens].double()
            for one in (kv.keys[0], kv.values[0])
        ]
        alone = scaled_dot_product_attention(
            query[:, :, row : row + 1].double(), *whole, enable_gqa=True
        )
        torch.testing.assert_close(out[:, row].double(), alone[:, :, 0], rtol=off, atol=off)
    assert not out[:, len(paged.order) :].any()


@pytest.mark.parametrize("fixed_rows", [None, 8])
def test_rows_of_all_lengths_are_attended_to_as_if_alone_and_never_see_foreign_blocks(
    fixed_rows: int | None,
) -> None:
    kv = a_pool(40)
    sequences = of_all_lengths(kv)
    pieces = [Piece(one, one.computed, len(one.ids)) for one in sequences]
    check(kv, sequences, GatheredPass(kv, pieces, fixed_rows=fixed_rows), 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [16, 48, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_the_kernel_does_so_too(size: int, dtype: torch.dtype, off: float) -> None:
    kv = a_pool(40, size, dtype)
    sequences = of_all_lengths(kv)
    pieces = [Piece(one, one.computed, len(one.ids)) for one in sequences]
    assert kv.has_kernel()
    check(kv, sequences, GatheredPass(kv, pieces, kernel=True), off)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_what_all_rows_begin_with_is_read_once_with_the_same_result(rows: int) -> None:
    kv = a_pool(20 + rows, 32)
    common = [*reversed(range(20))]
    lengths = [20 * 16 + 1 + n % 16 for n in range(rows)]
    sequences = [decoding(tokens, [*common, 20 + n]) for n, tokens in enumerate(lengths)]
    pieces = [Piece(one, one.computed, len(one.ids)) for one in sequences]
    paged = GatheredPass(kv, pieces, kernel=True)
    assert paged._tables is not None
    assert paged._tables.common == (20 if rows > 1 else 0)
    check(kv, sequences, paged, 1e-5)


@pytest.mark.usefixtures("kernels")
def test_a_prompt_beside_decoding_rows_is_stored_and_attended_to() -> None:
    row = decoding(40, [0, 1, 2])
    prompt = TokenSequence([1] * 50, 5)
    prompt.computed, prompt.blocks = 20, [6, 4, 9, 3]
    pieces = [Piece(prompt, 20, 50), Piece(row, row.computed, 40)]
    query, made = torch.randn(1, QUERY_HEADS, 31, 32), torch.randn(2, 1, HEADS, 31, 32)
    outs = []
    for kernel in (False, True):
        kv = a_pool(20, 32)
        paged = GatheredPass(kv, pieces, kernel=kernel)
        outs.append(paged.attend(0, query, *made, 32**-0.5))
        stored = kv.keys[0][:, prompt.blocks].reshape(HEADS, -1, 32)[:, 20:50]
        assert torch.equal(stored, made[0, 0, :, 1:])
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_made_one_by_the_kernel(bad: float) -> None:
    kv = a_pool(4, 16)
    sequence = decoding(40, [0, 1, 2])
    kv.keys[0][0, 1, 3, 5] = bad
    paged = GatheredPass(kv, [Piece(sequence, 39, 40)], kernel=True)
    query, made = torch.ones(1, QUERY_HEADS, 2, 16), torch.randn(2, 1, HEADS, 2, 16)

    out = paged.attend(0, query, *made, 0.25)

    first, second = out[0, 0].chunk(2)  # the query heads of either key head
    assert first.isnan().all()
    assert second.isfinite().all()


def test_kernels_take_no_sizes_and_types_that_they_were_not_made_for() -> None:
    cpu = torch.device("cpu")
    assert not can_decode(8, torch.float32, cpu)
    assert not can_decode(272, torch.float32, cpu)
    assert not can_decode(64, torch.float64, cpu)
    assert not can_decode(64, torch.float32, torch.device("meta"))


def test_kernels_that_do_not_build_say_what_the_compiler_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f( {")
    monkeypatch.setattr(kernel_module, "SOURCE", broken)
    monkeypatch.setattr(kernel_module, "_loaded", threading.Event())
    with pytest.raises(subprocess.SubprocessError, match="did not build the C"):
        load(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_no_gather_copies_more_than_a_layer_of_the_pool() -> None:
    """One long row and many short ones that share its beginning were padded to the longest."""
    kv = a_pool(40)
    long = decoding(30 * 16, [*range(30)])
    others = [decoding(29 * 16 + 1, [*range(29), 30 + n]) for n in range(10)]
    short = [decoding(3, [39])]
    pieces = [Piece(one, one.computed, len(one.ids)) for one in (long, *others, *short)]

    paged = GatheredPass(kv, pieces)

    copied = [group.table for group in paged._decoding if not isinstance(group.table, slice)]
    assert copied
    assert all(len(table) <= 40 for table in copied)
    assert [group.end for group in paged._decoding][-1] == 12

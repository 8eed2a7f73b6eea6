"""Attention over blocks against the library's own over whole sequences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.chat.attention import PagedKV, PagedPass
from worker.engine.chat.cache import BLOCK_TOKENS, blocks_for
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


def a_pool(blocks: int) -> PagedKV:
    kv = PagedKV(
        layers=1, heads=HEADS, head_size=SIZE, blocks=blocks, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for one in (*kv.keys, *kv.values):
        one.copy_(torch.randn(one.shape, generator=generator))
    return kv


@pytest.mark.parametrize("fixed_rows", [None, 8])
def test_rows_of_all_lengths_are_attended_to_as_if_alone_and_never_see_foreign_blocks(
    fixed_rows: int | None,
) -> None:
    kv = a_pool(40)
    free = iter(range(1, 40))
    lengths = (5, 16, 17, 40, 100, 33)
    sequences = [
        decoding(length, [next(free) for _ in range(blocks_for(length))]) for length in lengths
    ]
    used = {block for sequence in sequences for block in sequence.blocks}
    for block in {*range(40)} - used:
        kv.keys[0][:, block] = kv.values[0][:, block] = math.nan
    pieces = [Piece(one, one.computed, len(one.ids)) for one in sequences]
    paged = PagedPass(kv, pieces, fixed_rows=fixed_rows)
    rows = paged.ids.shape[1]
    query = torch.randn(1, QUERY_HEADS, rows, SIZE)
    key, value = torch.randn(1, HEADS, rows, SIZE), torch.randn(1, HEADS, rows, SIZE)

    out = paged.attend(0, query, key, value, SIZE**-0.5)

    assert sorted(len(piece.sequence.ids) for piece in paged.order) == sorted(lengths)
    for row, piece in enumerate(paged.order):
        blocks, tokens = piece.sequence.blocks, piece.end
        last = (tokens - 1) % BLOCK_TOKENS
        assert torch.equal(kv.keys[0][:, blocks[-1], last], key[0, :, row])
        whole = [
            one[:, blocks].reshape(1, HEADS, -1, SIZE)[:, :, :tokens]
            for one in (kv.keys[0], kv.values[0])
        ]
        alone = scaled_dot_product_attention(
            query[:, :, row : row + 1], *whole, scale=SIZE**-0.5, enable_gqa=True
        )
        torch.testing.assert_close(out[:, row], alone[:, :, 0], rtol=1e-5, atol=1e-5)
    assert not out[:, len(paged.order) :].any()


def test_what_all_rows_begin_with_is_attended_to_once_with_the_same_result() -> None:
    kv = a_pool(30)
    common = [*range(8)]
    sequences = [decoding(8 * 16 + extra, [*common, 8 + extra]) for extra in (1, 7, 16)]
    pieces = [Piece(one, one.computed, len(one.ids)) for one in sequences]
    paged = PagedPass(kv, pieces)
    query = torch.randn(1, QUERY_HEADS, 3, SIZE)
    key, value = torch.randn(1, HEADS, 3, SIZE), torch.randn(1, HEADS, 3, SIZE)

    out = paged.attend(0, query, key, value, SIZE**-0.5)

    [group] = paged._decoding
    assert group.common == slice(0, 8)
    for row, piece in enumerate(paged.order):
        keys, values = (
            one[:, piece.sequence.blocks].reshape(1, HEADS, -1, SIZE)[:, :, : piece.end]
            for one in (kv.keys[0], kv.values[0])
        )
        alone = scaled_dot_product_attention(
            query[:, :, row : row + 1], keys, values, scale=SIZE**-0.5, enable_gqa=True
        )
        torch.testing.assert_close(out[:, row], alone[:, :, 0], rtol=1e-5, atol=1e-5)


def test_no_gather_copies_more_than_a_layer_of_the_pool() -> None:
    """One long row and many short ones that share its beginning were padded to the longest."""
    kv = a_pool(40)
    long = decoding(30 * 16, [*range(30)])
    others = [decoding(29 * 16 + 1, [*range(29), 30 + n]) for n in range(10)]
    short = [decoding(3, [39])]
    pieces = [Piece(one, one.computed, len(one.ids)) for one in (long, *others, *short)]

    paged = PagedPass(kv, pieces)

    copied = [group.table for group in paged._decoding if not isinstance(group.table, slice)]
    assert copied
    assert all(len(table) <= 40 for table in copied)
    assert [group.end for group in paged._decoding][-1] == 12

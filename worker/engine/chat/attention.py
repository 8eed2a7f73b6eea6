"""Attention over paged keys and values, in the place of the one that transformers brings.

A pass packs tokens of many sequences into one row. Everything but attention treats each token
alone; attention asks the pass that its thread computes (`computing`). It is an operator, so that
the compiler sees one call and nothing of blocks and tables.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby, takewhile
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from worker.engine.chat.cache import BLOCK_TOKENS, blocks_for
from worker.engine.chat.kernels import can_decode
from worker.engine.chat.scheduler import Piece

NAME = "verbatim_paged"
SHAPE_BLOCKS = 16  # of the deterministic lane: rows are padded to a multiple of so many
# Compiled code takes any number of tokens but one, and any number of logits but none and one.
LEAST_ROWS = 2


class PagedKV:
    """Keys and values of all layers, (heads, blocks, BLOCK_TOKENS, head size) each.

    Heads come first, so that the blocks of a sequence, gathered, are one matrix per head.
    """

    def __init__(
        self, *, layers: int, heads: int, head_size: int, blocks: int, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        """heads: of keys and values; queries may have a multiple of it."""
        shape = (heads, blocks, BLOCK_TOKENS, head_size)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def blocks(self) -> int:
        return self.keys[0].shape[1]

    def has_kernel(self) -> bool:
        """Whether `verbatim::decode` takes these keys and values, now that it may be loaded."""
        one = self.keys[0]
        return can_decode(one.shape[-1], one.dtype, one.device)

    @staticmethod
    def block_bytes(*, layers: int, heads: int, head_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block in all layers."""
        return 2 * layers * heads * head_size * BLOCK_TOKENS * dtype.itemsize

    def read(self, blocks: Sequence[int]) -> torch.Tensor:
        """A copy in host memory, (2 x layers, heads, len(blocks), BLOCK_TOKENS, head size)."""
        at = torch.tensor(blocks, device=self.keys[0].device)
        return torch.stack([one.index_select(1, at) for one in (*self.keys, *self.values)]).cpu()

    def write(self, blocks: Sequence[int], content: torch.Tensor) -> None:
        """Put what `read` gave into these blocks."""
        at = torch.tensor(blocks, device=self.keys[0].device)
        for one, part in zip((*self.keys, *self.values), content, strict=True):
            one.index_copy_(1, at, part.to(one.device))

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zeros in these blocks."""
        at = torch.tensor(blocks, dtype=torch.long, device=self.keys[0].device)
        for one in (*self.keys, *self.values):
            one.index_fill_(1, at, 0)

    def resize(self, blocks: int, moves: dict[int, int]) -> None:
        """Another number of blocks; moves: old number -> new number of each that is kept.

        Layer by layer, so that no more than one is held twice.
        """
        for group in (self.keys, self.values):
            for layer, old in enumerate(group):
                new = old.new_zeros((old.shape[0], blocks, *old.shape[2:]))
                if moves:
                    source, target = (
                        torch.tensor(list(part), device=old.device)
                        for part in (moves.keys(), moves.values())
                    )
                    new.index_copy_(1, target, old.index_select(1, source))
                group[layer] = new


# Numbers of blocks, (blocks,). A slice where they lie side by side: reading them copies nothing.
_Blocks = torch.Tensor | slice


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A piece of a prompt in a pass."""

    begin: int  # of its tokens in the packed row
    end: int
    table: _Blocks
    length: int  # tokens of the sequence up to the piece's end
    mask: torch.Tensor | None  # (tokens, length) of bool; None: the sequence begins here


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Decoding rows of a pass that attend in one call."""

    begin: int
    end: int
    table: _Blocks  # (rows x blocks,): each row's, padded
    mask: torch.Tensor  # (rows, 1, 1, tokens of a row of `table`): 0, or the least number


@dataclass(frozen=True, slots=True)
class _Tables:
    """The decoding rows of a pass, for the kernel."""

    blocks: torch.Tensor  # (rows, blocks of the longest) of int32
    ends: torch.Tensor  # (rows,) of int32: tokens of each
    common: int  # blocks at the beginning of all of them


class PagedPass:
    """Where each token of one pass writes and what it reads.

    Built anew for each pass.
    """

    def __init__(
        self,
        kv: PagedKV,
        pieces: Sequence[Piece],
        *,
        fixed_rows: int | None = None,
        copies: bool = False,
        kernel: bool = False,
    ):
        """fixed_rows: the pass has decoding pieces only, and is padded to that many; each of them
        attends in a shape that depends on its own length alone. None: as fast as it goes.

        copies: blocks are always copied side by side, so that how they lie cannot change a bit.
        kernel: decoding rows attend by `verbatim::decode`.
        """
        device, dtype = kv.keys[0].device, kv.keys[0].dtype
        self._kv = kv
        decoding = [piece for piece in pieces if piece.sequence.decoding]
        # Rows of like length attend together, so that little is gathered that is not theirs.
        width = _blocks_in_shape if fixed_rows else _length_class
        decoding.sort(key=width)
        pieces = [*decoding, *(piece for piece in pieces if not piece.sequence.decoding)]
        self.order = tuple(piece for piece in pieces if piece.samples)  # of the rows of logits
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled: list[int] = []
        self._prompts: list[_Prompt] = []
        for piece in pieces:
            blocks, begin = piece.sequence.blocks, len(ids)
            ids += piece.sequence.ids[piece.begin : piece.end]
            positions += range(piece.begin, piece.end)
            slots += (
                blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
                for at in range(piece.begin, piece.end)
            )
            if piece.samples:
                sampled.append(len(ids) - 1)
            if not piece.sequence.decoding:
                table = _found(blocks[: blocks_for(piece.end)], device, copies=copies)
                count = piece.end - piece.begin
                mask = None
                if piece.begin:
                    mask = torch.ones(count, piece.end, dtype=torch.bool, device=device)
                    mask = mask.tril(diagonal=piece.begin)
                self._prompts.append(_Prompt(begin, len(ids), table, piece.end, mask))
        padding = [0] * ((fixed_rows or LEAST_ROWS) - len(ids))
        self.ids = torch.tensor([ids + padding], device=device)  # (1, tokens)
        self.positions = torch.tensor([positions + padding], device=device)
        self._slots = torch.tensor(slots, device=device)  # (tokens without padding,)
        # Places of the logits that are needed; of a padded pass all, so that their number is fixed.
        kept = [*range(fixed_rows)] if fixed_rows else sampled + [0] * (LEAST_ROWS - len(sampled))
        self.kept = torch.tensor(kept, device=device)
        self._decoding: list[_Decoding] = []
        self._tables: _Tables | None = None
        if kernel:
            self._tables = _tables_of(decoding)
            return
        for _, like in groupby(decoding, key=width):
            group = list(like)
            tables = [piece.sequence.blocks for piece in group]
            wide = _blocks_in_shape(group[0]) if fixed_rows else max(map(len, tables))
            # The bound on what one gather copies: no more than a layer of the pool.
            rows = max(1, kv.blocks // wide)
            for begin in range(0, len(group), rows):
                part = group[begin : begin + rows]
                self._add_decoding(part, wide, dtype, device, copies=copies)

    def _add_decoding(
        self, pieces: list[Piece], blocks: int, dtype: torch.dtype, device: torch.device,
        *, copies: bool,
    ) -> None:  # fmt: skip
        """blocks: that each row is padded to."""
        tables = [piece.sequence.blocks for piece in pieces]
        # Padded with a block of its own: what is masked there must not be another's NaN.
        rows = [
            block for table in tables for block in (*table, *table[-1:] * (blocks - len(table)))
        ]
        ends = torch.tensor([piece.end for piece in pieces], device=device)
        at = torch.arange(blocks * BLOCK_TOKENS, device=device)
        mask = torch.zeros(len(pieces), 1, 1, len(at), dtype=dtype, device=device)
        mask.masked_fill_((at >= ends[:, None])[:, None, None], torch.finfo(dtype).min)
        begin = self._decoding[-1].end if self._decoding else 0
        self._decoding.append(
            _Decoding(
                begin,
                begin + len(pieces),
                _found(rows, device, copies=copies),
                mask,
            )
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store keys and values of this pass and attend over all of each sequence's.

        query: (1, query heads, tokens, head size); key, value: (1, heads, tokens, head size).
        Returns (1, tokens, query heads, head size), zero for padding.
        """
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        heads, _, _, size = keys.shape
        real = len(self._slots)
        count = query.shape[2]
        if self._tables is not None:
            out = query.new_zeros(1, count, query.shape[1], size)
            tables = self._tables
            torch.ops.verbatim.decode(
                query, key, value, keys, values, self._slots, tables.blocks, tables.ends,
                tables.common, scale, out,
            )  # fmt: skip
            self._attend_prompts(out, query, keys, values, scale)
            return out
        keys.view(heads, -1, size).index_copy_(1, self._slots, key[0, :, :real])
        values.view(heads, -1, size).index_copy_(1, self._slots, value[0, :, :real])
        if len(self._decoding) == 1 and self._decoding[0].end == count:
            [rows] = self._decoding
            return _attend_decoding(rows, query[0], keys, values, scale)[None]
        out = query.new_zeros(1, count, query.shape[1], size)
        for rows in self._decoding:
            part = query[0, :, rows.begin : rows.end]
            out[0, rows.begin : rows.end] = _attend_decoding(rows, part, keys, values, scale)
        self._attend_prompts(out, query, keys, values, scale)
        return out

    def _attend_prompts(
        self, out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
        scale: float,
    ) -> None:  # fmt: skip
        for one in self._prompts:
            attended = scaled_dot_product_attention(
                query[:, :, one.begin : one.end],
                _rows_of(keys, one.table, 1)[:, :, : one.length],
                _rows_of(values, one.table, 1)[:, :, : one.length],
                attn_mask=one.mask,
                is_causal=one.mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != keys.shape[0],
            )
            out[:, one.begin : one.end] = attended.transpose(1, 2)


def _tables_of(decoding: Sequence[Piece]) -> _Tables:
    tables = [piece.sequence.blocks for piece in decoding]
    widest = max(map(len, tables), default=0)
    padded = [[*table, *[0] * (widest - len(table))] for table in tables]
    return _Tables(
        torch.tensor(padded, dtype=torch.int32),
        torch.tensor([piece.end for piece in decoding], dtype=torch.int32),
        _common_beginning(tables),
    )


def _length_class(piece: Piece) -> int:
    """Of any two pieces of a class, one has less than twice the blocks of the other."""
    return len(piece.sequence.blocks).bit_length()


def _blocks_in_shape(piece: Piece) -> int:
    """Blocks of a decoding piece, rounded up so that few shapes occur."""
    return -(-len(piece.sequence.blocks) // SHAPE_BLOCKS) * SHAPE_BLOCKS


def _attend_decoding(
    rows: _Decoding, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """query: (query heads, rows, head size). Returns (rows, query heads, head size)."""
    heads, _, _, size = keys.shape
    count = query.shape[1]
    # The query heads that share a key head are rows of one small matrix.
    grouped = query.view(heads, -1, count, size).permute(2, 0, 1, 3)
    own = (grouped, _rows_of(keys, rows.table, count), _rows_of(values, rows.table, count))
    out = scaled_dot_product_attention(*own, attn_mask=rows.mask, scale=scale)
    return out.reshape(count, -1, size)


def _common_beginning(tables: Sequence[Sequence[int]]) -> int:
    """Blocks at the beginning that all tables share; 0 for less than two."""
    if len(tables) < 2:
        return 0
    columns = zip(*tables, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _found(blocks: Sequence[int], device: torch.device, *, copies: bool) -> _Blocks:
    first, count = blocks[0], len(blocks)
    if not copies and list(blocks) == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(blocks, device=device)


def _rows_of(pool: torch.Tensor, blocks: _Blocks, rows: int) -> torch.Tensor:
    """(rows, heads, tokens, head size) of the blocks, which are those of each row in turn."""
    heads, _, _, size = pool.shape
    part = pool[:, blocks] if isinstance(blocks, slice) else pool.index_select(1, blocks)
    return part.view(heads, rows, -1, size).transpose(0, 1)


class Rehearsal:
    """In the place of a PagedPass while code is compiled: each token sees itself only."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As PagedPass.attend."""
        return (
            value.repeat_interleave(query.shape[1] // value.shape[1], 1)
            .transpose(1, 2)
            .contiguous()
        )


class _Attends(Protocol):
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


_this_thread = threading.local()


@contextmanager
def computing(paged: _Attends) -> Iterator[None]:
    """Within it, this thread's attention is that of this pass."""
    _this_thread.paged = paged
    try:
        yield
    finally:
        del _this_thread.paged


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    paged: _Attends = _this_thread.paged
    return paged.attend(layer, query, key, value, scale)


def _attended_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


@cache
def register() -> None:
    """Make NAME an attention implementation of transformers. Again is no harm."""
    torch.library.define(
        "verbatim::attend",
        "(Tensor query, Tensor key, Tensor value, int layer, float scale) -> Tensor",
    )
    torch.library.impl("verbatim::attend", "default", _attend)
    torch.library.register_fake("verbatim::attend", _attended_shape)
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return torch.ops.verbatim.attend(query, key, value, module.layer_idx, scaling), None


def _no_mask(*_: Any, **__: Any) -> None:
    """What each token sees is in the PagedPass."""

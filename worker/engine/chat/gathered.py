"""Attention over blocks that are gathered, or that a CPU's kernel reads where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.chat.attention import LEAST_ROWS, PagedKV
from worker.engine.chat.cache import blocks_for
from worker.engine.chat.packed import packed
from worker.engine.chat.scheduler import Piece

SHAPE_TOKENS = 256  # of the deterministic lane: rows are padded to a multiple of so many

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


class GatheredPass:
    """Where each token of one pass writes and what it reads. A PagedPass, built anew for each."""

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
        device, dtype = kv.device, kv.keys[0].dtype
        self._kv = kv
        self._shape_blocks = max(1, SHAPE_TOKENS // kv.block_tokens)
        decoding = [piece for piece in pieces if piece.sequence.decoding]
        # Rows of like length attend together, so that little is gathered that is not theirs.
        width = self._blocks_in_shape if fixed_rows else _length_class
        decoding.sort(key=width)
        pieces = [*decoding, *(piece for piece in pieces if not piece.sequence.decoding)]
        self.order = tuple(piece for piece in pieces if piece.samples)  # of the rows of logits
        row = packed(pieces, kv.block_tokens)
        padding = [0] * ((fixed_rows or LEAST_ROWS) - len(row.ids))
        self.ids = torch.tensor([row.ids + padding], device=device)
        self.positions = torch.tensor([row.positions + padding], device=device)
        self._slots = torch.tensor(row.slots, device=device)  # (tokens without padding,)
        # Of a padded pass all, so that their number is fixed.
        least = [0] * (LEAST_ROWS - len(row.sampled))
        kept = [*range(fixed_rows)] if fixed_rows else row.sampled + least
        self.kept = torch.tensor(kept, device=device)
        self._prompts = [
            self._prompt(piece, begin, copies=copies)
            for piece, begin in zip(pieces, row.begins, strict=False)
            if not piece.sequence.decoding
        ]
        self._decoding: list[_Decoding] = []
        self._tables: _Tables | None = None
        if kernel:
            self._tables = _tables_of(decoding)
            return
        for _, like in groupby(decoding, key=width):
            group = list(like)
            tables = [piece.sequence.blocks for piece in group]
            wide = self._blocks_in_shape(group[0]) if fixed_rows else max(map(len, tables))
            # The bound on what one gather copies: no more than a layer of the pool.
            rows = max(1, kv.blocks // wide)
            for begin in range(0, len(group), rows):
                part = group[begin : begin + rows]
                self._add_decoding(part, wide, dtype, device, copies=copies)

    def _blocks_in_shape(self, piece: Piece) -> int:
        """Blocks of a decoding piece, rounded up so that few shapes occur."""
        return -(-len(piece.sequence.blocks) // self._shape_blocks) * self._shape_blocks

    def _prompt(self, piece: Piece, begin: int, *, copies: bool) -> _Prompt:
        device, tokens = self._kv.device, piece.end - piece.begin
        blocks = piece.sequence.blocks[: blocks_for(piece.end, self._kv.block_tokens)]
        mask = None
        if piece.begin:
            mask = torch.ones(tokens, piece.end, dtype=torch.bool, device=device)
            mask = mask.tril(diagonal=piece.begin)
        table = _found(blocks, device, copies=copies)
        return _Prompt(begin, begin + tokens, table, piece.end, mask)

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
        at = torch.arange(blocks * self._kv.block_tokens, device=device)
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
        """As PagedPass; of padding it is zero, and nothing of it is stored."""
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

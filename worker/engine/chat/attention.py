"""Attention over paged keys and values, in the place of the one that transformers brings.

A pass packs tokens of many sequences into one row. Everything but attention treats each token
alone; attention reads `PagedPass`, which travels through the model's forward as a keyword.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from worker.engine.chat.cache import BLOCK_TOKENS, blocks_for
from worker.engine.chat.scheduler import Piece

NAME = "verbatim_paged"


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


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A piece of a prompt in a pass."""

    begin: int  # of its tokens in the packed row
    end: int
    table: torch.Tensor  # (blocks,)
    length: int  # tokens of the sequence up to the piece's end
    mask: torch.Tensor | None  # (tokens, length) of bool; None: the sequence begins here


class PagedPass:
    """Where each token of one pass writes and what it reads. Decoding tokens come first."""

    def __init__(self, kv: PagedKV, pieces: Sequence[Piece]):
        """pieces: with all decoding ones at the beginning."""
        device, dtype = kv.keys[0].device, kv.keys[0].dtype
        self._kv = kv
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        self.prompts: list[_Prompt] = []
        decoding = [piece for piece in pieces if piece.sequence.decoding]
        for piece in pieces:
            blocks, begin = piece.sequence.blocks, len(ids)
            ids += piece.sequence.ids[piece.begin : piece.end]
            positions += range(piece.begin, piece.end)
            slots += (
                blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
                for at in range(piece.begin, piece.end)
            )
            if not piece.sequence.decoding:
                table = torch.tensor(blocks[: blocks_for(piece.end)], device=device)
                count = piece.end - piece.begin
                mask = None
                if piece.begin:
                    mask = torch.ones(count, piece.end, dtype=torch.bool, device=device)
                    mask = mask.tril(diagonal=piece.begin)
                self.prompts.append(_Prompt(begin, len(ids), table, piece.end, mask))
        self.ids = torch.tensor([ids], device=device)  # (1, tokens)
        self.positions = torch.tensor([positions], device=device)
        self._slots = torch.tensor(slots, device=device)
        ends = torch.tensor([len(piece.sequence.ids) for piece in decoding], device=device)
        self.decoding = len(decoding)
        if decoding:
            most = max(len(piece.sequence.blocks) for piece in decoding)
            rows = [
                piece.sequence.blocks + [0] * (most - len(piece.sequence.blocks))
                for piece in decoding
            ]
            self._table = torch.tensor(rows, device=device).flatten()
            at = torch.arange(most * BLOCK_TOKENS, device=device)
            hidden = torch.zeros(len(decoding), 1, 1, len(at), dtype=dtype, device=device)
            self._mask = hidden.masked_fill_(
                (at >= ends[:, None])[:, None, None], torch.finfo(dtype).min
            )
        sampled = []
        at_token = -1
        for piece in pieces:
            at_token += piece.end - piece.begin
            if piece.samples:
                sampled.append(at_token)
        self.sampled = torch.tensor(
            sampled, dtype=torch.long, device=device
        )  # places of the logits that are needed

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store keys and values of this pass and attend over all of each sequence's.

        query: (1, query heads, tokens, head size); key, value: (1, heads, tokens, head size).
        Returns (1, tokens, query heads, head size).
        """
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        heads, _, _, size = keys.shape
        keys.view(heads, -1, size).index_copy_(1, self._slots, key[0])
        values.view(heads, -1, size).index_copy_(1, self._slots, value[0])
        out = query.new_empty(1, query.shape[2], query.shape[1], size)
        if self.decoding:
            rows = self.decoding
            # The query heads that share a key head are rows of one small matrix.
            grouped = query[0, :, :rows].view(heads, -1, rows, size).permute(2, 0, 1, 3)
            attended = scaled_dot_product_attention(
                grouped,
                _rows_of(keys, self._table, rows),
                _rows_of(values, self._table, rows),
                attn_mask=self._mask,
                scale=scale,
            )  # (rows, heads, query heads / heads, head size)
            out[0, :rows] = attended.reshape(rows, -1, size)
        for one in self.prompts:
            attended = scaled_dot_product_attention(
                query[:, :, one.begin : one.end],
                keys.index_select(1, one.table).view(1, heads, -1, size)[:, :, : one.length],
                values.index_select(1, one.table).view(1, heads, -1, size)[:, :, : one.length],
                attn_mask=one.mask,
                is_causal=one.mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != heads,
            )
            out[:, one.begin : one.end] = attended.transpose(1, 2)
        return out


def _rows_of(pool: torch.Tensor, table: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, heads, tokens, head size) of the blocks in `table`, which has those of each row."""
    heads, _, _, size = pool.shape
    return pool.index_select(1, table).view(heads, rows, -1, size).transpose(0, 1)


def register() -> None:
    """Make NAME an attention implementation of transformers. Again is no harm."""
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
    paged: PagedPass,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return paged.attend(module.layer_idx, query, key, value, scaling), None


def _no_mask(*_: Any, **__: Any) -> None:
    """What each token sees is in the PagedPass."""

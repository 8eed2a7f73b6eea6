"""Attention that reads the pool's pages by itself: FlashAttention 2, as torch brings it for cards.

One call attends for a whole pass: decoding rows, pieces of prompts and padding alike are rows of
so many tokens that see the first so many tokens of their sequence. What the kernel demands, and
what in it is not to be trusted, is in docs/decisions/0015.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.chat.attention import LEAST_ROWS, PagedKV
from worker.engine.chat.cache import blocks_for
from worker.engine.chat.packed import packed
from worker.engine.chat.scheduler import Piece, TokenSequence
from worker.vram.phases import PAGE_TOKENS

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # of a card: Ampere
TOLERANCE = 0.02  # of the trial: the half types have 8 and 11 bits


@dataclass(frozen=True, slots=True)
class Layout:
    """A pass of exactly so many tokens and rows, as plain numbers.

    What pieces leave of the tokens is written to the scratch block; rows that are left over see
    nothing and are empty.
    """

    ids: list[int]  # (tokens,)
    positions: list[int]
    slots: list[int]
    begins: list[int]  # (rows + 1,): of each row's tokens; the last is the end
    lengths: list[int]  # (rows,): tokens of its sequence that a row's last token sees
    tables: list[list[int]]  # (rows,): each row's blocks
    sampled: list[int]  # places of the tokens whose logits are wanted


def laid_out(
    pieces: Sequence[Piece], kv: PagedKV, *, tokens: int, rows: int, single: bool
) -> Layout:
    """tokens: at least those of the pieces. rows: more than pieces where there is padding.
    single: each row has one token, padding as well; else that is one row."""
    row = packed(pieces, kv.block_tokens)
    left = tokens - len(row.ids)
    parts = [1] * left if single else [left] if left else []  # tokens of padding rows
    size = max(parts, default=0)
    assert left >= 0 and size <= kv.block_tokens and len(pieces) + len(parts) <= rows
    places = [place for part in parts for place in range(part)]
    begins = row.begins
    for part in parts:
        begins.append(begins[-1] + part)
    empty = rows - len(pieces) - len(parts)
    blocks = [piece.sequence.blocks for piece in pieces]
    return Layout(
        ids=row.ids + [0] * left,
        positions=row.positions + places,
        slots=row.slots + [kv.scratch * kv.block_tokens + place for place in places],
        begins=begins + [tokens] * empty,
        lengths=[piece.end for piece in pieces] + parts + [0] * empty,
        tables=blocks + [[kv.scratch]] * (len(parts) + empty),
        sampled=row.sampled,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """What the kernel is told of a pass: tensors on the device, all of int32 but the slots."""

    slots: torch.Tensor  # (tokens,) of int64: where keys and values of each are stored
    begins: torch.Tensor  # (rows + 1,)
    key_begins: torch.Tensor  # (rows + 1,): sums of the lengths before. Asked for, and not read
    lengths: torch.Tensor  # (rows,)
    tables: torch.Tensor  # (rows, pages of the longest sequence, or more)
    most_tokens: int  # of a row, at most

    @property
    def single(self) -> bool:
        """Whether every row has one token."""
        return self.most_tokens == 1


class VarlenPass:
    """A PagedPass over pages."""

    def __init__(
        self, kv: PagedKV, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor,
        rows: Rows,
    ):  # fmt: skip
        self.ids, self.positions, self.kept = ids, positions, kept
        self._kv = kv
        self._rows = rows

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As PagedPass; of padding it is something."""
        keys, values, rows = self._kv.keys[layer], self._kv.values[layer], self._rows
        for pages, new in ((keys, key), (values, value)):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, rows.slots, new[0].transpose(0, 1))
        return attend(query[0].transpose(0, 1), keys, values, rows, scale)[None]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, scale: float
) -> torch.Tensor:
    """query: (tokens, query heads, head size); keys, values: pages. Returns the query's shape."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        keys,
        values,
        rows.begins,
        rows.key_begins,
        rows.most_tokens,
        rows.tables.shape[1] * keys.shape[1],
        scale=scale,
        # Rows of one token see all of their length. Said so, the kernel takes the query heads that
        # share a key head together, and reads keys once for all of them.
        window_size=(-1, -1) if rows.single else (-1, 0),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=rows.lengths,
        block_table=rows.tables,
        # Split over the keys, a row's bits depend on who else is in the pass; and over pages torch
        # 2.13 then writes the rows of all sequences to the first one's place.
        num_splits=1,
    )
    assert isinstance(out, torch.Tensor)  # more comes only when it is asked for
    return out


def varlen_pass(
    kv: PagedKV, pieces: Sequence[Piece], *, fixed_rows: int | None = None
) -> VarlenPass:
    """Logits are in the order of the pieces that sample.

    fixed_rows: the pass has decoding pieces only, and is padded to that many; logits are of all.
    """
    count = sum(piece.end - piece.begin for piece in pieces)
    tokens = fixed_rows or max(count, LEAST_ROWS)
    single = fixed_rows is not None or count == len(pieces)
    rows = tokens if single else len(pieces) + (tokens > count)
    one = laid_out(pieces, kv, tokens=tokens, rows=rows, single=single)
    # Of a padded pass all, so that their number is fixed.
    least = [0] * (LEAST_ROWS - len(one.sampled))
    kept = [*range(fixed_rows)] if fixed_rows else one.sampled + least
    widest = max(len(table) for table in one.tables)
    device = kv.device

    def numbers(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    on_device = Rows(
        slots=torch.tensor(one.slots, device=device),
        begins=numbers(one.begins),
        key_begins=numbers(sums(one.lengths)),
        lengths=numbers(one.lengths),
        tables=torch.tensor(
            [table + [0] * (widest - len(table)) for table in one.tables],
            dtype=torch.int32, device=device,
        ),
        most_tokens=1 if single else max(piece.end - piece.begin for piece in pieces),
    )  # fmt: skip
    return VarlenPass(
        kv,
        torch.tensor([one.ids], device=device),
        torch.tensor([one.positions], device=device),
        torch.tensor(kept, device=device),
        on_device,
    )


def sums(lengths: Sequence[int]) -> list[int]:
    """Of those before each, and of all at the end."""
    found = [0]
    for length in lengths:
        found.append(found[-1] + length)
    return found


# --- whether it is to be had --------------------------------------------------------------------


@cache
def can_attend(
    device: torch.device, dtype: torch.dtype, heads: int, query_heads: int, head_size: int
) -> bool:
    """Whether this torch's kernel attends over pages on this card, and rightly.

    The caller has seen that types and sizes are such as it takes (worker/vram/phases.py). It is
    tried on a few pages, because torch had the argument before it had the kernel, and a kernel
    that was wrong in silence.
    """
    if device.type != "cuda" or not _has_kernel(device):
        return False
    with torch.inference_mode():
        try:
            off = _trial(device, dtype, heads, query_heads, head_size)
        except RuntimeError as exc:
            log.warning("no attention over pages, so blocks are gathered, which is slower: %s", exc)
            return False
    if not off <= TOLERANCE:
        log.warning(
            "attention over pages is off by %.2g here, so blocks are gathered, which is slower", off
        )
    return off <= TOLERANCE


def _has_kernel(device: torch.device) -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    wanted = {"block_table", "seqused_k", "num_splits", "enable_gqa"}
    return (
        wanted <= inspect.signature(varlen_attn).parameters.keys()
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def _trial(
    device: torch.device, dtype: torch.dtype, heads: int, query_heads: int, head_size: int
) -> float:
    """The greatest difference from attention over each row alone, of values of about 1: decoding
    rows, and prompts beside them, over pages in any order."""
    ends = (1, PAGE_TOKENS, PAGE_TOKENS + 1, 3 * PAGE_TOKENS - 5)
    pages = sum(blocks_for(end, PAGE_TOKENS) for end in ends)
    kv = PagedKV(
        layers=1, heads=heads, head_size=head_size, blocks=pages, dtype=dtype, device=device,
        block_tokens=PAGE_TOKENS, pages=True,
    )  # fmt: skip
    made = torch.Generator(device).manual_seed(0)
    for one in (kv.keys[0], kv.values[0]):
        one.normal_(generator=made)
    free = [*range(pages)][::-1]
    off = 0.0
    for longest in (1, 70):
        pieces = []
        for end in ends:
            sequence = TokenSequence([0] * end, 1, block_tokens=PAGE_TOKENS)
            sequence.blocks = [free.pop(0) for _ in range(blocks_for(end, PAGE_TOKENS))]
            free += sequence.blocks
            pieces.append(Piece(sequence, max(0, end - longest), end))
        paged = varlen_pass(kv, pieces)
        shape = (paged.ids.shape[1], query_heads, head_size)
        query = torch.randn(shape, dtype=dtype, device=device, generator=made)
        scale = head_size**-0.5
        found = attend(query, kv.keys[0], kv.values[0], paged._rows, scale)
        begin = 0
        for piece in pieces:
            tokens = piece.end - piece.begin
            row = slice(begin, begin + tokens)
            key, value = (
                one[piece.sequence.blocks].flatten(0, 1)[: piece.end].transpose(0, 1)[None].float()
                for one in (kv.keys[0], kv.values[0])
            )
            mask = torch.ones(tokens, piece.end, dtype=torch.bool, device=device)
            right = scaled_dot_product_attention(
                query[row].transpose(0, 1)[None].float(),
                key,
                value,
                attn_mask=mask.tril(diagonal=piece.begin),
                scale=scale,
                enable_gqa=query_heads != heads,
            )[0].transpose(0, 1)
            off = max(off, float((found[row].float() - right).abs().max()))
            begin += tokens
    return off

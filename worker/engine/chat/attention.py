"""The pool of keys and values, and attention over it in the place of transformers' own.

A pass packs tokens of many sequences into one row. Everything but attention treats each token
alone; attention asks the pass that its thread computes (`computing`). It is an operator, so that
the compiler sees one call and nothing of blocks and tables. The passes: `gathered.py` for a CPU and
whatever FlashAttention does not take, `varlen.py` where it reads the pool by itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from worker.engine.chat.cache import BLOCK_TOKENS
from worker.engine.chat.kernels import can_decode
from worker.engine.memory import host_zeros

NAME = "verbatim_paged"
# Compiled code takes any number of tokens but one, and any number of logits but none and one.
LEAST_ROWS = 2


class PagedKV:
    """Keys and values of all layers, each (heads, blocks, tokens, head size); as pages each
    (blocks + 1, tokens, heads, head size).

    Heads come first where blocks are gathered: those of a sequence are then one matrix per head.
    FlashAttention wants pages. The block behind the last one is nobody's: padding is written to
    it; a pool without blocks has none.
    """

    def __init__(
        self, *, layers: int, heads: int, head_size: int, blocks: int, dtype: torch.dtype,
        device: torch.device, block_tokens: int = BLOCK_TOKENS, pages: bool = False,
    ):  # fmt: skip
        """heads: of keys and values; queries may have a multiple of it."""
        self.pages = pages
        self.block_tokens = block_tokens
        self.blocks = blocks
        self._dim = 0 if pages else 1  # of the blocks
        shape = [heads, block_tokens, head_size] if not pages else [block_tokens, heads, head_size]
        shape.insert(self._dim, self._lying(blocks))
        self.keys = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(layers)]

    @property
    def scratch(self) -> int:
        """The block that is nobody's. Pages only."""
        assert self.pages and self.blocks
        return self.blocks

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def has_kernel(self) -> bool:
        """Whether `verbatim::decode` takes these keys and values, now that it may be loaded."""
        one = self.keys[0]
        plain = not self.pages and self.block_tokens == BLOCK_TOKENS
        return plain and can_decode(one.shape[-1], one.dtype, one.device)

    @staticmethod
    def block_bytes(
        *, layers: int, heads: int, head_size: int, dtype: torch.dtype,
        block_tokens: int = BLOCK_TOKENS,
    ) -> int:  # fmt: skip
        """Bytes of one block in all layers."""
        return 2 * layers * heads * head_size * block_tokens * dtype.itemsize

    def read(self, blocks: Sequence[int]) -> torch.Tensor:
        """A copy in host memory: of each layer's keys, then values, these blocks."""
        at = torch.tensor(blocks, device=self.device)
        return torch.stack([one.index_select(self._dim, at) for one in self._all()]).cpu()

    def write(self, blocks: Sequence[int], content: torch.Tensor) -> None:
        """Put what `read` gave into the first of these blocks."""
        at = torch.tensor(blocks[: content.shape[self._dim + 1]], device=self.device)
        for one, part in zip(self._all(), content, strict=True):
            one.index_copy_(self._dim, at, part.to(one.device))

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zeros in these blocks."""
        at = torch.tensor(blocks, dtype=torch.long, device=self.device)
        for one in self._all():
            one.index_fill_(self._dim, at, 0)

    def resize(self, blocks: int, moves: Mapping[int, int]) -> None:
        """Another number of blocks; moves: old number -> new number of each that is kept.

        Layer by layer, so that no more than one is held twice. A pool can always shrink. Raises
        torch.OutOfMemoryError where it cannot grow, and is then as it was.
        """
        before, done = self.blocks, []
        try:
            for group in (self.keys, self.values):
                for layer in range(len(group)):
                    self._replace(group, layer, blocks, moves)
                    done.append((group, layer))
        except torch.OutOfMemoryError:
            back = {new: old for old, new in moves.items()}
            for group, layer in done:
                self._replace(group, layer, before, back)
            raise
        self.blocks = blocks

    def _replace(
        self, group: list[torch.Tensor], layer: int, blocks: int, moves: Mapping[int, int]
    ) -> None:
        """The same for one layer's keys or values."""
        old, dim = group[layer], self._dim
        shape, dtype, device = list(old.shape), old.dtype, old.device
        shape[dim] = self._lying(blocks)
        source, target = (
            torch.tensor(list(part), dtype=torch.long, device=device)
            for part in (moves.keys(), moves.values())
        )
        try:
            new = _zeros(shape, dtype, device)
            if moves:
                new.index_copy_(dim, target, old.index_select(dim, source))
        except torch.OutOfMemoryError:
            if shape[dim] > old.shape[dim]:
                raise
            new = torch.empty(0)  # and what there is of it goes
            kept = [old.select(dim, block).to("cpu", copy=True) for block in moves]
            group[layer], old = new, new  # its own bytes are enough
            if device.type == "cuda":
                torch.cuda.empty_cache()
            new = _zeros(shape, dtype, device)
            for block, content in zip(moves.values(), kept, strict=True):
                new.select(dim, block).copy_(content)
        group[layer] = new
        del old
        if device.type == "cuda":
            # Else torch cuts the next layer out of what this one has left, and the rest of that
            # goes back to nobody.
            torch.cuda.empty_cache()

    def _lying(self, blocks: int) -> int:
        return blocks + 1 if self.pages and blocks else blocks

    def _all(self) -> list[torch.Tensor]:
        return [*self.keys, *self.values]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU the memory itself comes when it is written: filling a pool, which is done on the
    engine thread, would keep the answers of other models waiting for a second a gigabyte."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return host_zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class PagedPass(Protocol):
    """The tokens of one pass, packed into one row, and their attention."""

    ids: torch.Tensor  # (1, tokens)
    positions: torch.Tensor  # (1, tokens)
    kept: torch.Tensor  # (logits,): places of the tokens whose logits are wanted

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store keys and values of this pass and attend over all of each sequence's.

        query: (1, query heads, tokens, head size); key, value: (1, heads, tokens, head size).
        Returns (1, tokens, query heads, head size).
        """


class Rehearsal:
    """In the place of a PagedPass while code is compiled: each token sees itself only."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As PagedPass."""
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
    # No mask of that name: the library then makes none, and does not look at the positions, which
    # on a card would wait for them.
    AttentionInterface.register(NAME, _forward)


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

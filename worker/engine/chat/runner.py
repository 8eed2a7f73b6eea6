"""One forward pass over the model's own code: planned pieces in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from worker.engine.chat.attention import NAME, PagedKV, PagedPass
from worker.engine.chat.cache import BlockPool
from worker.engine.chat.scheduler import Piece, Scheduler, TokenSequence


class Runner:
    """A causal language model of transformers over a paged KV pool. Engine thread only."""

    def __init__(self, model: Any, kv: PagedKV):
        """model: loaded with the attention implementation `attention.NAME`."""
        assert model.config._attn_implementation == NAME
        self._model = model
        self._kv = kv
        self._parked: dict[int, torch.Tensor] = {}  # by id() of the sequence

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits (pieces that sample, vocabulary). Running a piece again gives the same.

        pieces: decoding ones first.
        """
        paged = PagedPass(self._kv, pieces)
        out = self._model(
            input_ids=paged.ids,
            position_ids=paged.positions,
            use_cache=False,
            logits_to_keep=paged.sampled,
            paged=paged,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    @torch.inference_mode()
    def park(self, sequence: TokenSequence, blocks: list[int]) -> None:
        """Keep a sequence's keys and values in host memory; its blocks may be overwritten."""
        if sequence.computed:
            self._parked[id(sequence)] = self._kv.read(blocks)

    def forget(self, sequence: TokenSequence) -> None:
        """A parked sequence was cancelled."""
        self._parked.pop(id(sequence), None)

    @torch.inference_mode()
    def resize(self, scheduler: Scheduler, pool: BlockPool, blocks: int) -> None:
        """Another number of blocks in the pool; sequences that no longer fit are parked."""
        for sequence, had in scheduler.shrink_to(blocks):
            self.park(sequence, had)
        moves = pool.resize(blocks)
        scheduler.moved(moves)
        self._kv.resize(blocks, moves)

    @torch.inference_mode()
    def resume(self, sequence: TokenSequence) -> None:
        """Put a parked sequence's keys and values into its new blocks."""
        content = self._parked.pop(id(sequence), None)
        if content is not None:
            self._kv.write(sequence.blocks[: content.shape[2]], content)

"""From planned pieces to logits, and sequences to host memory and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.engine.chat.attention import PagedKV, PagedPass
from worker.engine.chat.cache import BlockPool
from worker.engine.chat.forward import Forward
from worker.engine.chat.scheduler import Piece, Scheduler, TokenSequence

# Rows of every decoding pass of the deterministic lane, so that none depends on how many there are.
DECODING_ROWS = 16


class Runner:
    """A causal language model of transformers over a paged KV pool. Engine thread only."""

    def __init__(self, forward: Forward, kv: PagedKV):
        self._forward = forward
        self._kv = kv
        self._parked: dict[TokenSequence, torch.Tensor] = {}

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """Logits (vocabulary,) of each piece that samples, in their order. Running a piece again
        gives the same.

        Pieces that need not be deterministic are one forward pass. Of the others, decoding ones
        are passes of DECODING_ROWS rows, and each of a prompt is a pass of its own.
        """
        plain = [piece for piece in pieces if not piece.sequence.deterministic]
        decoding = [p for p in pieces if p.sequence.deterministic and p.sequence.decoding]
        prompts = [p for p in pieces if p.sequence.deterministic and not p.sequence.decoding]
        found: dict[Piece, torch.Tensor] = {}
        if plain:
            found |= self._pass(PagedPass(self._kv, plain, kernel=self._kv.has_kernel()))
        for begin in range(0, len(decoding), DECODING_ROWS):
            rows = decoding[begin : begin + DECODING_ROWS]
            paged = PagedPass(self._kv, rows, fixed_rows=DECODING_ROWS, copies=True)
            found |= self._pass(paged, compiled=False)
        for piece in prompts:
            found |= self._pass(PagedPass(self._kv, [piece], copies=True), compiled=False)
        return [found[piece] for piece in pieces if piece.samples]

    def _pass(self, paged: PagedPass, *, compiled: bool = True) -> dict[Piece, torch.Tensor]:
        logits = self._forward(paged, compiled=compiled)
        return dict(zip(paged.order, logits, strict=False))  # padding has no piece

    @torch.inference_mode()
    def park(self, sequence: TokenSequence, blocks: list[int]) -> None:
        """Keep a sequence's keys and values in host memory; its blocks may be overwritten."""
        if sequence.computed:
            self._parked[sequence] = self._kv.read(blocks)

    def forget(self, sequence: TokenSequence) -> None:
        """A parked sequence was cancelled."""
        self._parked.pop(sequence, None)

    @torch.inference_mode()
    def wipe(self, blocks: list[int]) -> None:
        """Nothing is left in these blocks."""
        self._kv.wipe(blocks)

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
        content = self._parked.pop(sequence, None)
        if content is not None:
            self._kv.write(sequence.blocks[: content.shape[2]], content)

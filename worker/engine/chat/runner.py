"""From planned pieces to logits, and sequences to host memory and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.engine.chat.attention import PagedKV, PagedPass
from worker.engine.chat.cache import BlockPool
from worker.engine.chat.forward import Forward
from worker.engine.chat.gathered import GatheredPass
from worker.engine.chat.graphs import PassGraphs
from worker.engine.chat.scheduler import Piece, Scheduler, TokenSequence
from worker.engine.chat.varlen import varlen_pass

# Rows of every decoding pass of the deterministic lane, so that none depends on how many there are.
DECODING_ROWS = 16


class Runner:
    """A causal language model of transformers over a paged KV pool. Engine thread only."""

    def __init__(self, forward: Forward, kv: PagedKV, graphs: PassGraphs | None = None):
        """graphs: where passes over this pool may be recorded."""
        self._forward = forward
        self._kv = kv
        self._graphs = graphs
        self._parked: dict[TokenSequence, torch.Tensor] = {}

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """Logits (vocabulary,) of each piece that samples, in their order, valid until the next
        run. Running a piece again gives the same.

        Pieces that need not be deterministic are one forward pass. Of the others, decoding ones
        are passes of DECODING_ROWS rows, and each of a prompt is a pass of its own.
        """
        plain = [piece for piece in pieces if not piece.sequence.deterministic]
        decoding = [p for p in pieces if p.sequence.deterministic and p.sequence.decoding]
        prompts = [p for p in pieces if p.sequence.deterministic and not p.sequence.decoding]
        found: dict[Piece, torch.Tensor] = {}
        if plain:
            logits = None if self._graphs is None else self._graphs.run(plain)
            found |= self._pass(plain) if logits is None else _by_piece(plain, logits)
        for begin in range(0, len(decoding), DECODING_ROWS):
            rows = decoding[begin : begin + DECODING_ROWS]
            found |= self._pass(rows, deterministic=True, fixed_rows=DECODING_ROWS)
        for piece in prompts:
            found |= self._pass([piece], deterministic=True)
        return [found[piece] for piece in pieces if piece.samples]

    def _pass(
        self, pieces: Sequence[Piece], *, deterministic: bool = False, fixed_rows: int | None = None
    ) -> dict[Piece, torch.Tensor]:
        """fixed_rows: that decoding pieces are padded to."""
        paged: PagedPass
        if self._kv.pages:
            order, paged = pieces, varlen_pass(self._kv, pieces, fixed_rows=fixed_rows)
        else:
            kernel = not deterministic and self._kv.has_kernel()
            gathered = GatheredPass(
                self._kv, pieces, fixed_rows=fixed_rows, copies=deterministic, kernel=kernel
            )
            order, paged = gathered.order, gathered
        return _by_piece(order, self._forward(paged, compiled=not deterministic))

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
        """Another number of blocks in the pool; sequences that no longer fit are parked.

        Raises torch.OutOfMemoryError where it cannot grow; nothing has changed then.
        """
        self.forget_graphs()
        if blocks > pool.count:
            # Before anything is promised: whoever gets a block gets one that is there.
            self._kv.resize(blocks, {block: block for block in pool.filled})
            pool.resize(blocks)
            return
        for sequence, had in scheduler.shrink_to(blocks):
            self.park(sequence, had)
        moves = pool.resize(blocks)
        scheduler.moved(moves)
        self._kv.resize(blocks, moves)

    def forget_graphs(self) -> None:
        """Before the weights move or leave: what was recorded computes with them where they are."""
        if self._graphs is not None:
            self._graphs.forget()

    @torch.inference_mode()
    def resume(self, sequence: TokenSequence) -> None:
        """Put a parked sequence's keys and values into its new blocks."""
        content = self._parked.pop(sequence, None)
        if content is not None:
            self._kv.write(sequence.blocks, content)


def _by_piece(pieces: Sequence[Piece], logits: torch.Tensor) -> dict[Piece, torch.Tensor]:
    """logits: (pieces that sample, and padding; vocabulary), in their order."""
    sampled = (piece for piece in pieces if piece.samples)
    return dict(zip(sampled, logits, strict=False))

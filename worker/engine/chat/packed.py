"""The tokens of a pass side by side, as plain numbers: what every kind of pass is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.engine.chat.scheduler import Piece


@dataclass(frozen=True, slots=True)
class Packed:
    """Some pieces in a row."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    # Where each token's keys and values go: block x tokens of a block + place in it.
    slots: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=lambda: [0])  # of each piece, and the last one's end
    sampled: list[int] = field(default_factory=list)  # places of the tokens whose logits are wanted


def packed(pieces: Sequence[Piece], block_tokens: int) -> Packed:
    """block_tokens: of the pool in which the pieces' sequences have blocks."""
    row = Packed()
    for piece in pieces:
        blocks = piece.sequence.blocks
        row.ids.extend(piece.sequence.ids[piece.begin : piece.end])
        row.positions.extend(range(piece.begin, piece.end))
        row.slots.extend(
            blocks[at // block_tokens] * block_tokens + at % block_tokens
            for at in range(piece.begin, piece.end)
        )
        row.begins.append(len(row.ids))
        if piece.samples:
            row.sampled.append(len(row.ids) - 1)
    return row

"""One pass of one model: from planned pieces to logits to tokens. What fails alone fails alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from worker.engine.chat.model import LanguageModel
from worker.engine.chat.request import Request
from worker.engine.chat.sampling import NotANumber, draw
from worker.engine.chat.scheduler import Piece, Plan, TokenSequence
from worker.engine.chat.turns import Turns
from worker.engine.device import translated
from worker.errors import WorkerError
from worker.log import request_scope

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of each piece that was computed: the logits after it (vocabulary,), or None where it does not
# reach its sequence's end.
Logits = dict[Piece, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Pass:
    """What one model computes now."""

    model: LanguageModel
    plan: Plan
    began: float

    @property
    def pieces(self) -> list[Piece]:
        return self.plan.pieces

    @property
    def prompt_tokens(self) -> int:
        """Before its tokens are taken."""
        return sum(one.end - one.begin for one in self.pieces if not one.sequence.decoding)

    @property
    def context(self) -> int:
        """Tokens that its pieces attend to."""
        return sum(one.end for one in self.pieces)


class Passes:
    """Moves, computes and draws for the requests in work. Engine thread only."""

    def __init__(
        self, turns: Turns, end: Callable[[Request, WorkerError], None], counters: Counter[str]
    ):
        """end: called for a request that fails. counters: of the engine."""
        self._turns = turns
        self._end = end
        self._counters = counters

    def move(self, model: LanguageModel, plan: Plan) -> None:
        """Park and resume; a sequence whose keys and values cannot be moved fails alone."""
        for sequence, blocks in plan.park:
            self.alone(sequence, partial(model.runner.park, sequence, blocks))
        for sequence in plan.resume:
            self.alone(sequence, partial(model.runner.resume, sequence))
        plan.pieces = [piece for piece in plan.pieces if piece.sequence in self._turns]

    def forward(self, model: LanguageModel, pieces: Sequence[Piece]) -> Logits:
        """Compute all pieces in one pass; where that fails, each of them by itself."""

        def together(pieces: Sequence[Piece]) -> Logits:
            rows = iter(model.runner.run(pieces))
            return {piece: next(rows) if piece.samples else None for piece in pieces}

        def by_itself(pieces: Sequence[Piece]) -> Logits:
            rows = together(pieces)  # which the next run may overwrite
            return {piece: None if row is None else row.clone() for piece, row in rows.items()}

        if not pieces:
            return {}
        self._counters["passes"] += 1
        self._counters["sequences_in_passes"] += len(pieces)
        return self._each(pieces, together, by_itself)

    def sample(self, model: LanguageModel, logits: Logits) -> list[tuple[Piece, int]]:
        """Draw a token for each sequence that was computed to its end."""

        def drawn(pieces: Sequence[Piece]) -> dict[Piece, int | WorkerError]:
            rows = [row for piece in pieces if (row := logits[piece]) is not None]
            samplers = [self._turns.of(piece.sequence).sampler for piece in pieces]
            return dict(zip(pieces, draw(torch.stack(rows), samplers), strict=True))

        sampled = [piece for piece, row in logits.items() if row is not None]
        found = self._each(sampled, drawn, drawn) if sampled else {}
        tokens = []
        for piece in logits:
            token = found.get(piece)
            if piece.samples and token is None:
                continue  # it has ended
            if isinstance(token, NotANumber):
                # Zero times a NaN is one: it would reach whoever has these blocks next.
                model.runner.wipe(model.scheduler.distrust(piece.sequence))
            else:
                model.scheduler.computed(piece)
            if isinstance(token, WorkerError):
                self._end(self._turns.of(piece.sequence), token)
            elif token is not None:
                tokens.append((piece, token))
            self._counters["tokens_computed"] += piece.end - piece.begin
        return tokens

    def alone(self, sequence: TokenSequence, work: Callable[[], T]) -> T | None:
        """Work for one sequence; when it raises, that sequence's request ends and no other."""
        request = self._turns.of(sequence)
        try:
            with request_scope(request.ticket.request_id), translated():
                return work()
        except WorkerError as exc:
            self._end(request, exc)
            return None

    def _each(
        self,
        pieces: Sequence[Piece],
        together: Callable[[Sequence[Piece]], dict[Piece, T]],
        by_itself: Callable[[Sequence[Piece]], dict[Piece, T]],
    ) -> dict[Piece, T]:
        """All at once, or, where that fails, one by one: without those that fail then as well."""
        try:
            with translated():
                return together(pieces)
        except WorkerError as exc:
            log.warning(
                "a pass over %d sequences failed (%s); computing each of them alone",
                len(pieces),
                exc,
            )
        self._counters["passes_retried"] += 1
        found: dict[Piece, T] = {}
        for piece in pieces:
            found |= self.alone(piece.sequence, partial(by_itself, [piece])) or {}
        return found

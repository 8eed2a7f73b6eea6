"""From logits to a token: penalties, truncation, one uniform number, inverse of the CDF.

The uniform number of a token depends on (seed, position) alone, so a request's draws do not
depend on who else is served. Formulas and sources are public: docs/http-api.md#sampling.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from worker.engine.chat.grammar import Grammar
from worker.errors import WorkerError
from worker.protocol.messages import Sampling

_MASK = 0xFFFFFFFF
# Philox4x32-10: multipliers and Weyl constants of Salmon et al., "Parallel random numbers: as
# easy as 1, 2, 3" (SC'11), table 2.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words from a 64-bit key and a 128-bit counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws the completion token at `position`, with 53 random bits.

    seed: 0 .. 2**64 - 1; position: 0 for the first token of the completion.
    """
    words = philox((seed & _MASK, seed >> 32), (position & _MASK, position >> 32, 0, 0))
    return ((words[0] << 21) | (words[1] >> 11)) / (1 << 53)


class Sampler:
    """What the draws of one request depend on. Engine thread only."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], grammar: Grammar | None = None
    ):
        self.sampling = sampling
        self.grammar = grammar
        self.seen = set(prompt_ids)
        self.sampled: Counter[int] = Counter()  # tokens of the completion
        self.position = 0

    def take(self, token: int) -> None:
        """Remember a token that was drawn. Raises what the grammar raises, and then nothing is."""
        if self.grammar is not None:
            self.grammar.take(token)
        self.seen.add(token)
        self.sampled[token] += 1
        self.position += 1


class NotANumber(WorkerError):
    """A row of logits that nothing can be drawn from."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed values that are no numbers; its weights may be damaged"
        )


def draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | WorkerError]:
    """One token for each sampler, remembered by it, or the error of a row that has none.

    logits: (samplers, vocabulary) of any float type, on any device; not changed. No row depends
    on the others: what fails in one (a NaN, a grammar) is that row's error, and nothing is raised
    once a sampler has remembered a token.
    """
    logits, failed = _allowed(_penalised(logits.float(), samplers), samplers)
    # Of a NaN every comparison is false, and some token would come out of it silently.
    good = logits.amax(dim=-1).isfinite()
    numbers = [
        uniform(one.sampling.seed, one.position) if one.sampling.temperature else 0.0
        for one in samplers
    ]
    chosen = choose(logits, [one.sampling for one in samplers], numbers)
    drawn: list[int | WorkerError] = []
    rows = zip(samplers, chosen.tolist(), good.tolist(), strict=True)
    for row, (sampler, token, fine) in enumerate(rows):
        error = failed.get(row)
        if error is None and not fine:
            error = NotANumber()
        if error is None:
            try:
                sampler.take(token)
            except WorkerError as exc:
                error = exc
        drawn.append(token if error is None else error)
    return drawn


def choose(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniform_numbers: Sequence[float]
) -> torch.Tensor:
    """The token of each row, (rows,).

    logits: (rows, vocabulary) float32, penalties applied. uniform_numbers: in [0, 1), one a row; a
    temperature of zero takes the likeliest token instead.
    """
    chosen = logits.argmax(dim=-1)
    warm = [row for row, one in enumerate(samplings) if one.temperature > 0]
    if warm:
        chosen[warm] = _inverted(
            logits if len(warm) == len(samplings) else logits[warm],
            [samplings[row] for row in warm],
            [uniform_numbers[row] for row in warm],
        )
    return chosen


def _penalised(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Repetition over prompt and completion, presence and frequency over the completion.

    All rows at once; a row without penalties has no place in the lists.
    """
    rows: list[int] = []
    tokens: list[int] = []
    factors: list[float] = []
    for row, one in enumerate(samplers):
        penalty = one.sampling.repetition_penalty
        if penalty is not None and penalty != 1.0:
            rows += [row] * len(one.seen)
            tokens += one.seen
            factors += [penalty] * len(one.seen)
    if rows:
        at = (_at(rows, logits), _at(tokens, logits))
        values, factor = logits[at], torch.tensor(factors, dtype=logits.dtype, device=logits.device)
        changed = torch.where(values > 0, values / factor, values * factor)
        logits = logits.index_put(at, changed)
    rows, tokens, minus = [], [], []
    for row, one in enumerate(samplers):
        presence = one.sampling.presence_penalty or 0.0
        frequency = one.sampling.frequency_penalty or 0.0
        if one.sampled and (presence or frequency):
            rows += [row] * len(one.sampled)
            tokens += one.sampled
            minus += [-(presence + frequency * count) for count in one.sampled.values()]
    if rows:
        at = (_at(rows, logits), _at(tokens, logits))
        values = torch.tensor(minus, dtype=logits.dtype, device=logits.device)
        logits = logits.index_put(at, values, accumulate=True)
    return logits


def _allowed(
    logits: torch.Tensor, samplers: Sequence[Sampler]
) -> tuple[torch.Tensor, dict[int, WorkerError]]:
    """What the grammar of a row forbids has no probability. Also the errors of grammars, by row."""
    forbidden = {}
    failed: dict[int, WorkerError] = {}
    for row, sampler in enumerate(samplers):
        if sampler.grammar is not None:
            try:
                forbidden[row] = sampler.grammar.forbidden(logits.shape[-1])
            except WorkerError as exc:
                failed[row] = exc
    if forbidden:
        masks = torch.zeros(logits.shape, dtype=torch.bool)
        for row, mask in forbidden.items():
            masks[row] = mask
        logits = logits.masked_fill(masks.to(logits.device), -math.inf)
    return logits, failed


def _at(numbers: list[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=logits.device)


def _inverted(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniform_numbers: Sequence[float]
) -> torch.Tensor:
    """The token of each row at which its cumulative distribution first exceeds its number.

    Tokens are ordered by falling probability, equal ones by rising id, after temperature, top_k,
    top_p and min_p, in this order.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    # The difference to the largest is divided, so that no temperature overflows.
    scaled = (ordered - ordered[:, :1]).double() / column([s.temperature for s in samplings])
    probabilities = torch.softmax(scaled, dim=-1)
    size = logits.shape[-1]
    place = torch.arange(size, device=logits.device)
    keep = column([s.top_k if s.top_k and 0 < s.top_k < size else size for s in samplings])
    kept = torch.where(place < keep, probabilities, 0.0)
    if any(s.top_p < 1.0 for s in samplings):
        # The smallest set whose mass reaches top_p, of what top_k left, renormalised.
        top_p = column([s.top_p if s.top_p < 1.0 else math.inf for s in samplings])
        before = torch.cumsum(kept, -1) - kept
        enough = (before < top_p * kept.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        keep = torch.minimum(keep, enough.clamp(min=1))
    if any(s.min_p for s in samplings):
        floor = column([s.min_p or 0.0 for s in samplings]) * probabilities[:, :1]
        likely = ((probabilities >= floor) & (place < keep)).sum(-1, keepdim=True)
        keep = torch.minimum(keep, likely.clamp(min=1))
    cumulative = torch.cumsum(torch.where(place < keep, probabilities, 0.0), -1)
    target = column(uniform_numbers) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    index = torch.minimum(index, keep.long() - 1)
    return ids.gather(-1, index)[:, 0]

"""From logits to a token: penalties, truncation, one uniform number, inverse of the CDF.

The uniform number of a token depends on (seed, position) alone, so a request's draws do not
depend on who else is served. Formulas and sources are public: docs/http-api.md#sampling.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

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
    """Draws the tokens of one request. Engine thread only."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]):
        self._sampling = sampling
        self._seen = set(prompt_ids)
        self._sampled: Counter[int] = Counter()
        self._position = 0

    def sample(self, logits: torch.Tensor) -> int:
        """Draw one token and remember it.

        logits: (vocabulary,) of any float type, on any device; not changed.
        """
        token = draw(
            self._penalised(logits.float()),
            self._sampling,
            uniform(self._sampling.seed, self._position),
        )
        self._seen.add(token)
        self._sampled[token] += 1
        self._position += 1
        return token

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Repetition over prompt and completion, presence and frequency over the completion."""
        sampling = self._sampling
        repetition = sampling.repetition_penalty
        if repetition is not None and repetition != 1.0:
            seen = torch.tensor(sorted(self._seen), device=logits.device)
            values = logits[seen]
            logits = logits.index_copy(
                0, seen, torch.where(values > 0, values / repetition, values * repetition)
            )
        presence = sampling.presence_penalty or 0.0
        frequency = sampling.frequency_penalty or 0.0
        if self._sampled and (presence or frequency):
            tokens = torch.tensor(list(self._sampled), device=logits.device)
            counts = torch.tensor(
                list(self._sampled.values()), device=logits.device, dtype=logits.dtype
            )
            logits = logits.index_add(0, tokens, -(presence + frequency * counts))
        return logits


def draw(logits: torch.Tensor, sampling: Sampling, uniform_number: float) -> int:
    """The token at which the cumulative distribution first exceeds `uniform_number`.

    logits: (vocabulary,) float32, penalties applied. Tokens are ordered by falling probability,
    equal ones by rising id, after temperature, top_k, top_p and min_p, in this order.
    """
    if not math.isfinite(float(logits.max())):
        # Of a NaN every comparison is false, and some token would come out of it silently.
        raise WorkerError(
            "the model computed values that are no numbers; its weights may be damaged"
        )
    if sampling.temperature == 0:
        return int(torch.argmax(logits))
    ordered, ids = torch.sort(logits, descending=True, stable=True)
    # The difference to the largest is divided, so that no temperature overflows.
    scaled = (ordered - ordered[0]).double() / sampling.temperature
    probabilities = torch.softmax(scaled, dim=0)
    keep = len(ids)
    if sampling.top_k is not None and sampling.top_k > 0:
        keep = min(keep, sampling.top_k)
    if sampling.top_p < 1.0:
        # The smallest set whose mass reaches top_p, of what top_k left, renormalised.
        kept = probabilities[:keep]
        before = torch.cumsum(kept, 0) - kept
        keep = max(1, int((before < sampling.top_p * kept.sum()).sum()))
    if sampling.min_p is not None and sampling.min_p > 0:
        floor = sampling.min_p * probabilities[0]
        keep = max(1, int((probabilities[:keep] >= floor).sum()))
    cumulative = torch.cumsum(probabilities[:keep], 0)
    target = uniform_number * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(ids[min(index, keep - 1)])

"""When a request will end and a new one could begin, from what is left and how fast it goes.

Pure: the numbers in, the seconds out. A forecast is told to clients (`Retry-After`) and decides
whether a request can begin before its deadline.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

SMOOTHING = 0.1  # weight of a new observation
GROWTH_SMOOTHING = 0.005  # of a pass, for what context adds: an answer's whole length has to count
# Of the mean context: a spread that is trusted half. Less says nothing beside the noise of passes.
TRUSTED_SPREAD = 0.25
LEAST_PACE = 0.5  # of the present pass: one that is forecast takes no less
KEPT_ANSWERS = 32
SPREAD = 1.25  # of what is told to last so long, up and down


@dataclass(frozen=True, slots=True)
class Answer:
    """One that is over."""

    tokens: int
    allowed: int
    first_s: float  # from its first pass to its first token
    rest_s: float  # of the others

    @property
    def token_s(self) -> float | None:
        return self.rest_s / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Growth:
    """What a token of context adds to a pass that decodes: least squares over rows and context,
    since a pass of more rows has more of both. Old passes count less and less."""

    passes: int = 0
    # Means of rows, context, seconds, and of their products.
    means: tuple[float, ...] = (0.0,) * 8

    def after_pass(self, seconds: float, rows: int, context: int) -> Growth:
        weight = max(1 / (self.passes + 1), GROWTH_SMOOTHING)
        seen = (
            rows, context, seconds,
            rows**2, rows * context, context**2, rows * seconds, context * seconds,
        )  # fmt: skip
        means = (old + weight * (new - old) for old, new in zip(self.means, seen, strict=True))
        return Growth(self.passes + 1, tuple(means))

    @property
    def token_s(self) -> float:
        """Seconds; never less than 0, and near it where contexts were much alike."""
        if not self.passes:
            return 0.0
        r, c, s, rr, rc, cc, rs, cs = self.means
        rr, rc, rs, cs = rr - r * r + 1, rc - r * c, rs - r * s, cs - c * s
        cc += -c * c + (TRUSTED_SPREAD * c) ** 2
        return max(0.0, (cs * rr - rs * rc) / (cc * rr - rc * rc))


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast it goes, of late."""

    pass_s: float = 0.0  # a pass that decodes; 0: none was seen
    growth: Growth = Growth()
    prompt_token_s: float = 0.0  # what a token of a prompt adds to a pass
    share: float = 1.0  # of the tokens that were allowed, how many came; 0 to 1
    answers: tuple[Answer, ...] = ()  # the last ones

    def after_pass(self, seconds: float, prompt_tokens: int, rows: int, context: int) -> Pace:
        """With one more pass, which took `seconds`. rows: sequences. context: tokens that they
        attended to, one at the least each."""
        if not prompt_tokens:
            return replace(
                self,
                pass_s=_smoothed(self.pass_s, seconds),
                growth=self.growth.after_pass(seconds, rows, context),
            )
        each = max(0.0, seconds - self.pass_s) / prompt_tokens
        return replace(self, prompt_token_s=_smoothed(self.prompt_token_s, each))

    def after_answer(self, answer: Answer) -> Pace:
        """With one more."""
        return replace(
            self,
            share=_smoothed(self.share, answer.tokens / answer.allowed),
            answers=(*self.answers, answer)[-KEPT_ANSWERS:],
        )


def _smoothed(before: float, new: float) -> float:
    return before + SMOOTHING * (new - before) if before else new


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of one request."""

    prompt_tokens: int  # still to compute
    done: int  # tokens of the answer
    allowed: int
    context: int = 0  # tokens that it has, with those of the answer


@dataclass(frozen=True, slots=True)
class Forecast:
    first_end_s: float = 0.0  # until the first running request ends; 0 where nothing runs
    begin_s: float = 0.0  # until a request that came now would begin


def answer_span(pace: Pace, prompt_tokens: int, allowed: int) -> tuple[float, float] | None:
    """Seconds that one answer takes, (from, to): as few and as many tokens as the last ones had, as
    quick and as slow. None while there was none.

    prompt_tokens: still to compute. Answers that used up what they were allowed say only that the
    next one may do so too.
    """
    if not pace.answers:
        return None
    first_s = [one.first_s for one in pace.answers]
    token_s = [one.token_s for one in pace.answers if one.token_s is not None] or [pace.pass_s]
    tokens = [one.tokens for one in pace.answers]
    most = allowed if any(one.tokens >= one.allowed for one in pace.answers) else max(tokens)
    low = min(first_s) + (min(*tokens, allowed) - 1) * min(token_s)
    high = max(first_s) + (min(most, allowed) - 1) * max(token_s)
    high += prompt_tokens * pace.prompt_token_s
    return low / SPREAD, high * SPREAD


def forecast(running: Sequence[Work], waiting: Sequence[Work], places: int, pace: Pace) -> Forecast:
    """running, waiting: in the order in which they came. places: that requests may run in."""
    queue = deque(waiting)
    # Of each that runs: when it ends, in passes from now, and the tokens it will have then.
    ends: list[tuple[float, float]] = []
    passes = grown = 0.0  # grown: tokens of context beside those of now
    seconds = sum(work.prompt_tokens for work in running) * pace.prompt_token_s

    def begins(work: Work) -> None:
        left = _tokens_left(work, pace.share)
        heapq.heappush(ends, (passes + left, work.context + left))

    def seconds_until(end: float) -> float:
        """Of passes in each of which every context becomes longer by one token."""
        middle = grown + len(ends) * (end - passes) / 2
        each = pace.pass_s + pace.growth.token_s * middle
        return (end - passes) * max(each, LEAST_PACE * pace.pass_s)

    for work in running:
        begins(work)
    first_end_s = begin_s = 0.0
    while queue or len(ends) >= places:
        while queue and len(ends) < places:
            work = queue.popleft()
            seconds += work.prompt_tokens * pace.prompt_token_s
            grown += work.context
            begins(work)
        if len(ends) >= places:
            end, context = ends[0]
            seconds += seconds_until(end)
            grown += len(ends) * (end - passes) - context
            heapq.heappop(ends)
            passes = end
            first_end_s = first_end_s or seconds
        begin_s = seconds
    if ends and not first_end_s:
        first_end_s = seconds + seconds_until(ends[0][0])
    return Forecast(first_end_s, begin_s)


def _tokens_left(work: Work, share: float) -> float:
    """Passes until a request ends, at least one."""
    usual = share * work.allowed - work.done
    return max(1.0, usual, share * (work.allowed - work.done))

"""Makes a text fit an encoder: drops clauses from its end, then cuts, and keeps what is protected.

Pure and deterministic. Two steps that can be taken apart, because a flow may ask the language model
for a shorter text between them:

- `trim_by_clause` drops the last clause, then the one before, down to the first; of a clause with
  protected parts those stay.
- `cut_hard` keeps the longest beginning for which the protected parts behind it still fit, and
  those parts. Its result is under the limit whenever the protected parts alone are.

A text that is under the limit is returned as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gateway.errors import TooLarge
from gateway.tokens.clauses import DANGLING, Clause, split
from gateway.tokens.protect import Span, is_inside_word, locate
from gateway.values.assembly import Counter, Limits, Step

# A text that trimming leaves with less than this part of the room is worth asking for again.
KEPT_SHARE = 0.5

_BLANK_OR_DANGLING = DANGLING + " \t\r\n\u3000"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLimits:
    """target: what a text should have; hard: what the encoder reads at most. In tokens, without
    those that the encoder adds."""

    target: int
    hard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """A text and how it came to be that short.

    fits: whether it is within the hard limit. False only where the protected parts alone are over
    it: `text` is then these parts, each once, and the caller decides (`must_fit`, or another way
    to send it), since keeping them and being under the limit exclude each other.
    """

    text: str
    tokens: int
    limit: int  # that `fits` speaks of
    fits: bool
    steps: tuple[Step, ...] = ()  # none: nothing had to be done

    def must_fit(self) -> Compressed:
        """Itself. Raises TooLarge, with both numbers, where it does not fit."""
        if not self.fits:
            raise TooLarge(
                f"what may not be dropped (names, LoRA tags, weighted terms, quoted text) has "
                f"{self.tokens} tokens and the limit is {self.limit}; use fewer or shorter ones"
            )
        return self


def limit_of(limits: Limits) -> TokenLimits | None:
    """Of a template's limits; None where the result has none. A target over the hard limit is that
    limit, and without a hard limit the target is it."""
    hard = limits.hard_token_limit or limits.target_token_limit
    if hard is None:
        return None
    return TokenLimits(target=min(limits.target_token_limit or hard, hard), hard=hard)


def compress(
    text: str,
    *,
    limit: int,
    counter: Counter,
    protected: Sequence[str] = (),
    hard_limit: int | None = None,
) -> Compressed:
    """Both steps, as far as they are needed.

    limit: tokens that are aimed at, by dropping whole clauses. hard_limit: tokens that are kept
    to at any price (None: the same); a text between both is left as the clauses are.
    protected: texts that stay wherever they stand as whole words, as `protected_spans` finds them.
    """
    hard = limit if hard_limit is None else max(limit, hard_limit)
    trimmed = trim_by_clause(text, limit=limit, counter=counter, protected=protected)
    if trimmed.tokens <= hard:
        return replace(trimmed, limit=hard, fits=True)
    cut = cut_hard(trimmed.text, limit=hard, counter=counter, protected=protected)
    return replace(cut, steps=trimmed.steps + cut.steps)


def needs_second_pass(*, before: int, after: int, limit: int, passes_left: int) -> bool:
    """Whether to ask the language model for a shorter text, after `trim_by_clause` made `after`
    tokens of `before`: where it is still over the limit, or where so much was dropped that less
    than half of the room is used. passes_left: how often the model may still be asked."""
    if passes_left <= 0 or before <= limit:
        return False
    return after > limit or after < KEPT_SHARE * limit


def trim_by_clause(
    text: str, *, limit: int, counter: Counter, protected: Sequence[str] = ()
) -> Compressed:
    """Without as many of the last clauses as have to go. `fits` is False where the first clause,
    which is never dropped, and the protected parts of the others are over the limit."""
    before = counter.count(text)
    if before <= limit:
        return Compressed(text=text, tokens=before, limit=limit, fits=True)
    clauses = split(text, locate(text, protected))
    if len(clauses) == 1:
        return Compressed(text=text, tokens=before, limit=limit, fits=False)
    most = len(clauses) - 1
    shortened, fits = most, counter.count(_without_last(text, clauses, most)) <= limit
    if fits:
        shortened = _least(most, lambda n: counter.count(_without_last(text, clauses, n)) <= limit)
    result = _without_last(text, clauses, shortened)
    tokens = counter.count(result)
    gone = clauses[len(clauses) - shortened :]
    step = _step(
        "clauses_dropped",
        "the text was over the limit; its last clauses went first",
        before=before,
        after=tokens,
        limit=limit,
        clauses=len(clauses),
        dropped=sum(not one.spans for one in gone),
        reduced=sum(bool(one.spans) for one in gone),
        characters=len(text) - len(result),
    )
    return Compressed(text=result, tokens=tokens, limit=limit, fits=fits, steps=(step,))


def cut_hard(
    text: str, *, limit: int, counter: Counter, protected: Sequence[str] = ()
) -> Compressed:
    """The longest beginning, on a token's end and where possible a word's, with the protected
    parts that stood behind it. Repeated parts stay once where all of them would not fit. Empty
    where nothing is protected and the first character alone is over the limit."""
    before = counter.count(text)
    if before <= limit:
        return Compressed(text=text, tokens=before, limit=limit, fits=True)
    spans = locate(text, protected)
    kept = spans
    alone = _joined(text, kept)
    steps: tuple[Step, ...] = ()
    once = tuple({text[one.start : one.end]: one for one in reversed(spans)}.values())[::-1]
    if len(once) < len(spans) and counter.count(alone) > limit:
        kept = once
        alone = _joined(text, kept)
        steps = (
            _step(
                "repeats_dropped",
                "the protected parts alone were over the limit; repeated ones are kept once",
                limit=limit,
                parts=len(spans),
                kept=len(kept),
                after=counter.count(alone),
            ),
        )
    tokens = counter.count(alone)
    if tokens > limit:
        step = _step(
            "unfit",
            "the protected parts alone are over the limit",
            before=before,
            after=tokens,
            limit=limit,
            parts=len(kept),
        )
        return Compressed(text=alone, tokens=tokens, limit=limit, fits=False, steps=(*steps, step))
    result = _longest(text, limit, counter, spans, kept) or alone
    tokens = counter.count(result)
    step = _step(
        "cut",
        "no whole clause could go any more; cut on the end of a token",
        before=before,
        after=tokens,
        limit=limit,
        parts=len(kept),
        characters=len(text) - len(result),
    )
    return Compressed(text=result, tokens=tokens, limit=limit, fits=True, steps=(*steps, step))


def _without_last(text: str, clauses: Sequence[Clause], number: int) -> str:
    """Without the last `number` clauses, which are not all; their protected parts stay."""
    if number == 0:
        return text
    pieces: list[str] = []
    for index, one in enumerate(clauses):
        if index < len(clauses) - number:
            body = text[one.start : one.body_end]
        elif one.spans:
            body = _joined(text, one.spans)
        else:
            continue
        pieces += [body, text[one.body_end : one.end]]
    # The last separator announces nothing now; what ends a sentence stays.
    separator = pieces.pop()
    return "".join(pieces) + (separator.rstrip() if separator.strip(_BLANK_OR_DANGLING) else "")


def _joined(text: str, spans: Sequence[Span]) -> str:
    """The spans alone, with a blank between those that something stood between."""
    parts: list[str] = []
    for number, one in enumerate(spans):
        if number and spans[number - 1].end < one.start:
            parts.append(" ")
        parts.append(text[one.start : one.end])
    return "".join(parts)


def _least(most: int, holds: Callable[[int], bool]) -> int:
    """The least number in 1 … most for which it holds, which it does for `most`; found by halves,
    as a shorter text has fewer tokens but for a few at its seams."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _longest(
    text: str, limit: int, counter: Counter, spans: Sequence[Span], kept: Sequence[Span]
) -> str:
    """The longest beginning with the kept spans behind it that is within the limit; empty where
    only the spans alone are."""
    head = counter.cut(text, limit)
    best, low, high = "", 1, limit
    while low <= high:
        room = (low + high) // 2
        end = _end_of(text, len(counter.cut(head, room)), spans)
        behind = [one for one in kept if one.start >= end]
        begin = _tidy(text, end, spans)
        tail = _joined(text, behind)
        candidate = begin + (" " if begin and tail else "") + tail
        if counter.count(candidate) <= limit:
            best, low = candidate, room + 1
        else:
            high = room - 1
    return best


def _end_of(text: str, end: int, spans: Sequence[Span]) -> int:
    """A place for a cut that is not behind `end`, in no span, and not within a word unless the
    word is all there is."""
    for one in spans:
        if one.start < end < one.end:
            return one.start
    floor = max((one.end for one in spans if one.end <= end), default=0)
    begin = end
    while begin > floor and is_inside_word(text, begin):
        begin -= 1
    return begin if text[:begin].strip() else end


def _tidy(text: str, end: int, spans: Sequence[Span]) -> str:
    """text[:end] without blanks and separators at its end, but whole spans."""
    floor = max((one.end for one in spans if one.end <= end), default=0)
    return text[:floor] + text[floor:end].rstrip(_BLANK_OR_DANGLING)


def _step(outcome: str, why: str, **detail: int) -> Step:
    return Step(step="compression", outcome=outcome, why=why, detail=detail)

"""Makes a model's answer fit the encoder that will read it, step by step, each step told.

Clauses from the end are dropped first. Where that is not enough, or throws most of the text away,
the model is asked once for a shorter one. What is then still over the limit is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import GatewayError, TemplateNotFound
from gateway.tokens.compress import (
    Compressed,
    TokenLimits,
    compress,
    limit_of,
    needs_second_pass,
    trim_by_clause,
)
from gateway.tokens.protect import protected_spans
from gateway.values.assembly import Assembled, Counter, Counters, Step

# A shorter version of a text that is to have so many tokens; an error: why there is none.
AskShorter = Callable[[str, int], str | GatewayError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The text as it is handed out."""

    text: str
    tokens: int
    limit: int | None  # that it is under; None: the target has none
    is_exact: bool  # whether the tokens are counted, not estimated
    compressed: bool
    steps: tuple[Step, ...]


def fit(
    text: str, assembled: Assembled, counters: Counters, ask_shorter: AskShorter | None
) -> Fitted:
    """Raises TooLarge where what may not be dropped is alone over the encoder's limit."""
    counter = counters.of(assembled.limits.target_tokenizer)
    limits = limit_of(assembled.limits)
    if limits is None:
        return _fitted(text, counter, None, ())
    protected = protected_spans(text, assembled.protected)
    trimmed = trim_by_clause(text, limit=limits.target, counter=counter, protected=protected)
    steps: list[Step] = []
    source = text
    if ask_shorter is not None and needs_second_pass(
        before=counter.count(text), after=trimmed.tokens, limit=limits.target, passes_left=1
    ):
        steps += trimmed.steps
        shorter = ask_shorter(text, limits.target)
        outcome, source, trimmed = _better(shorter, text, trimmed, limits, counter, assembled)
        steps.append(outcome)
    protected = protected_spans(source, assembled.protected)
    done = compress(source, limit=limits.target, counter=counter, protected=protected)
    if not done.fits and limits.hard > limits.target:
        # A soft target gives way to what may not be dropped; the encoder's own limit does not.
        done = compress(
            source,
            limit=limits.target,
            counter=counter,
            protected=protected,
            hard_limit=limits.hard,
        )
    done.must_fit()
    return _fitted(done.text, counter, limits.target, (*steps, *done.steps), before=text)


def _better(
    shorter: str | GatewayError,
    text: str,
    trimmed: Compressed,
    limits: TokenLimits,
    counter: Counter,
    assembled: Assembled,
) -> tuple[Step, str, Compressed]:
    """What goes on from: the model's shorter text where it keeps what is protected and leaves more
    than trimming did."""
    if isinstance(shorter, TemplateNotFound):
        why = "there is no active template for compression"
        return Step(step="compression", outcome="not_asked", why=why), text, trimmed
    if isinstance(shorter, GatewayError):
        detail: dict[str, object] = {"code": shorter.code}
        step = Step(step="compression", outcome="not_answered", why=str(shorter), detail=detail)
        return step, text, trimmed
    lost = [span for span in protected_spans(text, assembled.protected) if span not in shorter]
    tokens = counter.count(shorter)
    detail = {"tokens": tokens, "limit": limits.target, "protected_lost": len(lost)}
    if lost or not shorter.strip():
        why = "the shorter text lost what may not be dropped"
        step = Step(step="compression", outcome="asked_and_left", why=why, detail=detail)
        return step, text, trimmed
    again = trim_by_clause(
        shorter,
        limit=limits.target,
        counter=counter,
        protected=protected_spans(shorter, assembled.protected),
    )
    if trimmed.fits and again.tokens <= trimmed.tokens:
        why = "the shorter text says no more than what trimming leaves"
        step = Step(step="compression", outcome="asked_and_left", why=why, detail=detail)
        return step, text, trimmed
    why = "the model was asked for a shorter text"
    return Step(step="compression", outcome="asked", why=why, detail=detail), shorter, again


def _fitted(
    text: str,
    counter: Counter,
    limit: int | None,
    steps: tuple[Step, ...],
    before: str | None = None,
) -> Fitted:
    return Fitted(
        text=text,
        tokens=counter.count(text),
        limit=limit,
        is_exact=counter.is_exact,
        compressed=before is not None and text != before,
        steps=steps,
    )

"""How long messages are for the model that reads them, and what is dropped to make room."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.errors import TooLarge
from gateway.prompts.rules import NEGATIVE, Part
from gateway.values.assembly import Counter, Message, Step
from gateway.values.rows import LlmModel, Provider

# ChatML writes <|im_start|> role newline content <|im_end|> newline for each message and
# <|im_start|> "assistant" newline at the end (docs/architecture.md, messages to tokens); role,
# newline and content are encoded as one piece, the other three are one token each.
AROUND_MESSAGE = 3
OPENING = "assistant\n"

WORKER_TOKENIZER = "qwen"

_PARAGRAPH_END = re.compile(r"(?<=\n\n)(?=\S)")


@dataclass(frozen=True, slots=True)
class Fitted:
    messages: tuple[Message, ...]
    taken: tuple[Part, ...]
    tokens: int
    steps: tuple[Step, ...]


def tokenizer_of(model: LlmModel | None, provider: Provider | None) -> str | None:
    """The tokenizer that the model's catalogue row names (capabilities.tokenizer), our own
    worker's for its models, else None: an estimate."""
    if model is None:
        return None
    named = model.capabilities.get("tokenizer")
    if isinstance(named, str) and named:
        return named
    return WORKER_TOKENIZER if provider is not None and provider.kind == "worker" else None


def context_of(model: LlmModel | None) -> int | None:
    """Tokens that prompt and answer may have together (capabilities.context_length)."""
    if model is None:
        return None
    length = model.capabilities.get("context_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        return None
    return length


def count_messages(messages: Sequence[Message], counter: Counter) -> int:
    """Tokens of a whole prompt in the worker's ChatML form. A provider's own form differs by a few
    tokens; its counts are estimates anyway."""
    written = sum(
        AROUND_MESSAGE + _count(f"{one.role}\n{one.content}", counter) for one in messages
    )
    return written + 1 + counter.count(OPENING)


def _count(text: str, counter: Counter) -> int:
    """Paragraph by paragraph where that gives the same number: a template's and a rule's paragraphs
    come again with every request, and counters keep what they counted.

    Qwen's tokenizer splits a text by a pattern before it makes tokens, and no piece of that pattern
    goes from a line break on to something that is no blank; its normal form (NFC) joins nothing
    across a line break either. Other exact tokenizers count the whole text.
    """
    if counter.is_exact and counter.name != WORKER_TOKENIZER:
        return counter.count(text)
    return sum(map(counter.count, _PARAGRAPH_END.split(text)))


def fit(
    compose: Callable[[tuple[Part, ...]], tuple[Message, ...]],
    taken: tuple[Part, ...],
    counter: Counter,
    context: int | None,
    max_output_tokens: int,
) -> Fitted:
    """The messages with as many of the optional rules as there is room for.

    compose: messages of these parts. context: None means that no limit is known. Optional parts of
    the messages go one at a time, the highest priority number first, then the largest id. Raises
    TooLarge, with both numbers, where the rest is still over by an exact count; by an estimate the
    step says so and the model decides.
    """
    messages = compose(taken)
    tokens = count_messages(messages, counter)
    detail: dict[str, object] = {"tokens": tokens, "exact": counter.is_exact}
    detail |= {"tokenizer": counter.name, "context_length": context}
    room = None if context is None else context - max_output_tokens
    steps = [
        Step(
            step="count",
            outcome="counted" if room is None or tokens <= room else "over",
            why="no limit is known" if room is None else f"the prompt may have {room} tokens",
            detail=detail,
        )
    ]
    if room is None or tokens <= room:
        return Fitted(messages, taken, tokens, tuple(steps))
    optional = [one for one in taken if one.rule.is_optional and one.rule.slot != NEGATIVE]
    optional.sort(key=lambda one: (one.rule.priority, one.rule.id))
    while tokens > room and optional:
        part = optional.pop()
        taken = tuple(one for one in taken if one is not part)
        messages = compose(taken)
        before, tokens = tokens, count_messages(messages, counter)
        steps.append(
            Step(
                step="compression",
                outcome="dropped",
                why=f"optional rule; {before} tokens before, {tokens} after",
                detail={"id": part.rule.id, "name": part.rule.name, "tokens": tokens},
            )
        )
    if tokens > room:
        if counter.is_exact:
            raise TooLarge(
                f"the messages have {tokens} tokens and {room} are free beside an answer of "
                f"{max_output_tokens}; send a shorter prompt or fewer earlier turns",
                fields={"tokens": tokens, "limit": room},
            )
        why = f"{tokens} tokens by an estimate, {room} are free; the model decides"
        steps.append(Step(step="compression", outcome="over", why=why, detail={"tokens": tokens}))
    return Fitted(messages, taken, tokens, tuple(steps))

"""The negative prompt: rows of the table, rules, and last what the user wrote.

The base comes before the user's text, in the order that clients of queue-job know:

    prepend rules · the template's own · table rows · append rules · the user's text

Rows of the other content mode are never taken.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.prompts.rules import NEGATIVE, SEPARATORS, Part, composed
from gateway.values.assembly import Step
from gateway.values.rows import ANY, NegativePrompt, Snapshot


def negative_rows(
    snapshot: Snapshot, target_model: str, content_mode: str, generation_mode: str
) -> tuple[NegativePrompt, ...]:
    """Active rows of the target (or of `*`), the mode and the generation mode (txt2img | i2i);
    highest priority first, then id."""
    found = [
        row
        for row in snapshot.negatives
        if row.is_active
        and row.content_mode == content_mode
        and row.generation_mode == generation_mode
        and row.target_model in (target_model, ANY)
    ]
    found.sort(key=lambda row: (-row.priority, row.id))
    return tuple(found)


def compose_negative(
    rows: Iterable[NegativePrompt],
    *,
    template_text: str = "",
    taken: Iterable[Part] = (),
    user_text: str = "",
) -> tuple[str, Step]:
    """The whole text and a step with the rows. taken: rules, of which those of this slot count."""
    listed = tuple(rows)
    base = composed(NEGATIVE, (template_text, *(row.negative_prompt for row in listed)), taken)
    text = SEPARATORS[NEGATIVE].join(one for one in (base, user_text) if one)
    step = Step(
        step="negative",
        outcome="composed" if text else "empty",
        why=f"{len(listed)} rows, {'with' if user_text else 'without'} a text of the user",
        detail={"rows": [row.id for row in listed], "characters": len(text)},
    )
    return text, step

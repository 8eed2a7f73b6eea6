"""The check that no setting switches off, as the error that callers get."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.content.refusal import refusal
from gateway.errors import PromptRefused
from gateway.prompts.variables import is_withheld
from gateway.values.assembly import Assembled


def refuse(texts: Sequence[str]) -> None:
    """Raises PromptRefused for sexual content with minors or real named people in these texts
    together. The error says which of the two, and nothing of the texts."""
    found = refusal(texts)
    if found is not None:
        raise PromptRefused(
            f"this is refused in every mode ({found.kind}); change the text", fields={}
        )


def refuse_answer(assembled: Assembled, brought: Sequence[str], answer: str) -> None:
    """As `refuse`, of a finished text with everything that it answers: what was sent, the
    character, and `brought`, what else the request has. Alone, an answer need not say whom it
    is about."""
    sent = [one.content for one in assembled.messages]
    refuse([*sent, *_of_character(assembled), *brought, answer])


def _of_character(assembled: Assembled) -> list[str]:
    character = assembled.character
    if character is None or is_withheld(character, assembled.content_mode):
        return []
    card = (str(one) for one in character.card.values() if one is not None)
    return [character.name, character.persona, character.system_prompt, *card]

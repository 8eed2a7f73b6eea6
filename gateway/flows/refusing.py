"""The check that no setting switches off, as the error that callers get."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.content.refusal import refusal
from gateway.errors import PromptRefused


def refuse(texts: Sequence[str]) -> None:
    """Raises PromptRefused for sexual content with minors or real named people in these texts
    together. The error says which of the two, and nothing of the texts."""
    found = refusal(texts)
    if found is not None:
        raise PromptRefused(
            f"this is refused in every mode ({found.kind}); change the text", fields={}
        )

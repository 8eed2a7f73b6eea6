"""Messages to text pieces, adding nothing that the template does not define.

For ChatML that is, for each message in order, `<|im_start|>` role newline content `<|im_end|>`
newline, and then the header of the answer. No default system message, no strip, no merge of
consecutive roles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from worker.errors import ConfigError
from worker.protocol.messages import ChatMessage
from worker.receipt import canonical_json

# What a template's hash is made from: one message of each role, in the usual order.
_PROBE = (ChatMessage("system", "s"), ChatMessage("user", "u"), ChatMessage("assistant", "a"))


@dataclass(frozen=True, slots=True)
class Control:
    """One control token of the model, by its text. Only templates make these."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text between two control tokens: encoded as one piece, never matched against them."""

    text: str


Piece = Control | Text


@dataclass(frozen=True, slots=True)
class Template:
    name: str
    controls: tuple[str, ...]  # tokens that the model's tokenizer must have
    end: str  # the control token that ends an answer
    render: Callable[[Iterable[ChatMessage]], list[Piece]]

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what the template makes of three short messages, as canonical JSON pairs
        ["control" | "text", text]: docs/http-api.md#state-of-the-worker."""
        pieces = [[type(one).__name__.lower(), one.text] for one in self.render(_PROBE)]
        return hashlib.sha256(canonical_json(pieces)).hexdigest()


def _chatml(messages: Iterable[ChatMessage]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces += [
            Control("<|im_start|>"),
            Text(f"{message.role}\n{message.content}"),
            Control("<|im_end|>"),
            Text("\n"),
        ]
    return [*pieces, Control("<|im_start|>"), Text("assistant\n")]


TEMPLATES = {
    "chatml": Template("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_end|>", _chatml),
}


def find_template(name: str) -> Template:
    """Raises ConfigError for a name that is not known; a model with it must not load."""
    if name not in TEMPLATES:
        raise ConfigError(f"chat_template {name} is unknown; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def plain_text(pieces: Sequence[Piece]) -> str:
    """The prompt as one string, for people: ids are made from the pieces, never from this."""
    return "".join(piece.text for piece in pieces)

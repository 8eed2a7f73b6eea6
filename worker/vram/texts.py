"""The texts of an image's job, and in how many pieces its text encoders read them. Pure.

Who counts the tokens is not decided here: an engine does it with the tokenizers of its pipeline, a
plan with the same ones from a file (worker/vram/tokenizers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from worker.errors import PromptTooLong
from worker.protocol.messages import RenderParams
from worker.vram.phases import VIDEO_TEXT_TOKENS

MAX_PIECES = 20  # 1500 tokens: more is not a prompt, and the denoiser reads all of it in every step
SEPARATOR = ", "


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the parts that it consists of, and how much each of them counts."""

    parts: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def whole(self) -> str:
        return "".join(self.parts)

    @property
    def is_plain(self) -> bool:
        return all(weight == 1 for weight in self.weights)


@dataclass(frozen=True, slots=True)
class Reader:
    """A tokenizer as a text encoder has it."""

    name: str
    count: Callable[[str], int]  # tokens of a text, begin and end included
    limit: int  # tokens that the encoder reads at once, begin and end included


def prompt_of(params: RenderParams) -> Text:
    """The prompt with its terms, each after a comma; without a prompt they begin the text."""
    parts, weights = [params.prompt], [1.0]
    for term in params.weighted:
        if any(parts):
            parts.append(SEPARATOR)
            weights.append(1.0)
        parts.append(term.text)
        weights.append(term.weight)
    return Text(tuple(parts), tuple(weights))


def read_texts(params: RenderParams) -> list[str]:
    """The texts of a job that its encoders read, but for the empty one."""
    negative = params.negative_prompt if params.guided else None
    return [text for text in (prompt_of(params).whole, negative) if text]


def token_counts(text: str, readers: Sequence[Reader], long_prompts: str) -> dict[str, int]:
    """Tokens of `text` per reader, begin and end of one piece included. long_prompts: chunk, cut
    into pieces; refuse, take what an encoder reads at once.

    Raises PromptTooLong when they are more than that: nothing is cut silently.
    """
    counts = {}
    for reader in readers:
        count, limit = reader.count(text), reader.limit
        if long_prompts == "chunk":
            limit = MAX_PIECES * (limit - 2) + 2
        if count > limit:
            raise PromptTooLong(
                f"the text has {count - 2} tokens and the picture's text encoder takes "
                f"{limit - 2}; shorten it"
            )
        counts[reader.name] = count
    return counts


def text_pieces(params: RenderParams, readers: Sequence[Reader], long_prompts: str) -> int:
    """In how many pieces the longer of a job's texts is read. Raises PromptTooLong."""
    most = 1
    for text in read_texts(params):
        counts = token_counts(text, readers, long_prompts)
        for reader in readers:
            most = max(most, -(-(counts[reader.name] - 2) // (reader.limit - 2)))
    return most


def require_short(count: int) -> None:
    """count: tokens of a video's text, end token included. Raises PromptTooLong."""
    if count > VIDEO_TEXT_TOKENS:
        raise PromptTooLong(
            f"the text has {count} tokens and the video's text encoder takes "
            f"{VIDEO_TEXT_TOKENS}; shorten it"
        )

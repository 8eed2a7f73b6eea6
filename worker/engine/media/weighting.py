"""compel's weighting of texts, over tokens that are those of the whole text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def weighing(tokenizer: Any, encoder: Any) -> Any:
    """compel's EmbeddingsProvider for one of SDXL's two encoders, wherever that is: its last hidden
    states but one, of a text that is cut into pieces of what it reads at once."""
    from compel.embeddings_provider import (
        EmbeddingsProvider,
        ReturnedEmbeddingsType,
        SplitLongTextMode,
    )

    kind: Any = type("WholeText", (_WholeText, EmbeddingsProvider), {})
    return kind(
        tokenizer,
        encoder,
        truncate=False,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )


class _WholeText:
    """In front of an EmbeddingsProvider. By itself that one reads each part apart, so that
    punctuation where two of them meet gives other tokens than the text has, and it finds parts
    again by searching for their tokens."""

    tokenizer: Any
    max_token_count: int

    def get_token_ids(self, texts: Sequence[str], *_: Any, **__: Any) -> list[list[int]]:
        """Of parts that follow one another, without begin and end. A token that two parts share
        belongs to the one where it begins."""
        read = self.tokenizer(
            "".join(texts),
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ends = [*accumulate(len(text) for text in texts)]
        found: list[list[int]] = [[] for _ in texts]
        for token, (begin, _) in zip(read.input_ids, read.offset_mapping, strict=True):
            found[bisect_right(ends, begin)].append(token)
        return found

    def _get_token_ranges_for_fragments(
        self, _: Sequence[int], fragments: Sequence[str]
    ) -> list[tuple[int, int]]:
        """First and last position of each part among pieces with begin and end tokens."""
        ranges, begin = [], 0
        for tokens in self.get_token_ids(fragments):
            end = begin + len(tokens)
            ranges.append((self._place(begin), self._place(end - 1)) if tokens else (0, -1))
            begin = end
        return ranges

    def _place(self, token: int) -> int:
        room = self.max_token_count - 2
        return int(token // room * self.max_token_count + token % room + 1)

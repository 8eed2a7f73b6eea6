"""Counters by name: the tokenizer of an encoder where its files are there, else the estimate."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from gateway.errors import Invalid
from gateway.tokens.estimate import EstimateCounter
from gateway.tokens.files import load, sources
from gateway.tokens.graphemes import is_boundary
from gateway.values.assembly import Counter

CACHED_COUNTS = 2048  # per counter: templates and rules come again with every request
CACHED_CHARS = 2000  # longer texts are counted each time, so that a cache is 16 MiB at most
_AHEAD = 8  # tokens behind a limit that are tried, since a beginning may need fewer by itself


class FileCounter:
    """Counts as the encoder does. Safe for threads without a lock: a tokenizer of the library
    refuses ("Already borrowed") only a change of its settings while another thread encodes, and
    nothing is changed after loading."""

    is_exact = True

    def __init__(self, name: str, tokenizers: Sequence[Tokenizer]):
        """tokenizers: of the encoders that read the same text; the one with most tokens counts."""
        self.name = name
        self._tokenizers = tuple(tokenizers)
        # Begin and end tokens that an encoder adds to a text; a limit of the encoder itself
        # (77 for CLIP, 512 for UMT5) leaves that many fewer for the text.
        self.end_tokens = max(one.num_special_tokens_to_add(False) for one in tokenizers)
        self._kept = functools.lru_cache(maxsize=CACHED_COUNTS)(self.counted)

    def count(self, text: str) -> int:
        """Raises Invalid for a text that is no Unicode text."""
        return self._kept(text) if len(text) <= CACHED_CHARS else self.counted(text)

    def cut(self, text: str, limit: int) -> str:
        """Cut by positions in the text itself: what CLIP decodes to has no capitals and no blanks
        as they were. Never splits a character as it is seen, so it may stop before a token that
        ends inside one, and is empty when the first character alone is over the limit."""
        encodings = [_encoded(one, text) for one in self._tokenizers]
        offsets = max((one.offsets for one in encodings), key=len)
        if len(offsets) <= limit:
            return text
        stops = _stops(text, offsets, limit)
        at = len(stops) - 1
        while at >= 0 and stops[at][0] > limit:
            at -= 1
        # A beginning can have other tokens than it has within the whole, so each is counted.
        while at >= 0 and (over := self.counted(text[: stops[at][1]]) - limit) > 0:
            enough = stops[at][0] - over
            at -= 1
            while at >= 0 and stops[at][0] > enough:
                at -= 1
        while at + 1 < len(stops) and self.counted(text[: stops[at + 1][1]]) <= limit:
            at += 1
        return text[: stops[at][1]] if at >= 0 else ""

    def counted(self, text: str) -> int:
        """As `count`, past the cache."""
        return max(len(_encoded(one, text).ids) if text else 0 for one in self._tokenizers)


class TokenCounters:
    """The counters of a process. Each name is loaded once, by whichever thread asks first, under
    the lock; a counter never changes after that."""

    def __init__(self, files: Mapping[str, Path]):
        """files: by tokenizer name (clip, umt5, qwen, …) as `gateway.tokens.files.sources` takes
        them. Nothing is read before `load_all` or the first `of`."""
        self._files = dict(files)
        self._estimate = EstimateCounter()
        self._loaded: dict[str, Counter] = {}
        self._lock = threading.Lock()

    def of(self, tokenizer: str | None) -> Counter:
        """Raises ConfigError where the files of that name are broken."""
        if tokenizer is None or tokenizer not in self._files:
            return self._estimate
        if (known := self._loaded.get(tokenizer)) is not None:
            return known
        with self._lock:
            if tokenizer not in self._loaded:
                found = sources(self._files[tokenizer])
                self._loaded[tokenizer] = (
                    FileCounter(tokenizer, [load(one) for one in found])
                    if found
                    else self._estimate
                )
            return self._loaded[tokenizer]

    def load_all(self) -> dict[str, bool]:
        """Names, and whether each counts exactly. Called at start, so that a broken file stops the
        process (ConfigError) and not a request; files that are not there only make estimates."""
        return {name: self.of(name).is_exact for name in self._files}


def _stops(text: str, offsets: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """(tokens, characters) of the beginnings that end on a token's and a character's boundary, in
    order, up to a few tokens behind the limit."""
    found, end = [], 0
    for tokens in range(1, min(len(offsets), limit + 1 + _AHEAD)):
        end = max(end, offsets[tokens - 1][1])
        # A character of several tokens has the same place in each of them.
        if offsets[tokens][0] >= end > 0 and is_boundary(text, end):
            found.append((tokens, end))
    return found


def _encoded(tokenizer: Tokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError as exc:
        # The library's word for half of a surrogate pair, which JSON can carry as \ud800.
        at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
        if at is None:
            raise
        raise Invalid(
            f"character {at} of the text is a lone surrogate, which is no Unicode text; remove it"
        ) from exc

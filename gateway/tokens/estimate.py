"""Counts without a tokenizer's files: an estimate that says so, and a bound that holds."""

from __future__ import annotations

import re
import unicodedata

from gateway.tokens.graphemes import boundary_before

LETTERS_PER_TOKEN = 4  # of a run of ASCII letters, as English has on average

# A run of letters; or one character of another kind. Blanks cost nothing.
_UNIT = re.compile(r"[^\W\d_]+|\S")


class EstimateCounter:
    """Holds no state. Safe for threads.

    Formula: each run of letters costs its ASCII letters / 4, rounded up, and the UTF-8 bytes of its
    other letters; each digit and each sign costs one, or its UTF-8 bytes outside ASCII. Blanks cost
    nothing. This is high for prose and for scripts that a vocabulary knows, and may be low for
    rare words: `upper_bound` is what cannot be exceeded.
    """

    name = "estimate"
    is_exact = False

    def count(self, text: str) -> int:
        return sum(_cost(unit.group()) for unit in _UNIT.finditer(text))

    def cut(self, text: str, limit: int) -> str:
        """The longest beginning that is estimated at `limit` at most; ends between units, or
        inside a run of letters that is longer than the limit by itself."""
        spent = 0
        for unit in _UNIT.finditer(text):
            cost = _cost(unit.group())
            if spent + cost > limit:
                end = unit.start()
                if not text[:end].strip():  # nothing would be left, so the run itself is cut
                    end = _within(text, unit.start(), unit.end(), limit)
                return text[: boundary_before(text, end)]
            spent += cost
        return text


def upper_bound(text: str) -> int:
    """Tokens that no byte-level or byte-falling-back tokenizer exceeds, its begin and end left out.

    A token stands for one byte at least of the text as it is normalised, a blank being the mark of
    a word's beginning; so the bytes of the longest normal form are enough, and one for the mark
    that is put before the first word. Honest and far: several times an English text's count.
    """
    forms = (text, text.lower(), *(unicodedata.normalize(form, text) for form in ("NFC", "NFKC")))
    sizes = [
        len(version.encode("utf-8", "surrogatepass"))
        for form in forms
        for version in (form, form.lower())
    ]
    return max(sizes) + 1 if text else 0


def _within(text: str, begin: int, end: int, limit: int) -> int:
    """The last position of the run text[begin:end] up to which it costs `limit` at most."""
    at = begin
    while at < end and _cost(text[begin : at + 1]) <= limit:
        at += 1
    return at


def _cost(unit: str) -> int:
    ascii_letters = sum(char < "\x80" for char in unit)
    others = 0
    if ascii_letters < len(unit):
        others = len(unit.encode("utf-8", "surrogatepass")) - ascii_letters
    return -(-ascii_letters // LETTERS_PER_TOKEN) + others

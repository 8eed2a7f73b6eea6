"""Whether a text has adult themes: what chooses the content mode where nobody said one.

Only rows are chosen by it, no text is changed or refused. Whole words count, never parts, and what
makes a word harmless stands right beside it ("nude lipstick", "same sex"). What counts as an adult
theme is told in gateway/data/adult_words.toml; scripts/evaluate_detector.py measures it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gateway.content.terms import TermList, read_terms
from gateway.values.rows import NSFW, SFW


@dataclass(frozen=True, slots=True)
class Detection:
    mode: str  # sfw | nsfw
    terms: tuple[str, ...]  # of the list, not of the text; may be logged


def detect(text: str) -> Detection:
    """The content mode of a text. About 20 µs for a short prompt after the first call."""
    terms = adult_terms()
    found = terms.found(terms.words(text))
    return Detection(NSFW if found else SFW, found)


@functools.cache
def adult_terms() -> TermList:
    """The list of adult themes; read at the first call."""
    return TermList(read_terms("adult_words.toml"))

"""What is refused in every mode: sexual content with minors, and about real named people.

No setting reaches this module. A refusal needs a sexual theme and a person of one of the two kinds
anywhere in the texts of one request together, so that they cannot be split between a system prompt,
a character, an earlier turn and the prompt. It is a check of words: it does not understand a text,
refuses some harmless ones that have both, and cannot see what no word says. How often:
scripts/evaluate_detector.py.

Negative prompts are not among the texts to give: "child" there keeps children out of a picture.
A system prompt that forbids such content by naming it would itself be refused; say instead that
everyone shown is an adult.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.content.ages import is_young, names_age
from gateway.content.detect import adult_terms
from gateway.content.people import names_somebody
from gateway.content.spelling import masks, words
from gateway.content.terms import TermList, read_terms

# Texts of which it is remembered whether they have a sexual theme; 8 MB at the most.
REMEMBERED, REMEMBERED_CHARS = 4096, 2000

MINORS, PEOPLE = "sexual content with minors", "sexual content about real people"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Says which rule was met and nothing of the texts."""

    kind: str  # MINORS | PEOPLE


@dataclass(frozen=True, slots=True)
class _Lists:
    """Built once, then only read."""

    adult: TermList
    sexual: TermList
    minors: TermList
    people: TermList
    hidden: frozenset[str]
    masked: dict[str, str]


def refusal(texts: Sequence[str]) -> Refusal | None:
    """Why these texts of one request may not be worked on; None: they may. Pure after the first
    call, which reads the word lists."""
    texts = [text for text in texts if text.strip()]
    if not any(map(_sexual, texts)):
        return None
    # Judged as one: "a girl" and "14" say together what neither says alone.
    lists = _lists()
    tokens = [token for text in texts for token in _words(text)]
    if is_young(tokens) or lists.minors.found(tokens) or any(map(names_age, texts)):
        return Refusal(MINORS)
    if lists.people.found(tokens) or any(map(names_somebody, texts)):
        return Refusal(PEOPLE)
    return None


def _sexual(text: str) -> bool:
    """Whether a text has a sexual theme. Remembered for texts that are not long, since those of
    templates and rules come with every request; a theme ends where its text ends."""
    return _is_sexual_known(text) if len(text) <= REMEMBERED_CHARS else _is_sexual(text)


@functools.lru_cache(maxsize=REMEMBERED)
def _is_sexual_known(text: str) -> bool:
    return _is_sexual(text)


def _is_sexual(text: str) -> bool:
    lists = _lists()
    tokens = _words(text)
    return bool(lists.adult.found(tokens) or lists.sexual.found(tokens))


def _words(text: str) -> list[str]:
    lists = _lists()
    return words(text, lists.hidden, lists.masked)


@functools.cache
def _lists() -> _Lists:
    table: dict[str, Any] = read_terms("refusal_words.toml")
    adult = adult_terms()
    sexual, minors, people = (TermList(table[name]) for name in ("sexual", "minors", "people"))
    every = (adult, sexual, minors, people)
    return _Lists(
        adult,
        sexual,
        minors,
        people,
        hidden=frozenset().union(*(one.hidden for one in every)),
        masked=masks(frozenset().union(*(one.strong for one in every))),
    )

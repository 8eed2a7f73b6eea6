"""A list of words and patterns, and where a text has them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.content.spelling import MARK, masks, words
from gateway.errors import ConfigError

DATA = Path(__file__).resolve().parents[1] / "data"
_NEGATIONS = frozenset(("no", "not", "non", "without", "zero", "never", "nothing", "nobody"))
# Where what follows is no longer said of the word itself.
_LINKS = frozenset(
    """on in at by with under over near and or from while who against his her their behind
    beside""".split()
)
_AROUND = 3  # words before or after a weak word, or after a strong one, that decide about it

Alternatives = tuple[frozenset[str], bool]  # the words, and whether it may be missing
# By the first word: the row as it is written, and what follows the first word.
Patterns = dict[str, list[tuple[str, tuple[Alternatives, ...]]]]


@dataclass(frozen=True, slots=True)
class Beside:
    before: frozenset[str]
    after: frozenset[str]


class TermList:
    """Words to look for. Built once, then only read; any thread may use it."""

    def __init__(self, table: Mapping[str, Any]):
        """table: keys strong, heads, tails, harmless, patterns, clean, groups, near, unless; see
        the files of gateway/data. Raises ConfigError."""
        groups = {name: text.split() for name, text in table.get("groups", {}).items()}
        self.strong = frozenset(_split(table.get("strong", "")))
        self.heads = tuple(_split(table.get("heads", "")))
        self.tails = tuple(_split(table.get("tails", "")))
        self.harmless = frozenset(_split(table.get("harmless", "")))
        self.near = {word: _beside(row) for word, row in table.get("near", {}).items()}
        self.unless = {word: _beside(row) for word, row in table.get("unless", {}).items()}
        if unknown := sorted(set(self.unless) - self.strong):
            raise ConfigError(f"exceptions for words that are not in the list: {unknown}")
        self.patterns: Patterns = {}
        self.clean: Patterns = {}
        for text in table.get("clean", ()):
            _add(self.clean, text, groups)
        for text in table.get("patterns", ()):
            _add(self.patterns, text, groups)
        # What tricks of spelling may hide. Words of two letters are too easily found by chance.
        self.hidden = frozenset(
            word
            for word in self.strong.union(self.near, *groups.values(), _listed(self.patterns))
            if len(word) >= 3 and word.isalpha()
        )
        self.masked = masks(self.strong)

    def words(self, text: str) -> list[str]:
        return words(text, self.hidden, self.masked)

    def found(self, tokens: Sequence[str]) -> tuple[str, ...]:
        """The words and patterns of the list that the text has, as the list writes them; sorted."""
        hits: set[str] = set()
        clean_until = 0
        for at, token in enumerate(tokens):
            if at < clean_until:
                continue
            for _, rest in self.clean.get(token, ()):
                clean_until = max(clean_until, _end(rest, tokens, at + 1))
            if at < clean_until:
                continue
            for text, rest in self.patterns.get(token, ()):
                if _end(rest, tokens, at + 1):
                    hits.add(text)
            if token in self.strong:
                if not self._is_excepted(token, tokens, at):
                    hits.add(token)
            elif token in self.near:
                if self._has_company(token, tokens, at):
                    hits.add(token)
            elif len(token) >= 6 and (token.startswith(self.heads) or token.endswith(self.tails)):
                if token not in self.harmless and not _is_negated(tokens, at):
                    hits.add(next((h for h in self.heads if token.startswith(h)), token[-4:]))
        return tuple(sorted(hits))

    def _is_excepted(self, token: str, tokens: Sequence[str], at: int) -> bool:
        if _is_negated(tokens, at):
            return True
        if (beside := self.unless.get(token)) is None:
            return False
        if at and tokens[at - 1] in beside.before:
            return True
        following = _following(tokens, at)
        for number, word in enumerate(following):
            if word in beside.after:
                return True
            if word in _LINKS and number < len(following) - 1:
                return False
        return False

    def _has_company(self, token: str, tokens: Sequence[str], at: int) -> bool:
        if _is_negated(tokens, at):
            return False
        beside = self.near[token]
        return not (
            beside.before.isdisjoint(_preceding(tokens, at))
            and beside.after.isdisjoint(_following(tokens, at))
        )


def read_terms(name: str) -> dict[str, Any]:
    """The table of a word list that comes with the package. Raises ConfigError."""
    path = DATA / name
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc


def _split(text: str) -> list[str]:
    return text.split()


def _beside(row: Mapping[str, str]) -> Beside:
    if unknown := sorted(set(row) - {"before", "after"}):
        raise ConfigError(f"a word list has the keys {unknown}; it takes before and after")
    return Beside(frozenset(_split(row.get("before", ""))), frozenset(_split(row.get("after", ""))))


def _add(patterns: Patterns, text: str, groups: Mapping[str, list[str]]) -> None:
    row = _pattern(text, groups)
    if row[0][1]:
        raise ConfigError(f"a pattern begins with a word that may be missing: {text}")
    for first in row[0][0]:
        patterns.setdefault(first, []).append((text, row[1:]))


def _pattern(text: str, groups: Mapping[str, list[str]]) -> tuple[Alternatives, ...]:
    """`<name>` stands for the words of a group."""
    row = []
    for part in text.split():
        found: set[str] = set()
        for word in part.rstrip("?").split("|"):
            found.update(groups[word[1:-1]] if word[0] == "<" else (word,))
        row.append((frozenset(found), part.endswith("?")))
    return tuple(row)


def _listed(patterns: Patterns) -> set[str]:
    """Words of patterns that are long enough not to be found by chance, and those that stand alone
    in one."""
    found = {word for word, rows in patterns.items() for _, rest in rows if not rest}
    for first, rows in patterns.items():
        found |= {word for _, rest in rows for part, _ in rest for word in part if len(word) >= 5}
        found |= {first} if len(first) >= 5 else set()
    return found


def _end(rest: tuple[Alternatives, ...], tokens: Sequence[str], at: int) -> int:
    """Where the row of words ends that begins at `at`; 0: it is not there."""
    if not rest:
        return at
    alternatives, may_be_missing = rest[0]
    if at < len(tokens) and tokens[at] in alternatives:
        if end := _end(rest[1:], tokens, at + 1):
            return end
    return _end(rest[1:], tokens, at) if may_be_missing else 0


def _preceding(tokens: Sequence[str], at: int) -> Sequence[str]:
    """The last words before one in its clause."""
    start = at
    while start > max(0, at - _AROUND) and tokens[start - 1] != MARK:
        start -= 1
    return tokens[start:at]


def _following(tokens: Sequence[str], at: int) -> Sequence[str]:
    end = at + 1
    while end < min(len(tokens), at + 1 + _AROUND) and tokens[end] != MARK:
        end += 1
    return tokens[at + 1 : end]


def _is_negated(tokens: Sequence[str], at: int) -> bool:
    return at > 0 and tokens[at - 1] in _NEGATIONS

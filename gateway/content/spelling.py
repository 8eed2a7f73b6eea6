"""The words of a text as they are meant: without tricks of spelling that hide a word from a list.

What is undone: compatibility and full-width forms, accents, invisible characters, Cyrillic and
Greek letters that look Latin, letters spelled apart (n-u-d-e), digits and signs for letters (n4ked,
$exy), one letter covered (n*de) and letters drawn out (nuuude). All but the first three happen only
where the result is a word of the vocabulary that is looked for, so that "4k", "b2b" and "e.g." stay
what they are.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e007f]"
)
_LOOKALIKES = str.maketrans("аеорсухікмтнвѕјһԁɡοαερυντ", "aeopcyxikmthbsjhdgoaepuvt")
_NOT_ASCII_WORD = re.compile(r"(?<!\w)\w*?[^\W\x00-\x7f]\w*")
# All of them begin where a word begins and never go back into it, so that the time grows with the
# length of a text and not with its square.
_HASHTAG = re.compile(r"#\w+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_WORD = re.compile(r"[^\W_]+")
_WORD_OR_MARK = re.compile(r"[^\W_]+|[,.;:!?()\n]")
MARK = ","  # stands for any mark that ends a clause
_POSSESSIVE = re.compile(r"['’]s\b")
# Three single characters or more with the same sign between them.
_APART = re.compile(r"(?<![^\W_])[^\W_]([ ._\-*/|,·]{1,2})[^\W_](?:\1[^\W_])+(?![^\W_])")
_JOINED = re.compile(r"(?<![a-z])[a-z]++(?:[-._*·~][a-z]++)++")
_SIGNS = "0-9@$€!|*#+"
_MIXED = re.compile(rf"(?<![\w{_SIGNS}])(?=[a-z]*[{_SIGNS}])(?=[\d@$€!|*#+]*[a-z])[a-z{_SIGNS}]+")
_DRAWN_OUT = re.compile(r"(?<![a-z])[a-z]*?([a-z])\1\1[a-z]*")
_RUN = re.compile(r"([a-z])\1+")
_LETTERS = {"0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g",
            "@": "a", "$": "s", "€": "e", "!": "il", "|": "il", "+": "t"}  # fmt: skip
_APART_LONGEST = 2_000  # letters of one run that are spelled apart; the rest of it is not looked at
_LONGEST = 24  # characters of a word that is tried; no word of the lists is longer


def fold(text: str) -> str:
    """Lower case, compatibility forms unified, no accents, no invisible characters."""
    if "#" in text:
        text = _HASHTAG.sub(lambda found: _CAMEL.sub(" ", found[0]), text)
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", text))
    return "".join(one for one in text if not unicodedata.combining(one)).casefold()


def words(text: str, vocabulary: Collection[str], masked: dict[str, str]) -> list[str]:
    """The folded words of a text, and MARK where a clause ends, as the text
    does. `vocabulary`: words that tricks may hide; `masked`: the same with
    some letters covered, from `masks`."""
    text = fold(text)
    if "'" in text or "’" in text:
        text = _POSSESSIVE.sub("", text)
    if not text.isascii():
        text = _NOT_ASCII_WORD.sub(lambda found: _latin(found[0], vocabulary), text)
    text = _APART.sub(lambda found: _joined(found[0], vocabulary), text)
    text = _JOINED.sub(lambda found: _rejoined(found[0], vocabulary), text)
    text = _MIXED.sub(lambda found: _decoded(found[0], vocabulary, masked), text)
    text = _DRAWN_OUT.sub(lambda found: _shortened(found[0], vocabulary), text)
    return [*(one if one[0].isalnum() else MARK for one in _WORD_OR_MARK.findall(text)), MARK]


def masks(vocabulary: Collection[str]) -> dict[str, str]:
    """Words of up to eight letters with one or two neighbouring inner letters as `*`."""
    made: dict[str, str] = {}
    for word in sorted(vocabulary):
        for width in (1, 2):
            if len(word) > 8 or len(word) < width + 2 or not word.isalpha():
                continue
            for start in range(1, len(word) - width):
                made.setdefault(word[:start] + "*" * width + word[start + width :], word)
    return made


def _latin(word: str, vocabulary: Collection[str]) -> str:
    """The word with look-alikes replaced, where it mixes alphabets or gives a known word."""
    plain = word.translate(_LOOKALIKES)
    mixes = any(one.isascii() and one.isalpha() for one in word)
    return plain if mixes or plain in vocabulary else word


def _joined(apart: str, vocabulary: Collection[str]) -> str:
    letters = "".join(_WORD.findall(apart))[:_APART_LONGEST]
    candidates = {_plain(one) for one in _readings(letters)} if len(letters) <= _LONGEST else set()
    for candidate in (letters, letters[1:], *sorted(candidates)):
        if candidate in vocabulary:
            return candidate
    # Several words spelled apart in one go; short ones would be found in everything.
    found = []
    start = 0
    while start < len(letters):
        for end in range(min(len(letters), start + _LONGEST), start + 3, -1):
            if letters[start:end] in vocabulary:
                found.append(letters[start:end])
                start = end - 1
                break
        start += 1
    return " ".join(found) if found else apart


def _rejoined(parts: str, vocabulary: Collection[str]) -> str:
    whole = re.sub(r"[^a-z]", "", parts)
    return whole if 4 <= len(whole) <= _LONGEST and whole in vocabulary else parts


def _decoded(mixed: str, vocabulary: Collection[str], masked: dict[str, str]) -> str:
    for core in (mixed, mixed.strip("!*#+|")):
        if len(core) < 3 or len(core) > _LONGEST or core.isalpha():
            continue
        if covered := masked.get(core.replace("#", "*")):
            return f" {covered} "
        for word in _readings(core):
            for one in (word, _plain(word)):
                if one in vocabulary and one != core:
                    return f" {one} "
    return mixed


def _readings(word: str) -> list[str]:
    """What digits and signs can stand for; at most 16 readings."""
    if sum(1 for one in word if one in "1!|") > 4:
        return []
    choices = [_LETTERS.get(one, one) for one in word]
    return ["".join(one) for one in itertools.product(*choices)]


def _plain(word: str) -> str:
    return _RUN.sub(r"\1", word)


def _shortened(word: str, vocabulary: Collection[str]) -> str:
    if word in vocabulary or len(word) > 4 * _LONGEST:
        return word
    twice = _RUN.sub(r"\1\1", word)
    for candidate in (_plain(word), twice):
        if candidate in vocabulary:
            return candidate
    return word

"""Where a text may be cut without splitting what a reader sees as one character.

The rules are those of Unicode Standard Annex 29 (extended grapheme clusters) on the tables that
Python carries, read in the careful direction: where the annex looks at properties that Python does
not have, there is no boundary. So every boundary here is one of the annex, and a few of the
annex's are not used.
"""

from __future__ import annotations

import unicodedata

_ZERO_WIDTH_JOINER = "\u200d"
_VIRAMA = 9  # canonical combining class; joins the consonants around it
_LOOK_BACK = 64  # marks after one base; longer pile-ups have no boundary inside

# Extend the character before them, though their general category is none of a mark.
_EXTENDERS = frozenset(
    "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f"
    + "".join(map(chr, range(0x1F3FB, 0x1F400)))  # skin tones
    + "".join(map(chr, range(0xE0020, 0xE0080)))  # tags, as in the flag of Scotland
)
# Belong to the character after them (Grapheme_Cluster_Break = Prepend, Unicode 16).
_PREPENDED = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e"
    "\U000110bd\U000110cd\U000111c2\U000111c3\U000113d1\U0001193f\U00011941\U00011a3a"
    "\U00011a84\U00011a85\U00011a86\U00011a87\U00011a88\U00011a89\U00011d46\U00011f02"
)


def is_boundary(text: str, at: int) -> bool:
    """Whether `text[:at]` and `text[at:]` split no character as it is seen."""
    if at <= 0 or at >= len(text):
        return True
    before, after = text[at - 1], text[at]
    if before < "\x7f" and after < "\x7f":
        return not (before == "\r" and after == "\n")
    if _extends(after) or before == _ZERO_WIDTH_JOINER or before in _PREPENDED:
        return False
    if _is_flag(before) and _is_flag(after):
        return _flags_before(text, at) % 2 == 0
    return not (_joins_syllable(before, after) or _ends_in_virama(text, at))


def boundary_before(text: str, at: int) -> int:
    """The last boundary that is not behind `at`."""
    at = min(max(at, 0), len(text))
    while not is_boundary(text, at):
        at -= 1
    return at


def _extends(char: str) -> bool:
    return char in _EXTENDERS or unicodedata.category(char).startswith("M")


def _is_flag(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"


def _flags_before(text: str, at: int) -> int:
    """Regional indicators directly before `at`; two make a flag."""
    begin = at
    while begin > 0 and _is_flag(text[begin - 1]):
        begin -= 1
    return at - begin


def _joins_syllable(before: str, after: str) -> bool:
    """Parts of one Hangul syllable: leading consonant, vowel, trailing consonant."""
    left, right = _hangul(before), _hangul(after)
    return (
        (left == "L" and right in ("L", "V", "S"))
        or (left in ("V", "S") and right in ("V", "T"))
        or (left == "T" and right == "T")
    )


def _hangul(char: str) -> str:
    if "\u1100" <= char <= "\u115f" or "\ua960" <= char <= "\ua97c":
        return "L"
    if "\u1160" <= char <= "\u11a7" or "\ud7b0" <= char <= "\ud7c6":
        return "V"
    if "\u11a8" <= char <= "\u11ff" or "\ud7cb" <= char <= "\ud7fb":
        return "T"
    return "S" if "\uac00" <= char <= "\ud7a3" else ""  # a whole syllable


def _ends_in_virama(text: str, at: int) -> bool:
    """Whether a virama is among the marks directly before `at`: the next letter is joined."""
    for begin in range(at - 1, max(at - 1 - _LOOK_BACK, -1), -1):
        if not _extends(text[begin]):
            return False
        if unicodedata.combining(text[begin]) == _VIRAMA:
            return True
    return at > _LOOK_BACK

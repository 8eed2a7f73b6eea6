"""Parts of a text that shortening must keep: LoRA tags, weighted terms, quoted text, placeholders,
and the names and trigger words of a character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Longer ones are no term and no quotation but a bracket or a mark that somebody forgot.
SPAN_CHARS = 300


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """text[start:end], in characters."""

    start: int
    end: int


_LORA = re.compile(rf"<(?:lora|lyco|hypernet):[^<>\n]{{1,{SPAN_CHARS}}}>", re.IGNORECASE)
_PLACEHOLDER = re.compile(rf"\{{\{{[^{{}}\n]{{1,{SPAN_CHARS}}}\}}\}}")
# compel: word++ and word--. A dash that joins two words is none.
_SIGNED = re.compile(r"(?<![\w+-])[\w']{1,60}(?:\+{1,8}|-{2,8})(?=[\s,.;:)]|\Z)")
# After a bracket: compel's (term)1.3, (term)++ and .and(), .blend(0.7, 0.3).
_SUFFIX = re.compile(
    r"[+-]?(?:[0-9]{1,3}\.[0-9]{1,6}|\.[0-9]{1,6}|[0-9]{1,2})(?![\w.])|\+{1,8}|-{1,8}(?!\w)"
    r"|\.(?:and|blend|swap)\([^()\n]{0,100}\)"
)
_WEIGHT = re.compile(r":\s*[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})\s*\Z")
# Opening and closing marks of quotations. The straight ones and ’ are also apostrophes, feet and
# inches, so they open after a blank or a sign only and close before no letter.
_QUOTES = (
    ("“", "”"),
    ("„", "“”"),
    ("«", "»"),
    ("‹", "›"),
    ("「", "」"),
    ("『", "』"),
    ("〝", "〟"),
    ("＂", "＂"),
)
_QUOTED = (
    *(re.compile(rf"{a}[^{a}{b}\n]{{1,{SPAN_CHARS}}}[{b}]") for a, b in _QUOTES),
    re.compile(rf'(?<![A-Za-z0-9"])"(?!\s)[^"\n]{{0,{SPAN_CHARS}}}[^\s"]"(?![A-Za-z0-9])'),
    re.compile(rf"(?<![\w'])'(?!\s)[^'\n]{{0,{SPAN_CHARS}}}[^\s']'(?!\w)"),
    re.compile(rf"‘(?!\s)(?:[^‘’\n]|’(?=\w)){{1,{SPAN_CHARS}}}’(?!\w)"),
)


def find_spans(text: str, names: Iterable[str] = ()) -> tuple[Span, ...]:
    """All protected parts in order of their beginning, nested and overlapping ones as they are.

    names: character names and trigger words; found as whole words whatever their case, with their
    accents in either normal form.
    """
    found = set(_places(text, names))
    for pattern in (_LORA, _PLACEHOLDER, _SIGNED, *_QUOTED):
        found.update(Span(*match.span()) for match in pattern.finditer(text))
    found.update(_weighted(text))
    whole = (one for one in found if _is_whole(text, one))
    return tuple(sorted(whole, key=lambda one: (one.start, -one.end)))


def protected_spans(text: str, names: Iterable[str] = ()) -> tuple[str, ...]:
    """The texts of `find_spans`, each once. A name within a quotation is there by itself, too,
    since what another text says need not quote it."""
    return tuple(dict.fromkeys(text[one.start : one.end] for one in find_spans(text, names)))


def locate(text: str, protected: Sequence[str]) -> tuple[Span, ...]:
    """Where these texts stand as whole words, in order; overlapping places are one span."""
    merged: list[Span] = []
    for one in sorted(set(_places(text, protected))):
        if merged and one.start < merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(one.end, merged[-1].end))
        else:
            merged.append(one)
    return tuple(merged)


def _places(text: str, words: Iterable[str]) -> Iterator[Span]:
    forms = {
        form
        for word in words
        for form in (
            word.strip(),
            *(unicodedata.normalize(n, word.strip()) for n in ("NFC", "NFD")),
        )
        if form
    }
    for form in sorted(forms):
        blanks_as_any = r"\s+".join(map(re.escape, form.split()))
        for match in re.finditer(blanks_as_any, text, re.IGNORECASE):
            if _is_whole(text, one := Span(*match.span())):
                yield one


def _is_whole(text: str, span: Span) -> bool:
    """Whether no word and no character as it is seen goes on at its ends."""
    return not (is_inside_word(text, span.start) or is_inside_word(text, span.end))


def is_inside_word(text: str, at: int) -> bool:
    """Whether a word goes on at `at`: Ann is not in Anniversary, nor Jose in José."""
    if at <= 0 or at >= len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M") or after == "\u200d" or before == "\u200d":
        return True
    return _spaced_letter(before) and _spaced_letter(after)


def _spaced_letter(char: str) -> bool:
    """A letter, mark or digit of a script that puts blanks between words."""
    if not (char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")):
        return False
    return not any(first <= char <= last for first, last in _UNSPACED)


_UNSPACED = (
    ("\u0e00", "\u0eff"),  # Thai, Lao
    ("\u1000", "\u109f"),  # Myanmar
    ("\u1780", "\u17ff"),  # Khmer
    ("\u3005", "\u30ff"),  # Japanese syllables
    ("\u31f0", "\u31ff"),
    ("\u3400", "\u9fff"),  # Han
    ("\uf900", "\ufaff"),
    ("\uff66", "\uff9f"),
    ("\U00020000", "\U0003ffff"),
)


def _weighted(text: str) -> Iterator[Span]:
    """Round brackets that weigh what is in them: (term:1.3), ((term)), (term)1.3, (term)++.

    One bracket without a number is left to be text: prose has those. A bracket after a backslash
    is a character of the term.
    """
    opened: list[int] = []
    closed_inner = (-1, -1)  # the last pair that was closed
    for match in _BRACKET.finditer(text):
        at = match.start()
        if match.group() == "(":
            opened.append(at)
        elif match.group() == ")" and opened:
            begin = opened.pop()
            is_double = closed_inner == (begin + 1, at - 1)
            closed_inner = (begin, at)
            if at - begin > SPAN_CHARS:
                continue
            suffix = _SUFFIX.match(text, at + 1)
            if suffix is not None:
                yield Span(begin, suffix.end())
            elif is_double or _WEIGHT.search(text, begin + 1, at):
                yield Span(begin, at + 1)


_BRACKET = re.compile(r"\\.|[()]", re.DOTALL)

"""A text as its clauses: what stands between commas, semicolons, sentence ends and new lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.tokens.protect import Span

# Commas and dots within numbers and names (1,000 and 0.8 and v1.5) separate nothing.
_MARK = (
    r"[,;](?!(?<=[0-9],)[0-9])"
    r"|(?<![.!?…])[.!?…]++(?=\s|\Z)"
    r"|[、，；،؛。！？؟।｡]"
    r"|\n"
)
_SEPARATOR = re.compile(rf"(?:(?:{_MARK})\s*)+")
# What may not end a text: it announces a clause that is no longer there.
DANGLING = ",;、，；،؛"


@dataclass(frozen=True, slots=True)
class Clause:
    """text[start:body_end] and its separator text[body_end:end], blanks included."""

    start: int
    body_end: int
    end: int
    spans: tuple[Span, ...]  # protected, within the body


def split(text: str, spans: Sequence[Span]) -> tuple[Clause, ...]:
    """Clauses in order, which together are the whole text. No separator is inside a span, and no
    body is blank but that of a blank text.

    spans: in order and apart, as `gateway.tokens.protect.locate` gives them.
    """
    clauses: list[Clause] = []
    start, first = 0, 0  # of the clause being read: its beginning, and its first span
    at = 0  # the first span that does not end before the separator
    for match in _SEPARATOR.finditer(text):
        begin, end = match.span()
        while at < len(spans) and spans[at].end <= begin:
            at += 1
        if at < len(spans) and spans[at].start < end:
            if spans[at].start <= begin:
                continue
            end = spans[at].start
        if text[start:begin].isspace() or start == begin or end == len(text):
            continue
        clauses.append(Clause(start, begin, end, tuple(spans[first:at])))
        start, first = end, at
    clauses.append(Clause(start, len(text), len(text), tuple(spans[first:])))
    return tuple(clauses)

"""Real people by what stands beside a name: an office or a profession, and capitals.

A name alone says nothing about whether somebody lives, and characters of stories have names. So one
capitalised name counts after an office ("Senator X"), two after a profession ("the singer X Y"):
a character who is called "the singer Ada" is left alone. Kings, queens and princesses are mostly
those of fairy tales; the real ones are in the list of gateway/data/refusal_words.toml.
"""

from __future__ import annotations

import re

_OFFICES = ("president|vice president|prime minister|chancellor|senator|congressman|congresswoman|"
            "governor|secretary of state|minister|mp|justice")  # fmt: skip
_PROFESSIONS = ("actress|actor|singer|pop ?star|popstar|movie star|film star|rapper|musician|"
                "footballer|soccer player|basketball player|tennis player|athlete|model|supermodel|"
                "influencer|streamer|you ?tuber|tik ?toker|politician|tv host|tv presenter|"
                "talk show host|news anchor|journalist|comedian|director")  # fmt: skip
_NAME = r"[A-ZÀ-ÖØ-Þ][\w'’.-]*"
_HELD = re.compile(
    rf"\b(?:(?i:{_OFFICES}) {_NAME}|(?i:{_PROFESSIONS}),? {_NAME}(?: {_NAME})+)", re.UNICODE
)
_INITIALS = re.compile(r"^[A-Z0-9]{1,4}$")


def names_somebody(text: str) -> bool:
    """Whether an office or profession is followed by a capitalised name."""
    return any(not _INITIALS.match(found[0].rsplit(" ", 1)[1]) for found in _HELD.finditer(text))

"""What counts more or less in a picture: weighted terms beside the prompt, and LoRAs.

The terms come as an object `{term: weight}` or in the notation of existing clients,
`(term:1.3), (other:0.8)`. It looks like compel's own and is none: compel writes `(term)1.3`, and
reads the colon and the number as text. So it is read here and compel gets texts and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from worker.catalog import ModelSpec
from worker.errors import InvalidRequest, OutOfRange, Unsupported
from worker.jobs import types
from worker.jobs.fields import checked_length, checked_text
from worker.jsonvalues import real_number, refuse_lone_surrogates, shown_key, within
from worker.protocol.messages import LoraUse, WeightedTerm

# What brackets without a number mean, in this notation (compel has none for it: there they only
# hold together what an operator behind them weighs).
BRACKETS_WEIGHT = Decimal("1.1")
MAX_DEPTH = 16  # brackets within brackets
MAX_TERMS = 128  # each costs the text encoders a pass of its own
MAX_CHARS = 20_000  # of all terms together

_TEXT = re.compile(r"(?:\\.|\\\Z|[^\\,():])*", re.DOTALL)
_ESCAPED = re.compile(r"\\([\\():,])")
_NUMBER = re.compile(r":\s*([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,12})?|\.[0-9]{1,12}))\s*\)")
_SPACE = re.compile(r"\s*")


def read_terms(value: Any) -> tuple[WeightedTerm, ...]:
    """The terms of `compel_weights`, in their order; none for null and what holds no term.

    Raises InvalidRequest, with the place, for what cannot be read, and OutOfRange for a weight
    outside types.TERM_WEIGHT_RANGE and for more than MAX_CHARS or MAX_TERMS.
    """
    if value is None:
        return ()
    if isinstance(value, dict):
        terms = _of_object(value)
    elif isinstance(value, str):
        checked_length("compel_weights", value, MAX_CHARS)
        terms = _of_text(value)
    else:
        raise InvalidRequest('compel_weights must be a string such as "(term:1.3)" or an object')
    if len(terms) > MAX_TERMS:
        raise OutOfRange(f"compel_weights has {len(terms)} terms; allowed: at most {MAX_TERMS}")
    return tuple(terms)


def read_loras(value: Any, spec: ModelSpec, ignore: Callable[[str], None]) -> tuple[LoraUse, ...]:
    """The entries of `loras`, in their order, with the ids as the catalog spells them.

    ignore: is told the keys of entries that have no effect.

    Raises InvalidRequest, OutOfRange, and Unsupported for an id that the model does not have.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidRequest("loras must be an array of objects with an id and a weight")
    if len(value) > types.MAX_LORAS:
        raise OutOfRange(f"loras has {len(value)} entries; allowed: at most {types.MAX_LORAS}")
    uses: list[LoraUse] = []
    for index, entry in enumerate(value):
        use = _lora(f"loras[{index}]", entry, spec)
        if any(use.id == other.id for other in uses):
            raise InvalidRequest(f"loras[{index}] names a LoRA that is named before; send it once")
        uses.append(use)
        for key in entry.keys() - {"id", "weight"}:
            ignore(f"loras[{index}].{shown_key(key)}")
    return tuple(uses)


def _lora(name: str, entry: Any, spec: ModelSpec) -> LoraUse:
    if not isinstance(entry, dict):
        raise InvalidRequest(f"{name} must be an object with an id and a weight")
    given = checked_text(f"{name}.id", entry.get("id"))
    if given is None:
        raise InvalidRequest(f"{name}.id is missing")
    adapter = spec.adapter("lora", given)
    if adapter is None:
        known = [one.id for one in spec.adapters if one.kind == "lora"]
        raise Unsupported(
            f"model {spec.id} has no LoRA with the id of {name}; "
            f"known: {', '.join(known) or 'none; add one to the profile as [[adapters]]'}"
        )
    weight = real_number(f"{name}.weight", entry.get("weight"), 1.0)
    return LoraUse(id=adapter.id, weight=within(f"{name}.weight", weight, *types.LORA_WEIGHT_RANGE))


def _of_object(weights: dict[str, Any]) -> list[WeightedTerm]:
    chars = sum(len(term) for term in weights)
    if chars > MAX_CHARS:
        raise OutOfRange(f"compel_weights has {chars} characters; allowed: at most {MAX_CHARS}")
    terms = []
    for number, (text, given) in enumerate(weights.items(), 1):
        name = f"weight {number} of compel_weights"
        refuse_lone_surrogates("compel_weights", text)
        if not text.strip():
            raise InvalidRequest(f"{name} has no term")
        if given is None:
            raise InvalidRequest(f"{name} must be a number")
        weight = real_number(name, given, 1.0)
        terms.append(WeightedTerm(text, within(name, weight, *types.TERM_WEIGHT_RANGE)))
    return terms


# --- the notation ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Term:
    text: str
    at: int  # where it begins
    weight: Decimal  # not a float: 1.1 in brackets of 1.1 is 1.21


def _of_text(text: str) -> list[WeightedTerm]:
    return [
        WeightedTerm(
            term.text,
            within(
                f"the weight at character {term.at} of compel_weights",
                float(term.weight),
                *types.TERM_WEIGHT_RANGE,
            ),
        )
        for term in _Notation(text).read()
    ]


class _Notation:
    """One text being read, from the left. Its grammar: docs/http-api.md#weighted-terms."""

    def __init__(self, text: str):
        self._text = text
        self._at = 0

    def read(self) -> list[_Term]:
        terms, _ = self._items(depth=0)
        match self._next():
            case ":":
                raise self._refusal("a weight stands in brackets")
            case ")":
                raise self._refusal("there is no opening bracket for this one")
        return terms

    def _items(self, depth: int) -> tuple[list[_Term], bool]:
        """Items between commas, up to what ends the list; and whether one was in brackets."""
        terms: list[_Term] = []
        nested = False
        while True:
            self._skip_space()
            if self._next() == "(":
                nested = True
                terms += self._brackets(depth + 1)
                self._skip_space()
            else:
                terms += self._plain()
            if self._next() != ",":
                break
            self._at += 1
        if self._next() not in ("", ":", ")"):
            raise self._refusal("a comma is missing here")
        return terms, nested

    def _plain(self) -> list[_Term]:
        begin = self._at
        self._at = _end(_TEXT.match(self._text, begin))
        return _term(self._text[begin : self._at], begin)

    def _brackets(self, depth: int) -> list[_Term]:
        opened = self._at
        if depth > MAX_DEPTH:
            raise self._refusal(f"there are more than {MAX_DEPTH} brackets within each other")
        self._at += 1
        terms, nested = self._items(depth)
        if not nested:  # its commas are text
            terms = _term(self._text[opened + 1 : self._at], opened + 1)
        if self._next() == "":
            self._at = opened
            raise self._refusal("this bracket is not closed")
        weight = BRACKETS_WEIGHT
        if self._next() == ":":
            number = _NUMBER.match(self._text, self._at)
            if number is None:
                raise self._refusal("a number and a closing bracket must follow the colon")
            weight = Decimal(number[1])
            self._at = number.end()
        else:
            self._at += 1
        if not terms:
            self._at = opened
            raise self._refusal("there is no term in these brackets")
        for term in terms:
            term.weight *= weight
        return terms

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_space(self) -> None:
        self._at = _end(_SPACE.match(self._text, self._at))

    def _refusal(self, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"compel_weights cannot be read at character {self._at}: {why}; write it as in "
            "(term:1.3), (other:0.8), with a backslash before a bracket, colon or comma that "
            "belongs to a term"
        )


def _term(raw: str, begin: int) -> list[_Term]:
    """The text without the white space around it and without backslashes; none if it is empty."""
    text = _ESCAPED.sub(r"\1", raw.strip())
    return [_Term(text, begin + len(raw) - len(raw.lstrip()), Decimal(1))] if text else []


def _end(match: re.Match[str] | None) -> int:
    assert match is not None, "the pattern matches the empty text, too"
    return match.end()

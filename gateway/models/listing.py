"""A provider's list of models, read with suspicion: what each row says, and which rows are bad.

Forms: OpenAI's `GET /models` ({"data": [{"id": …}]}), the catalogue provider's own
({"llms" | "models": [{"id": 28, "name": …}]}), or a bare list. Unknown keys are tolerated.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.models.faults import BROKEN, TOO_LARGE, ProviderError
from gateway.store.canonical import canonical_json

MAX_ROWS = 2000
MAX_LIST_BYTES = 4 << 20  # of all pages
MAX_CHARS = 200
MAX_CAPABILITIES_BYTES = 4096
MAX_DEPTH = 5
# Whole numbers that every reader of JSON keeps, and floats that both engines write alike.
MAX_NUMBER = 2**53

_LISTS = ("llms", "models", "data")
_NAMES = ("name", "model_name", "display_name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A row of a list."""

    external_id: str
    model_name: str
    model_key: str  # wanted; another row may have it already
    capabilities: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that did not go in."""

    id: str | None  # as the provider gave it; None: it gave none that can be shown
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A whole list."""

    rows: tuple[Listed, ...]
    errors: tuple[RowError, ...] = ()
    # Every id that is in the list, of bad rows too: a bad row is not a model that is gone.
    ids: frozenset[str] = frozenset()
    # Whether each row's id could be read. If not, any model may be the one, so none is gone.
    is_complete: bool = True
    source: str = "provider"  # provider | built_in


# The mapping of the refresh route for a catalogue that has no list of its own.
BUILT_IN = Listing(
    rows=tuple(
        Listed(external_id=external_id, model_name=name, model_key=key, capabilities={"chat": True})
        for external_id, name, key in (
            ("28", "Claude 3.7 Sonnet", "claude-3.7-sonnet"),
            ("25", "Claude 3.5 Sonnet", "claude-3.5-sonnet"),
            ("30", "Claude Opus 4.1", "claude-opus-4.1"),
            ("35", "Gemini 2.5 Flash-Lite", "gemini-2.5-flash-lite"),
            ("40", "GPT-4o", "gpt-4o"),
        )
    ),
    ids=frozenset({"28", "25", "30", "35", "40"}),
    is_complete=False,  # it is no word about what is gone
    source="built_in",
)


def rows_of(document: Any) -> list[Any]:
    """The rows of one page. Raises ProviderError (broken)."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        found = [document[key] for key in _LISTS if isinstance(document.get(key), list)]
        if len(found) == 1:
            return list(found[0])
    raise ProviderError(
        BROKEN, f"the provider's list is no list, and no object with one of {', '.join(_LISTS)}"
    )


def read_rows(rows: Iterable[Any], *, keys_are_ids: bool) -> Listing:
    """A listing of raw rows; a bad one is an error and the others go in.

    keys_are_ids: the model key is the external id (an OpenAI-compatible provider, whose ids are
    names); else it is made of the name. Raises ProviderError (too_large).
    """
    good: list[Listed] = []
    errors: list[RowError] = []
    ids: set[str] = set()
    is_complete = True
    for number, raw in enumerate(rows, 1):
        if number > MAX_ROWS:
            raise ProviderError(TOO_LARGE, f"the provider lists more than {MAX_ROWS} models")
        try:
            external_id = _external_id(raw)
        except ValueError as exc:
            is_complete = False
            errors.append(RowError(None, f"row {number}: {exc}"))
            continue
        if external_id in ids:
            errors.append(RowError(external_id, "is listed twice; the first row counts"))
            continue
        ids.add(external_id)
        try:
            good.append(_listed(raw, external_id, keys_are_ids))
        except ValueError as exc:
            errors.append(RowError(external_id, str(exc)))
    return Listing(
        rows=tuple(good), errors=tuple(errors), ids=frozenset(ids), is_complete=is_complete
    )


def _external_id(raw: Any) -> str:
    if not isinstance(raw, dict):
        raise ValueError("is no object")
    value = raw.get("id")
    if type(value) is int and 0 <= value < MAX_NUMBER:
        return str(value)
    return _text(value, "id")


def _listed(raw: Mapping[str, Any], external_id: str, keys_are_ids: bool) -> Listed:
    named = next((name for name in _NAMES if raw.get(name) is not None), None)
    model_name = external_id if named is None else _text(raw[named], named)
    if raw.get("model_key") is not None:
        model_key = _text(raw["model_key"], "model_key")
    else:
        model_key = external_id if keys_are_ids else slug(model_name) or external_id
    return Listed(
        external_id=external_id,
        model_name=model_name,
        model_key=model_key,
        capabilities=_capabilities(raw),
    )


def slug(name: str) -> str:
    """A model key of a name: "Claude 3.7 Sonnet" is claude-3.7-sonnet."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9./_]+", "-", plain).strip("-")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text")
    if not 1 <= len(value) <= MAX_CHARS:
        raise ValueError(f"{what} has {len(value)} characters; 1 to {MAX_CHARS} are taken")
    if not value.isprintable() or value.strip() != value:
        raise ValueError(f"{what} has a control character, or a space at an end")
    return value


def _capabilities(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = raw.get("capabilities")
    if given is None:
        found: dict[str, Any] = {}
    elif isinstance(given, dict):
        found = dict(given)
    elif isinstance(given, list) and all(isinstance(one, str) for one in given):
        found = {one: True for one in given}
    else:
        raise ValueError("capabilities are neither an object nor a list of names")
    if raw.get("context_length") is not None:
        found.setdefault("context_length", raw["context_length"])
    _check(found, MAX_DEPTH)
    size = len(canonical_json(found))
    if size > MAX_CAPABILITIES_BYTES:
        raise ValueError(
            f"capabilities have {size} bytes; at most {MAX_CAPABILITIES_BYTES} are kept"
        )
    return found


def _check(value: Any, depth: int) -> None:
    """Raises ValueError for what the two engines would not both keep as it is."""
    if depth < 0:
        raise ValueError(f"capabilities are nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key, depth)
            _check(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, depth - 1)
    elif isinstance(value, str):
        if not value.isprintable():
            raise ValueError("capabilities have a control character")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) or abs(value) > MAX_NUMBER:
            raise ValueError(f"capabilities have a number above {MAX_NUMBER}")

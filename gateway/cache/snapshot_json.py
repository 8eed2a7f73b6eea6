"""A snapshot as JSON and back, exactly; the form of snapshot.json.

The document carries the SHA-256 of its canonical JSON, so a file that was cut off or changed is
told from one that is whole. The document itself keeps 1.0 apart from 1, which the canonical form
does not.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.store.canonical import sha256_hex
from gateway.values.rows import Snapshot

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1  # raised with every change of the rows that an older gateway could not read

_Row = TypeVar("_Row", bound="DataclassInstance")


class Damaged(ValueError):
    """The bytes are not a snapshot of this format; the message says which check failed."""


@dataclass(frozen=True, slots=True)
class Saved:
    snapshot: Snapshot
    verified_at: (
        float  # wall clock, seconds since 1970: when the database was last known to have it
    )


def encode(saved: Saved) -> bytes:
    """Raises ValueError for what JSON cannot hold, which no database of ours gives."""
    body = {
        "format": FORMAT,
        "verified_at": saved.verified_at,
        "snapshot": to_json(saved.snapshot),
    }
    document = {"sha256": sha256_hex(body), **body}
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def decode(raw: bytes) -> Saved:
    """Raises Damaged."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Damaged("it is not JSON") from exc
    if not isinstance(document, dict):
        raise Damaged("it is not a JSON object")
    if document.get("format") != FORMAT:
        raise Damaged(f"its format is {document.get('format')!r}, and {FORMAT} is read")
    sha256 = document.pop("sha256", None)
    try:
        if sha256 != sha256_hex(document):
            raise Damaged("its SHA-256 is not that of its content")
        return Saved(from_json(document["snapshot"]), float(document["verified_at"]))
    except Damaged:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as exc:
        raise Damaged(f"a row cannot be read ({type(exc).__name__})") from exc


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """JSON values only; `from_json` gives an equal snapshot."""
    found = _plain(snapshot)
    assert isinstance(found, dict)
    return found


def from_json(value: Mapping[str, Any]) -> Snapshot:
    """Raises KeyError, TypeError or ValueError for what `to_json` never gives."""
    return _row(Snapshot, value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            one.name: _plain(getattr(value, one.name))
            for one in dataclasses.fields(value)
            if one.init
        }
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value


@cache
def _types(row: Any) -> dict[str, Any]:
    """Types of the fields that a row is made of."""
    hints = typing.get_type_hints(row)
    return {one.name: hints[one.name] for one in dataclasses.fields(row) if one.init}


def _row(row: type[_Row], value: Mapping[str, Any]) -> _Row:
    wanted = _types(row)
    if set(value) != set(wanted):
        raise ValueError(f"{row.__name__} has the keys {sorted(value)}")
    return row(**{name: _field(kind, value[name]) for name, kind in wanted.items()})


def _field(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _row(kind, value)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"a list was expected, not {type(value).__name__}")
        return tuple(_field(typing.get_args(kind)[0], one) for one in value)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"an object was expected, not {type(value).__name__}")
        return value
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    # A float column may hold 1, which JSON keeps as a whole number.
    if not isinstance(value, (*allowed, int) if float in allowed else allowed):
        raise ValueError(f"{kind} was expected, not {type(value).__name__}")
    return value

"""A snapshot as JSON and back, exactly; the form of snapshot.json.

The document carries the SHA-256 of its canonical JSON, so a file that was cut off or changed is
told from one that is whole. The document itself keeps 1.0 apart from 1, which the canonical form
does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.store.canonical import sha256_hex
from gateway.values.documents import row_of, table_of
from gateway.values.rows import Snapshot

FORMAT = 1  # raised with every change of the rows that an older gateway could not read


class Damaged(ValueError):
    """The bytes are not a snapshot of this format; the message says which check failed."""


@dataclass(frozen=True, slots=True)
class Saved:
    snapshot: Snapshot
    # Wall clock, seconds since 1970: when the database was last known to have it.
    verified_at: float


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
    found = table_of(snapshot)
    assert isinstance(found, dict)
    return found


def from_json(value: Mapping[str, Any]) -> Snapshot:
    """Raises ValueError or TypeError for what `to_json` never gives."""
    return row_of(Snapshot, value, is_whole=True)

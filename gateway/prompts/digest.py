"""One value, one byte string, one hash: how messages and rows are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from gateway.errors import Invalid
from gateway.values.assembly import Message


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces and no ASCII escapes.

    Raises Invalid where a text has half of a surrogate pair, which JSON can escape and UTF-8
    cannot hold, and where a number is not a real one.
    """
    try:
        text = json.dumps(
            value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except ValueError as error:
        raise Invalid("a number is not a real one; JSON has no word for it") from error
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Invalid("a text has an unpaired surrogate; send whole characters") from error


def sha256_of(value: Any) -> str:
    """SHA-256 (hex) of the value as canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def messages_sha256(messages: Iterable[Message]) -> str:
    """SHA-256 (hex) of `[{"content", "role"}, …]`, as a worker's receipt has it."""
    return sha256_of([{"role": one.role, "content": one.content} for one in messages])

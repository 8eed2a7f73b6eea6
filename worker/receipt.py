"""Hashes that let a client prove what was run. Formats are public: docs/http-api.md#receipt."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces and no ASCII escapes: one value, one byte string."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8")


def messages_sha256(messages: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) of the messages as canonical JSON objects {"content", "role"}.

    messages: (role, content) pairs in order.
    """
    listed = [{"role": role, "content": content} for role, content in messages]
    return hashlib.sha256(canonical_json(listed)).hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 (hex) of the text as UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def ids_sha256(ids: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids as little-endian unsigned 32-bit integers.

    ids: 0 .. 2**32 - 1 each.
    """
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()

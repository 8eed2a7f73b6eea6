"""Prompt ids of a ChatML model, computed on our side from its tokenizer's file.

The worker's rule (docs/http-api.md, and its chat template): for each message in order
`<|im_start|>`, role, newline, content, `<|im_end|>`, newline; then the header of the answer. The
text between two control tokens is encoded as one piece, with special tokens switched off, so that
nobody forges a turn by writing one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from gateway.errors import ConfigError
from gateway.tokens.files import load
from gateway.values.assembly import Message

TEMPLATE = "chatml"
_START, _END = "<|im_start|>", "<|im_end|>"


class ChatmlTokenizer:
    """One tokenizer.json. Never changes; any thread (why: gateway/tokens/counters.py)."""

    def __init__(self, sha256: str, tokenizer: Tokenizer, start: int, end: int):
        self.sha256 = sha256  # of the file, as a receipt has it
        self._tokenizer = tokenizer
        self._start = start
        self._end = end

    def ids(self, messages: Iterable[Message]) -> list[int]:
        found: list[int] = []
        for message in messages:
            text = f"{message.role}\n{message.content}"
            found += [self._start, *self._encode(text), self._end, *self._encode("\n")]
        return [*found, self._start, *self._encode("assistant\n")]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def load_chatml(path: Path) -> ChatmlTokenizer:
    """path: a tokenizer.json with ChatML's control tokens. Raises ConfigError."""
    try:
        raw = path.read_bytes()
        added = json.loads(raw).get("added_tokens", [])
        control = {entry["content"]: int(entry["id"]) for entry in added}
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(f"{path} is no tokenizer.json; copy the file again") from exc
    missing = [token for token in (_START, _END) if token not in control]
    if missing:
        raise ConfigError(f"{path} has no token {missing[0]}: it is not of a ChatML model")
    digest = hashlib.sha256(raw).hexdigest()
    return ChatmlTokenizer(digest, load(path), control[_START], control[_END])

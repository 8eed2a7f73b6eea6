"""Byte-level BPE, exactly: text to ids without special tokens, ids to bytes without loss.

The published `tokenizer.json` matches its special tokens anywhere in a text. Here the ordinary
text goes through the same file without its added tokens, so a user who types `<|im_end|>` sends
those characters and not the token.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from worker.engine.chat.template import Control, Piece
from worker.errors import ModelUnavailable


class ByteLevelTokenizer:
    """One model's tokenizer. Engine thread only: a fast tokenizer may not be shared by threads."""

    def __init__(self, path: Path, shown_path: str):
        """path: a tokenizer.json. Raises ModelUnavailable when it is not byte-level BPE."""
        raw = path.read_bytes()
        self.sha256 = hashlib.sha256(raw).hexdigest()
        data: dict[str, Any] = json.loads(raw)
        if "ByteLevel" not in _decoder_types(data.get("decoder")):
            raise ModelUnavailable(
                f"{shown_path}/tokenizer.json is not byte-level BPE, the only kind this worker runs"
            )
        added = {entry["content"]: int(entry["id"]) for entry in data.get("added_tokens", [])}
        self._control_ids = added
        self._ordinary = Tokenizer.from_str(
            json.dumps({**data, "added_tokens": [], "post_processor": None})
        )
        # The file may carry a truncation or padding rule; a prompt is never cut nor padded.
        self._ordinary.no_truncation()
        self._ordinary.no_padding()
        self._bytes_of = _token_bytes(self._ordinary.get_vocab(with_added_tokens=False), added)

    def control_id(self, text: str) -> int | None:
        """The id of an added token, or None when the tokenizer has none of that name."""
        return self._control_ids.get(text)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of the pieces in order; only `Control` pieces become control tokens."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, Control):
                ids.append(self._control_ids[piece.text])
            elif piece.text:
                ids += self._ordinary.encode(piece.text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; ids that the vocabulary does not name stand for none."""
        return self._bytes_of.get(token_id, b"")


class TextDecoder:
    """Bytes of tokens to text, one token at a time, never splitting a character.

    Bytes that are not UTF-8 become U+FFFD, as `bytes.decode(errors="replace")` would do it for
    the whole.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The text that is complete with these bytes; may be empty."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What an unfinished character at the end stands for."""
        return self._decoder.decode(b"", final=True)


def _decoder_types(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = decoder.get("decoders", [])
    return {decoder.get("type", ""), *(kind for one in inner for kind in _decoder_types(one))}


def _token_bytes(vocabulary: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
    byte_of = {char: byte for byte, char in _printable_bytes().items()}
    table = {
        token_id: bytes(byte_of[char] for char in token)
        for token, token_id in vocabulary.items()
        if all(char in byte_of for char in token)
    }
    return table | {token_id: token.encode() for token, token_id in added.items()}


def _printable_bytes() -> dict[int, str]:
    """Byte-level BPE's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for
    the characters from U+0100 on, in order (Radford et al. 2019, GPT-2's byte encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + index) for index, byte in enumerate(others)
    }

"""Hashes per component of an image or video model, for receipts."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from worker.catalog import ModelSpec
from worker.modelfiles import combined_sha256, file_sha256, weights_sha256


def component_hashes(spec: ModelSpec, state_dir: Path) -> dict[str, str]:
    """`sha256:` hash of the weights per component folder; of a single file, under "checkpoint"."""
    files = weights_sha256(spec, state_dir)
    if spec.path.is_file():
        return {"checkpoint": f"sha256:{combined_sha256(files)}"}
    parts: dict[str, dict[str, str]] = {}
    for path, digest in files.items():
        parts.setdefault(path.split("/")[0], {})[path] = digest
    return {part: f"sha256:{combined_sha256(one)}" for part, one in sorted(parts.items())}


def tokenizer_hashes(*tokenizers: Any) -> list[str]:
    """SHA-256 of each tokenizer as it was loaded: vocabulary, rules and special tokens."""
    return [
        hashlib.sha256(
            (one.backend_tokenizer.to_str() + str(one.model_max_length)).encode()
        ).hexdigest()
        for one in tokenizers
    ]


def adapter_hash(path: Path) -> str:
    """SHA-256 (hex) of a file beside the model's own, read once per version of it.

    Raises OSError.
    """
    found = path.stat()
    return _hash_of(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _hash_of(path: Path, *_version: int) -> str:
    return file_sha256(path)

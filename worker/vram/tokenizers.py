"""Tokens of a job's texts, counted before its model is loaded.

With the tokenizers of the model's own pipeline. An image model's are made by a library that needs
seconds to start, so it is asked once for each content of their files, in a process of its own, and
what it says is kept. A video model's are read as its engine reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from worker.catalog import ModelSpec
from worker.errors import ModelUnavailable, WorkerError
from worker.versions import version_of
from worker.vram.texts import Reader

EXPORT_TIMEOUT_S = 120.0
NAMES = ("tokenizer", "tokenizer_2")  # of an image model

Exported = dict[str, dict[str, Any]]


class Tokenizers:
    """Readers of texts, by model. Not for several threads at a time."""

    def __init__(self, state_dir: Path, export: Callable[[Path], Exported] | None = None):
        """export: how those of a pipeline's folder are made; in a short-lived process where it is
        not given."""
        self._folder = state_dir / "tokenizers"
        self._export = export or exported_apart
        self._readers: dict[str, tuple[Reader, ...]] = {}

    def of(self, spec: ModelSpec) -> tuple[Reader, ...]:
        """Of an image or video model. Raises ModelUnavailable for files that are missing, and
        WorkerError when the library cannot read them."""
        if spec.id not in self._readers:
            try:
                made = _of_a_video if spec.kind == "wan" else self._of_an_image
                self._readers[spec.id] = made(spec)
            except OSError as exc:
                raise ModelUnavailable(
                    f"{spec.id}: its tokenizer is missing, so tokens cannot be counted; {spec.cure}"
                ) from exc
        return self._readers[spec.id]

    def _of_an_image(self, spec: ModelSpec) -> tuple[Reader, ...]:
        folder = spec.config_path if spec.path.suffix == ".safetensors" else spec.path
        assert folder is not None, "the catalog has one for every single file"
        kept = self._folder / f"{_content_key(folder)}.json"
        try:
            known: Exported = json.loads(kept.read_bytes())
        except (OSError, ValueError):  # never written, or cut short
            known = self._export(folder)
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial_file = kept.with_suffix(f".{os.getpid()}.partial")
            partial_file.write_text(json.dumps(known))
            partial_file.replace(kept)
        return tuple(
            Reader(name, _counter(Tokenizer.from_str(one["json"])), int(one["limit"]))
            for name, one in known.items()
        )


def _of_a_video(spec: ModelSpec) -> tuple[Reader, ...]:
    path = spec.path / "tokenizer" / "tokenizer.json"
    path.stat()  # the library's own error is of no kind
    return (Reader("tokenizer", _counter(Tokenizer.from_file(str(path))), 0),)


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return partial(_count, tokenizer)


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text).ids)


def _content_key(folder: Path) -> str:
    """Content of the files, and what reads them."""
    digest = hashlib.sha256(f"{version_of('transformers')} {version_of('tokenizers')}".encode())
    files = [folder / "model_index.json"]
    for name in NAMES:
        files += sorted(one for one in (folder / name).iterdir() if one.is_file())
    for file in files:
        digest.update(f"\n{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def exported_apart(folder: Path) -> Exported:
    """Raises WorkerError."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.engine.tokenizers", str(folder)],
        capture_output=True, check=False, timeout=EXPORT_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise WorkerError(f"the tokenizers of {folder.name} cannot be read: {' '.join(last)}")
    made: Exported = json.loads(done.stdout)
    return made

"""Finished model folders: written aside, described by a manifest, put in place in one move."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
CARD = "README.md"


def publish(target: Path, write: Callable[[Path], object]) -> None:
    """Replace the folder `target` by what `write(folder)` writes; a model card stays.

    A reader sees the old folder or the new one, each with its manifest.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        if (target / CARD).is_file():
            shutil.copy2(target / CARD, partial / CARD)
        write_manifest(partial)
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    print(f"{target}: {size / 1e6:.2f} MB of weights", flush=True)


def write_manifest(folder: Path) -> None:
    """List size and SHA-256 of every file but the manifest and the card, which is for people."""
    files = {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST, CARD)
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    # safetensors makes files that only their owner can read; the daemon may be another user.
    mode = (folder / MANIFEST).stat().st_mode
    for name in files:
        (folder / name).chmod(mode)

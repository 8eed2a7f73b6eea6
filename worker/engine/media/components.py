"""Hashes per component of an image or video model, for receipts."""

from __future__ import annotations

from pathlib import Path

from worker.catalog import ModelSpec
from worker.modelfiles import combined_sha256, weights_sha256


def component_hashes(spec: ModelSpec, state_dir: Path) -> dict[str, str]:
    """`sha256:` hash of the weights per component folder; of a single file, under "checkpoint"."""
    files = weights_sha256(spec, state_dir)
    if spec.path.is_file():
        return {"checkpoint": f"sha256:{combined_sha256(files)}"}
    parts: dict[str, dict[str, str]] = {}
    for path, digest in files.items():
        parts.setdefault(path.split("/")[0], {})[path] = digest
    return {part: f"sha256:{combined_sha256(one)}" for part, one in sorted(parts.items())}

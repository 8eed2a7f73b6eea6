"""What the parts of our models weigh and what their passes take, before anything is loaded.

`worker.engine.peaks` finds it from the parts' configs, in a short-lived process, because this one
has no torch. Its answers are kept by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from worker.catalog import ModelSpec
from worker.config import REPOSITORY
from worker.errors import ModelUnavailable, WorkerError
from worker.vram.peak import Peak, Question

MEASURE_TIMEOUT_S = 600.0
PARTS = {
    "chat": ("weights",),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "wan": ("text_encoder", "transformer", "vae"),
}
# config.json of published models, for those whose files are not there yet.
ARCHITECTURES = REPOSITORY / "configs" / "architectures"


def content_key(question: Question) -> str:
    """Content and everything that computes: another version may hold other tensors."""
    versions = [version(name) for name in ("torch", "diffusers", "transformers")]
    body = json.dumps([msgspec.to_builtins(question), versions], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def part_configs(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """The config.json of each part: of the model's own files, else as published.

    Raises ModelUnavailable when there is neither.
    """
    folder = spec.config_path if spec.path.suffix == ".safetensors" else spec.path
    if folder is not None and folder.is_dir():
        inside = (
            {"weights": folder / "config.json"}
            if spec.kind == "chat"
            else {part: folder / part / "config.json" for part in PARTS[spec.kind]}
        )
        try:
            return {part: json.loads(path.read_bytes()) for part, path in inside.items()}
        except (OSError, ValueError) as exc:
            raise ModelUnavailable(f"{spec.id}: a config.json cannot be read: {exc}") from exc
    published = ARCHITECTURES / f"{spec.id}.json"
    if not published.is_file():
        raise ModelUnavailable(
            f"{spec.id}: {spec.shown_path} is missing, and nothing is known of its sizes; "
            f"{spec.cure}"
        )
    found: dict[str, dict[str, Any]] = json.loads(published.read_bytes())
    return found


class Peaks:
    """Answers from disk, or measured now and kept. For one process at a time."""

    def __init__(self, state_dir: Path):
        self._path = state_dir / "peaks.json"

    def ask(self, questions: Sequence[Question]) -> list[Peak]:
        """Answers in order. Raises WorkerError when one cannot be measured.

        What is not known takes some 6 s for the libraries and up to 2 s for each question.
        """
        known = self._read()
        missing = {content_key(one): one for one in questions if content_key(one) not in known}
        if missing:
            known |= zip(missing, _measured([*missing.values()]), strict=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=1))
            partial.replace(self._path)
        return [known[content_key(one)] for one in questions]

    def _read(self) -> dict[str, Peak]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Peak])
        except (OSError, msgspec.DecodeError):  # never written, or cut short: measured again
            return {}


def _measured(questions: Sequence[Question]) -> list[Peak]:
    asked = b"".join(msgspec.json.encode(one) + b"\n" for one in questions)
    done = subprocess.run(
        [sys.executable, "-m", "worker.engine.peaks"],
        input=asked, capture_output=True, check=False, timeout=MEASURE_TIMEOUT_S,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if done.returncode != 0 or len(lines) != len(questions):
        parts = ", ".join(one.part for one in questions[len(lines) : len(lines) + 1])
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise WorkerError(f"{parts or 'a part'} could not be measured: {' '.join(last)}")
    return [msgspec.json.decode(line, type=Peak) for line in lines]

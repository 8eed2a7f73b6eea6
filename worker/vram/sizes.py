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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from worker.catalog import ModelSpec
from worker.config import REPOSITORY
from worker.errors import ModelUnavailable, WorkerError
from worker.versions import computing
from worker.vram.peak import Peak, Question
from worker.vram.phases import Phase

MEASURE_TIMEOUT_S = 600.0
KEPT_ANSWERS = 5000  # some 2 MB; of more, the oldest go
PARTS = {
    "chat": ("weights",),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "wan": ("text_encoder", "transformer", "vae"),
}
# config.json of published models, for those whose files are not there yet.
ARCHITECTURES = REPOSITORY / "configs" / "architectures"


def content_key(question: Question) -> str:
    """Content and everything that computes: another version may hold other tensors."""
    body = json.dumps([msgspec.to_builtins(question), [*computing().values()]], sort_keys=True)
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
        if spec.vace_folder is not None:
            inside["vace"] = spec.vace_folder / "config.json"
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


def chat_weight_bytes(
    spec: ModelSpec, config: Mapping[str, Any], plain_bytes: int, device: str
) -> int:
    """Bytes of a chat model's weights on the device. plain_bytes: as
    the library loads them."""
    if device == "cpu" and config.get("tie_word_embeddings"):
        # Packed layers (worker/engine/chat/linear.py): a tied output layer is a copy. In bfloat16
        # only some processors pack; counted for all.
        width = {"float32": 4, "bfloat16": 2}.get(spec.dtype, 0)
        return plain_bytes + int(config["vocab_size"]) * int(config["hidden_size"]) * width
    return plain_bytes


class Peaks:
    """Answers from disk, or measured now and kept.

    Of two processes that write at the same time one loses its answer, and measures it again.
    """

    def __init__(
        self,
        state_dir: Path,
        measure: Callable[[Sequence[Question]], list[Peak]] | None = None,
    ):
        """measure: how; in a short-lived process where it is not given."""
        self._path = state_dir / "peaks.json"
        self._measure = measure or measured_apart
        self._known: dict[str, Peak] = {}

    def ask(self, questions: Sequence[Question]) -> list[Peak]:
        """Answers in order. Raises WorkerError when one cannot be measured.

        What is not known takes some 6 s for the libraries and up to 2 s for each question.
        """
        asked = {content_key(one): one for one in questions}
        if not asked.keys() <= self._known.keys():
            self._known |= self._read()
        missing = {key: one for key, one in asked.items() if key not in self._known}
        if missing:
            self._known |= zip(missing, self._measure([*missing.values()]), strict=True)
            known = dict([*(self._read() | self._known).items()][-KEPT_ANSWERS:])
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=1))
            partial.replace(self._path)
        return [self._known[key] for key in map(content_key, questions)]

    def of_phase(self, phase: Phase) -> int:
        """Bytes that a phase takes beside its parts."""
        answers = self.ask(phase.questions)
        peak = max(answer.peak_bytes for answer in answers[: len(phase.passes)])
        if phase.converted:
            before, after = answers[len(phase.passes) :]
            peak += max(0, after.weight_bytes - before.weight_bytes)
        return peak + phase.beside_bytes

    def of_phases(self, phases: Mapping[str, Phase]) -> dict[str, int]:
        """The same of several, by name; what is not known of them is measured together."""
        self.ask([question for phase in phases.values() for question in phase.questions])
        return {name: self.of_phase(phase) for name, phase in phases.items()}

    def _read(self) -> dict[str, Peak]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Peak])
        except (OSError, msgspec.DecodeError):  # never written, or cut short: measured again
            return {}


def measured_apart(questions: Sequence[Question]) -> list[Peak]:
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

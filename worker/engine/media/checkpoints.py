"""Checkpoints of jobs: what a denoising goes on from after its process has died.

A file is one safetensors file. Its header has what is no tensor, for which job by which versions it
was made, and a SHA-256 of all of the file with zeros in the place of that hash: whatever byte is
damaged, the file is refused and the job begins anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from worker import __version__
from worker.catalog import ModelSpec
from worker.engine.media.course import CheckpointRefused, Kept, Snapshot, laid_out
from worker.modelfiles import file_sha256
from worker.protocol.messages import Reference, RenderParams
from worker.receipt import canonical_json
from worker.versions import computing

log = logging.getLogger(__name__)

FORMAT = 2  # of the files; another one is refused
EVERY_S = 5.0  # of denoising, between two checkpoints, at the least
# Of a job's time, that writing checkpoints may take. A long video's are 34 MB, and a slow volume
# takes half a second to have them safe.
SHARE = 0.01
# As it is written in JSON that is a text in JSON.
_HASH = rb"{\"content_sha256\": \""
_ZEROS = b"0" * 64


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far the denoising of a job's pictures has come. All tensors are in host memory."""

    finished: tuple[torch.Tensor, ...]  # latents of the first pictures, which are done
    going_on: Snapshot | None = None  # of the one after them; None where it has not begun
    scheduler_class: str | None = None  # that made them; None where nothing was denoised
    # Ways in which all of it was made (worker/vram/ways.py), with their exactness.
    ways: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps of the picture that goes on."""
        return self.going_on.step if self.going_on is not None else 0


def due(
    steps_done: int, last_at: float, now: float, every_s: float = EVERY_S, took_s: float = 0.0
) -> bool:
    """Whether to write a checkpoint now. Pure.

    steps_done: since the last one. last_at: when that was written, or the denoising began. every_s:
    0 is after every step. took_s: what writing the last one took.
    """
    pause_s = max(every_s, took_s / SHARE) if every_s > 0 else 0.0
    return steps_done > 0 and now - last_at >= pause_s


def job_fingerprint(
    params: RenderParams, references: Sequence[Reference], **decides: object
) -> str:
    """SHA-256 (hex) of everything that the latents of a job depend on, versions apart.

    decides: what else there is, as JSON values: weights, configs, type, device.
    """
    given = [[one.role, one.sha256] for one in references]
    body = {"params": msgspec.to_builtins(params), "references": given, **decides}
    return hashlib.sha256(canonical_json(body)).hexdigest()


def configs_sha256(spec: ModelSpec) -> str:
    """SHA-256 (hex) of what a model's denoising depends on beside its own weights: its JSON files,
    and which VACE transformer lies beside it. Takes as long as reading them, tokenizers among
    them."""
    folder = spec.config_path if spec.path.is_file() else spec.path
    assert folder is not None, "a model that is one file has a folder of configs"
    files: dict[str, object] = {
        str(one.relative_to(folder)): file_sha256(one) for one in folder.rglob("*.json")
    }
    if spec.vace_folder is not None:
        for one in spec.vace_folder.iterdir():
            # Not the content of gigabytes: another file in its place has another time.
            info = one.stat()
            files[f"vace {one.name}"] = [info.st_size, info.st_mtime_ns]
    return hashlib.sha256(canonical_json(files)).hexdigest()


def versions() -> dict[str, str]:
    """Of what computes: another one may round another way."""
    return {"worker": __version__, **computing()}


def write(path: Path, checkpoint: Checkpoint, fingerprint: str) -> None:
    """Put it in the place of an earlier one, safe from a loss of power when it returns.

    Raises OSError, and the earlier one is still there then.
    """
    content = to_bytes(checkpoint, fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path, fingerprint: str) -> Checkpoint | None:
    """None where there is no file. Raises CheckpointRefused."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise CheckpointRefused(f"cannot be read: {exc.strerror}") from exc
    return from_bytes(content, fingerprint)


def to_bytes(checkpoint: Checkpoint, fingerprint: str) -> bytes:
    """A whole file. fingerprint: of the job that it belongs to."""
    tensors = {f"finished.{n}": one for n, one in enumerate(checkpoint.finished)}
    facts: dict[str, Any] = {
        "content_sha256": _ZEROS.decode(),
        "format": FORMAT,
        "versions": versions(),
        "job": fingerprint,
        "image": len(checkpoint.finished),
        "step": checkpoint.step,
        "scheduler_class": checkpoint.scheduler_class,
        "ways": dict(checkpoint.ways),
    }
    if (one := checkpoint.going_on) is not None:
        tensors |= {"latents": one.latents, "generator": one.generator}
        facts["made_by"] = one.made_by
        facts["scheduler"] = _flat(one.scheduler, tensors)
    facts["strides"] = {name: tensor.stride() for name, tensor in tensors.items()}
    metadata = {"checkpoint": json.dumps(facts)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata)
    at = _place_of_hash(content)
    assert at is not None, "the header has the place of the hash"
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:at] + digest + content[at + len(digest) :]


def from_bytes(content: bytes, fingerprint: str) -> Checkpoint:
    """The inverse of `to_bytes`. Raises CheckpointRefused."""
    at = _place_of_hash(content)
    if at is None:
        raise CheckpointRefused("damaged")
    whole = content[:at] + _ZEROS + content[at + len(_ZEROS) :]
    if hashlib.sha256(whole).hexdigest().encode() != content[at : at + len(_ZEROS)]:
        raise CheckpointRefused("damaged")
    try:
        facts = _facts(content)
        if (facts["format"], facts["versions"]) != (FORMAT, versions()):
            raise CheckpointRefused("of another version")
        if facts["job"] != fingerprint:
            raise CheckpointRefused("of another job")
        # Copies: in a file they lie as they come, and arithmetic may go by where they lie.
        tensors = {
            name: laid_out(one, facts["strides"][name]) for name, one in load(content).items()
        }
        finished = tuple(tensors[f"finished.{n}"] for n in range(facts["image"]))
        going_on = None
        if facts["step"]:
            going_on = Snapshot(
                step=facts["step"],
                latents=tensors["latents"],
                generator=tensors["generator"],
                scheduler=_unflat(facts["scheduler"], tensors),
                made_by=facts["made_by"],
            )
        return Checkpoint(finished, going_on, facts["scheduler_class"], facts["ways"])
    except (KeyError, TypeError, ValueError, SafetensorError) as exc:
        raise CheckpointRefused("damaged") from exc


class Keeper:
    """The checkpoint of one job. Engine thread only.

    path: of its file; None: none is read or written.
    """

    def __init__(
        self, path: Path | None, fingerprint: str, every_s: float, clock: Callable[[], float]
    ):
        self.written = 0
        self.refused: str | None = None  # why an earlier one was not taken
        self._path = path
        self._fingerprint = fingerprint
        self._every_s = every_s
        self._clock = clock
        self._last_at = clock()
        self._steps_since = 0
        self._took_s = 0.0

    def taken_up(self) -> Checkpoint | None:
        """What was written earlier, if it is good. Its time begins with this."""
        self._last_at = self._clock()
        if self._path is None:
            return None
        try:
            return read(self._path, self._fingerprint)
        except CheckpointRefused as exc:
            self.refuse(exc)
            return None

    def refuse(self, why: CheckpointRefused) -> None:
        """The one that was taken up is of no use after all."""
        self.refused = str(why)
        log.warning("the checkpoint is refused (%s); the denoising begins anew", why)

    def step_done(self, made: Callable[[], Checkpoint | None]) -> None:
        """After a step. made: what there is to write; called only if it is time, and None where
        nothing can be."""
        self._steps_since += 1
        began = self._clock()
        if self._path is None or not due(
            self._steps_since, self._last_at, began, self._every_s, self._took_s
        ):
            return
        checkpoint = made()
        if checkpoint is None:
            return
        try:
            write(self._path, checkpoint, self._fingerprint)
            self.written += 1
        except OSError as exc:  # it costs what a crash costs, not the job
            log.error("no checkpoint can be written: %s", exc)
        self._last_at = self._clock()
        self._took_s = self._last_at - began
        self._steps_since = 0


def _place_of_hash(content: bytes) -> int | None:
    """Where the hash begins. None in a file that has none."""
    if len(content) < 8:
        return None
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    found = re.search(re.escape(_HASH) + rb"[0-9a-f]{64}", header)
    return 8 + found.start() + len(_HASH) if found is not None else None


def _facts(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    facts: dict[str, Any] = json.loads(header["__metadata__"]["checkpoint"])
    return facts


def _flat(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """As JSON; the tensors of `value` go to `tensors`, under names of their own."""
    match value:
        case Kept():
            name = f"scheduler.{len(tensors)}"
            tensors[name] = value.tensor
            return {"tensor": name, "on_device": value.on_device}
        case dict():
            return {"dict": {key: _flat(one, tensors) for key, one in value.items()}}
        case list():
            return {"list": [_flat(one, tensors) for one in value]}
        case tuple():
            return {"tuple": [_flat(one, tensors) for one in value]}
    return value


def _unflat(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match value:
        case {"tensor": name, "on_device": on_device}:
            return Kept(tensors[name], on_device)
        case {"dict": one}:
            return {key: _unflat(each, tensors) for key, each in one.items()}
        case {"list": one}:
            return [_unflat(each, tensors) for each in one]
        case {"tuple": one}:
            return tuple(_unflat(each, tensors) for each in one)
    return value

"""The pictures that a job begins from, in the job's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from worker.jobs.pictures import Wanted
from worker.protocol.messages import Reference

_TOLD = "references.json"  # that all of them are there


class Fetch(Protocol):
    """Brings a picture that a job names into a folder."""

    def __call__(self, wanted: Wanted, folder: Path, should_stop: Callable[[], bool]) -> Reference:
        """should_stop: asked several times a second. Raises a WorkerError; one with retry_after_s
        may work later. Raises Cancelled when it should stop."""
        ...


def kept_references(folder: Path) -> tuple[Reference, ...] | None:
    """What an earlier start of the job has fetched; None when it is not there as a whole."""
    try:
        kept = msgspec.json.decode((folder / _TOLD).read_bytes(), type=tuple[Reference, ...])
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return kept if all(Path(one.file).is_file() for one in kept) else None


def fetch_references(
    pictures: Sequence[Wanted], folder: Path, fetch: Fetch, should_stop: Callable[[], bool]
) -> tuple[Reference, ...]:
    """All of them, and a note that they are there. Raises as `Fetch`, and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tuple(fetch(one, folder, should_stop) for one in pictures)
    told = folder / _TOLD
    draft = told.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(found))
    draft.rename(told)
    return found

"""A decoded job as the journal keeps it: JSON with a version."""

from __future__ import annotations

import msgspec

from worker.errors import WorkerError
from worker.jobs.decode import JobRequest

VERSION = 1


class _Versioned(msgspec.Struct, frozen=True):
    v: int


class _Stored(_Versioned, frozen=True):
    request: JobRequest


def to_json(request: JobRequest) -> str:
    """JSON of a request, with its secret: for the journal only, never for an answer or a log."""
    return msgspec.json.encode(_Stored(v=VERSION, request=request)).decode()


def from_json(text: str) -> JobRequest:
    """What `to_json` was given. Raises WorkerError for any other text or another version."""
    try:
        version = msgspec.json.decode(text, type=_Versioned).v
        if version != VERSION:
            raise WorkerError(
                f"a stored job is of version {version}, and this program reads {VERSION}"
            )
        return msgspec.json.decode(text, type=_Stored).request
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise WorkerError("a stored job is damaged and cannot be read") from exc

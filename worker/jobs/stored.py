"""Jobs as the journal keeps them: a row each, the decoded body in it as JSON with a version."""

from __future__ import annotations

import json
import logging
import sqlite3
from typing import Any

import msgspec

from worker.errors import WorkerError
from worker.jobs.decode import JobRequest
from worker.jobs.job import Job, Status
from worker.jobs.schedule import Waiting
from worker.jobs.types import JOB_TYPES
from worker.protocol.messages import AssetFile, RenderParams

log = logging.getLogger(__name__)

VERSION = 1
# Of a body. Python reads JSON less deep the deeper it is called, so that what one thread has
# written another could not read; real bodies have 4.
MAX_NESTING = 100


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


def can_be_kept(given: dict[str, Any]) -> bool:
    """Whether a body is nested no more than MAX_NESTING deep."""
    level: list[Any] = [given]
    for _ in range(MAX_NESTING):
        level = [inner for one in level for inner in (one.values() if type(one) is dict else one)]
        level = [inner for inner in level if type(inner) in (dict, list)]
        if not level:
            return True
    return False


def job_of(row: sqlite3.Row) -> Job:
    """A row of `jobs`, with `cancelled` beside its columns: whether its end was asked for."""
    return Job(
        id=row["id"],
        number=row["number"],
        request=_request(row),
        given=json.loads(row["given"]),
        source=row["source"],
        element=row["element"],
        created_at=row["created_at"],
        status=Status(row["status"]),
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        starts=row["starts"],
        restarts=row["restarts"],
        attempts=row["attempts"],
        assets=msgspec.json.decode(row["assets"], type=tuple[AssetFile, ...]),
        receipt=json.loads(row["receipt"]),
        seconds=json.loads(row["seconds"]),
        error=row["error"],
        error_code=row["error_code"],
        cancel_requested=bool(row["cancelled"]),
    )


def waiting_of(row: sqlite3.Row) -> Waiting:
    """A row of `Journal.waiting`. Its type is that of a job that allows what sharing a batch
    changes, None of any other."""
    fields = dict(row)
    kind = JOB_TYPES.get(fields.pop("type"))
    params = fields.pop("params")
    shape: object = None
    if kind is not None and kind.kind == "sdxl" and params is not None:
        try:
            shape = msgspec.json.decode(params, type=RenderParams).batch_shape
        except msgspec.DecodeError:  # of another version: it fails when its turn comes
            shape = None
    return Waiting(**fields | {"has_references": bool(fields["has_references"]), "shape": shape})


def _request(row: sqlite3.Row) -> JobRequest | None:
    if row["request"] is None:
        return None
    try:
        return from_json(row["request"])
    except WorkerError as exc:  # one such job must not keep all others from being read
        log.error("job %s: %s", row["id"], exc)
        return None

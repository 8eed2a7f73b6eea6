"""Rows of the table `jobs`, which users cancel their jobs in, read and marked over PostgREST."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx

from worker.errors import WorkerError
from worker.storage.pinned import Answer
from worker.storage.service import Service

TABLE = "/rest/v1/jobs"
MISSING = "missing"  # no row; or none that the key may see, which looks the same
TIMEOUT_S = 10.0
RETRY_AFTER_S = 5.0
# PostgreSQL's code for a text that is not of the column's type, here: an id that is no UUID.
_NOT_OF_THE_TYPE = "22P02"
# `failed` is not among them: another try may still complete the job.
_NOTHING_LEFT_TO_DO = ("cancelled", "completed")


class RowsUnavailable(WorkerError):
    """The table of jobs could not be read or written now; nothing is known about the row."""

    status = 503
    code = "rows_unavailable"

    def __init__(self, message: str):
        super().__init__(message, retry_after_s=RETRY_AFTER_S)


class JobRows:
    """The table. Nothing in it changes: any thread may call."""

    def __init__(self, service: Service):
        self._service = service

    def status(self, job_id: str) -> str | None:
        """What the job's row says; None when it has none. Raises RowsUnavailable."""
        answer = self._call("GET", f"id=eq.{quote(job_id, safe='')}&select=status")
        if _cannot_have_a_row(answer):
            return None
        match answer.status, _json(answer):
            case 200, []:
                return None
            case 200, [{"status": str(status)}]:
                return status
        raise _unexpected(answer)

    def mark_processing(self, job_id: str, started_at: float) -> None:
        """Say in the job's row that it is processed, if it still is `queued` there: a row that a
        user has cancelled, or that is finished, stays as it is. Raises RowsUnavailable.

        started_at: wall clock, seconds. Not a callback, which would set `completed_at`.
        """
        at = datetime.fromtimestamp(started_at, UTC).isoformat(timespec="milliseconds")
        answer = self._call(
            "PATCH",
            f"id=eq.{quote(job_id, safe='')}&status=eq.queued",
            json.dumps({"status": "processing", "started_at": at}).encode(),
        )
        if not (200 <= answer.status < 300 or _cannot_have_a_row(answer)):
            raise _unexpected(answer)

    def _call(self, method: str, query: str, content: bytes | None = None) -> Answer:
        headers = {"Accept": "application/json"}
        if content is not None:
            headers |= {"Content-Type": "application/json", "Prefer": "return=minimal"}
        try:
            return self._service.call(
                method, f"{TABLE}?{query}", headers=headers, content=content, timeout_s=TIMEOUT_S
            )
        except httpx.HTTPError as exc:
            raise RowsUnavailable(
                f"the table of jobs gave no answer ({type(exc).__name__})"
            ) from exc


def skip_reason(status: str | None) -> str | None:
    """Why a job with this row is not to be made, in a word; None: it is to be made.

    status: as `JobRows.status` gives it.
    """
    if status is None:
        return MISSING
    return status if status in _NOTHING_LEFT_TO_DO else None


def _cannot_have_a_row(answer: Answer) -> bool:
    if answer.status == 414:  # an id that is longer than any
        return True
    match _json(answer):
        case {"code": code}:
            return answer.status == 400 and code == _NOT_OF_THE_TYPE
    return False


def _json(answer: Answer) -> Any:
    """The body, None when it is not JSON or not all of it."""
    if not answer.is_whole:
        return None
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


def _unexpected(answer: Answer) -> RowsUnavailable:
    if answer.status in (401, 403):
        return RowsUnavailable(
            f"the table of jobs answered {answer.status}; look at the service key of Supabase"
        )
    return RowsUnavailable(f"the table of jobs answered {answer.status} with something unexpected")

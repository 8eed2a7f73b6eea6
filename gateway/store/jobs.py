"""Rows of jobs and of the files that were made for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from gateway.errors import Conflict, NotFound
from gateway.store.tables import jobs, workspace_assets
from gateway.values.jobs import COMPLETED, FAILED, PROCESSING, QUEUED, Callback, Change

Row = Mapping[str, Any]
MOST = 200  # rows of a list
WORKER_URL = "worker_url"  # in a row's metadata: who took the job; never as a client says
_SHOWN = [column for column in jobs.c if column.name not in ("payload", "webhook_sequence")]


def insert_job(connection: Connection, values: Mapping[str, Any]) -> None:
    """A new row, status queued, queue_name NULL: it was not handed over yet."""
    connection.execute(insert(jobs).values(status=QUEUED, **values))


def handed_over(
    connection: Connection, job_id: str, queue_name: str, metadata: Mapping[str, Any]
) -> None:
    """The queue or a worker has it. metadata: what is known more."""
    _merge(connection, job_id, metadata, queue_name=queue_name)


def fail_queued(connection: Connection, job_id: str, error: str, now: datetime) -> None:
    """A job that was not handed over; one that has begun meanwhile stays as it is."""
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status == QUEUED)
        .values(status=FAILED, error_message=error, completed_at=now, payload=None)
    )


def fail_never_handed_over(connection: Connection, now: datetime, older_s: float) -> int:
    """Fail jobs whose process ended between their row and their queue: their client was told
    nothing. Returns how many."""
    done = connection.execute(
        update(jobs)
        .where(
            jobs.c.status == QUEUED,
            jobs.c.queue_name.is_(None),
            jobs.c.created_at < now - timedelta(seconds=older_s),
        )
        .values(
            status=FAILED,
            error_message="the gateway ended while it handed the job over; whether a worker has it "
            "is not known, and what it calls back counts",
            completed_at=now,
            payload=None,
        )
    )
    return int(done.rowcount)


def find_job(connection: Connection, job_id: str, *, lock: bool = False) -> Row | None:
    """The whole row, whoever's it is."""
    asked = select(jobs).where(jobs.c.id == job_id)
    row = connection.execute(asked.with_for_update() if lock else asked).mappings().one_or_none()
    return None if row is None else dict(row)


def job_of(connection: Connection, job_id: str, user_id: str) -> Row:
    """A user's own job with its assets. Raises NotFound, also for another user's."""
    row = connection.execute(
        select(*_SHOWN).where(jobs.c.id == job_id, jobs.c.user_id == user_id)
    ).mappings().one_or_none()  # fmt: skip
    if row is None:
        raise NotFound("there is no such job of yours")
    listed = connection.execute(
        select(workspace_assets)
        .where(workspace_assets.c.job_id == job_id)
        .order_by(workspace_assets.c.asset_index)
    ).mappings()
    return {**row, "assets": [dict(one) for one in listed]}


def jobs_of(connection: Connection, user_id: str, limit: int) -> list[Row]:
    """The user's latest jobs, newest first, without their assets."""
    rows = connection.execute(
        select(*_SHOWN)
        .where(jobs.c.user_id == user_id)
        .order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
        .limit(min(limit, MOST))
    ).mappings()
    return [dict(row) for row in rows]


def cancel_job(connection: Connection, job_id: str, user_id: str, now: datetime) -> Row:
    """Cancel a job that has not ended. Raises NotFound, Conflict for one that has."""
    job = job_of(connection, job_id, user_id)
    done = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status.in_([QUEUED, PROCESSING]))
        .values(status="cancelled", completed_at=now, payload=None)
    )
    if not done.rowcount:
        raise Conflict(f"the job is {job['status']} already")
    return job


def apply_callback(
    connection: Connection, job: Row, said: Callback, change: Change, now: datetime
) -> None:
    """Write what a callback changes, in the transaction that has read `job` with a lock."""
    values: dict[str, Any] = {"status": change.status}
    if said.sequence is not None:
        values["webhook_sequence"] = said.sequence
    if change.status == PROCESSING:
        values["started_at"] = now
    else:
        values |= {"completed_at": now, "error_message": change.error, "payload": None}
    if change.status == COMPLETED:
        _write_assets(connection, job, change, now)
    told = {name: value for name, value in said.metadata.items() if name != WORKER_URL}
    told["callback_received_at"] = now.isoformat()
    _merge(connection, job["id"], told, **values)


def _write_assets(connection: Connection, job: Row, change: Change, now: datetime) -> None:
    # Again for a callback that came twice: the same rows, and none that a first one had too many.
    connection.execute(delete(workspace_assets).where(workspace_assets.c.job_id == job["id"]))
    rows = [
        {
            **asdict(asset),
            "job_id": job["id"],
            "user_id": job["user_id"],  # the row's, never the payload's
            "original_prompt": job["original_prompt"],
            "model_used": job["model_type"] or "",
            "created_at": now,
        }
        for asset in change.assets
    ]
    if rows:
        connection.execute(insert(workspace_assets), rows)


def _merge(connection: Connection, job_id: str, metadata: Mapping[str, Any], **values: Any) -> None:
    # Locked: a hand-over and a callback may come at once, and each keeps what the other wrote.
    asked = select(jobs.c.metadata).where(jobs.c.id == job_id).with_for_update()
    known = connection.scalar(asked) or {}
    connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(metadata={**known, **metadata}, **values)
    )

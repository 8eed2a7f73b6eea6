"""Jobs, their uploads and their deliveries, on disk: SQLite, every change one transaction.

Fronts and the intake add jobs, fronts add wishes; whatever else is changed is changed by the runner
process alone. A change is on the disk when its method returns.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from worker.errors import Busy, Conflict, InvalidRequest, NotFound
from worker.jobs.bell import Bell
from worker.jobs.database import Database
from worker.jobs.decode import JobRequest
from worker.jobs.job import Job, Status
from worker.jobs.schedule import Waiting
from worker.jobs.stored import MAX_NESTING, can_be_kept, job_of, to_json, waiting_of
from worker.protocol.messages import AssetFile
from worker.storage.deliver import Delivery

HTTP = "http"  # the source of jobs that came over HTTP
TYPICAL_JOB_S = 20.0  # until one has completed
LEARN_FROM = 20  # completed jobs that Retry-After is computed from

_JOB = "SELECT jobs.*, EXISTS (SELECT 1 FROM wishes WHERE job_id = id) AS cancelled FROM jobs"


@dataclass(frozen=True, slots=True)
class NewDelivery:
    """Something to tell somebody about a job."""

    kind: str  # callback | webhook
    event: str  # job.processing | job.completed | job.failed | job.cancelled
    content: bytes
    url: str = ""
    secret: str | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to bring to the store."""

    job_id: str
    place: str  # key in the store
    sha256: str
    mime_type: str
    saved: dict[str, Any]
    attempts: int = 0


class Journal:
    """What happens to jobs, in one database. Any thread; several processes may have one each."""

    def __init__(self, folder: Path, bell: Bell, clock: Callable[[], float] = time.time):
        """folder: for the database alone; made, for this user only, at the first use."""
        self._database = Database(folder / "journal.sqlite3", bell)
        self._clock = clock

    def check(self) -> None:
        """Look whether it is whole. Raises JournalUnavailable with what to do."""
        self._database.check()

    def close(self) -> None:
        self._database.close()

    # --- fronts and the intake -----------------------------------------------------------------

    def add(
        self,
        request: JobRequest,
        *,
        key: str | None = None,
        given: dict[str, Any] | None = None,
        source: str = "http",
        element: bytes | None = None,
        max_waiting: int | None = None,
        tell: Callable[[Job], Sequence[NewDelivery]] = lambda job: (),
    ) -> tuple[Job, bool]:
        """Accept a job, or find the one that the same id or key has made before.

        given: the body as it came. max_waiting: queued jobs; more are refused. tell: what is told
        again of a job of a list that has ended and is pushed once more.
        Returns the job and whether it is new. Raises Conflict when the id or key came with
        another body, Busy when the queue is full, InvalidRequest for a body that is nested too
        deeply to be kept, JournalUnavailable.
        """
        if given is not None and not can_be_kept(given):
            raise InvalidRequest(f"the body is nested more than {MAX_NESTING} deep")
        with self._database.changing() as database:
            known = self._known(database, request.job_id, key)
            for job, body_sha256 in known:  # refused before, and the worker has changed since
                if not body_sha256 and job.given == given:
                    database.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
                    known = []
            if any(body_sha256 != request.body for _, body_sha256 in known):
                raise Conflict("this id or Idempotency-Key was used with another body")
            if known:
                job, _ = known[0]
                if key:
                    database.execute(
                        "UPDATE OR IGNORE jobs SET key = ? WHERE id = ? AND key IS NULL",
                        (key, job.id),
                    )
                if source != HTTP:
                    job = self._come_again(database, job, source, element, tell)
                return job, False
            if max_waiting is not None:
                self._require_room(database, max_waiting)
            job = Job(
                id=request.job_id or uuid.uuid4().hex,
                request=request,
                given=given or {},
                source=source,
                element=element,
                created_at=self._clock(),
            )
            return self._insert(database, job, key), True

    def refuse(
        self,
        job_id: str,
        given: dict[str, Any],
        source: str,
        element: bytes | None,
        error: str,
        error_code: str,
        deliveries: Sequence[NewDelivery],
    ) -> Job:
        """Keep a job whose body cannot be honoured as failed, so that whoever sent it is told; the
        one that the same body has made before stays. Raises Conflict when the id came with
        another body."""
        if not can_be_kept(given):
            given = {}
        with self._database.changing() as database:
            for known, _ in self._known(database, job_id, None):
                if known.given != given:
                    raise Conflict("this id was used with another body")
                return known
            now = self._clock()
            job = Job(
                id=job_id, request=None, given=given, source=source, element=element,
                created_at=now, finished_at=now, status=Status.FAILED,
                error=error, error_code=error_code,
            )  # fmt: skip
            job = self._insert(database, job, None)
            self._deliver(database, job.id, deliveries)
            return job

    def wish_cancel(self, job_id: str) -> Job:
        """Ask the runner for the end of a job. Raises NotFound."""
        with self._database.changing() as database:
            job = self._get(database, job_id)
            if not job.status.is_final:
                database.execute(
                    "INSERT OR IGNORE INTO wishes VALUES (?, 'cancel', ?)", (job_id, self._clock())
                )
            return self._get(database, job_id)

    # --- reading -------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job:
        """Raises NotFound, JournalUnavailable."""
        with self._database.reading() as database:
            return self._get(database, job_id)

    def position(self, job: Job) -> int | None:
        """How many queued jobs came before this one; None when it is not queued."""
        if job.status is not Status.QUEUED:
            return None
        return int(
            self._one(
                "SELECT count(*) FROM jobs WHERE status = 'queued' AND number < ?", (job.number,)
            )
        )

    def counts(self) -> dict[str, int]:
        """Number of jobs per status."""
        found: dict[str, int] = {
            row[0]: row[1] for row in self._all("SELECT status, count(*) FROM jobs GROUP BY status")
        }
        return {status.value: int(found.get(status.value, 0)) for status in Status}

    def outbox_counts(self) -> dict[str, int]:
        """Number of deliveries per state, and of uploads that are not done under "uploads"."""
        found: dict[str, int] = {
            row[0]: row[1]
            for row in self._all("SELECT state, count(*) FROM deliveries GROUP BY state")
        }
        return {
            **{state: int(found.get(state, 0)) for state in ("waiting", "delivered", "dead")},
            "uploads": int(self._one("SELECT count(*) FROM uploads WHERE NOT done")),
        }

    def waiting(self) -> list[Waiting]:
        """Queued jobs, oldest first."""
        rows = self._all(
            "SELECT id, number, model, priority, created_at, not_before, overtaken, "
            "coalesce(json_array_length(request, '$.request.references'), 0) > 0 "
            "AS has_references, "
            "coalesce(json_extract(request, '$.request.params.num_images'), 1) AS images, "
            # Only these may share a batch. One that was begun before has a checkpoint, or has ended
            # its engine and is to end no other job again.
            "CASE WHEN starts = 0 AND json_extract(request, '$.request.exactness') <> 'bit' "
            "THEN json_extract(request, '$.request.type') END AS type, "
            "json_extract(request, '$.request.params') AS params "
            "FROM jobs WHERE status = 'queued' ORDER BY number"
        )
        return [waiting_of(row) for row in rows]

    def of_source(self, source: str, *statuses: Status) -> list[Job]:
        """Jobs of one list in these states, oldest first."""
        marks = ", ".join("?" for _ in statuses)
        return self._jobs(
            f"WHERE source = ? AND status IN ({marks})", (source, *(one.value for one in statuses))
        )

    def wished_away(self) -> list[Job]:
        """Jobs that somebody wants to end and that have not."""
        return self._jobs(
            "WHERE id IN (SELECT job_id FROM wishes) AND status IN ('queued', 'processing')"
        )

    # --- the runner: making --------------------------------------------------------------------

    def recover(self) -> list[str]:
        """At the runner's start: what another one had begun is queued again; ids.

        Jobs whose files were there stay: only their uploads go on.
        """
        with self._database.changing() as database:
            rows = database.execute(
                "UPDATE jobs SET status = 'queued', restarts = restarts + 1 "
                "WHERE status = 'processing' AND assets = '[]' RETURNING id"
            ).fetchall()
        return [row["id"] for row in rows]

    def claim(self, job_id: str, deliveries: Callable[[Job], Sequence[NewDelivery]]) -> Job | None:
        """Begin a queued job; None when it is no longer queued."""
        with self._database.changing() as database:
            row = database.execute(
                "UPDATE jobs SET status = 'processing', started_at = coalesce(started_at, ?), "
                "starts = starts + 1 WHERE id = ? AND status = 'queued' RETURNING number",
                (self._clock(), job_id),
            ).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE jobs SET overtaken = overtaken + 1 WHERE status = 'queued' AND number < ?",
                (row["number"],),
            )
            job = self._get(database, job_id)
            if job.starts == 1:
                self._deliver(database, job_id, deliveries(job))
            return job

    def requeue(self, job_id: str, *, after_s: float = 0.0, engine_died: bool = False) -> None:
        """A job that was begun waits for another try."""
        with self._database.changing() as database:
            database.execute(
                "UPDATE jobs SET status = 'queued', not_before = ?, attempts = attempts + ? "
                "WHERE id = ? AND status = 'processing'",
                (self._clock() + after_s if after_s else 0.0, int(engine_died), job_id),
            )

    def rendered(
        self,
        job_id: str,
        assets: Sequence[AssetFile],
        receipt: dict[str, Any],
        seconds: dict[str, float],
        uploads: Sequence[Upload],
        deliveries: Callable[[Job], Sequence[NewDelivery]],
    ) -> Job:
        """Its files are published; without uploads it is complete."""
        with self._database.changing() as database:
            job = self._get(database, job_id)
            if job.status is not Status.PROCESSING or job.assets:
                return job
            database.execute(
                "UPDATE jobs SET assets = ?, receipt = ?, seconds = ? WHERE id = ?",
                (
                    msgspec.json.encode(assets).decode(),
                    json.dumps(receipt),
                    json.dumps(seconds),
                    job_id,
                ),
            )
            for asset in assets:
                for sha256, size in (
                    (asset.sha256, asset.size_bytes),
                    (asset.thumbnail_sha256, asset.thumbnail_bytes),
                ):
                    database.execute(
                        "INSERT OR IGNORE INTO blobs VALUES (?, ?, ?)", (sha256, job_id, size)
                    )
            for upload in uploads:
                database.execute(
                    "INSERT INTO uploads (job_id, place, sha256, mime_type) VALUES (?, ?, ?, ?)",
                    (job_id, upload.place, upload.sha256, upload.mime_type),
                )
            if not uploads:
                self._end(database, job_id, Status.COMPLETED, None, None, deliveries)
            return self._get(database, job_id)

    def end(
        self,
        job_id: str,
        status: Status,
        error: str,
        error_code: str,
        deliveries: Callable[[Job], Sequence[NewDelivery]],
    ) -> Job:
        """It has failed or was cancelled. A final job stays as it is."""
        with self._database.changing() as database:
            self._end(database, job_id, status, error, error_code, deliveries)
            return self._get(database, job_id)

    # --- the runner: uploads -------------------------------------------------------------------

    def uploads_due(self) -> list[Upload]:
        """Uploads whose next try is due, the longest waiting first."""
        rows = self._all(
            "SELECT job_id, place, sha256, mime_type, saved, attempts FROM uploads "
            "WHERE NOT done AND next_at <= ? ORDER BY next_at, rowid",
            (self._clock(),),
        )
        return [Upload(**dict(row) | {"saved": json.loads(row["saved"])}) for row in rows]

    def upload_saved(self, upload: Upload, saved: dict[str, Any]) -> None:
        """Where an interrupted upload would go on."""
        with self._database.changing() as database:
            database.execute(
                "UPDATE uploads SET saved = ? WHERE job_id = ? AND place = ?",
                (json.dumps(saved), upload.job_id, upload.place),
            )

    def upload_failed(self, upload: Upload, error: str, after_s: float) -> None:
        with self._database.changing() as database:
            database.execute(
                "UPDATE uploads SET attempts = attempts + 1, error = ?, next_at = ? "
                "WHERE job_id = ? AND place = ?",
                (error, self._clock() + after_s, upload.job_id, upload.place),
            )

    def uploaded(
        self, upload: Upload, deliveries: Callable[[Job], Sequence[NewDelivery]]
    ) -> Job | None:
        """It is in the store; with the last one the job is complete. None when the job has been
        forgotten meanwhile."""
        with self._database.changing() as database:
            database.execute(
                "UPDATE uploads SET done = 1, error = NULL WHERE job_id = ? AND place = ?",
                (upload.job_id, upload.place),
            )
            (left,) = database.execute(
                "SELECT count(*) FROM uploads WHERE job_id = ? AND NOT done", (upload.job_id,)
            ).fetchone()
            if not left:
                self._end(database, upload.job_id, Status.COMPLETED, None, None, deliveries)
            return self._find(database, upload.job_id)

    # --- the runner: deliveries ----------------------------------------------------------------

    def deliveries(self) -> list[Delivery]:
        """What waits in the outbox, oldest first."""
        rows = self._all(
            "SELECT id, job_id, sequence, kind, url, content, attempts, secret, created_at, "
            "next_at FROM deliveries WHERE state = 'waiting' ORDER BY id"
        )
        return [Delivery(**dict(row)) for row in rows]

    def delivery_state(self, delivery_id: int, state: str, error: str | None = None) -> None:
        """delivered, or dead; one that became void meanwhile needs not be told any more."""
        with self._database.changing() as database:
            database.execute(
                "UPDATE deliveries SET state = ?, error = ?, attempts = attempts + 1 "
                "WHERE id = ? AND (state = 'waiting' OR ? = 'delivered')",
                (state, error, delivery_id, state),
            )

    def delivery_failed(self, delivery_id: int, error: str, after_s: float) -> None:
        with self._database.changing() as database:
            database.execute(
                "UPDATE deliveries SET attempts = attempts + 1, error = ?, next_at = ? "
                "WHERE id = ? AND state = 'waiting'",
                (error, self._clock() + after_s, delivery_id),
            )

    def of_job(self, job_id: str) -> list[dict[str, Any]]:
        """Deliveries and uploads of a job, without contents and secrets, for whoever looks."""
        rows = self._all(
            "SELECT kind, event, state, attempts, error FROM deliveries WHERE job_id = ? "
            "ORDER BY id", (job_id,),
        ) + self._all(
            "SELECT 'upload', place, CASE done WHEN 1 THEN 'delivered' ELSE 'waiting' END, "
            "attempts, error FROM uploads WHERE job_id = ? ORDER BY rowid", (job_id,),
        )  # fmt: skip
        names = ("kind", "event", "state", "attempts", "error")
        return [dict(zip(names, row, strict=True)) for row in rows]

    # --- the runner: elements of lists ---------------------------------------------------------

    def settled(self, source: str) -> list[Job]:
        """Jobs of a list that have ended and of which everybody has been told: what lies of them
        in the processing list may go."""
        return self._jobs(
            # The third condition is what lets the index be used.
            "WHERE source = ? AND element IS NOT NULL AND NOT EXISTS (SELECT 1 FROM jobs AS other "
            "WHERE other.source = jobs.source AND other.element = jobs.element "
            "AND other.element IS NOT NULL AND (other.finished_at IS NULL OR EXISTS "
            "(SELECT 1 FROM deliveries WHERE job_id = other.id AND state = 'waiting')))",
            (source,),
        )

    def let_go(self, job_id: str) -> None:
        """Nothing of it lies in a processing list any more."""
        with self._database.changing() as database:
            database.execute("UPDATE jobs SET element = NULL WHERE id = ?", (job_id,))

    def hand_over(self, job_id: str) -> bool:
        """Forget a job that has not begun, because another worker shall have it. False when it
        has begun."""
        with self._database.changing() as database:
            done = database.execute(
                "DELETE FROM jobs WHERE id = ? AND status = 'queued' AND starts = 0", (job_id,)
            )
            return done.rowcount > 0

    # --- the runner: retention -----------------------------------------------------------------

    def over_the_bound(self, keep_finished: int, keep_bytes: int) -> list[str]:
        """Ids of finished jobs above the bounds, oldest first; those with something left to tell
        or to bring away stay."""
        rows = self._all(
            "SELECT id, (SELECT coalesce(sum(size_bytes), 0) FROM blobs WHERE job_id = id), "
            "element IS NOT NULL OR EXISTS "
            "(SELECT 1 FROM deliveries WHERE job_id = jobs.id AND state = 'waiting') "
            "FROM jobs WHERE finished_at IS NOT NULL ORDER BY finished_at DESC, number DESC"
        )
        kept_bytes, dropped = 0, []
        for place, (job_id, size, busy) in enumerate(rows):
            kept_bytes += size
            if not busy and place and (place >= keep_finished or kept_bytes > keep_bytes):
                dropped.append(job_id)
        return dropped[::-1]

    def forget(self, job_ids: Sequence[str]) -> list[str]:
        """Remove finished jobs; SHA-256 of the files that no other job has."""
        gone: set[str] = set()
        with self._database.changing() as database:
            for job_id in job_ids:
                rows = database.execute("SELECT sha256 FROM blobs WHERE job_id = ?", (job_id,))
                gone |= {row["sha256"] for row in rows}
                database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            for sha256 in list(gone):
                if database.execute(
                    "SELECT 1 FROM blobs WHERE sha256 = ? LIMIT 1", (sha256,)
                ).fetchone():
                    gone.remove(sha256)
        return sorted(gone)

    def blobs(self) -> set[str]:
        """SHA-256 of every file that a job has."""
        return {row[0] for row in self._all("SELECT DISTINCT sha256 FROM blobs")}

    def disown(self, job_id: str) -> None:
        """Forget a job without files, because another worker has it; nobody is told."""
        with self._database.changing() as database:
            database.execute(
                "DELETE FROM jobs WHERE id = ? AND finished_at IS NULL AND assets = '[]'", (job_id,)
            )

    def let_go_of_others(self, sources: Sequence[str]) -> None:
        """Elements of ended jobs from lists that are no longer read lie there for ever; here they
        hold nothing up."""
        marks = ", ".join("?" for _ in sources)
        with self._database.changing() as database:
            database.execute(
                f"UPDATE jobs SET element = NULL WHERE source NOT IN ({marks}) "
                "AND finished_at IS NOT NULL",
                tuple(sources),
            )

    # --- inside --------------------------------------------------------------------------------

    def _known(
        self, database: sqlite3.Connection, job_id: str | None, key: str | None
    ) -> list[tuple[Job, str]]:
        """The job with this id and the one with this key, with the hashes of their bodies."""
        rows = database.execute(
            f"{_JOB} WHERE id = ? OR key = ? ORDER BY id = ? DESC", (job_id, key, job_id)
        )
        return [(job_of(row), row["body_sha256"]) for row in rows]

    def _come_again(
        self,
        database: sqlite3.Connection,
        job: Job,
        source: str,
        element: bytes | None,
        tell: Callable[[Job], Sequence[NewDelivery]],
    ) -> Job:
        """A job that is known comes from a list: whoever pushed it waits to be told."""
        if job.source == HTTP and not job.status.is_final and not job.assets:
            database.execute(
                "UPDATE jobs SET source = ?, element = ? WHERE id = ?", (source, element, job.id)
            )
        elif job.source != HTTP and job.status.is_final and job.element is None:
            database.execute("UPDATE jobs SET element = ? WHERE id = ?", (element, job.id))
            self._deliver(database, job.id, tell(job))
        return self._get(database, job.id)

    def _require_room(self, database: sqlite3.Connection, max_waiting: int) -> None:
        (waiting,) = database.execute(
            "SELECT count(*) FROM jobs WHERE status = 'queued'"
        ).fetchone()
        if waiting >= max(1, max_waiting):
            (job_s,) = database.execute(
                "SELECT avg(finished_at - started_at) FROM (SELECT finished_at, started_at "
                "FROM jobs WHERE status = 'completed' ORDER BY finished_at DESC LIMIT ?)",
                (LEARN_FROM,),
            ).fetchone()
            raise Busy(
                f"{waiting} jobs are waiting, at most {max_waiting} may",
                retry_after_s=TYPICAL_JOB_S if job_s is None else job_s,
            )

    def _insert(self, database: sqlite3.Connection, job: Job, key: str | None) -> Job:
        request = job.request
        cursor = database.execute(
            "INSERT INTO jobs (id, key, body_sha256, given, request, source, element, model, "
            "priority, status, created_at, finished_at, error, error_code) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                job.id,
                key,
                request.body if request is not None else "",
                json.dumps(job.given),
                to_json(request) if request is not None else None,
                job.source,
                job.element,
                request.model if request is not None else "",
                request.priority if request is not None else 0,
                job.status.value,
                job.created_at,
                job.finished_at,
                job.error,
                job.error_code,
            ),
        )
        return job.evolve(number=cursor.lastrowid)

    def _end(
        self,
        database: sqlite3.Connection,
        job_id: str,
        status: Status,
        error: str | None,
        error_code: str | None,
        deliveries: Callable[[Job], Sequence[NewDelivery]],
    ) -> None:
        changed = database.execute(
            "UPDATE jobs SET status = ?, error = ?, error_code = ?, finished_at = ? "
            "WHERE id = ? AND finished_at IS NULL",
            (status.value, error, error_code, self._clock(), job_id),
        )
        if not changed.rowcount:
            return
        database.execute("DELETE FROM wishes WHERE job_id = ?", (job_id,))
        if status is not Status.COMPLETED:
            # What of it was uploaded stays in the store; nothing more is brought there.
            database.execute("DELETE FROM uploads WHERE job_id = ?", (job_id,))
        # A finish may not be overwritten by what was to be told before it.
        database.execute(
            "UPDATE deliveries SET state = 'void' WHERE job_id = ? AND state = 'waiting'", (job_id,)
        )
        self._deliver(database, job_id, deliveries(self._get(database, job_id)))

    def _deliver(
        self, database: sqlite3.Connection, job_id: str, deliveries: Sequence[NewDelivery]
    ) -> None:
        for one in deliveries:
            database.execute(
                "INSERT INTO deliveries (job_id, sequence, kind, event, url, secret, content, "
                "created_at) VALUES (?, (SELECT count(*) FROM deliveries WHERE job_id = ?), "
                "?, ?, ?, ?, ?, ?)",
                (
                    job_id, job_id, one.kind, one.event, one.url, one.secret, one.content,
                    self._clock(),
                ),
            )  # fmt: skip

    def _get(self, database: sqlite3.Connection, job_id: str) -> Job:
        job = self._find(database, job_id)
        if job is None:
            raise NotFound("there is no job with this id")
        return job

    def _find(self, database: sqlite3.Connection, job_id: str) -> Job | None:
        row = database.execute(f"{_JOB} WHERE id = ?", (job_id,)).fetchone()
        return job_of(row) if row is not None else None

    def _jobs(self, where: str, values: Sequence[Any] = ()) -> list[Job]:
        return [job_of(row) for row in self._all(f"{_JOB} {where} ORDER BY number", values)]

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._database.reading() as database:
            return database.execute(sql, values).fetchall()

    def _one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self._all(sql, values)[0][0]

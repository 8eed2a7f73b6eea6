"""Images and videos as jobs: accept, watch, cancel, fetch. And raw completion, for old clients."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, g, jsonify, request, send_file
from flask.typing import ResponseReturnValue

from worker.catalog import Catalog
from worker.config import Limits
from worker.errors import Busy, InvalidRequest, NotFound
from worker.front import errors
from worker.front.admission import Admission
from worker.front.bodies import read_json
from worker.front.chat import ChatParser, ChatService, sse, sse_response
from worker.jobs.decode import decode_job
from worker.jobs.job import Job, Status
from worker.jobs.runner import JobRunner
from worker.jobs.table import JobTable
from worker.protocol.link import hung_up

log = logging.getLogger(__name__)

# A pod's public proxy cuts an answer at 100 s.
MAX_WAIT_S = 90.0
WATCH_EVERY_S = 0.5
COMMENT_EVERY_S = 15.0
# How long DELETE waits for the engine to reach its next step before it answers 202.
CANCEL_WAIT_S = 5.0
MAX_KEY_CHARS = 255


class MediaService:
    """Jobs of this port, for the HTTP threads."""

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        exactness: str,
        table: JobTable,
        runner: JobRunner,
        watchers: Admission,
    ):
        """exactness: the least, of jobs that do not say. watchers: bounds the connections that
        wait on a job, so that they never take the threads that answer /health."""
        self._catalog = catalog
        self._limits = limits
        self._exactness = exactness
        self._table = table
        self._runner = runner
        self._watchers = watchers

    def accept(self, body: Any, key: str | None) -> tuple[Job, bool]:
        """The job of this body, and whether it is new."""
        return self._table.add(decode_job(body, self._catalog, self._limits, self._exactness), key)

    def get(self, job_id: str) -> Job:
        return self._table.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Ask for the end and wait a moment for it."""
        self._runner.cancel(job_id)
        return self.wait(job_id, CANCEL_WAIT_S, None)

    def wait(self, job_id: str, timeout_s: float, client: socket.socket | None) -> Job:
        """The job when it is final, or as it is after `timeout_s`, when `client` has hung up, or
        now when too many wait already: what was asked has been taken in any case."""
        try:
            for job in self.changes(job_id, timeout_s):
                if hung_up(client) or (job is not None and job.status.is_final):
                    break
        except Busy:
            log.info("too many wait for jobs; this one is told the state of now")
        return self.get(job_id)

    def changes(self, job_id: str, timeout_s: float) -> Iterator[Job | None]:
        """The job at every change until it is final or time is up; None now and then between."""
        ends = time.monotonic() + timeout_s
        slot = self._watchers.enter()
        try:
            seen, last = 0, None
            while True:
                job = self._table.get(job_id)
                if job != last:
                    last = job
                    yield job
                else:
                    yield None
                left_s = ends - time.monotonic()
                if job.status.is_final or left_s <= 0:
                    return
                seen = self._table.wait_for_change(seen, min(WATCH_EVERY_S, left_s))
        finally:
            slot.leave(served=False)

    def view(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        return job_body(job, self._table.position(job))


def blueprint(
    service: MediaService, runner: JobRunner, parser: ChatParser, chat: ChatService
) -> Blueprint:
    """POST /generate, GET and DELETE /jobs."""
    bp = Blueprint("media", __name__)

    @bp.post("/generate")
    def generate_route() -> ResponseReturnValue:
        body = read_json(request)
        if isinstance(body, dict) and "inputs" in body:
            return complete(body)
        key = request.headers.get("Idempotency-Key")
        if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
            raise InvalidRequest(f"Idempotency-Key must have 1 to {MAX_KEY_CHARS} characters")
        wait_s = wanted_wait_s(request.headers.get("Prefer"))
        job, is_new = service.accept(body, key)
        log.info("job %s %s", job.id, "accepted" if is_new else "joined")
        if wait_s and not job.status.is_final:
            job = service.wait(job.id, wait_s, request.environ.get("gunicorn.socket"))
        answer = jsonify(service.view(job))
        answer.status_code = 200 if job.status.is_final else 202
        answer.headers["Location"] = f"/jobs/{job.id}"
        if not is_new:
            answer.headers["Idempotent-Replayed"] = "true"
        if wait_s:
            answer.headers["Preference-Applied"] = f"wait={wait_s:g}"
        return answer

    def complete(body: dict[str, Any]) -> ResponseReturnValue:
        parsed, full_text = parser.parse_completion(body)
        generation = chat.begin(parsed, g.request_id)
        try:
            done = generation.result(request.environ.get("gunicorn.socket"))
        finally:
            generation.close()
        text = (parsed.prompt or "") + done.text if full_text else done.text
        return {
            "generated_text": text,
            "request_id": g.request_id,
            "finish_reason": done.finish_reason,
            "receipt": {
                "request_id": g.request_id,
                **done.receipt,
                "ignored": list(parsed.ignored),
            },
        }

    @bp.get("/jobs/<job_id>")
    def job_route(job_id: str) -> ResponseReturnValue:
        return service.view(service.get(job_id))

    @bp.delete("/jobs/<job_id>")
    def cancel_route(job_id: str) -> ResponseReturnValue:
        job = service.cancel(job_id)
        return service.view(job), 200 if job.status.is_final else 202

    @bp.get("/jobs/<job_id>/events")
    def events_route(job_id: str) -> ResponseReturnValue:
        service.get(job_id)  # an unknown id is a 404, not a stream
        changes = service.changes(job_id, timeout_s=3600)
        first = next(changes)  # takes the watcher's place now, while a 429 can still be said
        client = request.environ.get("gunicorn.socket")

        def events() -> Iterator[str]:
            quiet_since = time.monotonic()
            job = first
            while True:
                if job is not None:
                    yield sse(service.view(job))
                    quiet_since = time.monotonic()
                    if job.status.is_final:
                        yield "data: [DONE]\n\n"
                elif hung_up(client):
                    return
                elif time.monotonic() - quiet_since > COMMENT_EVERY_S:
                    yield ": still there\n\n"
                    quiet_since = time.monotonic()
                try:
                    job = next(changes)
                except StopIteration:
                    return

        answer = sse_response(events())
        answer.call_on_close(changes.close)  # type: ignore[attr-defined]
        return answer

    @bp.get("/jobs/<job_id>/assets/<int:index>")
    def asset_route(job_id: str, index: int) -> ResponseReturnValue:
        return file(job_id, index, thumbnail=False)

    @bp.get("/jobs/<job_id>/assets/<int:index>/thumbnail")
    def thumbnail_route(job_id: str, index: int) -> ResponseReturnValue:
        return file(job_id, index, thumbnail=True)

    def file(job_id: str, index: int, *, thumbnail: bool) -> Response:
        job = service.get(job_id)
        if not 0 <= index < len(job.assets):
            raise NotFound(f"the job is {job.status.value} and has {len(job.assets)} assets")
        asset = job.assets[index]
        name = asset.thumbnail if thumbnail else asset.file
        path = runner.file(job, name)
        if not path.is_file():  # the job was dropped as one of the oldest, just now
            raise NotFound("there is no job with this id any more")
        return send_file(
            path,
            mimetype="image/webp" if thumbnail else asset.mime_type,
            download_name=f"{job.id}-{name}",
            conditional=True,
            etag=f"{asset.sha256}-t" if thumbnail else asset.sha256,
        )

    return bp


def wanted_wait_s(prefer: str | None) -> float:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most MAX_WAIT_S; 0 when there is none."""
    match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d+)", prefer or "", re.IGNORECASE)
    return min(float(match[1]), MAX_WAIT_S) if match else 0.0


def job_body(job: Job, position: int | None) -> dict[str, Any]:
    """The JSON of a job: docs/http-api.md#jobs."""
    body: dict[str, Any] = {
        "success": True,
        "job_id": job.id,
        "status": job.status.value,
        "status_url": f"/jobs/{job.id}",
        "events_url": f"/jobs/{job.id}/events",
        "type": job.request.type,
        "model": job.request.model,
        "phase": job.phase,
        "step": job.step,
        "steps": job.steps,
        "position": position,
        "created_at": _time(job.created_at),
        "started_at": _time(job.started_at),
        "finished_at": _time(job.finished_at),
        "assets": [
            {
                "index": index,
                "type": asset.type,
                "url": f"/jobs/{job.id}/assets/{index}",
                "thumbnail_url": f"/jobs/{job.id}/assets/{index}/thumbnail",
                "mime_type": asset.mime_type,
                "width": asset.width,
                "height": asset.height,
                "seed": asset.seed,
                "size_bytes": asset.size_bytes,
                "sha256": asset.sha256,
                **(
                    {
                        "frame_num": asset.frames,
                        "fps": asset.fps,
                        "duration_s": asset.duration_s,
                    }
                    if asset.type == "video"
                    else {}
                ),
            }
            for index, asset in enumerate(job.assets)
        ],
        "error": None,
        "error_code": job.error_code,
        "receipt": None,
    }
    if job.error is not None:
        body["error"] = errors.body(job.error_code or "", job.error)["error"]
    if job.status is Status.COMPLETED:
        body["receipt"] = {
            "request_id": job.id,
            **job.receipt,
            "type": job.request.type,
            "seconds": {phase: round(one, 4) for phase, one in job.seconds.items()},
            "adjusted": job.request.adjusted,
            "ignored": list(job.request.ignored),
        }
    return body


def _time(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""Images and videos as jobs: accept, watch, cancel, fetch. And raw completion, for old clients."""

from __future__ import annotations

import base64
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
from worker.jobs.bell import Bell
from worker.jobs.board import Board, Live
from worker.jobs.callbacks import asset_body, time_text
from worker.jobs.decode import decode_job
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal
from worker.jobs.results import Results
from worker.protocol.link import hung_up
from worker.protocol.messages import AssetFile

log = logging.getLogger(__name__)

# A pod's public proxy cuts an answer at 100 s.
MAX_WAIT_S = 90.0
WATCH_EVERY_S = 0.5
COMMENT_EVERY_S = 15.0
# How long DELETE waits for the engine to reach its next step before it answers 202.
CANCEL_WAIT_S = 5.0
MAX_KEY_CHARS = 255


@dataclass(frozen=True, slots=True)
class JobDesk:
    """A front's side of the jobs, which another process does."""

    journal: Journal
    board: Board
    bell: Bell  # rung at every change that this process hears of
    results: Results
    look: Callable[[], None]  # tells the runner that there is something new in the journal


@dataclass(frozen=True, slots=True)
class JobView:
    """A job, and where it is while it runs."""

    job: Job
    live: Live | None


class MediaService:
    """Jobs of this port, for the HTTP threads."""

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        exactness: str,
        max_waiting: int,
        desk: JobDesk,
        watchers: Admission,
    ):
        """exactness: the least, of jobs that do not say. watchers: bounds the connections that
        wait on a job, so that they never take the threads that answer /health."""
        self._catalog = catalog
        self._limits = limits
        self._exactness = exactness
        self._max_waiting = max_waiting
        self._desk = desk
        self._watchers = watchers

    def accept(self, body: Any, key: str | None) -> tuple[Job, bool]:
        """The job of this body, and whether it is new. It is on the disk then."""
        request = decode_job(body, self._catalog, self._limits, self._exactness)
        job, is_new = self._desk.journal.add(
            request, key=key, given=body, max_waiting=self._max_waiting
        )
        self._desk.look()
        return job, is_new

    def get(self, job_id: str) -> Job:
        return self._desk.journal.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Ask for the end and wait a moment for it."""
        self._desk.journal.wish_cancel(job_id)
        self._desk.look()
        return self.wait(job_id, CANCEL_WAIT_S, None)

    def wait(self, job_id: str, timeout_s: float, client: socket.socket | None) -> Job:
        """The job when it is final, or as it is after `timeout_s`, when `client` has hung up, or
        now when too many wait already: what was asked has been taken in any case."""
        try:
            for seen in self.changes(job_id, timeout_s):
                if hung_up(client) or (seen is not None and seen.job.status.is_final):
                    break
        except Busy:
            log.info("too many wait for jobs; this one is told the state of now")
        return self.get(job_id)

    def changes(self, job_id: str, timeout_s: float) -> Iterator[JobView | None]:
        """The job at every change until it is final or time is up; None now and then between."""
        ends = time.monotonic() + timeout_s
        slot = self._watchers.enter()
        try:
            seen, last = 0, None
            while True:
                now = JobView(self.get(job_id), self._desk.board.get(job_id))
                if now != last:
                    last = now
                    yield now
                else:
                    yield None
                left_s = ends - time.monotonic()
                if now.job.status.is_final or left_s <= 0:
                    return
                seen = self._desk.bell.wait(seen, min(WATCH_EVERY_S, left_s))
        finally:
            slot.leave(served=False)

    def view(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        journal = self._desk.journal
        body = job_body(job, self._desk.board.get(job.id), journal.position(job))
        return body | {"deliveries": journal.of_job(job.id)}

    def preview(self, job_id: str) -> bytes:
        """The last small picture of a running job, WebP. Raises NotFound."""
        self.get(job_id)
        live = self._desk.board.get(job_id)
        if live is None or not live.preview:
            raise NotFound("there is no preview of this job now")
        return live.preview

    def asset(self, job_id: str, index: int, *, thumbnail: bool) -> tuple[AssetFile, Path]:
        """A finished file and where it is. Raises NotFound."""
        job = self.get(job_id)
        if not 0 <= index < len(job.assets):
            raise NotFound(f"the job is {job.status.value} and has {len(job.assets)} assets")
        asset = job.assets[index]
        path = self._desk.results.path(asset.thumbnail_sha256 if thumbnail else asset.sha256)
        if not path.is_file():  # the job was dropped as one of the oldest, just now
            raise NotFound("there is no job with this id any more")
        return asset, path


def blueprint(service: MediaService, parser: ChatParser, chat: ChatService) -> Blueprint:
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
            seen, shown = first, 0
            while True:
                if seen is not None:
                    body = service.view(seen.job)
                    if seen.live is not None and seen.live.previews > shown:
                        shown = seen.live.previews
                        body["preview"] = data_url(seen.live.preview)
                    yield sse(body)
                    quiet_since = time.monotonic()
                    if seen.job.status.is_final:
                        yield "data: [DONE]\n\n"
                elif hung_up(client):
                    return
                elif time.monotonic() - quiet_since > COMMENT_EVERY_S:
                    yield ": still there\n\n"
                    quiet_since = time.monotonic()
                try:
                    seen = next(changes)
                except StopIteration:
                    return

        answer = sse_response(events())
        answer.call_on_close(changes.close)  # type: ignore[attr-defined]
        return answer

    @bp.get("/jobs/<job_id>/preview")
    def preview_route(job_id: str) -> ResponseReturnValue:
        answer = Response(service.preview(job_id), mimetype="image/webp")
        answer.headers["Cache-Control"] = "no-store"
        return answer

    @bp.get("/jobs/<job_id>/assets/<int:index>")
    def asset_route(job_id: str, index: int) -> ResponseReturnValue:
        return file(job_id, index, thumbnail=False)

    @bp.get("/jobs/<job_id>/assets/<int:index>/thumbnail")
    def thumbnail_route(job_id: str, index: int) -> ResponseReturnValue:
        return file(job_id, index, thumbnail=True)

    def file(job_id: str, index: int, *, thumbnail: bool) -> Response:
        asset, path = service.asset(job_id, index, thumbnail=thumbnail)
        return send_file(
            path,
            mimetype="image/webp" if thumbnail else asset.mime_type,
            download_name=f"{job_id}-{asset.thumbnail if thumbnail else asset.file}",
            conditional=True,
            etag=path.name,
        )

    return bp


def wanted_wait_s(prefer: str | None) -> float:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most MAX_WAIT_S; 0 when there is none."""
    match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d+)", prefer or "", re.IGNORECASE)
    return min(float(match[1]), MAX_WAIT_S) if match else 0.0


def data_url(preview: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(preview).decode()}"


def job_body(job: Job, live: Live | None, position: int | None) -> dict[str, Any]:
    """The JSON of a job: docs/http-api.md#jobs."""
    request = job.request
    running = live if job.status is Status.PROCESSING else None
    phase = running.phase if running is not None else None
    if job.is_uploading:
        phase = "upload"
    steps = request.params.passes * request.params.num_images if request is not None else 0
    finished = job.status is Status.COMPLETED
    body: dict[str, Any] = {
        "success": True,
        "job_id": job.id,
        "status": job.status.value,
        "status_url": f"/jobs/{job.id}",
        "events_url": f"/jobs/{job.id}/events",
        "type": request.type if request is not None else None,
        "model": request.model if request is not None else None,
        "phase": phase,
        "step": running.step if running is not None else steps if finished else 0,
        "steps": (running.steps if running is not None else 0) or steps,
        "eta_seconds": running.left_s if running is not None else None,
        "preview_url": f"/jobs/{job.id}/preview" if running and running.preview else None,
        "position": position,
        "created_at": _time(job.created_at),
        "started_at": _time(job.started_at),
        "finished_at": _time(job.finished_at),
        "assets": [
            asset_body(
                index,
                asset,
                f"/jobs/{job.id}/assets/{index}",
                f"/jobs/{job.id}/assets/{index}/thumbnail",
            )
            for index, asset in enumerate(job.assets)
        ],
        "error": None,
        "error_code": job.error_code,
        "receipt": None,
    }
    if job.error is not None:
        body["error"] = errors.body(job.error_code or "", job.error)["error"]
    if finished:
        body["receipt"] = job.whole_receipt
    return body


def _time(at: float | None) -> str | None:
    return None if at is None else time_text(at)

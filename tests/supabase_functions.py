"""Supabase's functions and its table `jobs` for tests: job-callback, the registration of workers
and PostgREST, with the rules that the real ones have (docs/http-api.md#callbacks).

What they keep lies in a FunctionsState, which also holds how they are to misbehave next.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import random
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from typing import Any

import httpx
from flask import Blueprint, Flask, Response, jsonify, make_response, request
from flask.typing import ResponseReturnValue
from werkzeug.serving import make_server

STATUSES = ("queued", "processing", "completed", "failed", "cancelled")
MAX_INT4 = 2**31 - 1
PROBE_TIMEOUT_S = 5.0
Probe = Callable[[str], tuple[bool, float]]


@dataclass(frozen=True)
class Say:
    """Answer this, and do nothing."""

    status: int
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """Answer nothing for so long, or until the state's `let_go` is set; then do the work."""

    seconds: float = 60.0


@dataclass(frozen=True)
class Cut:
    """Close the connection without an answer, before or after the work was done."""

    done: bool = False


Fault = Say | Hang | Cut


@dataclass(frozen=True)
class Call:
    """A request that was answered, or would have been."""

    function: str
    headers: dict[str, str]  # names in lower case
    content: bytes
    status: int  # 0: cut before the work

    @property
    def body(self) -> Any:
        return json.loads(self.content)


@dataclass
class FunctionsState:
    """What the project holds. Changes under `lock` only, since the server has many threads."""

    service_key: str = "service-key"
    callback_secret: str | None = "callback-secret"
    checks_signatures: bool = True  # False: as before 2026-04
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows by id
    assets: list[dict[str, Any]] = field(default_factory=list)  # rows of workspace_assets
    repeated_assets: int = 0  # inserts that the unique key refused
    characters: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # the document of system_config
    calls: list[Call] = field(default_factory=list)
    faults: dict[str, deque[Fault]] = field(default_factory=dict)  # by function; each used once
    let_go: threading.Event = field(default_factory=threading.Event)
    probe: Probe | None = None  # of a public address; None: a real GET of /health
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_job(self, job_id: str | None = None, status: str = "queued", **columns: Any) -> str:
        """A row as queue-job inserts it; its id."""
        job_id = job_id or str(uuid.uuid4())
        with self.lock:
            self.jobs[job_id] = {
                "id": job_id, "user_id": "user", "job_type": "sdxl_image_fast", "status": status,
                "error_message": None, "metadata": {}, "started_at": None, "completed_at": None,
                "format": "image", "quality": "fast", "model_type": "sdxl",
                "original_prompt": "a red circle", **columns,
            }  # fmt: skip
        return job_id

    def script(self, function: str, *faults: Fault) -> None:
        """The next calls of `function` go like this, one each."""
        with self.lock:
            self.faults.setdefault(function, deque()).extend(faults)

    def calls_of(self, function: str) -> list[Call]:
        with self.lock:
            return [call for call in self.calls if call.function == function]

    def assets_of(self, job_id: str) -> list[dict[str, Any]]:
        with self.lock:
            return [asset for asset in self.assets if asset["job_id"] == job_id]


def functions_blueprint(state: FunctionsState) -> Blueprint:
    """/functions/v1/{job-callback, register-chat-worker, update-worker-url, health-check-workers}
    and /rest/v1/jobs."""
    bp = Blueprint("functions", __name__)

    def route(path: str, *methods: str) -> Callable[[Callable[[], ResponseReturnValue]], None]:
        def add(work: Callable[[], ResponseReturnValue]) -> None:
            name = path.rpartition("/")[2]
            view = _Scripted(state, name, work)
            bp.add_url_rule(
                path, name, view, methods=list(methods), provide_automatic_options=False
            )

        return add

    every = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

    @route("/functions/v1/job-callback", *every)
    def job_callback() -> ResponseReturnValue:
        return _job_callback(state)

    @route("/functions/v1/register-chat-worker", *every)
    @_function(state)
    def register_chat_worker() -> ResponseReturnValue:
        return _register_chat_worker(state)

    @route("/functions/v1/update-worker-url", *every)
    @_function(state)
    def update_worker_url() -> ResponseReturnValue:
        return _update_worker_url(state)

    @route("/functions/v1/health-check-workers", *every)
    @_function(state)
    def health_check_workers() -> ResponseReturnValue:
        return _health_check_workers(state)

    @route("/rest/v1/jobs", "GET", "PATCH")
    def jobs() -> ResponseReturnValue:
        return _rows(state)

    return bp


@contextmanager
def running_functions(state: FunctionsState) -> Iterator[str]:
    """Yields the project's URL; a server of its own with these functions and nothing else."""
    app = Flask("supabase")
    app.register_blueprint(functions_blueprint(state))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        state.let_go.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Scripted:
    """A view that first does what the script says, and notes the call."""

    def __init__(self, state: FunctionsState, name: str, work: Callable[[], ResponseReturnValue]):
        self._state = state
        self._name = name
        self._work = work

    def __call__(self) -> ResponseReturnValue:
        content = request.get_data()
        with self._state.lock:
            waiting = self._state.faults.get(self._name)
            fault = waiting.popleft() if waiting else None
        match fault:
            case Say(status, text, headers):
                self._note(content, status)
                said = Response(text, status)
                said.headers.update(headers)  # a wrong Content-Length too
                return said
            case Cut(done=False):
                self._note(content, 0)
                return _cut()
            case Hang(seconds):
                self._state.let_go.wait(seconds)
        answer = make_response(self._work())
        self._note(content, answer.status_code)
        return _cut() if isinstance(fault, Cut) else answer

    def _note(self, content: bytes, status: int) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        with self._state.lock:
            self._state.calls.append(Call(self._name, headers, content, status))


def _cut() -> Response:
    """Close the client's connection; what Flask writes afterwards goes nowhere."""
    connection: socket.socket = request.environ["werkzeug.socket"]
    connection.shutdown(socket.SHUT_RDWR)
    return Response("")


# --- job-callback ------------------------------------------------------------------------------


def _job_callback(state: FunctionsState) -> ResponseReturnValue:
    if request.method == "OPTIONS":
        return "ok"
    if not _has_key(state, "Authorization"):  # the platform's gate, before the function
        return jsonify(code=401, message="Invalid JWT"), 401
    if request.method != "POST":
        return "Method not allowed", 405
    content = request.get_data()
    if state.checks_signatures:
        if state.callback_secret is None:
            return "Server configuration error", 500
        digest = hmac.new(state.callback_secret.encode(), content, hashlib.sha256).hexdigest()
        given = request.headers.get("X-Callback-Signature", "")
        if not hmac.compare_digest(given, f"sha256={digest}"):
            return "Unauthorized", 401
    try:
        payload = json.loads(content)
        with state.lock:
            return _take_callback(state, payload)
    except _Refused as exc:
        return str(exc), 500
    except Exception as exc:
        return jsonify(error="Internal server error", details=str(exc)), 500


class _Refused(Exception):
    """The database does not take it."""


def _take_callback(state: FunctionsState, payload: dict[str, Any]) -> ResponseReturnValue:
    job_id, status = payload.get("jobId") or payload.get("job_id"), payload.get("status")
    if not job_id or not status:
        return "Missing job id or status", 400
    row = state.jobs.get(job_id)
    if row is None or row["status"] in ("completed", "cancelled"):
        return jsonify(success=True, skipped=True)
    if status not in STATUSES:
        raise _Refused("new row violates a check constraint of jobs")
    if "\\u0000" in json.dumps(payload):
        raise _Refused("unsupported Unicode escape sequence")
    told = payload.get("metadata") or {}
    error = payload.get("errorMessage") or payload.get("error_message") or payload.get("error")
    if error is None and told.get("error_type"):
        error = f"{told['error_type']}: no message"
    errors = [key for key in ("errorMessage", "error_message", "error") if key in payload]
    row["metadata"] = {
        **row["metadata"],
        **told,
        "callback_received_at": _now(),
        "original_error_keys": errors,
    }
    row |= {
        "status": status,
        "completed_at": payload.get("completedAt") or _now(),
        "error_message": error,
    }
    if status == "completed":
        legacy = (payload.get("results") or {}).get("assets") or []
        assets = payload.get("assets") or [_of_legacy(asset) for asset in legacy]
        for index, asset in enumerate(assets):
            _insert_asset(state, row, told, index, asset)
        _side_effects(state, row, assets)
    return jsonify(success=True, jobId=job_id, status=status, message="Job callback processed")


def _of_legacy(asset: dict[str, Any]) -> dict[str, Any]:
    return {"type": asset["assetType"], "url": asset["tempStoragePath"], "metadata": {}}


def _insert_asset(
    state: FunctionsState,
    row: dict[str, Any],
    told: dict[str, Any],
    index: int,
    asset: dict[str, Any],
) -> None:
    """A conflict is logged by the real function, and nothing else."""
    if any((one["job_id"], one["asset_index"]) == (row["id"], index) for one in state.assets):
        state.repeated_assets += 1
        return
    path = asset["url"].removeprefix("workspace-temp/")
    thumbnail = asset.get("thumbnail_url")
    suffix = path.rpartition(".")[2].lower()
    video = suffix in ("mp4", "webm", "mov")
    own = asset.get("metadata") or {}
    frames = own.get("frame_num") or told.get("frame_num")
    state.assets.append(
        {
            "job_id": row["id"],
            "user_id": row["user_id"],  # never the payload's
            "asset_type": "video" if video else "image",
            "temp_storage_path": path,
            "thumbnail_path": thumbnail and thumbnail.removeprefix("workspace-temp/"),
            "file_size_bytes": 0,
            "mime_type": "video/mp4" if video else f"image/{'png' if suffix == 'png' else 'jpeg'}",
            "duration_seconds": (math.ceil(frames / 16) if frames else 5) if video else None,
            "asset_index": index,
            # 0 is taken for none.
            "generation_seed": own.get("seed")
            or row["metadata"].get("seed")
            or random.randrange(1_000_000),
            "original_prompt": row["original_prompt"],
            "model_used": row["model_type"] or "sdxl",
            "generation_settings": {
                "quality": row["quality"],
                "format": row["format"],
                "guidance_scale": own.get("guidance_scale"),
                "steps": own.get("steps"),
                "width": own.get("width"),
                "height": own.get("height"),
                "frame_num": frames,
                **told,
            },
        }
    )


def _side_effects(state: FunctionsState, row: dict[str, Any], assets: list[dict[str, Any]]) -> None:
    wanted = row["metadata"]
    if wanted.get("destination") == "character_portrait" and assets:
        seed = (assets[0].get("metadata") or {}).get("seed")
        if seed is not None and not -MAX_INT4 - 1 <= seed <= MAX_INT4:
            raise _Refused("integer out of range")
        state.characters[wanted["character_id"]] = {
            "image_url": assets[0]["url"],
            "reference_image_url": assets[0]["url"],
            "seed_locked": seed,
        }


# --- registration ------------------------------------------------------------------------------


def _function(state: FunctionsState) -> Callable[[Callable[[], ResponseReturnValue]], Any]:
    """What the functions of registration have in common: CORS, OPTIONS, the platform's gate."""

    def wrap(work: Callable[[], ResponseReturnValue]) -> Callable[[], ResponseReturnValue]:
        @wraps(work)
        def view() -> ResponseReturnValue:
            if request.method == "OPTIONS":
                answer = Response("ok")
            elif not _has_key(state, "Authorization"):
                return jsonify(code=401, message="Invalid JWT"), 401
            else:
                answer = make_response(work())
            answer.headers["Access-Control-Allow-Origin"] = "*"
            return answer

        return view

    return wrap


def _register_chat_worker(state: FunctionsState) -> ResponseReturnValue:
    body = request.get_json(silent=True) or {}
    url = body.get("worker_url")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return jsonify(success=False, error="worker_url must be a URL"), 400
    healthy, took_ms = _probed(state, url)
    record = {
        "auto_registered": bool(body.get("auto_registered")),
        "last_health_check": _now(),
        "health_status": "healthy" if healthy else "unhealthy",
        "last_updated": _now(),
        "response_time_ms": took_ms,
    }
    with state.lock:
        state.config["chatWorkerUrl"] = url  # even if it is unhealthy
        state.config["chatWorkerRegistrationInfo"] = record
        # Without workerUrl: one of the callers takes that for "not there".
        state.config.setdefault("workerHealthCache", {})["chatWorker"] = {
            "isHealthy": healthy,
            "lastChecked": _now(),
            "responseTimeMs": took_ms,
        }
    return jsonify(
        success=True,
        workerUrl=url,
        healthStatus=record["health_status"],
        responseTimeMs=took_ms,
        registrationInfo=record,
    )


def _update_worker_url(state: FunctionsState) -> ResponseReturnValue:
    body = request.get_json(silent=True) or {}
    url = body.get("worker_url")
    if not isinstance(url, str) or not url:
        return jsonify(success=False, error="worker_url is required"), 400
    healthy, _ = _probed(state, url)
    if not healthy:
        return jsonify(success=False, error="worker is not reachable"), 400
    now = _now()
    registered = bool(body.get("auto_registered"))
    method, detection = body.get("registration_method"), body.get("detection_method")
    with state.lock:
        state.config |= {
            "workerUrl": url, "worker_url": url, "workerUrlUpdatedAt": now,
            "autoRegistered": registered, "auto_registered": registered,
            "registrationMethod": method, "registration_method": method,
            "detectionMethod": detection, "detection_method": detection,
            "lastRegistrationAttempt": now, "last_health_check": now, "worker_status": "active",
        }  # fmt: skip
    return jsonify(
        success=True,
        message="Worker URL updated",
        worker_url=url,
        updatedAt=now,
        auto_registered=registered,
        registration_method=method,
        detection_method=detection,
    )


def _health_check_workers(state: FunctionsState) -> ResponseReturnValue:
    with state.lock:
        urls = {
            "wanWorker": state.config.get("workerUrl"),
            "chatWorker": state.config.get("chatWorkerUrl"),
        }
    results = {}
    for name, url in urls.items():
        healthy, took_ms = _probed(state, url) if url else (False, 0.0)
        results[name] = {
            "isHealthy": healthy,
            "lastChecked": _now(),
            "responseTimeMs": took_ms,
            "healthError": None if healthy else "unhealthy" if url else "no address",
            "workerUrl": url,
        }
    with state.lock:
        state.config |= {"workerHealthCache": results, "lastHealthCheck": _now()}
    return jsonify(success=True, healthResults=results, timestamp=_now())


def _probed(state: FunctionsState, url: str) -> tuple[bool, float]:
    """Whether /health is 2xx with a body, and the milliseconds that it took."""
    if state.probe is not None:
        return state.probe(url)
    began = time.monotonic()
    try:
        answer = httpx.get(f"{url}/health", timeout=PROBE_TIMEOUT_S, trust_env=False)
        healthy = answer.is_success and bool(answer.text)
    except httpx.TransportError:
        healthy = False
    return healthy, (time.monotonic() - began) * 1000


# --- PostgREST ---------------------------------------------------------------------------------


def _rows(state: FunctionsState) -> ResponseReturnValue:
    """GET and PATCH of `jobs` with filters of the form column=eq.value."""
    if request.headers.get("apikey") != state.service_key:
        return jsonify(message="No API key found in request"), 401
    if not _has_key(state, "Authorization"):
        return jsonify(code="PGRST301", message="JWT could not be decoded"), 401
    filters = {}
    for column, condition in request.args.items():
        if column == "select":
            continue
        operator, _, value = condition.partition(".")
        if operator != "eq":
            return jsonify(code="PGRST100", message="failed to parse filter"), 400
        filters[column] = value
    try:
        uuid.UUID(filters.get("id", str(uuid.UUID(int=0))))
    except ValueError:
        return jsonify(code="22P02", message="invalid input syntax for type uuid"), 400
    with state.lock:
        found = [
            row
            for row in state.jobs.values()
            if all(row.get(column) == value for column, value in filters.items())
        ]
        if request.method == "PATCH":
            return _patch(found, filters, request.get_json(silent=True) or {})
        columns = request.args.get("select", "*").split(",")
        return jsonify(
            [row if columns == ["*"] else {name: row[name] for name in columns} for row in found]
        )


def _patch(
    found: list[dict[str, Any]], filters: dict[str, str], changes: dict[str, Any]
) -> ResponseReturnValue:
    if not filters:
        return jsonify(code="21000", message="UPDATE requires a WHERE clause"), 400
    for row in found:
        if unknown := [name for name in changes if name not in row]:
            return jsonify(code="PGRST204", message=f"no column {unknown[0]}"), 400
        if changes.get("status", "queued") not in STATUSES:
            return jsonify(code="23514", message="violates check constraint"), 400
        row |= changes
    if "return=representation" in request.headers.get("Prefer", ""):
        return jsonify(found)
    return Response(status=204)


def _has_key(state: FunctionsState, header: str) -> bool:
    return hmac.compare_digest(
        request.headers.get(header, "").encode(), f"Bearer {state.service_key}".encode()
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()

"""A worker for tests: a real HTTP server on loopback that behaves as it is told.

It speaks the worker's documented API (docs/http-api.md): /health, /worker/info, chat with a
receipt, jobs with 202. It can also be busy, loading, slow, hanging, broken or dishonest. Its
"tokens" are the UTF-8 bytes of the ChatML text, so that a test can compute them.

    with FakeWorker() as worker:
        worker.behave("busy", retry_after_s=7)
        … worker.url …
"""

from __future__ import annotations

import copy
import hashlib
import json
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

Json = dict[str, Any]

DEFAULT_SAMPLING: Json = {
    "max_tokens": 512,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "stop": [],
}
_KNOWN = {*DEFAULT_SAMPLING, "messages", "model", "seed", "deterministic", "response_format"}
_KNOWN |= {"stream", "sfw_mode", "keep_alive", "deadline_s"}


def canonical_sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def prompt_ids(messages: Sequence[Json]) -> list[int]:
    """The fake's tokens: bytes of the ChatML text."""
    text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    return list(f"{text}<|im_start|>assistant\n".encode())


def ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def identity(model: str) -> Json:
    """What a worker says of a model, in /worker/info and in receipts."""
    return {
        "weights": "sha256:" + hashlib.sha256(model.encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(b"bytes").hexdigest(),
        "template": "chatml",
    }


def honest_receipt(body: Json, *, request_id: str, model: str, text: str) -> Json:
    """What a worker that runs exactly `body` answers with."""
    ids = prompt_ids(body["messages"])
    sampling = {
        key: default if body.get(key) is None else body[key]
        for key, default in DEFAULT_SAMPLING.items()
    }
    if isinstance(sampling["stop"], str):
        sampling["stop"] = [sampling["stop"]]
    schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
    return {
        "request_id": request_id,
        "model": model,
        **identity(model),
        "messages_sha256": canonical_sha256(
            [{"role": one["role"], "content": one["content"]} for one in body["messages"]]
        ),
        "prompt_ids_sha256": ids_sha256(ids),
        "completion_ids_sha256": ids_sha256(list(text.encode())),
        "prompt_tokens": len(ids),
        "prompt_tokens_cached": 0,
        "completion_tokens": 3,
        "context_tokens": 32768,
        "finish_reason": "stop",
        "sampling": sampling,
        "schema_sha256": None
        if schema is None
        else hashlib.sha256(
            json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode()
        ).hexdigest(),
        "seed": 7 if body.get("seed") is None else body["seed"],
        "exactness": "bit" if body.get("deterministic") else "close",
        "ignored": sorted(key for key in body if key not in _KNOWN),
    }


# --- mutations: of the body before it is run, so that the receipt is of what ran … ------------


def _text_changed(body: Json) -> None:
    body["messages"][-1]["content"] += " masterpiece"


def _text_stripped(body: Json) -> None:
    last = body["messages"][-1]
    last["content"] = last["content"].strip()[:-1] or ("" if last["content"] else "…")


def _system_added(body: Json) -> None:
    body["messages"].insert(0, {"role": "system", "content": "You are helpful."})


def _system_empty_added(body: Json) -> None:
    body["messages"].insert(0, {"role": "system", "content": ""})


def _role_changed(body: Json) -> None:
    last = body["messages"][-1]
    last["role"] = "system" if last["role"] != "system" else "user"


def _order_changed(body: Json) -> None:
    body["messages"].append(body["messages"].pop(0))
    if len({(one["role"], one["content"]) for one in body["messages"]}) == 1:
        body["messages"].append(dict(body["messages"][0]))  # all alike: order is no change


def _turn_dropped(body: Json) -> None:
    del body["messages"][len(body["messages"]) // 2]


def _turn_doubled(body: Json) -> None:
    body["messages"].append(dict(body["messages"][-1]))


def _temperature_changed(body: Json) -> None:
    body["temperature"] = 0.35 if body.get("temperature") != 0.35 else 1.25


def _top_k_added(body: Json) -> None:
    body["top_k"] = 40 if body.get("top_k") != 40 else 50


def _max_tokens_changed(body: Json) -> None:
    body["max_tokens"] = (body.get("max_tokens") or 512) + 100


def _stop_added(body: Json) -> None:
    stop = body.get("stop") or []
    body["stop"] = [*([stop] if isinstance(stop, str) else stop), "\n\n\n"]


BEFORE: dict[str, Callable[[Json], None]] = {
    "text_changed": _text_changed,
    "text_stripped": _text_stripped,
    "system_added": _system_added,
    "system_empty_added": _system_empty_added,
    "role_changed": _role_changed,
    "order_changed": _order_changed,
    "turn_dropped": _turn_dropped,
    "turn_doubled": _turn_doubled,
    "temperature_changed": _temperature_changed,
    "top_k_added": _top_k_added,
    "max_tokens_changed": _max_tokens_changed,
    "stop_added": _stop_added,
}

# --- … and lies in the answer ------------------------------------------------------------------


def _other_model(answer: Json, _earlier: Json | None) -> None:
    other = "demo-base" if answer["receipt"]["model"] != "demo-base" else "demo-chat"
    answer["receipt"] |= {"model": other, **identity(other)}


def _other_weights(answer: Json, _earlier: Json | None) -> None:
    answer["receipt"] |= identity("quantised")


def _messages_forged(answer: Json, _earlier: Json | None) -> None:
    answer["receipt"]["messages_sha256"] = hashlib.sha256(b"forged").hexdigest()


def _ids_forged(answer: Json, _earlier: Json | None) -> None:
    answer["receipt"]["prompt_ids_sha256"] = hashlib.sha256(b"other ids").hexdigest()


def _receipt_missing(answer: Json, _earlier: Json | None) -> None:
    del answer["receipt"]


def _receipt_null(answer: Json, _earlier: Json | None) -> None:
    answer["receipt"] = None


def _receipt_replayed(answer: Json, earlier: Json | None) -> None:
    """The receipt of an earlier answer; the same messages may be in it."""
    if earlier is None:
        answer["receipt"]["request_id"] = "of-another-request"
    else:
        answer["receipt"] = copy.deepcopy(earlier)


def _parameter_ignored(answer: Json, _earlier: Json | None) -> None:
    answer["receipt"]["ignored"] = ["model"]


def _counts_changed(answer: Json, _earlier: Json | None) -> None:
    answer["receipt"]["prompt_tokens"] += 5


AFTER: dict[str, Callable[[Json, Json | None], None]] = {
    "other_model": _other_model,
    "other_weights": _other_weights,
    "messages_forged": _messages_forged,
    "ids_forged": _ids_forged,
    "receipt_missing": _receipt_missing,
    "receipt_null": _receipt_null,
    "receipt_replayed": _receipt_replayed,
    "parameter_ignored": _parameter_ignored,
    "counts_changed": _counts_changed,
}

MUTATIONS = (*BEFORE, *AFTER)


def mutated_answer(
    kind: str, body: Json, *, request_id: str, model: str, text: str, earlier: Json | None = None
) -> Json:
    """The 200 body of a worker that does `kind` to `body`, without a server."""
    ran = copy.deepcopy(body)
    if kind in BEFORE:
        BEFORE[kind](ran)
    answer = answer_body(ran, request_id=request_id, model=model, text=text)
    if kind in AFTER:
        AFTER[kind](answer, earlier)
    return answer


def answer_body(body: Json, *, request_id: str, model: str, text: str) -> Json:
    receipt = honest_receipt(body, request_id=request_id, model=model, text=text)
    return {
        "success": True,
        "response": text,
        "generation_time": 0.01,
        "tokens_generated": receipt["completion_tokens"],
        "model_info": {
            "model_name": model,
            "inference_engine": "pure",
            "active_model_type": "instruct",
        },
        "finish_reason": "stop",
        "prompt_tokens": receipt["prompt_tokens"],
        "request_id": request_id,
        "timings": {"queue_s": 0.0, "prefill_s": 0.0, "decode_s": 0.01},
        "receipt": receipt,
    }


# --- the server ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """How the next posts are answered. /health and /worker/info have switches of their own.

    kind: normal | mutate | busy (429) | loading (503) | slow | hang | drop (in mid-body) |
    drop_early (before any byte) | drip (a byte at a time) | not_json | unsuccessful (200 with
    success false) | unauthorized (401) | error (any status) | redirect | huge
    """

    kind: str = "normal"
    mutation: str = "text_changed"
    retry_after_s: float | None = 3
    delay_s: float = 0.2
    status: int = 500
    error_code: str = "internal_error"
    bytes: int = 1 << 26


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any = None


@dataclass
class FakeWorker:
    """Owner of its settings: the test's thread; its server's threads read them."""

    model: str = "demo-chat"
    aliases: tuple[str, ...] = ("qwen_instruct", "instruct")
    answer: str | Callable[[Json], str] = "a red circle on white paper"
    key: str | None = None  # required as Bearer where set
    health_status: int = 200
    health_body: str | None = None  # None: the documented one
    health_delay_s: float = 0.0
    has_info: bool = True
    seen: list[Seen] = field(default_factory=list)
    jobs: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._default = Behaviour()
        self._script: deque[Behaviour] = deque()
        self._lock = Lock()
        self._closing = Event()
        self._earlier: Json | None = None
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.worker = self
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def behave(self, kind: str, **more: Any) -> None:
        """Answer so from now on."""
        with self._lock:
            self._script.clear()
            self._default = Behaviour(kind, **more)

    def script(self, *behaviours: Behaviour) -> None:
        """Answer the next posts so, one each; then as before."""
        with self._lock:
            self._script.extend(behaviours)

    def posts(self, path: str | None = None) -> list[Seen]:
        """Every POST so far, of one path or of all."""
        with self._lock:
            found = [one for one in self.seen if one.method == "POST"]
        return [one for one in found if path is None or one.path == path]

    def gets(self, path: str) -> list[Seen]:
        with self._lock:
            return [one for one in self.seen if one.method == "GET" and one.path == path]

    def close(self) -> None:
        """Stop serving and cut every connection; the port refuses from then on."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()
        self._thread.join()

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Called by the server's threads.

    def record(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def next_behaviour(self) -> Behaviour:
        with self._lock:
            return self._script.popleft() if self._script else self._default

    def wait(self, seconds: float) -> bool:
        """Wait so long; True if the server closes meanwhile."""
        return self._closing.wait(seconds)

    def chat_answer(self, body: Json, request_id: str, mutation: str | None) -> Json:
        text = self.answer if isinstance(self.answer, str) else self.answer(body)
        made = mutated_answer(
            mutation or "none",
            body,
            request_id=request_id,
            model=self.model,
            text=text,
            earlier=self._earlier,
        )
        if mutation is None:
            self._earlier = copy.deepcopy(made["receipt"])
        return made

    def info(self) -> Json:
        others = [] if self.model == "demo-base" else [("demo-base", ["qwen_base", "base"])]
        return {
            "worker_type": "pure_inference_engine",
            "version": "0",
            "model": self.model,
            "capabilities": CAPABILITIES,
            "model_loaded": True,
            "models": [
                {
                    "id": name,
                    "kind": "chat",
                    "aliases": list(aliases),
                    "status": "loaded",
                    **identity(name),
                }
                for name, aliases in [(self.model, self.aliases), *others]
            ],
            "endpoints": ENDPOINTS,
        }


CAPABILITIES = {"chat": True, "enhancement": True, "generation": True, "pure_inference": True}
ENDPOINTS = ["/chat", "/enhance", "/generate", "/health", "/worker/info"]


def closed_port_url() -> str:
    """A URL on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    worker: FakeWorker

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._open: set[socket.socket] = set()
        self._open_lock = Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        with self._open_lock:
            for one in self._open:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the other side was first

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests hang up; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        worker = self.server.worker
        worker.record(Seen("GET", self.path, dict(self.headers)))
        if self.path == "/health":
            if worker.health_delay_s and worker.wait(worker.health_delay_s):
                return
            text = worker.health_body
            if text is None:
                text = json.dumps(
                    {"status": "healthy", "endpoints": ENDPOINTS, "capabilities": CAPABILITIES}
                )
            self._send(worker.health_status, text.encode())
        elif self.path == "/worker/info" and worker.has_info:
            self._json(200, worker.info())
        else:
            self._error(404, "not_found")

    def do_POST(self) -> None:
        worker = self.server.worker
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw)
        worker.record(Seen("POST", self.path, dict(self.headers), body))
        if worker.key is not None and self.headers.get("Authorization") != f"Bearer {worker.key}":
            return self._error(401, "unauthorized")
        self._behave(worker, worker.next_behaviour(), body)

    def _behave(self, worker: FakeWorker, how: Behaviour, body: Json) -> None:
        match how.kind:
            case "busy":
                self._error(429, "busy", how.retry_after_s)
            case "loading":
                self._error(503, "engine_unavailable", how.retry_after_s)
            case "unauthorized":
                self._error(401, "unauthorized")
            case "error":
                self._error(how.status, how.error_code)
            case "redirect":
                self._send(307, b"", {"Location": "http://127.0.0.1:9/chat"})
            case "not_json":
                self._send(200, b"<html>502 Bad Gateway</html>", content_type="text/html")
            case "unsuccessful":
                self._json(200, {"success": False, "error": "no", "error_code": "internal_error"})
            case "hang":
                worker.wait(60)
                self.close_connection = True
            case "drop_early":
                self.close_connection = True
            case "drop":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"success": true, "resp')
                self.close_connection = True
            case "drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(1000):
                    self.wfile.write(b" ")
                    if worker.wait(0.02):
                        return
            case "huge":
                self.send_response(200)
                self.send_header("Content-Length", str(how.bytes))
                self.end_headers()
                for _ in range(how.bytes >> 16):
                    self.wfile.write(b" " * (1 << 16))
            case "slow":
                if not worker.wait(how.delay_s):
                    self._work(worker, body, None)
            case "mutate":
                self._work(worker, body, how.mutation)
            case "normal":
                self._work(worker, body, None)
            case unknown:
                raise ValueError(f"no behaviour {unknown}")

    def _work(self, worker: FakeWorker, body: Json, mutation: str | None) -> None:
        request_id = self.headers.get("X-Request-Id", "made-here")
        if self.path in ("/chat", "/enhance") or (self.path == "/generate" and "messages" in body):
            default = 200 if self.path == "/enhance" else 512
            ran = {**body, "max_tokens": body.get("max_tokens") or default}
            answer = worker.chat_answer(ran, request_id, mutation)
            if self.path == "/enhance":
                answer["enhanced_prompt"] = answer.pop("response")
            self._json(200, answer)
        elif self.path == "/generate":
            job_id = body.get("id") or body.get("job_id") or f"job-{len(worker.jobs) + 1}"
            if worker.jobs.setdefault(job_id, body) != body:
                return self._error(409, "conflict")
            where = f"/jobs/{job_id}"
            self._json(
                202,
                {"success": True, "job_id": job_id, "status": "queued", "status_url": where},
                {"Location": where},
            )
        else:
            self._error(404, "not_found")

    def _error(self, status: int, code: str, retry_after_s: float | None = None) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(round(retry_after_s))}
        body: Json = {"success": False, "error": f"the worker says {code}", "error_code": code}
        if retry_after_s is not None:
            body["retry_after_s"] = retry_after_s
        self._json(status, body, headers)

    def _json(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body, ensure_ascii=False).encode(), headers)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

"""What a port is and how it is, from what is known without asking anybody.

Open routes: clients probe them without a key, one of them before every single enhancement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from worker import __version__
from worker.catalog import Catalog
from worker.errors import JournalUnavailable
from worker.front import errors
from worker.front.chat import GATEWAY_ROUTE, KNOWN_KEYS, ChatStats
from worker.front.drain import Drainer
from worker.jobs.journal import Journal
from worker.jobs.types import JOB_TYPES
from worker.protocol.link import EngineView, Link
from worker.protocol.messages import ModelState

WORKER_TYPE = "pure_inference_engine"
_PURE = {"hardcoded_prompts": False, "prompt_modification": False, "pure_inference": True}
CHAT_CAPABILITIES = {"chat": True, "enhancement": True, "generation": True, **_PURE}
MEDIA_CAPABILITIES = {"image": True, "video": True, "completion": True, **_PURE}
GB = 1 << 30


@dataclass(frozen=True, slots=True)
class Condition:
    """How an engine is, in a word, and what is wrong."""

    status: str  # healthy | starting | loading | degraded | unavailable | draining
    problems: tuple[str, ...] = ()
    next_try_s: float | None = None

    @property
    def http_status(self) -> int:
        """503 only when a request sent now would be refused for a lasting reason: a prober that
        looks while a model loads must not take the worker off its list."""
        return 503 if self.status in ("unavailable", "draining") else 200


def condition(view: EngineView, draining: bool) -> Condition:
    """What /health says. Pure."""
    if draining:
        return Condition("draining", ("the daemon is stopping",))
    if view.state is None:
        if view.notice is None:
            return Condition("starting")
        problem = f"{view.name}: {view.notice.cause}"
        return Condition("unavailable", (problem,), view.notice.next_try_s)
    models = view.state.models
    problems = tuple(model.problem for model in models if model.problem)
    if view.state.status != "ready":
        return Condition(view.state.status, problems)
    if problems and all(model.problem for model in models):
        return Condition("unavailable", problems)
    return Condition("degraded" if problems else "healthy", problems)


class Reporter:
    """Puts reports together from links, counters and the clock. Reads only."""

    def __init__(self, catalog: Catalog, link: Link, drainer: Drainer):
        self.catalog = catalog
        self.link = link
        self.drainer = drainer
        self._started = time.monotonic()
        self._startup_time = time.time()

    def model(self, name: str) -> ModelState | None:
        """State of the model that answers to `name`."""
        names = {spec.id for spec in self.catalog.specs if name in (spec.id, *spec.aliases)}
        return next((model for model in self.models() if model.id in names), None)

    def models(self) -> tuple[ModelState, ...]:
        state = self.link.view.state
        return state.models if state is not None else ()

    def is_loaded(self, name: str) -> bool:
        model = self.model(name)
        return model is not None and model.status == "loaded"

    def health(self, more: dict[str, Any], stats: dict[str, Any]) -> ResponseReturnValue:
        now = condition(self.link.view, self.drainer.draining)
        state = self.link.view.state
        counters = state.counters if state is not None else {}
        body = {
            "status": now.status,
            "worker_type": WORKER_TYPE,
            "no_hardcoded_prompts": True,
            "version": __version__,
            "uptime": round(time.monotonic() - self._started, 3),
            "timestamp": time.time(),
            "model_loaded": any(model.status == "loaded" for model in self.models()),
            "device": state.device if state is not None else None,
            "problems": list(now.problems),
            "stats": {
                "startup_time": self._startup_time,
                "requests_served": counters.get("requests_served", 0),
                "model_loads": counters.get("model_loads", 0),
                "model_unloads": counters.get("model_unloads", 0),
                **stats,
            },
            **more,
        }
        if now.http_status == 200:
            return body
        text = "; ".join(now.problems)
        answer = jsonify(
            {
                **errors.body(f"health_{now.status}", text),
                "status": now.status,
                "model_loaded": body["model_loaded"],
                "uptime": body["uptime"],
                "next_try_s": now.next_try_s,
            }
        )
        answer.status_code = now.http_status
        retry_after_s = self.drainer.retry_after_s if self.drainer.draining else now.next_try_s
        if retry_after_s is not None:
            answer.headers["Retry-After"] = str(max(1, round(retry_after_s)))
        return answer

    def models_body(self) -> list[dict[str, Any]]:
        """Every served model, as /worker/info lists them."""
        states = {model.id: model for model in self.models()}
        return [
            {
                "id": spec.id,
                "kind": spec.kind,
                "aliases": list(spec.aliases),
                "display_name": spec.display_name,
                "dtype": spec.dtype,
                "status": states[spec.id].status if spec.id in states else "unknown",
                "device": states[spec.id].device if spec.id in states else None,
                "weight_bytes": states[spec.id].weight_bytes if spec.id in states else 0,
                **(states[spec.id].details if spec.id in states else {}),
            }
            for spec in self.catalog.specs
        ]


def chat_blueprint(
    reporter: Reporter, stats: ChatStats, endpoints: Callable[[], list[str]]
) -> Blueprint:
    """GET /health, /worker/info and /enhancement/info of the chat port."""
    bp = Blueprint("health", __name__)

    @bp.get("/health")
    def health_route() -> ResponseReturnValue:
        return reporter.health(
            {"endpoints": endpoints(), "capabilities": CHAT_CAPABILITIES},
            {
                "sfw_requests": stats.sfw_requests,
                "base_model_uses": stats.base_model_uses,
                "instruct_model_uses": stats.instruct_model_uses,
            },
        )

    @bp.get("/worker/info")
    def info_route() -> ResponseReturnValue:
        default = reporter.catalog.default("chat")
        loaded = chat_loaded(reporter)
        return {
            "worker_type": WORKER_TYPE,
            "version": __version__,
            "model": default.display_name,
            "capabilities": CHAT_CAPABILITIES,
            "models_loaded": loaded,
            "model_loaded": any(model.status == "loaded" for model in reporter.models()),
            "models": reporter.models_body(),
            "endpoints": endpoints(),
            "stats": dict(reporter.link.view.state.counters) if reporter.link.view.state else {},
            "message_format": {
                "required": ["messages"],
                "optional": sorted(KNOWN_KEYS - {"messages"}),
                "example": {
                    "messages": [{"role": "user", "content": "a red circle"}],
                    "max_tokens": 62,
                },
            },
        }

    @bp.get("/enhancement/info")
    def enhancement_route() -> ResponseReturnValue:
        shown = ("id", "aliases", "display_name", "status", "context_tokens", "tokenizer_sha256",
                 "template", "template_sha256")  # fmt: skip
        return {
            "worker_type": WORKER_TYPE,
            "accepts": "messages",
            "prompt_logic": "none",
            "note": "messages run as they arrive; a bare prompt is turned into messages by the "
            f"prompt gateway: POST {GATEWAY_ROUTE} (port 7862)",
            "routes": [one for one in endpoints() if one.startswith("/enhance/")] + ["/enhance"],
            "default_model": reporter.catalog.default("chat").id,
            "models": [{key: model.get(key) for key in shown} for model in reporter.models_body()],
        }

    return bp


def media_blueprint(
    reporter: Reporter, journal: Journal, endpoints: Callable[[], list[str]]
) -> Blueprint:
    """GET /health, /worker/info and / of the image and video port."""
    bp = Blueprint("health", __name__)

    @bp.get("/health")
    def health_route() -> ResponseReturnValue:
        counts, problem = _job_counts(journal)
        return reporter.health(
            {
                "journal": problem or "ok",
                "endpoints": endpoints(),
                "capabilities": MEDIA_CAPABILITIES,
                "sdxl_model_loaded": _kind_loaded(reporter, "sdxl"),
                "wan_model_loaded": _kind_loaded(reporter, "wan"),
                "worker_ready": condition(reporter.link.view, reporter.drainer.draining).status
                in ("healthy", "degraded"),
            },
            {f"jobs_{status}": count for status, count in counts.items()},
        )

    @bp.get("/worker/info")
    def info_route() -> ResponseReturnValue:
        return {
            "worker_type": WORKER_TYPE,
            "version": __version__,
            "capabilities": MEDIA_CAPABILITIES,
            "model_loaded": any(model.status == "loaded" for model in reporter.models()),
            "models": reporter.models_body(),
            "job_types": sorted(JOB_TYPES),
            "endpoints": endpoints(),
            "jobs": _job_counts(journal)[0],
        }

    @bp.get("/")
    def index_route() -> ResponseReturnValue:
        return {"service": "verbatim media", "status": "online", "endpoints": endpoints()}

    return bp


def status_blueprint(reporter: Reporter, journal: Journal) -> Blueprint:
    """GET /status of the image and video port: what is being worked on."""
    bp = Blueprint("status", __name__)

    @bp.get("/status")
    def status_route() -> ResponseReturnValue:
        state = reporter.link.view.state
        return {
            "worker_type": WORKER_TYPE,
            "status": condition(reporter.link.view, reporter.drainer.draining).status,
            "models": [model.id for model in reporter.models() if model.status == "loaded"],
            "batch_support": [1, 3, 6],
            "quality_tiers": ["fast", "high"],
            "thumbnail_generation": True,
            "jobs": _job_counts(journal)[0],
            "engine_active": state.active if state is not None else 0,
            "engine_waiting": state.waiting if state is not None else 0,
        }

    return bp


def debug_blueprint() -> Blueprint:
    """GET /debug/env: names of the environment variables, never their values."""
    bp = Blueprint("debug_env", __name__)

    @bp.get("/debug/env")
    def env_route() -> ResponseReturnValue:
        return {"names": sorted(os.environ)}

    return bp


def debug_model_blueprint(reporter: Reporter) -> Blueprint:
    """GET /debug/model: which models are loaded, and where."""
    bp = Blueprint("debug_model", __name__)

    @bp.get("/debug/model")
    def model_route() -> ResponseReturnValue:
        instruct, base = reporter.model("qwen_instruct"), reporter.model("qwen_base")
        state = reporter.link.view.state
        return {
            **chat_loaded(reporter),
            "devices": {
                "instruct": instruct.device if instruct is not None else None,
                "base": base.device if base is not None else None,
            },
            "models": reporter.models_body(),
            "stats": dict(state.counters) if state is not None else {},
        }

    return bp


def chat_loaded(reporter: Reporter) -> dict[str, Any]:
    """Which of the two models that clients know by name are loaded."""
    instruct, base = reporter.is_loaded("qwen_instruct"), reporter.is_loaded("qwen_base")
    active = "instruct" if instruct else "base" if base else None
    return {"instruct_loaded": instruct, "base_loaded": base, "active_model_type": active}


def _job_counts(journal: Journal) -> tuple[dict[str, int], str | None]:
    """Jobs by status, and why they cannot be counted: the port answers all the same."""
    try:
        return journal.counts(), None
    except JournalUnavailable as exc:
        return {}, str(exc)


def _kind_loaded(reporter: Reporter, kind: str) -> bool:
    return any(model.kind == kind and model.status == "loaded" for model in reporter.models())

"""The two Flask apps. A front parses, asks and answers; it knows no torch and no model."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry

from worker.catalog import Catalog
from worker.config import Settings
from worker.errors import has_trap_word
from worker.front import chat as chat_routes
from worker.front import errors, health, media, memory, metrics, plan
from worker.front.admission import Admission
from worker.front.auth import LEVELS, Gate, Level
from worker.front.drain import Drainer
from worker.log import set_request_id
from worker.protocol.link import Link
from worker.vram.jobplan import JobPlanner
from worker.vram.planner import Sizer
from worker.vram.tokenizers import Tokenizers

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What a draining front still answers: reading is always allowed.
_NEW_WORK = frozenset({("POST", "chat"), ("POST", "media"), ("POST", "debug")})
# Connections that wait on a job (SSE, Prefer: wait), of the media front.
MAX_WATCHERS = 32
# Threads beyond those that may wait for an engine, so that /health never queues behind them.
SPARE_THREADS = 24


@dataclass(frozen=True, slots=True)
class Front:
    """What both apps are made of."""

    settings: Settings
    keys: Sequence[str]
    drainer: Drainer
    chat_catalog: Catalog
    media_catalog: Catalog
    chat_link: Link
    ask: plan.Ask  # the orchestrator
    sizer: Sizer
    tokenizers: Tokenizers


def places(settings: Settings) -> int:
    """Chat requests that may run or wait at a time."""
    return settings.chat.max_running + settings.chat.max_waiting


def threads(settings: Settings, name: str) -> int:
    """HTTP threads of a front, so that nothing that waits can hold up what answers at once."""
    watchers = MAX_WATCHERS if name == "media" else 0
    return places(settings) + watchers + SPARE_THREADS


def create_chat_app(front: Front, admission: Admission) -> Flask:
    """Port 7861."""
    app, registry = _base(front, "chat")
    parser = chat_routes.ChatParser(front.chat_catalog, front.settings.chat, front.settings.limits)
    chat_metrics = metrics.ChatMetrics(registry)
    service = chat_routes.ChatService(front.chat_link, admission, chat_metrics.observe)
    stats = chat_routes.ChatStats()
    reporter = health.Reporter(front.chat_catalog, front.chat_link, front.drainer)
    registry.register(metrics.EngineMetrics(reporter, admission, None))
    registry.register(metrics.LedgerMetrics(front.ask))
    app.register_blueprint(health.chat_blueprint(reporter, stats, _endpoints(app)))
    app.register_blueprint(chat_routes.blueprint(parser, service, stats))
    app.register_blueprint(chat_routes.debug_blueprint(parser, service))
    app.register_blueprint(health.debug_model_blueprint(reporter))
    app.register_blueprint(memory.blueprint(reporter, front.ask, default="instruct"))
    app.register_blueprint(plan.blueprint(_planning(front, parser, service)))
    app.register_blueprint(metrics.blueprint(registry))
    return app


def create_media_app(
    front: Front,
    admission: Admission,
    link: Link,
    desk: media.JobDesk,
) -> Flask:
    """Port 7860. `link` leads to the media engine; `front.chat_link` serves raw completion."""
    app, registry = _base(front, "media")
    catalog = front.media_catalog
    parser = chat_routes.ChatParser(front.chat_catalog, front.settings.chat, front.settings.limits)
    service = media.MediaService(
        catalog,
        front.settings.limits,
        front.settings.media.exactness,
        front.settings.media.max_waiting,
        desk,
        Admission(MAX_WATCHERS),
    )
    reporter = health.Reporter(catalog, link, front.drainer)
    registry.register(metrics.EngineMetrics(reporter, admission, desk.journal))
    registry.register(metrics.LedgerMetrics(front.ask))
    app.register_blueprint(health.media_blueprint(reporter, desk.journal, _endpoints(app)))
    app.register_blueprint(health.status_blueprint(reporter, desk.journal))
    app.register_blueprint(health.debug_blueprint())
    completion = chat_routes.ChatService(
        front.chat_link, admission, metrics.ChatMetrics(registry).observe
    )
    app.register_blueprint(media.blueprint(service, parser, completion))
    app.register_blueprint(memory.blueprint(reporter, front.ask, default="all"))
    app.register_blueprint(plan.blueprint(_planning(front, parser, completion)))
    app.register_blueprint(metrics.blueprint(registry))
    return app


def _planning(
    front: Front, parser: chat_routes.ChatParser, chat: chat_routes.ChatService
) -> plan.PlanService:
    settings = front.settings
    planner = JobPlanner(
        front.sizer,
        front.tokenizers,
        long_prompts=settings.media.long_prompts,
        most_pictures=settings.limits.images,
    )
    return plan.PlanService(
        planner,
        front.sizer,
        front.media_catalog,
        settings.limits,
        settings.media.exactness,
        parser,
        chat,
        front.ask,
    )


def _base(front: Front, name: str) -> tuple[Flask, CollectorRegistry]:
    app = Flask(f"verbatim {name}", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = front.settings.limits.body_bytes
    app.url_map.merge_slashes = False  # its redirects are pages, and no client follows them
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    registry = CollectorRegistry()
    http = metrics.HttpMetrics(registry)
    gate = Gate(front.keys, front.settings.access.keyless_inference)
    errors.register(app)

    @app.before_request
    def begin() -> None:
        g.began = time.perf_counter()
        g.request_id = _request_id(request.headers.get("X-Request-Id"))
        set_request_id(g.request_id)
        if request.method == "OPTIONS" or request.endpoint is None:
            return  # a probe for the route, or a 404: neither needs a key
        area = request.blueprint or ""
        gate.check(LEVELS.get(area, Level.ADMIN), request.headers.get("Authorization"))
        if (request.method, area) in _NEW_WORK:
            front.drainer.refuse_new_work()

    @app.after_request
    def end(answer: Response) -> Response:
        answer.headers["X-Request-Id"] = g.request_id
        seconds = time.perf_counter() - g.began
        route = request.url_rule.rule if request.url_rule is not None else "(none)"
        http.observe(route, request.method, answer.status_code, seconds)
        if route not in ("/health", "/metrics"):  # probed every few seconds; counted above
            log.info("%s %s %d %.0f ms", request.method, route, answer.status_code, seconds * 1e3)
        return answer

    return app, registry


def _request_id(given: str | None) -> str:
    """The client's id, when it is one that may stand in a log line and in an error body."""
    if given is not None and _REQUEST_ID.fullmatch(given) and not has_trap_word(given):
        return given
    return uuid.uuid4().hex


def _endpoints(app: Flask) -> Callable[[], list[str]]:
    """Every route of the app, once: /a/{b} for Flask's /a/<b>."""

    def listed() -> list[str]:
        rules = {rule.rule for rule in app.url_map.iter_rules()}
        return sorted(re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule) for rule in rules)

    return listed

"""The Flask app of port 7862: who asks, what may be asked, and where it goes.

FUNCTION_ROUTES and API_ROUTES are what needs nothing but the services; the composition root adds
the routes of flows and jobs. A route says with `needs` whom it lets in (gateway/front/access.py);
one that says nothing is closed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from flask import Flask, Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.openapi import OpenAPI

from gateway.front import (
    access,
    admin_access,
    admin_audit,
    admin_characters,
    admin_dry_run,
    admin_rows,
    admin_templates,
    cache_routes,
    catalogue,
    errors,
    health,
    limits,
    metrics,
    openapi,
    page,
    revision,
)
from gateway.front.metrics import HttpMetrics
from gateway.front.services import Services
from gateway.log import set_request_id

log = logging.getLogger(__name__)

Routes = Callable[[Services], APIBlueprint]

FUNCTIONS_PREFIX = "/functions/v1"

# Served with FUNCTIONS_PREFIX and without it, and to browsers of any origin (CORS).
FUNCTION_ROUTES: tuple[Routes, ...] = (cache_routes.function_blueprint,)
# Served once, to programs and to pages of this origin.
API_ROUTES: tuple[Routes, ...] = (
    health.blueprint,
    metrics.blueprint,
    cache_routes.blueprint,
    catalogue.blueprint,
    admin_templates.blueprint,
    admin_dry_run.blueprint,
    admin_characters.blueprint,
    *admin_rows.blueprints(),
    admin_access.blueprint,
    admin_audit.blueprint,
)

_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": (
        "authorization, x-client-info, apikey, content-type, x-request-id, "
        f"{revision.MIN_REVISION.lower()}"
    ),
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Expose-Headers": f"X-Request-Id, {revision.REVISION}, {revision.LEVEL}",
    "Access-Control-Max-Age": "86400",
}
_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_QUIET = frozenset({"/health", "/metrics"})  # probed every few seconds, and counted


def create_app(
    services: Services,
    function_routes: Sequence[Routes] = FUNCTION_ROUTES,
    api_routes: Sequence[Routes] = API_ROUTES,
) -> OpenAPI:
    """The app with these routes. Opens nothing: the services are ready, or become so by
    themselves."""
    app = openapi.base_app("gateway")
    app.request_class = limits.JsonRequest
    app.config["MAX_CONTENT_LENGTH"] = services.settings.section.body_bytes
    app.url_map.merge_slashes = False  # its redirects are pages, and no client follows them
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.validation_error_callback = errors.invalid_body
    errors.register(app)
    browsers = frozenset(_register_functions(app, [make(services) for make in function_routes]))
    for make in api_routes:
        app.register_api(make(services))
    app.register_blueprint(page.blueprint(lambda: openapi.document(app)))
    _frame(app, services, browsers)
    return app


def _register_functions(app: OpenAPI, blueprints: Sequence[APIBlueprint]) -> list[str]:
    """Register each with the prefix and without; returns the names that they got."""
    names = []
    for one in blueprints:
        prefix = FUNCTIONS_PREFIX + (one.url_prefix or "")
        app.register_api(one)
        app.register_api(one, url_prefix=prefix, name=f"functions_{one.name}")
        names += [one.name, f"functions_{one.name}"]
    return names


def _frame(app: Flask, services: Services, browsers: frozenset[str]) -> None:
    """What happens before and after every view. browsers: blueprints that answer with CORS."""
    counts = HttpMetrics(services.registry)

    @app.before_request
    def begin() -> None:
        g.began = time.perf_counter()
        g.request_id = limits.request_id()
        set_request_id(g.request_id)
        limits.check_size()
        access.check(app, services.gate)

    @app.after_request
    def end(answer: Response) -> Response:
        answer.headers["X-Request-Id"] = g.request_id
        revision.mark(answer)
        for name, value in _SECURITY.items():
            answer.headers.setdefault(name, value)
        if request.blueprint in browsers:
            answer.headers.update(_CORS)
        seconds = time.perf_counter() - g.began
        route = request.url_rule.rule if request.url_rule is not None else "(none)"
        counts.observe(route, request.method, answer.status_code, seconds)
        if "held" in g:
            counts.used(g.held)
        if route not in _QUIET:
            log.info("%s %s %d %.0f ms", request.method, route, answer.status_code, seconds * 1e3)
        return answer

"""GET /metrics for Prometheus, and GET /api/metrics for people."""

from __future__ import annotations

from flask import Response
from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from gateway.access.caller import Scope
from gateway.cache.holder import Held
from gateway.front.access import needs
from gateway.front.services import Services

# Seconds: a resolution is below the first, an enhancement between the middle ones.
_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 90)
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})


class HttpMetrics:
    """Counts and times of HTTP answers. Any thread: the library locks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers = Counter(
            "gateway_http_requests",
            "HTTP answers by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "gateway_http_seconds",
            "Seconds from a request's headers to the end of its answer's headers.",
            ("route",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._levels = Counter(
            "gateway_fallback_level",
            "Answers that used prompts, by their fallback level.",
            ("level",),
            registry=registry,
        )
        self._revision = Gauge(
            "gateway_config_revision",
            "The revision that the last such answer used.",
            registry=registry,
        )

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        # A client may invent methods; each label value is kept for ever.
        known = method if method in METHODS else "other"
        self._answers.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def used(self, held: Held) -> None:
        self._levels.labels(str(held.level)).inc()
        self._revision.set(held.snapshot.revision)


class MetricsQuery(BaseModel):
    hours: float = Field(24.0, gt=0, le=24 * 90, description="How far back, in hours")


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("metrics", __name__, abp_tags=[Tag(name="operation")])

    @api.get("/metrics", summary="Counters for Prometheus")
    @needs(Scope.VIEWER)
    def prometheus() -> ResponseReturnValue:
        return Response(generate_latest(services.registry), content_type=CONTENT_TYPE_LATEST)

    @api.get("/api/metrics", summary="Times, hit rate, fallback levels, tokens of the last hours")
    @needs(Scope.VIEWER)
    def summary(query: MetricsQuery) -> ResponseReturnValue:
        return {"success": True, **services.metrics.summary(query.hours)}

    return api

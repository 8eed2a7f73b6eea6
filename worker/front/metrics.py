"""GET /metrics for Prometheus."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator

from flask import Blueprint, Response
from flask.typing import ResponseReturnValue
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from worker.errors import JournalUnavailable
from worker.front.admission import Admission
from worker.front.health import Reporter
from worker.jobs.journal import Journal
from worker.protocol.control import Query
from worker.protocol.messages import Generated, LedgerQuery, LedgerReport, Message

log = logging.getLogger(__name__)

# Seconds: /health is below the first, a video above the last but one.
_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 90)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})


class HttpMetrics:
    """Counts and times of HTTP answers."""

    def __init__(self, registry: CollectorRegistry):
        self._answers = Counter(
            "verbatim_http_requests",
            "HTTP answers by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "verbatim_http_seconds",
            "Seconds from a request's headers to the end of its answer's headers.",
            ("route",),
            buckets=_BUCKETS,
            registry=registry,
        )

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        # A client may invent methods; each label value is kept for ever.
        known = method if method in METHODS else "other"
        self._answers.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class ChatMetrics:
    """Times of generations that came to their end, as the engine measured them."""

    def __init__(self, registry: CollectorRegistry):
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self._first = histogram(
            "verbatim_ttft_seconds",
            "Seconds from a request's arrival to its first token.",
            _BUCKETS,
        )
        self._between = histogram(
            "verbatim_inter_token_seconds",
            "Mean seconds between two tokens of an answer.",
            _TOKEN_BUCKETS,
        )
        self._queued = histogram(
            "verbatim_queue_seconds", "Seconds until the first pass over a request.", _BUCKETS
        )

    def observe(self, answer: Generated) -> None:
        self._queued.observe(answer.queue_s)
        self._first.observe(answer.queue_s + answer.prefill_s)
        if answer.completion_tokens > 1:
            self._between.observe(answer.decode_s / (answer.completion_tokens - 1))


class EngineMetrics(Collector):
    """What the engine last said of itself, read when somebody scrapes."""

    def __init__(self, reporter: Reporter, admission: Admission, journal: Journal | None):
        self._reporter = reporter
        self._admission = admission
        self._journal = journal

    def collect(self) -> Iterator[Metric]:
        state = self._reporter.link.view.state
        yield _gauge("verbatim_engine_up", "1 while the engine answers.", state is not None)
        yield _gauge(
            "verbatim_requests_in_flight",
            "Requests of this port that run or wait.",
            self._admission.taken,
        )
        if self._journal is not None:
            jobs = GaugeMetricFamily("verbatim_jobs", "Jobs by status.", labels=["status"])
            outbox = GaugeMetricFamily(
                "verbatim_outbox", "Deliveries by state, and open uploads.", labels=["state"]
            )
            try:
                for status, count in self._journal.counts().items():
                    jobs.add_metric([status], count)
                for state_, count in self._journal.outbox_counts().items():
                    outbox.add_metric([state_], count)
            except JournalUnavailable:
                log.exception("jobs cannot be counted")
            yield jobs
            yield outbox
        if state is None:
            return
        yield _gauge("verbatim_engine_waiting", "Requests waiting in the engine.", state.waiting)
        yield _gauge("verbatim_engine_active", "Requests being worked on.", state.active)
        yield _gauge("verbatim_engine_rss_bytes", "Resident memory.", state.rss_bytes)
        yield _gauge("verbatim_device_free_bytes", "Free device memory.", state.device_free_bytes)
        loaded = GaugeMetricFamily("verbatim_model_loaded", "1 while loaded.", labels=["model"])
        for model in state.models:
            loaded.add_metric([model.id], float(model.status == "loaded"))
        yield loaded
        # Totals since the engine's start: it restarts on its own, so they are gauges here.
        totals = GaugeMetricFamily(
            "verbatim_engine_total", "Totals since the engine started.", labels=["what"]
        )
        for name, value in state.counters.items():
            totals.add_metric([name], value)
        yield totals
        now = GaugeMetricFamily(
            "verbatim_engine_now", "What the engine holds now.", labels=["what"]
        )
        for name, value in state.gauges.items():
            now.add_metric([name], value)
        yield now


class LedgerMetrics(Collector):
    """The orchestrator's ledger of device memory, asked when somebody scrapes."""

    def __init__(self, ask: Callable[[Query], Message | None]):
        self._ask = ask

    def collect(self) -> Iterator[Metric]:
        report = self._ask(LedgerQuery(request_id=uuid.uuid4().hex))
        known = isinstance(report, LedgerReport)
        yield _gauge("verbatim_ledger_up", "1 while the orchestrator answers.", known)
        if not isinstance(report, LedgerReport):
            return
        yield _gauge("verbatim_ledger_budget_bytes", "Device memory.", report.budget_bytes)
        yield _gauge("verbatim_ledger_free_bytes", "Granted to nobody.", report.free_bytes)
        yield _gauge("verbatim_ledger_waiting", "Phases that wait.", len(report.waiting))
        yield _gauge(
            "verbatim_ledger_drift_ratio",
            "What engines hold more than the ledger says, of the budget; an alarm above 0.02.",
            report.drift,
        )
        held = GaugeMetricFamily(
            "verbatim_tenant_bytes", "Device memory by tenant.", labels=["tenant"]
        )
        for one in report.tenants:
            held.add_metric([one["tenant"]], one["held_bytes"])
        yield held
        totals = GaugeMetricFamily(
            "verbatim_ledger_total", "Totals since the orchestrator started.", labels=["what"]
        )
        for name, value in report.counters.items():
            totals.add_metric([name], value)
        yield totals


def blueprint(registry: CollectorRegistry) -> Blueprint:
    bp = Blueprint("metrics", __name__)

    @bp.get("/metrics")
    def metrics_route() -> ResponseReturnValue:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    return bp


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))

"""How every worker is: one value for each URL, from probes of GET /health.

Healthy is 2xx with a body that is not empty, as existing clients have it: a worker answers 200
while a model loads, and 503 only for what lasts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from threading import Event, Lock, Thread
from typing import Any, Protocol

from gateway.errors import StoreUnavailable
from gateway.workers.client import Answer, CallFailed, WorkerClient
from gateway.workers.registry import WorkerRegistry

log = logging.getLogger(__name__)

PROBE_S = 5.0  # what existing clients give /health
HEALTHY_EVERY_S = 15.0
UNHEALTHY_EVERY_S = 5.0
TICK_S = 1.0
MAX_PROBES = 4  # at a time, from the loop
STORE_EVERY_S = 60.0  # an unchanged state is written to the table no more often
MAX_ENDPOINTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a probe of one worker found."""

    worker_url: str
    is_healthy: bool
    last_checked: datetime
    response_time_ms: float | None
    health_error: str | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    endpoints: tuple[str, ...] = ()
    checked_at: float  # monotonic seconds

    def to_json(self) -> dict[str, Any]:
        """As a health cache of existing clients has it; workerUrl is always there."""
        return {
            "isHealthy": self.is_healthy,
            "lastChecked": iso(self.last_checked),
            "responseTimeMs": self.response_time_ms,
            "healthError": self.health_error,
            "workerUrl": self.worker_url,
        }


def judge(url: str, result: Answer | CallFailed, *, at: datetime, now: float) -> Health:
    """The health that a probe's result means. Pure."""
    ms = round(result.ms, 1)
    if isinstance(result, CallFailed):
        error = f"no answer from /health: {result}"
        return Health(
            worker_url=url,
            is_healthy=False,
            last_checked=at,
            response_time_ms=ms,
            health_error=error,
            checked_at=now,
        )
    body = result.object() or {}
    capabilities, listed = body.get("capabilities"), body.get("endpoints")
    endpoints = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
    error_text = None
    if not result.is_success:
        error_text = f"/health answered {result.status}"
    elif not result.body.strip():
        error_text = f"/health answered {result.status} with an empty body"
    return Health(
        worker_url=url,
        is_healthy=error_text is None,
        last_checked=at,
        response_time_ms=ms,
        health_error=error_text,
        capabilities=capabilities if isinstance(capabilities, dict) else {},
        endpoints=tuple(endpoints[:MAX_ENDPOINTS]),
        checked_at=now,
    )


def due(urls: Iterable[str], known: Mapping[str, Health], now: float) -> tuple[str, ...]:
    """Who is to be probed: never looked at first, then the one that waits longest. Pure."""

    def waits_s(url: str) -> float:
        health = known.get(url)
        if health is None:
            return float("inf")
        every_s = HEALTHY_EVERY_S if health.is_healthy else UNHEALTHY_EVERY_S
        return now - health.checked_at - every_s

    late = {url: waits_s(url) for url in urls}
    return tuple(sorted((url for url in late if late[url] >= 0), key=lambda url: -late[url]))


class HealthMonitor:
    """Probes workers and keeps what was found. Any thread; the dictionaries change under the lock.

    A worker is probed once at a time: who asks meanwhile waits for the same result.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        client: WorkerClient,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._registry = registry
        self._client = client
        self._clock = clock
        self._wall = wall
        self._lock = Lock()
        self._known: dict[str, Health] = {}
        self._probing: dict[str, Future[Health]] = {}
        self._stored: dict[str, tuple[bool, float]] = {}  # what the table has, since when
        self._suspects: set[str] = set()
        self._queued: set[str] = set()  # submitted, and not begun

    def known(self) -> Mapping[str, Health]:
        """Everything that was found, by URL."""
        with self._lock:
            return dict(self._known)

    def suspect(self, url: str) -> None:
        """A request failed there: probe it at the next round."""
        with self._lock:
            self._suspects.add(url)

    def health(self, url: str, *, max_age_s: float) -> Health:
        """What is known of a worker, probed now if that is older. Takes up to PROBE_S."""
        with self._lock:
            found = self._known.get(url)
        if found is not None and self._clock() - found.checked_at <= max_age_s:
            return found
        return self.probe(url)

    def probe(self, url: str) -> Health:
        """Look at a worker now. Takes up to PROBE_S; never raises for what the worker does."""
        with self._lock:
            running = self._probing.get(url)
            mine: Future[Health] | None = None
            if running is None:
                mine = self._probing[url] = Future()
        if mine is None:
            assert running is not None
            return running.result()
        try:
            result = self._look(url)
        except BaseException as exc:
            mine.set_exception(exc)
            raise
        else:
            mine.set_result(result)
            return result
        finally:
            with self._lock:
                del self._probing[url]

    def keep(self, health: Health) -> None:
        """Write a result down again: it is of before the worker was registered."""
        with self._lock:
            self._known[health.worker_url] = health
        self._store(health)

    def tick(self, now: float, submit: Callable[[Callable[[], object]], object]) -> tuple[str, ...]:
        """One round: read who is registered, and `submit` a probe of each that is due.

        The URLs that were submitted. A probe that is running is not started again.
        """
        self._registry.try_refresh()
        urls = list(dict.fromkeys(worker.url for worker in self._registry.known()))
        with self._lock:
            for gone in self._known.keys() - set(urls):
                del self._known[gone]
                self._stored.pop(gone, None)
            late = due(urls, self._known, now)
            suspects = [url for url in urls if url in self._suspects and url not in late]
            self._suspects.clear()
            busy = self._probing.keys() | self._queued
            wanted = tuple(url for url in (*late, *suspects) if url not in busy)
            self._queued.update(wanted)
        for url in wanted:
            submit(partial(self._begin, url))
        return wanted

    def _begin(self, url: str) -> None:
        with self._lock:
            self._queued.discard(url)
        self._store_news(self.probe(url))

    def _look(self, url: str) -> Health:
        now = self._clock()
        try:
            result: Answer | CallFailed = self._client.get(f"{url}/health", deadline=now + PROBE_S)
        except CallFailed as exc:
            result = exc
        health = judge(url, result, at=self._wall(), now=self._clock())
        with self._lock:
            before = self._known.get(url)
            self._known[url] = health
        if before is None or before.is_healthy is not health.is_healthy:
            log.info("worker %s: %s", url, health.health_error or "healthy")
        return health

    def _store_news(self, health: Health) -> None:
        """Write down what changed, and seldom what did not. Only rounds do: a request that looks
        at a worker does not wait for the database."""
        with self._lock:
            stored, at = self._stored.get(health.worker_url, (None, 0.0))
        if stored is not health.is_healthy or health.checked_at - at >= STORE_EVERY_S:
            self._store(health)

    def _store(self, health: Health) -> None:
        try:
            self._registry.record_health(
                health.worker_url,
                is_healthy=health.is_healthy,
                last_checked=health.last_checked,
                response_time_ms=health.response_time_ms,
                health_error=health.health_error,
                capabilities=dict(health.capabilities),
                endpoints=list(health.endpoints),
            )
        except StoreUnavailable as exc:
            # The registry's warning is in the log already.
            log.debug("the health of %s is not written down: %s", health.worker_url, exc)
            return
        with self._lock:
            self._stored[health.worker_url] = (health.is_healthy, health.checked_at)


class Ticking(Protocol):
    """What the loop repeats: HealthMonitor."""

    def tick(self, now: float, submit: Callable[[Callable[[], object]], object]) -> object: ...


class HealthLoop:
    """The thread that ticks. Started after a fork by the composition root, which stops it."""

    def __init__(
        self,
        monitor: Ticking,
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = TICK_S,
    ):
        self._monitor = monitor
        self._clock = clock
        self._tick_s = tick_s
        self._stop = Event()
        self._thread = Thread(target=self._run, name="worker-health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when no probe runs any more: after PROBE_S at most."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        probes = ThreadPoolExecutor(MAX_PROBES, thread_name_prefix="probe")
        while not self._stop.is_set():
            try:
                self._monitor.tick(self._clock(), probes.submit)
            except Exception:
                # One round that fails must not end all later ones.
                log.exception("a round of health probes failed")
            self._stop.wait(self._tick_s)
        probes.shutdown(cancel_futures=True)


def iso(at: datetime) -> str:
    """As JavaScript writes times: UTC with milliseconds and Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

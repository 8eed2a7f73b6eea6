"""What get-active-worker-url and health-check-workers answer: whom to ask, and how all are.

Known faults of the original are not rebuilt: a chat URL that is not set never sends chat to the
image port, and `workerUrl` is in every health entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from gateway.errors import InvalidRequest, NotFound
from gateway.workers import order
from gateway.workers.health import HEALTHY_EVERY_S, Health, HealthMonitor, iso
from gateway.workers.media import media_workers
from gateway.workers.registry import CHAT, WAN, WORKER_TYPES, Worker, WorkerRegistry

# Of a health value that is given out without a new probe: the loop looks more often, so a request
# waits for a probe only where nothing is known.
MAX_AGE_S = 2 * HEALTHY_EVERY_S
# A page that many people have open must not make one probe for each of them.
CHECK_AGE_S = 1.0
MAX_PROBES = 8  # at a time, for one call


class ActiveWorkers:
    """Resolves URLs and reports. Keeps nothing; any thread."""

    def __init__(
        self,
        registry: WorkerRegistry,
        monitor: HealthMonitor,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._registry = registry
        self._monitor = monitor
        self._wall = wall

    def active_url(self, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Answer of get-active-worker-url: {worker_type: chat | sdxl | wan}, wan without a body.

        Raises InvalidRequest, and NotFound where no worker of the type is known. A worker that is
        not healthy is answered too, and `isHealthy` says so. Takes up to 5 s for each probe.
        """
        worker_type = (body or {}).get("worker_type") or WAN
        if worker_type not in WORKER_TYPES:
            raise InvalidRequest(f"worker_type must be one of {', '.join(WORKER_TYPES)}")
        ordered = self._ordered(self._of(worker_type))
        if not ordered:
            where = "chat_workers" if worker_type == CHAT else "media_workers"
            route = "register-chat-worker" if worker_type == CHAT else "update-worker-url"
            raise NotFound(
                f"no {worker_type} worker is known; name one in {where} of the profile, or let it "
                f"register with {route}; the port of another type is never given instead"
            )
        worker = ordered[0]
        health = self._monitor.health(worker.url, max_age_s=MAX_AGE_S)
        if not health.is_healthy:
            # Its state is news; another one may be known to be well.
            worker = self._ordered(ordered)[0]
            health = self._monitor.health(worker.url, max_age_s=MAX_AGE_S)
        return {
            "success": True,
            "worker_url": worker.url,
            "workerUrl": worker.url,
            "isHealthy": health.is_healthy,
            "healthError": health.health_error,
            "registrationInfo": _registration(worker, health),
            "worker_type": worker_type,
            "supportedEndpoints": list(health.endpoints),
            "workerCapabilities": dict(health.capabilities),
            "responseTimeMs": health.response_time_ms,
        }

    def check_all(self) -> dict[str, Any]:
        """Answer of health-check-workers: every worker is probed now.

        `healthResults` has the two entries that existing clients read, for the worker that is asked
        first; `workers` has all. Takes up to 5 s for each eight workers.
        """
        urls = list(dict.fromkeys(worker.url for worker in self._registry.workers()))
        if urls:
            with ThreadPoolExecutor(min(MAX_PROBES, len(urls))) as probes:
                found = list(probes.map(self._checked, urls))
        else:
            found = []
        by_url = {health.worker_url: health for health in found}
        now = self._wall()
        return {
            "success": True,
            "healthResults": {
                "wanWorker": self._entry(WAN, by_url, now),
                "chatWorker": self._entry(CHAT, by_url, now),
            },
            "workers": [
                {
                    **by_url[worker.url].to_json(),
                    "workerType": worker.worker_type,
                    "isStatic": worker.is_static,
                    "supportedEndpoints": list(by_url[worker.url].endpoints),
                }
                for worker in self._registry.known()
                if worker.url in by_url
            ],
            "timestamp": iso(now),
        }

    def _checked(self, url: str) -> Health:
        return self._monitor.health(url, max_age_s=CHECK_AGE_S)

    def _entry(
        self, worker_type: str, by_url: Mapping[str, Health], now: datetime
    ) -> dict[str, Any]:
        ordered = self._ordered(self._of(worker_type))
        worker = next((one for one in ordered if one.url in by_url), None)
        if worker is not None:
            return by_url[worker.url].to_json()
        return {
            "isHealthy": False,
            "lastChecked": iso(now),
            "responseTimeMs": None,
            "healthError": f"no {worker_type} worker is known",
            "workerUrl": None,
        }

    def _of(self, worker_type: str) -> Sequence[Worker]:
        if worker_type == CHAT:
            return self._registry.workers(CHAT)
        return media_workers(self._registry, worker_type)

    def _ordered(self, workers: Sequence[Worker]) -> tuple[Worker, ...]:
        return order.in_order(workers, self._monitor.known(), {}, 0.0)


def _registration(worker: Worker, health: Health) -> dict[str, Any]:
    return {
        "auto_registered": worker.auto_registered,
        "registration_method": worker.registration_method or ("settings" * worker.is_static),
        "is_static": worker.is_static,
        "registered_at": None if worker.registered_at is None else iso(worker.registered_at),
        "last_health_check": iso(health.last_checked),
        "health_status": "healthy" if health.is_healthy else "unhealthy",
        "response_time_ms": health.response_time_ms,
    }

"""What register-chat-worker and update-worker-url do, with the answers that their callers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import httpcore

from gateway.errors import Invalid, InvalidRequest
from gateway.workers.health import Health, HealthMonitor, iso
from gateway.workers.network import CheckedNetwork
from gateway.workers.registry import CHAT, MEDIA_TYPES, WorkerRegistry
from gateway.workers.urls import WorkerUrl, parse_worker_url

LOOK_UP_S = 5.0


class Registration:
    """Lets workers register. Keeps nothing; any thread."""

    def __init__(
        self,
        registry: WorkerRegistry,
        monitor: HealthMonitor,
        network: CheckedNetwork,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        """network: the one that requests will use, so that what it would refuse is refused now."""
        self._registry = registry
        self._monitor = monitor
        self._network = network
        self._wall = wall

    def register_chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer of register-chat-worker. The URL is kept even if the worker is not healthy.

        Raises InvalidRequest, StoreUnavailable. Takes up to 10 s.
        """
        url, _ = self._url(body)
        automatic = _flag(body, "auto_registered")
        health = self._monitor.probe(url)
        now = self._wall()
        self._registry.register(
            url,
            (CHAT,),
            auto_registered=automatic,
            registration_method=_text(body, "registration_method"),
            now=now,
        )
        self._monitor.keep(health)
        status = "healthy" if health.is_healthy else "unhealthy"
        return {
            "success": True,
            "workerUrl": url,
            "healthStatus": status,
            "responseTimeMs": health.response_time_ms,
            "registrationInfo": {
                "auto_registered": automatic,
                "last_health_check": iso(health.last_checked),
                "health_status": status,
                "last_updated": iso(now),
                "response_time_ms": health.response_time_ms,
            },
        }

    def update_media(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer of update-worker-url: the port 7860, which serves sdxl and wan.

        Existing workers send `worker_url`, the admin page `workerUrl`; both count, and `message`
        says where it was the latter. Raises InvalidRequest, also if the worker is not healthy:
        then nothing is kept; StoreUnavailable. Takes up to 10 s.
        """
        url, key = self._url(body)
        automatic = _flag(body, "auto_registered")
        method = _text(body, "registration_method") or "manual"
        health = self._monitor.probe(url)
        if not health.is_healthy:
            raise InvalidRequest(
                f"the worker is not healthy, so its URL is not kept: {_error(health)}; "
                "call again when the port answers from outside"
            )
        now = self._wall()
        self._registry.register(
            url, MEDIA_TYPES, auto_registered=automatic, registration_method=method, now=now
        )
        self._monitor.keep(health)
        return {
            "success": True,
            "message": "worker URL updated"
            + ("" if key == "worker_url" else f"; it came as {key}, which is taken as worker_url"),
            "worker_url": url,
            "updatedAt": iso(now),
            "auto_registered": automatic,
            "registration_method": method,
            "detection_method": _text(body, "detection_method") or None,
        }

    def _url(self, body: Mapping[str, Any]) -> tuple[str, str]:
        """The URL in its one spelling, and the key that had it."""
        key = "worker_url" if body.get("worker_url") is not None else "workerUrl"
        if body.get(key) is None:
            raise InvalidRequest("worker_url is missing: the base URL of the worker")
        url = parse_worker_url(body[key])
        self._check_address(url)
        return url.text, key

    def _check_address(self, url: WorkerUrl) -> None:
        """Refuse what no request would be sent to. A name that cannot be found now may be later,
        when the pod is up: the probe will tell."""
        try:
            self._network.addresses(url.host, url.port, LOOK_UP_S)
        except Invalid as exc:
            raise InvalidRequest(str(exc)) from exc
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
            return


def _flag(body: Mapping[str, Any], name: str) -> bool:
    return body.get(name) is True


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return value[:120] if isinstance(value, str) and value.isprintable() else ""


def _error(health: Health) -> str:
    return health.health_error or "no reason is known"

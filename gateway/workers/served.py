"""What workers say they serve (GET /worker/info): names, and hashes to hold receipts against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from gateway.errors import WorkerFault
from gateway.workers.attest import ServedModel
from gateway.workers.client import CallFailed, WorkerClient

FETCH_S = 3.0  # what existing clients give this route
GRACE_S = 1.0
KEPT_S = 60.0
MAX_KEPT = 128  # workers; more are not known at a time (registry.MAX_REGISTERED of three types)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One worker's list, and when it was read (monotonic seconds)."""

    models: tuple[ServedModel, ...]
    read_at: float

    def by_id(self, model_id: object) -> ServedModel | None:
        return next((model for model in self.models if model.id == model_id), None)


class ServedModels:
    """Lists of models by worker. The dictionary is changed under the lock; any thread."""

    def __init__(self, client: WorkerClient, clock: Callable[[], float] = time.monotonic):
        self._client = client
        self._clock = clock
        self._lock = Lock()
        self._kept: dict[str, Served] = {}

    def model(self, worker_url: str, model_id: object, deadline: float) -> ServedModel | None:
        """The model that a worker lists under this id; None if it cannot be found out.

        A list without it, or older than a minute, is read again.
        """
        with self._lock:
            kept = self._kept.get(worker_url)
        if kept is not None and self._clock() - kept.read_at < KEPT_S:
            found = kept.by_id(model_id)
            if found is not None and found.weights is not None:
                return found
        best = self.refresh(worker_url, deadline) or kept  # an old list is better than none
        return best.by_id(model_id) if best is not None else None

    def refresh(self, worker_url: str, deadline: float) -> Served | None:
        """Read a worker's list now; None, and the old one stays, if that fails.

        An answer that came in the last moment still gets GRACE_S to be verified in.
        """
        now = self._clock()
        ends = min(max(deadline, now + GRACE_S), now + FETCH_S)
        try:
            body = fetch_info(self._client, worker_url, ends)
        except WorkerFault:
            return None  # the receipt is then held against the asked name alone
        served = Served(models=parse_models(body), read_at=self._clock())
        with self._lock:
            if len(self._kept) >= MAX_KEPT and worker_url not in self._kept:
                del self._kept[min(self._kept, key=lambda url: self._kept[url].read_at)]
            self._kept[worker_url] = served
        return served


def fetch_info(client: WorkerClient, worker_url: str, deadline: float) -> dict[str, Any]:
    """GET /worker/info as it comes. deadline: monotonic seconds. Raises WorkerFault."""
    try:
        answer = client.get(f"{worker_url}/worker/info", deadline=deadline)
    except CallFailed as exc:
        raise WorkerFault(f"the worker does not say what it serves: {exc}") from exc
    body = answer.object()
    if not answer.is_success or body is None:
        raise WorkerFault(f"the worker does not say what it serves: status {answer.status}")
    return body


def parse_models(body: dict[str, Any]) -> tuple[ServedModel, ...]:
    """Models of a /worker/info body; entries that are none are left out. Pure."""
    listed = body.get("models")
    found = []
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            continue
        aliases = entry.get("aliases")
        listed_aliases = aliases if isinstance(aliases, list) else []
        found.append(
            ServedModel(
                id=entry["id"],
                aliases=tuple(one for one in listed_aliases if isinstance(one, str)),
                weights=_text(entry.get("weights")),
                tokenizer_sha256=_text(entry.get("tokenizer_sha256")),
                template=_text(entry.get("template")),
            )
        )
    return tuple(found)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

"""What the routes are made of. Built once by a composition root; nothing here is global."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from gateway.access.gate import Gate
from gateway.cache.instances import RefreshReport
from gateway.config import Settings
from gateway.front.revision import PromptSource
from gateway.models.refresh import SyncResults
from gateway.store.database import Database
from gateway.values.assembly import Counters


class Prompts(PromptSource, Protocol):
    """The façade of gateway/cache, as far as routes need it."""

    def status(self) -> Mapping[str, Any]:
        """Revision, level, age, instances …: JSON values for GET /api/cache/status."""

    def refresh(self, timeout_s: float = 5.0) -> RefreshReport:
        """Raise the revision and wait until every live process serves it. Raises
        StoreUnavailable."""

    def wake(self) -> None:
        """An edit was committed by this process: look at the database now."""


class MetricsSource(Protocol):
    """What GET /api/metrics answers; by gateway/logs."""

    def summary(self, hours: float) -> Mapping[str, Any]:
        """Execution times, hit rate, fallback levels, tokens, worker time of the last `hours`.
        Raises StoreUnavailable."""


class ModelRefresh(Protocol):
    """The catalogue of a provider, taken from its list; by gateway/models."""

    def __call__(self, *, provider: str, actor: str, confirmed: bool) -> SyncResults:
        """Raises NotFound, Conflict for a list that shrank and is not `confirmed`, ProviderFault,
        StoreUnavailable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Immutable; its parts are safe for threads."""

    settings: Settings
    database: Database
    gate: Gate
    prompts: Prompts
    counters: Counters
    refresh_models: ModelRefresh
    metrics: MetricsSource
    # By worker type: how many are known, how many were healthy when last looked at.
    workers_seen: Callable[[], Mapping[str, Any]]
    wall: Callable[[], datetime]  # aware
    clock: Callable[[], float]  # monotonic seconds
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

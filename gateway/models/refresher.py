"""Who refreshes the catalogue and when: one replica at a time, on a schedule or because asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Event, Lock

from sqlalchemy import select

from gateway.errors import Conflict, GatewayError
from gateway.models.refresh import Fetch, SyncResults, last_synced, refresh
from gateway.models.schedule import next_run
from gateway.store import leases
from gateway.store.database import Database
from gateway.store.tables import providers

LEASE_S = 120.0  # a fetch has 30 s, and the transaction that follows 15 s for each statement
RETRY_S = 600.0  # after a scheduled run that failed
TICK_S = 30.0
SCHEDULED = "schedule"  # the actor of the audit log

logger = logging.getLogger(__name__)


class Refresher:
    """Refreshes under a lease. Owner of the dates: the thread that calls `tick`; `refresh_now` is
    for any thread."""

    def __init__(
        self,
        database: Database,
        fetch: Fetch,
        *,
        instance_id: str,
        every_s: float,
        started: datetime,
        random01: Callable[[], float],
    ):
        """instance_id: of this process, at most 64 characters. every_s: 0 for never by itself.
        random01: 0 ≤ x < 1."""
        self._database = database
        self._fetch = fetch
        self._instance_id = instance_id
        self._every_s = every_s
        self._started = started
        self._random01 = random01
        # A lease is the process's, so its own threads need one more lock.
        self._running = Lock()
        self._chances: dict[str, float] = {}  # by provider, drawn once for each run
        self._not_before: dict[str, datetime] = {}

    def refresh_now(
        self, provider: str, now: datetime, *, actor: str, confirmed: bool = False
    ) -> SyncResults:
        """Refresh one provider's models. Raises Conflict while another refresh runs in this
        process, or of this provider anywhere, and what gateway/models/refresh.py raises."""
        results = self._held(provider, now, actor, confirmed, unless_after=None)
        if results is None:
            raise Conflict("another refresh is running; try again", retry_after_s=5.0)
        return results

    def tick(self, now: datetime) -> tuple[SyncResults, ...]:
        """Refresh the catalogue providers whose time has come. A provider that fails is logged and
        tried again in ten minutes."""
        done = []
        for provider in self._catalogues() if self._every_s > 0 else ():
            last = self._last(provider)
            chance = self._chances.setdefault(provider, self._random01())
            due = next_run(last, self._every_s, chance, started=self._started)
            if due is None or now < max(due, self._not_before.get(provider, due)):
                continue
            try:
                results = self._held(provider, now, SCHEDULED, False, unless_after=last)
            except GatewayError as exc:
                logger.warning("refresh of %r failed: %s", provider, exc)
                self._not_before[provider] = now + timedelta(seconds=RETRY_S)
                continue
            if results is not None:
                self._chances.pop(provider, None)
                logger.info("refresh of %r: %s", provider, _told(results))
                done.append(results)
        return tuple(done)

    def run(self, stop: Event) -> None:
        """The loop of a thread; ends when `stop` is set."""
        while not stop.wait(TICK_S):
            try:
                self.tick(datetime.now(UTC))
            except GatewayError as exc:
                logger.warning("the catalogue's schedule cannot be read: %s", exc)
            except Exception:
                logger.exception("the catalogue's refresh has a fault")

    def _held(
        self,
        provider: str,
        now: datetime,
        actor: str,
        confirmed: bool,
        *,
        unless_after: datetime | None,
    ) -> SyncResults | None:
        """The refresh, or None where another one runs. For a scheduled run also where another
        replica was faster: its run is later than `unless_after`."""
        lease = f"refresh:{provider}"[:60]
        if not self._running.acquire(blocking=False):
            return None
        try:
            if not leases.take(self._database, lease, self._instance_id, now, LEASE_S):
                return None
            try:
                if actor == SCHEDULED and self._last(provider) != unless_after:
                    return None
                return refresh(
                    self._database,
                    self._fetch,
                    now,
                    provider=provider,
                    actor=actor,
                    confirmed=confirmed,
                )
            finally:
                self._give_back(lease)
        finally:
            self._running.release()

    def _give_back(self, lease: str) -> None:
        try:
            leases.give_back(self._database, lease, self._instance_id)
        except GatewayError as exc:
            # It ends by itself; the refresh's own outcome matters more.
            logger.warning("lease %r is not given back: %s", lease, exc)

    def _catalogues(self) -> list[str]:
        asked = select(providers.c.name).where(
            providers.c.kind == "catalogue", providers.c.is_active
        )
        with self._database.reading() as connection:
            return list(connection.execute(asked.order_by(providers.c.name)).scalars())

    def _last(self, provider: str) -> datetime | None:
        with self._database.reading() as connection:
            return last_synced(connection, provider)


def _told(results: SyncResults) -> str:
    return (
        f"{results.added} added, {results.updated} updated, {results.retired} retired, "
        f"{results.failed} failed, {len(results.missing_defaults)} defaults without their model"
    )

"""Who the workers are: those of the settings first, then those that registered (table `workers`).

Requests read a list in memory and never wait for the database: without it the last list counts.
Another process's registration is seen at the next `refresh`, which the health loop does every
second, and at once where no worker of a kind is known.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock
from typing import Any

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from gateway.errors import Forbidden, NotFound, StoreUnavailable
from gateway.store.database import Database
from gateway.store.tables import workers as table
from gateway.workers.urls import parse_worker_url

log = logging.getLogger(__name__)

CHAT, SDXL, WAN = "chat", "sdxl", "wan"
WORKER_TYPES = (CHAT, SDXL, WAN)
MEDIA_TYPES = (SDXL, WAN)  # port 7860 serves both
# Of one type. A pod gets a new URL at every start, so old ones have to make room.
MAX_REGISTERED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker under one of its types; 7860 is there twice."""

    worker_type: str  # chat | sdxl | wan
    url: str
    is_static: bool = False  # from the settings; tried first, never removed
    auto_registered: bool = False
    registration_method: str = ""
    registered_at: datetime | None = None
    was_healthy: bool | None = None  # as the table has it; None: never looked at

    @property
    def kind(self) -> str:
        return CHAT if self.worker_type == CHAT else "media"


class WorkerRegistry:
    """The list of workers. The list is replaced as a whole under the lock; any thread."""

    def __init__(
        self,
        database: Database,
        chat: Iterable[str] = (),
        media: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        """chat, media: base URLs of the settings, in the order they are tried. Reads nothing yet:
        `refresh` does. Raises InvalidRequest for a URL that is none."""
        self._database = database
        self._clock = clock
        self._last_try: float | None = None  # of reading, in vain or not
        self._is_readable = True  # as of the last `try_refresh`; only decides about log lines
        self._static = tuple(
            Worker(worker_type=worker_type, url=parse_worker_url(url).text, is_static=True)
            for worker_type, urls in ((CHAT, chat), *((one, tuple(media)) for one in MEDIA_TYPES))
            for url in urls
        )
        self._lock = Lock()
        self._workers = self._static

    def workers(self, *worker_types: str) -> tuple[Worker, ...]:
        """Workers of these types (none: all) as last read, static ones first."""
        found = self._of(worker_types)
        if not found and self._may_try():
            self.try_refresh()
            found = self._of(worker_types)
        return found

    def known(self) -> tuple[Worker, ...]:
        """All of the list as last read."""
        return self._of(())

    def refresh(self) -> None:
        """Read the table. Raises StoreUnavailable; the list then stays as it was."""
        with self._lock:
            self._last_try = self._clock()
        registered = self._read()
        static = {(worker.worker_type, worker.url) for worker in self._static}
        more = [one for one in registered if (one.worker_type, one.url) not in static]
        with self._lock:
            self._workers = (*self._static, *more)

    def try_refresh(self) -> bool:
        """`refresh`, or a line in the log. Whether the table could be read."""
        try:
            self.refresh()
        except StoreUnavailable as exc:
            if self._is_readable:  # once, and not every second
                log.warning("the list of workers stays as it is: %s", exc)
            self._is_readable = False
            return False
        if not self._is_readable:
            log.info("the list of workers is read again")
        self._is_readable = True
        return True

    def register(
        self,
        url: str,
        worker_types: Sequence[str],
        *,
        auto_registered: bool,
        registration_method: str,
        now: datetime,
    ) -> tuple[Worker, ...]:
        """Store a worker under each type; again is an update. Raises StoreUnavailable.

        Above MAX_REGISTERED of a type the one that is not well and was registered first goes.
        """
        made = tuple(
            Worker(
                worker_type=worker_type,
                url=url,
                auto_registered=auto_registered,
                registration_method=registration_method[:120],
                registered_at=now,
            )
            for worker_type in worker_types
        )
        try:
            with self._database.transaction() as connection:
                for worker in made:
                    connection.execute(self._upsert(worker))
                    self._make_room(connection, worker)
        except SQLAlchemyError as exc:
            raise _unavailable(exc) from exc
        self.try_refresh()
        return made

    def remove(self, url: str) -> int:
        """Forget a registered worker under all its types; the number of rows that went.

        Raises NotFound, Forbidden for a worker of the settings, StoreUnavailable.
        """
        text = parse_worker_url(url).text
        try:
            with self._database.transaction() as connection:
                gone = connection.execute(delete(table).where(table.c.url == text)).rowcount
        except SQLAlchemyError as exc:
            raise _unavailable(exc) from exc
        self.try_refresh()
        if gone:
            return gone
        if any(worker.url == text for worker in self._static):
            raise Forbidden("this worker is in the settings; take it out of the profile instead")
        raise NotFound("no worker is registered under this URL")

    def record_health(
        self,
        url: str,
        *,
        is_healthy: bool,
        last_checked: datetime,
        response_time_ms: float | None,
        health_error: str | None,
        capabilities: dict[str, Any],
        endpoints: list[str],
    ) -> None:
        """Keep a probe's result for reports and other processes. Raises StoreUnavailable."""
        values = {
            "is_healthy": is_healthy,
            "last_checked": last_checked,
            "response_time_ms": response_time_ms,
            "health_error": health_error,
            "capabilities": capabilities,
            "endpoints": endpoints,
        }
        try:
            with self._database.transaction() as connection:
                connection.execute(update(table).where(table.c.url == url).values(values))
        except SQLAlchemyError as exc:
            raise _unavailable(exc) from exc

    def _may_try(self) -> bool:
        """At most once in a second: a database that is gone must not cost every request a try."""
        with self._lock:
            return self._last_try is None or self._clock() - self._last_try >= 1.0

    def _of(self, worker_types: Sequence[str]) -> tuple[Worker, ...]:
        with self._lock:
            known = self._workers
        if not worker_types:
            return known
        return tuple(worker for worker in known if worker.worker_type in worker_types)

    def _read(self) -> list[Worker]:
        try:
            with self._database.reading() as connection:
                rows = connection.execute(select(table).order_by(table.c.id)).all()
        except SQLAlchemyError as exc:
            raise _unavailable(exc) from exc
        return [
            Worker(
                worker_type=row.worker_type,
                url=row.url,
                auto_registered=row.auto_registered,
                registration_method=row.registration_method,
                registered_at=row.registered_at,
                was_healthy=row.is_healthy,
            )
            for row in rows
        ]

    def _upsert(self, worker: Worker) -> Any:
        insert: Callable[..., Any] = (
            postgresql.insert if self._database.is_postgres else sqlite.insert
        )
        values = {
            "auto_registered": worker.auto_registered,
            "registration_method": worker.registration_method,
            "registered_at": worker.registered_at,
        }
        return (
            insert(table)
            .values(worker_type=worker.worker_type, url=worker.url, **values)
            .on_conflict_do_update(index_elements=["worker_type", "url"], set_=values)
        )

    def _make_room(self, connection: Connection, newest: Worker) -> None:
        same = connection.execute(
            select(table.c.id, table.c.url)
            .where(table.c.worker_type == newest.worker_type)
            # Those that are well last: False sorts before True on both engines.
            .order_by(table.c.is_healthy.is_(True), table.c.registered_at, table.c.id)
        ).all()
        candidates = [row for row in same if row.url != newest.url]
        for row in candidates[: max(0, len(same) - MAX_REGISTERED)]:
            connection.execute(delete(table).where(table.c.id == row.id))
            log.warning("worker %s (%s) makes room for a newer one", row.url, newest.worker_type)


def _unavailable(error: SQLAlchemyError) -> StoreUnavailable:
    return StoreUnavailable(
        f"the table of workers cannot be read or written ({type(error).__name__}); "
        "look at the database"
    )

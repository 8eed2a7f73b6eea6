"""What of the log goes, and when: texts first, then rows, then configuration that nothing uses.

In chunks, each a transaction of its own, so that SQLite's writer is free in between.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Table, and_, delete, or_, select

from gateway.config import Logs
from gateway.errors import StoreUnavailable
from gateway.store.database import Database
from gateway.store.leases import give_back, take
from gateway.store.tables import config_objects, prompt_log_bodies, prompt_logs

log = logging.getLogger(__name__)

LEASE = "log retention"
LEASE_S = 300.0
EVERY_S = 600.0
CHUNK = 1000  # rows of a transaction
PAUSE_S = 0.02  # between two, for other writers: SQLite's lock is not handed over in turn
# An object's time of last use may be TOUCH behind that of a body, and clocks of replicas differ.
OBJECT_SLACK = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Place:
    """A row's place in the order of time."""

    created_at: datetime
    id: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Older goes. newest_over: this row and all before it are above max_rows."""

    bodies_before: datetime
    rows_before: datetime
    objects_before: datetime
    newest_over: Place | None


@dataclass(frozen=True, slots=True)
class Removed:
    bodies: int = 0  # by their own age; those of removed rows go with them and are not counted
    rows: int = 0
    objects: int = 0


def limits(logs: Logs, now: datetime, newest_over: Place | None) -> Limits:
    """now: aware. A body does not outlive its row, so the shorter of the two ages holds for it."""
    bodies_before = now - timedelta(days=min(logs.body_days, logs.row_days))
    return Limits(
        bodies_before=bodies_before,
        rows_before=now - timedelta(days=logs.row_days),
        # Every body writes the time of its use at its objects (gateway/logs/batch.py), so objects
        # that were last used before the oldest body are used by none.
        objects_before=bodies_before - OBJECT_SLACK,
        newest_over=newest_over,
    )


class Retention:
    """One thread runs it; of several replicas the one with the lease works."""

    def __init__(
        self,
        database: Database,
        logs: Logs,
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        stop: threading.Event | None = None,
        holder: str | None = None,
    ):
        self._database = database
        self._logs = logs
        self._wall = wall
        self._stop = stop or threading.Event()
        self._holder = holder or f"{socket.gethostname()[:40]}:{os.getpid()}:{secrets.token_hex(4)}"

    def run(self) -> None:
        """The loop of a thread; ends with `stop`."""
        while not self._stop.is_set():
            try:
                self.round()
            except StoreUnavailable as exc:
                log.warning("the log's retention waits for the database: %s", exc)
            except Exception:  # the top of a loop
                log.exception("the log's retention failed; it tries again")
            self._stop.wait(EVERY_S)

    def round(self) -> None:
        """All that is due, if this replica has the lease. Raises StoreUnavailable."""
        if not take(self._database, LEASE, self._holder, self._wall(), LEASE_S):
            return
        removed = self.tick(self._wall())
        give_back(self._database, LEASE, self._holder)
        if removed != Removed():
            log.info(
                "removed from the log: %d bodies, %d rows, %d configuration objects",
                removed.bodies,
                removed.rows,
                removed.objects,
            )

    def tick(self, now: datetime) -> Removed:
        """Remove all that is due at `now` (aware). Raises StoreUnavailable; what was removed
        before that stays so."""
        with self._database.reading() as connection:
            over = newest_over(connection, self._logs.max_rows)
        due = limits(self._logs, now, over)
        bodies = self._all(lambda connection: _remove_bodies(connection, due))
        rows = self._all(lambda connection: _remove_rows(connection, due))
        if self._stop.is_set():
            return Removed(bodies, rows)  # bodies may be left, and objects are theirs
        return Removed(bodies, rows, self._all(lambda connection: _remove_objects(connection, due)))

    def _all(self, chunk: Callable[[Connection], int]) -> int:
        """Chunk after chunk until one is not full, or until the stop; how many went."""
        removed = 0
        while not self._stop.is_set():
            with self._database.transaction() as connection:
                one = chunk(connection)
            removed += one
            if one < CHUNK:
                break
            if removed % (100 * CHUNK) == 0:
                # Ours as long as it takes; another replica would only do the same beside us.
                take(self._database, LEASE, self._holder, self._wall(), LEASE_S)
            self._stop.wait(PAUSE_S)
        return removed


def newest_over(connection: Connection, max_rows: int) -> Place | None:
    """The newest row above the number; None: there are not more. Walks an index of max_rows
    entries, 0.1 s per million or so."""
    found = connection.execute(
        select(prompt_logs.c.created_at, prompt_logs.c.id)
        .order_by(prompt_logs.c.created_at.desc(), prompt_logs.c.id.desc())
        .limit(1)
        .offset(max_rows)
    ).one_or_none()
    return None if found is None else Place(found.created_at, found.id)


def _remove_bodies(connection: Connection, due: Limits) -> int:
    return _remove_before(connection, prompt_log_bodies, due.bodies_before)


def _remove_objects(connection: Connection, due: Limits) -> int:
    return _remove_before(connection, config_objects, due.objects_before)


def _remove_before(connection: Connection, table: Table, before: datetime) -> int:
    (key,) = table.primary_key
    found = select(key).where(table.c.created_at < before).order_by(table.c.created_at).limit(CHUNK)
    # The time again, since another replica may have used an object in between.
    wanted = delete(table).where(key.in_(connection.scalars(found).all()))
    return connection.execute(wanted.where(table.c.created_at < before)).rowcount


def _remove_rows(connection: Connection, due: Limits) -> int:
    logs = prompt_logs.c
    place = due.newest_over
    if place is None or place.created_at < due.rows_before:
        is_due = logs.created_at < due.rows_before
    else:
        # One range of the index, and then its end; two ranges with OR would be sorted each time.
        is_due = and_(
            logs.created_at <= place.created_at,
            or_(logs.created_at < place.created_at, logs.id <= place.id),
        )
    found = connection.execute(
        select(logs.id, logs.request_id)
        .where(is_due)
        .order_by(logs.created_at, logs.id)
        .limit(CHUNK)
    ).all()
    if not found:
        return 0
    connection.execute(
        delete(prompt_log_bodies).where(
            prompt_log_bodies.c.request_id.in_([one.request_id for one in found])
        )
    )
    # Their flags go with them, by the foreign key.
    return connection.execute(
        delete(prompt_logs).where(logs.id.in_([one.id for one in found]))
    ).rowcount

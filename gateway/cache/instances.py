"""Who serves what: each process says so in gateway_instances, and a refresh waits for all."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, delete, insert, select, text, update

from gateway.store.database import Database
from gateway.store.tables import gateway_instances

BEAT_S = 5.0  # between two signs of life, beside the one after each load
DEAD_S = 15.0  # three of them missed: not waited for
FORGET_S = 86_400.0  # rows of processes that ended without a word go after this
POLL_S = 0.02  # of a refresh that waits

REACHED, WAITING, DEAD = "reached", "waiting", "dead"


def new_instance_id() -> str:
    """Host, process and a random part: a process that is started again is another one."""
    return f"{socket.gethostname()[:40]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A row, with the age of its last sign of life by the database's clock."""

    instance_id: str
    applied_revision: int
    seen_s: float
    url: str | None = None

    @property
    def is_live(self) -> bool:
        return self.seen_s <= DEAD_S


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    instance_id: str
    state: str  # reached | waiting | dead
    applied_revision: int
    waited_ms: float | None  # until it was seen to have the revision; None: it was not
    seen_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshReport:
    """How a refresh went. `reached`: every live instance serves the revision or a later one."""

    revision: int
    reached: bool
    slowest: str | None  # an instance that is waited for; else the one that took longest
    slowest_ms: float | None  # None: it did not come in time, or there is none
    instances: tuple[InstanceReport, ...]


class Instances:
    """The rows. This process's own is written by the upkeep thread only; anyone may read."""

    def __init__(self, database: Callable[[], Database], instance_id: str, url: str | None = None):
        self._database = database
        self.instance_id = instance_id
        self._url = url

    def beat(self, revision: int) -> None:
        """Say that this process serves `revision`. Raises StoreUnavailable."""
        with self._database().transaction() as connection:
            now = _now(connection)
            own = gateway_instances.c.instance_id == self.instance_id
            applied = connection.scalar(select(gateway_instances.c.applied_revision).where(own))
            if applied is None:
                connection.execute(
                    insert(gateway_instances).values(
                        instance_id=self.instance_id,
                        applied_revision=revision,
                        applied_at=now,
                        last_seen=now,
                        url=self._url,
                    )
                )
                forgotten = now - timedelta(seconds=FORGET_S)
                connection.execute(
                    delete(gateway_instances).where(gateway_instances.c.last_seen < forgotten)
                )
                return
            changed = {} if applied == revision else {"applied_at": now}
            connection.execute(
                update(gateway_instances)
                .where(own)
                .values(applied_revision=revision, last_seen=now, **changed)
            )

    def leave(self) -> None:
        """Take this process's row away: it ends on purpose and nobody has to wait for it."""
        with self._database().transaction() as connection:
            connection.execute(
                delete(gateway_instances).where(gateway_instances.c.instance_id == self.instance_id)
            )

    def all(self) -> tuple[Instance, ...]:
        with self._database().reading() as connection:
            now = _now(connection)
            rows = connection.execute(
                select(gateway_instances).order_by(gateway_instances.c.instance_id)
            ).all()
        return tuple(
            Instance(
                instance_id=row.instance_id,
                applied_revision=row.applied_revision,
                seen_s=max(0.0, (now - row.last_seen).total_seconds()),
                url=row.url,
            )
            for row in rows
        )

    def bump(self) -> int:
        """Raise the revision without a change, so that every replica loads again; the new one."""
        with self._database().transaction() as connection:
            connection.execute(text("UPDATE config_state SET revision = revision + 1 WHERE id = 1"))
            revision = connection.scalar(text("SELECT revision FROM config_state WHERE id = 1"))
            if connection.dialect.name == "postgresql":
                connection.execute(
                    text("SELECT pg_notify('gateway_config', :revision)"),
                    {"revision": str(revision)},
                )
        return int(revision)

    def wait_for_all(
        self,
        revision: int,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> RefreshReport:
        """Wait until every live instance reports `revision` or later; raises StoreUnavailable."""
        started = clock()
        reached_ms: dict[str, float] = {}
        while True:
            found = self.all()
            passed_s = clock() - started
            for one in found:
                if one.applied_revision >= revision:
                    reached_ms.setdefault(one.instance_id, passed_s * 1000)
            if passed_s >= timeout_s or not any(
                one.is_live and one.instance_id not in reached_ms for one in found
            ):
                return report(revision, found, reached_ms)
            sleep(min(POLL_S, timeout_s - passed_s))


def report(
    revision: int, found: tuple[Instance, ...], reached_ms: dict[str, float]
) -> RefreshReport:
    """What became of each instance; the slowest is one that is still waited for, if any is."""
    rows = tuple(
        InstanceReport(
            instance_id=one.instance_id,
            state=REACHED if one.instance_id in reached_ms else WAITING if one.is_live else DEAD,
            applied_revision=one.applied_revision,
            waited_ms=reached_ms.get(one.instance_id),
            seen_s=one.seen_s,
        )
        for one in found
    )
    waiting = [one for one in rows if one.state == WAITING]
    # Among those that are late the one that is furthest behind.
    slowest = (
        min(waiting, key=lambda one: one.applied_revision)
        if waiting
        else max(
            (one for one in rows if one.state == REACHED),
            key=lambda one: one.waited_ms or 0.0,
            default=None,
        )
    )
    return RefreshReport(
        revision=revision,
        reached=not waiting,
        slowest=slowest.instance_id if slowest else None,
        slowest_ms=slowest.waited_ms if slowest else None,
        instances=rows,
    )


def _now(connection: Connection) -> datetime:
    """The database's clock, which all replicas share; SQLite's is this machine's."""
    if connection.dialect.name == "sqlite":
        return datetime.now(UTC)
    found = connection.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(found, datetime)
    return found.astimezone(UTC)

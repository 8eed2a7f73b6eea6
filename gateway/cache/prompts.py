"""The façade: what a request takes its configuration from.

    held = prompts.held(min_revision)   # once per request
    held.snapshot, held.level, held.age_ms, held.flags

There is always an answer: the database's, the last known good one, or the emergency file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from gateway.cache.checked import CheckedSource
from gateway.cache.holder import DISK, EMERGENCY, Held, Holder, State, judge
from gateway.cache.instances import Instances, RefreshReport, new_instance_id
from gateway.cache.last_good import LastGood
from gateway.cache.lazy import LazyDatabase
from gateway.cache.record import LEVEL, LOADED, Observer, Record, ignore
from gateway.cache.replica import BOUND_S, Replica
from gateway.cache.source import Source
from gateway.cache.sqlite import SqliteMarks
from gateway.cache.status import of_held, of_instances
from gateway.cache.upkeep import Upkeep
from gateway.errors import ConfigError, RevisionNotReached
from gateway.store.database import open_database
from gateway.store.loading import load_snapshot
from gateway.values.rows import Snapshot

logger = logging.getLogger(__name__)

MIN_REVISION_WAIT_S = 2.0
LOAD_TIMEOUT_MS = 1000  # of one statement of a load on PostgreSQL


class Prompts:
    """Made and started after a fork, once per process; `held` may be called by any thread.

    Has connections of its own: loads do not wait for a pool that requests have used up. Those for
    loads and those for the list of instances are apart, since a load that fails drops its own, and
    one that another thread has in its hands would be left open. The references below are set in
    `start` and then stay.
    """

    def __init__(
        self,
        database_url: str,
        state_dir: Path,
        emergency: Callable[[], Snapshot],
        *,
        max_unverified_s: float = 86_400.0,
        listen_url: str | None = None,
        listen: bool = True,
        url: str | None = None,
        observe: Observer = ignore,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """emergency: the configuration of the package. max_unverified_s: older ones are flagged
        `unverified_too_long`. listen_url: a direct or session connection to PostgreSQL where
        database_url is a transaction pooler. listen: False leaves the push path out. url: where
        other processes reach this one, for the list of instances. observe: told of every event of
        gateway/cache/record.py."""
        self._url = database_url
        self._listen_url = listen_url or database_url
        self._listen = listen
        self._is_postgres = _backend(database_url) != "sqlite"
        self._emergency = emergency
        self._max_unverified_s = max_unverified_s
        self._observe = observe
        self._clock = clock
        self._wall = wall
        self._record = Record(self._observed)
        self._last_good = LastGood(state_dir)
        self._loading = LazyDatabase(database_url, _limit_statements)
        self._telling = LazyDatabase(database_url)
        self._instances = Instances(self._telling.get, new_instance_id(), url)
        self._lock = threading.Lock()  # of _level
        self._level: int | None = None  # the last that was logged
        self._holder: Holder | None = None
        self._source: Source | None = None
        self._upkeep: Upkeep | None = None

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Load once and keep on. Returns within seconds, whatever state the database is in."""
        self._holder = Holder(self._without_database())
        self._source = self._make_source(self._holder)
        self._source.start()
        self._upkeep = Upkeep(
            self._look,
            self._instances,
            self._last_good,
            self._record,
            clock=self._clock,
            wall=self._wall,
        )
        self._look()
        self._upkeep.start()

    def stop(self) -> None:
        if self._upkeep is not None:
            self._upkeep.stop()
        if self._source is not None:
            self._source.stop()
        self._loading.reset()
        self._telling.reset()

    @property
    def instance_id(self) -> str:
        """Of this process, in the list of instances and in leases."""
        return self._instances.instance_id

    # --- requests -----------------------------------------------------------------------------

    def held(self, min_revision: int | None = None) -> Held:
        """What this request works with.

        min_revision: at least this one is served, waited for up to MIN_REVISION_WAIT_S; raises
        RevisionNotReached when it does not come. Raises nothing else.
        """
        held = self._look()
        if min_revision is None or held.snapshot.revision >= min_revision:
            return held
        holder, source = self._parts()
        started = self._clock()
        source.wake()
        while (held := self._look()).snapshot.revision < min_revision:
            left_s = MIN_REVISION_WAIT_S - (self._clock() - started)
            if left_s <= 0:
                raise RevisionNotReached(
                    f"revision {min_revision} was not reached within {MIN_REVISION_WAIT_S:g} s; "
                    f"this process serves {held.snapshot.revision} at level {held.level}. Ask "
                    "again, or for a revision that the database has",
                    retry_after_s=1.0,
                    fields={"revision": held.snapshot.revision, "fallback_level": held.level},
                )
            holder.wait_for(min_revision, min(left_s, source.retry_s))
        return held

    def wake(self) -> None:
        """An edit was committed by this process: see it now, not with the notification."""
        self._parts()[1].wake()

    def refresh(self, timeout_s: float = 5.0) -> RefreshReport:
        """Raise the revision and wait until every live replica serves it; StoreUnavailable."""
        revision = self._instances.bump()
        self.wake()
        self._look()
        return self._instances.wait_for_all(revision, timeout_s)

    def status(self) -> dict[str, Any]:
        """For /api/cache/status; JSON values."""
        held = self._look()
        return {
            "instance_id": self._instances.instance_id,
            "engine": "postgresql" if self._is_postgres else "sqlite",
            "source": self._parts()[0].state.source,
            "staleness_bound_ms": BOUND_S * 1000 if self._is_postgres else 0.0,
            "max_unverified_s": self._max_unverified_s,
            **of_held(held),
            **self._record.status(),
            # Without a verified database, asking who is there would only wait for it.
            **(of_instances(self._instances) if held.verified else {"instances": None}),
        }

    # --- parts --------------------------------------------------------------------------------

    def _look(self) -> Held:
        _, source = self._parts()
        now = self._clock()
        look = source.look(now)
        held = judge(
            look.state,
            now,
            is_verified=look.is_verified,
            max_unverified_s=self._max_unverified_s,
            cache_hit=not look.loaded,
        )
        if held.level != self._level:
            self._changed_level(held)
        return held

    def _changed_level(self, held: Held) -> None:
        with self._lock:
            before, self._level = self._level, held.level
        if before == held.level:
            return  # another thread was first
        failing = "; ".join(self._record.status()["failing"].values()) or "no error"
        logger.log(
            logging.INFO if held.level == 0 else logging.WARNING,
            "prompts: fallback level %s -> %d, revision %d, flags %s (%s)",
            "none" if before is None else before,
            held.level,
            held.snapshot.revision,
            ",".join(held.flags) or "none",
            failing,
        )
        self._record.count(LEVEL[held.level], held.snapshot.revision)

    def _parts(self) -> tuple[Holder, Source]:
        if self._holder is None or self._source is None:
            raise RuntimeError("Prompts.start was not called in this process")
        return self._holder, self._source

    def _without_database(self) -> State:
        """What is served until the database is read."""
        saved = self._last_good.read()
        if saved is None:
            return State(snapshot=self._emergency(), source=EMERGENCY)
        # A clock that was set back would make it look fresh; it is then as old as it can be told.
        age_s = max(0.0, self._wall() - saved.verified_at)
        return State(snapshot=saved.snapshot, source=DISK, verified_at=self._clock() - age_s)

    def _make_source(self, holder: Holder) -> Source:
        if not self._is_postgres:
            path = Path(make_url(self._url).database or "")
            return CheckedSource(
                holder,
                SqliteMarks(path),
                self._load,
                self._record,
                reset=self._forget_file,
                clock=self._clock,
            )
        # Nothing is connected by this; it knows how a URL becomes the driver's arguments.
        listening = open_database(self._listen_url).engine
        _, connect = listening.dialect.create_connect_args(listening.url)
        return Replica(
            holder,
            {**connect, "application_name": "gateway-listener"},
            self._load,
            self._record,
            reset=self._loading.reset,
            listen=self._listen,
            clock=self._clock,
        )

    def _load(self) -> Snapshot:
        with self._loading.get().reading() as connection:
            return load_snapshot(connection)

    def _forget_file(self) -> None:
        self._loading.reset()
        self._telling.reset()

    def _observed(self, name: str, revision: int | None) -> None:
        if name == LOADED and self._upkeep is not None:
            self._upkeep.wake()
        self._observe(name, revision)


def _backend(url: str) -> str:
    try:
        return make_url(url).get_backend_name()
    except ArgumentError as exc:
        # Without the library's message: it quotes the URL, which may hold a password.
        raise ConfigError("the database's URL is no URL of SQLAlchemy's form") from exc


def _limit_statements(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {LOAD_TIMEOUT_MS}")
    connection.commit()

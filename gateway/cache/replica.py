"""The source on PostgreSQL: one thread that listens, and reads the revision again in any case.

A notification makes an edit seen within milliseconds. The guarantee does not rest on it: what is
held counts as verified for BOUND_S after the moment before its last read, and no longer. So an
answer of level 0 is never more than BOUND_S behind a commit, with the push path dead, the machine
slow or the network silent; where a read does not come in time the level falls to 1 and says so.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from gateway.cache.holder import DATABASE, Holder, Mark
from gateway.cache.record import (
    CONNECTED,
    DISCONNECTED,
    LOAD_FAILED,
    NOTIFIED,
    Record,
)
from gateway.cache.source import Load, Look, load_marked, serve
from gateway.errors import GatewayError, StoreUnavailable

logger = logging.getLogger(__name__)

CHANNEL = "gateway_config"
BOUND_S = 1.25  # the hard bound on staleness: a wait, and a read with its load
WAIT_S = 0.75  # from one read to the next without a notification; leaves a read and a load 0.5 s
START_S = 10.0  # how long a start waits for the first round
READ_TIMEOUT_S = 0.5  # of the server for reading the revision
BACKOFF_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)  # before each next try; the last one from then on
MARK = "SELECT revision, changed_at FROM config_state WHERE id = 1"


class Replica:
    """Its own thread owns the connection and the count of failures and is the only writer of the
    holder. Others call `look`, `wake` and `stop`. Started after a fork."""

    retry_s = BOUND_S

    def __init__(
        self,
        holder: Holder,
        connect: Mapping[str, Any],
        load: Load,
        record: Record,
        *,
        reset: Callable[[], None] = lambda: None,
        listen: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """connect: arguments of psycopg.connect, to the primary itself or to a pooler in session
        mode. reset: drops what `load` keeps open, after a failure. listen: False leaves the push
        path out."""
        self._holder = holder
        self._connect_arguments = dict(connect)
        self._load = load
        self._record = record
        self._reset = reset
        self._listen = listen
        self._clock = clock
        self._connection: psycopg.Connection[Any] | None = None
        self._failures = 0
        self._must_load = True  # while there was no connection the database may have been replaced
        self._stopping = False
        self._first = threading.Event()  # the first round is over
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="gateway-replica", daemon=True)

    def start(self) -> None:
        self._thread.start()
        # A server that takes connections and answers nothing must not hold up the start.
        self._first.wait(START_S)

    def look(self, now: float) -> Look:
        state = self._holder.state
        is_verified = (
            state.source == DATABASE
            and state.verified_at is not None
            and now - state.verified_at <= BOUND_S
        )
        return Look(state, is_verified)

    def wake(self) -> None:
        try:
            self._waker.send(b"w")
        except BlockingIOError:
            pass  # full: the thread is woken already
        except OSError:
            logger.debug("woken after the stop")

    def stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self.wake()
        self._thread.join(5.0)
        if self._thread.is_alive():
            # It hangs in a read that the server does not answer. It is a daemon thread and keeps
            # its sockets.
            logger.warning("the replica's thread did not stop within 5 s")
            return
        self._disconnect()
        self._woken.close()
        self._waker.close()

    def _run(self) -> None:
        delay_s = self.step(self._clock())
        self._first.set()
        while not self._stopping:
            try:
                self._wait(delay_s)
            except (psycopg.Error, OSError) as exc:
                self._lost(exc)
            delay_s = self.step(self._clock()) if not self._stopping else 0.0

    def step(self, now: float) -> float:
        """One round; returns the seconds until the next. Raises nothing."""
        try:
            self.round(now)
        except (psycopg.Error, OSError) as exc:
            return self._lost(exc)
        except Exception as exc:
            # A row that cannot be read must not end the thread: what is held is served and its age
            # shows. The connection stays, so the edit that repairs it is seen at once.
            is_ours = isinstance(exc, GatewayError)
            self._record.fault("loading the configuration", exc, traceback=not is_ours)
            self._record.count(LOAD_FAILED)
            self._reset()
            return self._back_off()
        self._failures = 0
        self._record.fine("listening to the database")
        self._record.fine("loading the configuration")
        return max(0.0, WAIT_S - (self._clock() - now))

    def round(self, now: float) -> None:
        """Connect where needed, compare the mark, load when it differs. Raises what the database
        or a row raises; `now` is the monotonic time before the read."""
        connection = self._connection
        if connection is None:
            connection = self._connect()
        mark = _read_mark(connection)
        state = self._holder.state
        if not self._must_load and state.mark is not None and state.mark.agrees(mark):
            self._holder.verify(state, now, mark)
            return
        at = self._clock()
        snapshot, mark = load_marked(lambda: _read_mark(connection), self._load)
        self._must_load = False
        serve(self._holder, self._record, snapshot, mark, at)

    def _connect(self) -> psycopg.Connection[Any]:
        arguments = {**self._connect_arguments, **_deadlines()}
        # Poolers lose prepared statements.
        connection = psycopg.connect(**arguments, autocommit=True, prepare_threshold=None)
        try:
            connection.execute(f"SET statement_timeout = {int(READ_TIMEOUT_S * 1000)}")
            row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
            if row is None or row[0]:
                raise StoreUnavailable(
                    "this PostgreSQL is a standby, which may be behind; name the primary"
                )
            if self._listen:
                # Before the first read: an edit between a read and LISTEN would be lost.
                connection.execute(f"LISTEN {CHANNEL}")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._must_load = True
        self._record.count(CONNECTED)
        return connection

    def _wait(self, timeout_s: float) -> None:
        """Until a notification, a wake, or `timeout_s`."""
        connection = self._connection
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if connection is not None:
            # Notifications that came with the answer to a read are not on the socket any more.
            if self._take(connection):
                return
            poll.register(connection.fileno(), select.POLLIN)
        poll.poll(timeout_s * 1000)
        if connection is not None:
            self._take(connection)
        try:
            self._woken.recv(4096)
        except BlockingIOError:
            pass  # nobody called wake

    def _take(self, connection: psycopg.Connection[Any]) -> bool:
        """Read what has arrived, so that a burst is one round. Raises psycopg.Error when it is
        the end of the connection."""
        count = sum(1 for _ in connection.notifies(timeout=0))
        if count:
            self._record.count(NOTIFIED)
        return count > 0

    def _lost(self, error: Exception) -> float:
        self._record.fault("listening to the database", error)
        self._record.count(DISCONNECTED)
        self._disconnect()
        self._reset()
        return self._back_off()

    def _back_off(self) -> float:
        delay_s = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        self._failures += 1
        return delay_s

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _read_mark(connection: psycopg.Connection[Any]) -> Mark:
    row = connection.execute(MARK).fetchone()
    if row is None:
        raise StoreUnavailable("config_state has no row: the database is not migrated")
    return Mark("", int(row[0]), str(row[1]))


def _deadlines() -> dict[str, Any]:
    """So that a silent network is an error within seconds (libpq, Linux)."""
    return {
        "connect_timeout": 2,
        "tcp_user_timeout": 1000,
        "keepalives": 1,
        "keepalives_idle": 1,
        "keepalives_interval": 1,
        "keepalives_count": 2,
    }

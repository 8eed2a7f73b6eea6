"""Writes the log beside the requests: batched, bounded, never in anybody's way.

Without the database entries wait, up to the bound; then the newest are dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.config import Logs
from gateway.errors import StoreUnavailable
from gateway.logs.batch import write_batch
from gateway.logs.queue import Counts, Queue, without_body
from gateway.store.database import Database
from gateway.values.logentry import LogEntry

log = logging.getLogger(__name__)

MAX_ENTRIES = 10_000
MAX_BYTES = 64 << 20
BATCH = 500
EVERY_S = 0.5  # the longest that an entry waits for others
BACKOFF_S = (0.5, 30.0)  # first and longest wait after a failure; each is twice the one before
ATTEMPTS_WITH_TEXTS = 5  # in a row, before a single entry is tried without them
DRAIN_S = 5.0
TELL_S = 60.0


def _wall() -> datetime:
    return datetime.now(UTC)


class LogWriter:
    """`add` is for any thread; the rest of its state belongs to its own thread, or to the caller of
    `write_some` where that was not started."""

    def __init__(
        self,
        database: Database,
        logs: Logs,
        registry: CollectorRegistry | None = None,
        *,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = _wall,
    ):
        """clock: monotonic seconds; wall: aware time, of the last use of configuration objects."""
        self._database = database
        self._keeps_bodies = logs.bodies
        self._clock = clock
        self._wall = wall
        self._queue = Queue(max_entries, max_bytes)
        self._thread = threading.Thread(target=self._run, name="gateway-logs", daemon=True)
        self._is_hurried = False
        self._stop_at: float | None = None
        self._most = BATCH  # of the next batch; smaller after a failure
        self._failures = 0  # in a row
        self._told = (clock(), 0)  # when drops were last told, and how many there were
        self._tell_lock = threading.Lock()
        if registry is not None:
            registry.register(_Collector(self._queue))

    @property
    def keeps_bodies(self) -> bool:
        return self._keeps_bodies

    @property
    def counts(self) -> Counts:
        return self._queue.counts

    def start(self) -> None:
        self._thread.start()

    def add(self, entry: LogEntry) -> None:
        """Never raises and never waits for the database."""
        try:
            if entry.body is not None and not self._keeps_bodies:
                entry = without_body(entry)  # whoever sent one does not know of the switch
            if self._stop_at is not None or not self._queue.add(entry, self._clock()):
                if self._stop_at is not None:
                    self._queue.done(0, dropped=1)
                self._tell(self._clock())
        except Exception:
            # The request was answered; its log must not make an error of it.
            log.exception("an entry of the log was lost")
            self._queue.done(0, dropped=1)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was added before is written or refused. False: not in this time."""
        queue, until = self._queue, self._clock() + timeout_s
        if not self._thread.is_alive():
            while len(queue) and self._clock() < until:
                if not self.write_some(self._clock()):
                    return False
            return not len(queue)
        target = queue.counts.queued
        with queue.changed:
            self._is_hurried = True
            queue.changed.notify_all()
            return queue.changed.wait_for(
                lambda: queue.counts.written + queue.counts.refused >= target, timeout_s
            )

    def stop(self, timeout_s: float = DRAIN_S) -> None:
        """Write what waits, for `timeout_s` at most; what is left then is dropped and told."""
        with self._queue.changed:
            self._stop_at = self._clock() + timeout_s
            self._queue.changed.notify_all()
        if self._thread.is_alive():
            # A statement that hangs is not waited for: the process has to end.
            self._thread.join(timeout_s + 1.0)
        left = len(self._queue)
        if left:
            log.warning("%d entries of the log were not written before the stop", left)
            if not self._thread.is_alive():
                self._queue.done(left, dropped=left)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            try:
                self.write_some(self._clock())
            except Exception:  # the top of a loop
                self._failures += 1
                log.exception("the log's writer failed; it tries again")
            self._tell(self._clock())

    def _wait(self) -> bool:
        """Until there is something to write; False: stop."""
        queue = self._queue
        with queue.changed:
            if self._failures:
                first, longest = BACKOFF_S
                wait_s = min(longest, first * 2 ** min(self._failures - 1, 10))
                queue.changed.wait_for(lambda: self._stop_at is not None, wait_s)
                if self._stop_at is not None:
                    # Stopping, there is no time for long waits; short ones, to spare the database.
                    queue.changed.wait_for(lambda: False, min(0.1, wait_s))
            while True:
                now, oldest = self._clock(), queue.oldest()
                if self._stop_at is not None:
                    return oldest is not None and now < self._stop_at
                if oldest is None:
                    self._is_hurried = False
                    if not queue.changed.wait(TELL_S):
                        return True  # nothing to write, perhaps drops to tell
                    continue
                due_s = oldest + EVERY_S - now
                if due_s <= 0 or len(queue) >= BATCH or self._is_hurried or self._failures:
                    return True
                queue.changed.wait(due_s)

    def write_some(self, now: float) -> bool:
        """Write one batch of the oldest; False: the database does not take it now. now: monotonic
        seconds."""
        entries = self._queue.head(self._most)
        if not entries:
            return True
        try:
            self._write(entries)
        except StoreUnavailable as exc:
            return self._failed(entries, exc)
        except Exception as exc:
            # Of whatever type: one of them cannot be written, and the others shall not wait for it.
            log.warning("a batch of the log was refused (%s); one by one now", type(exc).__name__)
            return self._one_by_one(entries)
        self._succeeded(len(entries))
        return True

    def _write(self, entries: tuple[LogEntry, ...]) -> None:
        with self._database.transaction() as connection:
            write_batch(connection, entries, self._wall())

    def _succeeded(self, number: int) -> None:
        if self._failures:
            log.info("the log is written again; %d entries wait", len(self._queue) - number)
        self._failures = 0
        self._most = min(BATCH, self._most * 2)
        self._queue.done(number, written=number)

    def _failed(self, entries: tuple[LogEntry, ...], exc: StoreUnavailable) -> bool:
        if not self._failures:
            log.warning("the log cannot be written and waits: %s", exc)
        self._failures += 1
        # A batch that is too much for the database is smaller next time; a single entry, after
        # some attempts, goes without its texts, so that it does not hold up all others for ever.
        self._most = max(1, self._most // 2)
        is_tried = self._failures >= ATTEMPTS_WITH_TEXTS
        if is_tried and len(entries) == 1 and entries[0].body is not None:
            try:
                self._write((without_body(entries[0]),))
            except StoreUnavailable:
                return False
            self._queue.done(1, written=1, bodies_dropped=1)
            self._failures, self._most = 0, 1
            return True
        return False

    def _one_by_one(self, entries: tuple[LogEntry, ...]) -> bool:
        for entry in entries:
            try:
                if self._write_one(entry):
                    self._queue.done(1, written=1)
                else:
                    self._queue.done(1, refused=1)
            except StoreUnavailable as exc:
                return self._failed((entry,), exc)
        self._failures = 0
        return True

    def _write_one(self, entry: LogEntry) -> bool:
        tries = (entry,) if entry.body is None else (entry, without_body(entry))
        for one in tries:
            try:
                self._write((one,))
                return True
            except StoreUnavailable:
                raise
            except Exception as exc:
                # Only its type: a driver's message may hold the values.
                log.error(
                    "log of %s refused (%s)%s",
                    entry.endpoint,
                    type(exc).__name__,
                    "; without its texts now" if one.body is not None else "",
                )
        return False

    def _tell(self, now: float) -> None:
        """One line a minute about what was dropped."""
        with self._tell_lock:
            at, before = self._told
            dropped = self._queue.counts.dropped
            if dropped == before or (before and now - at < TELL_S):
                return
            self._told = (now, dropped)
        log.warning("%d entries of the log were dropped: more came than fit", dropped - before)


class _Collector(Collector):
    """The writer's counts, read when they are asked for."""

    def __init__(self, queue: Queue):
        self._queue = queue

    def collect(self) -> list[Metric]:
        counts = self._queue.counts
        entries = CounterMetricFamily(
            "gateway_log_entries", "Entries of the request log.", labels=("outcome",)
        )
        for outcome in ("queued", "written", "dropped", "bodies_dropped", "refused"):
            entries.add_metric((outcome,), getattr(counts, outcome))
        return [
            entries,
            GaugeMetricFamily(
                "gateway_log_waiting", "Entries that wait to be written.", len(self._queue)
            ),
        ]

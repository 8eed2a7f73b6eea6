"""Tells what has happened to jobs, until it is heard: the loop over the journal's outbox.

Of one job and kind only the oldest waiting delivery goes; of different jobs several at a time, so
that one receiver that hangs holds up nobody else's.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from worker.errors import JournalUnavailable
from worker.jobs.bell import Bell
from worker.jobs.journal import Journal
from worker.log import request_scope
from worker.storage.deliver import (
    Again,
    Alarm,
    Delivered,
    Delivery,
    Lane,
    Outcome,
    Sender,
    backoff_s,
    is_dead,
    next_due,
)

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
AT_A_TIME = 4


class Outbox:
    """The outbox's loop on one thread, with AT_A_TIME more that send. `_busy` changes under
    `_lock`."""

    def __init__(
        self,
        journal: Journal,
        bell: Bell,
        sender: Sender,
        give_up_after_s: float,
        clock: Callable[[], float] = time.time,
        pace: Callable[[int], float] = lambda attempts: backoff_s(attempts, random.random()),
    ):
        """give_up_after_s: since a delivery was made, until it becomes a dead letter."""
        self._journal = journal
        self._bell = bell
        self._sender = sender
        self._give_up_after_s = give_up_after_s
        self._clock = clock
        self._pace = pace
        self._lock = threading.Lock()
        self._busy: set[Lane] = set()
        self._first: set[Lane] = set()  # of these, what was never tried before
        self._stopping = False
        self._pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="deliver")
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    @property
    def active(self) -> int:
        """Deliveries that are under way for the first time. A drain waits for these; what failed
        before is told after the next start."""
        with self._lock:
            return len(self._first)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping = True
        self._bell.ring()
        self._thread.join(timeout=5)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        seen = 0
        while not self._stopping:
            try:
                self.tick()
            except JournalUnavailable as exc:
                log.error("%s", exc)
            seen = self._bell.wait(seen, LOOK_EVERY_S)

    def tick(self) -> None:
        """Send what is due."""
        # Read before the journal is: what ends in between still waits in what is read then.
        with self._lock:
            busy = set(self._busy)
        waiting = self._journal.deliveries()
        while len(busy) < AT_A_TIME:
            one = next_due(waiting, self._clock(), frozenset(busy))
            if one is None:
                return
            busy.add(one.lane)
            with self._lock:
                self._busy.add(one.lane)
                if not one.attempts:
                    self._first.add(one.lane)
            self._pool.submit(self._send, one)

    def _send(self, delivery: Delivery) -> None:
        with request_scope(delivery.job_id):
            try:
                self._settle(delivery, self._outcome(delivery))
            except JournalUnavailable as exc:
                log.error("%s", exc)  # it is sent again: whoever hears it knows its id
                time.sleep(LOOK_EVERY_S)
            finally:
                with self._lock:
                    self._busy.discard(delivery.lane)
                    self._first.discard(delivery.lane)
                self._bell.ring()

    def _outcome(self, delivery: Delivery) -> Outcome:
        try:
            return self._sender.send(delivery, self._clock())
        except Exception:
            log.exception("sending failed")
            return Again("unexpected error in the worker; the log has the details")

    def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        if isinstance(outcome, Delivered):
            self._journal.delivery_state(delivery.id, "delivered")
            log.info("%s delivered, try %d", delivery.kind, delivery.attempts + 1)
            return
        tries = delivery.attempts + 1
        level = logging.ERROR if isinstance(outcome, Alarm) else logging.WARNING
        log.log(level, "%s not delivered, try %d: %s", delivery.kind, tries, outcome.reason)
        if is_dead(delivery.created_at, self._clock(), tries, self._give_up_after_s):
            self._journal.delivery_state(delivery.id, "dead", outcome.reason)
            log.error("%s given up after %d tries", delivery.kind, tries)
            return
        after_s = outcome.after_s if outcome.after_s is not None else self._pace(tries)
        self._journal.delivery_failed(delivery.id, outcome.reason, after_s)

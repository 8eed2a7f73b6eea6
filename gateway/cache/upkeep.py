"""What a process does beside serving: signs of life, snapshot.json, and seeing a fall that no
request sees. A thread of its own, so that a slow disk or lock delays no load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gateway.cache.holder import Held
from gateway.cache.instances import BEAT_S, Instances
from gateway.cache.last_good import LastGood
from gateway.cache.record import SAVE_FAILED, SAVED, Record
from gateway.cache.snapshot_json import Saved
from gateway.errors import GatewayError

TICK_S = 1.0
# From a load to its sign of life, so that other replicas on the machine load first, and edits that
# come together are one.
BEAT_AFTER_S = 0.05
# From a load to the write: edits that come together are one write, and all replicas have loaded
# before one of them spends time on its file. A crash loses at most this much of it.
SAVE_AFTER_S = 1.0
SAVE_AGAIN_S = 300.0  # an unchanged file says when it was last verified, this exactly


class Upkeep:
    """Its thread owns the times below and is the only writer of this process's row and file."""

    def __init__(
        self,
        look: Callable[[], Held],
        instances: Instances,
        last_good: LastGood,
        record: Record,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self._look = look
        self._instances = instances
        self._last_good = last_good
        self._record = record
        self._clock = clock
        self._wall = wall
        self._beat: tuple[int, float] | None = None  # revision and time of the last one
        self._saved: tuple[Held, float] | None = None
        self._untold_since: float | None = None  # of a revision that the row does not have yet
        self._unsaved_since: float | None = None  # of a configuration that is not in the file yet
        self._stopping = False
        self._event = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway-upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something was loaded."""
        self._event.set()

    def stop(self) -> None:
        self._stopping = True
        self._event.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopping:
            self._event.wait(wait_s)
            self._event.clear()
            wait_s = self.tick(self._clock())
        held = self._look()
        if held.verified:
            self._save(held, self._clock())
            self._try("leaving the list of instances", self._instances.leave)

    def tick(self, now: float) -> float:
        """One round; returns the seconds until the next."""
        held = self._look()
        if not held.verified:
            return TICK_S  # nothing to say: neither that it is current nor that it was good
        wait_s = self._beat_if_due(held, now)
        if self._is_save_due(held, now):
            self._save(held, now)
        return wait_s  # TICK_S at most, so that a write that was put off is not late

    def _beat_if_due(self, held: Held, now: float) -> float:
        revision = held.snapshot.revision
        if self._beat is None or self._beat[0] != revision:
            if self._untold_since is None:
                self._untold_since = now
            due_at = self._untold_since + BEAT_AFTER_S
        else:
            due_at = self._beat[1] + BEAT_S
        if now < due_at:
            return min(TICK_S, due_at - now)
        if self._try("saying which revision is served", lambda: self._instances.beat(revision)):
            self._beat, self._untold_since = (revision, now), None
        return TICK_S

    def _is_save_due(self, held: Held, now: float) -> bool:
        if self._saved is not None and self._saved[0].snapshot is held.snapshot:
            return now - self._saved[1] >= SAVE_AGAIN_S
        if self._unsaved_since is None:
            self._unsaved_since = now
        return now - self._unsaved_since >= SAVE_AFTER_S

    def _save(self, held: Held, now: float) -> None:
        # Kept also when it fails: a full disk is tried again in SAVE_AGAIN_S or with the next edit.
        self._saved, self._unsaved_since = (held, now), None
        verified_at = self._wall() - (held.age_ms or 0.0) / 1000
        saved = Saved(held.snapshot, verified_at)
        done = self._try("writing snapshot.json", lambda: self._last_good.write(saved))
        self._record.count(SAVED if done else SAVE_FAILED, held.snapshot.revision)

    def _try(self, what: str, act: Callable[[], None]) -> bool:
        try:
            act()
        except (GatewayError, OSError, ValueError) as exc:
            self._record.fault(what, exc)
            return False
        except Exception as exc:  # the top of a loop
            self._record.fault(what, exc, traceback=True)
            return False
        self._record.fine(what)
        return True

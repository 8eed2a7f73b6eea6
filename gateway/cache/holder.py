"""What a process serves, and how it is judged: one immutable reference that a writer swaps.

Fallback levels, in every answer: 0 verified against the database; 1 the last known good, from
memory or from snapshot.json; 2 the emergency file of the package.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from gateway.values.rows import Snapshot

DATABASE, DISK, EMERGENCY = "database", "disk", "emergency"

FLAG_UNVERIFIED = "prompts_unverified"
FLAG_DISK = "prompts_from_disk"
FLAG_EMERGENCY = "prompts_emergency"
FLAG_TOO_LONG = "unverified_too_long"


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a database stands: equal marks mean equal configurations.

    The revision alone would not do: a database that was restored and edited again can come back to
    a revision that a process already holds, with other rows. A number kept in the database does not
    tell either, because a backup brings it along. The time of the last change and the file do.
    """

    database: str  # SQLite: device and inode of the file; PostgreSQL: "", it reloads on reconnect
    revision: int
    changed_at: str | None  # None: not known, since an edit came while the rows were read

    def agrees(self, now: Mark) -> bool:
        """Whether a configuration with this mark is what a database that stands at `now` has."""
        return (
            self.database == now.database
            and self.revision == now.revision
            and self.changed_at in (None, now.changed_at)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A configuration, where it came from and when it was last known to be the database's."""

    snapshot: Snapshot
    source: str  # database | disk | emergency
    verified_at: float | None = None  # monotonic seconds, taken before the read; None: never
    mark: Mark | None = None  # None: nothing that a database could agree with


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one request works with: taken once at its start, never changes under it."""

    snapshot: Snapshot
    level: int  # 0 | 1 | 2
    verified_at: float | None  # monotonic seconds
    age_ms: float | None  # since it was last verified; None: it never was (level 2)
    flags: tuple[str, ...] = ()
    cache_hit: bool = True  # False: this request had to load it

    @property
    def verified(self) -> bool:
        return self.level == 0


def judge(
    state: State,
    now: float,
    *,
    is_verified: bool,
    max_unverified_s: float,
    cache_hit: bool = True,
) -> Held:
    """Level and flags of `state`. is_verified: the source's word that the database still has it."""
    age_s = None if state.verified_at is None else max(0.0, now - state.verified_at)
    flags: list[str] = []
    if state.source == EMERGENCY:
        level = 2
        flags.append(FLAG_EMERGENCY)
    elif is_verified and state.source == DATABASE:
        level = 0
    else:
        level = 1
        flags.append(FLAG_DISK if state.source == DISK else FLAG_UNVERIFIED)
        if age_s is None or age_s > max_unverified_s:
            flags.append(FLAG_TOO_LONG)
    return Held(
        snapshot=state.snapshot,
        level=level,
        verified_at=state.verified_at,
        age_ms=None if age_s is None else age_s * 1000,
        flags=tuple(flags),
        cache_hit=cache_hit,
    )


class Holder:
    """The reference. Read by any thread without a lock; written by one source, under `_changed`."""

    def __init__(self, first: State):
        self._state = first
        self._changed = threading.Condition()

    @property
    def state(self) -> State:
        return self._state

    def swap(self, state: State) -> State:
        """Serve `state` from now on; returns what was served before."""
        with self._changed:
            before, self._state = self._state, state
            self._changed.notify_all()
        return before

    def verify(self, state: State, at: float, mark: Mark) -> None:
        """Note that the database still had `state` at `at`. Without effect once it is replaced."""
        with self._changed:
            current = self._state
            if current.snapshot is state.snapshot and current.source == state.source:
                latest = max(at, current.verified_at or at)
                self._state = replace(current, verified_at=latest, mark=mark)

    def wait_for(self, revision: int, timeout_s: float) -> bool:
        """Wait until the revision or a later one is served; False: it is not."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._state.snapshot.revision >= revision, max(0.0, timeout_s)
            )

"""Where a configuration comes from: what the façade asks of either engine, and how rows are read
together with their mark."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.cache.holder import DATABASE, Holder, Mark, State
from gateway.cache.record import LOADED, RESTORED, Record
from gateway.errors import StoreUnavailable
from gateway.values.rows import Snapshot

logger = logging.getLogger(__name__)

Load = Callable[[], Snapshot]  # one consistent read of the whole configuration


@dataclass(frozen=True, slots=True)
class Look:
    """What is served, and whether the source vouches for it now."""

    state: State
    is_verified: bool
    loaded: bool = False  # this look had to load it


class Source(Protocol):
    """Keeps a Holder like the database."""

    retry_s: float  # how often a reader who waits for a revision should look again

    def start(self) -> None:
        """Try to load once, within seconds, and keep on by itself. Raises nothing."""

    def look(self, now: float) -> Look: ...

    def wake(self) -> None:
        """An edit was made here: look at the database now. For any thread."""

    def stop(self) -> None: ...


def load_marked(read: Callable[[], Mark], load: Load) -> tuple[Snapshot, Mark]:
    """Rows, and the mark that they have.

    Mark and rows are two reads; where an edit comes between them, the revision of the rows counts
    and the time of its change is learnt at the next look. Raises StoreUnavailable where the rows
    are older than the mark: they were read elsewhere, such as from a standby that is behind.
    """
    before = read()
    snapshot = load()
    if snapshot.revision == before.revision:
        return snapshot, before
    if snapshot.revision < before.revision:
        raise StoreUnavailable(
            f"the configuration was read at revision {snapshot.revision} while the database is at "
            f"{before.revision}; both have to be read from the primary"
        )
    return snapshot, replace(before, revision=snapshot.revision, changed_at=None)


def serve(holder: Holder, record: Record, snapshot: Snapshot, mark: Mark, at: float) -> State:
    """Swap in what was read from the database at `at` (monotonic, before the read)."""
    state = State(snapshot=snapshot, source=DATABASE, verified_at=at, mark=mark)
    before = holder.swap(state)
    if snapshot.revision < before.snapshot.revision:
        # Committed revisions only rise, and one thread at a time reads them, from a primary. So the
        # database itself went back: a backup was restored, or a failover lost commits.
        logger.warning(
            "the database went back from revision %d to %d; serving what it has now",
            before.snapshot.revision,
            snapshot.revision,
        )
        record.count(RESTORED, snapshot.revision)
    record.count(LOADED, snapshot.revision)
    return state

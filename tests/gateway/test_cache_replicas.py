"""Four replicas as real processes: no edit is missed, and who wrote reads what was written.

How long an edit takes is measured by scripts/bench_gateway.py. GATEWAY_RYW is the number of random
writes and reads; 100000 is the full count of goal 2.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.gateway.cache_parts import Place, PostgresPlace, edit, postgres_place, sqlite_place
from tests.gateway.replica import ReplicaProcess

REPLICAS = 4
SEEN_WITHIN_S = 5.0  # the bound is 1.25 s; machines of tests are shared
EDITS = 12
OPERATIONS = int(os.environ.get("GATEWAY_RYW", "2000"))
WRITERS = 4


@contextmanager
def replicas(place: Place, folder: Path, *, listen: bool = True) -> Iterator[list[ReplicaProcess]]:
    with ExitStack() as stack:
        found = []
        for number in range(REPLICAS):
            one = ReplicaProcess(place.url, folder / f"state{number}", listen=listen)
            stack.callback(one.stop)
            found.append(one)
        for one in found:
            one.wait_until_ready()
        yield found


def wait_until_all_serve(found: list[ReplicaProcess], revision: int) -> list[float]:
    """By plain requests, without asking for the revision. Seconds until each has it."""
    started = time.monotonic()
    took = []
    for one in found:
        while one.ask("held")["revision"] < revision:
            assert time.monotonic() - started < SEEN_WITHIN_S, f"revision {revision} was missed"
            time.sleep(0.005)
        took.append(time.monotonic() - started)
    return took


@pytest.fixture
def postgres_database(postgres: object, migrated_postgres: str) -> Iterator[PostgresPlace]:
    with postgres_place(postgres, migrated_postgres) as place:  # type: ignore[arg-type]
        yield place


def test_every_edit_is_seen_by_four_replicas_while_their_listeners_are_killed(
    postgres_database: PostgresPlace, tmp_path: Path
) -> None:
    killed = 0
    with replicas(postgres_database, tmp_path) as found, postgres_database.opened() as database:
        for number in range(EDITS):
            killed += postgres_database.kill_listeners()
            revision = edit(database, f"edit {number}")
            wait_until_all_serve(found, revision)
            answers = [one.ask("held") for one in found]

            assert {one["word"] for one in answers} == {f"edit {number}"}
        reconnects = [one.ask("status")["counts"]["connected"] for one in found]

    assert killed >= REPLICAS
    assert min(reconnects) > 1


def test_every_edit_is_seen_by_four_replicas_that_are_told_nothing(
    postgres_database: PostgresPlace, tmp_path: Path
) -> None:
    with (
        replicas(postgres_database, tmp_path, listen=False) as found,
        postgres_database.opened() as database,
    ):
        for number in range(EDITS // 2):
            revision = edit(database, f"edit {number}")
            wait_until_all_serve(found, revision)
        counts = [one.ask("status")["counts"] for one in found]

    assert not any("notified" in one for one in counts)


def test_an_edit_is_in_the_next_answer_of_every_process_on_sqlite(
    migrated_sqlite: Path, tmp_path: Path
) -> None:
    with (
        sqlite_place(tmp_path, migrated_sqlite) as place,
        replicas(place, tmp_path) as found,
        place.opened() as database,
    ):
        for number in range(EDITS):
            revision = edit(database, f"edit {number}")
            answers = [one.ask("held") for one in found]

            assert [one["revision"] for one in answers] == [revision] * REPLICAS
            assert {one["word"] for one in answers} == {f"edit {number}"}
            assert {one["level"] for one in answers} == {0}


@pytest.mark.timeout(3600 if OPERATIONS > 10_000 else 180)
@pytest.mark.parametrize("engine", ["postgresql", "sqlite"])
def test_who_wrote_reads_what_was_written_or_newer(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        place = (
            stack.enter_context(sqlite_place(tmp_path, request.getfixturevalue("migrated_sqlite")))
            if engine == "sqlite"
            else stack.enter_context(
                postgres_place(
                    request.getfixturevalue("postgres"),
                    request.getfixturevalue("migrated_postgres"),
                )
            )
        )
        found = stack.enter_context(replicas(place, tmp_path))
        written = Written()
        failures: list[str] = []
        threads = [
            threading.Thread(target=client, args=(seed, place, found, written, failures))
            for seed in range(WRITERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert failures == []
    assert written.reads + written.writes >= OPERATIONS // WRITERS * WRITERS
    assert min(written.reads, written.writes) > OPERATIONS // 20


class Written:
    """The newest edit that is known to be committed; by all clients, under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.revision = 0
        self.words: dict[int, str] = {}  # revision → text
        self.reads = 0
        self.writes = 0

    def add(self, revision: int, word: str) -> None:
        with self.lock:
            self.words[revision] = word
            self.revision = max(self.revision, revision)
            self.writes += 1


def client(
    seed: int, place: Place, found: list[ReplicaProcess], written: Written, failures: list[str]
) -> None:
    """Writes and reads in random order; a read asks a random replica for the newest known edit."""
    chance = random.Random(seed)
    try:
        with place.opened() as database:
            for number in range(OPERATIONS // WRITERS):
                if chance.random() < 0.2:
                    word = f"client {seed} edit {number}"
                    written.add(edit(database, word), word)
                    continue
                wanted = written.revision
                answer = chance.choice(found).ask("held", min=wanted)
                written.reads += 1
                if (problem := violation(answer, wanted, written)) is not None:
                    failures.append(problem)
    except Exception as exc:
        failures.append(f"client {seed}: {type(exc).__name__}: {exc}")


def violation(answer: dict[str, object], wanted: int, written: Written) -> str | None:
    if "error" in answer:
        return f"{answer} for {wanted}, which was committed"
    revision = answer["revision"]
    assert isinstance(revision, int)
    if revision < wanted:
        return f"revision {revision} was served for {wanted}"
    # A commit of another client may be served before that client could note it.
    expected = written.words.get(revision)
    if expected is not None and answer["word"] != expected:
        return f"revision {revision} was served with the text of another"
    return None

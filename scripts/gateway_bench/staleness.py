"""How long an edit takes to be served by four replicas that are real processes.

A replica notes when it swaps a revision in; every answer it gives from then on has it. The time of
an edit is taken before its commit is sent, by the same clock, so the commit itself counts as well.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text

from gateway.store.database import Database
from tests.gateway.cache_parts import Place, postgres_place, sqlite_place
from tests.gateway.postgres import Server
from tests.gateway.replica import ReplicaProcess

LAST_EDIT_S = 10.0  # how long the last edit is waited for before it counts as missed
KILLS = 10
DEAF = "PostgreSQL, push deaf"

Progress = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Scene:
    name: str
    listen: bool = True
    kills: int = 0
    # Between edits: longer than a replica waits between two reads where nothing tells it, so that
    # edits meet every phase of that wait.
    pause_s: tuple[float, float] = (0.1, 0.3)


POSTGRES_SCENES = (
    Scene("PostgreSQL, normal"),
    Scene("PostgreSQL, listeners killed", kills=KILLS),
    Scene(DEAF, listen=False, pause_s=(0.3, 1.3)),
)


@dataclass(slots=True)
class Result:
    """Milliseconds from the commit of an edit to its being served, for each edit and replica."""

    scene: str
    replicas: int
    edits: int
    milliseconds: list[float] = field(default_factory=list)
    missed: int = 0  # edits × replicas that were never served
    killed: int = 0  # connections

    def row(self) -> dict[str, Any]:
        found = sorted(self.milliseconds)
        return {
            "scene": self.scene,
            "replicas": self.replicas,
            "edits": self.edits,
            "killed": self.killed,
            "missed": self.missed,
            "p50_ms": quantile(found, 0.5),
            "p99_ms": quantile(found, 0.99),
            "worst_ms": round(found[-1], 3) if found else None,
        }


def quantile(ordered: list[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def on_postgres(
    server: Server, scene: Scene, *, edits: int, replicas: int, rules: int, progress: Progress
) -> Result:
    result = Result(scene.name, replicas, edits)
    chance = random.Random(0)
    kill_at = {round((number + 1) * edits / (scene.kills + 1)) for number in range(scene.kills)}
    with ExitStack() as stack:
        place = stack.enter_context(postgres_place(server, rules=rules))
        found = stack.enter_context(started(place, replicas, listen=scene.listen))
        database = stack.enter_context(place.opened())
        commits: list[tuple[int, float]] = []
        for number in range(edits):
            if number in kill_at:
                result.killed += place.kill_listeners()
            commits.append(edit(database, number))
            time.sleep(chance.uniform(*scene.pause_s))
            progress()
        for one in found:
            took = _times(one, commits)
            result.milliseconds += [found_s * 1000 for found_s in took if found_s is not None]
            result.missed += sum(found_s is None for found_s in took)
    return result


def on_sqlite(*, edits: int, replicas: int, rules: int, progress: Progress) -> Result:
    """Each request compares, so the time is that of the first answer, and no answer may be stale:
    one that is counts as missed."""
    result = Result("SQLite, checked per request", replicas, edits)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = stack.enter_context(sqlite_place(folder, rules=rules))
        found = stack.enter_context(started(place, replicas))
        database = stack.enter_context(place.opened())
        for number in range(edits):
            revision, _ = edit(database, number)
            for one in found:
                answer = one.ask("held")
                result.milliseconds.append(answer["took_s"] * 1000)
                result.missed += answer["revision"] != revision
            progress()
    return result


def edit(database: Database, number: int) -> tuple[int, float]:
    """Its revision, and the time before its commit."""
    with database.transaction() as connection:
        connection.execute(
            text("UPDATE negative_prompts SET negative_prompt = :word WHERE id = 1"),
            {"word": f"measured {number}"},
        )
        revision = int(connection.scalar(text("SELECT revision FROM config_state")) or 0)
        at = time.monotonic()
    return revision, at


@contextmanager
def started(place: Place, count: int, *, listen: bool = True) -> Iterator[list[ReplicaProcess]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for number in range(count):
            one = ReplicaProcess(place.url, folder / str(number), listen=listen)
            stack.callback(one.stop)
            found.append(one)
        for one in found:
            one.wait_until_ready()
        time.sleep(1.0)  # first signs of life and files are written
        yield found


def _times(one: ReplicaProcess, commits: list[tuple[int, float]]) -> list[float | None]:
    """Seconds from each commit to the first swap to its revision or a later one; None: never."""
    loads: list[tuple[int, float]] = []
    end = time.monotonic() + LAST_EDIT_S
    while True:
        loads += [(revision, at) for revision, at in one.ask("loads")["loads"]]
        is_done = bool(loads) and loads[-1][0] >= commits[-1][0]
        if is_done or time.monotonic() > end:
            break
        time.sleep(0.05)
    return [
        next((at - committed for revision, at in loads if revision >= wanted), None)
        for wanted, committed in commits
    ]

"""The outage matrix: twelve templates at three levels, on both engines; and every way to get there.

A database is taken away for real: a SQLite file is moved, a PostgreSQL database ends its
connections and takes no more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.cache.holder import FLAG_DISK, FLAG_EMERGENCY, FLAG_TOO_LONG, FLAG_UNVERIFIED, Held
from gateway.cache.last_good import LastGood
from gateway.cache.prompts import Prompts
from gateway.cache.snapshot_json import Saved
from tests.gateway.cache_parts import (
    TUPLES,
    Place,
    edit,
    emergency,
    postgres_place,
    small_snapshot,
    sqlite_place,
)

ENGINES = ("sqlite", "postgresql")
WORDS = ("database", "database", "emergency")  # in the texts, by level


class World:
    """A database, a state folder and one process's cache, on a clock that can be moved on."""

    def __init__(self, place: Place, state_dir: Path):
        self.place = place
        self.state_dir = state_dir
        self.skipped_s = 0.0
        self.prompts = Prompts(
            place.url,
            state_dir,
            emergency,
            max_unverified_s=3600,
            clock=lambda: time.monotonic() + self.skipped_s,
        )

    def go_down(self) -> None:
        self.place.take_away()
        self.skipped_s += 2.0  # longer than a verification holds


@contextmanager
def new_world(request: pytest.FixtureRequest, engine: str, folder: Path) -> Iterator[World]:
    with ExitStack() as stack:
        if engine == "sqlite":
            place = stack.enter_context(
                sqlite_place(folder, request.getfixturevalue("migrated_sqlite"))
            )
        else:
            place = stack.enter_context(
                postgres_place(
                    request.getfixturevalue("postgres"),
                    request.getfixturevalue("migrated_postgres"),
                )
            )
        world = World(place, folder / "state")
        stack.callback(world.prompts.stop)
        yield world


@pytest.fixture(
    scope="module", params=[(e, level) for e in ENGINES for level in (0, 1, 2)], ids=str
)
def at_level(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, int]]:
    engine, level = request.param
    with new_world(request, engine, tmp_path_factory.mktemp("outage")) as world:
        if level == 2:
            world.go_down()
        world.prompts.start()
        if level == 1:
            until_level(world.prompts, 0)
            world.go_down()
        yield world, level


@pytest.mark.parametrize("tuple4", TUPLES, ids="-".join)
def test_every_template_resolves_at_every_level(
    at_level: tuple[World, int], tuple4: tuple[str, str, str, str]
) -> None:
    world, level = at_level

    held = until_level(world.prompts, level)
    template = held.snapshot.template(*tuple4)

    assert held.level == level
    assert template is not None
    assert template.tuple4 == tuple4
    assert template.live.system_prompt.startswith(WORDS[level])


def all_resolve(held: Held) -> bool:
    return all(held.snapshot.template(*one) is not None for one in TUPLES)


@pytest.mark.parametrize("file", ["good", "missing", "damaged"])
@pytest.mark.parametrize("database", ["up", "gone mid-run", "gone at start"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_level_follows_the_database_and_the_file(
    engine: str, database: str, file: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with new_world(request, engine, tmp_path) as world:
        last_good = LastGood(world.state_dir)
        if file != "missing":
            last_good.write(Saved(small_snapshot(3, "disk"), time.time() - 7200))
        if file == "damaged":
            last_good.path.write_bytes(last_good.path.read_bytes()[:-40])

        if database == "gone at start":
            world.go_down()
        world.prompts.start()
        if database != "gone at start":
            held = until_level(world.prompts, 0)
        if database == "gone mid-run":
            world.go_down()
        if database != "up":
            held = world.prompts.held()

        assert all_resolve(held)
        if database == "up":
            assert (held.level, held.flags) == (0, ())
        elif database == "gone mid-run":
            assert (held.level, held.flags) == (1, (FLAG_UNVERIFIED,))
        elif file == "good":
            assert (held.level, held.flags) == (1, (FLAG_DISK, FLAG_TOO_LONG))
            assert held.snapshot.revision == 3
        else:
            assert (held.level, held.flags) == (2, (FLAG_EMERGENCY,))
        assert (world.state_dir / "snapshot.json.damaged").exists() == (file == "damaged")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_database_that_comes_back_is_served_with_what_was_edited_meanwhile(
    engine: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with new_world(request, engine, tmp_path) as world:
        world.prompts.start()
        until_level(world.prompts, 0)
        world.go_down()
        for _ in range(50):
            world.prompts.held()
        world.place.bring_back()
        with world.place.opened() as opened:
            revision = edit(opened, "meanwhile")

        # It may have connected between the return and the edit; then the bound holds as ever.
        held = until_level(world.prompts, 0, revision)

        assert held.snapshot.negatives[0].negative_prompt == "meanwhile"
        changes = [
            tuple(one.args[:2])
            for one in caplog.records
            if "fallback level" in one.msg and isinstance(one.args, tuple)
        ]
        # A busy machine may take longer than the bound for a read, and then says so as well.
        assert (0, 1) in changes
        assert changes[-1] == (1, 0)
        assert all(before != after for before, after in changes)
        assert all(one[1] == other[0] for one, other in pairwise(changes))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_started_without_its_database_finds_it_later(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with new_world(request, engine, tmp_path) as world:
        world.go_down()
        world.prompts.start()
        before = world.prompts.held()
        world.place.bring_back()

        assert before.level == 2
        assert until_level(world.prompts, 0).snapshot.negatives[0].negative_prompt == "edit 0"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_served_is_on_the_disk_for_the_next_process(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with new_world(request, engine, tmp_path) as world:
        world.prompts.start()
        with world.place.opened() as opened:
            revision = edit(opened, "last words")
        world.prompts.held(revision)
        world.prompts.stop()
        world.place.take_away()
        second = World(world.place, world.state_dir)
        second.prompts.start()

        held = second.prompts.held()
        second.prompts.stop()

        assert held.level == 1
        assert held.flags == (FLAG_DISK,)
        assert held.snapshot.revision == revision
        assert held.snapshot.negatives[0].negative_prompt == "last words"


def until_level(prompts: Prompts, level: int, revision: int = 0) -> Held:
    """For a process that works by itself: looks until it serves this, 20 s at most."""
    end = time.monotonic() + 20
    held = prompts.held()
    while (held.level != level or held.snapshot.revision < revision) and time.monotonic() < end:
        time.sleep(0.01)
        held = prompts.held()
    assert held.level == level
    assert held.snapshot.revision >= revision
    return held

"""The façade on both engines, with its threads running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway.cache import prompts as module
from gateway.cache.holder import Held, Holder, State, judge
from gateway.cache.instances import BEAT_S, Instances
from gateway.cache.last_good import LastGood
from gateway.cache.prompts import Prompts
from gateway.cache.record import LOADED, SAVED, Record
from gateway.cache.upkeep import BEAT_AFTER_S, SAVE_AFTER_S, SAVE_AGAIN_S, TICK_S, Upkeep
from gateway.errors import ConfigError, RevisionNotReached
from gateway.store.database import Database
from tests.gateway.cache_parts import edit, emergency, fill, small_snapshot


@pytest.fixture
def prompts(database: Database, tmp_path: Path) -> Iterator[Prompts]:
    fill(database)
    found = made(database, tmp_path)
    found.start()
    yield found
    found.stop()


def made(database: Database, folder: Path) -> Prompts:
    url = database.engine.url.render_as_string(hide_password=False)
    return Prompts(url, folder / "state", emergency)


def test_who_edited_reads_the_edit(prompts: Prompts, database: Database) -> None:
    for word in "abcde":
        revision = edit(database, word)
        held = prompts.held(revision)

        assert held.snapshot.revision >= revision
        assert held.snapshot.negatives[0].negative_prompt == word
        assert held.level == 0


def test_what_a_request_holds_does_not_change_under_it(
    prompts: Prompts, database: Database
) -> None:
    before = prompts.held()
    revision = edit(database, "later")
    prompts.held(revision)

    assert before.snapshot.negatives[0].negative_prompt == "edit 0"
    assert before.snapshot.revision == revision - 1


def test_a_revision_that_does_not_come_is_an_error_and_never_an_older_answer(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_REVISION_WAIT_S", 0.1)
    revision = prompts.held().snapshot.revision

    with pytest.raises(RevisionNotReached, match=f"serves {revision} at level 0") as caught:
        prompts.held(revision + 1)

    assert caught.value.status == 503
    assert caught.value.fields == {"revision": revision, "fallback_level": 0}


def test_the_wait_for_a_revision_has_the_length_that_is_promised() -> None:
    assert module.MIN_REVISION_WAIT_S == 2.0


def test_a_revision_that_is_committed_while_a_request_waits_is_served(
    prompts: Prompts, database: Database
) -> None:
    wanted = prompts.held().snapshot.revision + 1
    found: list[Held] = []
    waiting = threading.Thread(target=lambda: found.append(prompts.held(wanted)))
    waiting.start()

    edit(database, "at last")
    waiting.join()

    assert found[0].snapshot.revision == wanted


def test_an_edit_in_plain_sql_is_served(prompts: Prompts, database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE templates SET is_active = false WHERE id = 1"))
        revision = connection.scalar(text("SELECT revision FROM config_state"))

    held = prompts.held(revision)

    assert held.snapshot.template("sdxl", "image", "enhancement", "sfw") is None
    assert held.snapshot.template("sdxl", "image", "enhancement", "nsfw") is not None


def test_a_refresh_reaches_every_replica(
    prompts: Prompts, database: Database, tmp_path: Path
) -> None:
    other = made(database, tmp_path / "other")
    other.start()
    before = prompts.held().snapshot.revision
    both_are_listed(prompts)

    found = prompts.refresh(20.0)
    served = [one.held(found.revision).snapshot.revision for one in (prompts, other)]
    other.stop()

    assert found.reached
    assert found.revision == before + 1
    assert [one.state for one in found.instances] == ["reached", "reached"]
    assert found.slowest in {one.instance_id for one in found.instances}
    assert served == [found.revision] * 2


def both_are_listed(prompts: Prompts) -> None:
    end = time.monotonic() + 20
    while len(prompts.status()["instances"]) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(prompts.status()["instances"]) == 2


def test_the_status_tells_what_is_served_and_how_sure_it_is(
    prompts: Prompts, database: Database
) -> None:
    found = prompts.status()

    assert found["engine"] == database.engine.dialect.name
    assert found["fallback_level"] == 0
    assert found["flags"] == []
    assert found["source"] == "database"
    assert found["templates"] == 12
    assert found["last_error"] is None
    assert found["counts"][LOADED] >= 1
    assert found["staleness_bound_ms"] == (1250.0 if database.is_postgres else 0.0)


def test_a_process_that_stops_is_no_instance_any_more(
    prompts: Prompts, database: Database, tmp_path: Path
) -> None:
    other = made(database, tmp_path / "other")
    other.start()
    both_are_listed(prompts)

    other.stop()

    assert len(prompts.status()["instances"]) == 1


def test_nothing_is_served_before_the_start(tmp_path: Path) -> None:
    prompts = Prompts("sqlite:////nowhere", tmp_path, emergency)

    with pytest.raises(RuntimeError, match=r"Prompts\.start"):
        prompts.held()


def test_a_url_that_is_none_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompts("postgres//me:secret-word@host", tmp_path, emergency)

    assert "secret-word" not in str(caught.value)


# --- upkeep, without its thread ---------------------------------------------------------------


class Beats(Instances):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[int] = []

    def beat(self, revision: int) -> None:
        self.said.append(revision)


class Files(LastGood):
    """Keeps what was written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, float]] = []

    def write(self, saved: object) -> None:
        self.written.append((saved.snapshot.revision, saved.verified_at))  # type: ignore[attr-defined]


class Desk:
    """An upkeep with what it looks at."""

    def __init__(self) -> None:
        self.holder = Holder(State(snapshot=small_snapshot(1), source="database", verified_at=0.0))
        self.is_verified = True
        self.beats, self.files, self.record = Beats(), Files(), Record()
        self.now = 0.0
        self.upkeep = Upkeep(
            self.look, self.beats, self.files, self.record, wall=lambda: 5000.0 + self.now
        )

    def look(self) -> Held:
        return judge(
            self.holder.state, self.now, is_verified=self.is_verified, max_unverified_s=9.0
        )

    def tick(self, now: float) -> float:
        self.now = now
        return self.upkeep.tick(now)

    def load(self, revision: int) -> None:
        self.holder.swap(
            State(snapshot=small_snapshot(revision), source="database", verified_at=self.now)
        )


def test_a_sign_of_life_is_given_after_each_load_and_every_few_seconds() -> None:
    desk = Desk()
    desk.tick(0.0)
    desk.tick(BEAT_AFTER_S)
    desk.tick(1.0)
    desk.load(2)
    desk.tick(2.0)
    desk.tick(2.0 + BEAT_AFTER_S)

    desk.tick(2.0 + BEAT_AFTER_S + BEAT_S)

    assert desk.beats.said == [1, 2, 2]


def test_signs_of_life_of_fast_edits_are_put_together() -> None:
    desk = Desk()
    wait_s = desk.tick(0.0)
    desk.load(2)
    left_s = desk.tick(0.01)
    desk.load(3)

    desk.tick(0.01 + left_s)

    assert wait_s == BEAT_AFTER_S
    assert left_s == pytest.approx(BEAT_AFTER_S - 0.01)
    assert desk.beats.said == [3]


def test_what_is_not_verified_is_neither_told_nor_saved() -> None:
    desk = Desk()
    desk.is_verified = False

    assert desk.tick(0.0) == TICK_S
    assert desk.beats.said == []
    assert desk.files.written == []


def test_edits_that_come_together_are_one_write() -> None:
    desk = Desk()
    desk.tick(0.0)
    early = list(desk.files.written)
    desk.load(2)
    desk.tick(0.5)
    desk.load(3)
    desk.tick(SAVE_AFTER_S)

    assert early == []
    assert [revision for revision, _ in desk.files.written] == [3]


def test_edits_that_never_stop_do_not_put_the_write_off_for_ever() -> None:
    desk = Desk()
    for number in range(50):
        desk.load(number + 1)
        desk.tick(number * 0.25)

    assert len(desk.files.written) >= 9


def test_the_age_of_an_unchanged_file_is_kept_up() -> None:
    desk = Desk()
    for now in (0.0, SAVE_AFTER_S, 10.0, SAVE_AFTER_S + SAVE_AGAIN_S):
        desk.tick(now)

    assert [revision for revision, _ in desk.files.written] == [1, 1]
    assert desk.record.status()["counts"][SAVED] == 2


def test_the_file_says_when_the_database_was_last_known_to_have_it() -> None:
    desk = Desk()
    desk.load(2)
    desk.tick(0.0)

    desk.tick(4.0)

    assert desk.files.written == [(2, 5000.0)]

"""How what is held is judged, and the reference that is swapped. No clock, no database."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cache.holder import (
    DATABASE,
    DISK,
    EMERGENCY,
    FLAG_DISK,
    FLAG_EMERGENCY,
    FLAG_TOO_LONG,
    FLAG_UNVERIFIED,
    Holder,
    Mark,
    State,
    judge,
)
from gateway.cache.record import Record
from gateway.cache.source import load_marked, serve
from gateway.errors import StoreUnavailable
from tests.gateway.cache_parts import small_snapshot

MARK = Mark("", 5, "2026-11-01 10:00:00")
STATE = State(snapshot=small_snapshot(5), source=DATABASE, verified_at=100.0, mark=MARK)


@pytest.mark.parametrize(
    ("source", "is_verified", "level", "flags"),
    [
        (DATABASE, True, 0, ()),
        (DATABASE, False, 1, (FLAG_UNVERIFIED,)),
        (DISK, False, 1, (FLAG_DISK,)),
        (DISK, True, 1, (FLAG_DISK,)),
        (EMERGENCY, False, 2, (FLAG_EMERGENCY,)),
        (EMERGENCY, True, 2, (FLAG_EMERGENCY,)),
    ],
)
def test_the_level_says_where_a_configuration_came_from_and_whether_it_is_verified(
    source: str, is_verified: bool, level: int, flags: tuple[str, ...]
) -> None:
    state = replace(STATE, source=source)

    held = judge(state, 100.5, is_verified=is_verified, max_unverified_s=60)

    assert (held.level, held.flags) == (level, flags)
    assert held.verified is (level == 0)
    assert held.age_ms == 500.0


def test_a_configuration_that_is_unverified_for_too_long_is_flagged() -> None:
    just_not = judge(STATE, 160.0, is_verified=False, max_unverified_s=60)
    too_long = judge(STATE, 160.1, is_verified=False, max_unverified_s=60)

    assert FLAG_TOO_LONG not in just_not.flags
    assert FLAG_TOO_LONG in too_long.flags


def test_the_emergency_file_has_no_age() -> None:
    state = State(snapshot=small_snapshot(0), source=EMERGENCY)

    held = judge(state, 100.0, is_verified=False, max_unverified_s=60)

    assert held.age_ms is None


@given(
    st.sampled_from((DATABASE, DISK, EMERGENCY)),
    st.booleans(),
    st.floats(0, 1e9),
    st.one_of(st.none(), st.floats(0, 1e9)),
)
def test_level_0_is_only_said_of_what_the_database_has_now(
    source: str, is_verified: bool, now: float, verified_at: float | None
) -> None:
    state = replace(STATE, source=source, verified_at=verified_at)

    held = judge(state, now, is_verified=is_verified, max_unverified_s=60)

    assert (held.level == 0) == (source == DATABASE and is_verified)
    assert bool(held.flags) == (held.level > 0)


def test_a_database_that_came_back_to_a_revision_with_other_rows_does_not_agree() -> None:
    later = replace(MARK, changed_at="2026-11-02 09:00:00")
    elsewhere = replace(MARK, database="1:2")

    assert MARK.agrees(MARK)
    assert not MARK.agrees(later)
    assert not MARK.agrees(elsewhere)
    assert not MARK.agrees(replace(MARK, revision=6))


def test_rows_that_are_newer_than_their_mark_learn_the_time_of_their_change_later() -> None:
    snapshot, mark = load_marked(lambda: MARK, lambda: small_snapshot(6))

    assert snapshot.revision == mark.revision == 6
    assert mark.agrees(replace(MARK, revision=6, changed_at="whenever"))
    assert not mark.agrees(MARK)


def test_rows_of_a_standby_that_is_behind_are_not_taken() -> None:
    with pytest.raises(StoreUnavailable, match="revision 4 while the database is at 5"):
        load_marked(lambda: MARK, lambda: small_snapshot(4))


def test_a_verification_of_what_was_replaced_meanwhile_has_no_effect() -> None:
    holder = Holder(STATE)
    newer = State(snapshot=small_snapshot(6), source=DATABASE, verified_at=101.0)
    holder.swap(newer)

    holder.verify(STATE, 102.0, MARK)

    assert holder.state == newer


def test_a_verification_never_makes_a_configuration_older() -> None:
    holder = Holder(STATE)

    holder.verify(STATE, 99.0, MARK)
    holder.verify(STATE, 103.0, MARK)
    holder.verify(STATE, 101.0, MARK)

    assert holder.state.verified_at == 103.0


def test_a_wait_ends_when_the_revision_is_served() -> None:
    holder = Holder(STATE)

    assert holder.wait_for(5, 0.0)
    assert not holder.wait_for(6, 0.0)


def test_a_database_that_went_back_is_served_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    holder = Holder(STATE)
    record = Record()

    serve(holder, record, small_snapshot(3), replace(MARK, revision=3), 101.0)

    assert holder.state.snapshot.revision == 3
    assert record.status()["counts"]["restored"] == 1
    assert "from revision 5 to 3" in caplog.text


def test_a_fault_is_logged_when_it_begins_and_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    record = Record()

    for _ in range(3):
        record.fault("reading", OSError("no disk"))
    record.fault("reading", OSError("no power"))
    record.fine("reading")
    record.fine("reading")

    assert [one.getMessage() for one in caplog.records] == [
        "reading fails: OSError: no disk",
        "reading fails: OSError: no power",
        "reading works again",
    ]
    assert record.status()["failing"] == {}
    assert record.status()["last_error"]["error"] == "OSError: no power"

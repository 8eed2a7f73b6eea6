"""Cooldowns: when a model is left alone, and for how long."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.models.cooldown import (
    FORGOTTEN_S,
    LONGEST_REST_S,
    REST_S,
    WINDOW_S,
    Cooldowns,
    Record,
    after_failure,
)

TIMES = st.lists(st.floats(0, 3000), min_size=1, max_size=40).map(sorted)


def test_three_failures_within_the_window_make_a_model_rest() -> None:
    cooldowns = Cooldowns()

    for now in (0.0, 10.0, 30.0):
        cooldowns.failed("a", now, "timeout")

    assert cooldowns.unavailable(30.0) == {
        "a": "rests for 30.0 s more after failures; the last: timeout"
    }
    assert cooldowns.unavailable(59.9) != {}
    assert cooldowns.unavailable(60.0) == {}


def test_failures_further_apart_than_the_window_do_not_add_up() -> None:
    cooldowns = Cooldowns()

    for now in (0.0, 31.0, 62.0, 93.0, 124.0):
        cooldowns.failed("a", now, "timeout")

    assert cooldowns.unavailable(124.0) == {}


def test_other_models_are_not_touched() -> None:
    cooldowns = Cooldowns()

    for now in (0.0, 1.0, 2.0):
        cooldowns.failed("a", now, "timeout")
    cooldowns.failed("b", 2.0, "timeout")

    assert set(cooldowns.unavailable(2.0)) == {"a"}


def test_a_success_clears_the_rest_and_the_count() -> None:
    cooldowns = Cooldowns()
    for now in (0.0, 1.0, 2.0):
        cooldowns.failed("a", now, "timeout")

    cooldowns.succeeded("a")
    cooldowns.failed("a", 3.0, "timeout")
    cooldowns.failed("a", 4.0, "timeout")

    assert cooldowns.unavailable(4.0) == {}


def test_a_failure_on_trial_doubles_the_rest_up_to_the_bound() -> None:
    record, now, rests = Record(), 0.0, []

    for _ in range(3):
        record = after_failure(record, now, "x")
    for _ in range(7):
        rests.append(record.rest_s)
        now = record.until or 0.0
        record = after_failure(record, now, "x")

    assert rests == [30.0, 60.0, 120.0, 240.0, 480.0, 480.0, 480.0]


def test_failures_during_a_rest_do_not_make_it_longer() -> None:
    record = Record()
    for now in (0.0, 1.0, 2.0):
        record = after_failure(record, now, "x")

    same = after_failure(record, 20.0, "y")

    assert same == record


def test_an_outage_of_long_ago_is_forgotten() -> None:
    record = Record()
    for now in (0.0, 1.0, 2.0):
        record = after_failure(record, now, "x")

    later = after_failure(record, 32.0 + FORGOTTEN_S + 1, "x")

    assert later.until is None and len(later.failures) == 1


def test_records_of_models_that_are_long_gone_are_dropped() -> None:
    cooldowns = Cooldowns()
    for number in range(500):
        cooldowns.failed(f"m{number}", 0.0, "x")

    cooldowns.failed("new", FORGOTTEN_S + 1, "x")

    assert set(cooldowns._records) == {"new"}


@settings(deadline=None)
@given(TIMES)
def test_a_rest_is_never_shorter_than_the_first_nor_longer_than_the_bound(
    times: list[float],
) -> None:
    record = Record()

    for now in times:
        before, record = record, after_failure(record, now, "x")

        if record.is_resting(now):
            assert record.until is not None
            assert 0 < record.until - now <= LONGEST_REST_S + 1e-6
        if record.until != before.until and record.until is not None:
            assert REST_S <= record.rest_s <= LONGEST_REST_S


@settings(deadline=None)
@given(TIMES)
def test_without_three_failures_in_a_window_nothing_rests(times: list[float]) -> None:
    record = Record()
    kept: list[float] = []
    for now in times:
        if sum(now - at <= WINDOW_S for at in kept) < 2:
            kept.append(now)

    for now in kept:
        record = after_failure(record, now, "x")

    assert record.until is None

"""When the catalogue is refreshed by itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.models.schedule import FIRST_WITHIN_S, JITTER, next_run

NOW = datetime(2026, 3, 1, tzinfo=UTC)
CHANCE = st.floats(0, 1, exclude_max=True)
PERIOD = st.floats(1, 1e7)


def test_a_period_of_zero_means_only_when_asked() -> None:
    assert next_run(NOW, 0.0, 0.5, started=NOW) is None
    assert next_run(None, 0.0, 0.5, started=NOW) is None


def test_half_of_the_chance_is_the_period_itself() -> None:
    assert next_run(NOW, 3600.0, 0.5, started=NOW) == NOW + timedelta(hours=1)


@settings(deadline=None)
@given(PERIOD, CHANCE)
def test_the_next_run_is_within_the_jitter_of_the_period(every_s: float, chance: float) -> None:
    due = next_run(NOW, every_s, chance, started=NOW)

    assert due is not None
    wait_s = (due - NOW).total_seconds()
    assert every_s * (1 - JITTER) - 1e-3 <= wait_s <= every_s * (1 + JITTER) + 1e-3


@settings(deadline=None)
@given(PERIOD, CHANCE)
def test_the_first_run_ever_is_soon(every_s: float, chance: float) -> None:
    due = next_run(None, every_s, chance, started=NOW)

    assert due is not None
    assert 0 <= (due - NOW).total_seconds() <= min(FIRST_WITHIN_S, every_s)

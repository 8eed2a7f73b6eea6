"""Forecasts against a simulation that computes pass by pass."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.chat.forecast import Answer, Forecast, Growth, Pace, Work, forecast

PACE = Pace(pass_s=0.01, prompt_token_s=0.001)


def work(allowed: int, *, done: int = 0, prompt: int = 0) -> Work:
    return Work(prompt_tokens=prompt, done=done, allowed=allowed)


def test_an_idle_engine_begins_at_once_and_ends_nothing() -> None:
    assert forecast([], [], 4, PACE) == Forecast(0.0, 0.0)


def test_with_a_place_free_a_request_begins_at_once() -> None:
    found = forecast([work(100, done=40), work(50)], [], 3, PACE)

    assert found.begin_s == 0.0
    assert found.first_end_s == pytest.approx(0.5)


def test_with_all_places_taken_it_begins_when_the_first_ends() -> None:
    found = forecast([work(100, done=40), work(50)], [], 2, PACE)

    assert found.first_end_s == found.begin_s == pytest.approx(0.5)


def test_prompts_that_are_not_computed_take_their_time() -> None:
    found = forecast([work(100, prompt=300)], [], 1, PACE)

    assert found.begin_s == pytest.approx(1.3)


def test_answers_that_usually_end_early_are_expected_to() -> None:
    pace = replace(PACE, share=0.5)

    assert forecast([work(100)], [], 1, pace).begin_s == pytest.approx(0.5)
    # One that is past the usual half is expected to have half of the rest to go.
    assert forecast([work(100, done=60)], [], 1, pace).begin_s == pytest.approx(0.2)
    assert forecast([work(100, done=99)], [], 1, pace).begin_s == pytest.approx(0.01)


WORKS = st.builds(
    lambda prompt, allowed: Work(prompt_tokens=prompt, done=0, allowed=allowed),
    st.integers(0, 50),
    st.integers(1, 40),
)


@given(st.lists(WORKS, max_size=4), st.lists(WORKS, max_size=8), st.integers(4, 6))
def test_it_is_what_a_simulation_pass_by_pass_finds(
    running: list[Work], waiting: list[Work], places: int
) -> None:
    left = [one.allowed for one in running]
    queue = list(waiting)
    seconds = sum(one.prompt_tokens for one in running) * PACE.prompt_token_s
    first_end = begins = None
    for _ in range(10_000):
        while queue and len(left) < places:
            one = queue.pop(0)
            seconds += one.prompt_tokens * PACE.prompt_token_s
            left.append(one.allowed)
        if begins is None and not queue and len(left) < places:
            begins = seconds if waiting else 0.0
        if not left:
            break
        seconds += PACE.pass_s
        left = [count - 1 for count in left]
        if 0 in left and first_end is None:
            first_end = seconds
        left = [count for count in left if count]
        if begins is None and not queue and len(left) < places:
            begins = seconds

    found = forecast(running, waiting, places, PACE)

    assert math.isclose(found.begin_s, begins or 0.0, abs_tol=1e-9)
    assert math.isclose(found.first_end_s, first_end or 0.0, abs_tol=1e-9)


def test_the_pace_follows_what_is_seen_and_forgets_slowly() -> None:
    pace = Pace().after_pass(0.02, 0, 1, 50)
    assert pace.pass_s == 0.02
    pace = pace.after_pass(0.12, 100, 1, 50)
    assert (pace.pass_s, pace.prompt_token_s) == (0.02, pytest.approx(0.001))
    for _ in range(60):
        pace = pace.after_pass(0.04, 0, 1, 50)
    assert pace.pass_s == pytest.approx(0.04, rel=0.01)
    for _ in range(60):
        pace = pace.after_answer(Answer(25, 100, 0.1, 1.0))
    assert pace.share == pytest.approx(0.25, rel=0.01)


def test_a_prompt_that_took_less_than_a_pass_costs_nothing_and_never_less() -> None:
    pace = Pace(pass_s=0.05).after_pass(0.02, 10, 1, 50)

    assert pace.prompt_token_s == 0.0


def grown(first: int, last: int, token_s: float, passes: int = 300) -> Growth:
    """After passes of 64 rows whose contexts go evenly from `first` to `last` tokens."""
    growth = Growth()
    for number in range(passes):
        context = first + (last - first) * number // (passes - 1)
        growth = growth.after_pass(0.02 + token_s * context, 64, context)
    return growth


def test_what_a_token_of_context_adds_is_learned_from_contexts_that_differ() -> None:
    assert 0.75e-6 < grown(1000, 20_000, 1e-6).token_s < 1e-6
    # Much alike: nothing is made of the noise.
    assert grown(10_000, 10_100, 1e-3).token_s < 1e-6
    assert grown(10_000, 10_000, 0).token_s == pytest.approx(0, abs=1e-12)
    assert grown(1000, 20_000, -1e-7).token_s == 0
    assert Growth().token_s == 0


@pytest.mark.parametrize("seed", range(5))
def test_what_more_rows_cost_is_not_taken_for_what_their_context_costs(seed: int) -> None:
    """Each row costs as much as 1,000 tokens of context."""
    chance, growth = random.Random(seed), Growth()
    for _ in range(2000):
        rows = chance.randint(1, 64)
        context = sum(chance.randint(50, 400) for _ in range(rows))
        seconds = 0.01 + 1e-3 * rows + 1e-6 * context
        growth = growth.after_pass(seconds * chance.uniform(0.95, 1.05), rows, context)

    assert growth.token_s < 3e-6


def test_passes_become_longer_while_contexts_grow() -> None:
    growth = grown(1000, 20_000, 1e-6)
    pace = Pace(pass_s=0.02, growth=growth)
    running = [Work(0, 0, 100, context=50), Work(0, 0, 300, context=50)]

    found = forecast(running, [], 2, pace)

    # Two tokens more in each of 100 passes.
    assert found.first_end_s == pytest.approx(100 * 0.02 + growth.token_s * 2 * 100**2 / 2)
    assert found.first_end_s > 100 * 0.02


def test_whoever_ends_takes_his_context_with_him_but_no_pass_is_free() -> None:
    growth = grown(1000, 20_000, 1e-6)
    pace = Pace(pass_s=0.02, growth=growth)
    running = [Work(0, 0, 1, context=10**7), Work(0, 0, 101, context=0)]

    found = forecast(running, [Work(0, 0, 1000), Work(0, 0, 1000)], 2, pace)

    assert found.first_end_s == pytest.approx(0.02, rel=0.01)
    assert found.begin_s == pytest.approx(0.02 + 100 * 0.01 + 901 * 0.01, rel=0.01)

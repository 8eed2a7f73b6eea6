"""Whose turn it is: first in first out, priorities that rise, few changes of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.jobs.decode import PRIORITIES
from worker.jobs.schedule import AGE_S, MAX_OVERTAKEN, Waiting, companions, next_job

LOWEST, HIGHEST = PRIORITIES
# After so long nothing that comes in goes before the lowest job: one step more than there are.
RISEN_S = (HIGHEST - LOWEST + 1) * AGE_S


def waiting(job_id: str, number: int, model: str = "m", **fields: object) -> Waiting:
    return Waiting(job_id, number, model, **fields)  # type: ignore[arg-type]


def order(queue: Sequence[Waiting], last_model: str | None = None, now: float = 0.0) -> str:
    """Ids in the order in which they run when nothing more comes in."""
    left, said = list(queue), ""
    while (one := next_job(left, last_model, now)) is not None:
        said += one.id
        last_model = one.model
        left = begun(left, one)
    return said


def begun(queue: Sequence[Waiting], one: Waiting) -> list[Waiting]:
    """The queue after `one` has begun: those that came before it were overtaken."""
    return [
        replace(other, overtaken=other.overtaken + (other.number < one.number))
        for other in queue
        if other is not one
    ]


# --- examples ----------------------------------------------------------------------------------


def test_nothing_waits() -> None:
    assert next_job([], "m", 0.0) is None


def test_jobs_of_one_model_run_in_the_order_they_came() -> None:
    queue = [waiting("b", 2), waiting("c", 3), waiting("a", 1)]

    assert order(queue) == "abc"


def test_a_higher_priority_goes_first_and_equals_in_their_order() -> None:
    queue = [
        waiting("c", 1),
        waiting("a", 2, priority=5),
        waiting("d", 3),
        waiting("b", 4, priority=5),
    ]

    assert order(queue) == "abcd"


def test_a_job_that_waits_for_its_next_try_lets_others_go() -> None:
    queue = [waiting("a", 1, not_before=10.0), waiting("b", 2)]

    assert order(queue, now=9.9) == "b"
    assert order(queue, now=10.0) == "ab"


def test_a_priority_rises_by_one_for_every_minute() -> None:
    queue = [waiting("old", 1, created_at=0.0), waiting("new", 2, priority=2, created_at=119.0)]

    before = next_job(queue, None, 119.9)
    after = next_job(queue, None, 120.0)

    assert before is queue[1]
    assert after is queue[0]


def test_a_clock_that_was_set_back_takes_nobodys_priority() -> None:
    queue = [waiting("a", 1, created_at=5000.0), waiting("b", 2, created_at=0.0)]

    assert order(queue, now=0.0) == "ab"


def test_jobs_of_the_model_that_ran_last_may_go_before_those_of_another() -> None:
    queue = [waiting("a", 1, "x"), waiting("b", 2, "y"), waiting("c", 3, "x"), waiting("d", 4, "y")]

    assert order(queue) == "acbd"
    assert order(queue, "y") == "bdac"


def test_no_more_than_a_few_overtake_a_job() -> None:
    queue = [waiting("x", 1, "x"), *(waiting(str(n), 2 + n, "y") for n in range(9))]

    assert order(queue, "y") == "0123x45678"
    assert MAX_OVERTAKEN == 4


def test_a_job_that_was_overtaken_often_enough_goes_first_whatever_ran_last() -> None:
    queue = [waiting("a", 1, "x", overtaken=MAX_OVERTAKEN), waiting("b", 2, "y")]

    assert order(queue, "y") == "ab"


def test_a_job_of_lower_priority_does_not_overtake_for_its_model() -> None:
    queue = [waiting("a", 1, "x", priority=1), waiting("b", 2, "y")]

    assert order(queue, "y") == "ab"


def test_of_the_model_that_ran_last_the_oldest_goes_first() -> None:
    queue = [waiting("a", 1, "x"), waiting("c", 3, "y"), waiting("b", 2, "y")]

    assert order(queue, "y")[:2] == "bc"


def test_an_endless_stream_of_the_model_that_ran_last_holds_up_nobody() -> None:
    queue, numbers, ran = [waiting("x", 0, "x")], count(1), []
    while "x" not in ran:
        queue.append(waiting("y", next(numbers), "y"))
        one = next_job(queue, "y", 0.0)
        assert one is not None
        ran.append(one.id)
        queue = begun(queue, one)

    assert ran == ["y"] * MAX_OVERTAKEN + ["x"]


def test_an_endless_stream_of_the_highest_priority_holds_up_nobody_for_ever() -> None:
    queue, now, numbers = [waiting("x", 0, "x", priority=LOWEST)], 0.0, count(1)
    while True:
        number = next(numbers)
        queue.append(waiting("y", number, "x", priority=HIGHEST, created_at=now))
        one = next_job(queue, "x", now)
        assert one is not None
        if one.id == "x":
            break
        queue, now = begun(queue, one), now + 10.0

    assert now <= RISEN_S


# --- whatever comes ----------------------------------------------------------------------------


@dataclass
class Arrival:
    """A job that comes in while others run."""

    after_s: float  # since the one before it
    model: str
    priority: int
    runs_s: float
    not_before_s: float = 0.0  # after it came: it had to be tried again


@dataclass
class Turn:
    """One job that has begun, and how things stood then."""

    one: Waiting
    front: Waiting  # whose turn it was by priority and age alone
    last_model: str | None
    now: float
    queue: list[Waiting] = field(repr=False)


def risen(one: Waiting, now: float) -> int:
    """Written out again: the rule of the module's docstring."""
    return one.priority + max(0, int((now - one.created_at) // AGE_S))


def simulate(arrivals: Sequence[Arrival]) -> list[Turn]:
    """One worker, that runs them all."""
    coming, at = [], 0.0
    for number, came in enumerate(arrivals, 1):
        at += came.after_s
        coming.append(
            Waiting(
                str(number), number, came.model, came.priority, created_at=at,
                not_before=at + came.not_before_s if came.not_before_s else 0.0,
            )
        )  # fmt: skip
    runs_s = {str(number): came.runs_s for number, came in enumerate(arrivals, 1)}
    now, last_model = 0.0, None
    queue: list[Waiting] = []
    turns: list[Turn] = []
    while coming or queue:
        while coming and coming[0].created_at <= now:
            queue.append(coming.pop(0))
        one = next_job(queue, last_model, now)
        if one is None:
            now = min([job.created_at for job in coming[:1]] + [job.not_before for job in queue])
            continue
        due = [job for job in queue if job.not_before <= now]
        front = min(due, key=lambda job: (-risen(job, now), job.number))
        turns.append(Turn(one, front, last_model, now, queue))
        last_model, queue = one.model, begun(queue, one)
        now += runs_s[one.id]
    return turns


steady = settings(deadline=None, derandomize=True)
arrivals = st.lists(
    st.builds(
        Arrival,
        after_s=st.sampled_from([0.0, 1.0, 30.0, AGE_S, 10 * AGE_S]),
        model=st.sampled_from("xyz"),
        priority=st.one_of(st.just(0), st.integers(LOWEST, HIGHEST)),
        runs_s=st.sampled_from([1.0, 20.0, 90.0]),
        not_before_s=st.sampled_from([0.0, 0.0, 0.0, 10.0, 5 * AGE_S]),
    ),
    max_size=40,
)


@steady
@given(arrivals)
def test_every_job_runs_once(arrivals: list[Arrival]) -> None:
    ran = [int(turn.one.id) for turn in simulate(arrivals)]

    assert sorted(ran) == list(range(1, len(arrivals) + 1))


@steady
@given(arrivals)
def test_a_job_at_the_front_waits_for_no_more_than_a_few(arrivals: list[Arrival]) -> None:
    """The bound of the module's docstring, for every job."""
    waited: dict[str, int] = {}
    for turn in simulate(arrivals):
        if turn.one is not turn.front:
            waited[turn.front.id] = waited.get(turn.front.id, 0) + 1

    assert all(times <= MAX_OVERTAKEN for times in waited.values()), waited


@steady
@given(arrivals)
def test_a_job_is_overtaken_only_to_save_a_change_of_models(arrivals: list[Arrival]) -> None:
    for turn in simulate(arrivals):
        if turn.one is not turn.front:
            assert turn.one.model == turn.last_model != turn.front.model
            assert turn.one.priority == turn.front.priority
            assert turn.one.number > turn.front.number


@steady
@given(arrivals)
def test_no_job_begins_before_it_may(arrivals: list[Arrival]) -> None:
    for turn in simulate(arrivals):
        assert turn.one.not_before <= turn.now
        assert turn.one.created_at <= turn.now


@steady
@given(arrivals)
def test_after_long_enough_nothing_that_comes_in_goes_before_a_job_but_for_its_model(
    arrivals: list[Arrival],
) -> None:
    """Whatever their priorities: what comes later never stands before it in the order."""
    for turn in simulate(arrivals):
        for other in turn.queue:
            is_late = turn.one.created_at - other.created_at >= RISEN_S
            if is_late and other is not turn.one and other.not_before <= turn.now:
                assert turn.one is not turn.front


@steady
@given(arrivals)
def test_a_job_waits_for_a_number_of_others_that_newcomers_cannot_raise(
    arrivals: list[Arrival],
) -> None:
    """Each of those that may stand before it goes, with as many as may overtake that one; then
    its own turn comes."""
    turns = simulate(arrivals)
    jobs = {turn.one.id: turn.one for turn in turns}
    for place, turn in enumerate(turns):
        one = turn.one
        since = max(one.created_at, one.not_before)
        before = [other for other in turns[:place] if other.now >= since]
        may_stand_before = sum(
            other.created_at < since + RISEN_S for other in jobs.values() if other.id != one.id
        )
        assert len(before) <= (may_stand_before + 1) * (1 + MAX_OVERTAKEN)


@steady
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.floats(0, 1e6)), max_size=30))
def test_without_priorities_and_changes_of_models_the_order_is_that_of_acceptance(
    came: list[tuple[str, float]],
) -> None:
    times = sorted(at for _, at in came)
    queue = [waiting(str(number), number, created_at=at) for number, at in enumerate(times)]
    left, ran = list(queue), []
    while (one := next_job(left, "m", 2e6)) is not None:
        ran.append(one.number)
        left = begun(left, one)

    assert all(first < second for first, second in pairwise(ran))
    assert len(ran) == len(queue)


@steady
@given(arrivals, st.randoms())
def test_the_order_of_the_list_makes_no_difference(arrivals: list[Arrival], chance: object) -> None:
    for turn in simulate(arrivals):
        shuffled = list(turn.queue)
        chance.shuffle(shuffled)  # type: ignore[attr-defined]

        assert next_job(shuffled, turn.last_model, turn.now) is turn.one


# --- sharing a batch -----------------------------------------------------------------------------


def sharing(queue: Sequence[Waiting], most_images: int = 6, now: float = 0.0) -> str:
    """Ids of the jobs that go together first, the leader before the others."""
    first = next_job(queue, None, now)
    assert first is not None
    return "".join(one.id for one in (first, *companions(first, queue, now, most_images)))


def test_jobs_of_one_shape_that_would_follow_each_other_go_together() -> None:
    queue = [waiting(name, number, shape="s") for number, name in enumerate("abc")]

    assert sharing(queue) == "abc"


def test_a_job_without_a_shape_goes_alone_and_lets_nobody_past() -> None:
    first = waiting("a", 1)
    between = [waiting("a", 1, shape="s"), waiting("b", 2), waiting("c", 3, shape="s")]

    assert sharing([first, waiting("b", 2)]) == "a"
    assert sharing(between) == "a"


def test_jobs_of_other_shapes_and_models_do_not_join() -> None:
    first = waiting("a", 1, shape="s")

    assert sharing([first, waiting("b", 2, shape="t")]) == "a"
    assert sharing([first, waiting("b", 2, "n", shape="s")]) == "a"


def test_a_batch_has_no_more_pictures_than_a_job_may() -> None:
    queue = [
        waiting("a", 1, shape="s", images=3),
        waiting("b", 2, shape="s", images=2),
        waiting("c", 3, shape="s", images=2),
        waiting("d", 4, shape="s", images=1),
    ]

    assert sharing(queue, 5) == "ab"
    assert sharing(queue, 6) == "ab"  # nor does d go before c
    assert sharing(queue, 1) == "a"


def test_a_more_urgent_job_is_not_made_to_wait_for_one_that_joins() -> None:
    urgent = [
        waiting("a", 1, shape="s", priority=5),
        waiting("b", 2, shape="s"),
        waiting("c", 3, shape="t", priority=3),
    ]

    assert sharing(urgent) == "a"


def test_a_job_that_waits_for_its_next_try_does_not_join() -> None:
    queue = [waiting("a", 1, shape="s"), waiting("b", 2, shape="s", not_before=10.0)]

    assert sharing(queue) == "a"
    assert sharing(queue, now=10.0) == "ab"


@steady
@given(arrivals, st.integers(1, 8), st.randoms())
def test_those_that_join_are_those_that_would_run_next(
    arrivals: list[Arrival], most_images: int, chance: Any
) -> None:
    """So sharing changes nobody's place, and no bound on waiting."""
    for turn in simulate(arrivals):
        queue = [
            replace(one, shape=chance.choice("st"), images=chance.choice((1, 2)))
            for one in turn.queue
        ]
        first = next((one for one in queue if one.id == turn.one.id), None)
        assert first is not None
        joined = companions(first, queue, turn.now, most_images)

        left, last = begun(queue, first), first.model
        for one in joined:
            following = next_job(left, last, turn.now)
            assert following is not None
            assert (following.id, following.shape, last) == (one.id, first.shape, one.model)
            left = begun(left, following)
        assert not joined or first.images + sum(one.images for one in joined) <= most_images

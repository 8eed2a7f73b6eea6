"""What is moved for whom, and who goes first. Properties hold for any tenants and any queue."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.vram import policy
from worker.vram.baselines import rules
from worker.vram.order import MAX_HELD_S, MAX_OVERTAKEN, Waiting, in_order, next_request, without
from worker.vram.policy import (
    Ahead,
    Kind,
    Move,
    Place,
    Plan,
    Refusal,
    State,
    Tenant,
    ahead_of_time,
    chance_of_reuse,
    cheapest_of,
    decide,
    next_to_wake,
)

GIB = 2**30


def tenant(
    name: str,
    size_gib: float,
    place: Place = Place.DEVICE,
    *,
    floor_gib: float | None = None,
    in_use: bool = False,
    pinned: bool = False,
    priority: int = 0,
    keep_until: float = 0.0,
    last_used: float = 0.0,
) -> Tenant:
    """Moves at 10 GiB a second, loads at 1."""
    size = int(size_gib * GIB)
    return Tenant(
        name, name.partition(".")[0], size, place, size if place is Place.DEVICE else 0,
        size if floor_gib is None else int(floor_gib * GIB), in_use, pinned, priority, keep_until,
        last_used, (), 0.0, size_gib / 10, size_gib,
    )  # fmt: skip


def state(
    *tenants: Tenant,
    free: float,
    need: tuple[str, ...] = (),
    peak: float = 0.0,
    host: float = 100.0,
    queue: tuple[Ahead, ...] = (),
    now: float = 100.0,
) -> State:
    """Sizes in GiB."""
    return State(
        tenants, int(free * GIB), int(host * GIB), need, int(peak * GIB), now, queue,
        int(1000 * GIB), int(free * GIB),
    )  # fmt: skip


def moves(answer: Plan | Refusal) -> list[tuple[str, str]]:
    assert isinstance(answer, Plan)
    return [(move.kind.value, move.tenant) for move in answer.moves]


def test_nothing_moves_where_everything_is_there_and_the_peak_fits() -> None:
    answer = decide(state(tenant("a", 5), free=2, need=("a",), peak=2))

    assert answer == Plan()


def test_what_is_absent_comes_from_where_it_is() -> None:
    answer = decide(
        state(tenant("a", 2, Place.HOST), tenant("b", 2, Place.DISK), free=5, need=("a", "b"))
    )

    assert moves(answer) == [("wake", "a"), ("load", "b")]


def test_of_two_that_suffice_the_cheaper_one_goes() -> None:
    answer = decide(state(tenant("big", 9), tenant("small", 4), free=0, peak=3))

    assert moves(answer) == [("park", "small")]


def test_one_tenant_goes_rather_than_two_that_cost_more_together() -> None:
    answer = decide(
        state(tenant("a", 3), tenant("b", 3), tenant("c", 5), free=0, peak=5, now=100.0)
    )

    assert moves(answer) == [("park", "c")]


def test_a_tenant_that_the_queue_needs_soon_stays() -> None:
    queue = (Ahead(("small",)),)

    answer = decide(
        state(tenant("big", 5), tenant("small", 4), free=0, peak=3, queue=queue, now=900.0)
    )

    assert moves(answer) == [("park", "big")]


def test_a_tenant_in_its_keep_alive_stays() -> None:
    answer = decide(
        state(tenant("big", 5), tenant("small", 4, keep_until=901), free=0, peak=3, now=900.0)
    )

    assert moves(answer) == [("park", "big")]


def test_a_second_of_a_higher_priority_is_worth_more() -> None:
    answer = decide(state(tenant("job", 5), tenant("chat", 4, priority=1), free=0, peak=3))

    assert moves(answer) == [("park", "job")]


def test_a_pool_shrinks_before_anything_leaves() -> None:
    answer = decide(state(tenant("kv", 4, floor_gib=1), tenant("a", 4), free=0, peak=2))

    assert isinstance(answer, Plan)
    assert answer.moves == (Move(Kind.SHRINK, "kv", 3 * GIB),)


def test_a_pool_comes_back_at_its_floor_where_room_is_short() -> None:
    kv = tenant("kv", 4, Place.HOST, floor_gib=1)

    answer = decide(state(kv, tenant("a", 4), free=2, need=("kv",)))

    assert isinstance(answer, Plan)
    assert answer.moves == (Move(Kind.WAKE, "kv", GIB),)


def test_what_host_memory_has_no_room_for_is_dropped() -> None:
    answer = decide(state(tenant("a", 4), free=0, peak=3, host=3))

    assert moves(answer) == [("drop", "a")]


def test_host_memory_goes_to_what_is_dearest_to_load() -> None:
    answer = decide(state(tenant("a", 4), tenant("b", 6), free=0, peak=10, host=6))

    assert sorted(moves(answer)) == [("drop", "a"), ("park", "b")]


@pytest.mark.parametrize("why", [{"in_use": True}, {"pinned": True}])
def test_what_is_in_use_or_pinned_is_not_taken_and_the_refusal_says_what_there_is(
    why: dict[str, bool],
) -> None:
    answer = decide(state(tenant("a", 4, **why), tenant("b", 2), free=1, peak=5))  # type: ignore[arg-type]

    assert answer == Refusal(5 * GIB, GIB, 3 * GIB)


def test_an_unknown_tenant_is_an_error() -> None:
    with pytest.raises(KeyError, match="no such tenant: b"):
        decide(state(tenant("a", 4), free=1, need=("a", "b")))


def test_the_longer_a_tenant_rests_the_less_it_is_expected_again() -> None:
    busy = replace(tenant("a", 4, last_used=100.0), uses=(40.0, 60.0, 80.0, 100.0))

    chances = [chance_of_reuse(busy, None, now) for now in (101.0, 130.0, 1000.0)]

    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.8
    assert chances[2] < 0.1


def test_the_queue_is_nearer_than_history() -> None:
    resting = tenant("a", 4)

    assert chance_of_reuse(resting, 0, 1e6) == 1.0
    assert chance_of_reuse(resting, 5, 1e6) < chance_of_reuse(resting, 1, 1e6)


def test_of_the_ways_to_run_a_phase_the_cheapest_is_taken() -> None:
    refused = Refusal(1, 0, 0)

    assert cheapest_of([(Plan(cost_s=3.0), 0.0), (Plan(cost_s=0.0), 2.0)]) == 1
    assert cheapest_of([(Plan(cost_s=1.0), 0.0), (Plan(cost_s=0.0), 2.0)]) == 0
    assert cheapest_of([(refused, 0.0), (Plan(), 2.0)]) == 1
    assert cheapest_of([(refused, 0.0)]) is None


# --- look-ahead -------------------------------------------------------------------------------


def test_what_the_next_phase_needs_is_brought_while_this_one_runs() -> None:
    queue = (Ahead(("a",)), Ahead(("b",)))

    move = next_to_wake(
        state(tenant("b", 1, Place.HOST), tenant("a", 2, Place.DISK), free=5, queue=queue)
    )

    assert move == Move(Kind.LOAD, "a", 2 * GIB)


def test_nothing_is_brought_that_leaves_no_room_for_a_phase_before_it() -> None:
    late = tenant("late", 3, Place.HOST)
    queue = (Ahead((), 4 * GIB), Ahead(("late",)))

    assert next_to_wake(state(late, free=6, queue=queue)) is None
    assert next_to_wake(state(late, free=7, queue=queue)) == Move(Kind.WAKE, "late", 3 * GIB)
    # What the running phase has now, the phase before it may have after it.
    assert next_to_wake(state(late, free=6, peak=1, queue=queue)) is not None


def test_an_idle_link_brings_back_what_is_missed_most() -> None:
    parked = [tenant("job", 3, Place.HOST), tenant("chat", 3, Place.HOST, priority=1)]

    move = next_to_wake(state(*parked, tenant("disk", 1, Place.DISK), free=5))

    assert move == Move(Kind.WAKE, "chat", 3 * GIB)


def test_the_moves_of_a_later_phase_are_made_ahead_where_they_can_be() -> None:
    queue = (Ahead(("running",), GIB), Ahead(("next",), GIB))
    parts = [tenant("running", 5, in_use=True), tenant("next", 4, Place.HOST), tenant("idle", 3)]

    plan = ahead_of_time(state(*parts, free=2, peak=1, queue=queue))

    assert moves(plan) == [("park", "idle"), ("wake", "next")]


@pytest.mark.parametrize(
    "queue",
    [
        (Ahead(("idle",)), Ahead(("next",), GIB)),
        (Ahead((), 5 * GIB), Ahead(("next",), GIB)),
        (Ahead(("next",), GIB, can_stream=True),),
        (Ahead(("next",), 9 * GIB),),
        (),
    ],
    ids=["a phase before needs it", "no room before", "it can be streamed", "never", "no queue"],
)
def test_nothing_is_made_ahead_that_disturbs_a_phase_before(queue: tuple[Ahead, ...]) -> None:
    parts = [tenant("next", 4, Place.HOST), tenant("idle", 3)]

    assert ahead_of_time(state(*parts, free=2, peak=1, queue=queue)) == Plan()


# --- properties of moves ----------------------------------------------------------------------

SIZES = st.integers(1, 12)  # GiB; costs and sums stay comparable


@st.composite
def tenants(draw: st.DrawFn, most: int = 7) -> tuple[Tenant, ...]:
    made = []
    for number in range(draw(st.integers(1, most))):
        size = draw(SIZES) * GIB
        place = draw(st.sampled_from(Place))
        floor = draw(st.sampled_from((size, size, size // 2)))
        held = draw(st.sampled_from((size, floor))) if place is Place.DEVICE else 0
        made.append(
            Tenant(
                id=f"m{number % 3}.{number}",
                model=f"m{number % 3}",
                size_bytes=size,
                place=place,
                held_bytes=held,
                floor_bytes=floor,
                in_use=draw(st.booleans()) and place is Place.DEVICE,
                pinned=draw(st.integers(0, 4)) == 0,
                priority=draw(st.integers(0, 1)),
                keep_until=draw(st.sampled_from((0.0, 1e9))),
                last_used=draw(st.floats(0, 900)),
                park_s=draw(st.sampled_from((0.0, 0.3))),
                wake_s=draw(st.floats(0, 2)),
                load_s=draw(st.floats(0, 30)),
            )
        )
    return tuple(made)


@st.composite
def states(draw: st.DrawFn, most: int = 7) -> State:
    made = draw(tenants(most))
    names = [one.id for one in made]
    chosen = st.lists(st.sampled_from(names), max_size=3, unique=True).map(tuple)
    return State(
        made,
        free_bytes=draw(st.integers(-3, 20)) * GIB,
        host_free_bytes=draw(st.integers(-4, 40)) * GIB,
        need=draw(chosen),
        need_bytes=draw(st.integers(0, 16)) * GIB,
        now=1000.0,
        queue=tuple(draw(st.lists(st.builds(Ahead, chosen), max_size=3))),
    )


def room_after(before: State, done: tuple[Move, ...]) -> tuple[int, int]:
    """Bytes free on the device beside the peak, and in host memory."""
    free, host = before.free_bytes - before.need_bytes, before.host_free_bytes
    sizes = {one.id: one.size_bytes for one in before.tenants}
    for move in done:
        free += -move.bytes if move.kind in (Kind.WAKE, Kind.LOAD) else move.bytes
        host -= sizes[move.tenant] if move.kind is Kind.PARK else 0
    return free, host


def reachable(before: State) -> int:
    found = before.free_bytes
    for one in before.tenants:
        if one.held_bytes and not one.in_use and not one.pinned:
            needed = one.id in before.need
            found += max(0, one.held_bytes - one.floor_bytes) if needed else one.held_bytes
    return found


@settings(max_examples=120, deadline=None)
@given(states())
def test_nothing_in_use_pinned_or_needed_leaves(given_state: State) -> None:
    answer = decide(given_state)

    by_id = {one.id: one for one in given_state.tenants}
    for move in answer.victims if isinstance(answer, Plan) else ():
        assert not by_id[move.tenant].in_use
        assert not by_id[move.tenant].pinned
        assert move.kind is Kind.SHRINK or move.tenant not in given_state.need


@settings(max_examples=120, deadline=None)
@given(states())
def test_moves_make_enough_room_or_the_refusal_has_true_numbers(given_state: State) -> None:
    answer = decide(given_state)

    absent = [one for one in given_state.needed() if not one.ready]
    least = sum(one.floor_bytes - one.held_bytes for one in absent) + given_state.need_bytes
    if isinstance(answer, Refusal):
        assert answer == Refusal(least, given_state.free_bytes, reachable(given_state))
        assert least > reachable(given_state)
    else:
        free, host = room_after(given_state, answer.moves)
        assert least <= reachable(given_state)
        assert free >= 0
        assert host >= min(0, given_state.host_free_bytes)
        arrived = [m.tenant for m in answer.moves if m.kind in (Kind.WAKE, Kind.LOAD)]
        assert arrived == [one.id for one in absent]
        assert answer.moves == (*answer.victims, *answer.moves[len(answer.victims) :])


@settings(max_examples=120, deadline=None)
@given(states(), st.booleans())
def test_no_victim_could_have_stayed(given_state: State, exact: bool) -> None:
    before, policy.EXACT_CANDIDATES = policy.EXACT_CANDIDATES, 14 if exact else 0
    try:
        answer = decide(given_state)
    finally:
        policy.EXACT_CANDIDATES = before

    plan = answer if isinstance(answer, Plan) else Plan()
    for one in plan.victims:
        rest = tuple(move for move in plan.moves if move is not one)
        assert room_after(given_state, rest)[0] < 0


@settings(max_examples=60, deadline=None)
@given(states(most=5))
def test_no_other_set_costs_less(given_state: State) -> None:
    answer = decide(given_state)

    if not isinstance(answer, Plan) or not answer.victims:
        return
    ways = [way for each in policy._ways(given_state) for way in each]
    arrivals, cost_s = answer.moves[len(answer.victims) :], answer.cost_s
    for count in range(len(ways) + 1):
        for chosen in combinations(ways, count):
            done = tuple(Move(one.kind, one.tenant, one.bytes) for one in chosen)
            free, host = room_after(given_state, (*done, *arrivals))
            if len({one.tenant for one in chosen}) == count and free >= 0 <= host:
                back_s = sum(one.back_s for one in given_state.needed())
                assert cost_s <= back_s + sum(one.cost_s for one in chosen) + 1e-9


@settings(max_examples=60, deadline=None)
@given(states())
def test_looking_ahead_takes_no_more_than_is_free(given_state: State) -> None:
    move = next_to_wake(given_state)

    if move is not None:
        one = next(each for each in given_state.tenants if each.id == move.tenant)
        assert move.kind in (Kind.WAKE, Kind.LOAD)
        assert move.bytes == one.absent_bytes <= given_state.free_bytes


@settings(max_examples=60, deadline=None)
@given(states())
def test_what_is_made_ahead_fits_beside_the_running_phase_and_those_before(
    given_state: State,
) -> None:
    plan = ahead_of_time(given_state)

    if not plan.moves:
        return
    before: list[Ahead] = []
    arrived = {move.tenant for move in plan.moves if move not in plan.victims}
    for phase in given_state.queue:
        if arrived & set(phase.tenants):
            break
        before.append(phase)
    running = replace(given_state, need_bytes=0)  # its peak is not in what is free
    assert room_after(running, plan.moves)[0] >= 0
    taken = {move.tenant for move in plan.victims}
    assert not taken & {name for phase in before for name in phase.tenants}


@pytest.mark.parametrize("name", rules())
@settings(max_examples=30, deadline=None)
@given(given_state=states())
def test_other_rules_take_nothing_in_use_or_pinned_and_bring_what_is_needed(
    name: str, given_state: State
) -> None:
    answer = rules()[name](given_state)

    if isinstance(answer, Plan):
        by_id = {one.id: one for one in given_state.tenants}
        assert all(by_id[move.tenant].takable for move in answer.victims)
        arrived = {move.tenant for move in answer.moves} - {one.tenant for one in answer.victims}
        assert {one.id for one in given_state.needed() if not one.ready} <= arrived
        host = room_after(given_state, answer.victims)[1]
        assert host >= min(0, given_state.host_free_bytes)


# --- the order of requests --------------------------------------------------------------------


def waiting(number: int, models: str, *, priority: int = 0, overtaken: int = 0) -> Waiting:
    return Waiting(number, float(number), frozenset(models.split()), priority, overtaken)


def test_a_request_whose_model_is_warm_goes_before_an_older_one() -> None:
    queue = [waiting(0, "sdxl"), waiting(1, "wan"), waiting(2, "wan")]

    assert next_request(queue, frozenset({"wan"}), now=5.0) == 1


def test_a_higher_priority_goes_first() -> None:
    queue = [waiting(0, "wan"), waiting(1, "chat", priority=1)]

    assert next_request(queue, frozenset({"wan"}), now=5.0) == 1


@pytest.mark.parametrize(
    ("overtaken", "now"), [(MAX_OVERTAKEN, 5.0), (0, MAX_HELD_S)], ids=["often", "long"]
)
def test_a_request_that_is_due_goes_before_all_others(overtaken: int, now: float) -> None:
    queue = [waiting(0, "sdxl", overtaken=overtaken), waiting(1, "chat", priority=1)]

    assert next_request(queue, frozenset({"chat"}), now=now) == 0


def test_the_queue_is_told_in_the_order_in_which_it_would_be_served() -> None:
    queue = [waiting(0, "sdxl"), waiting(1, "wan"), waiting(2, "sdxl"), waiting(3, "wan")]

    served = in_order(queue, frozenset({"wan"}), now=5.0)

    assert [one.id for one in served] == [1, 3, 0, 2]


ARRIVALS = st.lists(
    st.tuples(st.sampled_from(("chat", "sdxl", "wan")), st.integers(0, 2)), max_size=4
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(ARRIVALS, st.floats(0, 40)), min_size=1, max_size=25))
def test_nothing_is_overtaken_more_often_than_the_bound(
    rounds: list[tuple[list[tuple[str, int]], float]],
) -> None:
    """In each round some requests arrive, and one is served."""
    queue: list[Waiting] = []
    warm: frozenset[str] = frozenset()
    now, number, served = 0.0, 0, []
    ahead: dict[int, int] = {}  # requests that were there when it came
    after: dict[int, int] = {}  # served since
    for arrivals, seconds in [*rounds, *[([], 1.0)] * 100]:
        for model, priority in arrivals:
            queue.append(Waiting(number, now, frozenset({model}), priority))
            ahead[number], after[number] = len(queue) - 1, 0
            number += 1
        if queue:
            index = next_request(queue, warm, now)
            chosen = queue[index]
            served.append(chosen.id)
            warm = chosen.models
            queue = without(queue, index)
            for one in queue:
                after[one.id] += 1
                assert one.overtaken <= MAX_OVERTAKEN
                assert after[one.id] <= ahead[one.id] + MAX_OVERTAKEN
        now += seconds

    assert sorted(served) == list(range(number))

"""The simulated card, and ours on it: never over-committed, everything served, the same again."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_vram import BASELINES, OURS, PINNED, least_swap_s
from worker.vram.policy import Kind, Move, Place
from worker.vram.sim import Faults, Policy, Simulation
from worker.vram.simdevice import LAG_S, SimDevice
from worker.vram.traces import CARDS, GIB, KINDS, Card, Trace, make_trace

SMALL, MIDDLE, LARGE = CARDS


def device(*, host_gib: float = 128, noise: bool = False) -> SimDevice:
    trace = replace(make_trace(0, requests=1), host_bytes=int(host_gib * GIB))
    return SimDevice(SMALL, trace, 0, noise=noise)


def trace_of(kind: str, number: int = 0) -> Trace:
    return make_trace(KINDS.index(kind) + len(KINDS) * number)


def test_bytes_are_taken_and_given_back() -> None:
    card = device()
    free = card.free_bytes
    size = card.slots["sdxl.unet"].size_bytes

    seconds = card.move(Move(Kind.WAKE, "sdxl.unet", size), 0.0)
    taken = free - card.free_bytes
    card.move(Move(Kind.PARK, "sdxl.unet", size), 1.0)

    assert taken == size
    assert seconds == pytest.approx(size / SMALL.link_bytes_s)
    assert card.free_bytes == free


def test_what_was_freed_shows_late_in_the_drivers_counter() -> None:
    card = device(noise=True)
    size = card.slots["sdxl.unet"].size_bytes
    before = card.driver_free_bytes(0.0)

    card.move(Move(Kind.WAKE, "sdxl.unet", size), 0.0)
    card.move(Move(Kind.PARK, "sdxl.unet", size), 0.0)

    assert card.driver_free_bytes(0.0) == before - size
    assert card.driver_free_bytes(LAG_S) == before


def test_a_copy_in_host_memory_makes_parking_free_until_its_room_is_needed() -> None:
    card = device(host_gib=7)  # after the start: the weights on disk, some small parts parked
    first, second = "sdxl.unet", "wan.dit"
    for name in (first, second):
        slot = card.slots[name]
        card.move(Move(Kind.WAKE, name, slot.size_bytes), 0.0)
        slot.last_used = 1.0 if name == first else 0.0
    had = {name: card.slots[name].copy for name in (first, second)}

    card.slots[second].copy = False
    seconds = card.move(Move(Kind.PARK, second, card.slots[second].size_bytes), 2.0)

    assert had[first]
    assert seconds > 0
    assert not card.slots[first].copy  # it was used last
    assert card.slots[second].place is Place.HOST


def test_an_engine_that_dies_loses_its_tenants_and_no_others() -> None:
    card = device()
    for name in ("chat.weights", "wan.dit"):
        card.move(Move(Kind.WAKE, name, card.slots[name].size_bytes), 0.0)

    card.lose(True, 1.0)

    assert card.slots["chat.weights"].place is Place.DISK
    assert card.held_bytes == card.slots["wan.dit"].size_bytes


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("kind", KINDS)
def test_ours_serves_everything_and_never_over_commits(card: Card, kind: str) -> None:
    result = Simulation(card, trace_of(kind), OURS).run()

    assert (result.served, result.refusals, result.over_commits) == (30, 0, 0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CARDS))
def test_ours_never_over_commits_whatever_fails(seed: int, card: Card) -> None:
    faults = Faults(out_of_memory=0.05, sticky=0.02)

    result = Simulation(card, make_trace(seed), OURS, faults=faults).run()

    assert result.over_commits == 0
    assert result.served + result.refusals == 30


@pytest.mark.parametrize("policy", [OURS, PINNED, *BASELINES], ids=lambda policy: policy.name)
def test_a_run_repeats_exactly_by_its_seed(policy: Policy) -> None:
    first, second = (Simulation(SMALL, make_trace(6), policy).run() for _ in range(2))

    assert asdict(first) == asdict(second)


@pytest.mark.parametrize("policy", [OURS, PINNED, *BASELINES], ids=lambda policy: policy.name)
def test_the_books_are_even_after_a_run(policy: Policy) -> None:
    run = Simulation(SMALL, make_trace(2), policy)

    run.run()

    card = run.device
    assert card.held_bytes == sum(slot.held_bytes for slot in card.slots.values())
    assert (card.planned_bytes, card.taken_bytes, card.leaving_bytes) == (0, 0, 0)
    assert all(slot.users == 0 for slot in card.slots.values())


def test_with_the_llm_pinned_on_24_gb_it_stays_and_the_encoder_is_streamed() -> None:
    for kind in KINDS[:3]:
        result = Simulation(SMALL, trace_of(kind, 1), PINNED).run()

        assert (result.llm_evictions, result.umt5_s, result.refusals) == (0, 0.0, 0)


def test_on_48_gb_nothing_comes_twice() -> None:
    results = [Simulation(MIDDLE, trace_of(kind, 1), OURS).run() for kind in KINDS[:3]]

    assert [one.reloads for one in results] == [0, 0, 0]


def test_more_seconds_pass_on_a_slow_disk() -> None:
    trace = replace(trace_of("chat and video"), host_bytes=0)

    fast, slow = (
        Simulation(LARGE, replace(trace, disk_bytes_s=speed), OURS).run().swap_s
        for speed in (3e9, 0.5e9)
    )

    assert slow > 3 * fast


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_nothing_beats_the_optimum(seed: int, at_once: bool) -> None:
    trace = make_trace(4 * seed, requests=5, at_once=at_once)
    trace = replace(trace, host_bytes=128 * GIB)
    alone = replace(OURS, collates=False)

    ours = Simulation(SMALL, trace, alone, serial=True, noise=False).run().swap_s

    assert ours >= least_swap_s(SMALL, trace) - 1e-6

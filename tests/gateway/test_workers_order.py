"""Whom to ask, in which order, for how long, and what is told in the end: decisions alone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import (
    TRAP_WORDS,
    AttestationFailed,
    GatewayError,
    TooLarge,
    WorkerBusy,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from gateway.workers import order
from gateway.workers.client import Answer
from gateway.workers.health import Health
from gateway.workers.order import Attempt, attempt_s, final_error, in_order, outcome_of
from gateway.workers.registry import Worker


def worker(url: str, was_healthy: bool | None = None) -> Worker:
    return Worker(worker_type="chat", url=url, was_healthy=was_healthy)


def health(url: str, is_healthy: bool) -> Health:
    return Health(
        worker_url=url,
        is_healthy=is_healthy,
        last_checked=datetime(2026, 11, 26, tzinfo=UTC),
        response_time_ms=1.0,
        checked_at=0.0,
    )


def attempt(outcome: str, **more: float) -> Attempt:
    return Attempt(worker_url="http://nano", outcome=outcome, ms=1.0, **more)  # type: ignore[arg-type]


def names(workers: tuple[Worker, ...]) -> str:
    return "".join(one.url for one in workers)


def test_the_given_order_holds_among_those_that_are_well() -> None:
    assert names(in_order([worker("a"), worker("b"), worker("c")], {}, {}, 0.0)) == "abc"


def test_unhealthy_ones_are_asked_last_and_not_left_out() -> None:
    known = {"a": health("a", False), "b": health("b", True)}

    assert names(in_order([worker("a"), worker("b"), worker("c")], known, {}, 0.0)) == "bca"


def test_until_it_is_probed_a_worker_is_as_the_table_has_it() -> None:
    listed = [worker("a", False), worker("b", True), worker("c", False)]

    assert names(in_order(listed, {"c": health("c", True)}, {}, 0.0)) == "bca"


def test_those_that_failed_lately_come_after_and_the_least_recent_first() -> None:
    failed = {"a": 95.0, "b": 90.0, "c": 60.0}

    assert names(in_order([worker("a"), worker("b"), worker("c")], {}, failed, 100.0)) == "cba"


def test_a_worker_under_two_types_is_asked_once() -> None:
    listed = [worker("a"), worker("b"), worker("a")]

    assert names(in_order(listed, {}, {}, 0.0)) == "ab"


@given(
    st.lists(st.sampled_from("abcdef"), max_size=8),
    st.dictionaries(st.sampled_from("abcdef"), st.booleans()),
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100)),
)
def test_everybody_is_in_the_order_exactly_once_and_the_well_before_the_ill(
    urls: list[str], well: dict[str, bool], failed: dict[str, float]
) -> None:
    known = {url: health(url, is_well) for url, is_well in well.items()}

    found = names(in_order([worker(url) for url in urls], known, failed, 100.0))

    assert sorted(found) == sorted(set(urls))
    ill = [well.get(url) is False for url in found]
    assert ill == sorted(ill)


@given(st.floats(0.001, 100), st.integers(0, 5))
def test_nobody_gets_more_time_than_is_left_and_the_last_one_gets_all(
    left_s: float, waiting: int
) -> None:
    found = attempt_s(left_s, waiting)

    assert 0 < found <= left_s
    assert (found == left_s) is (waiting == 0)


@pytest.mark.parametrize(
    ("status", "body", "retry_after_s", "outcome"),
    [
        (429, b"{}", None, order.BUSY),
        (503, b"{}", 3.0, order.BUSY),
        (503, b"{}", None, order.UNAVAILABLE),
        (504, b"{}", None, order.TIMEOUT),
        (401, b"{}", None, order.REFUSED_KEY),
        (404, b"{}", None, order.LACKS_MODEL),
        (422, b'{"error_code": "unsupported"}', None, order.LACKS_MODEL),
        (422, b'{"error_code": "out_of_range"}', None, order.REJECTED),
        (413, b"{}", None, order.REJECTED),
        (400, b"{}", None, order.REJECTED),
        (500, b"{}", None, order.FAULT),
        (302, b"", None, order.FAULT),
    ],
)
def test_what_a_status_means(
    status: int, body: bytes, retry_after_s: float | None, outcome: str
) -> None:
    answer = Answer(status=status, body=body, ms=1.0, retry_after_s=retry_after_s)

    assert outcome_of(answer) == outcome


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        ([], WorkerTimeout),
        ([order.UNAVAILABLE], WorkerUnavailable),
        ([order.UNAVAILABLE, order.LACKS_MODEL], WorkerFault),
        ([order.REFUSED_KEY, order.UNAVAILABLE], WorkerFault),
        ([order.FAULT, order.UNAVAILABLE], WorkerFault),
        ([order.FAULT, order.TIMEOUT], WorkerTimeout),
        ([order.TIMEOUT, order.BUSY], WorkerBusy),
        ([order.BUSY, order.MISMATCH], AttestationFailed),
    ],
)
def test_of_several_failures_the_one_that_matters_most_is_told(
    outcomes: list[str], error: type[GatewayError]
) -> None:
    told = final_error([attempt(one) for one in outcomes], "chat")

    assert type(told) is error
    assert [one["outcome"] for one in told.fields["worker_attempts"]] == outcomes
    assert not any(trap in f"{told} {told.code} {told.fields}".lower() for trap in TRAP_WORDS)


def test_a_prompt_that_is_too_long_for_a_worker_is_too_large() -> None:
    assert type(final_error([attempt(order.REJECTED, status=413)], "chat")) is TooLarge


def test_busy_names_the_smallest_wait_and_a_second_where_none_was_told() -> None:
    known = [attempt(order.BUSY, retry_after_s=9.0), attempt(order.BUSY, retry_after_s=4.0)]

    assert final_error(known, "chat").retry_after_s == 4.0
    assert final_error([attempt(order.BUSY)], "chat").retry_after_s == 1.0

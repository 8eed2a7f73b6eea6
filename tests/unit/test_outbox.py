"""The outbox: everybody is told in order, again and again until they have heard, and once more
only when nobody knows whether they have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import PATIENCE_S
from tests.job_parts import Clock, Gate, Tell, request, says
from worker.errors import JournalUnavailable
from worker.jobs import outbox as outbox_module
from worker.jobs.bell import Bell
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal, NewDelivery
from worker.jobs.outbox import AT_A_TIME, Outbox
from worker.storage.deliver import (
    ALARM_AFTER_S,
    LEAST_TRIES,
    Again,
    Alarm,
    Delivered,
    Delivery,
    Outcome,
)

GIVE_UP_AFTER_S = 1000.0
OK = Delivered(200)


class Receiver:
    """Stands where Sender stands, and takes everything unless told otherwise. Any thread."""

    def __init__(self) -> None:
        self.heard: list[Delivery] = []
        self.answer: Callable[[Delivery], Outcome] = lambda delivery: OK

    def send(self, delivery: Delivery, now: float) -> Outcome:
        self.heard.append(delivery)
        return self.answer(delivery)

    @property
    def contents(self) -> list[bytes]:
        return [one.content for one in self.heard]


class Bench:
    """An outbox whose rounds a test begins."""

    def __init__(self, folder: Path):
        self.clock = Clock()
        self.bell = Bell()
        self.journal = Journal(folder, self.bell, self.clock)
        self.receiver = Receiver()
        self.outbox = self.restart()

    def restart(self) -> Outbox:
        self.outbox = Outbox(
            self.journal,
            self.bell,
            self.receiver,  # type: ignore[arg-type]
            GIVE_UP_AFTER_S,
            self.clock,
            pace=lambda attempts: 10.0 * attempts,
        )
        return self.outbox

    def begin(self, job_id: str, content: bytes = b"begun", kind: str = "webhook") -> None:
        self.journal.add(request(job_id))
        self.journal.claim(job_id, says("processing", kind, content))

    def end(self, job_id: str, content: bytes = b"ended", kind: str = "webhook") -> None:
        self.journal.end(job_id, Status.FAILED, "no", "no", says("failed", kind, content))

    def tick(self) -> None:
        """One round, and all that was sent in it has come to its end."""
        self.outbox.tick()
        self.until(lambda: not self.outbox._busy)

    def until(self, is_so: Callable[[], bool]) -> None:
        seen, ends = -1, time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < ends
            seen = self.bell.wait(seen, 0.1)

    def states(self, job_id: str) -> list[str]:
        return [one["state"] for one in self.journal.of_job(job_id)]


def both(first: Tell, second: Tell) -> Tell:
    return lambda job: [*first(job), *second(job)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "jobs")
    yield bench
    bench.outbox._pool.shutdown()
    bench.journal.close()


# --- order -------------------------------------------------------------------------------------


def test_what_waits_is_sent_once_and_as_it_is(bench: Bench) -> None:
    bench.begin("a", b"\xff\0exact")
    (waiting,) = bench.journal.deliveries()

    bench.tick()
    bench.tick()

    assert bench.receiver.heard == [waiting]
    assert bench.states("a") == ["delivered"]


def test_a_job_is_told_in_order_and_the_next_only_when_the_one_before_was_heard(
    bench: Bench,
) -> None:
    bench.journal.add(request("a"))
    bench.journal.claim("a", both(says("first", content=b"1"), says("second", content=b"2")))
    bench.receiver.answer = lambda delivery: Again("answered 500")
    bench.tick()
    bench.clock.now += 9.9
    bench.tick()
    bench.receiver.answer = lambda delivery: OK
    bench.clock.now += 0.1

    bench.tick()
    bench.tick()

    assert bench.receiver.contents == [b"1", b"1", b"2"]


def test_a_finish_is_told_and_what_came_before_it_no_more(bench: Bench) -> None:
    bench.begin("a")
    bench.end("a")

    bench.tick()

    assert bench.receiver.contents == [b"ended"]
    assert bench.states("a") == ["void", "delivered"]


def test_a_finish_waits_for_what_is_on_its_way(bench: Bench) -> None:
    """Or the receiver could hear of the beginning last."""
    gate = Gate()
    bench.begin("a")
    bench.receiver.answer = lambda delivery: gate() or OK  # type: ignore[func-returns-value]
    bench.outbox.tick()
    assert gate.reached.wait(PATIENCE_S)
    bench.end("a")

    bench.outbox.tick()

    heard_before = bench.receiver.contents
    gate.opened.set()
    bench.until(lambda: not bench.outbox._busy)
    bench.tick()
    assert heard_before == [b"begun"]
    assert bench.receiver.contents == [b"begun", b"ended"]
    assert bench.states("a") == ["delivered", "delivered"]


def test_a_receiver_that_hangs_holds_up_nobody_elses(bench: Bench) -> None:
    gate = Gate()

    def answer(delivery: Delivery) -> Outcome:
        if delivery.job_id == "slow":
            gate()
        return OK

    bench.receiver.answer = answer
    for job_id in ("slow", "a", "b"):
        bench.begin(job_id)

    bench.outbox.tick()
    bench.until(lambda: bench.states("a") == bench.states("b") == ["delivered"])

    assert bench.states("slow") == ["waiting"]
    gate.opened.set()
    bench.until(lambda: bench.states("slow") == ["delivered"])


def test_a_jobs_callback_does_not_wait_for_its_webhook(bench: Bench) -> None:
    bench.journal.add(request("a"))
    bench.journal.claim(
        "a", both(says("first", "webhook", b"hook"), says("first", "callback", b"call"))
    )
    bench.receiver.answer = lambda delivery: (
        OK if delivery.kind == "callback" else Again("answered 500")
    )

    bench.tick()

    assert sorted(bench.receiver.contents) == [b"call", b"hook"]
    assert bench.states("a") == ["waiting", "delivered"]


def test_no_more_than_a_few_are_sent_at_a_time(bench: Bench) -> None:
    gate = Gate()
    bench.receiver.answer = lambda delivery: gate() or OK  # type: ignore[func-returns-value]
    for number in range(AT_A_TIME + 3):
        bench.begin(str(number))

    bench.outbox.tick()
    bench.outbox.tick()

    busy = len(bench.outbox._busy)
    gate.opened.set()
    bench.until(lambda: not bench.outbox._busy)
    bench.tick()
    assert busy == AT_A_TIME
    assert (
        sorted(bench.receiver.heard, key=lambda one: one.id)
        == [one for one in bench.receiver.heard if one]
        or len({one.id for one in bench.receiver.heard}) == AT_A_TIME + 3
    )
    assert len(bench.receiver.heard) == AT_A_TIME + 3


def test_what_was_heard_at_once_is_not_sent_again_by_the_same_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaving: a receiver answers while the round that sent it still looks for more."""
    monkeypatch.setattr(bench.outbox._pool, "submit", lambda work, *args: work(*args))
    for job_id in "abc":
        bench.begin(job_id)

    bench.outbox.tick()

    assert [one.job_id for one in bench.receiver.heard] == ["a", "b", "c"]


def test_what_is_heard_while_a_round_reads_the_journal_is_not_sent_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaving: a round has read what waits, then the answer to an earlier one comes."""
    gate = Gate()
    bench.receiver.answer = lambda delivery: gate() or OK  # type: ignore[func-returns-value]
    bench.begin("a")
    bench.outbox.tick()
    read = bench.journal.deliveries

    def read_and_hear() -> list[Delivery]:
        waiting = read()
        gate.opened.set()
        bench.until(lambda: not bench.outbox._busy)
        return waiting

    monkeypatch.setattr(bench.journal, "deliveries", read_and_hear)
    bench.outbox.tick()

    bench.until(lambda: not bench.outbox._busy)
    assert bench.receiver.contents == [b"begun"]


# --- until it is heard -------------------------------------------------------------------------


def test_what_was_not_taken_is_tried_again_after_a_growing_while(bench: Bench) -> None:
    bench.begin("a")
    bench.receiver.answer = lambda delivery: Again("answered 500")
    tried = []

    for _ in range(100):
        before = len(bench.receiver.heard)
        bench.tick()
        if len(bench.receiver.heard) > before:
            tried.append(bench.clock.now - 1000.0)
        bench.clock.now += 1.0

    assert tried == [0.0, 10.0, 30.0, 60.0]
    assert [one.attempts for one in bench.receiver.heard] == [0, 1, 2, 3]
    assert bench.journal.of_job("a")[0]["error"] == "answered 500"


@pytest.mark.parametrize(
    ("outcome", "after_s"),
    [(Again("answered 429", 77.0), 77.0), (Alarm("answered 401"), ALARM_AFTER_S)],
)
def test_a_receiver_decides_when_it_is_asked_again(
    bench: Bench, outcome: Outcome, after_s: float
) -> None:
    bench.begin("a")
    bench.receiver.answer = lambda delivery: outcome

    bench.tick()

    (one,) = bench.journal.deliveries()
    assert one.next_at == bench.clock.now + after_s


def test_what_a_person_has_to_look_at_is_an_error_in_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.begin("a")
    bench.begin("b")
    bench.receiver.answer = lambda delivery: (
        Alarm("answered 401") if delivery.job_id == "a" else Again("answered 500")
    )

    bench.tick()

    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels == {
        "webhook not delivered, try 1: answered 401": "ERROR",
        "webhook not delivered, try 1: answered 500": "WARNING",
    }


def test_a_delivery_that_nobody_takes_for_too_long_becomes_a_dead_letter(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.journal.add(request("a"))
    bench.journal.claim("a", both(says("first", content=b"1"), says("second", content=b"2")))
    bench.receiver.answer = lambda delivery: (
        OK if delivery.content == b"2" else Again("answered 500")
    )
    for _ in range(LEAST_TRIES - 1):
        bench.tick()
        bench.clock.now += GIVE_UP_AFTER_S

    bench.tick()
    states = bench.states("a")
    bench.tick()

    assert states == ["dead", "waiting"]
    assert bench.states("a") == ["dead", "delivered"]
    assert bench.receiver.contents == [b"1"] * LEAST_TRIES + [b"2"]
    assert f"given up after {LEAST_TRIES} tries" in caplog.text
    assert bench.journal.outbox_counts()["dead"] == 1


def test_an_old_delivery_that_was_never_tried_is_tried(bench: Bench) -> None:
    """The daemon was off for a week."""
    bench.begin("a")
    bench.clock.now += 7 * 86_400.0
    bench.restart()

    bench.tick()

    assert bench.states("a") == ["delivered"]


def test_a_bug_in_the_sending_is_logged_and_tried_again_later(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(delivery: Delivery) -> Outcome:
        raise ZeroDivisionError

    bench.begin("a")
    bench.receiver.answer = breaks
    for _ in range(3):
        bench.tick()
    bench.receiver.answer = lambda delivery: OK
    tries = len(bench.receiver.heard)
    bench.clock.now += 10.0

    bench.tick()

    assert tries == 1
    assert "ZeroDivisionError" in caplog.text
    assert bench.states("a") == ["delivered"]


# --- restarts and trouble ----------------------------------------------------------------------


def test_another_process_goes_on_where_one_ended(bench: Bench) -> None:
    bench.begin("a")
    bench.begin("b")
    bench.receiver.answer = lambda delivery: OK if delivery.job_id == "a" else Again("answered 500")
    bench.tick()
    bench.outbox._pool.shutdown()
    bench.receiver.answer = lambda delivery: OK
    bench.clock.now += 10.0
    bench.restart()

    bench.tick()

    assert [(one.job_id, one.attempts) for one in bench.receiver.heard[2:]] == [("b", 1)]


def test_what_was_heard_and_could_not_be_written_down_is_sent_again_with_the_same_id(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "LOOK_EVERY_S", 0.0)
    unavailable(bench.journal, monkeypatch, "delivery_state", 1)
    bench.begin("a")

    bench.tick()
    bench.tick()
    bench.tick()

    assert len(bench.receiver.heard) == 2
    assert len({one.public_id for one in bench.receiver.heard}) == 1
    assert bench.states("a") == ["delivered"]


def unavailable(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> list[int]:
    """Let a method of the journal fail so often; how often it has still to."""
    left, real = [times], getattr(journal, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise JournalUnavailable("its disk is full")
        return real(*args, **kwargs)

    monkeypatch.setattr(journal, method, call)
    return left


def test_the_loop_sends_what_comes_in_and_ends(bench: Bench) -> None:
    bench.outbox.start()

    bench.begin("a")
    bench.until(lambda: bench.states("a") == ["delivered"])
    bench.end("a")
    bench.until(lambda: bench.states("a") == ["delivered", "delivered"])
    bench.outbox.close()
    bench.begin("b")

    assert bench.receiver.contents == [b"begun", b"ended"]
    assert not any(thread.name == "outbox" for thread in threading.enumerate())


def test_the_loop_outlives_a_journal_that_cannot_be_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "LOOK_EVERY_S", 0.01)
    left = unavailable(bench.journal, monkeypatch, "deliveries", 3)
    bench.begin("a")
    bench.outbox.start()

    bench.until(lambda: bench.states("a") == ["delivered"])

    bench.outbox.close()
    assert left == [0]
    assert bench.receiver.contents == [b"begun"]


def test_closing_does_not_wait_for_a_receiver_that_hangs(bench: Bench) -> None:
    gate = Gate()
    bench.receiver.answer = lambda delivery: gate() or OK  # type: ignore[func-returns-value]
    bench.begin("a")
    bench.outbox.start()
    assert gate.reached.wait(PATIENCE_S)

    bench.outbox.close()

    states = bench.states("a")
    gate.opened.set()
    bench.outbox._pool.shutdown(wait=True)
    assert states == ["waiting"]


def test_each_delivery_of_many_jobs_is_heard_once_and_each_job_in_order(bench: Bench) -> None:
    """With the real loop and its threads, while jobs come and go."""
    bench.outbox.start()

    def work(name: str) -> None:
        for number in range(6):
            job_id = f"{name}{number}"
            bench.begin(job_id, b"1")
            bench.journal.rendered(job_id, [], {}, {}, [], ended)

    def ended(job: Job) -> list[NewDelivery]:
        return list(says("completed", content=b"2")(job))

    workers = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    bench.until(lambda: not bench.journal.outbox_counts()["waiting"])
    bench.outbox.close()

    told: dict[str, list[bytes]] = {}
    for one in bench.receiver.heard:
        told.setdefault(one.job_id, []).append(one.content)
    assert len(told) == 18
    assert all(said in ([b"2"], [b"1", b"2"]) for said in told.values()), told

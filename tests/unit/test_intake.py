"""The intake: nothing that a producer pushed is lost, made twice or left lying.

Queue and rows are in memory and as strict as the real ones; the journal is real.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import PATIENCE_S
from tests.job_parts import Clock, nothing, request
from worker.errors import JournalUnavailable, OutOfRange, has_trap_word
from worker.jobs import intake as intake_module
from worker.jobs.bell import Bell
from worker.jobs.decode import JobRequest
from worker.jobs.intake import ADOPT_EVERY_S, BEAT_EVERY_S, WATCH_EVERY_S, Intake
from worker.jobs.job import Job, Status
from worker.jobs.journal import Journal, NewDelivery
from worker.queues.queue import QueueUnavailable
from worker.storage.rows import RowsUnavailable

LIST = "sdxl_queue"
ME = "worker-1"


class Queue:
    """A JobQueue in memory, with what its server would hold. Any thread."""

    name = LIST

    def __init__(self) -> None:
        self.waiting_elements: list[bytes] = []
        self.processing: list[bytes] = []
        self.dead: list[tuple[bytes, str, str, str]] = []
        self.orphaned: dict[str, list[bytes]] = {}
        self.beats = 0
        self.is_adopted = False
        self.is_closed = False
        self.down: set[str] = set()  # methods that raise QueueUnavailable
        self.calls: list[str] = []

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method in self.down:
            raise QueueUnavailable("the Redis server cannot be reached", retry_after_s=5.0)

    def take(self) -> bytes | None:
        self._call("take")
        if not self.waiting_elements:
            return None
        self.processing.append(self.waiting_elements.pop(0))
        return self.processing[-1]

    def held(self) -> list[bytes]:
        self._call("held")
        return list(self.processing)

    def settle(self, element: bytes) -> None:
        self._call("settle")
        if element in self.processing:
            self.processing.remove(element)

    def give_back(self, element: bytes) -> None:
        self._call("give_back")
        if element in self.processing:
            self.processing.remove(element)
            self.waiting_elements.insert(0, element)

    def bury(self, element: bytes, reason: str, worker: str, at: str) -> None:
        self._call("bury")
        if element in self.processing:
            self.processing.remove(element)
            self.dead.append((element, reason, worker, at))

    def waiting(self) -> int:
        return len(self.waiting_elements)

    def beat(self) -> None:
        self._call("beat")
        self.beats += 1

    def orphans(self) -> list[str]:
        self._call("orphans")
        return sorted(self.orphaned)

    def adopt(self, worker: str) -> int:
        self._call("adopt")
        elements = self.orphaned.pop(worker, [])
        self.waiting_elements[:0] = elements
        return len(elements)

    def was_adopted(self) -> bool:
        self._call("was_adopted")
        return self.is_adopted

    def note_adoption(self) -> None:
        self._call("note_adoption")
        self.is_adopted = False

    def close(self) -> None:
        self.is_closed = True


class Rows:
    """The table of jobs: every row is queued unless a test says otherwise. Any thread."""

    def __init__(self) -> None:
        self.statuses: dict[str, str | None] = {}
        self.marked: list[tuple[str, float]] = []
        self.is_down = False

    def status(self, job_id: str) -> str | None:
        if self.is_down:
            raise RowsUnavailable("the table of jobs answered 503")
        return self.statuses.get(job_id, "queued")

    def mark_processing(self, job_id: str, started_at: float) -> None:
        if self.is_down:
            raise RowsUnavailable("the table of jobs answered 503")
        self.marked.append((job_id, started_at))


class Bench:
    """An intake whose rounds a test begins."""

    def __init__(self, folder: Path):
        self.clock = Clock()
        self.bell = Bell()
        self.journal = Journal(folder, self.bell, self.clock)
        self.queue = Queue()
        self.rows = Rows()
        self.with_rows = True
        self.take_ahead = 10
        self.decodes: Callable[[dict[str, Any]], None] = lambda body: None  # may raise
        self.restart()

    can_work = True

    def restart(self) -> None:
        """A new process with the same journal and name."""
        self.intake = Intake(
            self.queue,
            self.journal,
            self.bell,
            self._decode,
            self._tell,
            self.rows if self.with_rows else None,  # type: ignore[arg-type]
            ME,
            self.take_ahead,
            lambda: self.can_work,
            clock=self.clock,
            ticks=self.clock,
        )

    def _decode(self, body: dict[str, Any]) -> JobRequest:
        self.decodes(body)
        job_id = body.get("id") or body.get("job_id")
        return request(str(job_id), body=json.dumps(body, sort_keys=True))

    def _tell(self, job: Job, event: str) -> list[NewDelivery]:
        return [NewDelivery("callback", f"job.{event}", job.id.encode())]

    def push(self, *elements: bytes) -> None:
        self.queue.waiting_elements.extend(elements)

    def ticks(self) -> None:
        """Rounds until there is no more to take."""
        while self.intake.tick():
            pass

    def end(self, job_id: str, status: Status = Status.FAILED) -> None:
        """The job ends and somebody is to be told."""
        self.journal.end(job_id, status, "no", "no", lambda job: self._tell(job, status.value))

    def hears(self) -> list[bytes]:
        """Whoever waits to be told is told."""
        heard = self.journal.deliveries()
        for one in heard:
            self.journal.delivery_state(one.id, "delivered")
        return [one.content for one in heard]

    def jobs(self, *statuses: Status) -> list[str]:
        return [job.id for job in self.journal.of_source(LIST, *(statuses or Status))]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "jobs")
    yield bench
    bench.journal.close()


def element(*job_ids: str, **fields: Any) -> bytes:
    """One element, of one job as an object, of several as an array."""
    bodies = [
        {"id": job_id, "type": "sdxl_image_fast", "prompt": "x"} | fields for job_id in job_ids
    ]
    return json.dumps(bodies[0] if len(bodies) == 1 else bodies).encode()


# --- taking ------------------------------------------------------------------------------------


def test_an_element_becomes_a_job_with_its_body_and_stays_until_the_job_has_ended(
    bench: Bench,
) -> None:
    raw = element("a", seed=0)
    bench.push(raw)

    bench.ticks()

    job = bench.journal.get("a")
    assert (job.status, job.source, job.element) == (Status.QUEUED, LIST, raw)
    assert job.given == json.loads(raw)
    assert bench.queue.processing == [raw]
    bench.end("a")
    bench.ticks()
    untold = list(bench.queue.processing)
    bench.hears()
    bench.ticks()
    assert untold == [raw]
    assert bench.queue.processing == []
    assert bench.queue.dead == []
    assert bench.journal.get("a").element is None


def test_elements_become_jobs_in_their_order(bench: Bench) -> None:
    bench.push(*(element(job_id) for job_id in "bca"))

    bench.ticks()

    assert bench.jobs() == ["b", "c", "a"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda body: body,
        lambda body: json.dumps({"data": body}),
        lambda body: json.dumps([body]),
        lambda body: json.dumps(body),
    ],
    ids=["object", "data", "array of a text", "text"],
)
def test_all_encodings_of_producers_are_read_and_settled_as_they_lie_there(
    bench: Bench, wrap: Callable[[str], str]
) -> None:
    raw = wrap(element("a").decode()).encode()
    bench.push(raw)
    bench.ticks()
    bench.end("a")
    bench.hears()

    bench.ticks()

    assert bench.journal.get("a").given == json.loads(element("a"))
    assert bench.queue.processing == []


def test_no_more_is_taken_than_may_wait_here(bench: Bench) -> None:
    bench.take_ahead = 2
    bench.restart()
    bench.push(*(element(job_id) for job_id in "abcd"))
    bench.ticks()
    first = bench.jobs()

    bench.journal.claim("a", nothing)
    bench.ticks()

    assert first == ["a", "b"]
    assert bench.jobs() == ["a", "b", "c"]
    assert bench.queue.waiting_elements == [element("d")]


def test_an_empty_list_is_asked_once_a_round(bench: Bench) -> None:
    assert bench.intake.tick() is False
    assert bench.queue.calls.count("take") == 1


def test_jobs_of_others_count_for_nothing(bench: Bench) -> None:
    bench.take_ahead = 1
    bench.restart()
    bench.journal.add(request("over http"))
    bench.journal.add(request("other list"), source="wan_queue", element=b"x")
    bench.push(element("a"))

    bench.ticks()

    assert bench.jobs() == ["a"]


# --- several jobs, and the same one twice ------------------------------------------------------


def test_an_element_of_several_jobs_stays_until_the_last_has_ended(bench: Bench) -> None:
    raw = element("a", "b", "c")
    bench.push(raw)
    bench.ticks()
    lying = []
    for job_id in "bac":
        lying.append(list(bench.queue.processing))
        bench.end(job_id)
        bench.hears()
        bench.ticks()

    assert bench.jobs() == ["a", "b", "c"]
    assert lying == [[raw]] * 3
    assert bench.queue.processing == []


def test_the_same_element_twice_is_one_job_and_one_of_them_goes_at_once(bench: Bench) -> None:
    bench.push(element("a"), element("a"))
    bench.ticks()
    lying = list(bench.queue.processing)
    bench.end("a")
    bench.hears()

    bench.ticks()

    assert bench.jobs() == ["a"]
    assert lying == [element("a")]
    assert bench.queue.processing == []


def test_the_same_element_twice_before_a_restart_is_one_job_after_it(bench: Bench) -> None:
    bench.queue.processing = [element("a"), element("a")]

    bench.ticks()

    assert bench.jobs() == ["a"]
    assert bench.queue.processing == [element("a")]


def test_the_same_job_in_another_encoding_is_one_job(bench: Bench) -> None:
    again = json.dumps([element("a").decode()]).encode()
    bench.push(element("a"), again)
    bench.ticks()
    lying = list(bench.queue.processing)
    bench.end("a")
    bench.hears()

    bench.ticks()

    assert bench.jobs() == ["a"]
    assert lying == [element("a")]
    assert bench.queue.processing == []


def test_a_job_that_has_ended_and_comes_again_is_not_made_again(bench: Bench) -> None:
    bench.with_rows = False
    bench.restart()
    bench.push(element("a"))
    bench.ticks()
    bench.end("a")
    bench.hears()
    bench.ticks()
    bench.push(element("a"))

    bench.ticks()
    held, told = list(bench.queue.processing), bench.journal.deliveries()
    bench.hears()
    bench.ticks()

    assert held == [element("a")]
    assert [one.job_id for one in told] == ["a"]  # once more, to whoever pushed it again
    assert bench.journal.get("a").status is Status.FAILED
    assert bench.queue.processing == []
    assert bench.queue.dead == []


def test_an_element_that_comes_again_when_its_job_is_forgotten_is_a_new_one(bench: Bench) -> None:
    bench.with_rows = False
    bench.restart()
    bench.push(element("a"))
    bench.ticks()
    bench.end("a")
    bench.hears()
    bench.ticks()
    bench.journal.forget(["a"])
    bench.push(element("a"))

    bench.ticks()

    assert bench.jobs(Status.QUEUED) == ["a"]
    assert bench.queue.processing == [element("a")]


def test_the_same_job_twice_in_one_element_is_one_job(bench: Bench) -> None:
    bench.push(element("a", "a"))

    bench.ticks()

    assert bench.jobs() == ["a"]
    assert bench.queue.processing == [element("a", "a")]


def test_the_same_id_with_another_body_is_a_dead_letter(bench: Bench) -> None:
    bench.push(element("a"), element("a", seed=1))

    bench.ticks()

    ((raw, reason, worker, at),) = bench.queue.dead
    assert raw == element("a", seed=1)
    assert "another body" in reason
    assert (worker, at) == (ME, "1970-01-01T00:16:40+00:00")
    assert bench.queue.processing == [element("a")]
    assert bench.journal.get("a").status is Status.QUEUED


# --- what cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"5", b'{"id": "a", "id": "b"}', b'{"prompt": "x"}',
     b'[{"id": null}]', b"[" * 5000],
    ids=lambda raw: repr(raw[:20]),
)  # fmt: skip
def test_a_malformed_element_goes_to_the_dead_letters_and_the_next_one_is_taken(
    bench: Bench, raw: bytes
) -> None:
    bench.push(raw, element("b"))

    bench.ticks()

    ((buried, reason, worker, _),) = bench.queue.dead
    assert (buried, worker) == (raw, ME)
    assert reason and not has_trap_word(reason)
    assert bench.jobs() == ["b"]
    assert bench.queue.processing == [element("b")]


def test_of_an_element_with_a_job_without_an_id_none_is_made(bench: Bench) -> None:
    """Half of an element is never run: nobody could be told which half."""
    raw = b'[{"id": "a", "prompt": "x"}, {"prompt": "y"}]'
    bench.push(raw)

    bench.ticks()

    assert [(one[0], one[1]) for one in bench.queue.dead] == [(raw, "a job in it has no id")]
    assert bench.jobs() == []


def refuses(body: dict[str, Any]) -> None:
    raise OutOfRange("steps is 0; allowed: from 1 to 150")


def test_a_body_that_is_refused_becomes_a_failed_job_and_somebody_is_told(bench: Bench) -> None:
    bench.decodes = refuses
    bench.push(element("a", steps=0))

    bench.ticks()

    job = bench.journal.get("a")
    assert (job.status, job.error_code) == (Status.FAILED, "out_of_range")
    assert job.error == "steps is 0; allowed: from 1 to 150"
    assert job.given["steps"] == 0
    assert bench.queue.processing == [element("a", steps=0)]
    assert bench.hears() == [b"a"]
    bench.ticks()
    assert bench.queue.processing == []
    assert bench.queue.dead == []


def test_a_refused_body_stays_over_a_restart_until_somebody_was_told_and_is_told_once(
    bench: Bench,
) -> None:
    bench.decodes = refuses
    bench.push(element("a"))
    bench.ticks()
    bench.restart()

    bench.ticks()

    assert bench.queue.processing == [element("a")]
    assert bench.hears() == [b"a"]
    bench.ticks()
    assert bench.queue.processing == []


def test_a_refused_body_under_the_id_of_another_job_is_a_dead_letter(bench: Bench) -> None:
    bench.push(element("a"))
    bench.ticks()
    bench.decodes = refuses
    bench.push(element("a", steps=0))

    bench.ticks()

    assert [one[0] for one in bench.queue.dead] == [element("a", steps=0)]
    assert bench.journal.get("a").status is Status.QUEUED
    assert bench.queue.processing == [element("a")]


def test_a_good_job_beside_a_refused_one_is_made(bench: Bench) -> None:
    def second_is_bad(body: dict[str, Any]) -> None:
        if body["id"] == "b":
            raise OutOfRange("steps is 0; allowed: from 1 to 150")

    bench.decodes = second_is_bad
    bench.push(element("a", "b"))
    bench.ticks()
    bench.hears()
    bench.ticks()
    lying = list(bench.queue.processing)

    bench.end("a")
    bench.hears()
    bench.ticks()

    assert [bench.journal.get(job_id).status for job_id in "ab"] == [Status.FAILED] * 2
    assert lying == [element("a", "b")]
    assert bench.queue.processing == []


def test_a_bug_in_the_decoding_fails_the_job_and_not_every_process_that_takes_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(body: dict[str, Any]) -> None:
        if body["id"] == "a":
            raise ZeroDivisionError

    bench.decodes = breaks
    bench.push(element("a"), element("b"))

    bench.ticks()

    job = bench.journal.get("a")
    assert (job.status, job.error_code) == (Status.FAILED, "internal_error")
    assert job.error is not None and not has_trap_word(job.error)
    assert "ZeroDivisionError" in caplog.text
    assert bench.jobs(Status.QUEUED) == ["b"]


# --- rows --------------------------------------------------------------------------------------


def test_a_job_without_a_row_is_a_dead_letter_because_a_wrong_key_sees_none(bench: Bench) -> None:
    bench.rows.statuses["a"] = None
    bench.push(element("a"), element("b"))

    bench.ticks()

    assert bench.jobs() == ["b"]
    ((raw, reason, _, _),) = bench.queue.dead
    assert raw == element("a")
    assert "key" in reason


def test_a_row_that_is_not_seen_any_more_ends_no_job(bench: Bench) -> None:
    bench.push(element("a"))
    bench.ticks()
    bench.rows.statuses["a"] = None
    bench.clock.now += WATCH_EVERY_S

    bench.ticks()

    assert not bench.journal.get("a").cancel_requested


def test_an_id_that_no_job_can_have_is_a_dead_letter_and_holds_up_nothing(bench: Bench) -> None:
    bench.push(element("a" * 9000), element("b"))

    bench.ticks()

    assert len(bench.queue.dead) == 1
    assert bench.jobs() == ["b"]


def test_nothing_is_taken_without_an_engine_that_could_make_it(bench: Bench) -> None:
    bench.can_work = False
    bench.restart()
    bench.push(element("a"))

    bench.ticks()

    assert bench.queue.processing == []


def test_what_another_worker_has_adopted_is_not_made_here(bench: Bench) -> None:
    bench.push(element("a"), element("b"))
    bench.ticks()
    bench.queue.processing.remove(element("a"))
    bench.queue.is_adopted = True
    bench.restart()

    bench.intake.recover(Status.QUEUED, Status.PROCESSING)

    assert bench.jobs() == ["b"]
    assert bench.journal.deliveries() == []
    assert not bench.queue.is_adopted


def test_jobs_of_a_server_that_lost_its_data_are_made_all_the_same(bench: Bench) -> None:
    bench.push(element("a"), element("b"))
    bench.ticks()
    bench.queue.processing.clear()
    bench.restart()

    bench.intake.recover(Status.QUEUED, Status.PROCESSING)

    assert bench.jobs() == ["a", "b"]


@pytest.mark.parametrize("status", ["cancelled", "completed"])
def test_a_job_whose_row_says_that_nothing_is_to_be_done_is_skipped(
    bench: Bench, status: str
) -> None:
    bench.rows.statuses["a"] = status
    bench.push(element("a"), element("b"))

    bench.ticks()

    assert bench.jobs() == ["b"]
    assert bench.queue.processing == [element("b")]
    assert bench.queue.dead == []
    assert bench.journal.deliveries() == []


@pytest.mark.parametrize("status", ["queued", "processing", "failed"])
def test_a_job_whose_row_says_anything_else_is_made(bench: Bench, status: str) -> None:
    """Another worker may have died over it."""
    bench.rows.statuses["a"] = status
    bench.push(element("a"))

    bench.ticks()

    assert bench.jobs() == ["a"]


def test_without_a_table_every_job_is_made(bench: Bench) -> None:
    bench.with_rows = False
    bench.restart()
    bench.push(element("a"))

    bench.ticks()

    assert bench.jobs() == ["a"]


def test_a_skipped_job_beside_others_leaves_them_alone(bench: Bench) -> None:
    bench.rows.statuses["a"] = "cancelled"
    bench.push(element("a", "b"))
    bench.ticks()
    lying = list(bench.queue.processing)
    bench.end("b")
    bench.hears()

    bench.ticks()

    assert bench.jobs() == ["b"]
    assert lying == [element("a", "b")]
    assert bench.queue.processing == []


def test_while_rows_cannot_be_read_an_element_stays_and_nothing_more_is_taken(
    bench: Bench,
) -> None:
    bench.rows.is_down = True
    bench.push(element("a"), element("b"))
    bench.intake.tick()
    for _ in range(3):
        with pytest.raises(RowsUnavailable):
            bench.intake.tick()
    lying = (list(bench.queue.processing), list(bench.queue.waiting_elements))

    bench.rows.is_down = False
    bench.ticks()

    assert lying == ([element("a")], [element("b")])
    assert bench.jobs() == ["a", "b"]


def test_elements_are_let_go_of_while_rows_cannot_be_read(bench: Bench) -> None:
    bench.push(element("a"))
    bench.ticks()
    bench.end("a")
    bench.hears()
    bench.rows.is_down = True
    bench.push(element("b"))

    bench.intake.tick()

    assert element("a") not in bench.queue.processing


def test_a_row_that_is_cancelled_ends_its_job(bench: Bench) -> None:
    bench.push(element("a"), element("b"), element("c"))
    bench.ticks()
    bench.journal.claim("b", nothing)
    bench.rows.statuses |= {"a": "cancelled", "b": "cancelled"}
    bench.ticks()
    before = bench.journal.wished_away()

    bench.clock.now += WATCH_EVERY_S
    bench.ticks()

    assert before == []
    assert [job.id for job in bench.journal.wished_away()] == ["a", "b"]


def test_a_row_says_once_that_its_job_is_processed(bench: Bench) -> None:
    bench.push(element("a"), element("b"))
    bench.ticks()
    bench.clock.now = 2000.0
    bench.journal.claim("a", nothing)
    for _ in range(3):
        bench.clock.now += WATCH_EVERY_S
        bench.ticks()

    assert bench.rows.marked == [("a", 2000.0)]


def test_rows_are_not_asked_more_often_than_needed(bench: Bench) -> None:
    bench.push(element("a"))
    bench.ticks()
    asked: list[str] = []
    status = bench.rows.status
    bench.rows.status = lambda job_id: asked.append(job_id) or status(job_id)  # type: ignore[method-assign,func-returns-value]
    for _ in range(20):
        bench.clock.now += WATCH_EVERY_S / 10
        bench.ticks()

    assert len(asked) == 2


# --- restarts and trouble ----------------------------------------------------------------------


def test_what_an_earlier_life_held_goes_on_before_anything_is_taken(bench: Bench) -> None:
    bench.push(element("a"), element("b"))
    bench.ticks()
    job = bench.journal.get("a")
    bench.queue.processing.append(element("never-read"))
    bench.push(element("c"))
    bench.restart()

    bench.ticks()

    assert bench.jobs() == ["a", "b", "never-read", "c"]
    assert bench.journal.get("a") == job
    assert bench.queue.processing == [
        element("a"), element("b"), element("never-read"), element("c"),
    ]  # fmt: skip


def test_jobs_of_a_lost_disk_come_back_from_the_list(bench: Bench, tmp_path: Path) -> None:
    bench.push(element("a"), element("b"))
    bench.ticks()
    bench.journal.close()
    bench.journal = Journal(tmp_path / "new", bench.bell, bench.clock)
    bench.restart()

    bench.ticks()

    assert bench.jobs() == ["a", "b"]


@pytest.mark.parametrize("row", ["completed", "processing"])
def test_a_job_that_ended_just_before_a_crash_is_not_made_again(bench: Bench, row: str) -> None:
    """Between the last word about it and the letting go of its element."""
    bench.push(element("a"))
    bench.ticks()
    bench.end("a")
    bench.hears()
    bench.rows.statuses["a"] = row
    bench.restart()

    bench.ticks()

    assert bench.queue.processing == []
    assert bench.journal.get("a").status is Status.FAILED
    assert bench.journal.get("a").element is None


def test_a_crash_between_the_list_and_the_journal_lets_go_once_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.push(element("a"))
    bench.ticks()
    bench.end("a")
    bench.hears()

    def full(job_id: str) -> None:
        raise JournalUnavailable("its disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(bench.journal, "let_go", full)
        with pytest.raises(JournalUnavailable):
            bench.intake.tick()
    between = list(bench.queue.processing)

    bench.ticks()

    assert between == []
    assert bench.journal.get("a").element is None


@pytest.mark.parametrize("method", ["add", "settled", "of_source", "refuse", "let_go"])
@pytest.mark.parametrize("from_call", [0, 1, 2])
def test_a_journal_that_cannot_be_used_for_a_while_loses_and_doubles_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, from_call: int
) -> None:
    calls, real = [0], getattr(bench.journal, method)

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if from_call < calls[0] <= from_call + 2:
            raise JournalUnavailable("its disk is full")
        return real(*args, **kwargs)

    def c_is_bad(body: dict[str, Any]) -> None:
        if body["id"] in ("c", "e", "f"):
            raise OutOfRange("no")

    monkeypatch.setattr(bench.journal, method, fail)
    bench.decodes = c_is_bad
    bench.push(element("a", "b"), element("c"), element("d"), element("e", "f"))
    for _ in range(12):
        try:
            bench.intake.tick()
        except JournalUnavailable:
            pass
        else:
            for job_id in "abd":
                if _is_open(bench, job_id):
                    bench.end(job_id)
            bench.hears()
    bench.ticks()

    assert calls[0] > from_call + 1
    assert sorted(job.id for job in _all(bench)) == list("abcdef")
    assert [job.element for job in _all(bench)] == [None] * 6
    assert bench.queue.processing == []
    assert bench.queue.dead == []
    assert bench.journal.outbox_counts() == {
        "waiting": 0, "delivered": 6, "dead": 0, "uploads": 0,
    }  # fmt: skip


def _all(bench: Bench) -> list[Job]:
    return [bench.journal.get(job_id) for job_id in "abcdef"]


def _is_open(bench: Bench, job_id: str) -> bool:
    database = bench.journal._database._connection("read")
    (count,) = database.execute(
        "SELECT count(*) FROM jobs WHERE id = ? AND finished_at IS NULL", (job_id,)
    ).fetchone()
    return bool(count)


@pytest.mark.parametrize(
    "method", ["take", "held", "settle", "bury", "beat", "orphans", "adopt", "give_back"]
)
def test_a_queue_that_cannot_be_reached_for_a_while_loses_and_doubles_nothing(
    bench: Bench, method: str
) -> None:
    bench.queue.orphaned["worker-2"] = [element("orphan")]
    bench.queue.processing.append(element("held"))
    bench.push(element("a"), b"{", element("b"))

    def rounds(number: int) -> None:
        for _ in range(number):
            bench.clock.now += 60.0
            try:
                bench.intake.tick()
            except QueueUnavailable:
                continue

    bench.queue.down = {method}
    rounds(8)
    bench.queue.down = set()
    rounds(8)
    ids = bench.jobs()
    for job_id in ids:
        bench.end(job_id)
    bench.hears()
    bench.queue.down = {method}
    rounds(3)
    bench.queue.down = set()
    rounds(3)

    assert sorted(ids) == ["a", "b", "held", "orphan"]
    assert bench.queue.processing == []
    assert bench.queue.waiting_elements == []
    assert [one[0] for one in bench.queue.dead] == [b"{"]


# --- other workers -----------------------------------------------------------------------------


def test_elements_of_a_worker_that_is_gone_are_taken_over(bench: Bench) -> None:
    bench.queue.orphaned = {"worker-2": [element("x"), element("y")], "worker-3": [element("z")]}
    bench.push(element("a"))

    bench.ticks()

    assert sorted(bench.jobs()) == ["a", "x", "y", "z"]
    assert bench.jobs().index("x") < bench.jobs().index("y") < bench.jobs().index("a")


def test_signs_of_life_and_looks_for_orphans_come_in_their_time(bench: Bench) -> None:
    for _ in range(241):
        bench.intake.tick()
        bench.clock.now += 1.0

    assert bench.queue.beats == 240 / BEAT_EVERY_S + 1
    assert bench.queue.calls.count("orphans") == 240 / ADOPT_EVERY_S + 1


def test_signs_of_life_go_on_while_rows_cannot_be_read(bench: Bench) -> None:
    bench.push(element("a"))
    bench.intake.tick()
    bench.rows.is_down = True
    for _ in range(5):
        bench.clock.now += BEAT_EVERY_S
        with pytest.raises(RowsUnavailable):
            bench.intake.tick()

    assert bench.queue.beats == 6


# --- draining ----------------------------------------------------------------------------------


def test_a_worker_that_drains_hands_back_what_has_not_begun_in_its_old_order(
    bench: Bench,
) -> None:
    bench.take_ahead = 3
    bench.restart()
    bench.push(*(element(job_id) for job_id in "abcd"))
    bench.ticks()
    bench.journal.claim("a", nothing)
    bench.intake.stop_taking()

    bench.ticks()

    assert bench.jobs() == ["a"]
    assert bench.queue.processing == [element("a")]
    assert bench.queue.waiting_elements == [element("b"), element("c"), element("d")]
    bench.end("a")
    bench.hears()
    bench.ticks()
    assert bench.queue.processing == []


def test_a_worker_that_drains_takes_nothing_and_takes_over_nothing(bench: Bench) -> None:
    bench.intake.stop_taking()
    bench.push(element("a"))
    bench.queue.orphaned["worker-2"] = [element("b")]

    bench.ticks()

    assert bench.jobs() == []
    assert bench.queue.waiting_elements == [element("a")]
    assert bench.queue.orphaned == {"worker-2": [element("b")]}
    assert bench.queue.beats == 1


def test_a_worker_that_drains_keeps_what_it_has_begun_or_cannot_take_apart(bench: Bench) -> None:
    bench.push(element("a"), element("b", "c"))
    bench.ticks()
    bench.journal.claim("a", nothing)
    bench.journal.requeue("a")
    bench.intake.stop_taking()

    bench.ticks()

    assert bench.jobs() == ["a", "b", "c"]
    assert bench.queue.processing == [element("a"), element("b", "c")]
    assert bench.queue.waiting_elements == []


def test_a_worker_that_drains_hands_back_what_it_has_taken_and_not_read(bench: Bench) -> None:
    bench.push(element("a"), element("b"))
    bench.intake.tick()

    bench.intake.stop_taking()
    bench.ticks()

    assert bench.jobs() == []
    assert bench.queue.waiting_elements == [element("a"), element("b")]


def test_what_could_not_be_handed_back_is_handed_back_later(bench: Bench) -> None:
    bench.push(element("a"), element("b"))
    bench.ticks()
    bench.intake.stop_taking()
    bench.queue.down = {"give_back"}
    for _ in range(2):
        with pytest.raises(QueueUnavailable):
            bench.intake.tick()
    held = list(bench.queue.processing)

    bench.queue.down = set()
    bench.ticks()

    assert held == [element("a"), element("b")]
    assert bench.jobs() == []
    assert bench.queue.processing == []
    assert bench.queue.waiting_elements == [element("a"), element("b")]


def test_a_job_that_was_handed_back_can_come_again(bench: Bench) -> None:
    bench.push(element("a"))
    bench.ticks()
    bench.intake.stop_taking()
    bench.ticks()
    bench.restart()

    bench.ticks()

    assert bench.jobs() == ["a"]
    assert bench.queue.processing == [element("a")]
    bench.end("a")
    bench.hears()
    bench.ticks()
    assert bench.queue.processing == []


def test_of_two_that_hand_back_and_begin_a_job_one_has_it(bench: Bench) -> None:
    for number in range(20):
        bench.push(element(str(number)))
    bench.take_ahead = 20
    bench.restart()
    bench.ticks()
    begun: list[str] = []

    def begin() -> None:
        for number in range(20):
            if bench.journal.claim(str(number), nothing) is not None:
                begun.append(str(number))

    runner = threading.Thread(target=begin)
    runner.start()
    bench.intake.stop_taking()
    bench.intake.tick()
    runner.join(PATIENCE_S)

    back = [json.loads(raw)["id"] for raw in bench.queue.waiting_elements]
    assert sorted(begun + back, key=int) == [str(number) for number in range(20)]
    assert sorted(bench.queue.processing) == sorted(element(job_id) for job_id in begun)


# --- the loop ----------------------------------------------------------------------------------


def until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.002)


def test_the_loop_takes_all_there_is_and_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "TAKE_EVERY_S", 0.0)
    bench.push(*(element(str(number)) for number in range(5)))
    bench.intake.start()
    until(lambda: len(bench.jobs()) == 5)

    bench.intake.close()

    assert bench.queue.is_closed
    assert not any(thread.name == f"list {LIST}" for thread in threading.enumerate())


@pytest.mark.parametrize("trouble", ["queue", "rows", "journal"])
def test_the_loop_outlives_trouble(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(intake_module, "TAKE_EVERY_S", 0.0)
    monkeypatch.setattr(intake_module, "AFTER_ERROR_S", 0.001)
    bench.push(element("a"))
    real, seen = bench.journal.settled, threading.Event()

    def full(source: str) -> list[Job]:
        seen.set()
        raise JournalUnavailable("its disk is full")

    if trouble == "queue":
        bench.queue.down = {"take", "held"}
    elif trouble == "rows":
        bench.rows.is_down = True
    else:
        monkeypatch.setattr(bench.journal, "settled", full)
    bench.intake.start()
    until(lambda: len(bench.queue.calls) > 1 and (trouble != "journal" or seen.is_set()))

    bench.queue.down = set()
    bench.rows.is_down = False
    monkeypatch.setattr(bench.journal, "settled", real)

    until(lambda: bench.jobs() == ["a"])
    bench.intake.close()

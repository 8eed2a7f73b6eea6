"""Chat over real sockets: who is asked, in which order, and what the caller is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Literal

import pytest

from gateway.errors import (
    TRAP_WORDS,
    AttestationFailed,
    GatewayError,
    Invalid,
    TooLarge,
    WorkerBusy,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from gateway.values.assembly import Message
from gateway.workers.attester import Attester
from gateway.workers.client import Keys, WorkerClient
from gateway.workers.health import Health
from gateway.workers.pool import Completion, WorkerPool
from gateway.workers.registry import Worker
from gateway.workers.served import ServedModels
from gateway.workers.urls import AddressPolicy
from tests.gateway.fake_worker import MUTATIONS, Behaviour, FakeWorker, closed_port_url
from tests.gateway.test_workers_attest import Tokenizer

PROMPT = "a red circle, éè 😀"
MESSAGES = (Message("system", "Be brief."), Message("user", PROMPT))
PARAMS = {"model": "qwen_instruct", "temperature": 0.5, "max_tokens": 62, "top_k": None}


class Listed:
    """A registry of these URLs, all of type chat."""

    def __init__(self, urls: Sequence[str]):
        self.urls = urls

    def workers(self, *worker_types: str) -> Sequence[Worker]:
        return [Worker(worker_type="chat", url=url) for url in self.urls]


class NoMonitor:
    """Knows who is ill, as the test says; remembers who was suspected."""

    def __init__(self) -> None:
        self.suspects: list[str] = []
        self.ill: list[str] = []

    def known(self) -> Mapping[str, Health]:
        at = datetime(2026, 11, 26, tzinfo=UTC)
        return {
            url: Health(
                worker_url=url,
                is_healthy=False,
                last_checked=at,
                response_time_ms=None,
                checked_at=0.0,
            )
            for url in self.ill
        }

    def suspect(self, url: str) -> None:
        self.suspects.append(url)


class Bench:
    """Fake workers, and pools over them."""

    def __init__(self, stack: ExitStack):
        self._stack = stack
        self.monitor = NoMonitor()

    def worker(self, kind: str = "normal", **more: Any) -> FakeWorker:
        settings = {name: more.pop(name) for name in ("key", "answer") if name in more}
        worker = self._stack.enter_context(FakeWorker(**settings))
        worker.behave(kind, **more)
        return worker

    def pool(
        self,
        *workers: FakeWorker | str,
        key: str | None = None,
        on_mismatch: Literal["refuse", "flag"] = "refuse",
        tokenizers: Sequence[Tokenizer] = (Tokenizer(),),
    ) -> WorkerPool:
        client = WorkerClient(AddressPolicy(private_allowed=True), Keys(key, key))
        self._stack.callback(client.close)
        return WorkerPool(
            Listed([one if isinstance(one, str) else one.url for one in workers]),
            self.monitor,
            client,
            Attester(ServedModels(client), tokenizers),
            on_mismatch=on_mismatch,
        )


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


def ask(
    pool: WorkerPool, deadline_s: float = 10.0, route: str = "/chat", request_id: str = "r-1"
) -> Completion:
    return pool.chat(route, MESSAGES, PARAMS, deadline_s, request_id)


def outcomes(error: GatewayError) -> list[tuple[str, str | None]]:
    return [(one["outcome"], one["error_code"]) for one in error.fields["worker_attempts"]]


def test_an_answer_comes_with_its_receipt_and_says_who_gave_it(bench: Bench) -> None:
    worker = bench.worker(answer="  two spaces, kept  ")

    done = ask(bench.pool(worker))

    assert done.text == "  two spaces, kept  "
    assert done.attestation.ok
    assert done.receipt is not None
    assert done.worker_url == worker.url
    assert (done.completion_tokens, done.finish_reason, done.flags) == (3, "stop", ())
    assert [one.outcome for one in done.attempts] == ["ok"]


def test_what_is_sent_is_the_messages_and_the_parameters_and_nothing_else(bench: Bench) -> None:
    worker = bench.worker(key="s3cret")

    ask(bench.pool(worker, key="s3cret"), request_id="abc")

    (seen,) = worker.posts()
    assert seen.body == {
        "model": "qwen_instruct",
        "temperature": 0.5,
        "max_tokens": 62,
        "messages": [{"role": one.role, "content": one.content} for one in MESSAGES],
    }
    assert seen.headers["Authorization"] == "Bearer s3cret"
    assert seen.headers["X-Request-Id"].startswith("abc.")
    assert "Cookie" not in seen.headers


def test_enhance_has_its_own_text_key_and_default(bench: Bench) -> None:
    worker = bench.worker()

    done = bench.pool(worker).chat("/enhance", MESSAGES, {"model": "instruct"}, 10.0, "r-1")

    assert done.text == "a red circle on white paper"
    assert done.receipt is not None and done.receipt["sampling"]["max_tokens"] == 200


def test_an_empty_completion_is_an_answer(bench: Bench) -> None:
    done = ask(bench.pool(bench.worker(answer="")))

    assert done.text == ""
    assert done.attestation.ok


@pytest.mark.parametrize(
    ("kind", "outcome", "code"),
    [
        ("busy", "busy", "busy"),
        ("loading", "busy", "engine_unavailable"),
        ("drop", "fault", "dropped"),
        ("drop_early", "fault", "dropped"),
        ("not_json", "fault", "not_json"),
        ("unsuccessful", "fault", "unsuccessful"),
        ("redirect", "fault", None),
        ("huge", "fault", "too_large"),
        ("unauthorized", "refused_key", "unauthorized"),
        ("error", "fault", "internal_error"),
        ("mutate", "mismatch", "attestation_failed"),
    ],
)
def test_after_a_worker_that_gives_no_usable_answer_the_next_one_is_asked(
    bench: Bench, kind: str, outcome: str, code: str | None
) -> None:
    bad, good = bench.worker(kind), bench.worker()

    done = ask(bench.pool(bad, good))

    assert done.worker_url == good.url
    assert done.attestation.ok
    assert [(one.outcome, one.error_code) for one in done.attempts] == [
        (outcome, code),
        ("ok", None),
    ]
    assert "failover" in done.flags
    assert ("may_have_run_twice" in done.flags) is (outcome in ("fault", "mismatch"))


def test_a_worker_that_is_gone_has_not_run_the_request(bench: Bench) -> None:
    gone = closed_port_url()

    done = ask(bench.pool(gone, bench.worker()))

    assert [one.outcome for one in done.attempts] == ["unavailable", "ok"]
    assert not done.attempts[0].may_have_run
    assert done.flags == ("failover",)
    assert bench.monitor.suspects == [gone]


def test_a_worker_that_hangs_leaves_time_for_the_next_and_is_recorded(bench: Bench) -> None:
    hanging, good = bench.worker("hang"), bench.worker()

    done = ask(bench.pool(hanging, good), deadline_s=1.0)

    assert done.worker_url == good.url
    assert [one.outcome for one in done.attempts] == ["timeout", "ok"]
    assert done.attempts[0].may_have_run
    assert done.flags == ("failover", "may_have_run_twice")
    assert len(hanging.posts()) == 1


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_a_worker_that_never_ends_is_left_at_the_deadline(bench: Bench, kind: str) -> None:
    worker = bench.worker(kind)

    with pytest.raises(WorkerTimeout) as told:
        ask(bench.pool(worker), deadline_s=0.3)

    assert outcomes(told.value) == [("timeout", "timeout")]
    assert told.value.fields["worker_attempts"][0]["ms"] < 5000


def test_workers_that_are_known_to_be_ill_take_no_time_from_the_one_that_is_well(
    bench: Bench,
) -> None:
    slow, gone = bench.worker("slow", delay_s=0.9), closed_port_url()
    bench.monitor.ill = [gone]

    done = ask(bench.pool(gone, slow), deadline_s=1.4)  # 60 % of it would not do

    assert done.worker_url == slow.url
    assert len(done.attempts) == 1


def test_a_slow_worker_is_waited_for(bench: Bench) -> None:
    done = ask(bench.pool(bench.worker("slow", delay_s=0.3)))

    assert done.attestation.ok


def test_when_all_are_busy_the_soonest_is_named(bench: Bench) -> None:
    pool = bench.pool(
        bench.worker("busy", retry_after_s=9),
        bench.worker("loading", retry_after_s=2.5),
        closed_port_url(),
    )

    with pytest.raises(WorkerBusy) as told:
        ask(pool)

    assert told.value.retry_after_s == 2.5
    assert [one for one, _ in outcomes(told.value)] == ["busy", "busy", "unavailable"]


def test_when_nobody_is_there_the_error_says_so(bench: Bench) -> None:
    with pytest.raises(WorkerUnavailable):
        ask(bench.pool())
    with pytest.raises(WorkerUnavailable) as told:
        ask(bench.pool(closed_port_url(), closed_port_url()))

    assert outcomes(told.value) == [("unavailable", "unreachable")] * 2


def test_a_wrong_key_is_an_error_that_names_the_variable(bench: Bench) -> None:
    with pytest.raises(WorkerFault, match="CHAT_WORKER_API_KEY"):
        ask(bench.pool(bench.worker(key="right"), key="wrong"))


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "invalid_request", WorkerFault),
        (413, "context_overflow", TooLarge),
        (422, "out_of_range", Invalid),
    ],
)
def test_what_a_worker_refuses_is_not_sent_to_another(
    bench: Bench, status: int, code: str, error: type[GatewayError]
) -> None:
    first = bench.worker("error", status=status, error_code=code)
    second = bench.worker()

    with pytest.raises(error, match=code):
        ask(bench.pool(first, second))

    assert second.posts() == []


def test_a_model_that_one_worker_lacks_is_asked_of_the_next(bench: Bench) -> None:
    first = bench.worker("error", status=422, error_code="unsupported")

    done = ask(bench.pool(first, bench.worker()))

    assert [one.outcome for one in done.attempts] == ["lacks_model", "ok"]


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_mutating_worker_is_refused(
    bench: Bench, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = bench.worker()
    pool = bench.pool(worker)
    ask(pool)  # so that there is an earlier receipt to replay
    worker.behave("mutate", mutation=kind)

    with caplog.at_level(logging.ERROR), pytest.raises(AttestationFailed) as told:
        ask(pool)

    assert outcomes(told.value) == [("mismatch", "attestation_failed")]
    assert any(worker.url in line and "request r-1." in line for line in caplog.messages)
    assert PROMPT not in caplog.text


def test_a_forged_ids_hash_is_refused_without_the_tokenizer_once_an_honest_one_came(
    bench: Bench,
) -> None:
    worker = bench.worker()
    pool = bench.pool(worker, tokenizers=())
    ask(pool)
    worker.behave("mutate", mutation="ids_forged")

    with pytest.raises(AttestationFailed):
        ask(pool)


def test_where_the_settings_say_flag_the_answer_comes_and_names_what_differs(bench: Bench) -> None:
    worker = bench.worker("mutate", mutation="temperature_changed")

    done = ask(bench.pool(worker, on_mismatch="flag"))

    assert done.text == "a red circle on white paper"
    assert not done.attestation.ok
    assert done.flags == ("attestation:sampling.temperature",)


def test_a_worker_that_failed_is_asked_after_the_others_next_time(bench: Bench) -> None:
    first, second = bench.worker(), bench.worker()
    first.script(Behaviour("error"))
    pool = bench.pool(first, second)
    ask(pool)

    done = ask(pool)

    assert done.worker_url == second.url
    assert len(done.attempts) == 1
    assert len(first.posts()) == 1


def test_a_worker_that_goes_away_between_two_requests_is_replaced_by_the_next(
    bench: Bench,
) -> None:
    worker, other = bench.worker(), bench.worker()
    pool = bench.pool(worker, other)
    ask(pool)
    worker.close()

    done = ask(pool)

    assert done.worker_url == other.url
    assert len(done.attempts) == 2


@pytest.mark.parametrize(
    "kind", ["busy", "loading", "drop", "not_json", "unsuccessful", "mutate", "error", "huge"]
)
def test_no_error_holds_the_prompt_a_url_or_a_word_that_clients_misread(
    bench: Bench, kind: str
) -> None:
    worker = bench.worker(kind)

    with pytest.raises(GatewayError) as told:
        ask(bench.pool(worker))

    told_text = json.dumps([str(told.value), told.value.code, told.value.fields])
    assert PROMPT not in told_text
    assert worker.url not in told_text
    assert not any(trap in told_text.lower() for trap in TRAP_WORDS)


def test_a_code_of_a_worker_with_such_a_word_is_not_passed_on(bench: Bench) -> None:
    with pytest.raises(WorkerFault) as told:
        ask(bench.pool(bench.worker("error", error_code="nan_in_logits")))

    assert outcomes(told.value) == [("fault", None)]


def test_half_of_a_surrogate_pair_is_refused_before_anybody_is_asked(bench: Bench) -> None:
    worker = bench.worker()

    with pytest.raises(Invalid):
        bench.pool(worker).chat("/chat", [Message("user", "\ud83d")], PARAMS, 5.0, "r-1")

    assert worker.posts() == []


def test_an_unknown_route_and_a_stream_are_refused(bench: Bench) -> None:
    pool = bench.pool(bench.worker())

    with pytest.raises(Invalid):
        ask(pool, route="/memory/unload")
    with pytest.raises(Invalid):
        pool.chat("/chat", MESSAGES, {"stream": True}, 5.0, "r-1")


def test_many_threads_share_one_pool(bench: Bench) -> None:
    worker = bench.worker(answer=lambda body: body["messages"][-1]["content"])
    pool = bench.pool(worker)

    def one(index: int) -> Completion:
        return pool.chat("/chat", [Message("user", f"n {index}")], PARAMS, 20.0, f"r-{index}")

    with ThreadPoolExecutor(16) as threads:
        done = list(threads.map(one, range(64)))

    assert [one.text for one in done] == [f"n {index}" for index in range(64)]
    assert all(one.attestation.ok for one in done)
    assert len({seen.headers["X-Request-Id"] for seen in worker.posts()}) == 64

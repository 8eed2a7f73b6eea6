"""Running a chain: order, time, visibility of what failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import (
    AttestationFailed,
    GatewayError,
    Invalid,
    ProviderFault,
    TooLarge,
    WorkerBusy,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from gateway.models import faults
from gateway.models.cooldown import Cooldowns
from gateway.models.exchange import Exchange
from gateway.models.faults import ProviderError
from gateway.models.openai_client import OpenAiClient, ProviderAnswer
from gateway.models.runner import Answer, ModelRunner
from gateway.values.assembly import Message, ModelChoice
from tests.gateway import lying_provider as lying
from tests.gateway.lying_provider import LyingProvider

MESSAGES = (Message("user", "a red boat"),)


@dataclass
class Clock:
    """Seconds that pass only when told."""

    at: float = 100.0

    def __call__(self) -> float:
        return self.at


@dataclass(frozen=True)
class Done:
    """A worker's completion."""

    text: str = "from a worker"
    receipt: Mapping[str, Any] | None = field(
        default_factory=lambda: {"model": "qwen", "ignored": ["sfw_mode"]}
    )
    attestation: Any = "ok"
    attempts: Sequence[Any] = ("one",)
    worker_url: str = "http://worker"
    worker_ms: float | None = 5.0
    prompt_tokens: int | None = 9
    completion_tokens: int | None = 3
    finish_reason: str | None = "stop"
    flags: Sequence[str] = ()


@dataclass
class Side:
    """Workers and providers at once: for each external id a result, an error, or a function."""

    clock: Clock
    results: dict[str, Any]
    takes_s: float = 0.0
    asked: list[tuple[str, float]] = field(default_factory=list)  # external id, budget
    sent: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def chat(
        self,
        route: str,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        deadline_s: float,
        request_id: str,
    ) -> Any:
        self.sent.append((route, dict(params)))
        return self._result(params["model"], deadline_s)

    def complete(
        self,
        choice: ModelChoice,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        deadline_s: float,
        request_id: str,
    ) -> Any:
        return self._result(choice.external_id, deadline_s)

    def _result(self, external_id: str, deadline_s: float) -> Any:
        self.asked.append((external_id, deadline_s))
        result = self.results[external_id]
        if result == "hangs":
            self.clock.at += deadline_s
            raise WorkerTimeout(f"no answer in {deadline_s:.3g} s")
        self.clock.at += self.takes_s
        if isinstance(result, GatewayError):
            raise result
        return result


def choice(key: str, kind: str = "worker", source: str = "priority") -> ModelChoice:
    return ModelChoice(
        model_key=key,
        provider=f"{kind}-1",
        kind=kind,
        external_id=key,
        base_url=None,
        secret_ref=None,
        source=source,
    )


def provider_answer(text: str = "from a provider") -> ProviderAnswer:
    return ProviderAnswer(
        text=text,
        served_model="other",
        finish_reason="length",
        prompt_tokens=None,
        completion_tokens=None,
        unsupported=("top_k",),
        flags=("other_model",),
    )


class Bench:
    """A runner with everything around it."""

    def __init__(self, **results: Any):
        self.clock = Clock()
        self.side = Side(self.clock, results)
        self.cooldowns = Cooldowns()
        self.runner = ModelRunner(self.side, self.side, self.cooldowns, self.clock)

    def run(self, *choices: ModelChoice, deadline_s: float = 60.0, route: str = "/chat") -> Answer:
        return self.runner.run(
            choices,
            MESSAGES,
            {"temperature": 0.7},
            deadline_s=deadline_s,
            request_id="r-1",
            now=self.clock.at,
            route=route,
        )

    def error(self, *choices: ModelChoice, deadline_s: float = 60.0) -> GatewayError:
        with pytest.raises(GatewayError) as caught:
            self.run(*choices, deadline_s=deadline_s)
        return caught.value


def test_the_first_model_of_the_chain_answers_with_its_receipt() -> None:
    bench = Bench(a=Done(), b=Done())

    answer = bench.run(choice("a", source="user"), choice("b"), route="/enhance")

    assert (answer.text, answer.model_key, answer.source) == ("from a worker", "a", "user")
    assert answer.receipt == {"model": "qwen", "ignored": ["sfw_mode"]}
    assert (answer.attestation, answer.worker_attempts) == ("ok", ("one",))
    assert (answer.served_model, answer.unsupported) == ("qwen", ("sfw_mode",))
    assert not answer.fallback
    assert [attempt.outcome for attempt in answer.attempts] == ["answered"]
    assert bench.side.sent == [("/enhance", {"temperature": 0.7, "model": "a"})]


def test_a_providers_answer_says_what_ran_and_what_did_not_take_part() -> None:
    bench = Bench(a=provider_answer())

    answer = bench.run(choice("a", "openai"))

    assert (answer.served_model, answer.flags) == ("other", ("other_model",))
    assert (answer.unsupported, answer.receipt, answer.worker_url) == (("top_k",), None, None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerUnavailable("none"), "worker_unavailable"),
        (WorkerBusy("busy"), "worker_busy"),
        (WorkerFault("odd"), "worker_fault"),
        (AttestationFailed("messages_sha256 differs"), "attestation_failed"),
        (TooLarge("5000 tokens of 4096"), "too_large"),
        (ProviderError(faults.BUSY, "busy"), "provider_fault"),
    ],
)
def test_a_failure_is_followed_by_the_next_and_stays_visible(
    error: GatewayError, code: str
) -> None:
    bench = Bench(a=error, b=Done())

    answer = bench.run(choice("a"), choice("b"))

    assert answer.fallback and answer.model_key == "b"
    first, second = answer.attempts
    assert (first.model_key, first.outcome, first.code, first.why) == (
        "a",
        "failed",
        code,
        str(error),
    )
    assert second.outcome == "answered"


def test_the_workers_that_were_not_honest_are_in_the_attempts() -> None:
    asked = [{"outcome": "mismatch", "ms": 3.0}]
    failed = AttestationFailed("differs", fields={"worker_attempts": asked})
    bench = Bench(a=failed, b=Done())

    answer = bench.run(choice("a"), choice("b"))

    assert answer.attempts[0].to_json()["workers"] == asked


def test_a_hanging_first_model_leaves_a_third_of_the_time_for_the_next() -> None:
    bench = Bench(a="hangs", b="hangs", c="hangs")

    error = bench.error(choice("a"), choice("b"), choice("c"), deadline_s=90.0)

    assert [key for key, _ in bench.side.asked] == ["a", "b", "c"]
    assert [budget for _, budget in bench.side.asked] == pytest.approx([60.0, 20.0, 10.0])
    assert isinstance(error, WorkerTimeout)


def test_a_model_is_not_asked_when_no_time_is_left() -> None:
    bench = Bench(a=WorkerFault("odd"), b=Done())
    bench.side.takes_s = 59.8

    error = bench.error(choice("a"), choice("b"))

    assert [key for key, _ in bench.side.asked] == ["a"]
    skipped = error.fields["attempts"][1]
    assert (skipped["outcome"], skipped["why"]) == ("skipped", "0.20 s of 60 s are left")


def test_when_all_fail_the_error_is_of_the_first_and_has_all_attempts() -> None:
    bench = Bench(
        a=WorkerBusy("all 2 workers are busy", retry_after_s=3.0),
        b=ProviderError(faults.SERVER_ERROR, "the provider failed (status 500)"),
    )

    error = bench.error(choice("a"), choice("b", "openai"))

    assert isinstance(error, WorkerBusy) and error.retry_after_s == 3.0
    attempts = error.fields["attempts"]
    assert [(one["model"], one["outcome"], one["code"], one["reason"]) for one in attempts] == [
        ("a", "failed", "worker_busy", None),
        ("b", "failed", "provider_fault", "server_error"),
    ]


def test_when_none_could_be_asked_the_error_says_why_for_each() -> None:
    missing = ProviderError(faults.NO_SECRET, "secret X_API_KEY is not set")
    bench = Bench(a=missing)

    error = bench.error(choice("a", "openai"), choice("b", "catalogue"))

    assert isinstance(error, ProviderFault)
    assert "a: secret X_API_KEY is not set" in str(error)
    assert [one["outcome"] for one in error.fields["attempts"]] == ["skipped", "skipped"]


def test_without_any_time_no_model_is_asked() -> None:
    bench = Bench(a=Done())

    error = bench.error(choice("a"), deadline_s=-1.0)

    assert isinstance(error, WorkerTimeout) and bench.side.asked == []
    assert error.fields["attempts"][0]["why"] == "0.00 s of -1 s are left"


def test_an_empty_chain_is_an_error() -> None:
    assert "the chain is empty" in str(Bench().error())


def test_a_model_without_its_secret_is_passed_over_and_does_not_rest() -> None:
    bench = Bench(a=ProviderError(faults.NO_SECRET, "secret X_API_KEY is not set"), b=Done())

    answers = [bench.run(choice("a", "openai"), choice("b")) for _ in range(5)]

    assert answers[-1].attempts[0].outcome == "skipped"
    assert answers[-1].attempts[0].why == "secret X_API_KEY is not set"
    assert bench.cooldowns.unavailable(bench.clock.at) == {}


def test_after_three_failures_a_model_rests_and_is_not_asked() -> None:
    bench = Bench(a=AttestationFailed("differs"), b=Done())
    for _ in range(3):
        bench.run(choice("a"), choice("b"))
    bench.side.asked.clear()

    answer = bench.run(choice("a"), choice("b"))

    assert [key for key, _ in bench.side.asked] == ["b"]
    assert answer.fallback and answer.attempts[0].outcome == "skipped"
    assert answer.attempts[0].why.startswith("rests for 30.0 s more")


def test_a_resting_model_takes_no_share_of_the_time() -> None:
    bench = Bench(a=Done(), b=WorkerFault("odd"), c=Done())
    for _ in range(3):
        bench.run(choice("b"), choice("c"))
    bench.side.asked.clear()

    bench.run(choice("a"), choice("b"), deadline_s=60.0)

    assert bench.side.asked == [("a", 60.0)]


def test_where_every_model_rests_they_are_asked_all_the_same() -> None:
    bench = Bench(a=WorkerFault("odd"))
    for _ in range(3):
        bench.error(choice("a"))

    bench.side.results["a"] = Done()
    answer = bench.run(choice("a"))

    assert answer.text == "from a worker"
    assert bench.cooldowns.unavailable(bench.clock.at) == {}


def test_a_resting_model_is_asked_where_the_others_lack_their_keys() -> None:
    """The demo profile has our worker and a provider without a key. After three failures of the
    worker every request failed until its rest was over, though it was back at once."""
    missing = ProviderError(faults.NO_SECRET, "secret X_API_KEY is not set")
    bench = Bench(a=WorkerFault("odd"), b=missing)
    for _ in range(3):
        bench.error(choice("a"), choice("b"))

    bench.side.results["a"] = Done()
    answer = bench.run(choice("a"), choice("b"))

    assert answer.text == "from a worker"
    assert [one.outcome for one in answer.attempts] == ["skipped", "skipped", "answered"]


@pytest.mark.parametrize(
    "error",
    [
        WorkerBusy("busy"),
        TooLarge("5000 of 4096"),
        Invalid("top_p is 2"),
        ProviderError(faults.REJECTED, "refused the request (status 400)"),
    ],
)
def test_what_is_not_the_models_failure_does_not_make_it_rest(error: GatewayError) -> None:
    bench = Bench(a=error, b=Done())

    for _ in range(5):
        bench.run(choice("a"), choice("b"))

    assert bench.cooldowns.unavailable(bench.clock.at) == {}


def test_an_impatient_caller_does_not_make_models_rest() -> None:
    bench = Bench(a="hangs")

    for _ in range(5):
        bench.error(choice("a"), deadline_s=1.0)

    assert bench.cooldowns.unavailable(bench.clock.at) == {}


def test_a_fault_of_our_own_is_not_taken_for_a_models() -> None:
    bench = Bench(b=Done())

    with pytest.raises(KeyError):
        bench.run(choice("a"), choice("b"))


def test_names_with_a_trap_word_are_not_in_the_error() -> None:
    bench = Bench(**{"nano-inf": WorkerFault("odd")})

    error = bench.error(choice("nano-inf"))

    assert error.fields["attempts"][0]["model"] == "(name withheld)"


RESULTS: list[Callable[[], Any]] = [
    Done,
    lambda: "hangs",
    lambda: WorkerBusy("busy"),
    lambda: WorkerFault("odd"),
    lambda: ProviderError(faults.NO_SECRET, "secret X_API_KEY is not set"),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(RESULTS), max_size=6), st.floats(0, 90))
def test_any_chain_is_asked_in_order_once_and_within_the_deadline(
    made: list[Callable[[], Any]], deadline_s: float
) -> None:
    results = {f"m{number}": make() for number, make in enumerate(made)}
    bench = Bench(**results)
    choices = [choice(key) for key in results]

    try:
        attempts = [one.to_json() for one in bench.run(*choices, deadline_s=deadline_s).attempts]
        answered = True
    except GatewayError as exc:
        attempts, answered = exc.fields["attempts"], False

    assert [one["model"] for one in attempts] == list(results)[: len(attempts)]
    assert len(attempts) == len(choices) or answered
    assert [one["outcome"] == "answered" for one in attempts].count(True) == answered
    assert all(one["why"] for one in attempts if one["outcome"] != "answered")
    assert bench.clock.at <= 100.0 + deadline_s + 1e-6


def test_a_real_provider_that_hangs_is_followed_by_one_that_answers() -> None:
    with LyingProvider() as bad, LyingProvider() as good:
        bad.completes(lying.hangs)
        good.completes(lying.answers(lying.completion("a boat", model="good")))
        client = OpenAiClient(Exchange(private_allowed=True), lambda _: None)
        bench = Bench()
        runner = ModelRunner(bench.side, client, Cooldowns())

        answer = runner.run(
            [real("bad", bad.base_url), real("good", good.base_url)],
            MESSAGES,
            {},
            deadline_s=1.8,
            request_id="r-1",
            now=0.0,
        )

    assert (answer.text, answer.model_key, answer.fallback) == ("a boat", "good", True)
    assert answer.attempts[0].reason == faults.TIMEOUT
    assert 0 < answer.model_ms < 1000


def real(key: str, base_url: str) -> ModelChoice:
    return ModelChoice(
        model_key=key,
        provider=key,
        kind="openai",
        external_id=key,
        base_url=base_url,
        secret_ref=None,
        source="priority",
    )

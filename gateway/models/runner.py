"""Asks the models of a chain, in its order, until one answers; and says whom it asked and why not.

The chain is what resolution chose. Nothing outside it is ever asked. A failure is never hidden: the
answer lists every model that was asked or passed over, and is marked as a fallback unless the
chain's first model gave it.

Time: a model that has others behind it gets two thirds of what is left; the last gets all of it.
So a first model that hangs leaves a third of the deadline for the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.errors import GatewayError, ProviderFault, WorkerBusy, WorkerTimeout
from gateway.models import faults
from gateway.models.cooldown import Cooldowns
from gateway.models.faults import ProviderError, shown
from gateway.models.openai_client import ProviderAnswer
from gateway.values.assembly import Message, ModelChoice

SHARE = 2 / 3  # of the time left, for a model that has others behind it
SHORTEST_S = 0.5  # with less, a model is not asked
# A model that was given less than this and did not answer in it has not failed: the caller was in a
# hurry. Otherwise one impatient caller would make every model rest.
FAIR_S = 5.0

logger = logging.getLogger(__name__)


class Completion(Protocol):
    """What a worker answered (gateway/workers)."""

    @property
    def text(self) -> str: ...
    @property
    def receipt(self) -> Mapping[str, Any] | None: ...
    @property
    def attestation(self) -> Any: ...  # its own judgement of the receipt
    @property
    def attempts(self) -> Sequence[Any]: ...  # workers that it asked
    @property
    def worker_url(self) -> str: ...
    @property
    def worker_ms(self) -> float | None: ...
    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def flags(self) -> Sequence[str]: ...


class Workers(Protocol):
    def chat(
        self,
        route: str,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        deadline_s: float,
        request_id: str,
    ) -> Completion:
        """Raises GatewayError; AttestationFailed for a receipt that does not match."""


class Providers(Protocol):
    def complete(
        self,
        choice: ModelChoice,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        deadline_s: float,
        request_id: str,
    ) -> ProviderAnswer:
        """Raises ProviderError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One model of the chain, and what became of it."""

    model_key: str
    provider: str
    source: str
    outcome: str  # answered | failed | skipped
    why: str = ""
    code: str | None = None  # error_code of a failure
    reason: str | None = None  # of a provider's failure: gateway/models/faults.py
    workers: tuple[Mapping[str, Any], ...] = ()  # that failed, as the pool tells it
    ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As an answer or an error carries it. Names are as an error may show them."""
        return {
            "model": shown(self.model_key),
            "provider": shown(self.provider),
            "source": self.source,
            "outcome": self.outcome,
            "why": self.why,
            "code": self.code,
            "reason": self.reason,
            "workers": [dict(one) for one in self.workers],
            "ms": round(self.ms, 1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A text, who wrote it, and who did not."""

    text: str  # as it came, byte for byte
    model_key: str  # that answered
    source: str  # user | default | priority | last_resort
    provider: str
    served_model: str | None  # what the other side says that it ran
    receipt: Mapping[str, Any] | None  # a worker's; providers give none
    attestation: Any  # gateway/workers' judgement of it; None: no receipt is expected
    worker_attempts: tuple[Any, ...]  # workers that the pool asked for this answer
    worker_url: str | None
    worker_ms: float | None
    model_ms: float  # from the request of the one that answered to its last byte
    attempts: tuple[Attempt, ...]  # in order; the last one answered
    fallback: bool  # not the first of the chain
    unsupported: tuple[str, ...]  # parameters that did not take part
    flags: tuple[str, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None


class ModelRunner:
    """Runs chains. Changes nothing but the cooldowns, which lock themselves; any thread."""

    def __init__(
        self,
        workers: Workers,
        providers: Providers,
        cooldowns: Cooldowns,
        clock: Callable[[], float] = time.monotonic,
    ):
        """clock: monotonic seconds, for durations."""
        self._workers = workers
        self._providers = providers
        self._cooldowns = cooldowns
        self._clock = clock

    def run(
        self,
        choices: Sequence[ModelChoice],
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        deadline_s: float,
        request_id: str,
        now: float,
        route: str = "/chat",
    ) -> Answer:
        """The answer of the first model that gives one.

        now: monotonic seconds at the call, for cooldowns. route: of a worker: /chat, /enhance or
        /generate. When all fail, raises the error of the first that was asked, with `attempts` in
        its fields; WorkerTimeout or ProviderFault when none could be asked.
        """
        started = self._clock()
        attempts: list[Attempt] = []
        first_error: GatewayError | None = None
        too_late = False
        resting = self._cooldowns.unavailable(now)
        fresh = [choice for choice in choices if choice.model_key not in resting]
        rested = [choice for choice in choices if choice.model_key in resting]
        attempts += [_attempt(one, "skipped", resting[one.model_key]) for one in rested if fresh]
        for group in (fresh, rested):
            for index, choice in enumerate(group):
                asked_at = self._clock()
                left_s = deadline_s - (asked_at - started)
                if left_s < SHORTEST_S:
                    why = f"{max(0.0, left_s):.2f} s of {deadline_s:.3g} s are left"
                    attempts.append(_attempt(choice, "skipped", why))
                    too_late = True
                    continue
                budget_s = left_s * SHARE if index < len(group) - 1 else left_s
                try:
                    answer = self._ask(choice, messages, params, budget_s, request_id, route)
                except GatewayError as exc:
                    ended = self._clock()
                    attempts.append(_failure(choice, exc, (ended - asked_at) * 1000))
                    logger.warning("model %r failed: %s", choice.model_key, exc)
                    if _counts(exc, budget_s):
                        why = exc.reason if isinstance(exc, ProviderError) else exc.code
                        self._cooldowns.failed(choice.model_key, now + ended - started, why)
                    if first_error is None and not _is_skip(exc):
                        first_error = exc
                    continue
                self._cooldowns.succeeded(choice.model_key)
                ms = (self._clock() - asked_at) * 1000
                attempts.append(_attempt(choice, "answered", "", ms))
                return _answered(choice, answer, attempts, ms, choice is not choices[0])
            if first_error is not None or too_late:
                break
            # Nothing was sent to anybody: all that do not rest lack a key, or there are none. To
            # ask one that may work again is better than an error that is certain.
        raise _all_failed(first_error, attempts, too_late=too_late)

    def _ask(
        self,
        choice: ModelChoice,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        budget_s: float,
        request_id: str,
        route: str,
    ) -> Completion | ProviderAnswer:
        if choice.kind == "worker":
            named = {**params, "model": choice.external_id}
            return self._workers.chat(route, messages, named, budget_s, request_id)
        if choice.kind == "openai":
            return self._providers.complete(
                choice, messages, params, deadline_s=budget_s, request_id=request_id
            )
        raise ProviderError(
            faults.ADDRESS, f"provider {shown(choice.provider)} lists models and runs none"
        )


def _answered(
    choice: ModelChoice,
    answer: Completion | ProviderAnswer,
    attempts: Sequence[Attempt],
    ms: float,
    fallback: bool,
) -> Answer:
    if isinstance(answer, ProviderAnswer):
        served, unsupported = answer.served_model, answer.unsupported
        receipt, attestation, worker_url, worker_ms = None, None, None, None
        worker_attempts: tuple[Any, ...] = ()
    else:
        receipt, attestation = answer.receipt, answer.attestation
        worker_url, worker_ms = answer.worker_url, answer.worker_ms
        worker_attempts = tuple(answer.attempts)
        named = receipt.get("model") if receipt else None
        served = named if isinstance(named, str) else None
        ignored = receipt.get("ignored") if receipt else None
        listed = ignored if isinstance(ignored, list | tuple) else ()
        unsupported = tuple(name for name in listed if isinstance(name, str))
    return Answer(
        text=answer.text,
        model_key=choice.model_key,
        source=choice.source,
        provider=choice.provider,
        served_model=served,
        receipt=receipt,
        attestation=attestation,
        worker_attempts=worker_attempts,
        worker_url=worker_url,
        worker_ms=worker_ms,
        model_ms=ms,
        attempts=tuple(attempts),
        fallback=fallback,
        unsupported=unsupported,
        flags=tuple(answer.flags),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason,
    )


def _attempt(choice: ModelChoice, outcome: str, why: str, ms: float = 0.0) -> Attempt:
    return Attempt(
        model_key=choice.model_key,
        provider=choice.provider,
        source=choice.source,
        outcome=outcome,
        why=why,
        ms=ms,
    )


def _failure(choice: ModelChoice, error: GatewayError, ms: float) -> Attempt:
    return Attempt(
        model_key=choice.model_key,
        provider=choice.provider,
        source=choice.source,
        outcome="skipped" if _is_skip(error) else "failed",
        why=str(error),
        code=error.code,
        reason=error.reason if isinstance(error, ProviderError) else None,
        workers=tuple(error.fields.get("worker_attempts", ())),
        ms=ms,
    )


def _is_skip(error: GatewayError) -> bool:
    """Whether nothing was sent to the model at all."""
    return isinstance(error, ProviderError) and error.reason in (faults.NO_SECRET, faults.ADDRESS)


def _counts(error: GatewayError, budget_s: float) -> bool:
    """Whether it is a failure of the model rather than of the request or of its haste."""
    is_late = isinstance(error, WorkerTimeout) or (
        isinstance(error, ProviderError) and error.reason == faults.TIMEOUT
    )
    if is_late and budget_s < FAIR_S:
        return False
    if isinstance(error, ProviderError):
        return error.counts
    # A busy worker works; below 500 it is the request.
    return error.status >= 500 and not isinstance(error, WorkerBusy)


def _all_failed(
    first: GatewayError | None, attempts: Sequence[Attempt], *, too_late: bool
) -> GatewayError:
    listed = [attempt.to_json() for attempt in attempts]
    if first is not None:
        first.fields["attempts"] = listed
        return first
    if too_late:
        return WorkerTimeout("no time was left to ask a model", fields={"attempts": listed})
    said = "; ".join(f"{shown(one.model_key)}: {one.why}" for one in attempts)
    return ProviderFault(
        f"no model could be asked: {said or 'the chain is empty'}", fields={"attempts": listed}
    )

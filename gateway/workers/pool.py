"""Chat on whichever worker can: in order, within the caller's deadline, and attested.

A worker's answer is given out only if its receipt matches what was sent, or with a flag where the
settings say so. Nothing here ever gives back the prompt instead of an answer.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Literal, Protocol

from gateway.errors import Invalid, WorkerUnavailable
from gateway.values.assembly import Message
from gateway.workers import order
from gateway.workers.attest import MAX_TOKENS, Attestation, Sent
from gateway.workers.client import Answer, CallFailed, WorkerClient, clean_request_id
from gateway.workers.health import Health
from gateway.workers.order import Attempt
from gateway.workers.registry import CHAT, Worker

log = logging.getLogger(__name__)

# Where the text is, and the default of max_tokens (docs/http-api.md, Chat).
ROUTES = {
    "/chat": ("response", MAX_TOKENS),
    "/generate": ("response", MAX_TOKENS),
    "/enhance": ("enhanced_prompt", 200),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A worker's answer, and how it came about."""

    text: str  # byte for byte; may be empty
    receipt: Mapping[str, Any] | None
    attestation: Attestation
    worker_url: str
    worker_ms: float  # of the attempt that answered, from the call to the last byte
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    attempts: tuple[Attempt, ...]  # in order; the last one answered
    # "attestation:CODE" for each mismatch, "failover", "may_have_run_twice"
    flags: tuple[str, ...] = field(default=())


class Workers(Protocol):
    """gateway/workers/registry.py, for what is used here."""

    def workers(self, *worker_types: str) -> Sequence[Worker]: ...


class Monitor(Protocol):
    """gateway/workers/health.py, for what is used here."""

    def known(self) -> Mapping[str, Health]: ...

    def suspect(self, url: str) -> None: ...


class Attesting(Protocol):
    """gateway/workers/attester.py, for what is used here."""

    def check(
        self, sent: Sent, answer: Mapping[str, Any], worker_url: str, deadline: float
    ) -> Attestation: ...


class Failures:
    """When each worker failed last. Changed under its lock; any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._at: dict[str, float] = {}

    def known(self) -> Mapping[str, float]:
        with self._lock:
            return dict(self._at)

    def failed(self, url: str, now: float) -> None:
        with self._lock:
            self._at = {
                one: at for one, at in self._at.items() if now - at < order.FAILURE_COUNTS_S
            }
            self._at[url] = now

    def succeeded(self, url: str) -> None:
        with self._lock:
            self._at.pop(url, None)


class WorkerPool:
    """Runs chat requests. Keeps only `Failures`, which locks itself; any thread."""

    def __init__(
        self,
        registry: Workers,
        monitor: Monitor,
        client: WorkerClient,
        attester: Attesting,
        *,
        on_mismatch: Literal["refuse", "flag"] = "refuse",
        clock: Callable[[], float] = time.monotonic,
        nonce: Callable[[], str] = lambda: secrets.token_hex(4),
    ):
        """nonce: makes the id of each attempt its own, so that an old receipt does not fit."""
        self._registry = registry
        self._monitor = monitor
        self._client = client
        self._attester = attester
        self._on_mismatch = on_mismatch
        self._clock = clock
        self._nonce = nonce
        self._failures = Failures()

    def chat(
        self,
        route: str,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        deadline_s: float,
        request_id: str,
    ) -> Completion:
        """The first usable answer.

        route: /chat, /generate or /enhance. params: `model` and sampling, sent as they are; null is
        as absent. deadline_s: for everything, seconds from now.

        Raises WorkerBusy (with the smallest Retry-After), WorkerTimeout, WorkerUnavailable,
        WorkerFault, AttestationFailed; Invalid and TooLarge where a worker refuses what was sent,
        which no other one is asked for. All have `worker_attempts` in their fields.
        """
        if route not in ROUTES:
            raise Invalid(f"workers have no chat route of this name; known: {', '.join(ROUTES)}")
        kept = {name: value for name, value in params.items() if value is not None}
        if kept.get("stream") or "messages" in kept:
            raise Invalid("params may hold neither stream nor messages")
        deadline = self._clock() + deadline_s
        health = self._monitor.known()
        workers = order.in_order(
            self._registry.workers(CHAT), health, self._failures.known(), self._clock()
        )[: order.MAX_ATTEMPTS]
        if not workers:
            raise WorkerUnavailable(
                "no chat worker is known; name one in chat_workers, or let one register",
                fields={"worker_attempts": []},
            )
        attempts: list[Attempt] = []
        for index, worker in enumerate(workers):
            left_s = deadline - self._clock()
            if left_s <= 0:
                break
            waiting = sum(not order.is_ill(one, health) for one in workers[index + 1 :])
            ends = self._clock() + order.attempt_s(left_s, waiting)
            sent = Sent(
                request_id=clean_request_id(request_id, f".{self._nonce()}"),
                messages=tuple(messages),
                params=kept,
                max_tokens=ROUTES[route][1],
            )
            attempt, completion = self._attempt(worker, route, sent, ends)
            attempts.append(attempt)
            if completion is not None:
                self._failures.succeeded(worker.url)
                return _finished(completion, attempts)
            if attempt.outcome == order.REJECTED:
                break
            self._note(attempt)
        raise order.final_error(attempts, CHAT)

    def _attempt(
        self, worker: Worker, route: str, sent: Sent, ends: float
    ) -> tuple[Attempt, Completion | None]:
        listed = [{"role": one.role, "content": one.content} for one in sent.messages]
        try:
            answer = self._client.post(
                f"{worker.url}{route}",
                {**sent.params, "messages": listed},
                kind=CHAT,
                deadline=ends,
                request_id=sent.request_id,
            )
        except CallFailed as exc:
            return call_failed(worker.url, exc), None
        if not answer.is_success:
            return not_ok(worker.url, answer), None
        body = answer.object()
        text = body.get(ROUTES[route][0]) if body is not None else None
        if body is None or body.get("success") is not True or not isinstance(text, str):
            success = body is not None and body.get("success") is True
            code = "not_json" if body is None else "no_text" if success else "unsuccessful"
            return _attempt_of(worker, order.FAULT, answer, code, may_have_run=True), None
        attestation = self._attester.check(sent, body, worker.url, ends)
        if not attestation.ok and self._on_mismatch == "refuse":
            return _attempt_of(
                worker, order.MISMATCH, answer, "attestation_failed", may_have_run=True
            ), None
        receipt = body.get("receipt")
        attempt = _attempt_of(worker, order.OK, answer, None)
        return attempt, Completion(
            text=text,
            receipt=receipt if isinstance(receipt, dict) else None,
            attestation=attestation,
            worker_url=worker.url,
            worker_ms=answer.ms,
            prompt_tokens=_count(body.get("prompt_tokens")),
            completion_tokens=_count(body.get("tokens_generated")),
            finish_reason=_reason(body.get("finish_reason")),
            attempts=(attempt,),
            flags=tuple(f"attestation:{code}" for code in attestation.codes),
        )

    def _note(self, attempt: Attempt) -> None:
        self._failures.failed(attempt.worker_url, self._clock())
        if attempt.outcome != order.BUSY:
            self._monitor.suspect(attempt.worker_url)
        log.warning("worker failed: %s", attempt.to_json())


def call_failed(url: str, failure: CallFailed) -> Attempt:
    """The attempt that a failed call is."""
    outcome = {"timeout": order.TIMEOUT, "dropped": order.FAULT, "too_large": order.FAULT}
    return Attempt(
        worker_url=url,
        outcome=outcome.get(failure.outcome, order.UNAVAILABLE),
        ms=failure.ms,
        error_code=failure.outcome,
        may_have_run=failure.may_have_run,
    )


def not_ok(url: str, answer: Answer) -> Attempt:
    """The attempt that an answer other than 2xx is."""
    outcome = order.outcome_of(answer)
    return Attempt(
        worker_url=url,
        outcome=outcome,
        ms=answer.ms,
        status=answer.status,
        error_code=answer.error_code,
        retry_after_s=answer.retry_after_s,
        may_have_run=outcome in (order.FAULT, order.TIMEOUT),
    )


def _attempt_of(
    worker: Worker, outcome: str, answer: Answer, code: str | None, *, may_have_run: bool = False
) -> Attempt:
    return Attempt(
        worker_url=worker.url,
        outcome=outcome,
        ms=answer.ms,
        status=answer.status,
        error_code=code,
        may_have_run=may_have_run,
    )


def _finished(completion: Completion, attempts: Sequence[Attempt]) -> Completion:
    flags = list(completion.flags)
    if len(attempts) > 1:
        flags.append("failover")
    if any(one.may_have_run for one in attempts):
        flags.append("may_have_run_twice")
    return replace(completion, attempts=tuple(attempts), flags=tuple(flags))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _reason(value: object) -> str | None:
    return value if value in ("stop", "length") and isinstance(value, str) else None

"""Decisions about whom to ask: in which order, for how long, and what a failure means. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import (
    AttestationFailed,
    GatewayError,
    Invalid,
    TooLarge,
    WorkerBusy,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from gateway.workers.client import Answer
from gateway.workers.health import Health
from gateway.workers.registry import Worker

# A failure that is longer ago counts for nothing: the settings' order holds again.
FAILURE_COUNTS_S = 30.0
# Of the time that is left, what a worker gets while there is another one to ask after it. A worker
# says nothing before its answer is complete, so a slow one and a hanging one look alike.
SHARE = 0.6
MAX_ATTEMPTS = 4  # for one request

# Outcomes after which the next worker is asked. In all of them nothing that the caller could use
# came back; where a worker may have run the request, the attempt says so (`may_have_run`).
BUSY, UNAVAILABLE, REFUSED_KEY, LACKS_MODEL = "busy", "unavailable", "refused_key", "lacks_model"
TIMEOUT, FAULT, MISMATCH = "timeout", "fault", "mismatch"
# The outcome after which no other worker is asked: it would say the same.
REJECTED = "rejected"
OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One worker that was asked, and what became of it."""

    worker_url: str
    outcome: str  # ok | busy | unavailable | timeout | fault | mismatch | … (above)
    ms: float
    status: int | None = None  # of HTTP; None: no whole answer
    error_code: str | None = None  # the worker's, or ours: unreachable, dropped, not_json …
    retry_after_s: float | None = None
    may_have_run: bool = False  # without a usable answer: the worker may have done the work

    def to_json(self, *, with_url: bool = True) -> dict[str, Any]:
        """with_url: for logs; an error must not hold a URL, which can be any text."""
        told = {
            "outcome": self.outcome,
            "ms": round(self.ms, 1),
            "status": self.status,
            "error_code": self.error_code,
            "retry_after_s": self.retry_after_s,
            "may_have_run": self.may_have_run,
        }
        return {"worker_url": self.worker_url, **told} if with_url else told


def in_order(
    workers: Sequence[Worker],
    health: Mapping[str, Health],
    failed_at: Mapping[str, float],
    now: float,
) -> tuple[Worker, ...]:
    """Whom to ask first, second, …; nobody is left out, since a probe may be wrong or old.

    Healthy ones and those not looked at yet before unhealthy ones; among them those that did not
    fail lately, then those whose failure is longest ago; else as given. One URL comes once.
    """

    def rank(entry: tuple[int, Worker]) -> tuple[bool, float, int]:
        index, worker = entry
        failed = failed_at.get(worker.url)
        lately = failed is not None and now - failed < FAILURE_COUNTS_S
        return (
            is_ill(worker, health),
            failed if lately and failed is not None else float("-inf"),
            index,
        )

    unique = {worker.url: worker for worker in reversed(workers)}
    listed = [worker for worker in workers if unique.get(worker.url) is worker]
    return tuple(worker for _, worker in sorted(enumerate(listed), key=rank))


def is_ill(worker: Worker, health: Mapping[str, Health]) -> bool:
    """Not healthy, as far as is known; until it is probed here, as the table has it."""
    known = health.get(worker.url)
    return worker.was_healthy is False if known is None else not known.is_healthy


def attempt_s(left_s: float, waiting: int) -> float:
    """How long one worker may take. left_s: until the caller's deadline; waiting: how many that are
    not ill could still be asked after it. The last one of them gets all that is left."""
    return left_s * SHARE if waiting else left_s


def outcome_of(answer: Answer) -> str:
    """What a whole answer that is no success means."""
    status, code = answer.status, answer.error_code
    if status == 429 or (status == 503 and answer.retry_after_s is not None):
        return BUSY
    if status == 503:
        return UNAVAILABLE
    if status == 504:
        return TIMEOUT
    if status in (401, 403):
        return REFUSED_KEY
    if status == 404 or (status == 422 and code == "unsupported"):
        return LACKS_MODEL
    if 400 <= status < 500:
        return REJECTED
    return FAULT


def final_error(attempts: Sequence[Attempt], kind: str) -> GatewayError:
    """What the caller is told when nobody gave an answer. kind: chat | media.

    An answer that is not honest counts most, since somebody has to look; then what will pass
    (busy), then what may (timeout), then what is broken.
    """
    fields = {"worker_attempts": [one.to_json(with_url=False) for one in attempts]}
    if not attempts:
        return WorkerTimeout(f"no time was left to ask a {kind} worker", fields=fields)
    by_outcome = {one.outcome: one for one in attempts}
    asked = f"{len(attempts)} asked"
    if (one := by_outcome.get(REJECTED)) is not None:
        said = f"status {one.status}, {one.error_code or 'no code'}"
        if one.status == 413:
            return TooLarge(f"the worker takes no prompt of this size ({said})", fields=fields)
        if one.status == 422:
            return Invalid(f"the worker refuses a parameter ({said})", fields=fields)
        return WorkerFault(f"the worker does not take the request ({said})", fields=fields)
    if MISMATCH in by_outcome:
        return AttestationFailed(
            f"a worker's receipt does not match what was sent; {asked}, none honest; "
            "the log has the fields that differ",
            fields=fields,
        )
    if BUSY in by_outcome:
        waits = [one.retry_after_s for one in attempts if one.retry_after_s is not None]
        soonest_s = min(waits, default=1.0)
        return WorkerBusy(
            f"every {kind} worker is at its limit or loading; {asked}",
            retry_after_s=soonest_s,
            fields=fields,
        )
    if TIMEOUT in by_outcome:
        return WorkerTimeout(f"no {kind} worker answered in time; {asked}", fields=fields)
    if FAULT in by_outcome:
        return WorkerFault(f"no {kind} worker gave a usable answer; {asked}", fields=fields)
    if REFUSED_KEY in by_outcome:
        return WorkerFault(
            f"the {kind} worker refuses our key; set CHAT_WORKER_API_KEY or WAN_WORKER_API_KEY "
            "to one of its own",
            fields=fields,
        )
    if LACKS_MODEL in by_outcome:
        return WorkerFault(
            f"no {kind} worker serves this model or route; {asked}; look at its list of models",
            fields=fields,
        )
    return WorkerUnavailable(
        f"no {kind} worker answers; {asked}; look at health-check-workers",
        retry_after_s=5.0,
        fields=fields,
    )

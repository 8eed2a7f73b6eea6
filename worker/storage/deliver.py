"""One attempt to tell somebody about a job, and the decisions around it.

A callback goes to the service that the job's row belongs to, a webhook to an address that came
with the job. Both are signed over the very bytes that are sent: docs/http-api.md#webhooks.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from worker.errors import WorkerError
from worker.storage.pinned import Answer
from worker.storage.service import Service
from worker.storage.stores import retry_after_s

CALLBACK = "callback"
WEBHOOK = "webhook"
CALLBACK_PATH = "/functions/v1/job-callback"
CALLBACK_TIMEOUT_S = 30.0  # as the first clients had it
WEBHOOK_TIMEOUT_S = 15.0

MIN_WAIT_S = 1.0  # also for a receiver that says it can be asked again at once
MAX_BACKOFF_S = 300.0
LEAST_TRIES = 12  # half an hour of them, however old it is: the daemon may have been off for days
JITTER = 0.2  # of the wait, to both sides
# Somebody has to change a key, an address or a program before the next try can succeed.
ALARM_AFTER_S = 600.0

PROCESSING = "job.processing"
FINISHES = frozenset({"job.completed", "job.failed", "job.cancelled"})

# Of the answers from 400 to 499, those that pass by themselves: timeout, too early, too many.
_PASSING = frozenset({408, 425, 429})

Lane = tuple[str, str]  # job id and kind: what is told in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Something to tell, as it lies in the outbox."""

    id: int
    job_id: str
    sequence: int  # order within the job
    kind: str  # CALLBACK | WEBHOOK
    url: str  # of a webhook; a callback always goes to the service that is configured
    content: bytes = field(repr=False)  # the JSON that is signed and sent
    attempts: int = 0  # that have failed
    secret: str | None = field(default=None, repr=False)  # what a webhook is signed with
    created_at: float = 0.0  # wall clock, seconds
    next_at: float = 0.0  # not before; 0: at once
    dead: bool = False  # given up

    @property
    def lane(self) -> Lane:
        """A job's callback does not wait for its webhook, whose address is anybody's."""
        return self.job_id, self.kind

    @property
    def public_id(self) -> str:
        """The same at every try of this delivery, and of no other one: row ids of two workers
        would meet at the same receiver."""
        return f"{self.job_id}-{self.sequence}"


@dataclass(frozen=True, slots=True)
class Delivered:
    """It was taken."""

    status: int


@dataclass(frozen=True, slots=True)
class Again:
    """It was not taken now."""

    reason: str
    after_s: float | None = None  # as the receiver asked; None: `backoff_s` decides


@dataclass(frozen=True, slots=True)
class Alarm:
    """It will not be taken until a person has looked; it is kept, and tried slowly."""

    reason: str
    after_s: float = ALARM_AFTER_S


Outcome = Delivered | Again | Alarm


class Poster(Protocol):
    """Posts to addresses of strangers (worker/storage/pinned.py). Raises WorkerError."""

    def post(
        self, url: str, *, headers: Mapping[str, str], content: bytes, total_timeout_s: float
    ) -> Answer: ...


class Sender:
    """Sends deliveries. Nothing in it changes: any thread may call."""

    def __init__(self, service: Service | None, webhooks: Poster):
        """service: that jobs are called back to; None: there is none."""
        self._service = service
        self._webhooks = webhooks

    def send(self, delivery: Delivery, now: float) -> Outcome:
        """One attempt. now: wall clock, for a Retry-After that is a date."""
        try:
            if delivery.kind == WEBHOOK:
                answer = self._post(delivery)
            elif self._service is not None:
                answer = self._call_back(delivery, self._service)
            else:
                return Alarm("no service to call back to is configured")
        except WorkerError as exc:
            # Below 500 it is the address that is refused, and no other moment makes it better.
            return Alarm(f"not sent: {exc}") if exc.status < 500 else Again(f"not taken: {exc}")
        except httpx.HTTPError as exc:
            return Again(f"no answer ({type(exc).__name__})")
        return outcome(answer, now)

    def _call_back(self, delivery: Delivery, service: Service) -> Answer:
        headers = {"Content-Type": "application/json"}
        if service.callback_secret:
            headers["X-Callback-Signature"] = signature(service.callback_secret, delivery.content)
        return service.call(
            "POST",
            CALLBACK_PATH,
            headers=headers,
            content=delivery.content,
            timeout_s=CALLBACK_TIMEOUT_S,
        )

    def _post(self, delivery: Delivery) -> Answer:
        headers = {
            "Content-Type": "application/json",
            "X-Webhook-Id": delivery.public_id,
            "X-Webhook-Attempt": str(delivery.attempts + 1),
        }
        if delivery.secret:
            headers["X-Webhook-Signature"] = signature(delivery.secret, delivery.content)
        return self._webhooks.post(
            delivery.url,
            headers=headers,
            content=delivery.content,
            total_timeout_s=WEBHOOK_TIMEOUT_S,
        )


def signature(secret: str, content: bytes) -> str:
    """`sha256=` and the HMAC-SHA256 of `content` in lower-case hex."""
    return "sha256=" + hmac.new(secret.encode("utf-8"), content, hashlib.sha256).hexdigest()


def outcome(answer: Answer, now: float) -> Outcome:
    """What an answer means. Pure.

    Redirects are alarms: a signed body goes to the address that was given, or nowhere.
    """
    status = answer.status
    if 200 <= status < 300:
        return Delivered(status)
    if status in (429, 503):
        wait_s = retry_after_s(answer.headers.get("retry-after"), now)
        return Again(f"answered {status}", None if wait_s is None else max(MIN_WAIT_S, wait_s))
    if status >= 500 or status in _PASSING:
        return Again(f"answered {status}")
    return Alarm(f"answered {status}")


def backoff_s(attempts: int, random01: float) -> float:
    """Seconds to wait after failed attempt number `attempts`: 1, 2, 4 … MAX_BACKOFF_S, with
    JITTER to both sides, so that what failed together does not come back together.

    attempts: 1 or more. random01: 0 to 1.
    """
    wait_s = min(MAX_BACKOFF_S, 2.0 ** min(max(attempts, 1) - 1, 16))
    return wait_s * (1 - JITTER + 2 * JITTER * random01)


def is_dead(first_at: float, now: float, attempts: int, give_up_after_s: float) -> bool:
    """Whether a delivery is given up. One that was never tried is not, however old it is: the
    daemon may have been off. first_at, now: wall clock."""
    return attempts >= LEAST_TRIES and now - first_at >= give_up_after_s


def next_due(
    deliveries: Iterable[Delivery], now: float, busy: frozenset[Lane] = frozenset()
) -> Delivery | None:
    """What to send next, of all that is not delivered; None when nothing is due. Pure.

    Of one lane only the lowest sequence may go, unless it is dead. Between lanes the one that has
    been due for longest goes first, so that no receiver that fails holds up another.
    busy: lanes that something is under way for. now: wall clock.
    """
    firsts: dict[Lane, Delivery] = {}
    for one in deliveries:
        if one.dead or one.lane in busy:
            continue
        first = firsts.get(one.lane)
        if first is None or one.sequence < first.sequence:
            firsts[one.lane] = one
    due = (one for one in firsts.values() if one.next_at <= now)
    return min(due, key=lambda one: (one.next_at or one.created_at, one.id), default=None)


def supersedes(new_event: str, old_event: str) -> bool:
    """Whether an undelivered `old_event` of the same job and kind need not be told any more."""
    return old_event == PROCESSING and new_event in FINISHES

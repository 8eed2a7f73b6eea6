"""Jobs to the image and video worker over HTTP: POST /generate, answered with 202.

A job must not be made twice: another worker is asked only where the first one surely did not take
it. Where it may have, the same worker is asked again, and the job's id joins what it has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import Conflict, Invalid, WorkerUnavailable
from gateway.workers import order
from gateway.workers.client import CallFailed, WorkerClient, clean_request_id
from gateway.workers.order import Attempt
from gateway.workers.pool import Failures, Monitor, Workers, call_failed, not_ok
from gateway.workers.registry import MEDIA_TYPES, SDXL, WAN, Worker

log = logging.getLogger(__name__)

KIND = "media"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A job that a worker has on its disk."""

    job_id: str
    status: str
    status_url: str | None  # as the worker gave it: a path, or a whole URL
    worker_url: str
    body: Mapping[str, Any]  # the whole answer
    attempts: tuple[Attempt, ...]


class MediaWorkers:
    """Hands jobs to workers. Keeps only `Failures`, which locks itself; any thread."""

    def __init__(
        self,
        registry: Workers,
        monitor: Monitor,
        client: WorkerClient,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._registry = registry
        self._monitor = monitor
        self._client = client
        self._clock = clock
        self._failures = Failures()

    def post_generate(
        self, body: Mapping[str, Any], *, worker_type: str, deadline_s: float, request_id: str
    ) -> Accepted:
        """Give a job to the first worker that takes it.

        body: the worker's (docs/http-api.md, Jobs), with `id`: the same id and body joins the job.
        worker_type: sdxl | wan. Raises Conflict (the id is taken by another body), Invalid and
        TooLarge (the worker refuses the job), WorkerBusy, WorkerTimeout, WorkerFault,
        WorkerUnavailable; with `worker_attempts` in their fields.
        """
        if worker_type not in MEDIA_TYPES:
            raise Invalid(f"jobs go to workers of type {' or '.join(MEDIA_TYPES)}")
        if not isinstance(body.get("id"), str):
            raise Invalid("a job for a worker needs an id, or it could be made twice")
        deadline = self._clock() + deadline_s
        health = self._monitor.known()
        workers = order.in_order(
            media_workers(self._registry, worker_type),
            health,
            self._failures.known(),
            self._clock(),
        )[: order.MAX_ATTEMPTS]
        if not workers:
            raise WorkerUnavailable(
                f"no {worker_type} worker is known; name one in media_workers, or let one register",
                fields={"worker_attempts": []},
            )
        attempts: list[Attempt] = []
        for index, worker in enumerate(workers):
            left_s = deadline - self._clock()
            if left_s <= 0:
                break
            # Half of its time is for asking again.
            waiting = sum(not order.is_ill(one, health) for one in workers[index + 1 :])
            ends = self._clock() + order.attempt_s(left_s, waiting)
            for half in (self._clock() + (ends - self._clock()) / 2, ends):
                accepted = self._post(worker, body, half, request_id, attempts)
                if accepted is not None:
                    self._failures.succeeded(worker.url)
                    return accepted
                self._note(attempts[-1])
                if not attempts[-1].may_have_run:
                    break
            if attempts[-1].may_have_run or attempts[-1].outcome == order.REJECTED:
                break
        if attempts and attempts[-1].status == 409:
            raise Conflict("the worker has a job of this id with another body")
        raise order.final_error(attempts, KIND)

    def _post(
        self,
        worker: Worker,
        body: Mapping[str, Any],
        ends: float,
        request_id: str,
        attempts: list[Attempt],
    ) -> Accepted | None:
        try:
            answer = self._client.post(
                f"{worker.url}/generate",
                body,
                kind=KIND,
                deadline=ends,
                request_id=clean_request_id(request_id),
            )
        except CallFailed as exc:
            attempts.append(call_failed(worker.url, exc))
            return None
        if not answer.is_success:
            attempts.append(not_ok(worker.url, answer))
            return None
        taken = answer.object() or {}
        is_good = taken.get("job_id") == body["id"] and isinstance(taken.get("status"), str)
        attempts.append(
            Attempt(
                worker_url=worker.url,
                outcome=order.OK if is_good else order.FAULT,
                ms=answer.ms,
                status=answer.status,
                error_code=None if is_good else "no_job",
                may_have_run=not is_good,
            )
        )
        if not is_good:
            return None
        where = taken.get("status_url")
        return Accepted(
            job_id=body["id"],
            status=taken["status"],
            status_url=where if isinstance(where, str) else None,
            worker_url=worker.url,
            body=taken,
            attempts=tuple(attempts),
        )

    def _note(self, attempt: Attempt) -> None:
        if attempt.outcome == order.REJECTED:
            return
        self._failures.failed(attempt.worker_url, self._clock())
        self._monitor.suspect(attempt.worker_url)
        log.warning("worker took no job: %s", attempt.to_json())


def media_workers(registry: Workers, worker_type: str) -> tuple[Worker, ...]:
    """Workers for a type of job: sdxl's own, else wan's, which is the same port in practice."""
    found = tuple(registry.workers(worker_type))
    return found or (tuple(registry.workers(WAN)) if worker_type == SDXL else ())

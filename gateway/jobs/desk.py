"""Takes jobs in and takes callbacks: row, hand-over, end.

A job is accepted when a queue or a worker has it; before that its row says so, and nothing is told
to the client. What was accepted waits for its callback, however long that takes.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from gateway.access.caller import owner
from gateway.errors import GatewayError, Invalid, StoreUnavailable
from gateway.flows.call import Call, PromptSource
from gateway.flows.enhance import Enhanced, EnhanceInput, mode_of
from gateway.flows.refusing import refuse
from gateway.jobs.callback import change_for, read_callback
from gateway.jobs.queues import JobQueue
from gateway.jobs.references import Sign, prepare
from gateway.jobs.request import COPY, MODIFY, JobInput, JobPlan, element, plan_job
from gateway.jobs.signatures import Signatures
from gateway.prompts.negative import compose_negative, negative_rows
from gateway.store import jobs as rows
from gateway.store.database import Database
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import Snapshot

log = logging.getLogger(__name__)

CALLBACK_PATH = "/functions/v1/job-callback"
ORPHAN_S = 120.0  # after this long a row that was never handed over has lost its process
SWEEP_EVERY_S = 30.0


class Enhancing(Protocol):
    def enhance(self, asked: EnhanceInput, call: Call) -> Enhanced: ...


class Accepted(Protocol):
    @property
    def worker_url(self) -> str: ...


class MediaWorkers(Protocol):
    def post_generate(
        self, body: Mapping[str, Any], *, worker_type: str, deadline_s: float, request_id: str
    ) -> Accepted: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """The words a job goes with, and how they came about."""

    text: str
    template_name: str
    content_mode: str
    enhanced: Enhanced | None = None
    strategy: str | None = None


class JobDesk:
    """Holds the parts; any thread. The state of jobs is in the database, but for hand-overs that
    could not be written, under `_lock`."""

    def __init__(
        self,
        database: Database,
        prompts: PromptSource,
        enhancer: Enhancing,
        queue: JobQueue | None,
        media: MediaWorkers,
        signatures: Signatures,
        sign: Sign | None,
        public_url: str,
        *,
        sdxl_enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        """queue: None hands jobs over to workers by HTTP. public_url: where they call back."""
        self._database = database
        self._prompts = prompts
        self._enhancer = enhancer
        self._queue = queue
        self._media = media
        self._signatures = signatures
        self._sign = sign
        self._webhook_url = f"{public_url}{CALLBACK_PATH}"
        self._sdxl_enabled = sdxl_enabled
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._unwritten: dict[str, tuple[str, Mapping[str, Any]]] = {}

    # --- in ------------------------------------------------------------------------------------

    def queue_job(self, asked: JobInput, call: Call, *, over_http: bool = False) -> dict[str, Any]:
        """The answer's body once the job is handed over. over_http: to a worker although there is a
        queue."""
        user_id = owner(call.caller)
        job_id = str(uuid.uuid4())
        call = replace(call, job_id=job_id)
        plan = plan_job(asked, sdxl_enabled=self._sdxl_enabled)
        asked = prepare(asked, user_id, self._sign)
        plan = plan_job(asked, sdxl_enabled=self._sdxl_enabled)  # with its references as URLs
        self._check_words(asked, plan)
        held = self._prompts.held(call.min_revision)
        prompt = self._prompt(asked, plan, call, held.snapshot)
        negative = self._negative(asked, plan, prompt.content_mode, held.snapshot)
        secret = self._signatures.secret_of(job_id)
        payload = element(
            asked,
            plan,
            job_id=job_id,
            user_id=user_id,
            prompt=prompt.text,
            negative_prompt=negative,
            content_mode=prompt.content_mode,
            webhook=(self._webhook_url, secret),
        )
        self._insert(asked, plan, prompt, negative, payload, job_id, user_id, call)
        place = self._hand_over(job_id, plan, payload, call, over_http)
        answer: dict[str, Any] = {
            "success": True,
            "jobId": job_id,
            "status": "queued",
            "queueName": place,
            "message": f"The job is queued on {place}",
            "prompt": prompt.text,
            "negative_prompt": negative,
            "template_name": prompt.template_name,
            "content_mode": prompt.content_mode,
            "adjusted": dict(plan.adjusted),
        }
        if prompt.enhanced is not None:
            answer["enhancement_strategy"] = prompt.enhanced.strategy
            answer["enhancement_metadata"] = dict(prompt.enhanced.metadata)
            answer["trace"] = dict(prompt.enhanced.trace)
        return answer

    def _check_words(self, asked: JobInput, plan: JobPlan) -> None:
        has_words = asked.prompt.strip() or asked.enhanced_prompt is not None
        if not has_words and plan.generation_mode == "txt2img":
            raise Invalid("the prompt is empty, and the job has no picture to begin from")
        weights = asked.compel_weights
        terms = " ".join(map(str, weights)) if isinstance(weights, Mapping) else str(weights or "")
        original = asked.metadata.get("originalEnhancedPrompt")
        refuse(
            [
                asked.prompt,
                asked.original_prompt or "",
                asked.enhanced_prompt or "",
                original if isinstance(original, str) else "",
                terms,
                *asked.tags,
            ]
        )

    def _prompt(self, asked: JobInput, plan: JobPlan, call: Call, snapshot: Snapshot) -> _Prompt:
        if plan.wants_enhancement:
            return self._enhanced(asked, plan, call)
        mode = self._mode(asked, call, snapshot)
        if plan.branch == COPY:
            return _Prompt(text="", template_name="exact_copy_skip_enhance", content_mode=mode)
        if asked.enhanced_prompt is not None:
            name = "original_from_metadata"
            return _Prompt(text=asked.enhanced_prompt, template_name=name, content_mode=mode)
        return _Prompt(text=asked.prompt, template_name="original_prompt", content_mode=mode)

    def _enhanced(self, asked: JobInput, plan: JobPlan, call: Call) -> _Prompt:
        metadata = asked.metadata
        model = asked.enhancement_model or metadata.get("enhancement_model")
        done = self._enhancer.enhance(
            EnhanceInput(
                prompt=asked.prompt,
                target_model=plan.worker_kind,
                media=plan.format,
                job_type=asked.job_type,
                format=plan.format,
                quality=plan.quality,
                content_mode=asked.content_mode,
                character_id=asked.character_id,
                tags=asked.tags,
                model=model if isinstance(model, str) and model not in ("", "none") else None,
                is_modify=plan.branch == MODIFY,
                allow_original=asked.allow_original,
            ),
            call,
        )
        name = "enhancement_failed" if done.strategy == "original_fallback" else done.template_name
        return _Prompt(
            text=done.prompt,
            template_name=name,
            content_mode=done.content_mode,
            enhanced=done,
            strategy=done.strategy,
        )

    def _mode(self, asked: JobInput, call: Call, snapshot: Snapshot) -> str:
        request = AssembleRequest(
            prompt=asked.enhanced_prompt or asked.prompt,
            target_model="*",
            job_type="*",
            explicit_mode=asked.content_mode,
            user_mode=call.caller.content_mode,
            may_use_nsfw=call.caller.may_use_nsfw,
            character_id=asked.character_id,
            user_id=call.caller.user_id,
        )
        return mode_of(snapshot, request)

    def _negative(
        self, asked: JobInput, plan: JobPlan, mode: str, snapshot: Snapshot
    ) -> str | None:
        """Rows of the job's own model, then the user's text; none for an exact copy."""
        if plan.branch == COPY:
            return None
        found = negative_rows(snapshot, plan.worker_kind, mode, plan.generation_mode)
        return compose_negative(found, user_text=asked.negative_prompt)[0]

    def _insert(
        self,
        asked: JobInput,
        plan: JobPlan,
        prompt: _Prompt,
        negative: str | None,
        payload: Mapping[str, Any],
        job_id: str,
        user_id: str,
        call: Call,
    ) -> None:
        enhanced = prompt.enhanced
        # The secret can be derived again, and a row is shown to its user.
        kept = {name: value for name, value in payload.items() if name != "webhook_secret"}
        said = payload["metadata"]
        metadata = {name: value for name, value in said.items() if name != rows.WORKER_URL}
        with self._database.transaction() as connection:
            rows.insert_job(
                connection,
                {
                    "id": job_id,
                    "user_id": user_id,
                    "job_type": asked.job_type,
                    "metadata": metadata,
                    "format": plan.format,
                    "quality": plan.quality,
                    "model_type": asked.model_type or plan.worker_kind,
                    "original_prompt": asked.original_prompt or asked.prompt,
                    "enhanced_prompt": prompt.text if enhanced else asked.enhanced_prompt,
                    "negative_prompt": negative,
                    "template_name": prompt.template_name,
                    "enhancement_strategy": prompt.strategy,
                    "enhancement_time_ms": enhanced.execution_time_ms if enhanced else None,
                    "payload": kept,
                    "request_id": call.request_id,
                    "created_at": self._wall(),
                },
            )

    def _hand_over(
        self,
        job_id: str,
        plan: JobPlan,
        payload: Mapping[str, Any],
        call: Call,
        over_http: bool,
    ) -> str:
        """Where the job went. On an error its row is failed, and the error goes on."""
        more: dict[str, Any] = {}
        try:
            if self._queue is not None and not over_http:
                place = plan.list_name
                self._queue.push(place, payload)
            else:
                accepted = self._media.post_generate(
                    payload,
                    worker_type=plan.worker_kind,
                    deadline_s=call.began + call.deadline_s - self._clock(),
                    request_id=call.request_id,
                )
                place, more = "http", {rows.WORKER_URL: accepted.worker_url}
        except GatewayError as exc:
            exc.fields["jobId"] = job_id
            try:
                with self._database.transaction() as connection:
                    rows.fail_queued(connection, job_id, str(exc), self._wall())
            except StoreUnavailable as away:  # the sweep finds the row
                log.warning("job %s was not handed over, and its row waits: %s", job_id, away)
            raise
        try:
            with self._database.transaction() as connection:
                rows.handed_over(connection, job_id, place, more)
        except StoreUnavailable as exc:
            # It is handed over all the same: an error would have the client send it once more.
            log.warning("job %s is handed over; its row is written later: %s", job_id, exc)
            with self._lock:
                self._unwritten[job_id] = (place, more)
        return place

    # --- out -----------------------------------------------------------------------------------

    def callback(
        self, raw: bytes, body: Mapping[str, Any], signed: str | None, webhook: str | None
    ) -> dict[str, Any]:
        """Take what a worker calls back. signed, webhook: the two headers that carry signatures, of
        which one has to be right. Raises Unauthorized, InvalidRequest, ConfigError."""
        said = read_callback(body)
        if webhook is not None:
            self._signatures.check_webhook(said.job_id, raw, webhook)
        else:
            self._signatures.check_callback(raw, signed or "")
        with self._database.transaction() as connection:
            job = rows.find_job(connection, said.job_id, lock=self._database.is_postgres)
            if job is None:
                return _skipped(said.job_id, "there is no such job")
            worker = job["metadata"].get(rows.WORKER_URL)
            base = worker if isinstance(worker, str) else None
            change = change_for(job["status"], job["webhook_sequence"], said, base)
            if change.status is None:
                return _skipped(said.job_id, change.why_not)
            rows.apply_callback(connection, job, said, change, self._wall())
        log.info("job %s is %s, %d assets", said.job_id, change.status, len(change.assets))
        return {
            "success": True,
            "jobId": said.job_id,
            "status": change.status,
            "message": f"The job is {change.status}",
        }

    def cancel(self, job_id: str, call: Call) -> dict[str, Any]:
        """Cancel the caller's own job; a worker that has it finds the row or calls back in vain."""
        with self._database.transaction() as connection:
            rows.cancel_job(connection, job_id, owner(call.caller), self._wall())
        return {"success": True, "jobId": job_id, "status": "cancelled"}

    def sweep(self) -> None:
        """Fail what a process left behind that ended between a row and its hand-over."""
        with self._lock:
            unwritten = dict(self._unwritten)
        for job_id, (place, more) in unwritten.items():
            with self._database.transaction() as connection:
                rows.handed_over(connection, job_id, place, more)
            with self._lock:
                self._unwritten.pop(job_id, None)
        with self._database.transaction() as connection:
            lost = rows.fail_never_handed_over(connection, self._wall(), ORPHAN_S)
        if lost:
            log.warning("%d jobs were never handed over and are failed", lost)

    def run(self, stop: threading.Event) -> None:
        """The loop of a thread."""
        while not stop.is_set():
            try:
                self.sweep()
            except GatewayError as exc:
                log.warning("jobs were not looked through: %s", exc)
            except Exception:
                log.exception("looking through the jobs has a fault")
            stop.wait(SWEEP_EVERY_S)


def _skipped(job_id: str, why: str) -> dict[str, Any]:
    return {"success": True, "skipped": True, "jobId": job_id, "message": why}

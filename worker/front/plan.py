"""POST /plan: what a job or a chat request would take on the device, now. GET /explain: what a
request waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from flask import Blueprint, g, request
from flask.typing import ResponseReturnValue

from worker.catalog import Catalog
from worker.config import Limits
from worker.errors import Busy, EngineUnavailable, InvalidRequest, NotFound
from worker.front.admission import Admission
from worker.front.bodies import read_json
from worker.front.chat import DEFAULT_MAX_TOKENS, ChatParser, ChatRequest, ChatService
from worker.jobs.decode import decode_job
from worker.protocol.control import Query
from worker.protocol.messages import (
    ChatPlanned,
    ExplainQuery,
    Explanation,
    Message,
    PhasePlan,
    PhaseWays,
    Planned,
    PlanQuery,
    TenantSpec,
)
from worker.vram.jobplan import JobPlanner
from worker.vram.planner import Sizer, chat_phase
from worker.vram.ways import least_exact

# To the orchestrator; None when it does not answer.
Ask = Callable[[Query], Message | None]
# An unknown shape takes some 6 s for the libraries and up to 2 for each of its passes.
MEASURE_WAIT_S = 20.0
MAX_PLANNING = 3  # at a time; more are refused, so that they never take the threads of /health
ENCODE = "encode"  # the phase that a text which was read before does without


class PlanService:
    """Plans, for the HTTP threads. One is measured at a time."""

    def __init__(
        self,
        planner: JobPlanner,
        sizer: Sizer,
        catalog: Catalog,
        limits: Limits,
        exactness: str,
        parser: ChatParser,
        chat: ChatService,
        ask: Ask,
    ):
        """catalog: of image and video models. exactness: the least, of jobs that do not say."""
        self._planner = planner
        self._sizer = sizer
        self._catalog = catalog
        self._limits = limits
        self._exactness = exactness
        self._parser = parser
        self._chat = chat
        self._ask = ask
        self._measuring = threading.Lock()
        self._places = Admission(MAX_PLANNING)

    def plan(self, body: Any, request_id: str, jobs: int = 1) -> dict[str, Any]:
        """Of a chat body, or of a job's: of so many like it that share a batch.

        Raises what the request itself is refused with, Busy and EngineUnavailable.
        """
        with self._places.place():
            if isinstance(body, dict) and "inputs" in body:
                return self._of_chat(self._parser.parse_completion(body)[0], request_id)
            if isinstance(body, dict) and "messages" in body:
                parsed = self._parser.parse(body, max_tokens=DEFAULT_MAX_TOKENS)
                return self._of_chat(parsed, request_id)
            return self._of_job(body, request_id, jobs)

    def _of_job(self, body: Any, request_id: str, jobs: int) -> dict[str, Any]:
        job = decode_job(body, self._catalog, self._limits, self._exactness)
        spec = self._catalog.find(job.model)
        with self._measured():
            phases = self._planner.phases(spec, job.params, job.exactness, jobs)
            adapters = self._planner.adapters(spec, job.params)
            tenants = self._planner.tenants(spec)
        planned = self._played(request_id, "engine media", tenants, phases)
        return {
            "success": True,
            "model": job.model,
            "jobs": jobs,
            "adapters": {
                "denoiser_bytes": adapters.denoiser_bytes,
                "encoder_bytes": adapters.encoder_bytes,
            },
            **plan_body(planned),
        }

    def _of_chat(self, parsed: ChatRequest, request_id: str) -> dict[str, Any]:
        found = self._chat.plan(parsed, request_id)
        spec = parsed.model
        with self._measured():
            sizes = self._sizer.chat(spec)
        # For an engine that has not declared it, and so would read it from disk.
        tenants = sizes.tenants(spec, host_copy=False)
        phase = chat_phase(spec.id, found.kv_bytes + sizes.pass_peak)
        [planned] = self._played(request_id, "engine chat", tenants, [phase])
        return {
            "success": True,
            "model": spec.id,
            **chat_body(found, planned),
            "ignored": list(parsed.ignored),
        }

    @contextmanager
    def _measured(self) -> Iterator[None]:
        if not self._measuring.acquire(timeout=MEASURE_WAIT_S):
            raise Busy("another plan is being measured", retry_after_s=10)
        try:
            yield
        finally:
            self._measuring.release()

    def _played(
        self,
        request_id: str,
        holder: str,
        tenants: tuple[TenantSpec, ...],
        phases: Sequence[PhaseWays],
    ) -> tuple[PhasePlan, ...]:
        query = PlanQuery(
            request_id=request_id, holder=holder, tenants=tenants, phases=tuple(phases)
        )
        answer = self._ask(query)
        if not isinstance(answer, Planned):
            raise EngineUnavailable("the orchestrator does not answer", retry_after_s=2)
        return answer.phases

    def explain(self, about: str, request_id: str) -> dict[str, Any]:
        """Raises NotFound and EngineUnavailable."""
        answer = self._ask(ExplainQuery(request_id=request_id, about=about))
        if not isinstance(answer, Explanation):
            raise EngineUnavailable("the orchestrator does not answer", retry_after_s=2)
        if not answer.found:
            raise NotFound(
                "nothing is known of this request: what it needed was there already, or it "
                "was more than 1000 requests ago"
            )
        return {"request_id": about, "events": list(answer.events)}


def plan_body(phases: Sequence[PhasePlan]) -> dict[str, Any]:
    """As JSON: times in seconds, the job's own interval where every phase has one."""
    fits = all(phase.refused is None for phase in phases)
    extra_s = sum(phase.seconds for phase in phases)
    eta = None
    spans = [(one.name, one.seconds, one.work_s) for one in phases if one.work_s is not None]
    if fits and len(spans) == len(phases):
        # A text that was read before needs no encoder.
        low = sum(seconds + span[0] for name, seconds, span in spans if name != ENCODE)
        eta = [round(low, 3), round(extra_s + sum(span[1] for _, _, span in spans), 3)]
    return {
        "fits": fits,
        "exactness": least_exact(one.exactness for one in phases) if fits else None,
        "extra_seconds": round(extra_s, 3),
        "eta_seconds": eta,
        "phases": msgspec.to_builtins(phases),
    }


def chat_body(found: ChatPlanned, phase: PhasePlan) -> dict[str, Any]:
    """The same of a chat request: what of the pool it needs, and where its model is."""
    fits, eta = phase.refused is None, None
    if fits and found.seconds is not None:
        eta = [round(phase.seconds + one, 3) for one in found.seconds]
    return {
        "fits": fits,
        "prompt_tokens": found.prompt_tokens,
        "prompt_tokens_cached": found.cached_tokens,
        "max_tokens": found.max_tokens,
        "context_tokens": found.context_tokens,
        "kv_bytes": found.kv_bytes,
        "pool_bytes": found.pool_bytes,
        "whole_pool_bytes": found.whole_pool_bytes,
        "pool_holds_it": found.kv_bytes <= found.pool_bytes,
        "extra_seconds": round(phase.seconds, 3),
        "eta_seconds": eta,
        "phases": msgspec.to_builtins([phase]),
    }


def blueprint(service: PlanService) -> Blueprint:
    bp = Blueprint("plan", __name__)

    @bp.post("/plan")
    def plan_route() -> ResponseReturnValue:
        return service.plan(read_json(request), g.request_id, _jobs(request.args.get("jobs")))

    @bp.get("/explain/<about>")
    def explain_route(about: str) -> ResponseReturnValue:
        return service.explain(about, g.request_id)

    return bp


def _jobs(text: str | None) -> int:
    """Of the query: how many jobs like this one share a batch."""
    if text is None:
        return 1
    if not text.isdecimal():
        raise InvalidRequest("jobs must be a whole number")
    return int(text[:9])

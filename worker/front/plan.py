"""POST /plan: what a job would take on the device, now. GET /explain: what a request waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Blueprint, g, request
from flask.typing import ResponseReturnValue

from worker.catalog import Catalog
from worker.config import Limits
from worker.errors import Busy, EngineUnavailable, NotFound
from worker.front.admission import Admission
from worker.front.bodies import read_json
from worker.jobs.decode import JobRequest, decode_job
from worker.protocol.control import Query
from worker.protocol.messages import ExplainQuery, Explanation, Message, Planned, PlanQuery
from worker.vram.planner import Sizer, shape_of
from worker.vram.ways import EXACTNESS

# To the orchestrator; None when it does not answer.
Ask = Callable[[Query], Message | None]
# An unknown shape takes some 6 s for the libraries and up to 2 for each of its passes.
MEASURE_WAIT_S = 20.0
MAX_PLANNING = 3  # at a time; more are refused, so that they never take the threads of /health


class PlanService:
    """Plans of jobs, for the HTTP threads. One is measured at a time."""

    def __init__(self, sizer: Sizer, catalog: Catalog, limits: Limits, exactness: str, ask: Ask):
        """catalog: of image and video models. exactness: the least, of jobs that do not say."""
        self._sizer = sizer
        self._catalog = catalog
        self._limits = limits
        self._exactness = exactness
        self._ask = ask
        self._measuring = threading.Lock()
        self._places = Admission(MAX_PLANNING)

    def plan(self, body: Any, request_id: str) -> dict[str, Any]:
        """Raises what a job body is refused with, Busy and EngineUnavailable."""
        job = decode_job(body, self._catalog, self._limits, self._exactness)
        with self._places.place():
            return self._planned(job, request_id)

    def _planned(self, job: JobRequest, request_id: str) -> dict[str, Any]:
        spec, params = self._catalog.find(job.model), job.params
        if not self._measuring.acquire(timeout=MEASURE_WAIT_S):
            raise Busy("another plan is being measured", retry_after_s=10)
        try:
            phases = self._sizer.media_phases(
                spec,
                shape_of(params),
                steps=params.passes,
                images=params.num_images,
                exactness=job.exactness,
            )
            tenants = self._sizer.media_tenants(spec)
        finally:
            self._measuring.release()
        answer = self._ask(
            PlanQuery(request_id=request_id, holder="engine media", tenants=tenants, phases=phases)
        )
        if not isinstance(answer, Planned):
            raise EngineUnavailable("the orchestrator does not answer", retry_after_s=2)
        return plan_body(job.model, answer)

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


def plan_body(model: str, planned: Planned) -> dict[str, Any]:
    """As JSON: times in seconds, the job's own interval where every phase has one."""
    phases = planned.phases
    fits = all(phase.refused is None for phase in phases)
    extra_s = sum(phase.seconds for phase in phases)
    known = [phase.work_s for phase in phases if phase.work_s is not None]
    eta = None
    if fits and len(known) == len(phases):
        eta = [
            round(extra_s + sum(low for low, _ in known), 3),
            round(extra_s + sum(high for _, high in known), 3),
        ]
    return {
        "success": True,
        "model": model,
        "fits": fits,
        "exactness": max((one.exactness for one in phases), key=EXACTNESS.index) if fits else None,
        "extra_seconds": round(extra_s, 3),
        "eta_seconds": eta,
        "phases": msgspec.to_builtins(phases),
    }


def blueprint(service: PlanService) -> Blueprint:
    bp = Blueprint("plan", __name__)

    @bp.post("/plan")
    def plan_route() -> ResponseReturnValue:
        return service.plan(read_json(request), g.request_id)

    @bp.get("/explain/<about>")
    def explain_route(about: str) -> ResponseReturnValue:
        return service.explain(about, g.request_id)

    return bp

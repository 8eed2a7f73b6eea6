"""Device memory as operators see it, and loading and unloading by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Blueprint, g, request
from flask.typing import ResponseReturnValue

from worker.catalog import ModelSpec
from worker.errors import InvalidRequest
from worker.front.admission import MAX_ASKING, Admission
from worker.front.bodies import read_optional_json
from worker.front.chat import ask
from worker.front.health import GB, Reporter, chat_loaded
from worker.protocol.control import Query
from worker.protocol.messages import (
    LedgerQuery,
    LedgerReport,
    LoadModel,
    Message,
    ModelChanged,
    UnloadModel,
)

# A 7B model reads 15 GB; from a cold network volume that is a minute. Below the proxy's 100 s.
CHANGE_TIMEOUT_S = 85.0


def blueprint(
    reporter: Reporter, orchestrator: Callable[[Query], Message | None], default: str
) -> Blueprint:
    """GET /memory/status, POST /memory/load and /memory/unload.

    default: what `which` means for a load that does not say.
    """
    bp = Blueprint("memory", __name__)
    numbers = itertools.count(1)
    places = Admission(MAX_ASKING)

    @bp.get("/memory/status")
    def status_route() -> ResponseReturnValue:
        state = reporter.link.view.state
        total = state.device_total_bytes if state is not None else 0
        free = state.device_free_bytes if state is not None else 0
        models = reporter.models()
        return {
            "device": state.device if state is not None else None,
            "total_vram": round(total / GB, 3),
            "allocated_vram": round((total - free) / GB, 3),
            "available_vram": round(free / GB, 3),
            "process_rss": round(state.rss_bytes / GB, 3) if state is not None else 0.0,
            "model_loaded": any(model.status == "loaded" for model in models),
            **{
                key: value
                for key, value in chat_loaded(reporter).items()
                if key != "active_model_type" and default == "instruct"
            },
            "models": {
                model.id: {
                    "status": model.status,
                    "device": model.device,
                    "weight_bytes": model.weight_bytes,
                }
                for model in models
            },
            "ledger": ledger(),
        }

    def ledger() -> dict[str, Any] | None:
        """Who holds which bytes of the device; None while the orchestrator does not answer."""
        report = orchestrator(LedgerQuery(request_id=g.request_id))
        if not isinstance(report, LedgerReport):
            return None
        fields: dict[str, Any] = msgspec.to_builtins(report)
        return {key: value for key, value in fields.items() if key not in ("type", "request_id")}

    @bp.post("/memory/load")
    def load_route() -> ResponseReturnValue:
        return change(wanted(default), load=True)

    @bp.post("/memory/unload")
    def unload_route() -> ResponseReturnValue:
        return change(wanted("all"), load=False)

    def change(specs: tuple[ModelSpec, ...], *, load: bool) -> ResponseReturnValue:
        reporter.drainer.refuse_new_work()
        reporter.link.require_connected()
        said = []
        for spec in specs:
            ticket = f"{g.request_id}#m{next(numbers)}"
            kind = LoadModel if load else UnloadModel
            with places.place():
                reply = ask(reporter.link, kind(request_id=ticket, model=spec.id), CHANGE_TIMEOUT_S)
            assert isinstance(reply, ModelChanged)
            said.append(f"{spec.id} {_said(load, reply)}")
        return {"success": True, "message": "; ".join(said), "model_loaded": load}

    def wanted(when_absent: str) -> tuple[ModelSpec, ...]:
        which: Any = request.args.get("which")
        body = read_optional_json(request)
        if body is not None and not isinstance(body, dict):
            raise InvalidRequest('the body must be a JSON object such as {"which": "all"}')
        if which is None and body is not None:
            which = body.get("which")
        if which is None:
            which = when_absent
        if not isinstance(which, str):
            raise InvalidRequest("which must be a string: a model's id or alias, or all")
        if which == "all":
            return reporter.catalog.specs
        names = {"instruct": "qwen_instruct", "base": "qwen_base"}
        known = reporter.catalog.names()
        name = which if which in known else names.get(which, which)
        if name not in known and which == when_absent:
            return reporter.catalog.specs[:1]
        return (reporter.catalog.find(name),)

    return bp


def _said(load: bool, reply: ModelChanged) -> str:
    if not reply.changed:
        return "was loaded already" if load else "was not loaded"
    return f"{'loaded' if load else 'unloaded'} in {reply.seconds:.2f} s"

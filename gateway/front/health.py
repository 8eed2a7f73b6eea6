"""GET /health: the one route that is open to everybody."""

from __future__ import annotations

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from gateway.errors import GatewayError
from gateway.front.access import is_open
from gateway.front.services import Services


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("health", __name__, abp_tags=[Tag(name="operation")])

    @api.get("/health", summary="Whether prompts can be resolved, and from where")
    @is_open
    def health() -> ResponseReturnValue:
        """200 while prompts can be resolved, whatever level they come from; 503 otherwise. The
        workers are told and do not count: without them the gateway still has work to do."""
        try:
            held = services.prompts.held()
        except GatewayError as exc:
            return {"success": False, "status": "unavailable", "error_code": exc.code}, 503
        return {
            "success": True,
            "status": "healthy" if held.level == 0 else "degraded",
            "fallback_level": held.level,
            "revision": held.snapshot.revision,
            "snapshot_age_ms": None if held.age_ms is None else round(held.age_ms, 3),
            "flags": list(held.flags),
            "templates": sum(template.is_active for template in held.snapshot.templates),
            "workers": dict(services.workers_seen()),
        }

    return api

"""What the configuration's replicas serve, and a refresh that waits for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict

from gateway.access.caller import Scope
from gateway.cache.instances import REACHED, RefreshReport
from gateway.errors import RevisionNotReached
from gateway.front import revision
from gateway.front.access import needs
from gateway.front.services import Services
from gateway.values.rows import Snapshot

_TAG = Tag(name="cache")


class RefreshCache(BaseModel):
    """What clients of the original send; nothing depends on it."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{}]})

    force_refresh: bool | None = None


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("cache", __name__, abp_tags=[_TAG])

    @api.get("/api/cache/status", summary="What this process serves, and what the others do")
    @needs(Scope.VIEWER)
    def status() -> ResponseReturnValue:
        revision.held(services.prompts)
        return {"success": True, **services.prompts.status()}

    return api


def function_blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("refresh_cache", __name__, abp_tags=[_TAG])

    @api.post("/refresh-prompt-cache", summary="Raise the revision and wait until all have it")
    @needs(Scope.ADMIN, Scope.WORKER)
    def refresh(body: RefreshCache) -> ResponseReturnValue:
        report = services.prompts.refresh()
        if not report.reached:
            raise RevisionNotReached(
                f"revision {report.revision} is set, but not every process serves it yet; "
                "GET /api/cache/status shows when they do",
                retry_after_s=1.0,
                fields=_report(report),
            )
        held = services.prompts.held(report.revision)
        revision.used(held)
        return {
            "success": True,
            "message": f"All {reached(report)} live processes serve revision {report.revision}",
            "cache_stats": cache_stats(held.snapshot),
            "cached_data": cached_data(held.snapshot),
            **_report(report),
        }

    return api


def reached(report: RefreshReport) -> int:
    return sum(one.state == REACHED for one in report.instances)


def cache_stats(snapshot: Snapshot) -> dict[str, Any]:
    """Counts of what is switched on, under the keys of the original's cache document."""
    return {
        "templateCount": sum(one.is_active for one in snapshot.templates),
        "negativePromptCount": sum(one.is_active for one in snapshot.negatives),
        "ruleCount": sum(one.is_active for one in snapshot.rules),
        "integrityHash": snapshot.content_hash,
    }


def cached_data(snapshot: Snapshot) -> Mapping[str, list[str]]:
    """Its groups: in the original all that is not chat counts as enhancement."""
    active = [one for one in snapshot.templates if one.is_active]
    groups = {"chat" if one.job_type == "chat" else "enhancement" for one in active}
    return {
        "template_categories": sorted(groups),
        "model_types": sorted({one.target_model for one in active}),
        "negative_prompt_categories": sorted(
            {one.target_model for one in snapshot.negatives if one.is_active}
        ),
    }


def _report(report: RefreshReport) -> dict[str, Any]:
    return {
        "revision": report.revision,
        "instances": [asdict(one) for one in report.instances],
        "slowest": report.slowest,
        "slowest_ms": report.slowest_ms,
    }

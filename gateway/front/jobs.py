"""Jobs over HTTP: queue-job, process-job, job-callback, and a user's own jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from flask import request
from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from gateway.access.caller import Scope, owner
from gateway.errors import Invalid, TooLarge, Unauthorized
from gateway.front.access import caller, is_open, needs
from gateway.front.functions import MAX_TAGS, call_of, check_length, tags_of
from gateway.front.services import Services
from gateway.jobs.desk import JobDesk
from gateway.jobs.request import JobInput
from gateway.store.jobs import MOST, job_of, jobs_of
from gateway.values.rows import MODES

_TAG = Tag(name="jobs")
MAX_METADATA = 65_536  # characters as JSON; clients send some 2,000


class JobBody(BaseModel):
    """What clients of queue-job send; unknown keys are tolerated."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    prompt: str = ""
    original_prompt: str | None = None
    enhanced_prompt: str | None = None
    job_type: str = Field(max_length=60)
    quality: Literal["fast", "high"] | None = None
    format: str | None = Field(None, max_length=40)
    model_type: str | None = Field(None, max_length=60)
    reference_image_url: str | None = None
    reference_strength: float | None = Field(None, ge=0, le=1)
    denoise_strength: float | None = Field(None, ge=0, le=1)
    seed: int | bool | None = None
    num_images: int | None = Field(None, ge=1, le=6)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=30)
    resolution: str | None = Field(None, pattern=r"^[0-9]{2,5}[x*][0-9]{2,5}$")
    negative_prompt: str | None = None
    compel_enabled: bool = False
    compel_weights: str | dict[str, float] | None = None
    bypass_enhancement: bool = False
    hard_override: bool = False
    content_type: str | None = Field(
        None, validation_alias=AliasChoices("contentType", "content_type", "content_mode")
    )
    character_id: str | None = Field(None, max_length=36)
    tags: list[str] | None = Field(None, max_length=MAX_TAGS)
    enhance: bool | None = Field(None, description="Enhance the prompt first")
    enhancement_model: str | None = Field(None, max_length=200)
    allow_original: bool = False
    metadata: dict[str, Any] | None = None


class JobPath(BaseModel):
    job_id: str = Field(max_length=36, pattern=r"^[^\x00]*$")  # PostgreSQL takes no NUL


class JobQuery(BaseModel):
    limit: int = Field(50, ge=1, le=MOST)


def function_blueprint(services: Services, desk: JobDesk) -> APIBlueprint:
    """queue-job and job-callback."""
    api = APIBlueprint("jobs_in", __name__, abp_tags=[_TAG])

    @api.post("/queue-job", summary="Queue a job of images or a video")
    @needs(Scope.CALL)
    def queue_job(body: JobBody) -> ResponseReturnValue:
        return desk.queue_job(job_input(services, body), call_of(services, "queue-job"))

    @api.post("/job-callback", summary="What a worker says of a job; signed")
    @is_open  # the signature is what lets a caller in: desk.callback checks it before anything
    def job_callback() -> ResponseReturnValue:
        signed = request.headers.get("X-Callback-Signature")
        webhook = request.headers.get("X-Webhook-Signature")
        if not (signed or webhook):
            raise Unauthorized("a callback has to be signed: X-Callback-Signature: sha256=HEX")
        return desk.callback(request.get_data(cache=True), request.get_json(), signed, webhook)

    return api


def blueprint(services: Services, desk: JobDesk) -> APIBlueprint:
    """process-job, and the caller's own jobs."""
    api = APIBlueprint("jobs", __name__, abp_tags=[_TAG])

    @api.post("/process-job", summary="Enhance if asked, then hand the job to a worker by HTTP")
    @needs(Scope.CALL)
    def process_job(body: JobBody) -> ResponseReturnValue:
        call = call_of(services, "process-job")
        return desk.queue_job(job_input(services, body), call, over_http=True)

    @api.get("/jobs", summary="Your latest jobs")
    @needs(Scope.CALL)
    def jobs(query: JobQuery) -> ResponseReturnValue:
        with services.database.reading() as connection:
            found = jobs_of(connection, owner(caller()), query.limit)
        return {"success": True, "jobs": [shown(one) for one in found]}

    @api.get("/jobs/<job_id>", summary="One of your jobs, with its files")
    @needs(Scope.CALL)
    def job(path: JobPath) -> ResponseReturnValue:
        with services.database.reading() as connection:
            found = job_of(connection, path.job_id, owner(caller()))
        return {"success": True, "job": shown(found)}

    @api.delete("/jobs/<job_id>", summary="Cancel one of your jobs")
    @needs(Scope.CALL)
    def cancel(path: JobPath) -> ResponseReturnValue:
        return desk.cancel(path.job_id, call_of(services, "cancel-job"))

    return api


def job_input(services: Services, body: JobBody) -> JobInput:
    """Raises TooLarge, Invalid."""
    section = services.settings.section
    metadata = dict(body.metadata or {})
    size = len(json.dumps(metadata))
    if size > MAX_METADATA:
        raise TooLarge(f"metadata has {size} characters as JSON; {MAX_METADATA} are the most")
    weights = body.compel_weights
    texts = (
        body.prompt,
        body.original_prompt,
        body.enhanced_prompt,
        body.negative_prompt,
        weights if isinstance(weights, str) else " ".join(weights or ()),
        str(metadata.get("originalEnhancedPrompt") or ""),
    )
    for text in texts:
        check_length(text or "", section.prompt_chars)
    said = body.content_type or metadata.get("contentType")
    if said is not None and said not in MODES:
        raise Invalid("contentType is none of sfw, nsfw")
    if body.enhance is not None:
        metadata["user_requested_enhancement"] = body.enhance
    seed = None if isinstance(body.seed, bool) else body.seed
    return JobInput(
        job_type=body.job_type,
        prompt=body.prompt,
        original_prompt=body.original_prompt,
        # Empty, it is what clients send that have none.
        enhanced_prompt=body.enhanced_prompt if (body.enhanced_prompt or "").strip() else None,
        quality=body.quality,
        format=body.format,
        model_type=body.model_type,
        reference_image_url=body.reference_image_url,
        reference_strength=body.reference_strength,
        denoise_strength=body.denoise_strength,
        seed=seed,
        num_images=body.num_images,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        resolution=body.resolution.replace("*", "x") if body.resolution else None,
        negative_prompt=body.negative_prompt or "",
        compel_enabled=body.compel_enabled,
        compel_weights=body.compel_weights,
        skip_enhancement=body.bypass_enhancement or body.hard_override or body.enhance is False,
        content_mode=said,
        character_id=body.character_id,
        tags=tags_of(body.tags),
        enhancement_model=body.enhancement_model,
        allow_original=body.allow_original,
        metadata=metadata,
    )


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON: times as ISO texts."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return value

"""Which models there are, and which prompt a model and a type get."""

from __future__ import annotations

from typing import Any, Literal

from flask import jsonify, request
from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from gateway.access.caller import Scope
from gateway.front import revision
from gateway.front.access import needs
from gateway.front.admin_edit import actor
from gateway.front.services import Services
from gateway.models.catalogue import MATCHA, catalogue_body
from gateway.models.refresh import last_synced, refresh_body
from gateway.prompts.lookup import find_template
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import Template

# What a type is asked for where the caller does not say it.
_USE_CASES = {"chat": "chat"}


class ListQuery(BaseModel):
    modality: Literal["chat", "image", "video"] = "chat"
    task: str = Field("enhancement", max_length=40, description="Whose default is defaultModel")
    only_active: bool = False


class RefreshModels(BaseModel):
    model_config = ConfigDict(extra="ignore")

    provider: str = Field(MATCHA, max_length=60, description="A provider of the catalogue")
    confirm: bool = Field(False, description="Take a list that has less than half of the models")


class PromptPath(BaseModel):
    model: str = Field(max_length=200)
    type: str = Field(max_length=40)


class PromptQuery(BaseModel):
    use_case: str | None = Field(None, max_length=60)
    content_mode: Literal["sfw", "nsfw"] = "sfw"


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("catalogue", __name__, abp_tags=[Tag(name="catalogue")])

    @api.get("/api/llms", summary="The models, and the default of a task")
    @needs(Scope.CALL, Scope.VIEWER)
    def llms(query: ListQuery) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        # Without the database the models are still known; when they were synced is not.
        synced = None
        if held.verified:
            with services.database.reading() as connection:
                synced = last_synced(connection)
        return catalogue_body(
            held.snapshot,
            synced,
            modality=query.modality,
            task=query.task,
            only_active=query.only_active,
        )

    @api.post("/api/llms/refresh", summary="Take over a provider's list of models")
    @needs(Scope.WORKER, Scope.ADMIN)
    def refresh(body: RefreshModels) -> ResponseReturnValue:
        """Adds, updates, flags what is gone; never deletes and never takes a default away."""
        results = services.refresh_models(
            provider=body.provider, actor=actor(), confirmed=body.confirm
        )
        services.prompts.wake()
        held = revision.held(services.prompts)
        models = catalogue_body(held.snapshot, services.wall())["models"]
        return refresh_body(results, models, services.wall())

    @api.get(
        "/api/prompts/<path:model>/<type>",
        summary="The template of a model and a type",
    )
    @needs(Scope.VIEWER, Scope.WORKER)
    def prompt(path: PromptPath, query: PromptQuery) -> ResponseReturnValue:
        """The row of exactly this tuple, else the universal one; never one of the other mode."""
        held = revision.held(services.prompts)
        asked = AssembleRequest(
            prompt="",
            target_model=path.model,
            job_type=path.type,
            use_case=query.use_case or _USE_CASES.get(path.type, "enhancement"),
        )
        template, _ = find_template(held.snapshot, asked, query.content_mode)
        answer = jsonify({"success": True, "prompt": row(template)})
        # The hash is of the text alone; the id says which row it is of.
        answer.set_etag(f"{template.id}.{template.live.content_hash}")
        answer.headers["Cache-Control"] = "private, no-cache"
        return answer.make_conditional(request)

    return api


def row(template: Template) -> dict[str, Any]:
    """The columns of the view prompt_templates, and the parts that it joins into token_limit."""
    live = template.live
    return {
        "id": template.id,
        "template_name": template.template_name,
        "model_type": template.target_model,
        "target_model": template.target_model,
        "job_type": template.job_type,
        "use_case": template.use_case,
        "content_mode": template.content_mode,
        "description": template.description,
        "is_active": template.is_active,
        "version": live.version,
        "system_prompt": live.system_prompt,
        "user_template": live.user_template,
        "negative_prompt": live.negative_prompt,
        "variables": list(live.variables),
        "token_limit": live.target_token_limit or live.max_output_tokens,
        "max_output_tokens": live.max_output_tokens,
        "target_token_limit": live.target_token_limit,
        "hard_token_limit": live.hard_token_limit,
        "target_tokenizer": live.target_tokenizer,
        "params": dict(live.params),
        "content_hash": live.content_hash,
    }

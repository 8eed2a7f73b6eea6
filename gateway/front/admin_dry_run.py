"""What a request would become, with a draft in the place of a live version. Sends nothing."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any, Literal

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from gateway.access.caller import Scope
from gateway.errors import Invalid, NotFound
from gateway.front import revision
from gateway.front.access import needs
from gateway.front.admin_bodies import given
from gateway.front.admin_templates import VersionFields
from gateway.front.services import Services
from gateway.prompts.assemble import assemble
from gateway.store.canonical import VERSION_FIELDS, version_hash
from gateway.store.versions import stored_version
from gateway.values.assembly import Assembled, AssembleRequest, Message
from gateway.values.rows import Snapshot, Template, TemplateVersion

INT32 = 2**31 - 1
MAX_TURNS = 100


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str


class DryRequest(BaseModel):
    """A resolution's request; the tuple is the template's where it is left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str
    target_model: str | None = Field(None, max_length=120)
    job_type: str | None = Field(None, max_length=40)
    use_case: str | None = Field(None, max_length=60)
    explicit_mode: Literal["sfw", "nsfw"] | None = None
    user_mode: Literal["sfw", "nsfw"] | None = None
    may_use_nsfw: bool = True
    character_id: str | None = Field(None, max_length=36)
    quality: Literal["fast", "high"] = "fast"
    user_tier: str = Field("*", max_length=40)
    tags: list[str] = Field(default_factory=list, max_length=50)
    variables: dict[str, str] = Field(default_factory=dict)
    history: list[Turn] = Field(default_factory=list, max_length=MAX_TURNS)
    system_override: str | None = None
    generation_mode: Literal["txt2img", "i2i"] = "txt2img"
    user_negative: str = ""
    model: str | None = Field(None, max_length=200)
    modality: Literal["chat", "image", "video"] = "chat"
    task: str = Field("enhancement", max_length=40)
    params: dict[str, Any] = Field(default_factory=dict)


class DryRun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    request: DryRequest
    template_id: int | None = Field(None, ge=1, le=INT32, description="Whose draft is tried")
    version: int | None = Field(None, ge=1, le=INT32, description="A version; else the live one")
    draft: VersionFields | None = Field(  # type: ignore[valid-type]
        None, description="Changes on top of that version, as a new version would have them"
    )


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("admin_dry_run", __name__, abp_tags=[Tag(name="prompts")])
    limit = services.settings.section.prompt_chars

    @api.post("/api/dry-run", summary="Assemble a request, with a draft, and send nothing")
    @needs(Scope.EDITOR)
    def dry_run(body: DryRun) -> ResponseReturnValue:
        if len(body.request.prompt) > limit:
            raise Invalid(f"the prompt has {len(body.request.prompt)} characters; {limit} at most")
        held = revision.held(services.prompts)
        template = _tried(services, held.snapshot, body)
        snapshot = held.snapshot if template is None else with_template(held.snapshot, template)
        assembled = assemble(snapshot, _request(body.request, template), services.counters)
        return {
            "success": True,
            "revision": held.snapshot.revision,
            "used_draft": template is not None and assembled.template.id == template.id,
            **shown(assembled),
        }

    return api


def with_template(snapshot: Snapshot, template: Template) -> Snapshot:
    """The snapshot in which `template` serves its tuple, whatever served it before."""
    others = [
        replace(one, is_active=False) if one.tuple4 == template.tuple4 else one
        for one in snapshot.templates
        if one.id != template.id
    ]
    # By name, since a Snapshot's constructor has fields that it makes itself.
    kept = {one.name: getattr(snapshot, one.name) for one in fields(snapshot) if one.init}
    return Snapshot(**{**kept, "templates": (*others, template), "content_hash": ""})


def shown(assembled: Assembled) -> dict[str, Any]:
    """An assembly as JSON, without the names of secrets that its models need."""
    return {
        "messages": [asdict(one) for one in assembled.messages],
        "messages_sha256": assembled.messages_sha256,
        "negative": assembled.negative,
        "params": {name: asdict(one) for name, one in assembled.params.items()},
        "models": [
            {"model_key": one.model_key, "provider": one.provider, "source": one.source}
            for one in assembled.models
        ],
        "limits": asdict(assembled.limits),
        "content_mode": assembled.content_mode,
        "mode_source": assembled.mode_source,
        "template": {
            "id": assembled.template.id,
            "template_name": assembled.template.template_name,
            "version": assembled.template.live.version,
        },
        "rule_ids": list(assembled.rule_ids),
        "character_id": None if assembled.character is None else assembled.character.id,
        "prompt_tokens": assembled.prompt_tokens,
        "tokens_exact": assembled.tokens_exact,
        "protected": list(assembled.protected),
        "trace": [asdict(one) for one in assembled.trace],
    }


def _tried(services: Services, snapshot: Snapshot, body: DryRun) -> Template | None:
    """The template with the draft as its live version; None: the configuration as it is."""
    if body.template_id is None:
        if body.version is not None or body.draft is not None:
            raise Invalid("a version or draft needs template_id, to say whose it is")
        return None
    found = next((one for one in snapshot.templates if one.id == body.template_id), None)
    if found is None:
        raise NotFound(f"there is no template {body.template_id}")
    text = found.live
    if body.version is not None and body.version != text.version:
        with services.database.reading() as connection:
            text = stored_version(connection, body.template_id, body.version).text
    if body.draft is not None:
        text = _drafted(text, body.draft)
    return replace(found, live=text, is_active=True)


def _drafted(text: TemplateVersion, draft: Any) -> TemplateVersion:
    changes = {name: one for name, one in given(draft).items() if name in VERSION_FIELDS}
    missing = [
        name
        for name, one in changes.items()
        if one is None
        and name not in ("target_token_limit", "hard_token_limit", "target_tokenizer")
    ]
    if missing:
        raise Invalid("a version needs a value for " + ", ".join(sorted(missing)))
    drafted = replace(text, **changes)
    return replace(drafted, content_hash=version_hash(drafted))


def _request(asked: DryRequest, template: Template | None) -> AssembleRequest:
    values = {name: getattr(asked, name) for name in DryRequest.model_fields}
    for name in ("target_model", "job_type", "use_case"):
        if values[name] is None:
            if template is None:
                raise Invalid(f"{name} is missing; only a template_id could say it")
            values[name] = getattr(template, name)
    if asked.explicit_mode is None and asked.user_mode is None and template is not None:
        values["explicit_mode"] = template.content_mode
    values["tags"] = tuple(asked.tags)
    values["history"] = tuple(Message(one.role, one.content) for one in asked.history)
    return AssembleRequest(**values)

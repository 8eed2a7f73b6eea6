"""The function routes that make prompts and chat: bodies as the existing clients send them.

Unknown keys are tolerated: clients in the field send a dozen that nothing here uses.
"""

from __future__ import annotations

from typing import Any, Literal

from flask import g
from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from gateway.access.caller import Scope
from gateway.errors import Invalid, InvalidRequest, TooLarge
from gateway.flows.call import Call
from gateway.flows.chat import Chat, ChatInput
from gateway.flows.enhance import EnhanceInput, Enhancer, explicit_mode, target_of
from gateway.front import revision
from gateway.front.access import caller, needs
from gateway.front.services import Services
from gateway.prompts.negative import compose_negative, negative_rows
from gateway.values.rows import ANY, MODES, UNIVERSAL, Snapshot

_TAG = Tag(name="prompts")
MAX_TAGS = 32
MAX_PARTICIPANTS = 16
MIXED = ("scene_creation", "scene_starters")  # contentType of functions that are not served here


def _either(name: str, *others: str, default: Any = None, **more: Any) -> Any:
    """A field that clients name in one of several ways; the first that is there counts."""
    return Field(default, validation_alias=AliasChoices(name, *others), **more)


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class EnhanceMetadata(_Body):
    exact_copy_mode: bool | None = None
    originalEnhancedPrompt: str | None = None
    reference_mode: str | None = None


class EnhanceBody(_Body):
    prompt: str | None = _either("prompt", "original_prompt", description="The text to enhance")
    job_type: str | None = _either("job_type", "jobType", max_length=60)
    target_model: str | None = Field(None, max_length=120)
    format: str | None = Field(None, max_length=40)
    quality: Literal["fast", "high"] | None = None
    content_type: str | None = _either("contentType", "content_mode", max_length=40)
    nsfw_optimization: bool | None = None
    enhancement_model: str | None = _either(
        "enhancement_model", "selectedModel", max_length=200, description="Which model answers"
    )
    character_id: str | None = Field(None, max_length=36)
    tags: list[str] | None = Field(None, max_length=MAX_TAGS)
    metadata: EnhanceMetadata | None = None
    allow_original: bool = Field(
        False, description="Answer with the prompt itself, and say so, where no model answers"
    )


class Participant(_Body):
    name: str = Field(max_length=120)
    description: str = Field("", max_length=2000)


class RoleplaySettings(_Body):
    responseStyle: str | None = Field(None, max_length=40)
    responseLength: str | None = Field(None, max_length=40)
    enhancementModel: str | None = Field(None, max_length=200)


class ChatBody(_Body):
    conversation_id: str = Field(min_length=1, max_length=36)
    message: str = Field(min_length=1)
    character_id: str | None = Field(None, max_length=36)
    content_tier: Literal["sfw", "nsfw"] | None = None
    context_type: str | None = Field(None, max_length=60)
    use_case: str | None = Field(None, max_length=60)
    roleplay_settings: RoleplaySettings | None = None
    participants: list[Participant] | None = Field(None, max_length=MAX_PARTICIPANTS)
    long_response: bool = False
    model_provider: str | None = Field(None, max_length=200)
    model_variant: str | None = Field(None, max_length=200)
    system_prompt_override: str | None = None


class NegativeBody(_Body):
    target_model: str = _either("target_model", "model_type", default="sdxl", max_length=120)
    content_mode: Literal["sfw", "nsfw"] = _either("content_mode", "contentType", default="sfw")
    generation_mode: Literal["txt2img", "i2i"] = "txt2img"
    user_prompt: str = _either("user_negative_prompt", "negative_prompt", default="")


def call_of(services: Services, endpoint: str) -> Call:
    """What a flow is given with the present request."""
    return Call(
        caller=caller(),
        request_id=g.request_id,
        endpoint=endpoint,
        began=services.clock(),
        deadline_s=services.settings.section.deadline_s,
        min_revision=revision.minimum(),
    )


def enhance_input(services: Services, body: EnhanceBody, target: str | None = None) -> EnhanceInput:
    """Of a body; target: of the route, before the body's own. Raises InvalidRequest, Invalid,
    TooLarge."""
    section = services.settings.section
    metadata = body.metadata or EnhanceMetadata()
    if body.prompt is None:
        raise InvalidRequest("prompt is missing: the text to enhance")
    for text in (body.prompt, metadata.originalEnhancedPrompt or ""):
        check_length(text, section.prompt_chars)
    if body.content_type in MIXED:
        raise Invalid(f"contentType {body.content_type} is not served; there are sfw and nsfw")
    if body.content_type is not None and body.content_type not in MODES:
        raise Invalid("contentType is none of sfw, nsfw")
    named = None if body.target_model == UNIVERSAL else body.target_model
    found, media = target_of(body.job_type, target or named)
    if body.target_model == UNIVERSAL and target is None:
        found = UNIVERSAL
    return EnhanceInput(
        prompt=body.prompt,
        target_model=found,
        media=media,
        job_type=body.job_type or media,
        format=body.format or media,
        quality=body.quality or ("high" if "high" in (body.job_type or "") else "fast"),
        content_mode=explicit_mode(body.content_type, body.nsfw_optimization),
        character_id=body.character_id,
        tags=tags_of(body.tags),
        model=_chosen(body.enhancement_model),
        is_exact_copy=metadata.exact_copy_mode is True,
        exact_copy=metadata.originalEnhancedPrompt,
        is_modify=metadata.reference_mode == "modify",
        allow_original=body.allow_original,
    )


def blueprint(services: Services, enhancer: Enhancer, chat: Chat) -> APIBlueprint:
    """enhance-prompt, playground-chat and get-negative-prompt."""
    api = APIBlueprint("prompts", __name__, abp_tags=[_TAG])

    @api.post("/enhance-prompt", summary="The finished prompt of a short one")
    @needs(Scope.CALL)
    def enhance_prompt(body: EnhanceBody) -> ResponseReturnValue:
        return enhanced(services, enhancer, body, None, "enhance-prompt")

    @api.post("/playground-chat", summary="A turn of a conversation")
    @needs(Scope.CALL)
    def playground_chat(body: ChatBody) -> ResponseReturnValue:
        call = call_of(services, "playground-chat")
        return chat.say(chat_input(services, body), call)

    @api.post("/get-negative-prompt", summary="The negative prompt that a job would get")
    @needs(Scope.CALL, Scope.VIEWER)
    def negative_prompt(body: NegativeBody) -> ResponseReturnValue:
        check_length(body.user_prompt, services.settings.section.prompt_chars)
        held = revision.held(services.prompts)
        mode = body.content_mode if caller().may_use_nsfw else "sfw"
        rows = negative_rows(held.snapshot, body.target_model, mode, body.generation_mode)
        text, _ = compose_negative(rows, user_text=body.user_prompt)
        return {
            "success": True,
            "negative_prompt": text,
            "content_mode": mode,
            "negative_prompts": [row.negative_prompt for row in rows],
            "row_ids": [row.id for row in rows],
        }

    return api


def enhance_blueprint(services: Services, enhancer: Enhancer) -> APIBlueprint:
    """The enhancement service under its own names."""
    api = APIBlueprint("enhance", __name__, abp_tags=[_TAG])

    @api.post("/enhance/sdxl", summary="For SDXL")
    @needs(Scope.CALL)
    def sdxl(body: EnhanceBody) -> ResponseReturnValue:
        return enhanced(services, enhancer, body, "sdxl", "enhance/sdxl")

    @api.post("/enhance/wan", summary="For WAN")
    @needs(Scope.CALL)
    def wan(body: EnhanceBody) -> ResponseReturnValue:
        return enhanced(services, enhancer, body, "wan", "enhance/wan")

    @api.post("/enhance/universal", summary="For any model: the universal templates")
    @needs(Scope.CALL)
    def universal(body: EnhanceBody) -> ResponseReturnValue:
        return enhanced(services, enhancer, body, UNIVERSAL, "enhance/universal")

    @api.get("/enhancement/info", summary="What can be enhanced, for which models, by whom")
    @needs(Scope.CALL, Scope.VIEWER)
    def about() -> ResponseReturnValue:
        held = revision.held(services.prompts)
        return {"success": True, **enhancement_body(held.snapshot)}

    return api


def enhanced(
    services: Services, enhancer: Enhancer, body: EnhanceBody, target: str | None, endpoint: str
) -> dict[str, Any]:
    call = call_of(services, endpoint)
    done = enhancer.enhance(enhance_input(services, body, target), call)
    revision.used(done.held)
    return done.body()


def chat_input(services: Services, body: ChatBody) -> ChatInput:
    """Raises TooLarge."""
    for text in (body.message, body.system_prompt_override or ""):
        check_length(text, services.settings.section.prompt_chars)
    settings = body.roleplay_settings or RoleplaySettings()
    told = {"style": settings.responseStyle, "length": settings.responseLength}
    tags = [f"{name}:{value}" for name, value in told.items() if value]
    if body.long_response:
        tags.append("length:long")
    people = [f"{one.name}: {one.description}".rstrip(": ") for one in body.participants or ()]
    chosen = body.model_variant or body.model_provider
    return ChatInput(
        conversation_id=body.conversation_id,
        message=body.message,
        use_case=body.use_case or "playground",
        context_type=body.context_type
        or ("character_roleplay" if body.character_id else "general"),
        content_mode=body.content_tier,
        character_id=body.character_id,
        tags=tags_of(tags),
        variables={"participants": "\n".join(people)} if people else {},
        system_override=body.system_prompt_override,
        model=_chosen(chosen),
    )


def enhancement_body(snapshot: Snapshot) -> dict[str, Any]:
    """Templates of enhancement with their limits, and the models that may be asked."""
    active = [one for one in snapshot.templates if one.is_active and one.use_case == "enhancement"]
    assigned = [
        one
        for one in snapshot.assignments
        if one.is_active and one.modality == "chat" and one.task in ("enhancement", ANY)
    ]
    return {
        "routes": ["/enhance/sdxl", "/enhance/wan", "/enhance/universal"],
        "qualities": ["fast", "high"],
        "content_modes": list(MODES),
        "templates": [
            {
                "template_name": one.template_name,
                "target_model": one.target_model,
                "job_type": one.job_type,
                "content_mode": one.content_mode,
                "version": one.live.version,
                "max_output_tokens": one.live.max_output_tokens,
                "token_limit": one.live.target_token_limit,
                "tokenizer": one.live.target_tokenizer,
            }
            for one in active
        ],
        "models": [{"model_key": one.model_key, "is_default": one.is_default} for one in assigned],
        "config_revision": snapshot.revision,
    }


def tags_of(tags: list[str] | None) -> tuple[str, ...]:
    """Raises Invalid for one that is over 60 characters, the length of a rule's tag."""
    found = tuple(dict.fromkeys(tag for tag in tags or () if tag))
    for tag in found:
        if len(tag) > 60:
            raise Invalid(f"a tag has {len(tag)} characters; 60 are the most")
    return found


def check_length(text: str, most: int) -> None:
    """Raises TooLarge."""
    if len(text) > most:
        raise TooLarge(f"a text has {len(text)} characters; {most} are the most")


def _chosen(model: str | None) -> str | None:
    """A model's key as clients name it: some say "none" or where it runs, and mean the default."""
    return None if model in (None, "", "none", "auto", "default", "chat_worker") else model

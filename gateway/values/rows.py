"""Rows of the configuration as they are read: what a snapshot is made of.

Lookup keys use `'*'` for "any", never None: a NULL in a unique index is unlike every other NULL,
so two rows for the same case could be active.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ANY = "*"
SFW, NSFW = "sfw", "nsfw"
MODES = (SFW, NSFW)
UNIVERSAL = "universal"  # the target model that stands for all that have no row of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateVersion:
    """The text of a template. Never changes; an edit makes the next version."""

    id: int
    version: int  # from 1
    system_prompt: str
    user_template: str = "{{prompt}}"
    negative_prompt: str = ""
    variables: tuple[str, ...] = ()  # names it needs besides `prompt`
    max_output_tokens: int  # what the language model may write
    target_token_limit: int | None = None  # of the encoder that reads the result; None: no limit
    target_tokenizer: str | None = None  # name of a tokenizer in gateway/tokens: "clip", "umt5"
    hard_token_limit: int | None = None  # the encoder's own; None: target_token_limit is it
    params: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_p, …
    content_hash: str = ""  # SHA-256 (hex) of all above, by gateway/store


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A name and the tuple it serves; `live` is the version in use."""

    id: int
    template_name: str
    target_model: str  # sdxl | wan | qwen_instruct | universal | a provider model's key
    job_type: str  # image | video | chat | *
    use_case: str  # enhancement | generation | chat | playground | compression | …
    content_mode: str  # sfw | nsfw
    description: str = ""
    is_active: bool = True
    live: TemplateVersion

    @property
    def tuple4(self) -> tuple[str, str, str, str]:
        return (self.target_model, self.job_type, self.use_case, self.content_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A piece of text put before or after one slot of the messages."""

    id: int
    name: str
    rule_type: str  # prepend | append
    slot: str  # system | user | negative
    body: str
    # Keys target_model, job_type, use_case, content_mode, quality, character_id, user_tier: each a
    # value or a list of values, of which one has to be the request's. An absent key matches all.
    match: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()  # applied only where the request or character has one; none: always
    priority: int = 0  # lower first; then id
    exclusive_group: str | None = None  # only the first match of a group is applied
    max_tokens: int | None = None  # dropped where its rendered body is longer
    is_optional: bool = False  # may be dropped to make room, highest priority number first
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Who runs models. Never holds a secret, only the name of the variable that does."""

    id: int
    name: str  # unique: worker, openrouter, matcha
    kind: str  # worker | openai | catalogue
    base_url: str | None = None
    secret_ref: str | None = None  # environment variable; None: none is needed
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmModel:
    """A model that exists at a provider: the catalogue."""

    id: int
    provider_id: int
    external_id: str  # the provider's own id; of provider matcha the decimal matcha_llm_id
    model_name: str
    model_key: str  # unique; what callers choose
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    is_active: bool = True
    display_order: int = 0
    missing_since: str | None = None  # ISO time; not in the provider's last list


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A model that does a task (table api_models)."""

    id: int
    llm_model_id: int
    display_name: str
    model_key: str  # of its catalogue row
    modality: str  # chat | image | video
    task: str  # enhancement | chat | roleplay | …
    is_default: bool = False  # at most one of a (modality, task)
    is_active: bool = True
    priority: int = 0  # higher is tried first among those that are no default


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSet:
    """Parameters of a case; more specific rows win, value by value."""

    id: int
    model_key: str = ANY
    job_type: str = ANY
    profile: str = ANY  # fast | high | *
    user_tier: str = ANY
    character_id: str = ANY
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterLora:
    lora_ref: str  # id of an adapter in the worker's catalog
    weight: float  # -2 … 2
    target_model: str = ANY
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Character:
    id: str
    name: str
    owner_id: str | None = None  # None: everybody's
    persona: str = ""
    tags: tuple[str, ...] = ()
    system_prompt: str = ""
    voice_tone: str = ""
    mood: str = ""
    content_rating: str = SFW
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Further variables of templates by name: character_description, character_background, …
    card: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[CharacterLora, ...] = ()
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativePrompt:
    id: int
    target_model: str  # sdxl | wan | …
    content_mode: str
    generation_mode: str = "txt2img"  # txt2img | i2i
    negative_prompt: str = ""
    priority: int = 0  # higher first; then id
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole configuration at one revision. Immutable; read by any thread.

    Inactive rows are in it too, so that a refusal can say that one is switched off.
    """

    revision: int
    templates: tuple[Template, ...] = ()
    rules: tuple[Rule, ...] = ()  # by priority, then id
    providers: tuple[Provider, ...] = ()
    models: tuple[LlmModel, ...] = ()
    assignments: tuple[Assignment, ...] = ()
    parameters: tuple[ParameterSet, ...] = ()
    characters: tuple[Character, ...] = ()
    negatives: tuple[NegativePrompt, ...] = ()
    # All versions of all templates for replay are in the database, not here.
    content_hash: str = ""  # SHA-256 (hex) of everything but the revision, by gateway/store
    _by_tuple: dict[tuple[str, str, str, str], Template] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _characters: dict[str, Character] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._by_tuple.update(
            {template.tuple4: template for template in self.templates if template.is_active}
        )
        self._characters.update({character.id: character for character in self.characters})

    def template(
        self, target_model: str, job_type: str, use_case: str, content_mode: str
    ) -> Template | None:
        """The active template of exactly this tuple."""
        return self._by_tuple.get((target_model, job_type, use_case, content_mode))

    def character(self, character_id: str) -> Character | None:
        return self._characters.get(character_id)

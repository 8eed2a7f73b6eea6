"""What an empty database is filled with. Rows without ids; they refer to each other by name.

The same shapes carry an export: a document of one database is read by another, where the ids
differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.values.rows import ANY, SFW, CharacterLora


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedTemplate:
    """A template and its first version."""

    template_name: str
    target_model: str
    job_type: str
    use_case: str
    content_mode: str
    description: str = ""
    is_active: bool = True
    system_prompt: str
    user_template: str = "{{prompt}}"
    negative_prompt: str = ""
    variables: tuple[str, ...] = ()
    max_output_tokens: int
    target_token_limit: int | None = None
    target_tokenizer: str | None = None
    hard_token_limit: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRule:
    name: str
    rule_type: str  # prepend | append
    slot: str  # system | user | negative
    body: str
    match: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    priority: int = 0
    exclusive_group: str | None = None
    max_tokens: int | None = None
    is_optional: bool = False
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedParameters:
    model_key: str = ANY
    job_type: str = ANY
    profile: str = ANY  # fast | high | *
    user_tier: str = ANY
    character_id: str = ANY
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedCharacter:
    id: str  # 36 characters at most
    name: str
    persona: str = ""
    tags: tuple[str, ...] = ()
    system_prompt: str = ""
    voice_tone: str = ""
    mood: str = ""
    content_rating: str = SFW
    defaults: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[CharacterLora, ...] = ()
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedNegative:
    target_model: str
    content_mode: str
    generation_mode: str = "txt2img"  # txt2img | i2i
    negative_prompt: str
    priority: int = 0
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedProvider:
    name: str
    kind: str  # worker | openai | catalogue
    base_url: str | None = None
    secret_ref: str | None = None  # name of an environment variable
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedModel:
    provider: str  # SeedProvider.name
    external_id: str
    model_name: str
    model_key: str
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    is_active: bool = True
    display_order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedAssignment:
    model_key: str  # of a SeedModel
    display_name: str
    modality: str  # chat | image | video
    task: str
    is_default: bool = False
    is_active: bool = True
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """Everything. Of (modality, task) enhancement the seeding chooses the default itself: the
    profile's default model, unless `preferred` names a model whose provider has a key."""

    templates: tuple[SeedTemplate, ...] = ()
    rules: tuple[SeedRule, ...] = ()
    parameters: tuple[SeedParameters, ...] = ()
    characters: tuple[SeedCharacter, ...] = ()
    negatives: tuple[SeedNegative, ...] = ()
    providers: tuple[SeedProvider, ...] = ()
    models: tuple[SeedModel, ...] = ()
    assignments: tuple[SeedAssignment, ...] = ()
    # model_key that becomes the enhancement default where its provider's secret is configured.
    preferred: str | None = None

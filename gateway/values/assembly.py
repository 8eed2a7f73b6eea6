"""What the resolution takes and gives: a request in, messages with their reasons out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.values.rows import ANY, Character, Template


class Counter(Protocol):
    """One tokenizer. Safe for threads."""

    name: str  # clip | umt5 | qwen | estimate
    is_exact: bool  # False: an estimate, since the tokenizer's files are not there

    def count(self, text: str) -> int:
        """Tokens of the text without the begin and end tokens that an encoder adds."""

    def cut(self, text: str, limit: int) -> str:
        """The longest beginning of `text` that ends on a token boundary and has `limit` tokens at
        most; counted again, it is never over."""


class Counters(Protocol):
    def of(self, tokenizer: str | None) -> Counter:
        """The counter of that name; the estimate for None or one without files."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # system | user | assistant
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembleRequest:
    """Everything that resolution depends on besides the snapshot. Kept with a log row, it gives the
    same messages again (gateway/prompts/replay.py)."""

    prompt: str
    target_model: str
    job_type: str
    use_case: str = "enhancement"
    # What was said about the mode, strongest first; None: nothing was.
    explicit_mode: str | None = None
    user_mode: str | None = None  # the user's own setting
    may_use_nsfw: bool = True  # False: the user may not, whatever is asked; sfw wins
    character_id: str | None = None
    quality: str = "fast"  # fast | high: a parameter profile
    user_tier: str = ANY
    tags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Message, ...] = ()  # earlier turns, oldest first
    system_override: str | None = None  # replaces the template's system prompt, rules still apply
    generation_mode: str = "txt2img"  # txt2img | i2i, for the negative prompt
    user_negative: str = ""
    model: str | None = None  # the caller's choice; None: the default
    modality: str = "chat"
    task: str = "enhancement"
    params: Mapping[str, Any] = field(default_factory=dict)  # sampling that the caller gave
    user_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One decision of a resolution: what was decided, and why."""

    step: str  # mode, template, character, rule, render, count, parameters, model, negative, …
    outcome: str  # chosen, skipped, dropped, …
    why: str = ""  # a sentence without text of the prompt
    detail: Mapping[str, Any] = field(default_factory=dict)  # JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """One model of the chain, in the order they are to be asked."""

    model_key: str
    provider: str  # Provider.name
    kind: str  # Provider.kind
    external_id: str
    base_url: str | None
    secret_ref: str | None
    source: str  # user | default | priority | last_resort


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_output_tokens: int
    target_token_limit: int | None
    hard_token_limit: int | None
    target_tokenizer: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A parameter in effect and the row it came from."""

    value: Any
    origin: str  # "request", "template enhancement_sdxl_sfw v3", "parameters 12", "contract"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """What is to be sent, and why exactly this."""

    messages: tuple[Message, ...]
    messages_sha256: str  # canonical JSON, as a worker's receipt has it
    negative: str
    params: Mapping[str, Value]
    models: tuple[ModelChoice, ...]
    limits: Limits
    content_mode: str
    mode_source: str  # explicit | user_setting | character | detected
    template: Template
    system_override: bool
    rule_ids: tuple[int, ...]  # in the order they were applied
    character: Character | None
    prompt_tokens: int  # of all messages, counted
    tokens_exact: bool
    protected: tuple[str, ...]  # spans of the answer that compression may not touch
    trace: tuple[Step, ...]

    def effective(self) -> dict[str, Any]:
        """Parameters without their origins, as they are sent."""
        return {name: one.value for name, one in self.params.items()}

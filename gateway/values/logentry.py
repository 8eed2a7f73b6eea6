"""What is kept of one request: numbers always, texts where they are switched on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gateway.values.assembly import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigObject:
    """A row of the configuration as it was used. Rows with the same content have the same hash and
    are kept once."""

    content_hash: str  # SHA-256 (hex) of {"kind", "body"} as canonical JSON
    kind: str  # as gateway/prompts/replay.py names them: template, rule, character, …
    body: Mapping[str, Any]  # JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBody:
    """Texts of a request: enough to assemble its messages again."""

    request: Mapping[str, Any]  # the AssembleRequest as JSON
    messages: tuple[Message, ...]
    answer: str | None
    trace: Mapping[str, Any]  # as the caller got it
    objects: tuple[ConfigObject, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """A row of prompt_logs. None: it never came to that."""

    request_id: str
    created_at: datetime  # aware
    endpoint: str
    execution_time_ms: float
    status: int = 200
    error_code: str | None = None
    job_id: str | None = None
    user_id: str | None = None
    template_id: int | None = None
    template_name: str | None = None
    template_version: int | None = None
    rule_ids: tuple[int, ...] = ()
    character_id: str | None = None
    model_key: str | None = None
    model_source: str | None = None
    content_mode: str | None = None
    mode_source: str | None = None
    fallback_level: int = 0
    config_revision: int | None = None
    snapshot_age_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    target_tokens: int | None = None
    compressed: bool = False
    worker_ms: float | None = None
    cache_hit: bool | None = None
    flags: tuple[str, ...] = ()
    messages_sha256: str | None = None
    prompt_ids_sha256: str | None = None
    body: LogBody | None = None

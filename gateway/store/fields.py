"""What a column of the configuration may hold. One reading for rows that are loaded and for edits.

Plain SQL can put anything into an SQLite column, and JSON of the wrong shape into a jsonb one; so
the schema's own checks are not enough. Messages name the column and the range, never the value:
it may be a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Integer, String, Table

from gateway.store.canonical import canonical_json
from gateway.store.tables import UtcDateTime
from gateway.values.rows import MODES

INT32 = 2**31 - 1
TEXT_CHARS = 200_000
JSON_BYTES = 200_000
# A B-tree entry of PostgreSQL has 2704 bytes at most, and this text is in a unique index.
NEGATIVE_BYTES = 2000
MATCH_KEYS = frozenset(
    (
        "target_model",
        "job_type",
        "use_case",
        "content_mode",
        "quality",
        "character_id",
        "user_tier",
    )
)

CHOICES: Mapping[str, tuple[str, ...]] = {
    "templates.content_mode": MODES,
    "prompt_rules.rule_type": ("prepend", "append"),
    "prompt_rules.slot": ("system", "user", "negative"),
    "providers.kind": ("worker", "openai", "catalogue"),
    "api_models.modality": ("chat", "image", "video"),
    "model_parameters.profile": ("fast", "high", "*"),
    "characters.content_rating": MODES,
    "negative_prompts.content_mode": MODES,
    "negative_prompts.generation_mode": ("txt2img", "i2i"),
}
RANGES: Mapping[str, tuple[float, float]] = {
    "template_versions.version": (1, INT32),
    "template_versions.max_output_tokens": (1, 32768),
    "template_versions.target_token_limit": (1, INT32),
    "template_versions.hard_token_limit": (1, INT32),
    "prompt_rules.max_tokens": (1, INT32),
    "character_loras.weight": (-2, 2),
}
# An empty one would match nothing, or everything.
NOT_EMPTY = frozenset(
    (
        "templates.template_name",
        "templates.target_model",
        "templates.job_type",
        "templates.use_case",
        "template_labels.label",
        "prompt_rules.name",
        "prompt_rule_tags.tag",
        "providers.name",
        "llm_models.external_id",
        "llm_models.model_key",
        "api_models.task",
        "model_parameters.model_key",
        "model_parameters.job_type",
        "model_parameters.user_tier",
        "model_parameters.character_id",
        "characters.id",
        "characters.name",
        "character_loras.lora_ref",
        "negative_prompts.target_model",
    )
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,119}")


def decode(column: Column[Any], raw: Any) -> Any:
    """A value as it came from the driver, with JSON still as text, as Python has it, checked.

    Raises ValueError with the reason.
    """
    if isinstance(column.type, JSON) and raw is not None:
        if not isinstance(raw, str):
            raise ValueError(f"{column.name} is no JSON text")
        try:
            raw = json.loads(raw, parse_constant=_no_constant)
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"{column.name} is not valid JSON") from exc
    elif isinstance(column.type, Boolean) and raw in (0, 1) and not isinstance(raw, float):
        raw = bool(raw)
    elif isinstance(column.type, Float) and type(raw) is int:
        raw = float(raw)
    elif isinstance(column.type, UtcDateTime) and raw is not None:
        raw = _time(column, raw)
    return check(column, raw)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _time(column: Column[Any], raw: Any) -> datetime:
    if isinstance(raw, str):
        try:
            raw = datetime.fromisoformat(raw)
        except ValueError as exc:
            raise ValueError(f"{column.name} is no time") from exc
    if not isinstance(raw, datetime):
        raise ValueError(f"{column.name} is no time")
    return raw.replace(tzinfo=UTC) if raw.tzinfo is None else raw.astimezone(UTC)


def check(column: Column[Any], value: Any) -> Any:
    """The value, if the column may hold it. Raises ValueError with the reason."""
    name, full = column.name, f"{column.table.name}.{column.name}"
    if value is None:
        if column.nullable:
            return None
        raise ValueError(f"{name} is missing")
    kind = column.type
    if isinstance(kind, JSON):
        _check_json(column, value)
    elif isinstance(kind, Boolean):
        _must(type(value) is bool, f"{name} is true or false")
    elif isinstance(kind, UtcDateTime):
        _must(isinstance(value, datetime) and value.tzinfo is not None, f"{name} is a time")
    elif isinstance(kind, Float):
        _must(type(value) in (int, float) and abs(value) < 1e300, f"{name} is a number")
    elif isinstance(kind, Integer):
        most = 2**63 - 1 if isinstance(kind, BigInteger) else INT32
        _must(type(value) is int and -most - 1 <= value <= most, f"{name} is a whole number")
    else:
        _check_text(column, value)
    if full in CHOICES:
        _must(value in CHOICES[full], f"{name} is one of {', '.join(CHOICES[full])}")
    if full in RANGES:
        low, high = RANGES[full]
        _must(low <= value <= high, f"{name} is {low} to {high}")
    if full in NOT_EMPTY:
        _must(value.strip() == value != "", f"{name} is not empty and has no spaces around it")
    return value


def _check_text(column: Column[Any], value: Any) -> None:
    name = column.name
    if not isinstance(value, str):
        raise ValueError(f"{name} is text")
    kind = column.type
    most = (kind.length if isinstance(kind, String) else None) or TEXT_CHARS
    _must(len(value) <= most, f"{name} has {len(value)} characters, {most} at most")
    _must("\0" not in value, f"{name} has a zero character, which PostgreSQL cannot keep")
    try:
        encoded = value.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{name} has half a surrogate pair, which is no text") from exc
    if column.table.name == "negative_prompts" and name == "negative_prompt":
        _must(
            len(encoded) <= NEGATIVE_BYTES,
            f"{name} has {len(encoded)} bytes, {NEGATIVE_BYTES} at most",
        )


def _check_json(column: Column[Any], value: Any) -> None:
    name = column.name
    default = column.server_default
    if default is not None and str(getattr(default, "arg", "")) == "[]":
        _must(
            isinstance(value, list | tuple) and all(isinstance(one, str) for one in value),
            f"{name} is a list of strings",
        )
    else:
        _must(isinstance(value, Mapping), f"{name} is an object")
    try:
        spelled = canonical_json(value)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{name} has a value that JSON cannot hold") from exc
    _must(len(spelled) <= JSON_BYTES, f"{name} has {len(spelled)} bytes, {JSON_BYTES} at most")
    _must(b"\\u0000" not in spelled, f"{name} has a zero character, which PostgreSQL cannot keep")


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def check_row(table: Table, row: Mapping[str, Any]) -> None:
    """What columns of one row say about each other. Raises ValueError with the reason."""
    rule = _ROWS.get(table.name)
    if rule is not None:
        rule(row)


def _check_version(row: Mapping[str, Any]) -> None:
    target, hard = row.get("target_token_limit"), row.get("hard_token_limit")
    if target is not None and hard is not None:
        _must(target <= hard, f"target_token_limit {target} is above hard_token_limit {hard}")
    variables = row.get("variables") or ()
    _must(
        all(one.isidentifier() for one in variables) and len(set(variables)) == len(variables),
        "variables are names, each once",
    )


def _check_rule(row: Mapping[str, Any]) -> None:
    match = row.get("match") or {}
    unknown = sorted(set(match) - MATCH_KEYS)
    # A misspelled key would make the rule apply to everything.
    _must(not unknown, f"match has unknown keys: {', '.join(unknown)}")
    for key, value in match.items():
        _must(
            isinstance(value, str)
            or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)),
            f"match.{key} is a string or a list of strings",
        )


def _check_provider(row: Mapping[str, Any]) -> None:
    secret = row.get("secret_ref")
    # Somebody pastes the key itself sooner or later; it would be in every export.
    _must(
        secret is None or _VARIABLE.fullmatch(secret) is not None,
        "secret_ref is the name of an environment variable (A-Z, 0-9, _), not the secret",
    )
    url = row.get("base_url")
    if url is not None:
        try:
            parts = urlsplit(url)
        except ValueError as exc:
            raise ValueError("base_url is no URL") from exc
        _must(
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc,
            "base_url is http:// or https:// with a host and without a user or password",
        )


def _check_assignment(row: Mapping[str, Any]) -> None:
    _must(
        bool(row.get("is_active", True)) or not row.get("is_default", False),
        "a default is active",
    )


_ROWS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "template_versions": _check_version,
    "prompt_rules": _check_rule,
    "providers": _check_provider,
    "api_models": _check_assignment,
}

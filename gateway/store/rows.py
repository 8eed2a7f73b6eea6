"""Rows to values and back. A row here is a mapping of checked values (gateway/store/fields.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from gateway.store.canonical import VERSION_FIELDS, version_hash
from gateway.values.rows import (
    Assignment,
    Character,
    CharacterLora,
    LlmModel,
    NegativePrompt,
    ParameterSet,
    Provider,
    Rule,
    Template,
    TemplateVersion,
)

Row = Mapping[str, Any]

# What SQL stores instead of a hash it cannot compute; filled in by the next edit through us.
PENDING = "pending:"


def version_value(row: Row) -> TemplateVersion:
    """Its hash is computed, never taken from the row."""
    text = {name: row[name] for name in VERSION_FIELDS}
    text["variables"] = tuple(text["variables"])
    bare = TemplateVersion(id=row["id"], version=row["version"], **text)
    return TemplateVersion(
        id=row["id"], version=row["version"], **text, content_hash=version_hash(bare)
    )


def template_value(row: Row, live: TemplateVersion) -> Template:
    return Template(live=live, **_take(Template, row, without=("live",)))


def rule_value(row: Row, tags: Iterable[str]) -> Rule:
    return Rule(tags=tuple(sorted(tags)), **_take(Rule, row, without=("tags",)))


def provider_value(row: Row) -> Provider:
    return Provider(**_take(Provider, row))


def model_value(row: Row) -> LlmModel:
    missing: datetime | None = row["missing_since"]
    return LlmModel(
        missing_since=None if missing is None else missing.isoformat(),
        **_take(LlmModel, row, without=("missing_since",)),
    )


def assignment_value(row: Row) -> Assignment:
    return Assignment(**_take(Assignment, row))


def parameters_value(row: Row) -> ParameterSet:
    return ParameterSet(**_take(ParameterSet, row))


def lora_value(row: Row) -> CharacterLora:
    return CharacterLora(
        trigger_words=tuple(row["trigger_words"]),
        **_take(CharacterLora, row, without=("trigger_words",)),
    )


def character_value(row: Row, loras: Iterable[CharacterLora]) -> Character:
    return Character(
        tags=tuple(row["tags"]),
        loras=tuple(loras),
        **_take(Character, row, without=("tags", "loras")),
    )


def negative_value(row: Row) -> NegativePrompt:
    return NegativePrompt(**_take(NegativePrompt, row))


def row_of(value: Any, *without: str) -> dict[str, Any]:
    """The columns of a value of gateway/values, with lists for tuples."""
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is no value of a row")
    found = {}
    for field in fields(value):
        if field.name not in without and not field.name.startswith("_"):
            one = getattr(value, field.name)
            found[field.name] = list(one) if isinstance(one, tuple) else one
    return found


def _take(kind: type, row: Row, without: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        name: row[name]
        for name in kind.__dataclass_fields__  # type: ignore[attr-defined]
        if name not in without
    }

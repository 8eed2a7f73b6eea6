"""Bodies of edits, made from the values that they become: one list of fields, in gateway/values.

Ranges are the store's business (gateway/store/fields.py): it checks them for every way in.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from gateway.values.rows import CharacterLora

MAX_LIMIT = 200  # rows of a page


class EditBody(BaseModel):
    """What every edit may say beside its row."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    expected_revision: int | None = Field(
        None, ge=0, description="The revision that was read; If-Match says the same"
    )


class LoraBody(BaseModel):
    """An adapter of a character."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    lora_ref: str
    weight: float
    target_model: str = "*"
    trigger_words: list[str] = Field(default_factory=list)

    def value(self) -> CharacterLora:
        return CharacterLora(
            lora_ref=self.lora_ref,
            weight=self.weight,
            target_model=self.target_model,
            trigger_words=tuple(self.trigger_words),
        )


class PageQuery(BaseModel):
    """A page of a list."""

    limit: int = Field(50, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, max_length=200, description="`next` of the page before")
    is_active: bool | None = Field(None, description="Only rows that are switched on, or off")


def create_body(name: str, value: type, **changed: tuple[Any, Any]) -> type[EditBody]:
    """The body that makes a row: the fields of a dataclass with its defaults. changed: fields of
    another type, each with its default (pydantic's create_model)."""
    hints = get_type_hints(value)
    found: dict[str, Any] = {}
    for one in fields(value):
        default: Any = ...
        if one.default is not MISSING:
            default = one.default
        elif one.default_factory is not MISSING:
            default = Field(default_factory=one.default_factory)
        found[one.name] = (hints[one.name], default)
    return create_model(name, __base__=EditBody, **{**found, **changed})


def patch_body(name: str, created: type[EditBody], without: tuple[str, ...] = ()) -> type[EditBody]:
    """The body that changes a row: every field may be left out, and then stays."""
    found: dict[str, Any] = {}
    for field, told in created.model_fields.items():
        if field not in without and field not in EditBody.model_fields:
            found[field] = (Annotated[told.annotation, "optional"] | None, None)
    return create_model(name, __base__=EditBody, **found)


def given(body: EditBody) -> dict[str, Any]:
    """The columns that a body names, without those that say something about the edit."""
    return {
        name: getattr(body, name)
        for name in body.model_fields_set
        if name not in EditBody.model_fields
    }


def whole(body: EditBody, value: type) -> Any:
    """The value that a create body describes."""
    return value(**{one.name: getattr(body, one.name) for one in fields(value)})

"""Edits of providers, the catalogue and who does what.

That a task never loses its active default is checked once, at the end of each edit
(gateway/store/editing.py): switching off the default's model or its provider loses it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select

from gateway.errors import Conflict, Invalid, NotFound
from gateway.store.editing import Editor
from gateway.store.rows import row_of
from gateway.store.tables import api_models, llm_models, providers
from gateway.values.seeds import SeedAssignment, SeedModel, SeedProvider


def create_provider(editor: Editor, provider: SeedProvider) -> int:
    provider_id: int = editor.create(providers, row_of(provider))
    return provider_id


def change_provider(editor: Editor, provider_id: int, values: Mapping[str, Any]) -> bool:
    return editor.change(providers, provider_id, values)


def remove_provider(editor: Editor, provider_id: int) -> None:
    editor.remove(providers, provider_id)


def create_model(editor: Editor, model: SeedModel, *, missing_since: datetime | None = None) -> int:
    """A model of the catalogue. Raises NotFound where there is no such provider."""
    provider_id = editor.connection.execute(
        select(providers.c.id).where(providers.c.name == model.provider)
    ).scalar_one_or_none()
    if provider_id is None:
        raise NotFound(f"no provider is called {model.provider!r}")
    row = row_of(model, "provider")
    model_id: int = editor.create(
        llm_models, {**row, "provider_id": provider_id, "missing_since": missing_since}
    )
    return model_id


def change_model(editor: Editor, model_id: int, values: Mapping[str, Any]) -> bool:
    """Change columns; the key stays, since callers and assignments name it."""
    if (
        "model_key" in values
        and values["model_key"] != editor.find(llm_models, model_id)["model_key"]
    ):
        raise Invalid("model_key of a model stays: make another model")
    return editor.change(llm_models, model_id, values)


def remove_model(editor: Editor, model_id: int) -> None:
    editor.remove(llm_models, model_id)


def create_assignment(editor: Editor, assignment: SeedAssignment) -> int:
    """An assignment; as a default it takes the place of the one before. Raises NotFound."""
    model_id = editor.connection.execute(
        select(llm_models.c.id).where(llm_models.c.model_key == assignment.model_key)
    ).scalar_one_or_none()
    if model_id is None:
        raise NotFound(f"no model has the key {assignment.model_key!r}")
    row = {**row_of(assignment), "llm_model_id": model_id}
    if assignment.is_default:
        _clear_default(editor, assignment.modality, assignment.task)
    assignment_id: int = editor.create(api_models, row)
    return assignment_id


def change_assignment(editor: Editor, assignment_id: int, values: Mapping[str, Any]) -> bool:
    """Change columns. A new default takes the place of the one before."""
    row = editor.find(api_models, assignment_id)
    for name in ("llm_model_id", "model_key", "modality", "task"):
        if name in values and values[name] != row[name]:
            raise Invalid(f"{name} of an assignment stays: make another assignment")
    if values.get("is_default") is True and not row["is_default"]:
        _clear_default(editor, row["modality"], row["task"])
    return editor.change(api_models, assignment_id, values)


def set_default(editor: Editor, assignment_id: int) -> bool:
    """Make an assignment the default of its task; False where it is. Raises Conflict where it,
    its model or its provider is switched off."""
    row = editor.find(api_models, assignment_id)
    if row["is_default"]:
        return False
    model = editor.find(llm_models, row["llm_model_id"])
    provider = editor.find(providers, model["provider_id"])
    for what, one in (("assignment", row), ("model", model), ("provider", provider)):
        if not one["is_active"]:
            raise Conflict(
                f"the {what} of {row['model_key']!r} is switched off: switch it on first"
            )
    return change_assignment(editor, assignment_id, {"is_default": True})


def remove_assignment(editor: Editor, assignment_id: int) -> None:
    editor.remove(api_models, assignment_id)


def _clear_default(editor: Editor, modality: str, task: str) -> None:
    present = editor.connection.execute(
        select(api_models.c.id).where(
            api_models.c.modality == modality,
            api_models.c.task == task,
            api_models.c.is_default,
        )
    ).scalar_one_or_none()
    if present is not None:
        editor.change(api_models, present, {"is_default": False})

"""Which model does which task, and what is wrong with that. Reads a snapshot; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.values.rows import Assignment, Snapshot

Task = tuple[str, str]  # modality, task


@dataclass(frozen=True, slots=True)
class Flag:
    """A task whose default needs a person."""

    modality: str
    task: str
    model_key: str | None  # the default's; None: there is no active default
    why: str


def defaults(snapshot: Snapshot) -> Mapping[Task, Assignment]:
    """The active default of each task that has one."""
    return {
        (one.modality, one.task): one
        for one in snapshot.assignments
        if one.is_default and one.is_active
    }


def default_key(snapshot: Snapshot, modality: str, task: str) -> str | None:
    """The model key of a task's active default."""
    found = defaults(snapshot).get((modality, task))
    return found.model_key if found else None


def flags(snapshot: Snapshot) -> tuple[Flag, ...]:
    """Every task with an active assignment whose default is absent or cannot be relied on."""
    models = {model.id: model for model in snapshot.models}
    providers = {provider.id: provider for provider in snapshot.providers}
    chosen = defaults(snapshot)
    tasks = sorted({(one.modality, one.task) for one in snapshot.assignments if one.is_active})
    found = []
    for modality, task in tasks:
        default = chosen.get((modality, task))
        if default is None:
            found.append(Flag(modality, task, None, "no active default"))
            continue
        model = models.get(default.llm_model_id)
        provider = providers.get(model.provider_id) if model else None
        if model is None or provider is None:
            why = "its model is not in the catalogue"
        elif not model.is_active or not provider.is_active:
            why = "its model or provider is switched off"
        elif model.missing_since is not None:
            why = f"its provider has not listed it since {model.missing_since}"
        else:
            continue
        found.append(Flag(modality, task, default.model_key, why))
    return tuple(found)

"""Which model does which task. Reads a snapshot; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.values.rows import Assignment, Snapshot

Task = tuple[str, str]  # modality, task


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

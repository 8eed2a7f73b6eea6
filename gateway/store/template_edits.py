"""Edits of templates: text is immutable, pointers move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select, update

from gateway.errors import Conflict, Invalid, NotFound
from gateway.store.canonical import VERSION_FIELDS, version_hash
from gateway.store.editing import Editor
from gateway.store.fields import check, check_row
from gateway.store.rows import row_of, version_value
from gateway.store.tables import template_labels, template_versions, templates
from gateway.store.versions import stored_version, stored_versions
from gateway.values.rows import TemplateVersion
from gateway.values.seeds import SeedTemplate

LIVE = "live"  # what the pointer itself is called; no label may be


@dataclass(frozen=True, slots=True)
class NewVersion:
    version_id: int
    version: int
    created: bool  # False: an older version has exactly this text, and was taken


def create_template(editor: Editor, template: SeedTemplate, message: str = "") -> int:
    """A template with its first version, live; its id. Raises Conflict, Invalid."""
    row = row_of(template)
    text = {name: row.pop(name) for name in VERSION_FIELDS}
    template_id: int = editor.create(templates, row)
    first = insert_version(editor, template_id, 1, text, message)
    point(editor, template_id, first)
    return template_id


def change_template(editor: Editor, template_id: int, values: Mapping[str, Any]) -> bool:
    """Change the name, the tuple, the description or is_active; False where they are so.

    Raises Conflict where another active template serves the tuple.
    """
    return editor.change(templates, template_id, values)


def new_version(
    editor: Editor,
    template_id: int,
    changes: Mapping[str, Any],
    message: str = "",
    *,
    publish: bool = True,
    expected_version: int | None = None,
) -> NewVersion:
    """The live text with `changes` as the next version, live unless `publish` is False.

    expected_version: the live version that the caller has read; Conflict where it is another.
    A text that a version has already is not stored twice: that version is taken.
    """
    live = _live(editor, template_id, expected_version)
    unknown = sorted(set(changes) - set(VERSION_FIELDS))
    if unknown:
        raise Invalid(f"a version has no {', '.join(unknown)}")
    text = {name: changes.get(name, getattr(live, name)) for name in VERSION_FIELDS}
    text = _checked(editor, text)
    wanted = version_hash(version_value({**text, "id": 0, "version": 1}))
    known = stored_versions(editor.connection, template_id)
    found = next((one.text for one in known if one.text.content_hash == wanted), None)
    if found is None:
        number = max(one.text.version for one in known) + 1
        version_id = insert_version(editor, template_id, number, text, message)
    else:
        number, version_id = found.version, found.id
    if publish and version_id != live.id:
        point(editor, template_id, version_id)
    return NewVersion(version_id, number, created=found is None)


def publish(
    editor: Editor, template_id: int, version: int, *, expected_version: int | None = None
) -> bool:
    """Make a version live, a newer or an older one; False where it is. Raises NotFound."""
    live = _live(editor, template_id, expected_version)
    wanted = stored_version(editor.connection, template_id, version).text
    if wanted.id == live.id:
        return False
    point(editor, template_id, wanted.id)
    return True


def set_label(editor: Editor, template_id: int, label: str, version: int) -> None:
    """Point a label at a version, wherever it pointed before."""
    try:
        check(template_labels.c.label, label)
    except ValueError as exc:
        raise Invalid(str(exc)) from exc
    if label == LIVE:
        raise Invalid(f"{LIVE!r} is no label: publish the version instead")
    wanted = stored_version(editor.connection, template_id, version).text.id
    where = _label(template_id, label)
    if not editor.connection.execute(
        update(template_labels).where(*where).values(version_id=wanted)
    ).rowcount:
        editor.connection.execute(
            insert(template_labels).values(template_id=template_id, label=label, version_id=wanted)
        )
    editor.audit("label", f"templates/{template_id}", {"label": label, "version": version})


def remove_label(editor: Editor, template_id: int, label: str) -> None:
    if not editor.connection.execute(
        delete(template_labels).where(*_label(template_id, label))
    ).rowcount:
        raise NotFound(f"template {template_id} has no label {label!r}")
    editor.audit("unlabel", f"templates/{template_id}", {"label": label})


def _label(template_id: int, label: str) -> tuple[Any, Any]:
    return (template_labels.c.template_id == template_id, template_labels.c.label == label)


def _live(editor: Editor, template_id: int, expected: int | None) -> TemplateVersion:
    row = editor.find(templates, template_id)
    number = editor.connection.execute(
        select(template_versions.c.version).where(
            template_versions.c.id == row["live_version_id"],
            template_versions.c.template_id == template_id,
        )
    ).scalar_one_or_none()
    if number is None:
        raise Conflict(f"template {template_id} has no live version: publish one first")
    if expected is not None and number != expected:
        raise Conflict(
            f"version {number} of template {template_id} is live, not {expected}: "
            "read it again and repeat the edit",
            fields={"version": number},
        )
    return stored_version(editor.connection, template_id, number).text


def _checked(editor: Editor, text: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        name: list(one) if isinstance(one := text[name], tuple) else one for name in VERSION_FIELDS
    }
    try:
        for name, one in row.items():
            check(template_versions.c[name], one)
        check_row(template_versions, row)
    except ValueError as exc:
        raise Invalid(f"template version: {exc}") from exc
    for name in ("system_prompt", "user_template", "negative_prompt"):
        editor.check_text(str(row[name]), tuple(row["variables"]))
    return row


def insert_version(
    editor: Editor,
    template_id: int,
    number: int,
    text: Mapping[str, Any],
    message: str = "",
    *,
    created_by: str | None = None,
    created_at: datetime | None = None,
) -> int:
    """A version as it is given; its id. For an import; others call new_version."""
    row = _checked(editor, text)
    own = version_hash(version_value({**row, "id": 0, "version": number}))
    version_id: int = editor.connection.execute(
        insert(template_versions)
        .values(
            template_id=template_id,
            version=number,
            **row,
            content_hash=own,
            message=message,
            created_by=editor.actor if created_by is None else created_by,
            created_at=created_at or editor.at,
        )
        .returning(template_versions.c.id)
    ).scalar_one()
    # The text is in the version and stays there; the log has its hash.
    editor.audit("version", f"templates/{template_id}", {"version": number, "hash": own})
    return version_id


def point(editor: Editor, template_id: int, version_id: int) -> None:
    """Make a version of the template live, by its id."""
    editor.change(templates, template_id, {}, live_version_id=version_id)

"""Templates over HTTP: text is immutable, pointers move.

An editor adds versions and labels; a publisher decides which version requests get, and which
templates are switched on.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field
from sqlalchemy import Connection, select

from gateway.access.caller import Scope
from gateway.errors import NotFound
from gateway.front import revision
from gateway.front.access import needs
from gateway.front.admin_bodies import EditBody, PageQuery, create_body, given, patch_body, whole
from gateway.front.admin_edit import allow_live, answer, editing, page
from gateway.front.services import Services
from gateway.store import template_edits
from gateway.store.canonical import VERSION_FIELDS
from gateway.store.tables import template_labels, template_versions, templates
from gateway.store.versions import StoredVersion, diff_versions, stored_version, stored_versions
from gateway.values.rows import Template
from gateway.values.seeds import SeedTemplate

INT32 = 2**31 - 1

TemplateFields = create_body("TemplateFields", SeedTemplate)
TemplateChange = patch_body("TemplateChange", TemplateFields, without=VERSION_FIELDS)
VersionFields = patch_body(
    "VersionFields",
    TemplateFields,
    without=tuple(name for name in TemplateFields.model_fields if name not in VERSION_FIELDS),
)


class TemplateCreate(TemplateFields):  # type: ignore[valid-type,misc]
    message: str = Field("", max_length=2000)


class VersionCreate(VersionFields):  # type: ignore[valid-type,misc]
    """The live text with these changes."""

    message: str = Field("", max_length=2000, description="Why; for those who read the list")
    publish: bool = Field(False, description="Make it live at once; needs the scope publisher")
    expected_version: int | None = Field(None, ge=1, description="The live version that was read")


class Publish(EditBody):
    version: int = Field(ge=1, le=INT32)
    expected_version: int | None = Field(None, ge=1, description="The live version that was read")


class Label(EditBody):
    version: int = Field(ge=1, le=INT32)


class TemplatePath(BaseModel):
    id: int = Field(ge=1, le=INT32)


class VersionPath(TemplatePath):
    version: int = Field(ge=1, le=INT32)


class LabelPath(TemplatePath):
    label: str = Field(min_length=1, max_length=60)


class DiffQuery(BaseModel):
    before: int = Field(ge=1, le=INT32)
    after: int = Field(ge=1, le=INT32)


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint(
        "admin_templates", __name__, url_prefix="/api/templates", abp_tags=[Tag(name="prompts")]
    )

    @api.get("", summary="The templates with their live versions, by id")
    @needs(Scope.VIEWER)
    def listed(query: PageQuery) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        found = page(held.snapshot.templates, query, _id, asdict)
        return {**found, "revision": held.snapshot.revision}

    @api.get("/<int:id>", summary="One template with its live version and its labels")
    @needs(Scope.VIEWER)
    def one(path: TemplatePath) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        found = next((row for row in held.snapshot.templates if row.id == path.id), None)
        if found is None:
            raise NotFound(f"there is no template {path.id}")
        with services.database.reading() as connection:
            labels = _labels(connection, path.id)
        row = {**asdict(found), "labels": labels}
        return {"success": True, "row": row, "revision": held.snapshot.revision}

    @api.post("", summary="Make a template with its first version")
    @needs(Scope.EDITOR)
    def create(body: TemplateCreate) -> ResponseReturnValue:
        value = whole(body, SeedTemplate)
        allow_live(value.is_active)
        with editing(services, body) as editor:
            key = template_edits.create_template(editor, value, body.message)
        return answer(editor, id=key, version=1, changed=True), 201

    @api.patch("/<int:id>", summary="Change the name, the tuple, the description, the switch")
    @needs(Scope.EDITOR)
    def change(path: TemplatePath, body: TemplateChange) -> ResponseReturnValue:  # type: ignore[valid-type]
        values = given(body)
        with editing(services, body) as editor:
            before = editor.find(templates, path.id)
            allow_live(before["is_active"], values.get("is_active"))
            changed = template_edits.change_template(editor, path.id, values)
        return answer(editor, id=path.id, changed=changed)

    @api.get("/<int:id>/versions", summary="All versions of a template, oldest first")
    @needs(Scope.VIEWER)
    def versions(path: TemplatePath) -> ResponseReturnValue:
        with services.database.reading() as connection:
            live = _live_version(connection, path.id)
            rows = [_version(found, live) for found in stored_versions(connection, path.id)]
        return {"success": True, "rows": rows, "count": len(rows), "live": live}

    @api.get("/<int:id>/versions/<int:version>", summary="One version")
    @needs(Scope.VIEWER)
    def version(path: VersionPath) -> ResponseReturnValue:
        with services.database.reading() as connection:
            live = _live_version(connection, path.id)
            row = _version(stored_version(connection, path.id, path.version), live)
        return {"success": True, "row": row}

    @api.post("/<int:id>/versions", summary="Add a version: a draft, or live with `publish`")
    @needs(Scope.EDITOR)
    def add(path: TemplatePath, body: VersionCreate) -> ResponseReturnValue:
        allow_live(body.publish)
        changes = {name: one for name, one in given(body).items() if name in VERSION_FIELDS}
        with editing(services, body) as editor:
            made = template_edits.new_version(
                editor,
                path.id,
                changes,
                body.message,
                publish=body.publish,
                expected_version=body.expected_version,
            )
        told = answer(
            editor, id=path.id, version=made.version, changed=made.created, published=body.publish
        )
        return told, 201 if made.created else 200

    @api.post("/<int:id>/publish", summary="Make a version live, a newer or an older one")
    @needs(Scope.PUBLISHER)
    def publish(path: TemplatePath, body: Publish) -> ResponseReturnValue:
        with editing(services, body) as editor:
            changed = template_edits.publish(
                editor, path.id, body.version, expected_version=body.expected_version
            )
        return answer(editor, id=path.id, version=body.version, changed=changed)

    @api.get("/<int:id>/diff", summary="What differs between two versions")
    @needs(Scope.VIEWER)
    def diff(path: TemplatePath, query: DiffQuery) -> ResponseReturnValue:
        with services.database.reading() as connection:
            found = diff_versions(connection, path.id, query.before, query.after)
        values = {name: {"before": a, "after": b} for name, (a, b) in found.values.items()}
        return {
            "success": True,
            "before": found.before,
            "after": found.after,
            "values": values,
            "text": found.text,
        }

    @api.put("/<int:id>/labels/<label>", summary="Point a label at a version")
    @needs(Scope.EDITOR)
    def label(path: LabelPath, body: Label) -> ResponseReturnValue:
        with editing(services, body) as editor:
            template_edits.set_label(editor, path.id, path.label, body.version)
        return answer(editor, id=path.id, label=path.label, version=body.version)

    @api.delete("/<int:id>/labels/<label>", summary="Take a label away")
    @needs(Scope.EDITOR)
    def unlabel(path: LabelPath) -> ResponseReturnValue:
        with editing(services) as editor:
            template_edits.remove_label(editor, path.id, path.label)
        return answer(editor, id=path.id, label=path.label)

    return api


def _id(row: Template) -> int:
    return row.id


def _version(found: StoredVersion, live: int | None) -> dict[str, Any]:
    return {
        **asdict(found.text),
        "message": found.message,
        "created_by": found.created_by,
        "created_at": found.created_at.isoformat(),
        "is_live": found.text.version == live,
    }


def _live_version(connection: Connection, template_id: int) -> int | None:
    """The number of the live version. Raises NotFound without the template."""
    row = connection.execute(
        select(templates.c.id, template_versions.c.version)
        .outerjoin(template_versions, template_versions.c.id == templates.c.live_version_id)
        .where(templates.c.id == template_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no template {template_id}")
    found: int | None = row.version
    return found


def _labels(connection: Connection, template_id: int) -> dict[str, int]:
    rows = connection.execute(
        select(template_labels.c.label, template_versions.c.version)
        .join(template_versions, template_versions.c.id == template_labels.c.version_id)
        .where(template_labels.c.template_id == template_id)
        .order_by(template_labels.c.label)
    )
    return {row.label: row.version for row in rows}

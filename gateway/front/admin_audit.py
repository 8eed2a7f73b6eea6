"""The audit log over HTTP: who changed what, and whether the log is whole."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field
from sqlalchemy import Row, select

from gateway.access.caller import Scope
from gateway.front.access import needs
from gateway.front.admin_bodies import MAX_LIMIT
from gateway.front.admin_edit import number
from gateway.front.services import Services
from gateway.store.audit import verify_audit
from gateway.store.tables import audit_log


class AuditQuery(BaseModel):
    limit: int = Field(50, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, max_length=18, description="`next` of the page before")
    subject: str | None = Field(None, max_length=200, description="table/key, exactly")


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint(
        "admin_audit", __name__, url_prefix="/api/audit", abp_tags=[Tag(name="access")]
    )

    @api.get("", summary="Edits, the newest first")
    @needs(Scope.ADMIN)
    def listed(query: AuditQuery) -> ResponseReturnValue:
        wanted = select(audit_log).order_by(audit_log.c.id.desc()).limit(query.limit + 1)
        if query.cursor:
            wanted = wanted.where(audit_log.c.id < number(query.cursor))
        if query.subject:
            wanted = wanted.where(audit_log.c.subject == query.subject)
        with services.database.reading() as connection:
            found = connection.execute(wanted).all()
        rows = [_row(one) for one in found[: query.limit]]
        following = str(found[query.limit - 1].id) if len(found) > query.limit else None
        return {"success": True, "rows": rows, "count": len(rows), "next": following}

    @api.get("/verify", summary="Walk the whole log and check that each row follows the one before")
    @needs(Scope.ADMIN)
    def verify() -> ResponseReturnValue:
        with services.database.reading() as connection:
            state = verify_audit(connection)
        return {
            "success": True,
            "whole": state.broken_id is None,
            "rows": state.rows,
            "head": state.head,
            "broken_id": state.broken_id,
            "reason": state.reason,
        }

    return api


def _row(row: Row[Any]) -> dict[str, Any]:
    return {**row._mapping, "at": row.at.astimezone(UTC).isoformat()}

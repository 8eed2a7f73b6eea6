"""The log of requests over HTTP: who asked what, how it went, and the same messages again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import AfterValidator, BaseModel, Field

from gateway.access.caller import Caller, Scope
from gateway.front.access import caller, needs
from gateway.front.admin_edit import holds
from gateway.front.services import Services
from gateway.logs.queries import (
    MAX_LIMIT,
    Filters,
    StoredBody,
    body_of,
    list_rows,
    objects_of,
    one_row,
)
from gateway.logs.replay import replay_logged


def _aware(at: datetime) -> datetime:
    # Pydantic's own type says "timezone info", and no error may have that word's beginning.
    if at.tzinfo is None:
        raise ValueError("a time needs its zone: Z, or +01:00")
    if not 1970 <= at.year <= 9000:
        raise ValueError("a time is between the years 1970 and 9000")
    return at


Time = Annotated[datetime, AfterValidator(_aware)]


class LogQuery(BaseModel):
    """All filters have to hold."""

    limit: int = Field(50, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, max_length=40, description="`next` of the page before")
    since: Time | None = Field(None, description="Not older than this; with its zone")
    until: Time | None = Field(None, description="Older than this; with its zone")
    request_id: str | None = Field(None, max_length=64)
    template_name: str | None = Field(None, max_length=120)
    user_id: str | None = Field(None, max_length=36)
    endpoint: str | None = Field(None, max_length=80)
    error_code: str | None = Field(None, max_length=60)
    model_key: str | None = Field(None, max_length=200)
    fallback_level: int | None = Field(None, ge=0, le=2)
    flag: list[str] = Field([], max_length=5, description="Rows that have each of these")

    def filters(self) -> Filters:
        values = self.model_dump(exclude={"limit", "cursor", "flag"})
        return Filters(**values, flags=tuple(self.flag))


class LogPath(BaseModel):
    request_id: str = Field(min_length=1, max_length=64)


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("logs", __name__, url_prefix="/api/logs", abp_tags=[Tag(name="operation")])

    @api.get("", summary="Requests, the newest first, without their texts")
    @needs(Scope.VIEWER)
    def listed(query: LogQuery) -> ResponseReturnValue:
        with services.database.reading() as connection:
            page = list_rows(connection, query.filters(), query.limit, query.cursor)
        rows = [_row(one) for one in page.rows]
        return {"success": True, "rows": rows, "count": len(rows), "next": page.next}

    @api.get("/<request_id>", summary="One request; its texts for admins and whose request it was")
    @needs(Scope.VIEWER)
    def one(path: LogPath) -> ResponseReturnValue:
        with services.database.reading() as connection:
            row = one_row(connection, path.request_id)
            body = body_of(connection, path.request_id)
            may_read = may_read_texts(caller(), row["user_id"])
            objects = objects_of(connection, body.config_refs) if body and may_read else ()
        told: dict[str, Any] = {"success": True, "row": _row(row), "has_texts": body is not None}
        if body is not None and may_read:
            told["body"] = _body(body)
            told["objects"] = [asdict(one) for one in objects]
        return told

    @api.get("/<request_id>/replay", summary="Assemble it again from what was kept, and compare")
    @needs(Scope.VIEWER)
    def again(path: LogPath) -> ResponseReturnValue:
        with services.database.reading() as connection:
            found = replay_logged(connection, path.request_id, services.counters)
        return {"success": True, **found.to_json()}

    return api


def may_read_texts(who: Caller, user_id: str | None) -> bool:
    """A viewer sees what happened; what somebody wrote is for that user, and for admins."""
    return holds(who, Scope.ADMIN) or (who.user_id is not None and who.user_id == user_id)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    at: datetime = row["created_at"]
    return {**row, "created_at": at.astimezone(UTC).isoformat()}


def _body(body: StoredBody) -> dict[str, Any]:
    return {
        "request": body.request,
        "messages": [asdict(one) for one in body.messages],
        "answer": body.answer,
        "trace": body.trace,
        "config_refs": list(body.config_refs),
    }

"""Keys and users over HTTP, and who the caller is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from gateway.access.caller import Scope, implied, parse_scopes
from gateway.access.keys import Key, create_key, list_keys, revoke_key
from gateway.access.users import User, create_user, list_users, set_user
from gateway.front.access import caller, needs
from gateway.front.admin_bodies import PageQuery
from gateway.front.admin_edit import actor, number
from gateway.front.admin_rows import IdPath
from gateway.front.services import Services
from gateway.store.audit import append_audit

_TAG = Tag(name="access")
_FORBID = ConfigDict(extra="forbid")


class KeyCreate(BaseModel):
    model_config = _FORBID

    name: str = Field(min_length=1, max_length=100)
    scopes: list[Scope] = Field(min_length=1, max_length=len(Scope))
    user_id: str | None = Field(None, max_length=36, description="Whose rows it sees")
    expires_at: AwareDatetime | None = None


class UserChange(BaseModel):
    model_config = _FORBID

    email: str | None = Field(None, min_length=3, max_length=320)
    tier: str = Field("*", min_length=1, max_length=40)
    content_mode: Literal["sfw", "nsfw"] | None = None
    may_use_nsfw: bool = False
    is_admin: bool = False
    is_active: bool = True


class UserCreate(UserChange):
    id: str | None = Field(None, max_length=36, description="Drawn where it is left out")


class UserPath(BaseModel):
    id: str = Field(min_length=36, max_length=36)


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint("admin_access", __name__, url_prefix="/api", abp_tags=[_TAG])

    @api.get("/me", summary="Who the caller is, and what it may do")
    @needs(*Scope)
    def me() -> ResponseReturnValue:
        who = caller()
        return {
            "success": True,
            "kind": who.kind,
            "name": who.name,
            "user_id": who.user_id,
            "scopes": sorted(implied(who.scopes)),
            "tier": who.tier,
            "content_mode": who.content_mode,
            "may_use_nsfw": who.may_use_nsfw,
            "is_admin": who.is_admin,
        }

    @api.get("/keys", summary="The API keys, without their secrets")
    @needs(Scope.ADMIN)
    def keys(query: PageQuery) -> ResponseReturnValue:
        after = number(query.cursor) if query.cursor else 0
        with services.database.reading() as connection:
            found = list_keys(connection, limit=query.limit + 1, after_id=after)
        rows = [_key(one, services.wall()) for one in found[: query.limit]]
        more = len(found) > query.limit
        following = str(found[query.limit - 1].id) if more else None
        return {"success": True, "rows": rows, "count": len(rows), "next": following}

    @api.post("/keys", summary="Make a key; this answer alone shows it")
    @needs(Scope.ADMIN)
    def add_key(body: KeyCreate) -> ResponseReturnValue:
        now = services.wall()
        with services.database.transaction() as connection:
            made, key = create_key(
                connection,
                name=body.name,
                scopes=parse_scopes(body.scopes),
                now=now,
                user_id=body.user_id,
                expires_at=body.expires_at,
            )
            append_audit(
                connection,
                at=now,
                actor=actor(),
                action="create",
                subject=f"api_keys/{made.id}",
                detail={"name": made.name, "scopes": sorted(made.scopes)},
            )
        return {"success": True, "key": key, "row": _key(made, now)}, 201

    @api.delete("/keys/<int:id>", summary="Revoke a key, for good")
    @needs(Scope.ADMIN)
    def remove_key(path: IdPath) -> ResponseReturnValue:
        now = services.wall()
        with services.database.transaction() as connection:
            revoked = revoke_key(connection, path.id, now)
            append_audit(
                connection,
                at=now,
                actor=actor(),
                action="revoke",
                subject=f"api_keys/{revoked.id}",
                detail={"name": revoked.name},
            )
        services.gate.forget_key(revoked.prefix)
        return {"success": True, "row": _key(revoked, now)}

    @api.get("/users", summary="The users, by id")
    @needs(Scope.ADMIN)
    def users(query: PageQuery) -> ResponseReturnValue:
        with services.database.reading() as connection:
            found = list_users(connection, limit=query.limit + 1, after_id=query.cursor or "")
        rows = [_user(one) for one in found[: query.limit]]
        following = found[query.limit - 1].id if len(found) > query.limit else None
        return {"success": True, "rows": rows, "count": len(rows), "next": following}

    @api.post("/users", summary="Make a user")
    @needs(Scope.ADMIN)
    def add_user(body: UserCreate) -> ResponseReturnValue:
        now = services.wall()
        values = body.model_dump(exclude={"id"}, exclude_unset=True)
        with services.database.transaction() as connection:
            made = create_user(connection, user_id=body.id, now=now, values=values)
            append_audit(
                connection,
                at=now,
                actor=actor(),
                action="create",
                subject=f"users/{made.id}",
                detail=_without_address(values),
            )
        services.gate.forget_user(made.id)
        return {"success": True, "row": _user(made)}, 201

    @api.patch("/users/<id>", summary="Change a user's tier, mode or rights")
    @needs(Scope.ADMIN)
    def change_user(path: UserPath, body: UserChange) -> ResponseReturnValue:
        now = services.wall()
        values = body.model_dump(exclude_unset=True)
        with services.database.transaction() as connection:
            changed = set_user(connection, path.id, values, now)
            append_audit(
                connection,
                at=now,
                actor=actor(),
                action="change",
                subject=f"users/{changed.id}",
                detail=_without_address(values),
            )
        services.gate.forget_user(changed.id)
        return {"success": True, "row": _user(changed)}

    return api


def _key(key: Key, now: datetime) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": sorted(key.scopes),
        "user_id": key.user_id,
        "is_active": key.is_active(now),
        "created_at": _iso(key.created_at),
        "expires_at": _iso(key.expires_at),
        "revoked_at": _iso(key.revoked_at),
        "last_used_at": _iso(key.last_used_at),
    }


def _user(user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "email": user.email,
        "tier": user.tier,
        "content_mode": user.content_mode,
        "may_use_nsfw": user.may_use_nsfw,
        "is_admin": user.is_admin,
        "is_active": user.is_active,
        "created_at": _iso(user.created_at),
        "updated_at": _iso(user.updated_at),
    }


def _without_address(values: dict[str, Any]) -> dict[str, Any]:
    """For the audit log, whose rows are never deleted: an address has to be deletable."""
    return {**values, "email": "(set)"} if values.get("email") else values


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat()

"""Users as rows: made by an administrator, or at the first token of someone new."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import Conflict, Invalid, NotFound
from gateway.store.tables import users

CHANGEABLE = frozenset({"email", "tier", "content_mode", "may_use_nsfw", "is_admin", "is_active"})


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A row of users."""

    id: str
    email: str | None
    tier: str
    content_mode: str | None  # the user's own setting
    may_use_nsfw: bool
    is_admin: bool
    is_active: bool
    created_at: datetime
    updated_at: datetime


def create_user(
    connection: Connection, *, user_id: str | None, now: datetime, values: Mapping[str, Any]
) -> User:
    """A new user; None draws the id. Raises Conflict for an id or address that is taken."""
    key = str(uuid.uuid4()) if user_id is None else parse_user_id(user_id)
    row = {**_checked(values), "id": key, "created_at": now, "updated_at": now}
    try:
        found = connection.execute(insert(users).values(row).returning(*users.c)).one()
    except IntegrityError as exc:
        raise Conflict("a user with this id or email exists") from exc
    return _read(found)


def get_user(connection: Connection, user_id: str) -> User:
    """Raises NotFound."""
    row = connection.execute(select(users).where(users.c.id == user_id)).one_or_none()
    if row is None:
        raise NotFound("there is no user with this id")
    return _read(row)


def get_or_create_user(connection: Connection, user_id: str, now: datetime) -> User:
    """The user of a token. Someone new may not use nsfw until an administrator allows it. The
    token's address is not kept: nothing here needs it."""
    row = connection.execute(select(users).where(users.c.id == user_id)).one_or_none()
    if row is not None:
        return _read(row)
    try:
        with connection.begin_nested():  # two first requests at once: the second finds the row
            return create_user(connection, user_id=user_id, now=now, values={})
    except Conflict:
        return get_user(connection, user_id)


def set_user(
    connection: Connection, user_id: str, changes: Mapping[str, Any], now: datetime
) -> User:
    """Change some of CHANGEABLE. Raises NotFound, Invalid, Conflict."""
    get_user(connection, user_id)
    try:
        row = connection.execute(
            update(users)
            .where(users.c.id == user_id)
            .values(**_checked(changes), updated_at=now)
            .returning(*users.c)
        ).one()
    except IntegrityError as exc:
        raise Conflict("another user has this email") from exc
    return _read(row)


def list_users(connection: Connection, *, limit: int, after_id: str = "") -> tuple[User, ...]:
    """Users by id."""
    rows = connection.execute(
        select(users).where(users.c.id > after_id).order_by(users.c.id).limit(limit)
    )
    return tuple(_read(row) for row in rows)


def parse_user_id(text: str) -> str:
    """A UUID in its usual form, lower case. Raises Invalid."""
    try:
        parsed = str(uuid.UUID(text))
    except ValueError as exc:
        raise Invalid("a user's id is a UUID") from exc
    # uuid.UUID also reads braces, URNs and text without dashes: the same user under many names.
    if parsed != text.lower():
        raise Invalid("a user's id is a UUID in the form 8-4-4-4-12")
    return parsed


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(values) - CHANGEABLE)
    if unknown:
        raise Invalid("a user has no " + ", ".join(unknown))
    if values.get("content_mode") not in (None, "sfw", "nsfw"):
        raise Invalid("content_mode is sfw, nsfw or null")
    return dict(values)


def _read(row: Row[Any]) -> User:
    return User(**row._mapping)

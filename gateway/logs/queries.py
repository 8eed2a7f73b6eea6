"""Questions to the log: pages of rows, the newest first, and one row with its texts.

A page is found by one index, whichever engine and however many rows. SQLite has no statistics
unless somebody runs ANALYZE, so it is told which of several indexes to take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    exists,
    literal_column,
    or_,
    select,
    text,
)

from gateway.errors import Invalid, InvalidRequest, NotFound
from gateway.store.tables import config_objects, prompt_log_bodies, prompt_log_flags, prompt_logs
from gateway.values.assembly import Message
from gateway.values.logentry import ConfigObject

MAX_LIMIT = 200

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_CURSOR = re.compile(r"([0-9]{1,17})\.([0-9]{1,18})", re.ASCII)
# Columns with an index, the one that leaves fewest rows as a rule first.
_INDEXED = ("error_code", "user_id", "fallback_level", "template_name", "model_key", "endpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """All have to hold; None: any. Times are aware, since ≤ created_at < until."""

    since: datetime | None = None
    until: datetime | None = None
    request_id: str | None = None
    template_name: str | None = None
    user_id: str | None = None
    endpoint: str | None = None
    error_code: str | None = None
    model_key: str | None = None
    fallback_level: int | None = None
    flags: tuple[str, ...] = ()  # each of them is there


@dataclass(frozen=True, slots=True)
class Page:
    rows: tuple[Mapping[str, Any], ...]
    next: str | None  # cursor of the page after; None: this is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBody:
    """Texts of a row as they are in the database."""

    request: Mapping[str, Any]
    messages: tuple[Message, ...]
    answer: str | None
    trace: Mapping[str, Any]
    config_refs: tuple[str, ...]


def list_rows(
    connection: Connection, filters: Filters, limit: int = 50, cursor: str | None = None
) -> Page:
    """Rows in the order of (created_at, id), falling. limit: 1 to 200. Raises Invalid, and
    InvalidRequest for a cursor that is none."""
    if not 1 <= limit <= MAX_LIMIT:
        raise Invalid(f"limit is {limit}; it has to be between 1 and {MAX_LIMIT}")
    statement = statement_of(filters, cursor, is_sqlite=connection.dialect.name == "sqlite")
    found = [dict(row) for row in connection.execute(statement.limit(limit + 1)).mappings()]
    more = len(found) > limit
    rows = tuple(found[:limit])
    last = rows[-1] if more else None
    return Page(rows, cursor_of(last["created_at"], last["id"]) if last else None)


def statement_of(filters: Filters, cursor: str | None, *, is_sqlite: bool) -> Select[Any]:
    """The statement without its limit."""
    logs, flags = prompt_logs.c, prompt_log_flags.c
    statement = select(prompt_logs)
    created_at: ColumnElement[Any] = logs.created_at
    row_id: ColumnElement[Any] = logs.id
    if filters.flags:
        # The flags' own index is in the order of the page.
        statement = statement.join(prompt_log_flags, flags.log_id == logs.id)
        statement = statement.where(flags.flag == filters.flags[0])
        created_at, row_id = flags.created_at, flags.log_id
    for flag in filters.flags[1:]:
        other = prompt_log_flags.alias()
        statement = statement.where(
            exists().where(
                other.c.flag == flag,
                other.c.created_at == logs.created_at,
                other.c.log_id == logs.id,
            )
        )
    if filters.request_id is not None:
        statement = statement.where(logs.request_id == filters.request_id)
    is_led = bool(filters.flags) or filters.request_id is not None
    for name in _INDEXED:
        value = getattr(filters, name)
        if value is None:
            continue
        # A level of 0 is the rule, and its rows are in no index.
        is_leading = not is_led and not (name == "fallback_level" and value == 0)
        statement = statement.where(_equals(name, value, is_sqlite and not is_leading))
        is_led = is_led or is_leading
    if filters.since is not None:
        statement = statement.where(created_at >= filters.since)
    if filters.until is not None:
        statement = statement.where(created_at < filters.until)
    if cursor is not None:
        at, number = place_of(cursor)
        statement = statement.where(created_at <= at, or_(created_at < at, row_id < number))
    return statement.order_by(created_at.desc(), row_id.desc())


def _equals(name: str, value: Any, hidden: bool) -> ColumnElement[bool]:
    """column = value; hidden: with a plus before the column, which keeps SQLite from its index."""
    column: ColumnElement[Any] = prompt_logs.c[name]
    if hidden:
        column = literal_column(f"+prompt_logs.{name}", column.type)
    elif name == "fallback_level" and value > 0:
        # The condition of the partial index, word for word: a parameter does not imply it.
        return and_(column == value, text("prompt_logs.fallback_level > 0"))
    found: ColumnElement[bool] = column == value
    return found


def one_row(connection: Connection, request_id: str) -> Mapping[str, Any]:
    """Raises NotFound."""
    found = connection.execute(
        select(prompt_logs).where(prompt_logs.c.request_id == request_id)
    ).mappings()
    row = found.one_or_none()
    if row is None:
        raise NotFound("the log has no such request; rows go after their time (row_days)")
    return dict(row)


def body_of(connection: Connection, request_id: str) -> StoredBody | None:
    """None: texts were not kept, or their time is over."""
    row = connection.execute(
        select(prompt_log_bodies).where(prompt_log_bodies.c.request_id == request_id)
    ).one_or_none()
    if row is None:
        return None
    return StoredBody(
        request=row.request,
        messages=tuple(Message(one["role"], one["content"]) for one in row.messages),
        answer=row.answer,
        trace=row.trace,
        config_refs=tuple(row.config_refs),
    )


def objects_of(connection: Connection, hashes: Iterable[str]) -> tuple[ConfigObject, ...]:
    """The configuration objects of these hashes, as far as they are there."""
    found = connection.execute(
        select(config_objects).where(config_objects.c.content_hash.in_(sorted(set(hashes))))
    )
    return tuple(
        ConfigObject(content_hash=row.content_hash, kind=row.kind, body=row.body) for row in found
    )


def cursor_of(created_at: datetime, row_id: int) -> str:
    return f"{(created_at - _EPOCH) // _MICROSECOND}.{row_id}"


def place_of(cursor: str) -> tuple[datetime, int]:
    """Raises InvalidRequest."""
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise InvalidRequest("this cursor was not given by this list")
    try:
        return _EPOCH + int(found[1]) * _MICROSECOND, int(found[2])
    except OverflowError as exc:
        raise InvalidRequest("this cursor was not given by this list") from exc

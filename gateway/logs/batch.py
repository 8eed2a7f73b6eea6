"""Entries as rows: one batch in one transaction.

Clients choose request ids, and one may come twice. The table keeps each row: from the second on
its id is `<id>~<time>` and it has the flag request_id_reused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    Connection,
    String,
    Text,
    bindparam,
    cast,
    insert,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from gateway.errors import Invalid
from gateway.logs.queue import BODY_NOT_KEPT
from gateway.prompts.digest import canonical_json
from gateway.store.tables import config_objects, prompt_log_bodies, prompt_log_flags, prompt_logs
from gateway.values.logentry import LogBody, LogEntry

REQUEST_ID_CHARS = 64
REUSED = "request_id_reused"
# How old the time of last use of a configuration object may be before it is written again.
# gateway/logs/retention.py keeps objects for much longer than that.
TOUCH = timedelta(hours=1)

# Escaped NUL in JSON: after an even number of backslashes. No text of PostgreSQL can hold one.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_LENGTHS = {
    one.name: one.type.length
    for one in prompt_logs.columns
    if isinstance(one.type, String) and one.type.length
}
_PLAIN = [
    one.name
    for one in prompt_logs.columns
    if one.name not in ("id", "request_id", "rule_ids", "flags")
]


@dataclass(frozen=True, slots=True)
class Texts:
    """A body as columns; JSON as text, spelled as it was hashed."""

    request: str
    messages: str
    answer: str | None
    trace: str
    config_refs: str
    objects: dict[str, tuple[str, str]]  # kind and body by content_hash


def write_batch(connection: Connection, entries: Sequence[LogEntry], now: datetime) -> None:
    """Insert all of them; the caller's transaction writes. now: aware, for objects' last use."""
    ids = _unused_ids(connection, entries)
    rows, bodies, flagged = [], [], []
    objects: dict[str, tuple[str, str]] = {}
    for entry, request_id in zip(entries, ids, strict=True):
        flags = dict.fromkeys(entry.flags)
        if request_id != entry.request_id:
            flags[REUSED] = None
        if entry.body is not None:
            texts = as_texts(entry.body)
            if texts is None:
                flags[BODY_NOT_KEPT] = None
            else:
                objects |= texts.objects
                bodies.append(_body_row(request_id, entry.created_at, texts))
        rows.append(_row(entry, request_id, tuple(flags)))
        flagged += [
            {"request_id": request_id, "flag": flag, "created_at": entry.created_at}
            for flag in {_clip(flag, 60) for flag in flags}
        ]
    connection.execute(insert(prompt_logs), rows)
    if flagged:
        _insert_flags(connection, flagged)
    if bodies:
        _touch_objects(connection, objects, now)
        connection.execute(_raw_insert(connection, "body"), bodies)


def as_texts(body: LogBody) -> Texts | None:
    """None: a text in it is none that a database can hold (NUL, half of a surrogate pair)."""
    try:
        texts = Texts(
            request=_json(body.request),
            messages=_json([{"role": one.role, "content": one.content} for one in body.messages]),
            answer=body.answer,
            trace=_json(body.trace),
            config_refs=_json([one.content_hash for one in body.objects]),
            objects={one.content_hash: (one.kind, _json(one.body)) for one in body.objects},
        )
        (body.answer or "").encode("utf-8")
    except (Invalid, TypeError, UnicodeEncodeError):
        return None
    written = [texts.request, texts.messages, texts.trace]
    written += [text for _, text in texts.objects.values()]
    if "\0" in (body.answer or "") or any(_NUL.search(one) for one in written):
        return None
    return texts


def _json(value: Any) -> str:
    # Not by the engine's serializer, which spells 1.0 as 1: the hash of the object would be
    # another one when it is read again.
    return canonical_json(value).decode()


def _row(entry: LogEntry, request_id: str, flags: tuple[str, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(entry, name) for name in _PLAIN}
    for name, length in _LENGTHS.items():
        if isinstance(row.get(name), str):
            row[name] = _clip(row[name], length)
    row |= {"request_id": request_id, "rule_ids": list(entry.rule_ids), "flags": list(flags)}
    return row


def _clip(text: str, length: int) -> str:
    """What fits the column: PostgreSQL refuses longer ones, NUL and halves of surrogate pairs."""
    return text[:length].replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _body_row(request_id: str, created_at: datetime, texts: Texts) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "created_at": created_at,
        "request_text": texts.request,
        "messages_text": texts.messages,
        "answer": texts.answer,
        "trace_text": texts.trace,
        "config_refs_text": texts.config_refs,
    }


def _raw_insert(connection: Connection, what: str) -> Any:
    """An insert whose JSON columns take text as it is."""

    def json_text(name: str) -> Any:
        text = bindparam(f"{name}_text", type_=Text())
        return cast(text, JSONB) if connection.dialect.name == "postgresql" else text

    if what == "body":
        names = ("request", "messages", "trace", "config_refs")
        return insert(prompt_log_bodies).values({name: json_text(name) for name in names})
    make = postgresql_insert if connection.dialect.name == "postgresql" else sqlite_insert
    statement = make(config_objects).values(body=json_text("body"))
    return statement.on_conflict_do_update(
        index_elements=[config_objects.c.content_hash],
        set_={"created_at": statement.excluded.created_at},
    )


def _insert_flags(connection: Connection, flagged: list[dict[str, Any]]) -> None:
    ids = _ids_of(connection, {one["request_id"] for one in flagged})
    connection.execute(
        insert(prompt_log_flags),
        [
            {
                "flag": one["flag"],
                "created_at": one["created_at"],
                "log_id": ids[one["request_id"]],
            }
            for one in flagged
        ],
    )


def _ids_of(connection: Connection, request_ids: Iterable[str]) -> dict[str, int]:
    found = connection.execute(
        select(prompt_logs.c.request_id, prompt_logs.c.id).where(
            prompt_logs.c.request_id.in_(sorted(request_ids))
        )
    )
    return {request_id: log_id for request_id, log_id in found}


def _touch_objects(
    connection: Connection, objects: dict[str, tuple[str, str]], now: datetime
) -> None:
    """Insert those that are new and say of the others that they are in use, where that was not
    said lately: rows that every replica wrote in every batch would hold all of them up."""
    fresh = set(
        connection.scalars(
            select(config_objects.c.content_hash).where(
                config_objects.c.content_hash.in_(sorted(objects)),
                config_objects.c.created_at > now - TOUCH,
            )
        )
    )
    # In one order in every replica, since two that lock the same rows in another would block.
    due = [
        {
            "content_hash": one,
            "kind": objects[one][0],
            "body_text": objects[one][1],
            "created_at": now,
        }
        for one in sorted(objects)
        if one not in fresh
    ]
    if due:
        connection.execute(_raw_insert(connection, "object"), due)


# --- request ids ------------------------------------------------------------------------------


def candidate(entry: LogEntry, place: int, attempt: int) -> str:
    """The id to try: the client's own, then with the microseconds of its time and its place in the
    batch, then with the attempt as well."""
    own = _clip(entry.request_id, REQUEST_ID_CHARS)
    if attempt == 0:
        return own
    suffix = f"~{int(entry.created_at.timestamp() * 1e6):x}.{place:x}"
    if attempt > 1:
        suffix += f".{attempt:x}"
    return own[: REQUEST_ID_CHARS - len(suffix)] + suffix


def _unused_ids(connection: Connection, entries: Sequence[LogEntry]) -> list[str]:
    chosen = [""] * len(entries)
    used: set[str] = set()
    pending, attempt = list(range(len(entries))), 0
    while pending:
        tried = {place: candidate(entries[place], place, attempt) for place in pending}
        used |= _existing(connection, tried.values())
        pending = []
        for place, request_id in tried.items():
            if request_id in used:
                pending.append(place)
            else:
                used.add(request_id)
                chosen[place] = request_id
        attempt += 1
    return chosen


def _existing(connection: Connection, request_ids: Iterable[str]) -> set[str]:
    wanted = sorted(set(request_ids))
    return set(
        connection.scalars(
            union_all(
                select(prompt_logs.c.request_id).where(prompt_logs.c.request_id.in_(wanted)),
                select(prompt_log_bodies.c.request_id).where(
                    prompt_log_bodies.c.request_id.in_(wanted)
                ),
            )
        )
    )

"""A row of the log assembled again from what was kept with it: the same messages, or not.

The configuration as it is now has no part in it. What differs is told in numbers and names, never
in the texts themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from gateway.errors import GatewayError, NotFound
from gateway.logs.queries import StoredBody, body_of, objects_of, one_row
from gateway.prompts.assemble import assemble
from gateway.prompts.digest import messages_sha256
from gateway.prompts.replay import rebuild, request_from_json
from gateway.store.tables import prompt_log_bodies
from gateway.values.assembly import Assembled, Counters, Message
from gateway.values.logentry import ConfigObject


@dataclass(frozen=True, slots=True)
class Replayed:
    """same: the row's hash, that of the messages kept, and that of those assembled now are one."""

    request_id: str
    same: bool
    logged: str | None  # messages_sha256 of the row
    recomputed: str | None  # None: it could not be assembled
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "same": self.same,
            "logged": self.logged,
            "recomputed": self.recomputed,
            "differences": list(self.differences),
        }


def replay_logged(connection: Connection, request_id: str, counters: Counters) -> Replayed:
    """Raises NotFound where there is no such row, or no texts of it."""
    row = one_row(connection, request_id)
    body = body_of(connection, request_id)
    if body is None:
        raise NotFound(
            "the texts of this request are not there: their time is over (body_days), they were "
            "switched off, or it ended before it was assembled"
        )
    return replay(row, body, objects_of(connection, body.config_refs), counters)


def newest_with_texts(connection: Connection, most: int) -> tuple[str, ...]:
    """Request ids, the newest first."""
    bodies = prompt_log_bodies.c
    found = select(bodies.request_id).order_by(bodies.created_at.desc(), bodies.request_id)
    return tuple(connection.scalars(found.limit(most)))


def replay(
    row: Mapping[str, Any], body: StoredBody, objects: Sequence[ConfigObject], counters: Counters
) -> Replayed:
    """row: columns of prompt_logs by name. objects: those of body.config_refs that are there."""
    logged = row["messages_sha256"]
    differences = []
    kept = messages_sha256(body.messages)
    if kept != logged:
        differences.append("the messages that were kept do not have the hash of the row")
    missing = len(set(body.config_refs) - {one.content_hash for one in objects})
    if missing:
        differences.append(
            f"{missing} of {len(set(body.config_refs))} configuration objects are not there"
        )
    recomputed = None
    try:
        again = assemble(rebuild(objects), request_from_json(body.request), counters)
    except GatewayError as exc:
        differences.append(f"it cannot be assembled: {exc.code}: {exc}")
    else:
        recomputed = again.messages_sha256
        differences += _messages_differ(body.messages, again.messages)
        differences += _row_differs(row, again)
    return Replayed(
        request_id=row["request_id"],
        same=recomputed is not None and recomputed == logged == kept,
        logged=logged,
        recomputed=recomputed,
        differences=tuple(differences),
    )


def _messages_differ(kept: Sequence[Message], again: Sequence[Message]) -> list[str]:
    if len(kept) != len(again):
        return [f"{len(kept)} messages were kept, {len(again)} are assembled"]
    told = []
    for number, (old, new) in enumerate(zip(kept, again, strict=True), 1):
        if old.role != new.role:
            told.append(f"message {number}: its role was {old.role} and is {new.role}")
        elif old.content != new.content:
            told.append(
                f"message {number} ({old.role}): {len(old.content)} characters were kept, "
                f"{len(new.content)} are assembled, alike in the first "
                f"{_alike(old.content, new.content)}"
            )
    return told


def _alike(old: str, new: str) -> int:
    pairs = enumerate(zip(old, new, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(old), len(new)))


def _row_differs(row: Mapping[str, Any], again: Assembled) -> list[str]:
    """Columns that assembly decides. They may differ with equal messages: a count, say, where the
    tokenizer's files have come since."""
    now = {
        "template_name": again.template.template_name,
        "template_version": again.template.live.version,
        "rule_ids": list(again.rule_ids),
        "content_mode": again.content_mode,
        "mode_source": again.mode_source,
        "tokens_in": again.prompt_tokens,
    }
    return [
        f"{name}: {row[name]} in the row, {value} now"
        for name, value in now.items()
        if row[name] is not None and row[name] != value
    ]

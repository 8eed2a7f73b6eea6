"""The audit log: who changed what, each row with the hash of the one before it.

A row that was changed, put in or taken from the middle breaks the chain. Rows cut off at the end
do not show in the chain itself: keep `AuditState.head` elsewhere to notice that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from gateway.store.canonical import sha256_hex
from gateway.store.tables import audit_log

GENESIS = "0" * 64
LOCK = 0x6175_6469  # "audi": two rows with one predecessor would be a fork


@dataclass(frozen=True, slots=True)
class AuditState:
    """What a walk over the whole log has found."""

    rows: int
    head: str  # hash of the last good row
    broken_id: int | None = None  # of the first row that does not fit
    reason: str = ""


def append_audit(
    connection: Connection,
    *,
    at: datetime,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any],
    revision: int | None = None,
) -> str:
    """Write one row in the caller's transaction; its hash. `detail` holds no secrets."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
    previous = (
        connection.execute(select(audit_log.c.hash).order_by(audit_log.c.id.desc()).limit(1))
    ).scalar_one_or_none() or GENESIS
    own = _hash(previous, at, actor, action, subject, revision, detail)
    connection.execute(
        insert(audit_log).values(
            at=at,
            actor=actor,
            action=action,
            subject=subject,
            revision=revision,
            detail=dict(detail),
            previous_hash=previous,
            hash=own,
        )
    )
    return own


def verify_audit(connection: Connection) -> AuditState:
    """Walk the log from its beginning to its end or to the first row that does not fit."""
    head, count = GENESIS, 0
    for row in connection.execute(select(audit_log).order_by(audit_log.c.id)):
        if row.previous_hash != head:
            return AuditState(count, head, row.id, "the row before it was changed or taken away")
        own = _hash(head, row.at, row.actor, row.action, row.subject, row.revision, row.detail)
        if own != row.hash:
            return AuditState(count, head, row.id, "the row was changed")
        head, count = row.hash, count + 1
    return AuditState(count, head)


def _hash(
    previous: str,
    at: datetime,
    actor: str,
    action: str,
    subject: str,
    revision: int | None,
    detail: Mapping[str, Any],
) -> str:
    return sha256_hex([previous, at.isoformat(), actor, action, subject, revision, dict(detail)])

"""Versions of templates: reading them, their hashes, and what differs between two.

SQLite has no SHA-256, and a trigger may not ask for one of ours: the sqlite3 shell has to work.
So a version made in SQL says `pending:…` where its hash belongs. Readers compute the hash from the
content in any case; the next edit through the gateway fills it in, with an audit row.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, update

from gateway.errors import NotFound
from gateway.store.canonical import VERSION_FIELDS
from gateway.store.loading import BadRows, Reader
from gateway.store.rows import PENDING
from gateway.store.tables import template_versions
from gateway.values.rows import TemplateVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """A version with how it came about."""

    text: TemplateVersion
    message: str
    created_by: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Settled:
    id: int
    hash: str


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """What differs between two versions of a template."""

    before: int
    after: int
    values: Mapping[str, tuple[Any, Any]]  # of each column that differs
    text: str  # of the texts among them, as a unified diff; empty: none differs


def stored_versions(connection: Connection, template_id: int) -> tuple[StoredVersion, ...]:
    """All versions of a template, oldest first. Raises BadRows."""
    return tuple(
        sorted(
            _read(connection, f"WHERE template_id = {int(template_id)}"),
            key=lambda one: one.text.version,
        )
    )


def stored_version(connection: Connection, template_id: int, version: int) -> StoredVersion:
    """One version. Raises NotFound, or BadRows."""
    found = _read(
        connection, f"WHERE template_id = {int(template_id)} AND version = {int(version)}"
    )
    if not found:
        raise NotFound(f"template {template_id} has no version {version}")
    return found[0]


def _read(connection: Connection, where: str) -> list[StoredVersion]:
    reader = Reader(connection)
    found = [
        StoredVersion(
            text=reader.version(row),
            message=row["message"],
            created_by=row["created_by"],
            created_at=row["created_at"],
        )
        for row in reader.rows(template_versions, where)
    ]
    if reader.faults:
        raise BadRows(reader.faults)
    return found


def settle_hashes(connection: Connection) -> tuple[Settled, ...]:
    """Fill in the hashes that SQL left open; those that were. In a transaction that writes.

    A bad row stays as it is: readers report it. So does one whose text another version of the
    template has already, written another way: its hash would not be unique.
    """
    reader = Reader(connection)
    settled = []
    for row in reader.rows(template_versions, f"WHERE substr(content_hash, 1, 8) = '{PENDING}'"):
        own = reader.version(row).content_hash
        taken = connection.exec_driver_sql(
            "SELECT count(*) FROM template_versions"
            f" WHERE template_id = {row['template_id']} AND content_hash = '{own}'"
        ).scalar_one()
        if not taken:
            connection.execute(
                update(template_versions)
                .where(template_versions.c.id == row["id"])
                .values(content_hash=own)
            )
            settled.append(Settled(row["id"], own))
    return tuple(settled)


def diff_versions(connection: Connection, template_id: int, before: int, after: int) -> VersionDiff:
    """What has changed from one version to another. Raises NotFound."""
    old = stored_version(connection, template_id, before).text
    new = stored_version(connection, template_id, after).text
    return diff_texts(old, new)


def diff_texts(old: TemplateVersion, new: TemplateVersion) -> VersionDiff:
    values = {
        name: (getattr(old, name), getattr(new, name))
        for name in VERSION_FIELDS
        if getattr(old, name) != getattr(new, name)
    }
    lines: list[str] = []
    for name in ("system_prompt", "user_template", "negative_prompt"):
        if name in values:
            lines += difflib.unified_diff(
                str(values[name][0]).splitlines(),
                str(values[name][1]).splitlines(),
                f"{name} v{old.version}",
                f"{name} v{new.version}",
                lineterm="",
            )
    return VersionDiff(old.version, new.version, values, "\n".join(lines))

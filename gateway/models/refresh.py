"""Brings the catalogue in line with a provider's list. Adds, updates, flags; never deletes.

A model that is gone from the list gets `missing_since`; when it comes back that is cleared. Of its
name and capabilities, what the list says wins and what it does not say stays. Nothing else changes:
whether it is active and which tasks it does are people's decisions, so no list can take a task's
default away. A default whose model is gone stays, and is named in the result.

A list of which less than half of the known models are left is refused whole until somebody says
that it is meant: a provider that is half broken looks just like that.

A run that finds nothing new writes no row of the configuration, so the revision stays; that it ran
is in the audit log. All rows of a run are written in one transaction, under a lock on the
provider's row, in savepoints: a row that the database refuses takes no other one with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Executable,
    String,
    case,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from gateway.errors import Conflict, NotFound
from gateway.models.listing import MAX_CAPABILITIES_BYTES, Listed, Listing, RowError
from gateway.store.audit import append_audit
from gateway.store.canonical import canonical_json
from gateway.store.database import Database
from gateway.store.loading import read_revision
from gateway.store.tables import Json, api_models, audit_log, llm_models, providers
from gateway.values.rows import Provider

ACTION = "llms.refresh"
SMALLEST_PART = 0.5  # of the known models, that a list must still have
MAX_ERRORS = 100  # that are listed; all are counted
CHUNK = 200  # rows of one statement; SQLite takes 32,766 values in one

T = TypeVar("T")

# The list of a provider. Raises ProviderError; then nothing is changed.
Fetch = Callable[[Provider], Listing]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResults:
    """What a refresh did."""

    provider: str
    source: str  # provider | built_in
    added: int = 0
    updated: int = 0  # changed, or back again
    retired: int = 0  # gone from the list since the last time
    failed: int = 0
    errors: tuple[RowError, ...] = ()  # the first 100
    # Defaults whose model is gone: (modality, task, model key).
    missing_defaults: tuple[tuple[str, str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "source": self.source,
            "added": self.added,
            "updated": self.updated,
            "retired": self.retired,
            "failed": self.failed,
            "errors": [error.to_json() for error in self.errors],
            "missingDefaults": [
                {"modality": modality, "task": task, "model_key": key}
                for modality, task, key in self.missing_defaults
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A row of the catalogue, as far as a list can change it."""

    id: int
    external_id: str
    model_name: str
    capabilities: Mapping[str, Any]
    is_missing: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a list changes."""

    add: tuple[Listed, ...] = ()
    update: tuple[tuple[int, Listed], ...] = ()  # row ids
    retire: tuple[int, ...] = ()
    known: int = 0  # that were not missing before
    errors: tuple[RowError, ...] = ()

    @property
    def is_suspicious(self) -> bool:
        return self.known > 0 and self.known - len(self.retire) < self.known * SMALLEST_PART


def plan(known: Sequence[Known], listing: Listing) -> Plan:
    """What `listing` changes in `known`. Pure."""
    by_id = {row.external_id: row for row in known}
    add, changed, errors = [], [], list(listing.errors)
    for listed in listing.rows:
        row = by_id.get(listed.external_id)
        if row is None:
            add.append(listed)
            continue
        merged = replace(listed, capabilities={**row.capabilities, **listed.capabilities})
        if not row.is_missing and not _differs(row, merged):
            continue
        size = len(canonical_json(merged.capabilities))
        if size > MAX_CAPABILITIES_BYTES:
            why = f"capabilities would have {size} bytes; at most {MAX_CAPABILITIES_BYTES} are kept"
            errors.append(RowError(listed.external_id, why))
            continue
        changed.append((row.id, merged))
    present = [row for row in known if not row.is_missing]
    gone = [row.id for row in present if row.external_id not in listing.ids]
    return Plan(
        add=tuple(add),
        update=tuple(changed),
        retire=tuple(gone) if listing.is_complete else (),
        known=len(present),
        errors=tuple(errors),
    )


def refresh(
    database: Database,
    fetch: Fetch,
    now: datetime,
    *,
    provider: str,
    actor: str,
    confirmed: bool = False,
) -> SyncResults:
    """Fetch the provider's list and write what it changes. One at a time: refresher.py.

    now: wall clock, aware. actor: who asked, for the audit log. confirmed: take a list that
    shrank. Raises NotFound, ProviderError from the fetch, Conflict for a list that shrank, and
    StoreUnavailable; after each of these nothing has changed.
    """
    with database.reading() as connection:
        row = _provider(connection, provider, lock=False)
    listing = fetch(row)
    with database.transaction() as connection:
        # A second refresh waits here and then sees what the first has written.
        row = _provider(connection, provider, lock=True)
        planned = plan(_known(connection, row.id), listing)
        if planned.is_suspicious and not confirmed:
            raise Conflict(
                f"The list has {planned.known - len(planned.retire)} of the {planned.known} models "
                "that were known, less than half; nothing was changed. "
                "If it is right, ask again with confirm set",
                fields={
                    "listed": len(listing.ids),
                    "known": planned.known,
                    "would_retire": len(planned.retire),
                },
            )
        results = _write(connection, row, planned, listing.source, now)
        append_audit(
            connection,
            at=now,
            actor=actor[:120],
            action=ACTION,
            subject=_subject(provider),
            detail={
                name: value
                for name, value in results.to_json().items()
                if name not in ("errors", "missingDefaults")
            },
            revision=read_revision(connection),
        )
    return results


def last_synced(connection: Connection, provider: str | None = None) -> datetime | None:
    """When a refresh last went through, of one provider or of any."""
    asked = select(func.max(audit_log.c.at)).where(audit_log.c.action == ACTION)
    if provider is not None:
        asked = asked.where(audit_log.c.subject == _subject(provider))
    found = connection.execute(asked).scalar()
    return found if isinstance(found, datetime) else None


def refresh_body(
    results: SyncResults, models: Sequence[Mapping[str, Any]], now: datetime
) -> dict[str, Any]:
    """The answer of `POST /api/llms/refresh`. models: of catalogue_body, after the refresh."""
    return {
        "success": True,
        "syncResults": results.to_json(),
        "models": list(models),
        "timestamp": now.astimezone(UTC).isoformat(),
    }


def _subject(provider: str) -> str:
    return f"providers/{provider}"


def _provider(connection: Connection, name: str, *, lock: bool) -> Provider:
    asked = select(providers).where(providers.c.name == name)
    if lock:
        # NO KEY UPDATE: a plain lock would stop inserts of models, which refer to this row, while
        # they hold the revision's row that we need next: a deadlock. SQLite locks all at BEGIN.
        asked = asked.with_for_update(key_share=True)
    row = connection.execute(asked).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no provider {name[:60]!r}; add it, or name another one")
    return Provider(
        id=row["id"],
        name=row["name"],
        kind=row["kind"],
        base_url=row["base_url"],
        secret_ref=row["secret_ref"],
        is_active=row["is_active"],
    )


def _known(connection: Connection, provider_id: int) -> list[Known]:
    rows = connection.execute(
        select(llm_models).where(llm_models.c.provider_id == provider_id).order_by(llm_models.c.id)
    ).mappings()
    return [
        Known(
            id=row["id"],
            external_id=row["external_id"],
            model_name=row["model_name"],
            capabilities=row["capabilities"],
            is_missing=row["missing_since"] is not None,
        )
        for row in rows
    ]


def _differs(row: Known, listed: Listed) -> bool:
    return row.model_name != listed.model_name or canonical_json(
        row.capabilities
    ) != canonical_json(listed.capabilities)


def _write(
    connection: Connection, provider: Provider, planned: Plan, source: str, now: datetime
) -> SyncResults:
    errors = list(planned.errors)
    taken = set(connection.execute(select(llm_models.c.model_key)).scalars())
    order = connection.execute(select(func.max(llm_models.c.display_order))).scalar() or 0
    new: list[tuple[str, dict[str, Any]]] = []
    for listed in planned.add:
        key = _free_key(listed, provider.name, taken)
        if key is None:
            errors.append(RowError(listed.external_id, "its model key is another model's"))
            continue
        taken.add(key)
        row = {
            "provider_id": provider.id,
            "external_id": listed.external_id,
            "model_name": listed.model_name,
            "model_key": key,
            "capabilities": dict(listed.capabilities),
            "display_order": order + len(new) + 1,
            "first_seen_at": now,
            "last_synced_at": now,
        }
        new.append((listed.external_id, row))
    added = _write_rows(connection, new, lambda some: insert(llm_models).values(some), errors)
    changed = [(listed.external_id, (row_id, listed)) for row_id, listed in planned.update]
    updated = _write_rows(connection, changed, lambda some: _update(some, now), errors)
    if planned.retire:
        gone = llm_models.c.id.in_(planned.retire)
        connection.execute(update(llm_models).where(gone).values(missing_since=now))
    return SyncResults(
        provider=provider.name,
        source=source,
        added=added,
        updated=updated,
        retired=len(planned.retire),
        failed=len(errors),
        errors=tuple(errors[:MAX_ERRORS]),
        missing_defaults=_missing_defaults(connection, provider.id),
    )


def _free_key(listed: Listed, provider: str, taken: set[str]) -> str | None:
    """The wanted model key, or with the provider's name before it. Keys never change later."""
    wanted = (
        listed.model_key,
        f"{provider}/{listed.model_key}",
        f"{provider}/{listed.external_id}",
    )
    return next((key for key in wanted if key not in taken and len(key) <= 200), None)


def _write_rows(
    connection: Connection,
    rows: Sequence[tuple[str, T]],
    statement: Callable[[list[T]], Executable],
    errors: list[RowError],
) -> int:
    """How many rows were written; one that the database refuses is an error with its external id.

    Many to a statement, since each statement raises the revision, whose row others wait for;
    one by one only where one of the many is refused.
    """
    written = 0
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        if _in_savepoint(connection, statement([row for _, row in chunk])) is None:
            written += len(chunk)
            continue
        for external_id, row in chunk:
            error = _in_savepoint(connection, statement([row]))
            if error is None:
                written += 1
            else:
                errors.append(RowError(external_id, error))
    return written


def _update(rows: list[tuple[int, Listed]], now: datetime) -> Executable:
    by_id = llm_models.c.id
    names = {row_id: literal(listed.model_name, String) for row_id, listed in rows}
    capabilities = {row_id: literal(dict(listed.capabilities), Json) for row_id, listed in rows}
    return (
        update(llm_models)
        .where(by_id.in_(names))
        .values(
            model_name=case(names, value=by_id),
            capabilities=case(capabilities, value=by_id),
            last_synced_at=now,
            missing_since=None,
        )
    )


def _in_savepoint(connection: Connection, statement: Executable) -> str | None:
    """Why the row was not written; None: it was. The others are not touched by that."""
    try:
        with connection.begin_nested():
            connection.execute(statement)
    except DBAPIError as exc:
        # A lost connection is StoreUnavailable already (gateway/store/database.py) and ends it all.
        return f"the database refused it ({type(exc).__name__})"
    return None


def _missing_defaults(connection: Connection, provider_id: int) -> tuple[tuple[str, str, str], ...]:
    rows = connection.execute(
        select(api_models.c.modality, api_models.c.task, api_models.c.model_key)
        .join(llm_models, llm_models.c.id == api_models.c.llm_model_id)
        .where(
            llm_models.c.provider_id == provider_id,
            llm_models.c.missing_since.is_not(None),
            api_models.c.is_default,
        )
        .order_by(api_models.c.modality, api_models.c.task)
    )
    return tuple((row.modality, row.task, row.model_key) for row in rows)

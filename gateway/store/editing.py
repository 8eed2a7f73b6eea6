"""Edits of the configuration: one transaction, checked, with an audit row for each change.

    with edit(database, actor="anna", expected_revision=12) as editor:
        rule_id = create_rule(editor, SeedRule(…))
    editor.revision  # after the block: what a reader has to have loaded to see the edit

The functions for each table are in the modules beside this one (…_edits.py); `create`, `change`
and `remove` here are what they are made of. Texts are checked by the `check` that the caller
brings: what a template may hold is the renderer's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select, update
from sqlalchemy.exc import DataError, IntegrityError

from gateway.errors import Conflict, Invalid, NotFound
from gateway.store.audit import append_audit
from gateway.store.canonical import canonical_json
from gateway.store.database import Database
from gateway.store.fields import check, check_row
from gateway.store.loading import read_revision
from gateway.store.tables import api_models, llm_models, providers
from gateway.store.versions import settle_hashes

# (text, names of its variables) → nothing, or raises a GatewayError.
TextCheck = Callable[[str, tuple[str, ...]], None]
# Columns that only the store sets.
OWN = frozenset(("id", "created_at", "updated_at", "live_version_id", "content_hash"))


class Editor:
    """One transaction's edits. One thread; ends with the block of `edit`."""

    def __init__(
        self, connection: Connection, actor: str, at: datetime, check_text: TextCheck | None
    ):
        self.connection = connection
        self.actor = actor
        self.at = at
        self.revision = 0  # set when the transaction ends
        self._check_text = check_text
        self._defaults = active_defaults(connection)
        self._as_one = False

    def check_text(self, text: str, variables: tuple[str, ...] = ()) -> None:
        if self._check_text is not None:
            self._check_text(text, variables)

    @contextmanager
    def as_one(self, action: str, subject: str) -> Iterator[dict[str, Any]]:
        """One audit row for everything in the block, with the detail that the block fills in."""
        detail: dict[str, Any] = {}
        self._as_one = True
        try:
            yield detail
        finally:
            self._as_one = False
        self.audit(action, subject, detail)

    def audit(self, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        if self._as_one:
            return
        append_audit(
            self.connection,
            at=self.at,
            actor=self.actor,
            action=action,
            subject=subject[:200],
            detail=detail,
            revision=read_revision(self.connection),
        )

    def find(self, table: Table, key: Any) -> dict[str, Any]:
        """The row of the (single-column) primary key. Raises NotFound."""
        column = _key(table)
        row = self.connection.execute(select(table).where(column == key)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"{table.name} has no row {key}")
        return dict(row)

    def create(
        self,
        table: Table,
        values: Mapping[str, Any],
        *,
        personal: Collection[str] = (),
        **own: Any,
    ) -> Any:
        """Insert a checked row; its key. `own`: columns that callers may not set themselves.

        personal, here and below: columns with somebody's own texts. The audit log, from which
        nothing may be deleted, gets their lengths only; no hash either, since a short text can be
        found from it by trying.
        """
        row = {**_checked(table, values, partial=False), **own}
        column = _key(table)
        key = self.connection.execute(insert(table).values(row).returning(column)).scalar_one()
        self.audit("create", f"{table.name}/{key}", {"after": _json(row, personal)})
        return key

    def change(
        self,
        table: Table,
        key: Any,
        values: Mapping[str, Any],
        *,
        personal: Collection[str] = (),
        **own: Any,
    ) -> bool:
        """Update columns of a row; False where they are so already. Raises NotFound."""
        before = self.find(table, key)
        wanted = {**_checked(table, values, partial=True), **own}
        after = {name: one for name, one in wanted.items() if before[name] != one}
        if not after:
            return False
        _row_checked(table, {**before, **after})
        stamped = {**after, "updated_at": self.at} if "updated_at" in table.c else after
        self.connection.execute(update(table).where(_key(table) == key).values(stamped))
        self.audit(
            "change",
            f"{table.name}/{key}",
            {
                "before": _json({name: before[name] for name in after}, personal),
                "after": _json(after, personal),
            },
        )
        return True

    def remove(self, table: Table, key: Any, *, personal: Collection[str] = ()) -> None:
        """Delete a row. Raises NotFound; a Conflict comes where others refer to it."""
        before = self.find(table, key)
        self.connection.execute(delete(table).where(_key(table) == key))
        self.audit("remove", f"{table.name}/{key}", {"before": _json(before, personal)})

    def finish(self) -> None:
        """What holds for all edits together. Raises Conflict where a task lost its default."""
        lost = self._defaults - active_defaults(self.connection)
        if lost:
            named = ", ".join(sorted(f"{modality}/{task}" for modality, task in lost))
            raise Conflict(f"no active default would be left for {named}: set another one first")
        self.revision = read_revision(self.connection)


@contextmanager
def edit(
    database: Database,
    *,
    actor: str,
    expected_revision: int | None = None,
    at: datetime | None = None,
    check_text: TextCheck | None = None,
) -> Iterator[Editor]:
    """A transaction of edits by `actor`, alone in the whole database while it lasts.

    expected_revision: what the caller has read; Conflict (409) where the configuration has moved
    on since. at: the time for the rows; None: now. Raises Conflict for what breaks a rule of the
    schema, and where a task would lose its active default.
    """
    with _translated(), database.transaction() as connection:
        revision = lock_revision(connection)
        if expected_revision is not None and revision != expected_revision:
            raise Conflict(
                f"the configuration is at revision {revision}, not {expected_revision}: "
                "read it again and repeat the edit",
                fields={"revision": revision},
            )
        editor = Editor(connection, actor, at or datetime.now(UTC), check_text)
        for version in settle_hashes(connection):
            editor.audit("settle", f"template_versions/{version.id}", {"hash": version.hash})
        yield editor
        editor.finish()


def lock_revision(connection: Connection) -> int:
    """The revision, with the counter locked until the transaction ends.

    First in each edit: the triggers lock it after the row they belong to, and two edits that took
    their locks in different orders would wait for each other.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT 1 FROM config_state WHERE id = 1 FOR UPDATE")
    return read_revision(connection)


def active_defaults(connection: Connection) -> frozenset[tuple[str, str]]:
    """(modality, task) whose default, its model and its provider are all active."""
    found = connection.execute(
        select(api_models.c.modality, api_models.c.task)
        .join(llm_models, llm_models.c.id == api_models.c.llm_model_id)
        .join(providers, providers.c.id == llm_models.c.provider_id)
        .where(api_models.c.is_default, api_models.c.is_active)
        .where(llm_models.c.is_active, providers.c.is_active)
    )
    return frozenset((row.modality, row.task) for row in found)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError as exc:
        raise Conflict(_explain(exc.orig)) from exc
    except DataError as exc:
        # A value that passed our checks and not the driver's; its text may hold the value.
        raise Invalid(f"a value does not fit its column ({type(exc.orig).__name__})") from exc


def _explain(error: BaseException | None) -> str:
    diagnosis = getattr(error, "diag", None)
    if diagnosis is None:  # SQLite: names of columns, or the text of a trigger of ours
        return str(error)
    if diagnosis.constraint_name:  # the detail would have the row's values
        return f"{diagnosis.table_name} refuses this: {diagnosis.constraint_name}"
    return str(diagnosis.message_primary)


def _checked(table: Table, values: Mapping[str, Any], *, partial: bool) -> dict[str, Any]:
    unknown = sorted(set(values) - {one.name for one in table.columns})
    if unknown:
        raise Invalid(f"{table.name} has no columns {', '.join(unknown)}")
    key = {one.name for one in table.primary_key}
    # A character's id is given by its maker; every other key is the database's.
    refused = sorted(set(values) & OWN - (key if table.name == "characters" else set()))
    if refused:
        raise Invalid(f"{', '.join(refused)} of {table.name} cannot be set")
    row: dict[str, Any] = {}
    try:
        for column in table.columns:
            if column.name in values:
                row[column.name] = check(column, values[column.name])
            elif not partial and not (
                column.nullable or column.server_default is not None or column.name in OWN
            ):
                raise ValueError(f"{column.name} is missing")
        if not partial:
            check_row(table, row)
    except ValueError as exc:
        raise Invalid(f"{table.name}: {exc}") from exc
    return row


def _row_checked(table: Table, row: Mapping[str, Any]) -> None:
    try:
        check_row(table, row)
    except ValueError as exc:
        raise Invalid(f"{table.name}: {exc}") from exc


def _key(table: Table) -> Any:
    (column,) = table.primary_key
    return column


def _json(row: Mapping[str, Any], personal: Collection[str]) -> dict[str, Any]:
    return {
        name: {"length": _length(one)}
        if name in personal
        else (one.isoformat() if isinstance(one, datetime) else one)
        for name, one in row.items()
    }


def _length(value: Any) -> int:
    """Characters of a text, bytes of anything else as JSON."""
    return len(value if isinstance(value, str) else canonical_json(value))

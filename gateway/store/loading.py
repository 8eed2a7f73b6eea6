"""Reading the configuration: one consistent state, every row checked.

A bad row is never left out: a rule that silently does not apply is worse than an older
configuration. load_snapshot then raises BadRows, with each row named; a running process goes on
with the snapshot it has (fallback level 1) until the row is put right, and says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from sqlalchemy import JSON, Column, Connection, Table

from gateway.errors import StoreUnavailable
from gateway.store import rows as values
from gateway.store.canonical import snapshot_hash
from gateway.store.database import begin_consistent_read
from gateway.store.fields import check_row, decode
from gateway.store.tables import (
    api_models,
    character_loras,
    characters,
    llm_models,
    model_parameters,
    negative_prompts,
    prompt_rule_tags,
    prompt_rules,
    providers,
    template_versions,
    templates,
)
from gateway.values.rows import Snapshot, TemplateVersion

T = TypeVar("T")

ATTEMPTS = 5
PARSED_ROWS = 20_000
UNREAD = frozenset(("created_at", "updated_at", "first_seen_at", "last_synced_at"))
SHOWN_FAULTS = 20  # in the message of BadRows; the error has all


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be used."""

    table: str
    key: str
    reason: str  # without the row's text

    def __str__(self) -> str:
        return f"{self.table} {self.key}: {self.reason}"


class BadRows(StoreUnavailable):
    """The database answers, but rows in it are not what their columns may hold."""

    code = "configuration_fault"

    def __init__(self, faults: Iterable[Fault]):
        self.faults = tuple(faults)
        shown = "; ".join(str(one) for one in self.faults[:SHOWN_FAULTS])
        more = len(self.faults) - SHOWN_FAULTS
        super().__init__(
            f"{len(self.faults)} configuration rows are faulty: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


def read_revision(connection: Connection) -> int:
    """The counter that every change of the configuration raises. One small read."""
    revision = connection.exec_driver_sql(
        "SELECT revision FROM config_state WHERE id = 1"
    ).scalar_one_or_none()
    if revision is None:
        raise StoreUnavailable("config_state has no row; run the migrations again")
    return int(revision)


def load_snapshot(connection: Connection) -> Snapshot:
    """The whole configuration of one revision.

    Outside a transaction it makes its own, read-only and repeatable. Inside one it reads as that
    one does and tries again where the revision has moved while it read. Raises BadRows.
    """
    if connection.in_transaction():
        return _load_steadily(connection)
    with connection.begin():
        begin_consistent_read(connection)
        return _load_steadily(connection)


def _load_steadily(connection: Connection) -> Snapshot:
    for _attempt in range(ATTEMPTS):
        revision = read_revision(connection)
        reader = Reader(connection)
        snapshot = _assemble(reader, revision)
        if read_revision(connection) == revision:
            if reader.faults:
                raise BadRows(reader.faults)
            return replace(snapshot, content_hash=snapshot_hash(snapshot))
    raise StoreUnavailable(
        f"the configuration changed {ATTEMPTS} times while it was read", retry_after_s=1.0
    )


@lru_cache(maxsize=64)
def _columns(table: Table) -> tuple[Column[Any], ...]:
    """What is read: all but times that nothing depends on."""
    return tuple(
        one for one in table.columns if table is template_versions or one.name not in UNREAD
    )


# Of a table with 200 rows an edit changes one; checking the others again would be most of the time
# of a reload. Pure: a row depends on nothing but what came from the driver. Rows are read-only.
@lru_cache(maxsize=PARSED_ROWS)
def _parsed(table: Table, raw: tuple[Any, ...]) -> Mapping[str, Any] | Fault:
    columns = _columns(table)
    row: dict[str, Any] = {}
    reasons = []
    for column, one in zip(columns, raw, strict=True):
        try:
            row[column.name] = decode(column, one)
        except ValueError as exc:
            reasons.append(str(exc))
    if not reasons:
        try:
            check_row(table, row)
            return MappingProxyType(row)
        except ValueError as exc:
            reasons.append(str(exc))
    names = [column.name for column in columns]
    key = "/".join(str(raw[names.index(one.name)])[:60] for one in table.primary_key)
    return Fault(table.name, key, "; ".join(reasons))


class Reader:
    """Reads tables and collects the faults of their rows. One thread, one reading."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.faults: list[Fault] = []

    def rows(self, table: Table, where: str = "") -> list[Mapping[str, Any]]:
        """The good rows in the order of their keys. `where` is SQL of ours."""
        quote = self._connection.dialect.identifier_preparer.quote
        wanted = ", ".join(
            # As text, so that one row that is not JSON does not fail the others.
            f"CAST({quote(one.name)} AS TEXT)" if isinstance(one.type, JSON) else quote(one.name)
            for one in _columns(table)
        )
        order = ", ".join(quote(one.name) for one in table.primary_key)
        raws = self._connection.exec_driver_sql(
            f"SELECT {wanted} FROM {table.name} {where} ORDER BY {order}"
        )
        found: list[Mapping[str, Any]] = []
        for raw in raws:
            parsed = _parsed(table, tuple(raw))
            if isinstance(parsed, Fault):
                self.faults.append(parsed)
            else:
                found.append(parsed)
        return found

    def fault(self, table: Table, key: object, reason: str) -> None:
        self.faults.append(Fault(table.name, str(key), reason))

    def version(self, row: Mapping[str, Any]) -> TemplateVersion:
        """The value of a version, whose stored hash has to be its own or still open."""
        version = values.version_value(row)
        stored: str = row["content_hash"]
        if stored != version.content_hash and not stored.startswith(values.PENDING):
            self.fault(template_versions, row["id"], "content_hash is not that of its content")
        return version


def _assemble(reader: Reader, revision: int) -> Snapshot:
    live = {
        (row["template_id"], row["id"]): reader.version(row)
        for row in reader.rows(
            template_versions, "WHERE id IN (SELECT live_version_id FROM templates)"
        )
    }
    found_templates = []
    for row in reader.rows(templates):
        version = live.get((row["id"], row["live_version_id"]))
        if version is None:
            reader.fault(templates, row["id"], "live_version_id is no good version of it")
        else:
            found_templates.append(values.template_value(row, version))

    tags: dict[int, list[str]] = defaultdict(list)
    for row in reader.rows(prompt_rule_tags):
        tags[row["rule_id"]].append(row["tag"])
    loras: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in reader.rows(character_loras):
        loras[row["character_id"]].append(row)

    found_providers = [values.provider_value(row) for row in reader.rows(providers)]
    known_providers = {one.id for one in found_providers}
    found_models = [values.model_value(row) for row in reader.rows(llm_models)]
    for model in found_models:
        if model.provider_id not in known_providers:
            reader.fault(llm_models, model.id, "provider_id is no good row of providers")
    keys = {one.id: one.model_key for one in found_models}
    found_assignments = [values.assignment_value(row) for row in reader.rows(api_models)]
    for one in found_assignments:
        if keys.get(one.llm_model_id) != one.model_key:
            reader.fault(api_models, one.id, "llm_model_id and model_key are not of one model")
    return Snapshot(
        revision=revision,
        templates=_sorted(found_templates, lambda one: (one.template_name,)),
        rules=_sorted(
            (values.rule_value(row, tags[row["id"]]) for row in reader.rows(prompt_rules)),
            lambda one: (one.priority, one.id),
        ),
        providers=_sorted(found_providers, lambda one: (one.name,)),
        models=_sorted(
            (one for one in found_models if one.provider_id in known_providers),
            lambda one: (one.display_order, one.model_key),
        ),
        assignments=_sorted(
            found_assignments,
            lambda one: (one.modality, one.task, not one.is_default, -one.priority, one.id),
        ),
        parameters=_sorted(
            (values.parameters_value(row) for row in reader.rows(model_parameters)),
            lambda one: (
                one.model_key,
                one.job_type,
                one.profile,
                one.user_tier,
                one.character_id,
            ),
        ),
        characters=_sorted(
            (
                values.character_value(
                    row,
                    _sorted(
                        (values.lora_value(lora) for lora in loras[row["id"]]),
                        lambda lora: (lora.lora_ref, lora.target_model),
                    ),
                )
                for row in reader.rows(characters)
            ),
            lambda one: (one.id,),
        ),
        negatives=_sorted(
            (values.negative_value(row) for row in reader.rows(negative_prompts)),
            lambda one: (
                one.target_model,
                one.content_mode,
                one.generation_mode,
                -one.priority,
                one.id,
            ),
        ),
    )


def _sorted(items: Iterable[T], key: Callable[[T], tuple[Any, ...]]) -> tuple[T, ...]:
    return tuple(sorted(items, key=key))

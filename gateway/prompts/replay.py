"""The rows that a resolution used, kept beside its log, and the same resolution from them again.

Texts in the database move on; a log row has to be explained later. `used_objects` gives every row
that had a part, also those that were looked at and skipped, and `rebuild` a snapshot of only these:
with the same request it assembles to the same messages, parameters, models and negative prompt.

A row never changes, so what was worked out of it is remembered: requests that use the same rows
pay for their JSON and hashes once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.errors import Invalid
from gateway.prompts.chain import considered
from gateway.prompts.digest import sha256_of
from gateway.prompts.matching import facts_of, matching
from gateway.prompts.negative import negative_rows
from gateway.prompts.parameters import rows_for
from gateway.prompts.variables import is_withheld
from gateway.values.assembly import Assembled, AssembleRequest
from gateway.values.documents import row_of, table_of
from gateway.values.logentry import ConfigObject
from gateway.values.rows import (
    Assignment,
    Character,
    LlmModel,
    NegativePrompt,
    ParameterSet,
    Provider,
    Rule,
    Snapshot,
    Template,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Row = TypeVar("_Row", bound="DataclassInstance")

# kind of an object: its type, and the field of Snapshot that it goes into.
KINDS: Mapping[str, tuple[type[Any], str]] = {
    "template": (Template, "templates"),
    "rule": (Rule, "rules"),
    "provider": (Provider, "providers"),
    "model": (LlmModel, "models"),
    "assignment": (Assignment, "assignments"),
    "parameters": (ParameterSet, "parameters"),
    "character": (Character, "characters"),
    "negative": (NegativePrompt, "negatives"),
}

# Some hundreds are in use at a time; the rest are characters, and rows of snapshots that requests
# which began earlier still hold.
KEPT_ROWS = 2048


def used_objects(
    snapshot: Snapshot, request: AssembleRequest, assembled: Assembled
) -> tuple[ConfigObject, ...]:
    """Every row of `snapshot` that `assembled` depends on, each once, in a fixed order."""
    rows: list[tuple[str, Any]] = [("template", assembled.template)]
    withheld = is_withheld(assembled.character, assembled.content_mode)
    facts = facts_of(request, assembled.content_mode, None if withheld else assembled.character)
    rows += [("rule", rule) for rule in matching(snapshot, facts)[0]]
    if assembled.character is not None:
        rows.append(("character", assembled.character))
    assignments = considered(snapshot, request)
    rows += [("assignment", one) for one in assignments]
    wanted_models = {one.llm_model_id for one in assignments}
    models = [one for one in snapshot.models if one.id in wanted_models]
    rows += [("model", one) for one in models]
    wanted_providers = {one.provider_id for one in models}
    rows += [("provider", one) for one in snapshot.providers if one.id in wanted_providers]
    model_key = assembled.models[0].model_key if assembled.models else ""
    rows += [("parameters", one) for one in rows_for(snapshot, request, model_key)]
    rows += [
        ("negative", one)
        for one in negative_rows(
            snapshot, request.target_model, assembled.content_mode, request.generation_mode
        )
    ]
    return tuple({one.content_hash: one for one in _objects().of(rows)}.values())


def config_object(kind: str, row: Any) -> ConfigObject:
    """A row as it is kept. Raises Invalid for a text or number that JSON or UTF-8 cannot hold."""
    body = table_of(row)
    hashed = sha256_of({"kind": kind, "body": body})
    return ConfigObject(content_hash=hashed, kind=kind, body=body)


class ConfigObjects:
    """The objects of the `kept` rows that were used last, each with its row. Any thread; `_lock`
    guards `_made`. A body is shared by all requests of its row: who gets it only reads it."""

    def __init__(self, kept: int = KEPT_ROWS) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        # By identity, since comparing two rows costs more than this saves. The row is in the entry
        # so that its id cannot become another one's while the entry is there.
        self._made: OrderedDict[tuple[str, int], tuple[Any, ConfigObject]] = OrderedDict()

    def of(self, rows: Sequence[tuple[str, Any]]) -> list[ConfigObject]:
        """The objects of (kind, row) pairs, in their order. Raises as `config_object`."""
        keys = [(kind, id(row)) for kind, row in rows]
        with self._lock:
            entries = [self._made.get(key) for key in keys]
            for key, entry in zip(keys, entries, strict=True):
                if entry is not None:
                    self._made.move_to_end(key)
        if None not in entries:
            return [entry[1] for entry in entries if entry is not None]
        # Not under the lock: others need not wait for hashes. Two threads may make the same one.
        whole = [
            (row, config_object(kind, row)) if entry is None else entry
            for (kind, row), entry in zip(rows, entries, strict=True)
        ]
        with self._lock:
            self._made.update(zip(keys, whole, strict=True))
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        return [made for _, made in whole]


@cache
def _objects() -> ConfigObjects:
    """The process's own."""
    return ConfigObjects()


def rebuild(objects: Iterable[ConfigObject]) -> Snapshot:
    """A snapshot (revision 0) of these rows. Raises Invalid for a kind that does not exist, a body
    that is not of its kind, and one whose hash is another."""
    fields: dict[str, list[Any]] = {field: [] for _, field in KINDS.values()}
    for one in objects:
        if one.kind not in KINDS:
            raise Invalid(f"an object's kind is none of {', '.join(KINDS)}")
        if sha256_of({"kind": one.kind, "body": one.body}) != one.content_hash:
            raise Invalid(f"a kept {one.kind} does not match its hash; it was changed")
        cls, field = KINDS[one.kind]
        fields[field].append(_built(cls, one.body))
    fields["rules"].sort(key=lambda rule: (rule.priority, rule.id))
    whole: dict[str, Any] = {field: tuple(rows) for field, rows in fields.items()}
    return Snapshot(revision=0, **whole)


def request_to_json(request: AssembleRequest) -> dict[str, Any]:
    """JSON values, with every field."""
    plain: dict[str, Any] = table_of(request)
    return plain


def request_from_json(body: Mapping[str, Any]) -> AssembleRequest:
    """The request of a log row. A field that is absent has its default. Raises Invalid."""
    return _built(AssembleRequest, body)


def _built(kind: type[_Row], body: Any) -> _Row:
    if not isinstance(body, Mapping):
        raise Invalid(f"a kept {kind.__name__} is no JSON object")
    try:
        return row_of(kind, body)
    except ValueError as exc:
        raise Invalid(f"a kept row cannot be read: {exc}") from exc

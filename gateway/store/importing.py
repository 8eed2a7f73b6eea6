"""Writing a document of gateway/store/portable.py into a database, and what that would change.

An import adds and changes; it takes nothing away. Rows that the document lacks stay and are
named, so into an empty database it gives the same snapshot hash, into another one what both say.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import select

from gateway.errors import Invalid
from gateway.store.canonical import VERSION_FIELDS, canonical_json, version_hash
from gateway.store.character_edits import change_character, create_character
from gateway.store.database import Database
from gateway.store.editing import Editor, TextCheck, edit
from gateway.store.model_edits import (
    change_assignment,
    change_model,
    change_provider,
    create_assignment,
    create_model,
    create_provider,
    remove_assignment,
)
from gateway.store.portable import KEYS, Document, Entry, entry_key, export_document
from gateway.store.rows import version_value
from gateway.store.rule_edits import (
    change_negative,
    change_parameters,
    change_rule,
    create_negative,
    create_parameters,
    create_rule,
    remove_negative,
    remove_rule,
)
from gateway.store.tables import (
    api_models,
    llm_models,
    model_parameters,
    negative_prompts,
    prompt_rules,
    providers,
    templates,
)
from gateway.store.template_edits import change_template, insert_version, point, set_label
from gateway.store.versions import stored_versions
from gateway.values.rows import CharacterLora
from gateway.values.seeds import (
    SeedAssignment,
    SeedCharacter,
    SeedModel,
    SeedNegative,
    SeedParameters,
    SeedProvider,
    SeedRule,
)

S = TypeVar("S")

# Whose rows of one priority follow each other by id, and what makes rows neighbours.
ORDERED: Mapping[str, tuple[str, ...]] = {
    "rules": ("priority",),
    "negatives": ("target_model", "content_mode", "generation_mode", "priority"),
    "assignments": ("modality", "task", "priority"),
}
TABLES = {
    "providers": providers,
    "models": llm_models,
    "rules": prompt_rules,
    "parameters": model_parameters,
    "negatives": negative_prompts,
    "assignments": api_models,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One row that an import adds or changes, with what was and what comes."""

    part: str
    key: str
    action: str  # add | change | reorder
    values: Mapping[str, tuple[Any, Any]]  # before and after, by column

    def lines(self) -> list[str]:
        sign = {"add": "+", "change": "~", "reorder": "↕"}[self.action]
        found = [f"{sign} {self.part}/{self.key}"]
        if self.action != "change":
            return found
        for name, (before, after) in sorted(self.values.items()):
            if isinstance(before, str) and isinstance(after, str) and "\n" in before + after:
                found.append(f"    {name}:")
                compared = difflib.ndiff(before.splitlines(), after.splitlines())
                found += [f"      {line}" for line in compared if line[:1] in "+-"]
            else:
                found.append(f"    {name}: {_shown(before)} → {_shown(after)}")
        return found


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has done, or would do."""

    changes: tuple[Change, ...]
    only_here: tuple[str, ...]  # rows that the document does not have; they stay
    revision: int | None  # None: a dry run
    snapshot_hash: str  # afterwards
    is_exact: bool  # the database then says what the document says, no more and no less

    def text(self) -> str:
        """For a person: a line for each row, and below it what differs."""
        lines = [line for change in self.changes for line in change.lines()]
        lines += [f"= {one} is only here and stays" for one in self.only_here]
        return "\n".join(lines) if lines else "nothing differs"


class _Undo(Exception):
    """Ends a dry run's transaction; never leaves this module."""


def import_document(
    database: Database,
    document: Document,
    *,
    actor: str,
    dry_run: bool = False,
    expected_revision: int | None = None,
    check_text: TextCheck | None = None,
) -> Imported:
    """Write what the document says, in one transaction, with one audit row.

    A dry run writes as well, so that every rule of the schema is tried, and takes all back.
    Raises Conflict, Invalid.
    """
    result: Imported | None = None
    try:
        with edit(
            database, actor=actor, expected_revision=expected_revision, check_text=check_text
        ) as editor:
            current = export_document(editor.connection)
            with editor.as_one("import", "configuration") as detail:
                changes = _write(editor, document, current)
                detail["changes"] = [f"{one.action} {one.part}/{one.key}" for one in changes]
            after = export_document(editor.connection)["snapshot_hash"]
            result = Imported(
                changes=changes,
                only_here=_only(current, document),
                revision=None,
                snapshot_hash=after,
                is_exact=after == document.get("snapshot_hash"),
            )
            if dry_run:
                if database.is_postgres:
                    editor.connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
                editor.finish()
                raise _Undo
    except _Undo:
        return result  # type: ignore[return-value]  # set before _Undo is raised
    return Imported(
        result.changes, result.only_here, editor.revision, result.snapshot_hash, result.is_exact
    )


def _only(current: Document, document: Document) -> tuple[str, ...]:
    named = {part: {entry_key(part, one) for one in document[part]} for part in KEYS}
    return tuple(
        f"{part}/{_name(key)}"
        for part in KEYS
        for one in current[part]
        if (key := entry_key(part, one)) not in named[part]
    )


def _write(editor: Editor, document: Document, current: Document) -> tuple[Change, ...]:
    changes: list[Change] = []
    for part in KEYS:  # in the order in which they refer to each other
        have = {entry_key(part, one): one for one in current[part]}
        if part == "templates":
            _step_aside(editor, document[part], have)
        for entry in document[part]:
            key = entry_key(part, entry)
            old = have.get(key)
            if old is None:
                _CREATE[part](editor, entry)
                changes.append(Change(part, _name(key), "add", {}))
            elif differing := _differing(part, old, entry):
                wanted = entry if part == "templates" else {one: entry[one] for one in differing}
                _CHANGE[part](editor, old, wanted)
                changes.append(
                    Change(
                        part,
                        _name(key),
                        "change",
                        {name: (old.get(name), entry[name]) for name in differing},
                    )
                )
        if part in ORDERED:
            changes += _reorder(editor, part, document[part])
    return tuple(changes)


def _differing(part: str, old: Entry, new: Entry) -> list[str]:
    """Columns that the document names and that are not so. What it does not name stays."""
    found = []
    for name, after in new.items():
        before = old.get(name)
        if part == "rules" and name == "tags" and isinstance(after, list):
            before, after = sorted(before or []), sorted(set(map(str, after)))
        if part == "templates" and name == "versions":
            known = {_text_hash(one) for one in old["versions"]}
            if all(_text_hash(one) in known for one in _versions(new)):
                continue
        elif part == "templates" and name == "live_version":
            # Numbers differ between databases; the text is what counts.
            if _text_hash(_numbered(old, before)) == _text_hash(_numbered(new, after)):
                continue
        elif part == "templates" and name == "labels":
            if _labelled(new).items() <= _labelled(old).items():
                continue
        elif _same(before, after):
            continue
        found.append(name)
    return found


def _same(before: Any, after: Any) -> bool:
    try:
        return canonical_json(before) == canonical_json(after)
    except ValueError:
        return False  # it is refused when it is written


# --- templates --------------------------------------------------------------------------------

OWN = ("target_model", "job_type", "use_case", "content_mode", "description", "is_active")
TEMPLATE_KEYS = {"template_name", *OWN, "live_version", "labels", "versions"}


def _step_aside(editor: Editor, entries: list[Entry], have: Mapping[Any, Entry]) -> None:
    """Switch off the templates whose tuple changes, so that two can trade theirs."""
    for entry in entries:
        old = have.get(entry_key("templates", entry))
        if old is not None and any(
            not _same(old[name], entry.get(name, old[name])) for name in OWN
        ):
            change_template(editor, _template_id(editor, entry), {"is_active": False})


def _create_template(editor: Editor, entry: Entry) -> None:
    _refuse_unknown("templates", entry, TEMPLATE_KEYS)
    template_id = editor.create(
        templates, {name: entry[name] for name in ("template_name", *OWN) if name in entry}
    )
    _write_versions(editor, template_id, entry)


def _change_template(editor: Editor, old: Entry, entry: Entry) -> None:
    _refuse_unknown("templates", entry, TEMPLATE_KEYS)
    template_id = _template_id(editor, old)
    change_template(editor, template_id, {name: entry.get(name, old[name]) for name in OWN})
    _write_versions(editor, template_id, entry)


def _write_versions(editor: Editor, template_id: int, entry: Entry) -> None:
    """Versions whose text is not there yet, then the pointers. Numbers that are taken move on."""
    present = {
        one.text.content_hash: one.text for one in stored_versions(editor.connection, template_id)
    }
    highest = max((one.version for one in present.values()), default=0)
    numbers: dict[int, tuple[int, int]] = {  # in the document → (id, number) here
        one.version: (one.id, one.version) for one in present.values()
    }
    for one in sorted(_versions(entry), key=lambda row: row["version"]):
        text_hash = _text_hash(one)
        if text_hash in present:
            version_id, number = present[text_hash].id, present[text_hash].version
        else:
            number = highest = max(one["version"], highest + 1) if highest else one["version"]
            version_id = insert_version(
                editor,
                template_id,
                number,
                {name: one[name] for name in VERSION_FIELDS},
                _text(one, "message"),
                created_by=_text(one, "created_by"),
                created_at=_time(one.get("created_at")),
            )
        numbers[one["version"]] = (version_id, number)
    try:
        if "live_version" in entry:
            point(editor, template_id, numbers[entry["live_version"]][0])
        for label, number in entry.get("labels", {}).items():
            set_label(editor, template_id, label, numbers[number][1])
    except (KeyError, TypeError, AttributeError) as exc:
        raise Invalid("live_version and labels of a template name versions of it") from exc


def _versions(entry: Entry) -> list[Entry]:
    versions = entry.get("versions", [])
    known = {"version", *VERSION_FIELDS, "message", "created_by", "created_at"}
    if not isinstance(versions, list):
        raise Invalid("versions of a template is a list")
    for one in versions:
        if not isinstance(one, dict) or type(one.get("version")) is not int:
            raise Invalid("a version of a template is an object with its number")
        _refuse_unknown("versions", one, known)
        missing = sorted(set(VERSION_FIELDS) - set(one))
        if missing:
            raise Invalid(f"a version of a template lacks {', '.join(missing)}")
    return versions


def _numbered(entry: Entry, number: Any) -> Entry:
    for one in _versions(entry):
        if one["version"] == number:
            return one
    raise Invalid("live_version and labels of a template name versions of it")


def _labelled(entry: Entry) -> dict[str, str]:
    labels = entry.get("labels", {})
    if not isinstance(labels, dict):
        raise Invalid("labels of a template is an object")
    return {label: _text_hash(_numbered(entry, number)) for label, number in labels.items()}


def _text_hash(version: Entry) -> str:
    if not isinstance(version["variables"], list | tuple):
        raise Invalid("variables of a version is a list")
    try:
        return version_hash(version_value({**version, "id": 0}))
    except ValueError as exc:
        raise Invalid("a version of a template has a value that JSON cannot hold") from exc


def _template_id(editor: Editor, entry: Entry) -> int:
    found: int = editor.connection.execute(
        select(templates.c.id).where(templates.c.template_name == entry["template_name"])
    ).scalar_one()
    return found


# --- the other parts --------------------------------------------------------------------------


def _create_provider(editor: Editor, entry: Entry) -> None:
    create_provider(editor, _seed(SeedProvider, "providers", entry))


def _create_model(editor: Editor, entry: Entry) -> None:
    own = {name: one for name, one in entry.items() if name != "missing_since"}
    missing = entry.get("missing_since")
    create_model(
        editor,
        _seed(SeedModel, "models", own),
        missing_since=None if missing is None else _time(missing),
    )


def _change_model(editor: Editor, old: Entry, values: Entry) -> None:
    columns = dict(values)
    if "provider" in columns:
        columns["provider_id"] = _id(editor, "providers", {"name": columns.pop("provider")})
    if columns.get("missing_since") is not None:
        columns["missing_since"] = _time(columns["missing_since"])
    change_model(editor, _id(editor, "models", old), columns)


def _create_character(editor: Editor, entry: Entry) -> None:
    own = {name: one for name, one in entry.items() if name != "owner_id"}
    loras = _loras(own.pop("loras", []))
    seeded = _seed(SeedCharacter, "characters", {**own, "loras": loras})
    create_character(editor, seeded, owner_id=entry.get("owner_id"))


def _change_character(editor: Editor, old: Entry, values: Entry) -> None:
    columns = dict(values)
    if "loras" in columns:
        columns["loras"] = _loras(columns["loras"])
    change_character(editor, old["id"], columns, as_user=None)


def _loras(entries: Any) -> tuple[CharacterLora, ...]:
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise Invalid("loras of a character is a list of objects")
    return tuple(_seed(CharacterLora, "loras", one) for one in entries)


def _create_rule(editor: Editor, entry: Entry) -> None:
    create_rule(editor, _seed(SeedRule, "rules", entry))


def _create_parameters(editor: Editor, entry: Entry) -> None:
    create_parameters(editor, _seed(SeedParameters, "parameters", entry))


def _create_negative(editor: Editor, entry: Entry) -> None:
    create_negative(editor, _seed(SeedNegative, "negatives", entry))


def _create_assignment(editor: Editor, entry: Entry) -> None:
    create_assignment(editor, _seed(SeedAssignment, "assignments", entry))


def _by_id(
    part: str, change: Callable[[Editor, int, Mapping[str, Any]], bool]
) -> Callable[[Editor, Entry, Entry], None]:
    def run(editor: Editor, old: Entry, values: Entry) -> None:
        change(editor, _id(editor, part, old), values)

    return run


_CREATE: Mapping[str, Callable[[Editor, Entry], None]] = {
    "providers": _create_provider,
    "models": _create_model,
    "characters": _create_character,
    "templates": _create_template,
    "rules": _create_rule,
    "parameters": _create_parameters,
    "negatives": _create_negative,
    "assignments": _create_assignment,
}
_CHANGE: Mapping[str, Callable[[Editor, Entry, Entry], None]] = {
    "providers": _by_id("providers", change_provider),
    "models": _change_model,
    "characters": _change_character,
    "templates": _change_template,
    "rules": _by_id("rules", change_rule),
    "parameters": _by_id("parameters", change_parameters),
    "negatives": _by_id("negatives", change_negative),
    "assignments": _by_id("assignments", change_assignment),
}
_REMOVE: Mapping[str, Callable[[Editor, int], None]] = {
    "rules": remove_rule,
    "negatives": remove_negative,
    "assignments": remove_assignment,
}


def _reorder(editor: Editor, part: str, entries: list[Entry]) -> list[Change]:
    """Make rows of one priority anew where they do not follow each other as in the document."""
    now = export_document(editor.connection)[part]
    have = {entry_key(part, one): place for place, one in enumerate(now)}
    whole = {entry_key(part, one): one for one in now}
    groups: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for entry in entries:
        key = entry_key(part, entry)
        # A default comes first whatever its id is.
        if not whole[key].get("is_default"):
            near = [whole[key][name] for name in ORDERED[part]]
            groups[canonical_json(near).decode()].append(key)
    changes = []
    for keys in groups.values():
        if [have[key] for key in keys] == sorted(have[key] for key in keys):
            continue
        for key in keys:
            _REMOVE[part](editor, _id(editor, part, whole[key]))
        for key in keys:
            _CREATE[part](editor, whole[key])
            changes.append(Change(part, _name(key), "reorder", {}))
    return changes


def _id(editor: Editor, part: str, entry: Entry) -> int:
    table = TABLES[part]
    found = editor.connection.execute(
        select(table.c.id).where(*(table.c[name] == entry[name] for name in KEYS[part]))
    ).scalar_one_or_none()
    if found is None:
        raise Invalid(f"{part} has no row that the document refers to")
    return int(found)


def _seed(kind: type[S], part: str, entry: Entry) -> S:
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(part, entry, known)
    try:
        return kind(
            **{name: tuple(one) if isinstance(one, list) else one for name, one in entry.items()}
        )
    except TypeError as exc:
        raise Invalid(f"an entry of {part} is not complete") from exc


def _refuse_unknown(part: str, entry: Entry, known: set[str]) -> None:
    unknown = sorted(set(entry) - known)
    if unknown:
        raise Invalid(f"an entry of {part} has unknown keys: {', '.join(unknown)}")


def _text(entry: Entry, name: str) -> str:
    value = entry.get(name, "")
    if not isinstance(value, str):
        raise Invalid(f"{name} is text")
    return value


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError) as exc:
        raise Invalid("a time of the document is not ISO 8601") from exc
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def _name(key: tuple[str, ...]) -> str:
    return "/".join(one if len(one) <= 60 else one[:57] + "…" for one in key)


def _shown(value: Any) -> str:
    return canonical_json(value).decode()

"""The configuration as one JSON document, the same bytes from whichever database holds it.

It has names instead of ids, all versions of the templates with their authors and times, and
characters with their owners' ids; no users, keys, secrets, logs or conversations. Where rows of
one priority follow each other by id, the order in the document stands for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select

from gateway.errors import Invalid
from gateway.store.canonical import VERSION_FIELDS, canonical_json
from gateway.store.loading import load_snapshot
from gateway.store.rows import row_of
from gateway.store.tables import template_labels, template_versions
from gateway.store.versions import stored_versions
from gateway.values.rows import Snapshot, Template

FORMAT = "gateway-configuration"
FORMAT_VERSION = 1

# The columns that name a row, by part of the document.
KEYS: Mapping[str, tuple[str, ...]] = {
    "providers": ("name",),
    "models": ("model_key",),
    "characters": ("id",),
    "templates": ("template_name",),
    "rules": ("name",),
    "parameters": ("model_key", "job_type", "profile", "user_tier", "character_id"),
    "negatives": ("target_model", "content_mode", "generation_mode", "negative_prompt"),
    "assignments": ("modality", "task", "model_key"),
}

Entry = dict[str, Any]
Document = dict[str, Any]


def export_document(connection: Connection) -> Document:
    """The document of one consistent state: in a transaction of Database.reading() or of an edit.

    Raises BadRows.
    """
    snapshot = load_snapshot(connection)
    names = {one.id: one.name for one in snapshot.providers}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "snapshot_hash": snapshot.content_hash,
        "templates": [_template(connection, one) for one in snapshot.templates],
        "rules": [row_of(one, "id") for one in snapshot.rules],
        "providers": [row_of(one, "id") for one in snapshot.providers],
        "models": [
            {**row_of(one, "id", "provider_id"), "provider": names[one.provider_id]}
            for one in snapshot.models
        ],
        "assignments": [row_of(one, "id", "llm_model_id") for one in snapshot.assignments],
        "parameters": [row_of(one, "id") for one in snapshot.parameters],
        "characters": _characters(snapshot),
        "negatives": [row_of(one, "id") for one in snapshot.negatives],
    }


def _template(connection: Connection, template: Template) -> Entry:
    labels = connection.execute(
        select(template_labels.c.label, template_versions.c.version)
        .join(
            template_versions,
            (template_versions.c.id == template_labels.c.version_id)
            & (template_versions.c.template_id == template_labels.c.template_id),
        )
        .where(template_labels.c.template_id == template.id)
    )
    return {
        **row_of(template, "id", "live"),
        "live_version": template.live.version,
        "labels": {row.label: row.version for row in labels},
        "versions": [
            {
                "version": one.text.version,
                **{name: getattr(one.text, name) for name in VERSION_FIELDS},
                "message": one.message,
                "created_by": one.created_by,
                "created_at": one.created_at.isoformat(),
            }
            for one in stored_versions(connection, template.id)
        ],
    }


def _characters(snapshot: Snapshot) -> list[Entry]:
    return [
        {**row_of(one, "loras"), "loras": [row_of(lora) for lora in one.loras]}
        for one in snapshot.characters
    ]


def to_bytes(document: Document) -> bytes:
    """Keys sorted, two spaces, UTF-8, one line end: made for a person and for git."""
    plain = json.loads(canonical_json(document))
    return (json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def from_bytes(content: bytes) -> Document:
    """A document whose form is right; its rows are checked when they are written.

    Raises Invalid.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise Invalid("the document is not JSON") from exc
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Invalid(f"the document's format is not {FORMAT!r}")
    if document.get("format_version") != FORMAT_VERSION:
        raise Invalid(f"the document's format_version is not {FORMAT_VERSION}")
    unknown = sorted(set(document) - set(KEYS) - {"format", "format_version", "snapshot_hash"})
    if unknown:
        raise Invalid(f"the document has unknown parts: {', '.join(unknown)}")
    for part, keys in KEYS.items():
        entries = document.setdefault(part, [])
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise Invalid(f"{part} is a list of objects")
        seen = set()
        for number, entry in enumerate(entries):
            if not all(isinstance(entry.get(key), str) for key in keys):
                raise Invalid(f"{part}[{number}] needs {', '.join(keys)}")
            key = entry_key(part, entry)
            if key in seen:
                raise Invalid(f"{part}[{number}] is there twice")
            seen.add(key)
    return document


def entry_key(part: str, entry: Entry) -> tuple[str, ...]:
    return tuple(entry[name] for name in KEYS[part])

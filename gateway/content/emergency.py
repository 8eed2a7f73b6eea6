"""The configuration that comes with the package: seeds of an empty database, and what is served
when there is neither a database nor anything remembered of one.

emergency_prompts.json is what the seeds give, kept as a file so that nothing has to be computed, or
can go wrong, in an emergency; a test compares the two and writes the file again when it is told to
(tests/gateway/test_content_seeds.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gateway.content.terms import DATA, read_terms
from gateway.errors import ConfigError
from gateway.values.documents import row_of, table_of
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
    TemplateVersion,
)
from gateway.values.seeds import SeedAssignment, Seeds, SeedTemplate

EMERGENCY = "emergency_prompts.json"
FORMAT = 1  # of the file; raised when an older gateway could not read it
_OWN_FIELDS = ("template_name", "target_model", "job_type", "use_case", "content_mode",
               "description", "is_active")  # fmt: skip


def load_seeds() -> Seeds:
    """What an empty database is filled with. Raises ConfigError."""
    table = read_terms("seed.toml")
    try:
        return row_of(Seeds, table)
    except ValueError as exc:
        raise ConfigError(f"{DATA / 'seed.toml'}: {exc}") from exc


def load_emergency() -> Snapshot:
    """The configuration of the package, as revision 0. Raises ConfigError where the file was
    changed or cut off, so that a broken package is noticed at start and not in the emergency."""
    path = DATA / EMERGENCY
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, and {FORMAT} is read")
        if document["sha256"] != _sha256(document["snapshot"]):
            raise ValueError("its SHA-256 is not that of its content")
        return row_of(Snapshot, document["snapshot"])
    except (OSError, KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be used: {exc}; install the package again") from exc


def emergency_text(snapshot: Snapshot) -> str:
    """The file of a snapshot."""
    body = table_of(snapshot)
    document = {"format": FORMAT, "sha256": _sha256(body), "snapshot": body}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def snapshot_of(
    seeds: Seeds,
    version_hash: Callable[[TemplateVersion], str],
    snapshot_hash: Callable[[Snapshot], str],
) -> Snapshot:
    """The seeds as a snapshot of revision 0, all ids from 1 in the order of the seeds. The hashes
    are the store's (gateway/store/canonical.py), which this layer may not import.

    The enhancement default is our own worker's model of the highest priority: a provider may want
    a key, and whether there is one is not known here.
    """
    numbers = {one.name: number for number, one in enumerate(seeds.providers, 1)}
    models = [
        LlmModel(id=number, provider_id=numbers[one.provider], **_fields(one, "provider"))
        for number, one in enumerate(seeds.models, 1)
    ]
    ids = {one.model_key: one.id for one in models}
    templates = [
        _template(number, one, version_hash) for number, one in enumerate(seeds.templates, 1)
    ]
    assignments = [
        Assignment(id=number, llm_model_id=ids[one.model_key], **_fields(one))
        for number, one in enumerate(_with_default(seeds), 1)
    ]
    providers = [Provider(id=numbers[one.name], **_fields(one)) for one in seeds.providers]
    rules = [Rule(id=number, **_fields(one)) for number, one in enumerate(seeds.rules, 1)]
    parameters = [
        ParameterSet(id=number, **_fields(one)) for number, one in enumerate(seeds.parameters, 1)
    ]
    negatives = [
        NegativePrompt(id=number, **_fields(one)) for number, one in enumerate(seeds.negatives, 1)
    ]
    characters = [Character(**_fields(one)) for one in seeds.characters]
    # In the order in which the store loads them, so that a database that was just seeded has the
    # same hash.
    snapshot = Snapshot(
        revision=0,
        templates=tuple(sorted(templates, key=lambda one: one.template_name)),
        rules=tuple(sorted(rules, key=lambda one: (one.priority, one.id))),
        providers=tuple(sorted(providers, key=lambda one: one.name)),
        models=tuple(sorted(models, key=lambda one: (one.display_order, one.model_key))),
        assignments=tuple(sorted(assignments, key=_assignment_order)),
        parameters=tuple(sorted(parameters, key=_parameters_order)),
        characters=tuple(sorted(characters, key=lambda one: one.id)),
        negatives=tuple(sorted(negatives, key=_negative_order)),
    )
    return replace(snapshot, content_hash=snapshot_hash(snapshot))


def _assignment_order(one: Assignment) -> tuple[str, str, bool, int, int]:
    return (one.modality, one.task, not one.is_default, -one.priority, one.id)


def _parameters_order(one: ParameterSet) -> tuple[str, str, str, str, str]:
    return (one.model_key, one.job_type, one.profile, one.user_tier, one.character_id)


def _negative_order(one: NegativePrompt) -> tuple[str, str, str, int, int]:
    return (one.target_model, one.content_mode, one.generation_mode, -one.priority, one.id)


def _template(
    number: int, seed: SeedTemplate, version_hash: Callable[[TemplateVersion], str]
) -> Template:
    fields = _fields(seed)
    own = {name: fields.pop(name) for name in _OWN_FIELDS}
    version = TemplateVersion(id=number, version=1, **fields)
    return Template(id=number, live=replace(version, content_hash=version_hash(version)), **own)


def _with_default(seeds: Seeds) -> tuple[SeedAssignment, ...]:
    workers = {one.name for one in seeds.providers if one.kind == "worker"}
    own = {one.model_key for one in seeds.models if one.provider in workers}
    enhancing = [
        one
        for one in seeds.assignments
        if (one.modality, one.task) == ("chat", "enhancement") and one.is_active
    ]
    chosen = max(
        (one for one in enhancing if one.model_key in own),
        key=lambda one: one.priority,
        default=None,
    )
    return tuple(
        replace(one, is_default=one is chosen) if one in enhancing else one
        for one in seeds.assignments
    )


def _fields(value: Any, *without: str) -> dict[str, Any]:
    return {
        name: getattr(value, name) for name in value.__dataclass_fields__ if name not in without
    }


def _sha256(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

"""Filling an empty database, once, whichever replica comes first."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection, select

from gateway.errors import ConfigError
from gateway.store.character_edits import create_character
from gateway.store.database import Database
from gateway.store.editing import edit
from gateway.store.model_edits import create_assignment, create_model, create_provider
from gateway.store.rule_edits import create_negative, create_parameters, create_rule
from gateway.store.tables import CONFIGURATION
from gateway.store.template_edits import create_template
from gateway.values.seeds import SeedAssignment, Seeds

ACTOR = "seed"
ENHANCEMENT = ("chat", "enhancement")


def seed(
    database: Database, seeds: Seeds, default_model: str, provider_keys: frozenset[str]
) -> bool:
    """Fill the database if its configuration is empty; whether it was. One transaction.

    default_model: the enhancement default, unless `seeds.preferred` is of a provider whose key is
    configured. provider_keys: names of the environment variables that are set, or of providers
    that have a key. Raises ConfigError where the default has no enhancement assignment.
    """
    assignments = _assignments(seeds, default_model, provider_keys)
    with database.reading() as connection:
        if not is_empty(connection):
            return False
    with edit(database, actor=ACTOR) as editor:
        # Another replica may have been here since; from now on none can.
        if not is_empty(editor.connection):
            return False
        with editor.as_one("seed", "configuration") as detail:
            for provider in seeds.providers:
                create_provider(editor, provider)
            for model in seeds.models:
                create_model(editor, model)
            for assignment in assignments:
                create_assignment(editor, assignment)
            for template in seeds.templates:
                create_template(editor, template, "first version")
            for rule in seeds.rules:
                create_rule(editor, rule)
            for parameters in seeds.parameters:
                create_parameters(editor, parameters)
            for character in seeds.characters:
                create_character(editor, character, owner_id=None)
            for negative in seeds.negatives:
                create_negative(editor, negative)
            detail.update(templates=len(seeds.templates), rules=len(seeds.rules))
    return True


def is_empty(connection: Connection) -> bool:
    """Whether no configuration table has a row."""
    return all(
        connection.execute(select(table.primary_key.columns[0]).limit(1)).first() is None
        for table in CONFIGURATION
    )


def _assignments(
    seeds: Seeds, default_model: str, provider_keys: frozenset[str]
) -> tuple[SeedAssignment, ...]:
    """The assignments with the enhancement default decided; unchanged where there are none."""
    mine = [one for one in seeds.assignments if (one.modality, one.task) == ENHANCEMENT]
    if not mine:
        return seeds.assignments
    chosen = default_model
    if seeds.preferred is not None and _has_key(seeds, seeds.preferred, provider_keys):
        chosen = seeds.preferred
    if chosen not in {one.model_key for one in mine}:
        known = ", ".join(sorted(one.model_key for one in mine))
        raise ConfigError(f"default_model {chosen!r} has no enhancement assignment: {known} have")
    return tuple(
        replace(
            one,
            is_default=one.model_key == chosen,
            is_active=one.is_active or one.model_key == chosen,
        )
        if (one.modality, one.task) == ENHANCEMENT
        else one
        for one in seeds.assignments
    )


def _has_key(seeds: Seeds, model_key: str, provider_keys: frozenset[str]) -> bool:
    names = {one.provider for one in seeds.models if one.model_key == model_key}
    return any(
        one.name in names and (one.name in provider_keys or one.secret_ref in provider_keys)
        for one in seeds.providers
    )

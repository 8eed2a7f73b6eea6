"""Edits of rules, parameters and negative prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import delete, insert, select

from gateway.errors import Invalid
from gateway.store.editing import Editor
from gateway.store.fields import check
from gateway.store.rows import row_of
from gateway.store.tables import (
    model_parameters,
    negative_prompts,
    prompt_rule_tags,
    prompt_rules,
)
from gateway.values.seeds import SeedNegative, SeedParameters, SeedRule


def create_rule(editor: Editor, rule: SeedRule) -> int:
    """A rule with its tags; its id. Raises Conflict, Invalid."""
    editor.check_text(rule.body)
    rule_id: int = editor.create(prompt_rules, row_of(rule, "tags"))
    _set_tags(editor, rule_id, rule.tags)
    return rule_id


def change_rule(editor: Editor, rule_id: int, values: Mapping[str, Any]) -> bool:
    """Change columns, and all tags where `values` has "tags"; False where they are so."""
    columns = {name: one for name, one in values.items() if name != "tags"}
    if isinstance(columns.get("body"), str):
        editor.check_text(columns["body"])
    changed = editor.change(prompt_rules, rule_id, columns)
    if "tags" in values:
        return _set_tags(editor, rule_id, values["tags"]) or changed
    return changed


def remove_rule(editor: Editor, rule_id: int) -> None:
    editor.remove(prompt_rules, rule_id)


def _set_tags(editor: Editor, rule_id: int, tags: Iterable[str]) -> bool:
    if isinstance(tags, str):
        raise Invalid("tags is a list of strings")
    wanted = set(tags)
    try:
        for tag in wanted:
            check(prompt_rule_tags.c.tag, tag)
    except ValueError as exc:
        raise Invalid(f"prompt_rules: {exc}") from exc
    mine = prompt_rule_tags.c.rule_id == rule_id
    present = set(editor.connection.execute(select(prompt_rule_tags.c.tag).where(mine)).scalars())
    if wanted == present:
        return False
    if gone := present - wanted:
        editor.connection.execute(
            delete(prompt_rule_tags).where(mine, prompt_rule_tags.c.tag.in_(gone))
        )
    if new := sorted(wanted - present):
        editor.connection.execute(
            insert(prompt_rule_tags), [{"rule_id": rule_id, "tag": tag} for tag in new]
        )
    editor.audit(
        "tags", f"prompt_rules/{rule_id}", {"before": sorted(present), "after": sorted(wanted)}
    )
    return True


def create_parameters(editor: Editor, parameters: SeedParameters) -> int:
    parameters_id: int = editor.create(model_parameters, row_of(parameters))
    return parameters_id


def change_parameters(editor: Editor, parameters_id: int, values: Mapping[str, Any]) -> bool:
    return editor.change(model_parameters, parameters_id, values)


def remove_parameters(editor: Editor, parameters_id: int) -> None:
    editor.remove(model_parameters, parameters_id)


def create_negative(editor: Editor, negative: SeedNegative) -> int:
    negative_id: int = editor.create(negative_prompts, row_of(negative))
    return negative_id


def change_negative(editor: Editor, negative_id: int, values: Mapping[str, Any]) -> bool:
    return editor.change(negative_prompts, negative_id, values)


def remove_negative(editor: Editor, negative_id: int) -> None:
    editor.remove(negative_prompts, negative_id)

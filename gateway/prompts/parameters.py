"""Sampling parameters: merged from the least to the most specific, each with its origin.

Weakest first:

1. a chat worker's defaults (origin "contract");
2. the template version: max_output_tokens as `max_tokens`, then its params;
3. rows that name no character, by how specific they are;
4. the character's own defaults, those of SAMPLING;
5. rows that name the character, by how specific they are;
6. what the request gave.

A row is more specific than another by the first of user tier, model, job type and profile that it
names and the other does not; equal ones by id, the larger id wins. A value of None says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import Invalid
from gateway.values.assembly import AssembleRequest, Step, Value
from gateway.values.rows import ANY, Character, ParameterSet, Snapshot, Template

# What a chat worker does where nothing is said. Absent means off for all others.
CONTRACT: Mapping[str, Any] = {"temperature": 0.7, "top_p": 0.9}
# What of a character's defaults is sampling; the rest is for pictures.
SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "stop",
        "seed",
    }
)


def rows_for(snapshot: Snapshot, request: AssembleRequest, model_key: str) -> list[ParameterSet]:
    """Rows that apply, weakest first. model_key: the first model of the chain, "" for none."""
    wanted = (
        request.character_id or "",
        request.user_tier,
        model_key,
        request.job_type,
        request.quality,
    )
    found = [
        row
        for row in snapshot.parameters
        if all(own in (ANY, value) for own, value in zip(_key(row), wanted, strict=True))
    ]
    found.sort(key=lambda row: (*(own != ANY for own in _key(row)), row.id))
    return found


def merge(
    snapshot: Snapshot,
    request: AssembleRequest,
    template: Template,
    character: Character | None,
    model_key: str,
) -> tuple[dict[str, Value], Step]:
    """Every parameter in effect. character: None also where it is withheld.

    `max_tokens` is always there, a whole number from 1. Raises Invalid where one that was given is
    no whole number.
    """
    merged = {name: Value(value=value, origin="contract") for name, value in CONTRACT.items()}
    origin = f"template {template.template_name} v{template.live.version}"
    _put(merged, {"max_tokens": template.live.max_output_tokens}, origin)
    _put(merged, template.live.params, origin)
    rows = rows_for(snapshot, request, model_key)
    for row in rows:
        if row.character_id == ANY:
            _put(merged, row.params, f"parameters {row.id}")
    if character is not None:
        own = {name: one for name, one in character.defaults.items() if name in SAMPLING}
        _put(merged, own, f"character {character.id}")
    for row in rows:
        if row.character_id != ANY:
            _put(merged, row.params, f"parameters {row.id}")
    _put(merged, request.params, "request")
    given = merged["max_tokens"]
    tokens = _whole(given)
    if tokens < 1:
        merged["max_tokens"] = Value(value=1, origin=f"{given.origin}, raised to 1")
    else:
        merged["max_tokens"] = Value(value=tokens, origin=given.origin)
    step = Step(
        step="parameters",
        outcome="merged",
        why=f"{len(rows)} rows apply",
        detail={
            "origins": {name: one.origin for name, one in sorted(merged.items())},
            "rows": [row.id for row in rows],
        },
    )
    return merged, step


def _key(row: ParameterSet) -> tuple[str, str, str, str, str]:
    return (row.character_id, row.user_tier, row.model_key, row.job_type, row.profile)


def _put(merged: dict[str, Value], params: Mapping[str, Any], origin: str) -> None:
    for name, value in params.items():
        if value is not None:
            merged[name] = Value(value=value, origin=origin)


def _whole(given: Value) -> int:
    value = given.value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Invalid(f"max_tokens of {given.origin} is no whole number; give one from 1")
    return value

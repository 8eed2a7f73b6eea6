"""One spelling of a JSON value, and the hashes that are made from it.

Numbers are spelled by value: 1.0 is 1, since a jsonb column gives 10^22 back as an integer where
SQLite gives a float, and the same configuration has to have one hash on both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

from gateway.values.rows import Snapshot


class VersionText(Protocol):
    """What the hash of a template version covers: a TemplateVersion or a SeedTemplate."""

    @property
    def system_prompt(self) -> str: ...
    @property
    def user_template(self) -> str: ...
    @property
    def negative_prompt(self) -> str: ...
    @property
    def variables(self) -> tuple[str, ...]: ...
    @property
    def max_output_tokens(self) -> int: ...
    @property
    def target_token_limit(self) -> int | None: ...
    @property
    def hard_token_limit(self) -> int | None: ...
    @property
    def target_tokenizer(self) -> str | None: ...
    @property
    def params(self) -> Mapping[str, Any]: ...


VERSION_FIELDS = (
    "system_prompt",
    "user_template",
    "negative_prompt",
    "variables",
    "max_output_tokens",
    "target_token_limit",
    "hard_token_limit",
    "target_tokenizer",
    "params",
)


def canonical_json(value: Any) -> bytes:
    """UTF-8, keys sorted by code point, no spaces, nothing escaped that need not be.

    Raises ValueError for what has no JSON: NaN, infinities, keys that are no strings, lone
    surrogates, other types.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a JSON object has only strings as keys")
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    raise ValueError(f"{type(value).__name__} is no JSON value")


def sha256_hex(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def version_hash(version: VersionText) -> str:
    """SHA-256 (hex) of a version's content, without its id, number, author and time."""
    return sha256_hex({name: getattr(version, name) for name in VERSION_FIELDS})


def snapshot_hash(snapshot: Snapshot) -> str:
    """SHA-256 (hex) of everything that an assembly can depend on, but no ids and no revision.

    Ids differ between databases that say the same, so references are names. Where ids break a tie
    (rules of one priority) the order of the rows stands for them: it is part of the hash.
    """
    providers = {one.id: one.name for one in snapshot.providers}
    return sha256_hex(
        {
            "templates": _by(
                "template_name",
                [
                    {
                        **_fields(one, "id", "live"),
                        "live": _fields(one.live, "id", "content_hash"),
                    }
                    for one in snapshot.templates
                ],
            ),
            "rules": [_fields(one, "id") for one in snapshot.rules],
            "providers": _by("name", [_fields(one, "id") for one in snapshot.providers]),
            "models": _by(
                "model_key",
                [
                    {**_fields(one, "id", "provider_id"), "provider": providers[one.provider_id]}
                    for one in snapshot.models
                ],
            ),
            "assignments": [_fields(one, "id", "llm_model_id") for one in snapshot.assignments],
            "parameters": sorted(
                (_fields(one, "id") for one in snapshot.parameters), key=canonical_json
            ),
            "characters": _by(
                "id",
                [
                    {**_fields(one), "loras": [_fields(lora) for lora in one.loras]}
                    for one in snapshot.characters
                ],
            ),
            "negatives": [_fields(one, "id") for one in snapshot.negatives],
        }
    )


def _fields(value: Any, *without: str) -> dict[str, Any]:
    return {
        name: getattr(value, name) for name in value.__dataclass_fields__ if name not in without
    }


def _by(key: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(row[key]))

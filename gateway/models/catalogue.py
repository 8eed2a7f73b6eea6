"""The answer of `GET /api/llms`: which models exist, and which one is the default."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.models.assignments import default_key
from gateway.values.rows import LlmModel, Provider, Snapshot

MATCHA = "matcha"  # the provider whose external ids are matcha_llm_id


def catalogue_body(
    snapshot: Snapshot,
    last_synced: datetime | None,
    *,
    modality: str = "chat",
    task: str = "enhancement",
    only_active: bool = False,
) -> dict[str, Any]:
    """`{models, defaultModel, count, lastSynced}`, by display order, then name, then id.

    modality, task: whose default is the default. only_active: without models, or models of
    providers, that are switched off. last_synced: gateway/models/refresh.py.
    """
    providers = {provider.id: provider for provider in snapshot.providers}
    default = default_key(snapshot, modality, task)
    models = [
        _model(model, providers.get(model.provider_id), default)
        for model in sorted(
            snapshot.models, key=lambda one: (one.display_order, one.model_name, one.id)
        )
    ]
    if only_active:
        models = [model for model in models if model["is_active"]]
    return {
        "models": models,
        "defaultModel": default,
        "count": len(models),
        "lastSynced": last_synced.astimezone(UTC).isoformat() if last_synced else None,
    }


def matcha_llm_id(model: LlmModel, provider: Provider | None) -> int | None:
    """The external id as a number, of provider matcha."""
    digits = model.external_id
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= 18
    return int(digits) if provider and provider.name == MATCHA and is_number else None


def _model(model: LlmModel, provider: Provider | None, default: str | None) -> dict[str, Any]:
    return {
        "id": model.id,
        "matcha_llm_id": matcha_llm_id(model, provider),
        "model_name": model.model_name,
        "model_key": model.model_key,
        "provider": provider.name if provider else None,
        "capabilities": dict(model.capabilities),
        "is_active": model.is_active and provider is not None and provider.is_active,
        "is_default": model.model_key == default,
        "display_order": model.display_order,
        "missing_since": model.missing_since,
    }

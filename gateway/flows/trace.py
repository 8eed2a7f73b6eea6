"""The trace of an answer as JSON: why exactly this was sent, who answered, what was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.cache.holder import Held
from gateway.models.runner import Answer
from gateway.values.assembly import Assembled, Step


def steps_json(steps: Sequence[Step]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for one in steps:
        step: dict[str, Any] = {"step": one.step, "outcome": one.outcome}
        if one.why:
            step["why"] = one.why
        if one.detail:
            step["detail"] = dict(one.detail)
        shown.append(step)
    return shown


def held_json(held: Held) -> dict[str, Any]:
    return {
        "config_revision": held.snapshot.revision,
        "fallback_level": held.level,
        "snapshot_age_ms": None if held.age_ms is None else round(held.age_ms, 3),
    }


def assembled_json(assembled: Assembled) -> dict[str, Any]:
    live = assembled.template.live
    return {
        "template": {
            "name": assembled.template.template_name,
            "version": live.version,
            "content_hash": live.content_hash,
        },
        "content_mode": assembled.content_mode,
        "mode_source": assembled.mode_source,
        "rule_ids": list(assembled.rule_ids),
        "character_id": assembled.character.id if assembled.character else None,
        "params": {
            name: {"value": one.value, "from": one.origin} for name, one in assembled.params.items()
        },
        "prompt_tokens": assembled.prompt_tokens,
        "prompt_tokens_exact": assembled.tokens_exact,
        "messages_sha256": assembled.messages_sha256,
    }


def answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "model": answer.model_key,
        "model_source": answer.source,
        "served_model": answer.served_model,
        "provider": answer.provider,
        "worker_url": answer.worker_url,
        "fallback": answer.fallback,
        "attempts": [attempt.to_json() for attempt in answer.attempts],
        "unsupported": list(answer.unsupported),
        "finish_reason": answer.finish_reason,
        "completion_tokens": answer.completion_tokens,
        "flags": list(answer.flags),
        "attestation": _attestation(answer),
        "worker_attempts": [one.to_json() for one in answer.worker_attempts],
        "receipt": answer.receipt,
    }


def _attestation(answer: Answer) -> dict[str, Any] | None:
    """Whether the worker's receipt matches what was sent; None: providers give no receipt."""
    if answer.attestation is None:
        return None
    return {"ok": answer.attestation.ok, "mismatches": list(answer.attestation.codes)}


def trace_json(
    held: Held,
    assembled: Assembled,
    answers: Sequence[Answer] = (),
    more: Sequence[Step] = (),
    flags: Sequence[str] = (),
) -> Mapping[str, Any]:
    """The whole. answers: of the models that were asked, in order. more: steps after them."""
    return {
        **held_json(held),
        **assembled_json(assembled),
        "flags": list(flags),
        "steps": steps_json([*assembled.trace, *more]),
        "models": [answer_json(one) for one in answers],
    }

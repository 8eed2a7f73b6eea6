"""The models that may answer, in the order they are to be asked. Never one of another task.

1. what the caller chose, if it is assigned to the (modality, task) and can be asked;
2. the default of the (modality, task);
3. its other active assignments, higher priority first, then id;
4. the last resort: active assignments of the modality to the task `*`, the default one first. The
   emergency file carries such a row, and a database may: `*` says on purpose "any task".

A choice that cannot be met is skipped with its reason and the chain goes on, so a caller that wants
no other model compares models[0].model_key with its choice. A request with the task "" wants no
language model: its chain is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.errors import ModelNotAllowed
from gateway.values.assembly import AssembleRequest, ModelChoice, Step
from gateway.values.rows import ANY, Assignment, LlmModel, Provider, Snapshot

USER, DEFAULT, PRIORITY, LAST_RESORT = "user", "default", "priority", "last_resort"


@dataclass(frozen=True, slots=True)
class Chain:
    models: tuple[ModelChoice, ...]
    steps: tuple[Step, ...]
    first: LlmModel | None  # catalogue row of models[0]


def model_chain(snapshot: Snapshot, request: AssembleRequest) -> Chain:
    """Raises ModelNotAllowed where none is left; `fields` has each with its reason. Which of them
    rest after failures is looked at when they are asked (gateway/models/runner.py)."""
    if not request.task:
        why = "the request asks for no model"
        return Chain((), (Step(step="model", outcome="none", why=why),), None)
    by_id = {model.id: model for model in snapshot.models}
    providers = {provider.id: provider for provider in snapshot.providers}
    choices: list[ModelChoice] = []
    steps: list[Step] = []
    skipped: list[dict[str, str]] = []
    first: LlmModel | None = None
    for key, assignment, source in _candidates(snapshot, request):
        if any(one.model_key == key for one in choices):
            continue
        model = None if assignment is None else by_id.get(assignment.llm_model_id)
        provider = None if model is None else providers.get(model.provider_id)
        reason = _why_not(request, assignment, model, provider)
        detail = {"model_key": key, "source": source}
        if model is None or provider is None or reason is not None:
            reason = reason or ""  # _why_not has one for every row that is not there
            steps.append(Step(step="model", outcome="skipped", why=reason, detail=detail))
            skipped.append({**detail, "why": reason})
            continue
        first = first or model
        steps.append(
            Step(
                step="model",
                outcome="fallback" if choices else "chosen",
                why=f"{source} of {request.modality}/{request.task}",
                detail={**detail, "provider": provider.name},
            )
        )
        choices.append(_choice(model, provider, source))
    if choices:
        return Chain(tuple(choices), tuple(steps), first)
    what = f"no model can be asked for {request.modality}/{request.task}: {len(skipped)} skipped"
    raise ModelNotAllowed(f"{what}; assign an active model", fields={"skipped": skipped})


def considered(snapshot: Snapshot, request: AssembleRequest) -> list[Assignment]:
    """Every assignment that the chain looks at, also those it skips."""
    return [
        one
        for one in snapshot.assignments
        if request.task and one.modality == request.modality and one.task in (request.task, ANY)
    ]


def _candidates(
    snapshot: Snapshot, request: AssembleRequest
) -> Iterator[tuple[str, Assignment | None, str]]:
    looked_at = considered(snapshot, request)
    own = [one for one in looked_at if one.task == request.task and one.task != ANY]
    own.sort(key=lambda one: (not one.is_default, -one.priority, one.id))
    resort = [one for one in looked_at if one.task == ANY]
    resort.sort(key=lambda one: (not one.is_default, -one.priority, one.id))
    if request.model is not None:
        # Active first: an old assignment of the same model must not hide one that is in use.
        chosen = [one for one in own if one.model_key == request.model]
        chosen.sort(key=lambda one: not one.is_active)
        yield request.model, chosen[0] if chosen else None, USER
    yield from ((one.model_key, one, DEFAULT if one.is_default else PRIORITY) for one in own)
    yield from ((one.model_key, one, LAST_RESORT) for one in resort)


def _why_not(
    request: AssembleRequest,
    assignment: Assignment | None,
    model: LlmModel | None,
    provider: Provider | None,
) -> str | None:
    """The reason that a model cannot be asked, as far as the configuration says."""
    if assignment is None:
        return f"it is not assigned to {request.modality}/{request.task}"
    if not assignment.is_active:
        return "its assignment is switched off"
    if model is None:
        return "its catalogue row is not there"
    if not model.is_active:
        return "it is switched off in the catalogue"
    if model.missing_since is not None:
        return "its provider no longer lists it"
    if provider is None:
        return "its provider is not there"
    if not provider.is_active:
        return "its provider is switched off"
    return None


def _choice(model: LlmModel, provider: Provider, source: str) -> ModelChoice:
    return ModelChoice(
        model_key=model.model_key,
        provider=provider.name,
        kind=provider.kind,
        external_id=model.external_id,
        base_url=provider.base_url,
        secret_ref=provider.secret_ref,
        source=source,
    )

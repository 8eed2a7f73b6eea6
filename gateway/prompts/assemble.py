"""A snapshot and a request become messages, each decision with its reason.

One pure function: preview, replay, tests and live traffic are the same code. In its order: mode,
template, character, model chain, rules, rendering, refusal check, parameters, count, compression
plan, negative prompt. The chain comes before the count because how a text is counted, and which
parameters hold, depends on the model.

What callers and characters bring is data: braces in it are never rendered.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.content.detect import detect as detect_mode
from gateway.content.refusal import refusal
from gateway.errors import PromptRefused, TemplateFault
from gateway.prompts.chain import model_chain
from gateway.prompts.counting import context_of, fit, tokenizer_of
from gateway.prompts.digest import messages_sha256
from gateway.prompts.language import variables_of
from gateway.prompts.lookup import find_template
from gateway.prompts.matching import facts_of, matching
from gateway.prompts.mode import Detector, decide_mode
from gateway.prompts.negative import compose_negative, negative_rows
from gateway.prompts.parameters import merge
from gateway.prompts.render import render
from gateway.prompts.rules import NEGATIVE, SYSTEM, USER, Part, composed, parts
from gateway.prompts.variables import (
    Value,
    character_step,
    find_character,
    is_withheld,
    variables_for,
)
from gateway.tokens.protect import protected_spans
from gateway.values.assembly import Assembled, AssembleRequest, Counters, Limits, Message, Step
from gateway.values.rows import ANY, Character, LlmModel, Provider, Snapshot, Template

OWN_TEXT = "character_system_prompt"


def assemble(
    snapshot: Snapshot,
    request: AssembleRequest,
    counters: Counters,
    *,
    detect: Detector = detect_mode,
) -> Assembled:
    """What is to be sent for the request, and why exactly this. The same arguments give the same
    value.

    detect: asked for the mode when nothing else says one.
    Raises TemplateNotFound, TemplateFault, NotFound (character), PromptRefused, ModelNotAllowed,
    WorkerUnavailable, TooLarge, Invalid.
    """
    character = find_character(snapshot, request)
    mode = decide_mode(request, character, detect)
    steps = [mode.step]
    template, found = find_template(snapshot, request, mode.content_mode)
    steps += found
    withheld = is_withheld(character, mode.content_mode)
    steps.append(character_step(character, withheld))
    speaking = None if withheld else character
    values = variables_for(request, character, withheld)

    chain = model_chain(snapshot, request)
    steps += chain.steps
    counter = counters.of(tokenizer_of(chain.first, _provider(snapshot, chain.first)))
    encoder = counters.of(template.live.target_tokenizer)

    rules, unmatched = matching(snapshot, facts_of(request, mode.content_mode, speaking))
    by_slot = {SYSTEM: counter, USER: counter, NEGATIVE: encoder}
    taken, ruled = parts(rules, values, by_slot)
    steps += (unmatched, *ruled)

    texts = _Texts(template, request, speaking, values)
    steps.append(texts.step)

    def compose(kept: tuple[Part, ...]) -> tuple[Message, ...]:
        return _messages(texts, kept, request)

    # Every text that the messages are made of, checked together and before anything is dropped for
    # room, and what the request and the character bring also where the template does not write it:
    # a picture shows the character all the same.
    _refuse(
        (
            *texts.system,
            texts.user,
            *(part.text for part in taken if part.rule.slot != NEGATIVE),
            *(turn.content for turn in request.history),
        ),
        (request.prompt, *_character_texts(speaking)),
    )
    steps.append(Step(step="refusal", outcome="passed", why="checked on every text, in every mode"))

    model_key = chain.models[0].model_key if chain.models else ""
    params, merged = merge(snapshot, request, template, speaking, model_key)
    steps.append(merged)
    max_output_tokens: int = params["max_tokens"].value
    fitted = fit(compose, taken, counter, context_of(chain.first), max_output_tokens)
    steps += fitted.steps

    rows = negative_rows(snapshot, request.target_model, mode.content_mode, request.generation_mode)
    negative, composed_negative = compose_negative(
        rows,
        template_text=texts.negative,
        taken=fitted.taken,
        user_text=request.user_negative,
    )
    steps.append(composed_negative)
    live = template.live
    return Assembled(
        messages=fitted.messages,
        messages_sha256=messages_sha256(fitted.messages),
        negative=negative,
        params=params,
        models=chain.models,
        limits=Limits(
            max_output_tokens=max_output_tokens,
            target_token_limit=live.target_token_limit,
            hard_token_limit=(
                live.target_token_limit if live.hard_token_limit is None else live.hard_token_limit
            ),
            target_tokenizer=live.target_tokenizer,
        ),
        content_mode=mode.content_mode,
        mode_source=mode.source,
        template=template,
        system_override=request.system_override is not None,
        rule_ids=tuple(one.rule.id for one in fitted.taken),
        character=character,
        prompt_tokens=fitted.tokens,
        tokens_exact=counter.is_exact,
        protected=_protected(request, character, speaking),
        trace=tuple(steps),
    )


class _Texts:
    """The template's texts with variables filled in. Frozen after __init__."""

    __slots__ = ("negative", "step", "system", "user")

    def __init__(
        self,
        template: Template,
        request: AssembleRequest,
        character: Character | None,
        values: dict[str, Value],
    ) -> None:
        """character: None also where it is withheld. Raises TemplateFault."""
        live = template.live
        name = f"template {template.template_name} v{live.version}"
        missing = [one for one in live.variables if one not in values]
        if missing:
            raise TemplateFault(
                f"{name} needs the variables {', '.join(missing)}; send them",
                fields={"missing": missing},
            )
        if request.system_override is None:
            system, source = (
                render(live.system_prompt, values, f"{name}, system prompt"),
                "template",
            )
        else:
            system, source = request.system_override, "override"
        own = ""
        # In a chat the character speaks. Where its text was not placed by the template, it stands
        # after it; an enhancement writes about the character and must not speak as it.
        if character is not None and request.job_type == "chat" and character.system_prompt:
            is_placed = source == "template" and OWN_TEXT in variables_of(live.system_prompt)
            own = "" if is_placed else character.system_prompt
        self.system = (system, own)
        self.user = render(live.user_template, values, f"{name}, user template")
        self.negative = render(live.negative_prompt, values, f"{name}, negative prompt")
        self.step = Step(
            step="render",
            outcome="rendered",
            why="the caller's system text is data and is not rendered"
            if source == "override"
            else "braces in what callers and characters bring are not rendered",
            detail={
                "system": source,
                OWN_TEXT: bool(own),
                "system_characters": len(system) + len(own),
                "user_characters": len(self.user),
            },
        )


def _messages(
    texts: _Texts, kept: tuple[Part, ...], request: AssembleRequest
) -> tuple[Message, ...]:
    """One system message unless it is empty, the earlier turns as they are, one user message."""
    system = composed(SYSTEM, texts.system, kept)
    first = (Message("system", system),) if system else ()
    return (*first, *request.history, Message("user", composed(USER, (texts.user,), kept)))


def _refuse(written: Iterable[str], brought: Iterable[str]) -> None:
    """written: what the messages are made of. brought: texts that are looked at as well; most
    stand in one of those already."""
    texts = [one for one in written if one]
    texts += [one for one in brought if one and not any(one in text for text in texts)]
    found = refusal(texts)
    if found is not None:
        raise PromptRefused(
            f"{found.kind}: this is refused in every mode, and no setting changes it; "
            "the check reads the prompt together with what was added to it",
            fields={"kind": found.kind},
        )


def _character_texts(character: Character | None) -> tuple[str, ...]:
    if character is None:
        return ()
    card = (str(one) for one in character.card.values() if one is not None)
    return (character.name, character.persona, character.system_prompt, *card)


def _provider(snapshot: Snapshot, model: LlmModel | None) -> Provider | None:
    if model is None:
        return None
    return next((one for one in snapshot.providers if one.id == model.provider_id), None)


def _protected(
    request: AssembleRequest, character: Character | None, speaking: Character | None
) -> tuple[str, ...]:
    """The character's name, trigger words of its adapters for the target, and what of the prompt
    has to stay: tags, weighted terms, quotations. Each once."""
    names = [] if character is None else [character.name]
    for lora in () if speaking is None else speaking.loras:
        if lora.target_model in (request.target_model, ANY):
            names += lora.trigger_words
    return tuple(dict.fromkeys((*names, *protected_spans(request.prompt, names))))

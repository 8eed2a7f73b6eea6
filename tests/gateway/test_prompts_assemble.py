"""The whole resolution: one request to messages, each decision told, nothing left to chance."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from gateway.content.refusal import MINORS, Refusal
from gateway.errors import (
    GatewayError,
    Invalid,
    NotFound,
    PromptRefused,
    TemplateFault,
    TemplateNotFound,
    TooLarge,
)
from gateway.prompts import assemble as module
from gateway.prompts.assemble import assemble
from gateway.prompts.digest import messages_sha256
from gateway.values.assembly import Assembled, AssembleRequest, Message, Step
from gateway.values.rows import Character, CharacterLora, NegativePrompt, Snapshot
from tests.gateway import snapshots
from tests.gateway.snapshots import WordCounters, detect_mark, rule, snapshot, template


def run(rows: Snapshot, request: AssembleRequest) -> Assembled:
    return assemble(rows, request, WordCounters(), detect=detect_mark)


def ask(prompt: str = "a harbour at dawn", **fields: Any) -> AssembleRequest:
    return snapshots.request(prompt, **fields)


def step(assembled: Assembled, name: str) -> Step:
    return next(one for one in assembled.trace if one.step == name)


MARA = Character(
    id="mara",
    name="Mara",
    persona="A keeper of lamps.",
    system_prompt="Speak in short lines. {{prompt}}",
    voice_tone="dry",
    defaults={"temperature": 0.9},
    card={
        "character_goals": "find the sea",
        "character_quirks": None,
        "voice_examples": ["Aye.", "No."],
        "age": 41,
        "physical": {"hair": "grey"},
    },
    loras=(
        CharacterLora(lora_ref="a", weight=1.0, target_model="sdxl", trigger_words=("mara_v2",)),
        CharacterLora(lora_ref="b", weight=1.0, target_model="wan", trigger_words=("mara_w",)),
    ),
)
CHAT = ("qwen_instruct", "chat", "chat", "sfw")


def chat(**fields: Any) -> AssembleRequest:
    return ask(target_model="qwen_instruct", job_type="chat", use_case="chat", **fields)


# --- mode and template ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "mode", "source"),
    [
        ({"explicit_mode": "nsfw", "user_mode": "sfw", "character_id": "mara"}, "nsfw", "explicit"),
        ({"explicit_mode": None, "user_mode": "nsfw"}, "nsfw", "user_setting"),
        ({"explicit_mode": None, "character_id": "mara", "prompt": "[x]"}, "sfw", "character"),
        ({"explicit_mode": None, "prompt": "[x]"}, "nsfw", "detected"),
        ({"explicit_mode": None}, "sfw", "detected"),
        ({"explicit_mode": "nsfw", "may_use_nsfw": False}, "sfw", "explicit"),
        ({"explicit_mode": None, "prompt": "[x]", "may_use_nsfw": False}, "sfw", "detected"),
    ],
)
def test_the_first_that_says_a_mode_decides(fields: dict[str, Any], mode: str, source: str) -> None:
    both = (template(1), template(2, ("sdxl", "image", "enhancement", "nsfw")))

    assembled = run(snapshot(templates=both, characters=(MARA,)), ask(**fields))

    assert (assembled.content_mode, assembled.mode_source) == (mode, source)
    assert assembled.template.content_mode == mode


def test_an_explicit_mode_against_the_characters_rating_is_told() -> None:
    rows = snapshot(
        templates=(template(1, ("sdxl", "image", "enhancement", "nsfw")),), characters=(MARA,)
    )

    assembled = run(rows, ask(explicit_mode="nsfw", character_id="mara"))

    assert "goes before the character's rating sfw" in step(assembled, "mode").why
    assert step(assembled, "character").outcome == "chosen"


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(Invalid, match="none of sfw, nsfw"):
        run(snapshot(), ask(explicit_mode="mild"))


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("sdxl/image", "universal/image", "universal/*"), "sdxl/image"),
        (("universal/image", "universal/*"), "universal/image"),
        (("universal/*", "wan/image", "sdxl/video"), "universal/*"),
    ],
)
def test_the_exact_tuple_goes_before_the_universal_rows(
    present: tuple[str, ...], chosen: str
) -> None:
    rows = tuple(
        template(id, (target, job, "enhancement", "sfw"), name=f"{target}/{job}")
        for id, (target, job) in enumerate((name.split("/") for name in present), 1)
    )

    assert run(snapshot(templates=rows), ask()).template.template_name == chosen


def test_a_row_of_any_job_is_no_row_of_a_target() -> None:
    rows = snapshot(templates=(template(1, ("sdxl", "*", "enhancement", "sfw")),))

    with pytest.raises(TemplateNotFound):
        run(rows, ask())


def test_a_template_that_is_missing_is_told_with_the_nearest() -> None:
    rows = snapshot(
        templates=(
            template(1, ("wan", "video", "chat", "nsfw"), name="far"),
            template(2, ("sdxl", "image", "enhancement", "nsfw"), name="other_mode"),
            template(3, ("wan", "image", "enhancement", "sfw"), name="other_target"),
            template(4, name="off", is_active=False),
        )
    )

    with pytest.raises(TemplateNotFound) as at:
        run(rows, ask())

    assert at.value.fields["wanted"] == {
        "target_model": "sdxl",
        "job_type": "image",
        "use_case": "enhancement",
        "content_mode": "sfw",
    }
    nearest = [(one["template_name"], one["differs"]) for one in at.value.fields["nearest"]]
    assert nearest[0] == ("other_target", ["target_model"])
    assert nearest[1] == ("off", ["is_active"])
    assert [name for name, _ in nearest[2:]] == ["other_mode", "far"]


# --- characters and variables -----------------------------------------------------------------


def test_a_characters_values_fill_the_template() -> None:
    text = (
        "{{character_name}}|{{character_persona}}|{{voice_tone}}|{{mood}}|{{character_goals}}"
        "|{{character_quirks}}|{{voice_examples|join('/')}}|{{age}}|{{user_name}}"
    )
    rows = snapshot(templates=(template(1, system_prompt=text),), characters=(MARA,))

    assembled = run(rows, ask(character_id="mara", variables={"user_name": "Ann"}))

    expected = "Mara|A keeper of lamps.|dry||find the sea||Aye./No.|41|Ann"
    assert assembled.messages[0].content == expected
    assert assembled.params["temperature"].origin == "character mara"
    assert assembled.protected == ("Mara", "mara_v2")


def test_a_request_says_more_than_a_card_and_never_says_the_prompt() -> None:
    rows = snapshot(
        templates=(template(1, system_prompt="{{character_goals}} {{prompt}}"),), characters=(MARA,)
    )

    assembled = run(
        rows,
        ask("sea", character_id="mara", variables={"character_goals": "rest", "prompt": "other"}),
    )

    assert assembled.messages[0].content == "rest sea"


def test_in_sfw_a_character_rated_nsfw_gives_its_name_only() -> None:
    oren = replace(
        MARA, id="oren", name="Oren", content_rating="nsfw", tags=("night",), mood="MOOD"
    )
    text = "{{character_name}}|{{character_persona}}|{{mood}}|{{age}}|{{voice_examples|join}}"
    rows = snapshot(
        templates=(template(1, CHAT, text),),
        characters=(oren,),
        rules=(
            rule(1, "NIGHT", tags=("night",)),
            rule(2, "HIS", match={"character_id": "oren"}),
        ),
    )

    assembled = run(rows, chat(character_id="oren"))

    assert assembled.messages[0].content == "Oren||||"
    assert step(assembled, "character").outcome == "withheld"
    assert assembled.params["temperature"].origin == "contract"
    assert assembled.protected == ("Oren",)
    assert assembled.rule_ids == ()


def test_a_characters_own_system_text_follows_in_a_chat_and_is_not_rendered() -> None:
    rows = snapshot(
        templates=(template(1, CHAT, "Play."), template(2, system_prompt="Write.")),
        characters=(MARA,),
    )

    spoken = run(rows, chat(character_id="mara"))
    written = run(rows, ask(character_id="mara"))

    assert spoken.messages[0].content == "Play.\n\nSpeak in short lines. {{prompt}}"
    assert written.messages[0].content == "Write."


def test_a_characters_own_system_text_that_the_template_places_stands_once() -> None:
    rows = snapshot(
        templates=(template(1, CHAT, "<{{ character_system_prompt }}>"),), characters=(MARA,)
    )

    assembled = run(rows, chat(character_id="mara"))

    assert assembled.messages[0].content == "<Speak in short lines. {{prompt}}>"


@pytest.mark.parametrize(
    "character",
    [None, replace(MARA, owner_id="someone"), replace(MARA, is_active=False)],
    ids=("unknown", "of someone else", "switched off"),
)
def test_a_character_that_may_not_be_used_is_not_found(character: Character | None) -> None:
    rows = snapshot(characters=(character,) if character else ())

    with pytest.raises(NotFound):
        run(rows, ask(character_id="mara", user_id="u1"))


def test_a_users_own_character_may_be_used() -> None:
    rows = snapshot(characters=(replace(MARA, owner_id="u1"),))

    assembled = run(rows, ask(character_id="mara", user_id="u1"))

    assert assembled.character is not None


def test_a_variable_that_a_version_needs_is_named() -> None:
    rows = snapshot(templates=(template(1, variables=("user_name", "scene_context")),))

    with pytest.raises(TemplateFault, match="template t1 v1 needs the variables user_name, scene"):
        run(rows, ask())


def test_a_missing_variable_is_named_with_template_version_and_part() -> None:
    rows = snapshot(templates=(template(1, version=4, user_template="{{prompt}} {{ lens }}"),))

    with pytest.raises(TemplateFault, match="template t1 v4, user template: the variable lens"):
        run(rows, ask())


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"variables": {"_x": "1"}}, Invalid),
        ({"variables": {"user_name": "x" * 500_000}}, TooLarge),
        ({"prompt": "half \ud800"}, Invalid),
    ],
)
def test_values_that_cannot_be_taken_are_refused(
    fields: dict[str, Any], error: type[GatewayError]
) -> None:
    with pytest.raises(error):
        run(snapshot(), ask(**fields))


def test_a_list_over_its_limit_is_refused() -> None:
    rows = snapshot(characters=(replace(MARA, card={"voice_examples": ["a"] * 65}),))

    with pytest.raises(TooLarge, match="65 items; 64"):
        run(rows, ask(character_id="mara"))


# --- messages ---------------------------------------------------------------------------------


def test_earlier_turns_stand_between_and_an_empty_system_text_makes_no_message() -> None:
    turns = (Message("user", "hello {{prompt}}"), Message("assistant", "aye"))
    rows = snapshot(templates=(template(1, system_prompt=""),))

    assembled = run(rows, ask("sea", history=turns))

    assert assembled.messages == (*turns, Message("user", "sea"))


def test_a_callers_system_text_replaces_the_templates_and_is_not_rendered() -> None:
    rows = snapshot(rules=(rule(1, "Rule."),))

    assembled = run(rows, ask(system_override="Mine {{prompt}}"))

    assert assembled.messages[0].content == "Mine {{prompt}}\n\nRule."
    assert assembled.system_override


def test_the_hash_is_that_of_canonical_json() -> None:
    # SHA-256 of [{"content":"Sé\n","role":"user"}] in UTF-8, by sha256sum.
    expected = "c1878e79fbfe37751b269af0722b81d3da4a6de7bd6b0f4a472491bc8d99d8c6"

    assert messages_sha256([Message("user", "Sé\n")]) == expected


def test_limits_and_max_tokens_are_the_templates() -> None:
    live: dict[str, Any] = {
        "target_token_limit": 75,
        "target_tokenizer": "clip",
        "max_output_tokens": 160,
    }
    rows = snapshot(templates=(template(1, **live),))

    limits = run(rows, ask(params={"max_tokens": 62})).limits

    assert (limits.max_output_tokens, limits.target_token_limit) == (62, 75)
    assert (limits.hard_token_limit, limits.target_tokenizer) == (75, "clip")


def test_tokens_are_those_of_the_whole_chat_form() -> None:
    # Each message: its words with its role, and three around it; "assistant" and the last opening.
    assembled = run(snapshot(), ask("one two"))

    assert assembled.prompt_tokens == (1 + 3 + 3) + (1 + 2 + 3) + 2


def test_spans_of_the_prompt_are_protected() -> None:
    assembled = run(snapshot(), ask('a sign "open late" <lora:ink:0.8>'))

    assert set(assembled.protected) == {'"open late"', "<lora:ink:0.8>"}


def test_the_negative_prompt_is_base_first_and_then_the_user() -> None:
    def row(id: int, **fields: Any) -> NegativePrompt:
        values = {"target_model": "sdxl", "content_mode": "sfw", "negative_prompt": f"n{id}"}
        return NegativePrompt(id=id, **{**values, **fields})

    rows = snapshot(
        templates=(template(1, negative_prompt="own"),),
        negatives=(
            row(1),
            row(2, priority=5),
            row(3, content_mode="nsfw"),
            row(4, generation_mode="i2i"),
            row(5, target_model="wan"),
            row(6, target_model="*"),
            row(7, is_active=False),
        ),
    )

    assert run(rows, ask(user_negative="hands")).negative == "own, n2, n1, n6, hands"
    assert run(rows, ask(generation_mode="i2i")).negative == "own, n4"


# --- refusal ----------------------------------------------------------------------------------


WORD = "FORBIDDEN"


class Recorder:
    """Refuses what has that word; keeps all it was shown."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: list[str]) -> Refusal | None:
        self.seen += texts
        return Refusal(MINORS) if any(WORD in one for one in texts) else None


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(module, "refusal", recorder)
    return recorder


def test_the_check_is_not_to_be_had_off() -> None:
    """With the real word lists: harmless texts that only together say what is refused."""
    rows = snapshot(
        templates=(template(1, ("sdxl", "image", "enhancement", "nsfw")),),
        characters=(replace(MARA, card={"character_description": "a girl of 14 years"}),),
    )
    request = ask("she is naked, explicit sex", explicit_mode="nsfw")

    run(rows, request)
    with pytest.raises(PromptRefused):
        run(rows, replace(request, character_id="mara"))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows, request: (rows, replace(request, prompt=WORD)),
        lambda rows, request: (rows, replace(request, system_override=WORD)),
        lambda rows, request: (rows, replace(request, history=(Message("user", WORD),))),
        lambda rows, request: (rows, replace(request, variables={"user_name": WORD})),
        lambda rows, request: (replace(rows, characters=(replace(MARA, persona=WORD),)), request),
        lambda rows, request: (
            replace(rows, characters=(replace(MARA, card={"age": WORD}),)),
            request,
        ),
        lambda rows, request: (replace(rows, rules=(rule(1, WORD, is_optional=True),)), request),
    ],
    ids=("prompt", "override", "history", "variable", "persona", "card", "rule"),
)
def test_the_check_sees_every_text(
    refusal: Recorder,
    change: Callable[[Snapshot, AssembleRequest], tuple[Snapshot, AssembleRequest]],
) -> None:
    rows = snapshot(templates=(template(1, user_template="{{user_name}} {{prompt}}"),))
    rows = replace(rows, characters=(MARA,))
    request = ask(character_id="mara", variables={"user_name": "Ann"})
    run(rows, request)

    with pytest.raises(PromptRefused) as at:
        run(*change(rows, request))

    assert WORD not in str(at.value)


# --- trace and determinism --------------------------------------------------------------------


def test_generated_requests_reach_every_part() -> None:
    """Properties that most examples leave at the first error would show nothing."""
    outcomes: dict[str, int] = {}
    for seed in range(1000):
        found = outcome(snapshots.random_snapshot(seed), snapshots.random_request(seed + 5000))
        if isinstance(found, Assembled):
            outcomes["assembled"] = outcomes.get("assembled", 0) + 1
            for one in found.trace:
                name = f"{one.step} {one.outcome}"
                outcomes[name] = outcomes.get(name, 0) + 1
        else:
            outcomes[found[0].__name__] = outcomes.get(found[0].__name__, 0) + 1

    assert outcomes["assembled"] > 200
    for name in (
        "mode overruled", "template missed", "character withheld", "rule applied", "rule skipped",
        "rule dropped", "compression dropped", "model skipped", "model fallback", "model none",
        "negative composed", "TemplateNotFound", "ModelNotAllowed", "TooLarge",
    ):  # fmt: skip
        assert outcomes.get(name, 0) >= 5, name


def outcome(rows: Snapshot, request: AssembleRequest) -> Assembled | tuple[type, str]:
    try:
        return run(rows, request)
    except GatewayError as error:
        return (type(error), str(error))


@settings(deadline=None)
@given(snapshots.snapshots(), snapshots.requests())
def test_the_same_arguments_give_the_same_value(rows: Snapshot, request: AssembleRequest) -> None:
    random.seed(1)
    first = outcome(rows, request)
    random.seed(2)

    assert outcome(rows, request) == first


@settings(deadline=None)
@given(snapshots.snapshots(), snapshots.requests())
def test_only_errors_of_the_gateway_are_raised_and_they_have_no_text_of_the_prompt(
    rows: Snapshot, request: AssembleRequest
) -> None:
    try:
        run(rows, replace(request, prompt="PRIVATE " + request.prompt))
    except GatewayError as error:
        assert "PRIVATE" not in f"{error} {error.fields}"


@settings(max_examples=400, deadline=None)
@given(snapshots.snapshots(), snapshots.requests())
def test_the_trace_explains_each_part_and_has_no_text_of_the_request(
    rows: Snapshot, request: AssembleRequest
) -> None:
    secret = "PRIVATE"
    request = replace(
        request,
        prompt=f"{secret} {request.prompt}",
        variables={name: f"{secret} {text}" for name, text in request.variables.items()},
        history=tuple(replace(one, content=secret) for one in request.history),
        user_negative=secret,
        system_override=secret if request.system_override else None,
    )
    try:
        assembled = run(rows, request)
    except GatewayError:
        return

    trace = assembled.trace
    told = json.dumps([[one.step, one.outcome, one.why, dict(one.detail)] for one in trace])
    assert secret not in told
    assert all(one.why for one in trace)
    names = [one.step for one in trace]
    for name in (
        "mode", "character", "render", "refusal", "parameters", "count", "negative",
    ):  # fmt: skip
        assert names.count(name) == 1
    chosen = [one for one in trace if one.step == "template" and one.outcome == "chosen"]
    assert [one.detail["id"] for one in chosen] == [assembled.template.id]
    asked = [
        one.detail["model_key"]
        for one in trace
        if one.step == "model" and one.outcome in ("chosen", "fallback")
    ]
    assert asked == [one.model_key for one in assembled.models]
    applied = [one.detail["id"] for one in trace if one.step == "rule" and one.outcome == "applied"]
    dropped = [
        one.detail["id"] for one in trace if one.step == "compression" and one.outcome == "dropped"
    ]
    assert [id for id in applied if id not in dropped] == list(assembled.rule_ids)
    assert step(assembled, "parameters").detail["origins"] == {
        name: one.origin for name, one in assembled.params.items()
    }

"""Enhancement: the ways to an answer, what is said about each, and what is never given out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import errors
from gateway.access.caller import Caller
from gateway.content.emergency import load_emergency
from gateway.errors import (
    GatewayError,
    Invalid,
    NotFound,
    PromptRefused,
    RevisionNotReached,
    TemplateNotFound,
    WorkerBusy,
    WorkerTimeout,
)
from gateway.flows.enhance import STRATEGIES, explicit_mode, target_of
from gateway.prompts.digest import messages_sha256
from gateway.prompts.replay import rebuild, request_from_json
from tests.gateway.flow_parts import (
    DARIO,
    FINISHED,
    MINOR,
    OTHER,
    PROMPT,
    THEME,
    EnhanceBench,
    FakeModels,
    FixedPrompts,
    KeptLog,
    call,
    caller,
    counters,
    resolve,
    shipped,
    without,
)

CONTRACT_KEYS = {
    "original_length",
    "enhanced_length",
    "expansion_percentage",
    "job_type",
    "format",
    "quality",
    "content_mode",
    "template_name",
    "model_used",
    "token_count",
    "compression_applied",
    "fallback_level",
    "execution_time_ms",
}
# Everything that a model, its worker or the resolution may raise.
FAILURES = (
    errors.StoreUnavailable,
    errors.TemplateNotFound,
    errors.TemplateFault,
    errors.ModelNotAllowed,
    errors.TooLarge,
    errors.Invalid,
    errors.NotFound,
    errors.WorkerUnavailable,
    errors.WorkerBusy,
    errors.WorkerTimeout,
    errors.WorkerFault,
    errors.AttestationFailed,
    errors.ProviderFault,
)
LONG = "an old harbour at dawn, " * 40
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@pytest.fixture
def bench() -> EnhanceBench:
    return EnhanceBench()


def test_an_answer_has_the_keys_of_the_contract_and_the_models_text(bench: EnhanceBench) -> None:
    body = bench.enhance().body()

    assert set(body) == {
        "success",
        "original_prompt",
        "enhanced_prompt",
        "enhancement_strategy",
        "enhancement_metadata",
        "trace",
    }
    assert body["success"] is True
    assert (body["original_prompt"], body["enhanced_prompt"]) == (PROMPT, FINISHED)
    about = body["enhancement_metadata"]
    assert set(about) >= CONTRACT_KEYS
    assert about["original_length"] == len(PROMPT)
    assert about["enhanced_length"] == len(FINISHED)
    assert about["expansion_percentage"] == f"{len(FINISHED) / len(PROMPT) * 100:.1f}"
    assert (about["job_type"], about["format"], about["quality"]) == (
        "sdxl_image_fast",
        "image",
        "fast",
    )
    assert (about["content_mode"], about["template_name"]) == ("sfw", "enhancement_sdxl_sfw")
    assert about["model_used"] == "qwen_instruct"
    assert about["token_count"] == counters().of("clip").count(FINISHED)
    assert (about["token_limit"], about["tokens_exact"]) == (75, True)
    assert about["compression_applied"] is False
    assert about["execution_time_ms"] > 0
    json.dumps(body)


@given(st.text(min_size=1, max_size=60).filter(str.strip), st.text(min_size=1, max_size=200))
@settings(max_examples=40, **PATIENT)
def test_the_expansion_is_a_text_with_one_decimal(prompt: str, finished: str) -> None:
    bench = EnhanceBench(models=FakeModels([finished]))

    try:
        about = bench.enhance(prompt=prompt).metadata
    except PromptRefused:
        return

    assert re.fullmatch(r"\d+\.\d", about["expansion_percentage"])
    assert isinstance(about["token_count"], int)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_answer_says_its_fallback_level(level: int) -> None:
    bench = EnhanceBench(prompts=FixedPrompts(level=level))
    bench.prompts.flags = ("prompts_unverified",) if level else ()

    done = bench.enhance()

    assert done.strategy == STRATEGIES[level]
    assert done.metadata["fallback_level"] == done.trace["fallback_level"] == level
    assert done.trace["flags"] == list(bench.prompts.flags)
    assert bench.log.entries[0].fallback_level == level
    assert bench.log.entries[0].flags == bench.prompts.flags


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "fields", [{"is_exact_copy": True}, {"is_modify": True}, {"allow_original": True}]
)
def test_ways_without_a_model_say_the_level_too(level: int, fields: dict[str, Any]) -> None:
    bench = EnhanceBench(FixedPrompts(level=level), FakeModels([WorkerBusy("full")]))

    assert bench.enhance(**fields).metadata["fallback_level"] == level


# --- early exits --------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [None, "", "an earlier prompt"])
@pytest.mark.parametrize("prompt", [" ", "", PROMPT])
def test_an_exact_copy_asks_no_model(bench: EnhanceBench, earlier: str | None, prompt: str) -> None:
    done = bench.enhance(prompt=prompt, is_exact_copy=True, exact_copy=earlier)

    assert done.strategy == "skip_for_exact_copy"
    assert done.prompt == (prompt if earlier is None else earlier)
    assert bench.models.asked == []
    about = done.metadata
    assert set(about) >= CONTRACT_KEYS | {"exact_copy_mode"}
    assert (about["exact_copy_mode"], about["template_name"], about["token_count"]) == (
        True,
        "skip",
        0,
    )
    assert about["model_used"] == "none"


def test_an_exact_copy_of_an_empty_prompt_has_no_expansion(bench: EnhanceBench) -> None:
    about = bench.enhance(prompt="", is_exact_copy=True, exact_copy="abc").metadata

    assert (about["original_length"], about["expansion_percentage"]) == (0, "0.0")


def test_a_modification_is_the_templates_text_without_a_model(bench: EnhanceBench) -> None:
    done = bench.enhance(prompt="with a red hat", is_modify=True)

    assert done.strategy == "reference_modify_with_prompt"
    assert done.prompt == "same subject, same pose and composition, with a red hat"
    assert done.metadata["template_name"] == "modify_flow"
    assert done.metadata["model_used"] == "none"
    assert done.metadata["token_count"] > 0
    assert bench.models.asked == []
    assert set(done.metadata) >= CONTRACT_KEYS


@pytest.mark.parametrize("prompt", ["", "  "])
def test_a_modification_without_words_is_the_base_alone(bench: EnhanceBench, prompt: str) -> None:
    done = bench.enhance(prompt=prompt, is_modify=True)

    assert done.strategy == "reference_modify_base_only"
    assert done.prompt == "same subject, same pose and composition"


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_refused(bench: EnhanceBench, prompt: str) -> None:
    bench.refused(Invalid, prompt=prompt)

    assert bench.models.asked == []
    assert bench.log.entries[0].status == 422


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAILURES, ids=lambda one: one.__name__)
def test_a_failure_is_an_error_and_never_the_prompt(
    bench: EnhanceBench, kind: type[GatewayError]
) -> None:
    bench.models.replies = [kind("it does not work")]

    error = bench.refused(kind)

    assert "swordfish" not in str(error)
    assert "swordfish" not in json.dumps(error.fields)
    (entry,) = bench.log.entries
    assert (entry.status, entry.error_code) == (kind.status, kind.code)


@pytest.mark.parametrize("kind", FAILURES, ids=lambda one: one.__name__)
def test_the_prompt_comes_back_where_that_is_allowed_and_the_answer_says_so(
    bench: EnhanceBench, kind: type[GatewayError]
) -> None:
    bench.models.replies = [kind("it does not work")]

    done = bench.enhance(allow_original=True)

    assert (done.prompt, done.strategy) == (PROMPT, "original_fallback")
    about = done.metadata
    assert set(about) >= CONTRACT_KEYS
    assert (about["template_name"], about["model_used"]) == ("none", "none")
    assert (about["fallback_reason"], about["fallback_error"]) == (kind.code, "it does not work")
    assert about["expansion_percentage"] == "100.0"
    (step,) = done.trace["steps"]
    assert (step["step"], step["outcome"], step["detail"]) == (
        "fallback",
        "original",
        {"code": kind.code},
    )
    (entry,) = bench.log.entries
    assert entry.flags == ("original_fallback", kind.code)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_bug_is_no_reason_for_the_original_prompt(bench: EnhanceBench, allowed: bool) -> None:
    bench.models.replies = [KeyError("swordfish")]

    with pytest.raises(KeyError):
        bench.enhance(allow_original=allowed)

    (entry,) = bench.log.entries
    assert (entry.status, entry.error_code) == (500, "internal_error")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_revision_that_is_not_reached_is_an_error(bench: EnhanceBench, allowed: bool) -> None:
    bench.refused(RevisionNotReached, call(min_revision=8), allow_original=allowed)

    (entry,) = bench.log.entries
    assert (entry.status, entry.error_code) == (503, "revision_not_reached")
    assert entry.config_revision is None


def test_a_revision_that_is_reached_is_in_the_trace(bench: EnhanceBench) -> None:
    done = bench.enhance(call(min_revision=7))

    assert done.trace["config_revision"] == 7


@pytest.mark.parametrize("allowed", [False, True])
def test_a_missing_template_is_never_replaced_by_the_other_mode(allowed: bool) -> None:
    snapshot = without(shipped(), use_case="enhancement", content_mode="sfw")
    bench = EnhanceBench(prompts=FixedPrompts(snapshot))

    if allowed:
        done = bench.enhance(content_mode="sfw", allow_original=True)
        assert (done.prompt, done.content_mode) == (PROMPT, "sfw")
    else:
        bench.refused(TemplateNotFound, content_mode="sfw")
    assert bench.models.asked == []


def test_another_users_character_is_not_found(bench: EnhanceBench) -> None:
    bench.refused(NotFound, character_id="of-nobody")


# --- modes --------------------------------------------------------------------------------------

MODE_CASES = [
    ({"content_mode": "nsfw"}, {"may_use_nsfw": False}, "sfw"),
    ({"content_mode": "nsfw"}, {}, "nsfw"),
    ({}, {"content_mode": "nsfw"}, "nsfw"),
    ({}, {"content_mode": "nsfw", "may_use_nsfw": False}, "sfw"),
    ({"content_mode": "sfw"}, {"content_mode": "nsfw"}, "sfw"),
    ({"character_id": DARIO}, {}, "nsfw"),
    ({}, {}, "sfw"),
]


@pytest.mark.parametrize(
    "way",
    [{}, {"is_exact_copy": True}, {"is_modify": True}, {"allow_original": True}],
    ids=["model", "copy", "modify", "original"],
)
@pytest.mark.parametrize(("fields", "who", "mode"), MODE_CASES)
def test_the_mode_is_the_same_on_every_way(
    bench: EnhanceBench,
    way: dict[str, Any],
    fields: dict[str, Any],
    who: dict[str, Any],
    mode: str,
) -> None:
    if "allow_original" in way:
        bench.models.replies = [WorkerBusy("full")]

    done = bench.enhance(call(caller(**who)), **way, **fields)

    assert done.content_mode == done.metadata["content_mode"] == mode


# --- the refusal --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": f"{THEME}, {MINOR}"},
        {"prompt": THEME, "tags": (MINOR,)},
        {"prompt": MINOR, "variables": {"note": THEME}},
        {"prompt": MINOR, "exact_copy": THEME, "is_exact_copy": True},
        {"prompt": f"{THEME}, {MINOR}", "is_modify": True},
        {"prompt": f"{THEME}, {MINOR}", "allow_original": True},
    ],
)
def test_what_is_refused_reaches_no_model(bench: EnhanceBench, fields: dict[str, Any]) -> None:
    error = bench.refused(PromptRefused, **fields)

    assert bench.models.asked == []
    for text in (THEME, MINOR):
        assert text not in str(error) and text not in json.dumps(error.fields)
    (entry,) = bench.log.entries
    assert (entry.status, entry.error_code) == (422, "prompt_refused")


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": PROMPT}, f"{THEME}, {MINOR}"),
        ({"prompt": MINOR}, THEME),
        ({"prompt": PROMPT, "tags": (MINOR,)}, THEME),
        ({"prompt": PROMPT, "variables": {"note": MINOR}}, THEME),
    ],
)
def test_a_models_answer_is_refused_with_all_that_it_answers(
    bench: EnhanceBench, fields: dict[str, Any], said: str, allowed: bool
) -> None:
    bench.models.replies = [said]

    error = bench.refused(PromptRefused, allow_original=allowed, **fields)

    assert THEME not in str(error)
    assert bench.log.entries[0].error_code == "prompt_refused"


def test_an_answer_is_refused_with_the_character_that_it_is_about() -> None:
    snapshot = shipped()
    (young, *others) = snapshot.characters
    card = {**young.card, "character_description": MINOR}
    changed = replace(snapshot, characters=(replace(young, card=card), *others))
    bench = EnhanceBench(FixedPrompts(changed), FakeModels([THEME]))

    bench.refused(PromptRefused, character_id=young.id)


def test_what_was_dropped_for_room_is_not_given_out_and_refused_for_nothing() -> None:
    """The check is of what is handed out; the long answer's end is not there any more."""
    bench = EnhanceBench(models=FakeModels([f"{LONG}{THEME}"]))
    bench.prompts.snapshot = without(shipped(), use_case="compression")

    assert THEME not in bench.enhance().prompt


# --- models -------------------------------------------------------------------------------------


def test_a_model_gets_the_resolved_messages_and_the_time_that_is_left(bench: EnhanceBench) -> None:
    bench.enhance()

    (question,) = bench.models.asked
    assert question.route == "/enhance"
    assert [one.role for one in question.messages] == ["system", "user"]
    assert question.messages[1].content == PROMPT
    assert "second_pass" not in question.params
    assert question.params["max_tokens"] == 160
    assert 84 < question.deadline_s < 85
    assert question.choices[0].model_key == "qwen_instruct"


def test_with_a_second_pass_the_answer_is_enhanced_once_more(bench: EnhanceBench) -> None:
    bench.models.replies = ["a fish", FINISHED]

    done = bench.enhance(params={"second_pass": True})

    first, second = bench.models.asked
    assert first.messages[-1].content == PROMPT
    assert second.messages[-1].content == "a fish"
    assert done.prompt == FINISHED
    assert len(done.trace["models"]) == 2
    assert bench.log.entries[0].worker_ms == 8.0
    assert bench.log.entries[0].messages_sha256 == messages_sha256(first.messages)


def test_a_second_pass_that_fails_is_an_error_and_not_the_first_answer(bench: EnhanceBench) -> None:
    bench.models.replies = ["a fish", WorkerTimeout("late")]

    bench.refused(WorkerTimeout, params={"second_pass": True})


def test_a_second_pass_stays_in_the_mode_that_was_decided(bench: EnhanceBench) -> None:
    """Nothing was said of the mode, and the detector judged the model's first answer."""
    bench.models.replies = ["a nude swimmer", FINISHED]

    done = bench.enhance(params={"second_pass": True})

    first, second = (question.messages[0].content for question in bench.models.asked)
    assert done.content_mode == "sfw"
    assert second == first


def test_a_shorter_text_is_asked_for_in_the_mode_that_was_decided(bench: EnhanceBench) -> None:
    sfw, nsfw = (
        one.live.system_prompt
        for mode in ("sfw", "nsfw")
        for one in load_emergency().templates
        if one.template_name == f"compression_sdxl_{mode}"
    )
    bench.models.replies = ["a nude swimmer in the sea " * 40, FINISHED]

    done = bench.enhance()

    assert done.content_mode == "sfw"
    assert bench.models.asked[1].messages[0].content.startswith(sfw[:40])
    assert sfw[:200] != nsfw[:200]


def test_an_answer_by_another_model_is_marked(bench: EnhanceBench) -> None:
    bench.models.changes = {"fallback": True, "flags": ("failover",)}

    done = bench.enhance()

    assert done.metadata["model_fallback"] is True
    assert done.trace["flags"] == ["failover"]
    assert bench.log.entries[0].flags == ("failover", "model_fallback")


# --- compression --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "media", "tokenizer", "limit"),
    [("sdxl", "image", "clip", 75), ("wan", "video", "umt5", 100)],
)
@given(
    text=st.text(alphabet=st.sampled_from("ab ,.🙂éß中\n(:1)<lora"), min_size=0, max_size=900)
    | st.lists(st.sampled_from(["sea", "harbour,", "light.", "🙂", "中文"]), max_size=400).map(
        " ".join
    )
)
@settings(max_examples=30, **PATIENT)
def test_an_answer_is_never_over_the_encoders_limit(
    target: str, media: str, tokenizer: str, limit: int, text: str
) -> None:
    bench = EnhanceBench(models=FakeModels([text]))

    done = bench.enhance(target_model=target, media=media)

    counter = counters().of(tokenizer)
    assert counter.is_exact
    assert counter.count(done.prompt) == done.metadata["token_count"] <= limit
    assert done.metadata["compression_applied"] is (done.prompt != text)
    assert len(bench.models.asked) <= 2


def test_a_long_answer_is_shortened_by_the_model_once(bench: EnhanceBench) -> None:
    shorter = "an old harbour at dawn, " * 5 + "nets on the quay"
    bench.models.replies = ["one long clause without any comma " * 30, shorter]

    done = bench.enhance()

    _, second = bench.models.asked
    assert "at most 75 tokens" in second.messages[0].content
    assert second.messages[-1].content == "one long clause without any comma " * 30
    assert second.route == "/enhance"
    assert done.prompt == shorter
    outcomes = [one["outcome"] for one in done.trace["steps"] if one["step"] == "compression"]
    assert "asked" in outcomes
    assert done.metadata["compression_applied"] is True
    assert bench.log.entries[0].compressed is True
    assert bench.log.entries[0].target_tokens == counters().of("clip").count(shorter)


def test_a_shorter_text_that_is_too_long_again_is_cut(bench: EnhanceBench) -> None:
    bench.models.replies = ["one long clause without any comma " * 30]

    done = bench.enhance()

    assert len(bench.models.asked) == 2
    assert counters().of("clip").count(done.prompt) <= 75
    assert done.prompt.startswith("one long clause")


@pytest.mark.parametrize("shorter", ["a harbour", "", "   "])
def test_protected_parts_stay_whatever_the_model_says_when_asked_again(
    bench: EnhanceBench, shorter: str
) -> None:
    told = "very detailed scene without any comma " * 20
    bench.models.replies = [f'{told} <lora:ink:0.8> "OPEN"', shorter]

    done = bench.enhance(prompt='a shop <lora:ink:0.8> with a sign "OPEN"')

    assert "<lora:ink:0.8>" in done.prompt
    assert '"OPEN"' in done.prompt
    assert done.metadata["token_count"] <= 75
    outcomes = [one["outcome"] for one in done.trace["steps"] if one["step"] == "compression"]
    assert "asked_and_left" in outcomes


def test_what_may_not_be_dropped_can_be_more_than_a_soft_limit(bench: EnhanceBench) -> None:
    """100 tokens are aimed at for videos; their encoder reads 512."""
    tags = " ".join(f"<lora:harbour{n}:0.8>" for n in range(12))
    bench.models.replies = [f"a sign, {tags}, at dawn"]

    done = bench.enhance(prompt=f"a sign {tags}", target_model="wan", media="video")

    assert tags in done.prompt
    assert 100 < done.metadata["token_count"] <= 512


def test_what_may_not_be_dropped_and_does_not_fit_is_an_error(bench: EnhanceBench) -> None:
    tags = " ".join(f"<lora:harbour{n}:0.8>" for n in range(12))
    bench.models.replies = [f"a sign, {tags}"]

    error = bench.refused(errors.TooLarge, prompt=f"a sign {tags}")

    assert "harbour" not in str(error)


def test_without_a_template_for_it_no_shorter_text_is_asked_for() -> None:
    snapshot = without(shipped(), use_case="compression")
    bench = EnhanceBench(FixedPrompts(snapshot), FakeModels(["no comma in here " * 60]))

    done = bench.enhance()

    assert len(bench.models.asked) == 1
    assert done.metadata["token_count"] <= 75
    steps = [one for one in done.trace["steps"] if one["outcome"] == "not_asked"]
    assert steps[0]["why"] == "there is no active template for compression"


def test_where_nobody_shortens_a_text_it_is_cut_and_the_trace_says_so(bench: EnhanceBench) -> None:
    bench.models.replies = ["no comma in here " * 60, WorkerBusy("no worker has room")]

    done = bench.enhance()

    assert done.strategy == "template_db"
    assert done.metadata["token_count"] <= 75
    steps = [one for one in done.trace["steps"] if one["outcome"] == "not_answered"]
    assert steps[0]["detail"] == {"code": "worker_busy"}
    assert bench.log.entries[0].flags == ("compression_not_asked", "worker_busy")


def test_a_refusal_of_the_long_answer_is_not_swallowed_by_cutting_it(bench: EnhanceBench) -> None:
    bench.models.replies = ["no comma in here " * 60 + f" {THEME} {MINOR}"]

    bench.refused(PromptRefused, allow_original=True)


# --- the log ------------------------------------------------------------------------------------


def test_a_success_is_logged_with_what_was_sent(bench: EnhanceBench) -> None:
    done = bench.enhance()

    (entry,) = bench.log.entries
    (question,) = bench.models.asked
    assert (entry.status, entry.error_code, entry.endpoint) == (200, None, "enhance-prompt")
    assert (entry.request_id, entry.user_id) == ("r-1", caller().user_id)
    assert entry.messages_sha256 == messages_sha256(question.messages)
    assert entry.messages_sha256 == done.trace["messages_sha256"]
    assert entry.prompt_ids_sha256 == "ab" * 32
    assert (entry.model_key, entry.model_source) == ("qwen_instruct", "default")
    assert entry.template_name == "enhancement_sdxl_sfw"
    assert (entry.tokens_out, entry.target_tokens) == (12, done.metadata["token_count"])
    assert entry.execution_time_ms > 0
    body = entry.body
    assert body is not None
    assert (body.messages, body.answer) == (question.messages, FINISHED)
    assert body.trace == done.trace


def test_the_messages_can_be_made_again_from_the_log(bench: EnhanceBench) -> None:
    bench.enhance(character_id=DARIO, tags=("portrait",), quality="high")

    (entry,) = bench.log.entries
    assert entry.body is not None
    again = resolve(rebuild(entry.body.objects), request_from_json(entry.body.request))
    assert again.messages_sha256 == entry.messages_sha256


def test_without_bodies_no_text_is_in_the_log() -> None:
    bench = EnhanceBench(log=KeptLog(keeps_bodies=False))

    bench.enhance()

    (entry,) = bench.log.entries
    assert entry.body is None
    assert "swordfish" not in repr(entry)


def test_a_failure_after_resolution_is_logged_with_its_messages(bench: EnhanceBench) -> None:
    bench.models.replies = [WorkerTimeout("late")]

    bench.refused(WorkerTimeout)

    (entry,) = bench.log.entries
    assert entry.messages_sha256 == messages_sha256(bench.models.asked[0].messages)
    assert entry.template_name == "enhancement_sdxl_sfw"
    assert entry.model_key is None


def test_prompts_that_cannot_be_had_are_logged(bench: EnhanceBench) -> None:
    bench.prompts.error = OSError("disk")

    with pytest.raises(OSError, match="disk"):
        bench.enhance()

    assert (bench.log.entries[0].status, bench.log.entries[0].error_code) == (
        500,
        "internal_error",
    )


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job_type", "target", "found"),
    [
        (None, None, ("sdxl", "image")),
        ("sdxl_image_high", None, ("sdxl", "image")),
        ("video_fast", None, ("wan", "video")),
        ("wan_video_high", None, ("wan", "video")),
        ("WAN", None, ("wan", "video")),
        (None, "wan", ("wan", "video")),
        ("video_fast", "provider/model", ("provider/model", "video")),
        ("image", "provider/model", ("provider/model", "image")),
    ],
)
def test_the_target_follows_from_the_job_type(
    job_type: str | None, target: str | None, found: tuple[str, str]
) -> None:
    assert target_of(job_type, target) == found


@pytest.mark.parametrize(
    ("said", "switch", "mode"),
    [("sfw", True, "sfw"), ("nsfw", None, "nsfw"), (None, True, "nsfw"), (None, False, None)],
)
def test_the_content_type_counts_before_the_switch(
    said: str | None, switch: bool | None, mode: str | None
) -> None:
    assert explicit_mode(said, switch) == mode


def test_another_users_own_character_stays_theirs(bench: EnhanceBench) -> None:
    snapshot = shipped()
    (first, *others) = snapshot.characters
    bench.prompts.snapshot = replace(snapshot, characters=(replace(first, owner_id=OTHER), *others))
    stranger: Caller = caller()

    bench.refused(NotFound, call(stranger), character_id=first.id)

"""Rules: which are taken, in which order, where they stand, and what is dropped."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import TemplateFault, TooLarge
from gateway.prompts.assemble import assemble
from gateway.prompts.matching import KEPT_SNAPSHOTS, KEPT_TUPLES
from gateway.values.assembly import Assembled, AssembleRequest, Step
from gateway.values.rows import Character, Rule, Snapshot
from tests.gateway import snapshots
from tests.gateway.snapshots import (
    WordCounter,
    WordCounters,
    detect_mark,
    rule,
    snapshot,
    template,
)


def run(rules: tuple[Rule, ...], counters: WordCounters | None = None, **fields: Any) -> Assembled:
    extra: dict[str, Any] = {
        key: fields.pop(key) for key in ("characters", "models") if key in fields
    }
    return assemble(
        snapshot(rules=rules, **extra),
        snapshots.request(**fields),
        counters or WordCounters(),
        detect=detect_mark,
    )


def steps(assembled: Assembled, outcome: str) -> list[Step]:
    return [one for one in assembled.trace if one.step == "rule" and one.outcome == outcome]


def test_prepended_texts_stand_before_and_appended_after_each_in_order() -> None:
    rules = (
        rule(1, "late", priority=9),
        rule(2, "early", priority=-9),
        rule(3, "second", rule_type="prepend", priority=5),
        rule(4, "first", rule_type="prepend"),
        rule(5, "above", rule_type="prepend", slot="user"),
        rule(6, "below", slot="user"),
        rule(7, "grain", slot="negative"),
        rule(8, "blur", slot="negative", rule_type="prepend"),
    )

    assembled = run(rules, user_negative="hands")

    system, user = assembled.messages
    assert system.content == "first\n\nsecond\n\nYou write prompts.\n\nearly\n\nlate"
    assert user.content == "above\na harbour at dawn\nbelow"
    assert assembled.negative == "blur, grain, hands"
    assert assembled.rule_ids == (2, 4, 5, 6, 7, 8, 3, 1)


def test_the_same_priority_goes_by_id() -> None:
    assembled = run((rule(3, "c"), rule(1, "a"), rule(2, "b")))

    assert assembled.messages[0].content == "You write prompts.\n\na\n\nb\n\nc"


@pytest.mark.parametrize(
    ("match", "is_taken"),
    [
        ({}, True),
        ({"target_model": "sdxl"}, True),
        ({"target_model": "wan"}, False),
        ({"target_model": ["wan", "sdxl"]}, True),
        ({"target_model": []}, False),
        ({"target_model": "*", "job_type": ["*"]}, True),
        ({"job_type": "image", "use_case": "enhancement", "content_mode": "sfw"}, True),
        ({"job_type": "image", "content_mode": "nsfw"}, False),
        ({"quality": "high"}, False),
        ({"character_id": "mara"}, False),
        ({"user_tier": "pro"}, True),
        ({"target_modle": "sdxl"}, False),
        ({"target_model": None}, False),
        ({"target_model": 7}, False),
    ],
)
def test_a_rule_is_taken_where_all_that_it_names_holds(match: object, is_taken: bool) -> None:
    assembled = run((rule(1, "text", match=match),), user_tier="pro")

    assert assembled.rule_ids == ((1,) if is_taken else ())


def test_the_trace_says_of_each_rule_that_does_not_match_what_differs() -> None:
    rules = (
        rule(1, "a", match={"target_model": "wan"}),
        rule(2, "b", tags=("night",)),
        rule(3, "c", is_active=False),
        rule(4, "d", match={"other": "x"}),
    )

    unmatched = steps(run(rules), "unmatched")[0]

    assert unmatched.detail == {
        "target_model": (1,),
        "tags": (2,),
        "is_active": (3,),
        "unknown key other": (4,),
    }


def test_a_rule_with_tags_wants_one_of_the_request_or_the_character() -> None:
    rules = (rule(1, "a", tags=("night",)), rule(2, "b", tags=("sea", "fog")), rule(3, "c"))
    mara = Character(id="mara", name="Mara", tags=("fog",))

    assert run(rules).rule_ids == (3,)
    assert run(rules, tags=("night",)).rule_ids == (1, 3)
    assert run(rules, characters=(mara,), character_id="mara").rule_ids == (2, 3)


def test_only_the_first_of_a_group_is_taken_and_holds_it_when_it_is_dropped() -> None:
    rules = (
        rule(1, "one two three", exclusive_group="g", max_tokens=2),
        rule(2, "two", exclusive_group="g"),
        rule(3, "other", exclusive_group="h"),
        rule(4, "same", exclusive_group="h"),
    )

    assembled = run(rules)

    assert assembled.rule_ids == (3,)
    assert [one.detail["id"] for one in steps(assembled, "dropped")] == [1]
    assert [(one.detail["id"], one.detail["holder"]) for one in steps(assembled, "skipped")] == [
        (2, 1),
        (4, 3),
    ]


def test_a_rule_that_does_not_match_does_not_hold_its_group() -> None:
    rules = (
        rule(1, "a", exclusive_group="g", match={"target_model": "wan"}),
        rule(2, "b", exclusive_group="g"),
    )

    assert run(rules).rule_ids == (2,)


def test_a_rule_is_dropped_for_its_rendered_length() -> None:
    rules = (rule(1, "{{ prompt }}", max_tokens=4), rule(2, "{{ prompt }}", max_tokens=3))

    assembled = run(rules, prompt="one two three four")

    assert assembled.rule_ids == (1,)
    assert steps(assembled, "dropped")[0].detail["tokens"] == 4


def test_a_rule_that_is_empty_when_rendered_leaves_no_blank() -> None:
    assembled = run((rule(1, "{% if character_name is defined %}x{% endif %}"),))

    assert assembled.messages[0].content == "You write prompts."
    assert assembled.rule_ids == ()
    assert steps(assembled, "skipped")[0].detail["id"] == 1


def test_a_missing_variable_of_a_rule_is_named_with_the_rule() -> None:
    with pytest.raises(TemplateFault, match="rule lights: the variable lamp is missing"):
        run((rule(1, "{{ lamp }}", name="lights"),))


def models(context_length: int) -> tuple[object, ...]:
    (model,) = snapshots.worker_rows()["models"]
    capabilities = {"context_length": context_length}
    return (
        type(model)(
            id=1,
            provider_id=1,
            external_id="q",
            model_name="q",
            model_key="qwen_instruct",
            capabilities=capabilities,
        ),
    )


OPTIONAL = (
    rule(1, "a " * 10, is_optional=True, priority=1),
    rule(2, "b " * 10, is_optional=True, priority=5),
    rule(3, "c " * 10, priority=9),
    rule(4, "d " * 10, is_optional=True, priority=5),
    rule(5, "e " * 10, is_optional=True, priority=7, slot="negative"),
)


def test_optional_rules_make_room_from_the_highest_priority_number_down() -> None:
    # 50 words and 12 around them; the answer may have 160.
    dropped = {
        length: run(OPTIONAL, models=models(160 + length)).rule_ids for length in (70, 50, 40, 30)
    }

    assert dropped == {70: (1, 2, 4, 5, 3), 50: (1, 2, 5, 3), 40: (1, 5, 3), 30: (5, 3)}


def test_what_is_still_over_after_all_is_refused_with_both_numbers() -> None:
    with pytest.raises(TooLarge, match=r"have \d+ tokens and 20 are free") as at:
        run(OPTIONAL, models=models(180))

    assert at.value.fields["limit"] == 20


def test_an_estimate_over_the_limit_is_told_and_not_refused() -> None:
    assembled = run(OPTIONAL, WordCounters(WordCounter(is_exact=False)), models=models(180))

    assert not assembled.tokens_exact
    assert [one.outcome for one in assembled.trace if one.step == "compression"][-1] == "over"


def test_what_is_kept_of_one_configuration_is_never_used_for_another() -> None:
    """More configurations and targets than are kept, in turn; each has a rule of its own."""
    rows = [
        snapshot(
            templates=(template(1, ("universal", "*", "enhancement", "sfw")),),
            rules=(rule(1, f"rule of {number}"), rule(2, "b", match={"target_model": "t7"})),
        )
        for number in range(KEPT_SNAPSHOTS + 2)
    ]

    for _ in range(2):
        for number, one in enumerate(rows):
            for target in ("t7", "t8"):
                request = snapshots.request(target_model=target)
                assembled = assemble(one, request, WordCounters(), detect=detect_mark)
                assert f"rule of {number}" in assembled.messages[0].content
                assert (2 in assembled.rule_ids) == (target == "t7")
    for number in range(KEPT_TUPLES + 2):
        request = snapshots.request(target_model=f"t{number}")
        assembled = assemble(rows[0], request, WordCounters(), detect=detect_mark)
        assert (2 in assembled.rule_ids) == (number == 7)


@settings(deadline=None)
@given(snapshots.rules(), snapshots.requests(), st.randoms(use_true_random=False))
def test_the_order_of_rows_in_a_snapshot_changes_nothing(
    rules: tuple[Rule, ...], request: AssembleRequest, shuffle: object
) -> None:
    request = snapshots.request("a sea", quality=request.quality, tags=request.tags)
    mixed = list(rules)
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    base = snapshot()

    outcomes = [
        assemble(
            Snapshot(
                revision=1,
                templates=base.templates,
                providers=base.providers,
                models=base.models,
                assignments=base.assignments,
                rules=tuple(rows),
            ),
            request,
            WordCounters(),
            detect=detect_mark,
        )
        for rows in (rules, mixed)
    ]

    assert outcomes[0].messages == outcomes[1].messages
    assert outcomes[0].rule_ids == outcomes[1].rule_ids


@settings(deadline=None)
@given(snapshots.rules(), st.sampled_from(("fast", "high")))
def test_rules_that_are_applied_are_in_order_and_each_match_is_told_once(
    rules: tuple[Rule, ...], quality: str
) -> None:
    by_id = {one.id: one for one in rules}

    assembled = run(rules, quality=quality)

    keys = [(by_id[id].priority, id) for id in assembled.rule_ids]
    assert keys == sorted(keys)
    told = [
        one.detail["id"] for one in assembled.trace if one.step == "rule" and "id" in one.detail
    ]
    others = itertools.chain(*steps(assembled, "unmatched")[0].detail.values())
    assert sorted([*told, *others]) == sorted(by_id)

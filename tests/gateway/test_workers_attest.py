"""Attestation: every mutation of a worker is seen, and an honest answer raises no alarm."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.values.assembly import Message
from gateway.workers.attest import PromptIds, Sent, ServedModel, attest
from gateway.workers.attester import Attester, SeenIds
from tests.gateway.fake_worker import MUTATIONS, answer_body, identity, mutated_answer, prompt_ids

EXAMPLES = int(os.environ.get("GATEWAY_ATTEST_EXAMPLES", "150"))
MODEL = "demo-chat"
SERVED = ServedModel(id=MODEL, aliases=("qwen_instruct", "instruct"), **identity(MODEL))
BASE = ServedModel(id="demo-base", aliases=("qwen_base",), **identity("demo-base"))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
messages = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts),
    min_size=1,
    max_size=5,
)
params = st.fixed_dictionaries(
    {"model": st.sampled_from(["qwen_instruct", "QWEN_Instruct", "demo-chat"])},
    optional={
        "max_tokens": st.integers(3, 4096),
        "temperature": st.one_of(st.just(0), st.floats(0, 2)),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 100),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "stop": st.one_of(
            st.text("abc\n", min_size=1, max_size=5),
            st.lists(st.text("abc", min_size=1), max_size=3),
        ),
        "seed": st.integers(0, 2**64 - 1),
        "deterministic": st.booleans(),
        "response_format": st.just(
            {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
        ),
    },
)


def body_of(sent: Sent) -> dict[str, Any]:
    listed = [{"role": one.role, "content": one.content} for one in sent.messages]
    return {**copy.deepcopy(dict(sent.params)), "messages": listed}


def ids_of(sent: Sent) -> PromptIds:
    return PromptIds.of(prompt_ids(body_of(sent)["messages"]))


def a_request(request_id: str = "r-1", **more: Any) -> Sent:
    return Sent(
        request_id=request_id,
        messages=(Message("system", "Be brief."), Message("user", "a red circle")),
        params={"model": "qwen_instruct", **more},
    )


def honest(sent: Sent) -> dict[str, Any]:
    return answer_body(body_of(sent), request_id=sent.request_id, model=MODEL, text="x")


class Tokenizer:
    """The fake's tokenizer, as if its file were here."""

    sha256 = identity(MODEL)["tokenizer_sha256"]

    def ids(self, messages: Iterable[Message]) -> list[int]:
        return prompt_ids([{"role": one.role, "content": one.content} for one in messages])


class Lists:
    """What a worker serves; counts how often it is read again."""

    def __init__(self, *models: ServedModel):
        self.models = models
        self.next: tuple[ServedModel, ...] | None = None
        self.refreshed = 0

    def model(self, worker_url: str, model_id: object, deadline: float) -> ServedModel | None:
        return next((one for one in self.models if one.id == model_id), None)

    def refresh(self, worker_url: str, deadline: float) -> object:
        self.refreshed += 1
        self.models = self.next or self.models
        return None


@settings(max_examples=EXAMPLES, deadline=None)
@given(messages, params)
def test_an_honest_answer_is_attested(listed: list[Message], given: dict[str, Any]) -> None:
    sent = Sent(request_id="r-1", messages=tuple(listed), params=given)

    result = attest(sent, honest(sent), served=SERVED, expected_ids=ids_of(sent))

    assert result.mismatches == ()
    assert result.ok


@settings(max_examples=EXAMPLES, deadline=None)
@given(messages, params, st.sampled_from(MUTATIONS), st.booleans())
def test_a_mutating_worker_is_caught_always(
    listed: list[Message], given: dict[str, Any], kind: str, has_earlier: bool
) -> None:
    sent = Sent(request_id="r-2", messages=tuple(listed), params=given)
    before = Sent(request_id="r-1", messages=tuple(listed), params=given)
    answer = mutated_answer(
        kind,
        body_of(sent),
        request_id=sent.request_id,
        model=MODEL,
        text="x",
        earlier=honest(before)["receipt"] if has_earlier else None,
    )
    named = (answer.get("receipt") or {}).get("model")
    served = next((one for one in (SERVED, BASE) if one.id == named), None)

    result = attest(sent, answer, served=served, expected_ids=ids_of(sent))

    assert not result.ok
    assert result.mismatches


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.sampled_from(sorted(honest(a_request())["receipt"])),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
    ),
)
def test_a_receipt_of_any_values_is_judged_and_never_raises(field: str, value: Any) -> None:
    sent = a_request(seed=7)
    answer = honest(sent)
    before = answer["receipt"][field]
    answer["receipt"][field] = value
    told_only = {
        "completion_ids_sha256",
        "prompt_tokens_cached",
        "context_tokens",
        "exactness",
    }

    result = attest(sent, answer, served=SERVED, expected_ids=ids_of(sent))

    assert result.ok is (field in told_only or (value == before and type(value) is type(before)))


def test_a_missing_receipt_is_a_mismatch_of_its_own() -> None:
    answer = honest(a_request())
    del answer["receipt"]

    result = attest(a_request(), answer)

    assert result.codes == ("no_receipt",)


def test_a_receipt_of_an_earlier_answer_to_the_same_messages_is_seen() -> None:
    earlier, sent = a_request("r-1"), a_request("r-2")

    result = attest(sent, honest(earlier), served=SERVED, expected_ids=ids_of(sent))

    assert result.codes == ("request_id",)


def test_the_workers_own_id_is_accepted_only_if_it_lists_the_asked_name() -> None:
    sent = a_request()

    assert attest(sent, honest(sent), served=SERVED).ok
    assert attest(sent, honest(sent), served=None).codes == ("model",)
    assert attest(sent, honest(sent), served=ServedModel(id=MODEL)).codes == ("model",)


def test_values_that_mean_off_are_equal_to_absent() -> None:
    sent = a_request(top_k=-1, repetition_penalty=1, presence_penalty=0, stop=[])
    answer = honest(a_request())

    result = attest(sent, answer, served=SERVED)

    assert result.ok


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.71), ("top_p", 1.0), ("top_k", 40), ("max_tokens", 511), ("min_p", 0.1)],
)
def test_a_parameter_that_nobody_sent_may_not_be_in_effect(name: str, value: float) -> None:
    sent = a_request()
    answer = honest(sent)
    answer["receipt"]["sampling"][name] = value

    result = attest(sent, answer, served=SERVED)

    assert result.codes == (f"sampling.{name}",)


def test_a_sampling_parameter_that_is_new_to_us_may_not_be_in_effect() -> None:
    answer = honest(a_request())
    answer["receipt"]["sampling"]["mirostat"] = 2

    result = attest(a_request(), answer, served=SERVED)

    assert result.codes == ("sampling.unknown",)


def test_keys_inside_of_what_was_sent_may_not_be_ignored() -> None:
    answer = honest(a_request())
    answer["receipt"]["ignored"] = ["messages[].name"]

    result = attest(a_request(), answer, served=SERVED)

    assert result.codes == ("ignored",)


def test_the_route_of_enhancement_has_its_own_default_of_max_tokens() -> None:
    sent = Sent(request_id="r-1", messages=(Message("user", "x"),), max_tokens=200)
    answer = honest(Sent(request_id="r-1", messages=sent.messages, params={"max_tokens": 200}))

    assert attest(sent, answer).ok
    assert attest(Sent(request_id="r-1", messages=sent.messages), answer).codes == (
        "sampling.max_tokens",
    )


def test_details_hold_no_text_of_the_prompt() -> None:
    sent = a_request(stop="circle")
    answer = honest(sent)
    answer["receipt"]["sampling"]["stop"] = ["a red circle"]
    answer["finish_reason"] = "a red circle"

    result = attest(sent, answer, served=SERVED)

    assert set(result.codes) == {"sampling.stop", "answer.finish_reason"}
    assert "circle" not in repr(result)


def test_without_the_tokenizer_a_forged_ids_hash_is_seen_from_the_second_time_on() -> None:
    attester = Attester(Lists(SERVED))
    first, second = a_request("r-1"), a_request("r-2")
    forged = mutated_answer("ids_forged", body_of(second), request_id="r-2", model=MODEL, text="x")

    assert attester.check(first, honest(first), "http://w", 0.0).ok
    result = attester.check(second, forged, "http://w", 0.0)

    assert result.codes == ("prompt_ids_sha256",)


def test_with_the_tokenizer_a_forged_ids_hash_is_seen_at_once() -> None:
    attester = Attester(Lists(SERVED), [Tokenizer()])
    sent = a_request()
    forged = mutated_answer("ids_forged", body_of(sent), request_id="r-1", model=MODEL, text="x")

    result = attester.check(sent, forged, "http://w", 0.0)

    assert result.codes == ("prompt_ids_sha256",)
    assert attester.check(sent, honest(sent), "http://w", 0.0).ok


def test_an_answer_that_does_not_match_leaves_nothing_to_be_held_against() -> None:
    seen = SeenIds()
    attester = Attester(Lists(SERVED), seen=seen)
    sent = a_request()
    forged = mutated_answer("ids_forged", body_of(sent), request_id="r-1", model=MODEL, text="x")
    forged["receipt"]["seed"] = None

    attester.check(sent, forged, "http://w", 0.0)

    assert len(seen) == 0
    assert attester.check(sent, honest(sent), "http://w", 0.0).ok


def test_a_worker_that_was_restarted_with_other_weights_is_asked_again_what_it_serves() -> None:
    old = ServedModel(id=MODEL, aliases=("qwen_instruct",), weights="sha256:old")
    lists = Lists(old)
    lists.next = (SERVED,)
    sent = a_request()

    result = Attester(lists).check(sent, honest(sent), "http://w", 0.0)

    assert result.ok
    assert lists.refreshed == 1


def test_the_memory_of_ids_is_bounded_and_keeps_what_was_used_last() -> None:
    seen = SeenIds(capacity=2)
    one, other = PromptIds("1" * 64, 1), PromptIds("2" * 64, 2)
    seen.add(("w", "t", "c", "a"), one)
    seen.add(("w", "t", "c", "b"), one)
    seen.get(("w", "t", "c", "a"))

    seen.add(("w", "t", "c", "c"), one)
    seen.add(("w", "t", "c", "a"), other)

    assert len(seen) == 2
    assert seen.get(("w", "t", "c", "b")) is None
    assert seen.get(("w", "t", "c", "a")) == one

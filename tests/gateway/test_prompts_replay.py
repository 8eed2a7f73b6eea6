"""From the rows that a resolution used, the same messages again."""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings

from gateway.errors import GatewayError, Invalid
from gateway.prompts import replay
from gateway.prompts.assemble import assemble
from gateway.prompts.replay import (
    ConfigObjects,
    config_object,
    rebuild,
    request_from_json,
    request_to_json,
    used_objects,
)
from gateway.values.assembly import Assembled, AssembleRequest
from gateway.values.logentry import ConfigObject
from gateway.values.rows import Snapshot
from tests.gateway import snapshots
from tests.gateway.snapshots import WordCounters, detect_mark, rule, snapshot, template


def run(rows: Snapshot, request: AssembleRequest) -> Assembled:
    return assemble(rows, request, WordCounters(), detect=detect_mark)


def stored(objects: tuple[ConfigObject, ...]) -> list[ConfigObject]:
    """As a database gives them back: by hash, through JSON."""
    return [
        ConfigObject(
            content_hash=one.content_hash, kind=one.kind, body=json.loads(json.dumps(one.body))
        )
        for one in sorted(objects, key=lambda one: one.content_hash)
    ]


@settings(max_examples=500, deadline=None)
@given(snapshots.snapshots(), snapshots.requests())
def test_the_rows_that_were_used_give_the_same_again(
    rows: Snapshot, request: AssembleRequest
) -> None:
    try:
        first = run(rows, request)
    except GatewayError:
        return

    kept = stored(used_objects(rows, request, first))
    again = run(rebuild(kept), request_from_json(json.loads(json.dumps(request_to_json(request)))))

    assert again.messages_sha256 == first.messages_sha256
    assert again.params == first.params
    assert again.negative == first.negative
    assert again.models == first.models
    assert again.rule_ids == first.rule_ids
    assert again.limits == first.limits
    assert again.content_mode == first.content_mode


@settings(deadline=None)
@given(snapshots.requests())
def test_a_request_is_the_same_after_json(request: AssembleRequest) -> None:
    assert request_from_json(json.loads(json.dumps(request_to_json(request)))) == request


def test_rows_that_had_no_part_are_not_kept() -> None:
    rows = snapshot(
        templates=(template(1), template(2, ("wan", "video", "enhancement", "sfw"))),
        rules=(rule(1, "a", max_tokens=0), rule(2, "b", match={"target_model": "wan"})),
    )
    request = snapshots.request()

    objects = used_objects(rows, request, run(rows, request))

    assert [(one.kind, one.body["id"]) for one in objects] == [
        ("template", 1),
        ("rule", 1),
        ("assignment", 1),
        ("model", 1),
        ("provider", 1),
    ]
    assert objects[0].body["live"]["version"] == 1


def test_an_edit_after_the_fact_does_not_reach_a_replay() -> None:
    request = snapshots.request()
    before = snapshot()
    first = run(before, request)
    kept = used_objects(before, request, first)
    after = snapshot(templates=(template(1, system_prompt="Another text.", version=2),))

    assert run(after, request).messages_sha256 != first.messages_sha256
    assert run(rebuild(kept), request).messages_sha256 == first.messages_sha256


def test_the_same_content_has_the_same_hash_and_another_has_another() -> None:
    request = snapshots.request()
    rows = snapshot()

    one, same = (used_objects(rows, request, run(rows, request))[0] for _ in range(2))
    changed = snapshot(templates=(template(1, max_output_tokens=161),))
    other = used_objects(changed, request, run(changed, request))[0]

    assert one.content_hash == same.content_hash
    assert one.content_hash != other.content_hash


def test_an_object_that_was_changed_is_refused() -> None:
    request = snapshots.request()
    rows = snapshot()
    first = used_objects(rows, request, run(rows, request))[0]

    with pytest.raises(Invalid, match="does not match its hash"):
        rebuild([replace(first, body={**first.body, "template_name": "other"})])
    with pytest.raises(Invalid, match="kind is none of"):
        rebuild([replace(first, kind="secret")])


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "other": 1}, []])
def test_a_body_that_is_no_request_is_refused(body: object) -> None:
    with pytest.raises(Invalid):
        request_from_json(body)  # type: ignore[arg-type]


# --- what is remembered ------------------------------------------------------------------------


def test_the_same_rows_are_turned_into_objects_once(monkeypatch: pytest.MonkeyPatch) -> None:
    request = snapshots.request()
    rows = snapshot()
    assembled = run(rows, request)
    first = used_objects(rows, request, assembled)
    monkeypatch.setattr(replay, "config_object", None)  # cannot be called

    again = used_objects(rows, request, assembled)

    assert again == first
    assert all(one is same for one, same in zip(first, again, strict=True))


def test_rows_that_come_and_go_are_never_taken_for_each_other() -> None:
    objects = ConfigObjects(kept=3)

    for number in range(500):
        row = rule(number % 7, f"text {number}")
        assert objects.of([("rule", row)]) == [config_object("rule", row)]
        del row
        gc.collect(
            0
        )  # its memory, and with it its id, is free for the next one if nothing holds it


def test_a_row_is_another_object_under_another_kind() -> None:
    row = rule(1, "a")
    objects = ConfigObjects()

    assert objects.of([("rule", row)]) != objects.of([("other", row)])


def test_the_rows_that_were_used_longest_ago_are_forgotten() -> None:
    objects = ConfigObjects(kept=2)
    one, two, three = (("rule", rule(number, "a")) for number in (1, 2, 3))
    (first,), (second,) = objects.of([one]), objects.of([two])
    objects.of([one])
    objects.of([three])

    assert objects.of([one])[0] is first
    assert objects.of([two])[0] is not second
    assert objects.of([two])[0] == second


def test_more_rows_than_are_kept_are_all_answered() -> None:
    rows = [("rule", rule(number, "a")) for number in range(9)]

    assert ConfigObjects(kept=4).of(rows) == [config_object(*one) for one in rows]


def test_a_row_that_cannot_be_kept_is_refused_each_time() -> None:
    objects = ConfigObjects()
    row = rule(1, "half of a pair: \ud83d")

    for _ in range(2):
        with pytest.raises(Invalid, match="unpaired surrogate"):
            objects.of([("rule", row)])


def test_threads_that_share_what_is_remembered_all_get_their_own_rows() -> None:
    objects = ConfigObjects(kept=16)
    rows = [("rule", rule(number, f"text {number}")) for number in range(40)]
    expected = [config_object(*one) for one in rows]

    def use(start: int) -> bool:
        return all(
            objects.of(rows[at : at + 8]) == expected[at : at + 8]
            for at in ((start + step) % 32 for step in range(100))
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(8)))

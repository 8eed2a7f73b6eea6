"""What a job would take, what a request waited for, and who holds the device's memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest

from tests.conftest import IMAGE, INSTRUCT
from tests.fakes import ChatPort, answer_query
from tests.http.answers import refused
from worker.errors import ContextTooLong
from worker.protocol.messages import (
    Acquire,
    Declare,
    PlanChat,
    Planned,
    PlanQuery,
    TenantSpec,
    Way,
    failed,
)
from worker.vram.broker import Broker
from worker.vram.dryrun import dry_run

JOB = {"prompt": "a red circle", "type": "image", "width": 512, "height": 512, "steps": 10}


@pytest.fixture(params=["make_chat", "make_media"])
def make(request: pytest.FixtureRequest) -> Callable[..., ChatPort]:
    """Each of the two ports."""
    made: Callable[..., ChatPort] = request.getfixturevalue(request.param)
    return made


def test_a_plan_says_for_each_phase_what_it_takes_and_what_moves(make) -> None:
    body = make().client.post("/plan", json=JOB).get_json()

    assert body["fits"] is True
    assert body["model"] == IMAGE
    assert body["exactness"] == "bit"
    assert [one["name"] for one in body["phases"]] == ["encode", "denoise", "decode", "host"]
    assert body["phases"][0]["peak_bytes"] == 3 << 30
    assert body["phases"][0]["tenants_bytes"] == 4 << 30
    assert body["phases"][0]["free_bytes"] == 3 << 30
    assert [one["move"] for one in body["phases"][0]["moves"]] == ["bring"]
    assert body["phases"][0]["tenants"] == [f"{IMAGE}.all"]
    assert body["phases"][1]["moves"] == []
    assert body["phases"][3]["way"] == "host"
    assert body["phases"][3]["peak_bytes"] == 0
    assert body["extra_seconds"] == 0.5
    assert body["eta_seconds"] is None  # nothing like it was seen


def test_a_plan_has_an_interval_once_something_like_it_was_seen(make) -> None:
    def seen(query):
        if not isinstance(query, PlanQuery):
            return answer_query(query)
        broker = Broker(10 << 30)
        for name, seconds in (("encode", 1.0), ("denoise", 20.0), ("decode", 2.0)):
            broker.paces.learn(IMAGE, name, 512 * 512, 10, seconds)
        broker.paces.learn(IMAGE, "host", 512 * 512, 1, 3.0)
        phases = dry_run(broker, query.holder, query.tenants, query.phases, 0.0)
        return Planned(request_id=query.request_id, phases=tuple(phases))

    body = make(orchestrator=seen).client.post("/plan", json=JOB).get_json()

    low, high = body["eta_seconds"]
    # A text that was read before is not encoded, and nothing is brought for that.
    assert low == pytest.approx(25 / 1.5, abs=0.01)
    assert high == pytest.approx(0.5 + 26 * 1.5, abs=0.01)


def test_a_plan_counts_what_a_job_brings_and_how_long_its_text_is(make) -> None:
    port = make()

    def denoise(**more):
        phases = port.client.post("/plan", json=JOB | more).get_json()["phases"]
        return phases[1]["peak_bytes"] >> 30

    assert denoise() == 3
    assert denoise(prompt="red " * 76) == 4
    assert denoise(negative_prompt="red " * 151) == 5
    refused(port.client.post("/plan", json=JOB | {"prompt": "a " * 1501}), 413, "prompt_too_long")


def test_a_plan_of_jobs_that_share_a_batch_has_the_peak_of_all_their_pictures(make) -> None:
    port = make()
    job = JOB | {"exactness": "close"}

    body = port.client.post("/plan?jobs=3", json=job).get_json()

    names = [one["name"] for one in body["phases"]]
    assert names == ["encode"] * 3 + ["denoise"] + ["decode"] * 3
    assert body["phases"][3]["peak_bytes"] == 5 << 30
    assert body["jobs"] == 3
    refused(port.client.post("/plan?jobs=2", json=JOB), 422, "unsupported")
    refused(port.client.post("/plan?jobs=7", json=job), 422, "out_of_range")
    refused(port.client.post("/plan?jobs=0", json=job), 422, "out_of_range")
    refused(port.client.post("/plan?jobs=many", json=job), 400, "invalid_request")


def test_a_video_with_pictures_is_not_planned_for_a_model_without_vace(make) -> None:
    job = {"type": "video", "prompt": "a red circle", "image": "https://pictures.test/a.png"}

    answer = make().client.post("/plan", json=job)

    refused(answer, 422, "unsupported")
    assert "needs VACE weights" in answer.get_json()["error"]


CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "unknown": 1}


def test_a_chat_request_is_planned_with_its_tokens_and_its_part_of_the_pool(make) -> None:
    port = make()

    body = port.client.post("/plan", json=CHAT).get_json()

    [asked] = port.link.of(PlanChat)
    assert (asked.model, asked.max_tokens) == (INSTRUCT, 64)
    assert [one.content for one in asked.messages] == ["Hello"]
    assert body["model"] == INSTRUCT
    assert body["fits"] is True
    assert (body["prompt_tokens"], body["prompt_tokens_cached"], body["max_tokens"]) == (20, 16, 64)
    assert (body["kv_bytes"], body["pool_bytes"], body["whole_pool_bytes"]) == (
        1 << 29, 1 << 28, 1 << 30
    )  # fmt: skip
    assert body["pool_holds_it"] is False
    assert [one["name"] for one in body["phases"]] == ["chat"]
    assert body["ignored"] == ["unknown"]
    # It is read from disk first, and the whole pool comes with it.
    brought = {one["tenant"]: one["bytes"] for one in body["phases"][0]["moves"]}
    assert brought == {
        f"{INSTRUCT}.weights": 2 << 30, f"{INSTRUCT}.kv": (1 << 30) + (1 << 20)
    }  # fmt: skip
    assert body["extra_seconds"] > 1
    low, high = body["eta_seconds"]
    assert low == pytest.approx(0.5 + body["extra_seconds"], abs=0.01)
    assert high == pytest.approx(4.0 + body["extra_seconds"], abs=0.01)


def test_a_shrunk_pool_is_planned_to_grow_for_a_longer_request_at_others_cost(make) -> None:
    """1 GiB of weights more than fit beside its least pool: the idle picture has to go."""

    def crowded(query):
        if not isinstance(query, PlanQuery):
            return answer_query(query)
        broker = Broker((2 << 30) + (1 << 30) + (4 << 30))
        resident = TenantSpec(
            id="image.all", model="image", size_bytes=9 << 29, floor_bytes=9 << 29, host_copy=True
        )
        hold(broker, "engine media", [resident])
        hold(broker, "engine chat", query.tenants)
        assert broker.ledger.held(f"{INSTRUCT}.kv") < (1 << 29)
        phases = dry_run(broker, query.holder, query.tenants, query.phases, 0.0)
        return Planned(request_id=query.request_id, phases=tuple(phases))

    body = make(orchestrator=crowded).client.post("/plan", json=CHAT).get_json()

    assert body["fits"] is True
    moves = [(one["move"], one["tenant"]) for one in body["phases"][0]["moves"]]
    assert moves == [("park", "image.all"), ("bring", f"{INSTRUCT}.kv")]


def hold(broker: Broker, holder: str, tenants: Sequence[TenantSpec]) -> None:
    """They are on the device, idle."""
    epoch = broker.join(holder, 0)
    broker.take(holder, Declare(epoch=epoch, model=tenants[0].model, tenants=tuple(tenants)), 0.0)
    way = Way(name="whole", tenants=tuple(one.id for one in tenants), peak_bytes=0)
    asked = Acquire(epoch=epoch, number=1, request_id="r", phase="p", ways=(way,), standing=True)
    broker.take(holder, asked, 0.0)
    broker.finish_all()


def test_a_chat_request_that_leaves_no_room_is_refused_with_both_numbers(make) -> None:
    port = make()
    port.link.plays(
        lambda message: [
            failed(message.request_id, ContextTooLong(prompt_tokens=4096, context_tokens=4096))
        ]
    )

    answer = port.client.post("/plan", json=CHAT)

    refused(answer, 413, "context_overflow")
    assert "4096" in answer.get_json()["error"]


def test_a_raw_completion_is_planned_as_well(make) -> None:
    port = make()

    body = port.client.post("/plan", json={"inputs": "Once", "parameters": {}}).get_json()

    [asked] = port.link.of(PlanChat)
    assert (asked.prompt, asked.max_tokens) == ("Once", 150)
    assert body["prompt_tokens"] == 20


def test_a_chat_request_that_is_not_taken_is_refused_by_its_plan(make) -> None:
    port = make()
    refused(port.client.post("/plan", json=CHAT | {"messages": []}), 400, "invalid_request")
    refused(port.client.post("/plan", json=CHAT | {"model": "other"}), 422, "unsupported")
    refused(port.client.post("/plan", json=CHAT | {"temperature": 3}), 422, "out_of_range")
    port.link.goes_away()
    refused(port.client.post("/plan", json=CHAT), 503, "engine_unavailable")


def test_a_plan_of_what_does_not_fit_says_how_much_is_missing(make) -> None:
    def small(query):
        phases = dry_run(Broker(3 << 30), query.holder, query.tenants, query.phases, 0.0)
        return Planned(request_id=query.request_id, phases=tuple(phases))

    answer = make(orchestrator=small).client.post("/plan", json=JOB)

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["fits"] is False
    assert body["exactness"] is None
    assert "3.00 GiB of 3.00 GiB" in body["phases"][-1]["refused"]


def test_a_plan_of_a_job_that_is_not_taken_is_refused_as_the_job_is(make) -> None:
    port = make()

    refused(port.client.post("/plan", json=JOB | {"width": 513}), 422, "out_of_range")
    refused(port.client.post("/plan", json={"type": "image"}), 400, "invalid_request")


def test_what_a_request_waited_for_is_explained(make) -> None:
    body = make().client.get("/explain/j1").get_json()

    assert body == {
        "request_id": "j1", "events": [{"t_s": 0.0, "what": "asked", "phase": "decode"}]
    }  # fmt: skip


def test_a_request_of_which_nothing_is_known_is_not_found(make) -> None:
    refused(make().client.get("/explain/other"), 404, "not_found")


def test_without_an_orchestrator_plans_and_explanations_come_later(make) -> None:
    port = make(orchestrator=lambda query: None)

    assert port.client.get("/memory/status").get_json()["ledger"] is None
    for answer in (port.client.get("/explain/j1"), port.client.post("/plan", json=JOB)):
        refused(answer, 503, "engine_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    assert "verbatim_ledger_up 0.0" in port.client.get("/metrics").text


def test_the_ledger_is_in_the_memory_report_and_in_the_metrics(make) -> None:
    port = make()

    ledger = port.client.get("/memory/status").get_json()["ledger"]
    metrics = port.client.get("/metrics").text

    assert ledger["budget_bytes"] == 10
    assert ledger["free_bytes"] == 7
    assert re.search(r'^verbatim_tenant_bytes\{tenant="a.weights"\} 3.0$', metrics, re.MULTILINE)
    assert re.search(r'^verbatim_ledger_total\{what="granted"\} 2.0$', metrics, re.MULTILINE)

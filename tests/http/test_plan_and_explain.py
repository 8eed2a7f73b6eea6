"""What a job would take, what a request waited for, and who holds the device's memory."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.conftest import IMAGE
from tests.fakes import ChatPort, answer_query
from tests.http.answers import refused
from worker.protocol.messages import Planned, PlanQuery
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
    assert [one["name"] for one in body["phases"]] == ["encode", "denoise", "decode"]
    assert body["phases"][0]["peak_bytes"] == 3 << 30
    assert body["phases"][0]["tenants_bytes"] == 4 << 30
    assert body["phases"][0]["free_bytes"] == 3 << 30
    assert [one["move"] for one in body["phases"][0]["moves"]] == ["bring"]
    assert body["phases"][1]["moves"] == []
    assert body["extra_seconds"] == 0.5
    assert body["eta_seconds"] is None  # nothing like it was seen


def test_a_plan_has_an_interval_once_something_like_it_was_seen(make) -> None:
    def seen(query):
        if not isinstance(query, PlanQuery):
            return answer_query(query)
        broker = Broker(10 << 30)
        for name, seconds in (("encode", 1.0), ("denoise", 20.0), ("decode", 2.0)):
            broker.paces.learn(IMAGE, name, 512 * 512, 10, seconds)
        phases = dry_run(broker, query.holder, query.tenants, query.phases, 0.0)
        return Planned(request_id=query.request_id, phases=tuple(phases))

    body = make(orchestrator=seen).client.post("/plan", json=JOB).get_json()

    low, high = body["eta_seconds"]
    assert low == pytest.approx(0.5 + 23 / 1.25, abs=0.01)
    assert high == pytest.approx(0.5 + 23 * 1.25, abs=0.01)


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

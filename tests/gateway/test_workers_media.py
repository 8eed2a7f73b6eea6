"""Jobs over HTTP: a worker takes a job once, whatever happens in between."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from gateway.errors import (
    Conflict,
    GatewayError,
    Invalid,
    WorkerBusy,
    WorkerFault,
    WorkerTimeout,
    WorkerUnavailable,
)
from gateway.workers.client import Keys, WorkerClient
from gateway.workers.media import Accepted, MediaWorkers, media_workers
from gateway.workers.registry import Worker
from gateway.workers.served import ServedModels, fetch_info, parse_models
from gateway.workers.urls import AddressPolicy
from tests.gateway.fake_worker import Behaviour, FakeWorker, closed_port_url, identity
from tests.gateway.test_workers_pool import NoMonitor

BODY = {"id": "job-1", "type": "sdxl_image_fast", "prompt": "a red circle"}


class Listed:
    def __init__(self, types: str, urls: Sequence[str]):
        self._workers = [Worker(worker_type=types, url=url) for url in urls]

    def workers(self, *worker_types: str) -> Sequence[Worker]:
        return [one for one in self._workers if one.worker_type in worker_types]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def fake(stack: ExitStack, kind: str = "normal", **more: Any) -> FakeWorker:
    worker = stack.enter_context(FakeWorker())
    worker.behave(kind, **more)
    return worker


def client(stack: ExitStack, key: str | None = None) -> WorkerClient:
    made = WorkerClient(AddressPolicy(private_allowed=True), Keys(None, key))
    stack.callback(made.close)
    return made


def post(
    stack: ExitStack, *workers: FakeWorker | str, body: dict[str, Any] | None = None
) -> Accepted:
    urls = [one if isinstance(one, str) else one.url for one in workers]
    media = MediaWorkers(Listed("sdxl", urls), NoMonitor(), client(stack, "s3cret"))
    return media.post_generate(
        BODY if body is None else body, worker_type="sdxl", deadline_s=3.0, request_id="r-1"
    )


def test_a_job_is_accepted_with_its_id_and_where_to_look(stack: ExitStack) -> None:
    worker = fake(stack)

    taken = post(stack, worker)

    assert (taken.job_id, taken.status, taken.status_url) == ("job-1", "queued", "/jobs/job-1")
    assert taken.worker_url == worker.url
    (seen,) = worker.posts("/generate")
    assert seen.body == BODY
    assert seen.headers["Authorization"] == "Bearer s3cret"
    assert seen.headers["X-Request-Id"] == "r-1"


@pytest.mark.parametrize("kind", ["busy", "loading", "unauthorized"])
def test_where_a_worker_surely_took_nothing_the_next_is_asked(stack: ExitStack, kind: str) -> None:
    first, second = fake(stack, kind), fake(stack)

    taken = post(stack, first, second)

    assert taken.worker_url == second.url
    assert len(taken.attempts) == 2


@pytest.mark.parametrize("kind", ["drop", "drop_early", "not_json"])
def test_where_a_worker_may_have_taken_it_the_same_one_is_asked_again(
    stack: ExitStack, kind: str
) -> None:
    first, second = fake(stack), fake(stack)
    first.script(Behaviour(kind))

    taken = post(stack, first, second)

    assert taken.worker_url == first.url
    assert len(taken.attempts) == 2
    assert second.posts() == []


@pytest.mark.parametrize(
    ("kind", "error"), [("hang", WorkerTimeout), ("drop", WorkerFault), ("not_json", WorkerFault)]
)
def test_a_job_that_may_run_already_is_never_given_to_another_worker(
    stack: ExitStack, kind: str, error: type[GatewayError]
) -> None:
    first, second = fake(stack, kind), fake(stack)

    with pytest.raises(error):
        post(stack, first, second)

    assert len(first.posts()) == 2
    assert second.posts() == []


def test_errors_of_jobs(stack: ExitStack) -> None:
    with pytest.raises(WorkerUnavailable):
        post(stack)
    with pytest.raises(WorkerUnavailable):
        post(stack, closed_port_url())
    with pytest.raises(WorkerBusy):
        post(stack, fake(stack, "busy"))
    with pytest.raises(Invalid, match="out_of_range"):
        post(stack, fake(stack, "error", status=422, error_code="out_of_range"))
    with pytest.raises(Invalid, match="needs an id"):
        post(stack, fake(stack), body={"prompt": "x"})


def test_an_id_that_is_taken_by_another_body_is_a_conflict(stack: ExitStack) -> None:
    worker = fake(stack)
    post(stack, worker)

    with pytest.raises(Conflict):
        post(stack, worker, body={**BODY, "prompt": "another"})
    assert post(stack, worker).job_id == "job-1"


def test_jobs_of_sdxl_go_to_the_wan_worker_where_there_is_no_other() -> None:
    wan = Listed("wan", ["http://w"])

    assert [one.url for one in media_workers(wan, "sdxl")] == ["http://w"]
    assert media_workers(Listed("sdxl", ["http://s"]), "wan") == ()


def test_a_workers_list_of_models_is_read_with_names_and_hashes(stack: ExitStack) -> None:
    worker = fake(stack)

    models = parse_models(fetch_info(client(stack), worker.url, time.monotonic() + 10))

    assert models[0].id == "demo-chat"
    assert models[0].weights == identity("demo-chat")["weights"]
    assert models[0].answers_to("QWEN_INSTRUCT")
    assert not models[1].answers_to("qwen_instruct")


def test_entries_that_are_no_models_are_left_out() -> None:
    body = {"models": [7, {}, {"id": 3}, {"id": "x", "aliases": "y"}, {"id": "z", "aliases": [1]}]}

    assert [(one.id, one.aliases) for one in parse_models(body)] == [("x", ()), ("z", ())]
    assert parse_models({"models": {"x": 1}}) == ()


def test_the_list_is_kept_for_a_minute_and_the_old_one_where_it_cannot_be_read(
    stack: ExitStack,
) -> None:
    now = [0.0]
    worker = fake(stack)
    calls = WorkerClient(AddressPolicy(private_allowed=True), Keys(), clock=lambda: now[0])
    stack.callback(calls.close)
    served = ServedModels(calls, clock=lambda: now[0])

    first = served.model(worker.url, "demo-chat", 10.0)
    second = served.model(worker.url, "demo-chat", 10.0)
    reads = len(worker.gets("/worker/info"))
    now[0] = 61.0
    worker.has_info = False
    third = served.model(worker.url, "demo-chat", 70.0)

    assert first == second == third
    assert first is not None
    assert (reads, len(worker.gets("/worker/info"))) == (1, 2)
    assert served.model(closed_port_url(), "demo-chat", 70.0) is None


def test_a_worker_without_a_list_is_a_fault(stack: ExitStack) -> None:
    worker = fake(stack)
    worker.has_info = False

    with pytest.raises(WorkerFault):
        fetch_info(client(stack), worker.url, time.monotonic() + 10)

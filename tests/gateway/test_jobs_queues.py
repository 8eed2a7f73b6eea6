"""Lists that jobs are pushed to: a real Redis, and Upstash's REST interface over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.config import GatewaySection, Settings
from gateway.errors import ConfigError, QueueUnavailable
from gateway.jobs.queues import JobQueue, RedisQueue, UpstashQueue, encode, queue_of
from tests.redis_server import RedisServer, running_redis
from tests.upstash_bridge import bridge
from worker.queues.elements import decode_element

TOKEN = "token-of-the-bridge"
ELEMENT: dict[str, Any] = {"id": "1", "prompt": 'é "中" 🙂 \\ \n', "config": {"seed": 0}}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_redis() as running:
        yield running


@pytest.fixture(params=["redis", "upstash"])
def queue(request: pytest.FixtureRequest, server: RedisServer) -> Iterator[JobQueue]:
    made: JobQueue
    with ExitStack() as stack:
        if request.param == "redis":
            made = RedisQueue(server.url)
        else:
            made = UpstashQueue(stack.enter_context(bridge(server.url, TOKEN)), TOKEN)
        yield made
        made.close()
    client = server.client()
    client.flushall()
    client.close()


def listed(server: RedisServer, name: str = "sdxl_queue") -> list[bytes]:
    client = server.client()
    try:
        return list(client.lrange(name, 0, -1))  # type: ignore[arg-type]
    finally:
        client.close()


def test_an_element_arrives_in_the_producers_encoding(queue: JobQueue, server: RedisServer) -> None:
    length = queue.push("sdxl_queue", ELEMENT)

    (stored,) = listed(server)
    outer = json.loads(stored)
    assert length == 1
    assert isinstance(outer, list)
    assert [json.loads(one) for one in outer] == [ELEMENT]
    assert decode_element(stored) == [ELEMENT]


def test_jobs_taken_from_the_left_come_in_their_order(queue: JobQueue, server: RedisServer) -> None:
    for number in range(5):
        assert queue.push("wan_queue", {"id": str(number)}) == number + 1

    ids = [decode_element(one)[0]["id"] for one in listed(server, "wan_queue")]
    assert ids == ["0", "1", "2", "3", "4"]
    assert listed(server) == []


def test_a_list_that_is_none_is_an_error(queue: JobQueue, server: RedisServer) -> None:
    client = server.client()
    client.set("sdxl_queue", "a text")
    client.close()

    with pytest.raises(QueueUnavailable):
        queue.push("sdxl_queue", ELEMENT)


@pytest.mark.parametrize("kind", ["redis", "upstash"])
def test_a_server_that_is_gone_is_an_error_and_may_come_back(kind: str) -> None:
    with running_redis() as server, ExitStack() as stack:
        made: JobQueue = (
            RedisQueue(server.url)
            if kind == "redis"
            else UpstashQueue(stack.enter_context(bridge(server.url, TOKEN)), TOKEN)
        )
        made.push("sdxl_queue", ELEMENT)
        server.kill()
        with pytest.raises(QueueUnavailable) as caught:
            made.push("sdxl_queue", ELEMENT)
        server.start()
        after = made.push("sdxl_queue", ELEMENT)
        made.close()

    assert (caught.value.status, caught.value.retry_after_s) == (503, 5.0)
    assert "127.0.0.1" not in str(caught.value)
    assert after == 1


def test_a_wrong_token_is_an_error(server: RedisServer) -> None:
    with bridge(server.url, TOKEN) as url:
        queue = UpstashQueue(url, "another")
        with pytest.raises(QueueUnavailable, match="401"):
            queue.push("sdxl_queue", ELEMENT)
        queue.close()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: httpx.Response(200, json={"result": "OK"}),
        lambda: httpx.Response(200, json={"result": True}),
        lambda: httpx.Response(200, json={"error": "ERR"}),
        lambda: httpx.Response(200, json=[1]),
        lambda: httpx.Response(200, text="<html>"),
        lambda: httpx.Response(400, json={"error": "ERR"}),
        lambda: httpx.Response(500, json={"result": 1}),
        lambda: httpx.Response(307, headers={"Location": "http://x"}),
    ],
)
def test_an_answer_that_is_no_length_is_an_error(answer: Callable[[], httpx.Response]) -> None:
    transport = httpx.MockTransport(lambda _: answer())
    queue = UpstashQueue("https://queue.example.org", TOKEN, transport)

    with pytest.raises(QueueUnavailable):
        queue.push("sdxl_queue", ELEMENT)

    queue.close()


def test_encoding_keeps_every_character() -> None:
    assert decode_element(encode(ELEMENT).encode()) == [ELEMENT]


# --- which one ----------------------------------------------------------------------------------

REST = {"UPSTASH_REDIS_REST_URL": "https://q.example.org", "UPSTASH_REDIS_REST_TOKEN": "t"}
OWN = {"REDIS_URL": "redis://127.0.0.1:6379/0"}


def chosen(environment: dict[str, str], *, queues: bool = True) -> JobQueue | None:
    return queue_of(
        Settings(
            section=GatewaySection(queues=queues),
            state_dir=Path("state"),
            models_dir=Path("models"),
            database_url="sqlite:///x",
            environment=environment,
        )
    )


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        (OWN, RedisQueue),
        (REST, UpstashQueue),
        ({**OWN, **REST, "VERBATIM_QUEUE": "redis"}, RedisQueue),
        ({**OWN, **REST, "VERBATIM_QUEUE": "upstash"}, UpstashQueue),
        ({**REST, "VERBATIM_QUEUE": "redis"}, None),
    ],
)
def test_the_environment_names_the_queue(environment: dict[str, str], kind: type | None) -> None:
    found = chosen(environment)

    assert type(found) is (kind or type(None))
    assert chosen(environment, queues=False) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"UPSTASH_REDIS_REST_URL": "https://q.example.org"},
        {"UPSTASH_REDIS_REST_TOKEN": "t"},
        {**OWN, **REST},
        {"REDIS_URL": "http://user:secret@x"},
    ],
)
def test_half_a_setting_and_two_servers_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(environment)

    assert "secret" not in str(caught.value)

"""Which URLs workers may have, and that only checked addresses are connected to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore
import pytest

from gateway.errors import Invalid, InvalidRequest
from gateway.workers.client import Answer, CallFailed, Keys, WorkerClient, clean_request_id
from gateway.workers.network import CheckedNetwork, left_s, until
from gateway.workers.urls import AddressPolicy, parse_worker_url
from tests.gateway.fake_worker import FakeWorker


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://Pod-7861.proxy.runpod.net/", "https://pod-7861.proxy.runpod.net"),
        ("http://host:80", "http://host"),
        ("https://host:443/", "https://host"),
        ("http://host.:7861//", "http://host:7861"),
        (" http://127.0.0.1:7861 ", "http://127.0.0.1:7861"),
        ("http://[::1]:7861", "http://[::1]:7861"),
        ("https://host/behind/a/proxy/", "https://host/behind/a/proxy"),
    ],
)
def test_a_base_url_has_one_spelling(given: str, kept: str) -> None:
    assert parse_worker_url(given).text == kept


@pytest.mark.parametrize(
    "given",
    [
        None,
        7,
        "",
        "host:7861",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://user:pass@host",
        "http://user@host",
        "http://host/#fragment",
        "http://host/?query=1",
        "http://host?",
        "http://host:0",
        "http://host:65536",
        "http://host:",
        "http://2130706433",
        "http://127.1",
        "http://0x7f.0.0.1",
        "http://0177.0.0.1",
        "http://[fe80::1%25eth0]",
        "http://ho st",
        "http://host\\@evil",
        "http://höst",
        "http://host/../x",
        "http://-host",
        "http://" + "a" * 3000,
    ],
)
def test_what_readers_of_urls_may_understand_differently_is_refused(given: object) -> None:
    with pytest.raises(InvalidRequest):
        parse_worker_url(given)


def test_a_name_with_a_public_and_a_private_address_is_refused_as_a_whole() -> None:
    with pytest.raises(Invalid, match="private_workers"):
        AddressPolicy().check("host", 80, ["8.8.8.8", "10.0.0.1"])


def test_a_static_worker_may_be_private_and_its_other_ports_may_not() -> None:
    policy = AddressPolicy(trusted=frozenset({("127.0.0.1", 7861)}))

    assert policy.check("127.0.0.1", 7861, ["127.0.0.1"]) == ("127.0.0.1",)
    with pytest.raises(Invalid):
        policy.check("127.0.0.1", 6379, ["127.0.0.1"])


class Network(httpcore.NetworkBackend):
    """Records who is connected to; refuses some."""

    def __init__(self, refuse: Iterable[str] = ()):
        self.connected: list[str] = []
        self._refuse = set(refuse)

    def connect_tcp(self, host: str, *_: Any, **__: Any) -> httpcore.NetworkStream:
        self.connected.append(host)
        if host in self._refuse:
            raise httpcore.ConnectError("refused")
        return httpcore.NetworkStream()


def resolver(*answers: list[str]) -> tuple[Callable[[str, int], list[str]], list[str]]:
    """A resolver with an answer for each look-up, and the names that it was asked for."""
    asked: list[str] = []
    left = list(answers)

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return left.pop(0)

    return resolve, asked


def test_the_address_that_was_checked_is_the_one_that_is_connected_to() -> None:
    resolve, asked = resolver(["8.8.8.8"], ["127.0.0.1"])
    network = Network()
    checked = CheckedNetwork(AddressPolicy(), resolve, network)

    checked.connect_tcp("rebinding.example", 443, 5.0)

    assert network.connected == ["8.8.8.8"]
    assert asked == ["rebinding.example"]


def test_a_name_that_comes_to_point_inside_is_refused_at_the_next_connection() -> None:
    resolve, _ = resolver(["8.8.8.8"], ["127.0.0.1"])
    network = Network()
    checked = CheckedNetwork(AddressPolicy(), resolve, network)
    checked.connect_tcp("rebinding.example", 443, 5.0)

    with pytest.raises(Invalid):
        checked.connect_tcp("rebinding.example", 443, 5.0)

    assert network.connected == ["8.8.8.8"]


def test_every_checked_address_is_tried() -> None:
    resolve, _ = resolver(["8.8.8.8", "8.8.4.4"])
    network = Network(refuse=["8.8.8.8"])

    CheckedNetwork(AddressPolicy(), resolve, network).connect_tcp("host", 80, 5.0)

    assert network.connected == ["8.8.8.8", "8.8.4.4"]


def test_a_name_that_cannot_be_found_is_no_connection() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    with pytest.raises(httpcore.ConnectError):
        CheckedNetwork(AddressPolicy(), resolve, Network()).connect_tcp("host", 80, 5.0)


def test_the_deadline_of_a_call_bounds_the_timeout_of_each_read() -> None:
    with until(10.0):
        assert left_s(7.0, 60.0) == 3.0
        assert left_s(7.0, 1.0) == 1.0
        assert left_s(11.0, None) == -1.0
    assert left_s(7.0, 60.0) == 60.0


def test_a_private_worker_that_is_not_named_by_the_operator_gets_no_byte() -> None:
    with FakeWorker() as worker:
        client = WorkerClient(AddressPolicy(), Keys("s3cret"))

        with pytest.raises(CallFailed) as told:
            client.post(f"{worker.url}/chat", {}, kind="chat", deadline=time.monotonic() + 10)
        client.close()

    assert told.value.outcome == "refused"
    assert not told.value.may_have_run
    assert worker.seen == []


def test_request_ids_are_made_such_as_workers_honour() -> None:
    assert clean_request_id("a b\n/ü", ".1") == "a-b---.1"
    assert len(clean_request_id("x" * 500, ".12345678")) == 128
    assert clean_request_id("", ".1") == "gateway.1"


@pytest.mark.parametrize(
    "body",
    [
        b"[1]",
        b"{",
        b"",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        rb'{"a": "\ud83d"}',
        b'{"a": "\xff"}',
        b'{"a":' * 100_000,
    ],
)
def test_an_answer_that_is_no_strict_json_object_is_none(body: bytes) -> None:
    assert Answer(status=200, body=body, ms=1.0).object() is None


def test_a_whole_surrogate_pair_is_a_character() -> None:
    answer = Answer(status=200, body=rb'{"a": "\ud83d\ude00"}', ms=1.0)

    assert answer.object() == {"a": "😀"}

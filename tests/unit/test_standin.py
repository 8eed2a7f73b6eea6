"""The small server on the port of a front that does not start."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from worker.errors import has_trap_word
from worker.protocol.messages import ChildReport
from worker.supervisor.standin import HttpStandIn, answer

HOST = "127.0.0.1"


def report(
    cause: str | None = "exited with code 1: ValueError: no room", next_try_s: float | None = 12.3
) -> ChildReport:
    return ChildReport(
        name="front chat",
        pid=None,
        status="failed",
        port=7861,
        failures=5,
        cause=cause,
        next_try_s=next_try_s,
    )


def free_port(host: str = HOST) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def ask(
    port: int, method: str = "GET", path: str = "/health", body: bytes = b"", host: str = HOST
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path, body=body or None)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


class Served:
    """A stand-in that answers on a port of its own, with the report that a test sets."""

    def __init__(self) -> None:
        self.port = free_port()
        self.report = report()
        self.stand_in = HttpStandIn(HOST)
        self.stand_in.open(self.port, lambda: self.report)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    made = Served()
    yield made
    made.stand_in.close(made.port)


@pytest.fixture
def served(server: Served) -> Served:
    server.report = report()
    return server


# --- what it says ------------------------------------------------------------------------------


def test_an_answer_says_what_is_down_and_why_and_when_it_is_tried_again() -> None:
    body, retry_after_s = answer(report())

    said = json.loads(body)
    assert said["error"] == (
        "front chat does not run: exited with code 1: ValueError: no room; failures: 5; "
        "next try in 13 s"
    )
    assert (said["success"], said["error_code"]) == (False, "front_unavailable")
    assert (said["status"], said["next_try_s"]) == ("unavailable", 12.3)
    assert len(said["request_id"]) == 32
    assert retry_after_s == 12.3


def test_an_answer_for_a_front_that_is_given_up_says_that_somebody_must_act() -> None:
    body, retry_after_s = answer(report(next_try_s=None))

    assert "it will not be tried again; correct the cause and restart the daemon" in str(body)
    assert retry_after_s is None


@pytest.mark.parametrize(
    "cause",
    [
        "ImportError: cannot import name 'Info'",
        "ValueError: NaN",
        "KeyError: '/home/nancy/models'",
        "RuntimeError: probability tensor contains",
    ],
)
@pytest.mark.parametrize("next_try_s", [None, 4.0])
def test_no_answer_has_a_word_that_a_client_misreads(cause: str, next_try_s: float | None) -> None:
    body, _ = answer(report(cause, next_try_s))

    assert not has_trap_word(body.decode())
    assert "its log has the cause" in json.loads(body)["error"]


# --- how it is served --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/health", "/chat"])
def test_every_request_is_answered_with_503_in_the_shape_of_errors(
    served: Served, method: str, path: str
) -> None:
    status, headers, body = ask(served.port, method, path)

    assert status == 503
    assert headers["Content-Type"] == "application/json"
    assert headers["Retry-After"] == "13"
    assert json.loads(body)["success"] is False


def on_the_wire(port: int, method: str) -> bytes:
    """Every byte of an answer."""
    with socket.create_connection((HOST, port), timeout=10) as client:
        client.sendall(f"{method} /health HTTP/1.0\r\n\r\n".encode())
        received = b""
        while block := client.recv(4096):
            received += block
    return received


def test_a_head_request_gets_no_body(served: Served) -> None:
    head, _, body = on_the_wire(served.port, "HEAD").partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.0 503 ")
    assert b"Content-Length: " in head
    assert body == b""


def test_the_whole_answer_on_the_wire_has_no_word_that_a_client_misreads(served: Served) -> None:
    received = on_the_wire(served.port, "GET")

    assert received.startswith(b"HTTP/1.0 503 ")
    assert not has_trap_word(received.decode())


def test_a_chat_body_is_answered_too(served: Served) -> None:
    status, _, _ = ask(served.port, "POST", "/chat", body=b"x" * 100_000)

    assert status == 503


def test_a_front_that_is_given_up_has_no_retry_after(served: Served) -> None:
    served.report = report(next_try_s=None)

    _, headers, _ = ask(served.port)

    assert "Retry-After" not in headers


def test_a_next_try_that_is_due_is_a_second_away(served: Served) -> None:
    served.report = report(next_try_s=0.0)

    _, headers, _ = ask(served.port)

    assert headers["Retry-After"] == "1"


def test_the_report_is_asked_for_every_answer(served: Served) -> None:
    seconds = []
    for next_try_s in (9.0, 8.0):
        served.report = report(next_try_s=next_try_s)
        seconds.append(ask(served.port)[1]["Retry-After"])

    assert seconds == ["9", "8"]


def test_a_port_that_is_open_stays_as_it_is(served: Served) -> None:
    served.stand_in.open(served.port, lambda: report(next_try_s=2.0))

    assert ask(served.port)[1]["Retry-After"] == "13"


def test_a_closed_port_is_free_for_the_front_and_for_a_stand_in_again() -> None:
    made = Served()
    ask(made.port)

    made.stand_in.close(made.port)

    with socket.socket() as front:
        front.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        front.bind((HOST, made.port))
        front.listen()
    made.stand_in.open(made.port, report)
    assert ask(made.port)[0] == 503
    made.stand_in.close(made.port)


def test_a_port_that_somebody_else_has_is_left_to_him() -> None:
    stand_in = HttpStandIn(HOST)
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]

        stand_in.open(port, report)
        stand_in.close(port)

        socket.create_connection((HOST, port), timeout=10).close()
        other.accept()[0].close()


def test_closing_what_is_not_open_does_nothing() -> None:
    HttpStandIn(HOST).close(7861)


def test_a_host_of_ip_version_6_is_answered_on_too() -> None:
    try:
        port = free_port("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    stand_in = HttpStandIn("::1")
    stand_in.open(port, report)

    try:
        assert ask(port, host="::1")[0] == 503
    finally:
        stand_in.close(port)

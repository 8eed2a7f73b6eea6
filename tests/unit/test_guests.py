"""Programs that are none of ours: what the supervisor makes of their ports."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from worker.config import load_settings
from worker.errors import ConfigError
from worker.protocol.messages import Drain, EngineNotice, Message, State
from worker.supervisor.guests import BothWires, Guests, look_at
from worker.supervisor.spawn import child_specs, guest_environment

PLACE = {"gateway": ("127.0.0.1", 7862)}


def states(guests: Guests) -> dict[str, str]:
    """The word of each guest's state since the last call."""
    return {name: state.status for name, state in guests.receive() if state is not None}


@pytest.mark.parametrize(("status", "word"), [(200, "ready"), (503, "loading"), (404, "loading")])
def test_a_guest_is_ready_when_its_health_says_so(status: int, word: str) -> None:
    guests = Guests(PLACE, lambda host, port: status)

    guests.round()

    assert states(guests) == {"gateway": word}


def test_a_guest_that_does_not_answer_says_nothing() -> None:
    guests = Guests(PLACE, lambda host, port: None)

    guests.round()

    assert guests.receive() == []


def test_one_look_is_heard_once() -> None:
    guests = Guests(PLACE, lambda host, port: 200)
    guests.round()
    guests.receive()

    assert guests.receive() == []


def test_a_guest_that_was_told_to_drain_counts_as_drained() -> None:
    guests = Guests(PLACE, lambda host, port: 200)
    guests.send("gateway", Drain(grace_s=5.0))

    guests.round()

    assert states(guests) == {"gateway": "draining"}


def test_what_else_is_told_to_a_guest_changes_nothing() -> None:
    guests = Guests(PLACE, lambda host, port: 200)
    guests.send("gateway", EngineNotice(name="engine chat", cause="it fell", next_try_s=None))

    guests.round()

    assert states(guests) == {"gateway": "ready"}


class RecordingWire:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def receive(self) -> list[tuple[str, State | None]]:
        return [("front chat", None)]

    def send(self, name: str, message: Message) -> None:
        self.sent.append(name)


def test_both_wires_are_heard_and_each_child_is_told_on_its_own() -> None:
    own, guests = RecordingWire(), Guests(PLACE, lambda host, port: 200)
    wire = BothWires(own, guests, ["gateway"])
    guests.round()

    wire.send("gateway", Drain(grace_s=1.0))
    wire.send("front chat", Drain(grace_s=1.0))

    assert own.sent == ["front chat"]
    assert [name for name, _ in wire.receive()] == ["front chat", "gateway"]


@pytest.fixture
def healthy_port() -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_look_asks_health_over_http(healthy_port: int) -> None:
    assert look_at("127.0.0.1", healthy_port) == 200
    assert look_at("0.0.0.0", healthy_port) == 200


def test_a_closed_port_is_no_answer(healthy_port: int) -> None:
    assert look_at("127.0.0.1", 1) is None


# --- what a profile makes of it ------------------------------------------------------------------


def profile(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_profile_with_a_gateway_starts_it_last_and_without_starts_none(tmp_path: Path) -> None:
    with_one = load_settings(profile(tmp_path, "[gateway]\nport = 9100\n"), {})
    without = load_settings(profile(tmp_path, "[server]\nchat_port = 9001\n"), {})

    last = child_specs(with_one)[-1]
    assert (last.name, last.port, last.is_guest, last.is_engine) == ("gateway", 9100, True, False)
    assert last.arguments[:3] == ("-m", "gateway", "serve")
    assert not [spec for spec in child_specs(without) if spec.is_guest]


def test_the_gateway_is_told_where_this_worker_is(tmp_path: Path) -> None:
    env = {"VERBATIM_CHAT_PORT": "9001", "VERBATIM_MEDIA_PORT": "9002"}
    settings = load_settings(profile(tmp_path, "[gateway]\n"), env)

    assert guest_environment(settings) == {
        "GATEWAY_CHAT_WORKERS": "http://127.0.0.1:9001",
        "GATEWAY_MEDIA_WORKERS": "http://127.0.0.1:9002",
    }


def test_workers_that_the_profile_names_are_left_alone(tmp_path: Path) -> None:
    text = '[gateway]\nchat_workers = ["http://10.0.0.5:7861"]\n'
    settings = load_settings(profile(tmp_path, text), {})

    assert list(guest_environment(settings)) == ["GATEWAY_MEDIA_WORKERS"]


def test_the_gateways_port_may_be_changed_by_the_environment_and_not_be_taken(
    tmp_path: Path,
) -> None:
    path = profile(tmp_path, "[gateway]\n")

    moved = load_settings(path, {"GATEWAY_PORT": "9100"})

    assert moved.gateway is not None and moved.gateway.port == 9100
    with pytest.raises(ConfigError, match="port 7861 is a port of"):
        load_settings(path, {"GATEWAY_PORT": "7861"})
    with pytest.raises(ConfigError, match="GATEWAY_PORT='x' is not a port"):
        load_settings(path, {"GATEWAY_PORT": "x"})

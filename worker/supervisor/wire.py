"""The supervisor's connections: to every child, and from people who ask for status."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import zmq

from worker.protocol.messages import (
    Hello,
    Message,
    State,
    StatusQuery,
    StatusReport,
    StopQuery,
)
from worker.protocol.transport import (
    Client,
    Connected,
    Disconnected,
    NotConnected,
    Peer,
    PeerGone,
    Server,
    socket_path,
)

ME = "orchestrator"


class ChildWire:
    """A connection to each child. Orchestrator thread only."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], state_dir: Path, names: Sequence[str]
    ):
        self._clients = {name: Client(context, socket_path(state_dir, name)) for name in names}

    def register(self, poller: zmq.Poller) -> None:
        for client in self._clients.values():
            for target in client.poll_targets:
                poller.register(target, zmq.POLLIN)

    def receive(self) -> list[tuple[str, State | None]]:
        heard: list[tuple[str, State | None]] = []
        for name, client in self._clients.items():
            while (event := client.receive()) is not None:
                match event:
                    case Connected():
                        client.answer_connected(Hello(peer=ME))
                    case Disconnected():
                        heard.append((name, None))
                    case State():
                        heard.append((name, event))
        return heard

    def send(self, name: str, message: Message) -> None:
        try:
            self._clients[name].send(message)
        except NotConnected:
            return  # what it would be told is told again, or no longer matters

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


class ControlServer:
    """The socket that `orchestrator.py status` and `stop` talk to. Orchestrator thread only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], state_dir: Path):
        self._server = Server(context, socket_path(state_dir, ME))

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self._server.poll_target, zmq.POLLIN)

    def receive(self) -> list[tuple[Peer, StatusQuery | StopQuery]]:
        queries = []
        while (received := self._server.receive()) is not None:
            peer, message = received
            if isinstance(message, StatusQuery | StopQuery):
                queries.append((peer, message))
        return queries

    def reply(self, peer: Peer, report: StatusReport) -> None:
        try:
            self._server.send(peer, report)
        except PeerGone:
            return  # who asked has left

    def close(self) -> None:
        self._server.close()


def ask_orchestrator(
    state_dir: Path, query: type[StatusQuery] | type[StopQuery], timeout_s: float
) -> StatusReport | None:
    """Ask the orchestrator of this state folder; None when none answers in time."""
    if not socket_path(state_dir, ME).exists():
        return None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    client = Client(context, socket_path(state_dir, ME))
    poller = zmq.Poller()
    for target in client.poll_targets:
        poller.register(target, zmq.POLLIN)
    try:
        waits_left = max(1, round(timeout_s / 0.1))
        for _ in range(waits_left):
            poller.poll(100)
            while (event := client.receive()) is not None:
                if isinstance(event, Connected):
                    client.answer_connected(query(request_id=uuid.uuid4().hex))
                elif isinstance(event, Disconnected):
                    return None
                elif isinstance(event, StatusReport):
                    return event
        return None
    finally:
        client.close()

"""The supervisor's connections: to every child, and from people who ask for status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import zmq

from worker.protocol.control import ORCHESTRATOR, Query
from worker.protocol.messages import Hello, Message, State
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


class ChildWire:
    """A connection to each child. Orchestrator thread only."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], state_dir: Path, names: Sequence[str]
    ):
        self._clients = {name: Client(context, socket_path(state_dir, name)) for name in names}
        self._epochs: dict[str, int] = {}
        self._asked: list[tuple[str, Message]] = []

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
                        epoch = self._epochs.get(name, 0)
                        client.answer_connected(Hello(peer=ORCHESTRATOR, epoch=epoch))
                    case Disconnected():
                        heard.append((name, None))
                    case State():
                        heard.append((name, event))
                    case _:
                        self._asked.append((name, event))
        return heard

    def began(self, name: str, epoch: int) -> None:
        """A child has been started; it is told its epoch when it can be reached."""
        self._epochs[name] = epoch

    def take_asked(self) -> list[tuple[str, Message]]:
        """What children asked for since the last call: everything but their states."""
        asked, self._asked = self._asked, []
        return asked

    def send(self, name: str, message: Message) -> None:
        try:
            self._clients[name].send(message)
        except NotConnected:
            return  # what it would be told is told again, or no longer matters

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


class ControlServer:
    """The socket for questions of `orchestrator.py status` and `stop`, and of the fronts.
    Orchestrator thread only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], state_dir: Path):
        self._server = Server(context, socket_path(state_dir, ORCHESTRATOR))

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self._server.poll_target, zmq.POLLIN)

    def receive(self) -> list[tuple[Peer, Query]]:
        queries = []
        while (received := self._server.receive()) is not None:
            peer, message = received
            if isinstance(message, Query):
                queries.append((peer, message))
        return queries

    def reply(self, peer: Peer, answer: Message) -> None:
        try:
            self._server.send(peer, answer)
        except PeerGone:
            return  # who asked has left

    def close(self) -> None:
        self._server.close()

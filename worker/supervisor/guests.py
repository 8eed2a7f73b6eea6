"""Programs that the supervisor starts and that are none of ours: they are looked at over HTTP."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from worker.protocol.messages import Drain, Message, State

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0

Look = Callable[[str, int], int | None]


class Wire(Protocol):
    """As worker/supervisor/supervisor.py asks for it."""

    def receive(self) -> list[tuple[str, State | None]]: ...

    def send(self, name: str, message: Message) -> None: ...


class Guests:
    """The states of guests, as GET /health on their ports tells them.

    A thread looks once a second; `receive` and `send` are the orchestrator thread's. A guest that
    was told to drain counts as drained: it takes nothing that would be lost, since what it asked of
    the worker is drained there.
    """

    def __init__(self, places: Mapping[str, tuple[str, int]], look: Look | None = None):
        """places: host and port by the child's name. look: the status of GET /health there, None
        for no answer."""
        self._places = dict(places)
        self._look = look or look_at
        self._lock = threading.Lock()
        self._seen: dict[str, int | None] = {}
        self._draining: set[str] = set()
        self._closed = threading.Event()

    def start(self) -> None:
        """Look from now on; without guests there is nothing to look at."""
        if self._places:
            threading.Thread(target=self._loop, name="guests", daemon=True).start()

    def receive(self) -> list[tuple[str, State | None]]:
        """A state of each guest that answered since the last call; silence is no state, and the
        supervisor kills what is silent for too long."""
        with self._lock:
            seen, self._seen = self._seen, {}
        return [
            (name, _state(name, status, name in self._draining))
            for name, status in seen.items()
            if status is not None
        ]

    def send(self, name: str, message: Message) -> None:
        if isinstance(message, Drain):
            self._draining.add(name)

    def round(self) -> None:
        """Look at each guest once."""
        for name, (host, port) in self._places.items():
            status = self._look(host, port)
            with self._lock:
                self._seen[name] = status

    def close(self) -> None:
        self._closed.set()

    def _loop(self) -> None:
        while not self._closed.is_set():
            self.round()
            self._closed.wait(LOOK_EVERY_S)


class BothWires:
    """Our own children and the guests as one wire. Orchestrator thread only."""

    def __init__(self, own: Wire, guests: Guests, guest_names: Sequence[str]):
        self._own = own
        self._guests = guests
        self._guest_names = frozenset(guest_names)

    def receive(self) -> list[tuple[str, State | None]]:
        return [*self._own.receive(), *self._guests.receive()]

    def send(self, name: str, message: Message) -> None:
        (self._guests if name in self._guest_names else self._own).send(name, message)


def look_at(host: str, port: int) -> int | None:
    """The status of GET /health, None for no answer within LOOK_TIMEOUT_S."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(address, port, timeout=LOOK_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _state(name: str, status: int, draining: bool) -> State:
    word = "ready" if status == http.client.OK else "loading"
    return State(name=name, pid=0, started_at=time.time(), status="draining" if draining else word)

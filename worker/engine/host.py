"""The frame of an engine process: a socket thread and the engine's own thread.

The socket thread answers `Hello` with a `State` from the first millisecond on, also while torch
is being imported, a model loads or a step takes long. The engine thread (the process's main one)
owns the models and the device, takes messages between steps and does nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import zmq

from worker.protocol.messages import (
    Cancel,
    Hello,
    Message,
    ModelState,
    State,
    Tokens,
)
from worker.protocol.transport import Peer, PeerGone, Server, Waker
from worker.vram.probe import device_memory

log = logging.getLogger(__name__)

STATE_EVERY_S = 0.5
EXIT_LOST_BROKER = 75  # EX_TEMPFAIL of sysexits.h; the supervisor starts a new one
LOOK_EVERY_S = 0.25  # how soon an idle engine sees that it should stop


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request and the connection it came in on; request ids are unique per peer only."""

    peer: Peer
    request_id: str
    # Monotonic, when this process had it: an engine takes it only between two steps.
    received: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine says of itself between steps."""

    status: str = "starting"
    models: tuple[ModelState, ...] = ()
    active: int = 0
    waiting: int = 0
    counters: dict[str, int] | None = None
    gauges: dict[str, int] | None = None

    @property
    def notable(self) -> tuple[object, ...]:
        """What peers are told at once; counters follow with the next regular state."""
        return self.status, self.models, self.active, self.waiting


class Outbox(Protocol):
    """Where an engine's events go. Never blocks."""

    def send(self, ticket: Ticket, message: Message) -> None:
        """From any thread."""

    def publish(self, report: Report) -> None: ...

    def poll(self) -> None:
        """Take what has arrived (cancellations above all) in the middle of a long step."""

    def wait(self, timeout_s: float) -> None:
        """As `poll`, once something has arrived or the time is over."""

    def wake(self) -> None:
        """End the wait of an idle engine. From any thread."""


class Engine(Protocol):
    """What a host runs."""

    def submit(self, ticket: Ticket, message: Message) -> None: ...

    def cancel(self, ticket: Ticket) -> None: ...

    def step(self) -> bool: ...

    def report(self) -> Report: ...

    def finish(self) -> None:
        """Called once, after the last step: let what is done and not yet told come to its end."""


class EngineHost:
    """Owns the socket thread. `run`, `poll`, `wait` and `publish` belong to the main thread."""

    def __init__(self, path: Path, name: str):
        """path: of the socket; name: role and name, such as "engine chat"."""
        self._name = name
        self._started_at = time.time()
        self._inbox: deque[tuple[Ticket, Message]] = deque()
        self._inbox_filled = threading.Event()
        # Messages, and reports that say something new, in the order in which the engine made them:
        # whoever reads an answer has read the state that it left before.
        self._outgoing: deque[tuple[Ticket, Message] | Report] = deque()
        self._report = Report()  # replaced whole, read by the socket thread
        self._device = "cpu"
        self._waker = Waker()
        self._broker: Peer | None = None  # set by the socket thread, before its hello is taken
        self._server = Server(zmq.Context.instance(), path)
        self._stopping = False
        self._ended = False  # the engine has nothing more to say
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._serve, name="socket", daemon=True)
        self._thread.start()

    # --- engine thread -------------------------------------------------------------------------

    def run(self, build: Callable[[Outbox], Engine], device: Callable[[], str]) -> None:
        """Build the engine, then step it until `stop`. Returns when stopped.

        build: called once, on this thread, with the port already open.
        device: says the device's name once the engine is built.
        """
        self._engine = build(self)
        self._device = device()
        while not self._stopping:
            self.poll()
            self.publish(self._engine.report())
            if not self._engine.step():
                self.publish(self._engine.report())
                self._inbox_filled.wait(LOOK_EVERY_S)
        self._engine.finish()
        self._ended = True
        self._waker.wake()
        self._thread.join(timeout=5)

    def poll(self) -> None:
        """Hand over every message that has arrived."""
        assert self._engine is not None
        self._inbox_filled.clear()
        while self._inbox:
            ticket, message = self._inbox.popleft()
            if isinstance(message, Cancel):
                self._engine.cancel(ticket)
            else:
                self._engine.submit(ticket, message)

    def wait(self, timeout_s: float) -> None:
        self._inbox_filled.wait(timeout_s)
        self.poll()

    def wake(self) -> None:
        self._inbox_filled.set()

    def to_broker(self, message: Message) -> None:
        """To the orchestrator, which has said hello."""
        assert self._broker is not None
        self.send(Ticket(self._broker, ""), message)

    def send(self, ticket: Ticket, message: Message) -> None:
        self._outgoing.append((ticket, message))
        self._waker.wake()

    def publish(self, report: Report) -> None:
        changed = report.notable != self._report.notable
        self._report = report
        if changed:
            self._outgoing.append(report)
            self._waker.wake()

    def stop(self) -> None:
        """End `run` after the current step, or within LOOK_EVERY_S.

        For signal handlers: it takes no lock, because the thread it interrupts may hold it.
        """
        self._stopping = True

    # --- socket thread -------------------------------------------------------------------------

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._server.poll_target, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        peers: dict[Peer, None] = {}
        tell_at = 0.0
        while not self._ended or self._outgoing:
            poller.poll(int(STATE_EVERY_S * 1000))
            self._waker.clear()
            while (received := self._server.receive()) is not None:
                peer, message = received
                if isinstance(message, Hello):
                    peers[peer] = None
                    tell_at = 0.0
                    if message.epoch:
                        self._meet_broker(peer, message)
                else:
                    self._take(peer, message)
            while self._outgoing:
                out = self._outgoing.popleft()
                if isinstance(out, Report):
                    self._tell(peers, out)
                else:
                    self._give(*out)
            now = time.monotonic()
            if now >= tell_at:
                tell_at = now + STATE_EVERY_S
                self._tell(peers, self._report)
        self._server.close()

    def _take(self, peer: Peer, message: Message) -> None:
        request_id: str = getattr(message, "request_id", "")
        self._inbox.append((Ticket(peer, request_id, time.monotonic()), message))
        self._inbox_filled.set()

    def _meet_broker(self, peer: Peer, hello: Hello) -> None:
        if self._broker is not None:
            # What was said while the connection was broken is lost, grants among it.
            log.critical("the connection to the orchestrator broke; ending, to begin anew")
            logging.shutdown()
            os._exit(EXIT_LOST_BROKER)
        self._broker = peer
        self._take(peer, hello)

    def _give(self, ticket: Ticket, message: Message) -> None:
        try:
            self._server.send(ticket.peer, message)
        except PeerGone:
            # Whoever asked has died or does not read; the work for it must not go on.
            tokens = message.tokens if isinstance(message, Tokens) else ()
            for request_id in [token.request_id for token in tokens] or [ticket.request_id]:
                self._take(ticket.peer, Cancel(request_id=request_id))

    def _tell(self, peers: dict[Peer, None], report: Report) -> None:
        memory = device_memory(self._device)
        state = State(
            name=self._name,
            pid=os.getpid(),
            started_at=self._started_at,
            status=report.status,
            models=report.models,
            active=report.active,
            waiting=report.waiting,
            device=self._device,
            device_total_bytes=memory.total_bytes,
            device_free_bytes=memory.free_bytes,
            rss_bytes=psutil.Process().memory_info().rss,
            counters=report.counters or {},
            gauges=report.gauges or {},
        )
        for peer in list(peers):
            try:
                self._server.send(peer, state)
            except PeerGone:
                del peers[peer]

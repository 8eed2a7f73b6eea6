"""A front's side of its orchestrator: says how it is, hears when to drain and what engines do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import zmq

from worker.front.drain import Drainer
from worker.protocol.link import Link
from worker.protocol.messages import Drain, EngineNotice, Hello, State
from worker.protocol.transport import Peer, PeerGone, Server

STATE_EVERY_S = 0.5


class FrontControl:
    """Owns the front's own socket, on a thread of its own."""

    def __init__(
        self,
        path: Path,
        name: str,
        drainer: Drainer,
        links: Mapping[str, Link],
        unfinished: Callable[[], int],
    ):
        """links: by engine name. unfinished: work that a drain waits for."""
        self._name = name
        self._drainer = drainer
        self._links = links
        self._unfinished = unfinished
        self._started_at = time.time()
        self._server = Server(zmq.Context.instance(), path)
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def _run(self) -> None:
        peers: dict[Peer, None] = {}
        while True:
            self._server.poll_target.poll(int(STATE_EVERY_S * 1000))
            while (received := self._server.receive()) is not None:
                peer, message = received
                match message:
                    case Hello():
                        peers[peer] = None
                    case Drain():
                        self._drainer.begin(message.grace_s)
                    case EngineNotice() if message.name in self._links:
                        self._links[message.name].note(message)
            state = self._state()
            for peer in list(peers):
                try:
                    self._server.send(peer, state)
                except PeerGone:
                    del peers[peer]

    def _state(self) -> State:
        return State(
            name=self._name,
            pid=os.getpid(),
            started_at=self._started_at,
            status="draining" if self._drainer.draining else "ready",
            active=self._unfinished(),
            rss_bytes=psutil.Process().memory_info().rss,
        )

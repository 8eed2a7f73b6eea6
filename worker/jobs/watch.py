"""A front's ear for the runner: what happens to jobs, the moment it does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import zmq

from worker.jobs.board import Board
from worker.protocol.messages import Hello, JobNews, LookAgain
from worker.protocol.transport import Client, Connected, Disconnected, NotConnected, Waker

log = logging.getLogger(__name__)

RUNNER = "runner"


class RunnerWatch:
    """One connection to the runner, on a thread of its own. `look` from any thread.

    What is missed while the runner is away is in the journal.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        path: Path,
        me: str,
        board: Board,
        changed: Callable[[], None],
    ):
        """path: of the runner's socket. me: such as "front media". changed: called when the runner
        came or went."""
        self._context = context
        self._path = path
        self._me = me
        self._board = board
        self._changed = changed
        self._waker = Waker()
        self._wanted = False
        threading.Thread(target=self._run, name="runner watch", daemon=True).start()

    def look(self) -> None:
        """Tell the runner that there is something new in the journal."""
        self._wanted = True
        self._waker.wake()

    def _run(self) -> None:
        client = Client(self._context, self._path)
        poller = zmq.Poller()
        for target in client.poll_targets:
            poller.register(target, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        while True:
            poller.poll(1000)
            self._waker.clear()
            while (event := client.receive()) is not None:
                match event:
                    case Connected():
                        client.answer_connected(Hello(peer=self._me))
                        self._changed()  # what was missed is in the journal
                    case Disconnected():
                        self._board.clear()
                        self._changed()
                    case JobNews():
                        self._board.take(event)
            if self._wanted:
                self._wanted = False
                try:
                    client.send(LookAgain())
                except NotConnected:
                    log.info("the runner is away; it reads the journal when it is back")

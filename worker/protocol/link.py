"""A process's side of its connection to an engine: one thread, one mailbox per request.

The link survives the engine's death: whatever it had not answered fails with `engine_lost`, and
later requests work as soon as the engine is back.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from worker.errors import EngineLost, EngineUnavailable
from worker.protocol.messages import (
    Cancel,
    EngineNotice,
    Hello,
    Message,
    State,
    Tokens,
    failed,
)
from worker.protocol.transport import Client, Connected, Disconnected, NotConnected, Waker

log = logging.getLogger(__name__)

# Shown as Retry-After until one start of the engine has been seen: importing torch and diffusers
# takes 3 to 6 s on two CPU cores.
TYPICAL_START_S = 6.0
# Poll flag for "the other end has closed its side". Linux has one; elsewhere POLLHUP, which is
# always reported, comes when the connection is fully closed.
_HANG_UP = getattr(select, "POLLRDHUP", 0)


class HungUp(Exception):
    """The client has closed its connection."""


class Mailbox:
    """Events of one request: the link's thread puts them in, one thread takes them out."""

    def __init__(self, request_id: str):
        self.request_id = request_id
        self._events: deque[Message] = deque()
        self._waker = Waker()

    def put(self, event: Message) -> None:
        self._events.append(event)
        self._waker.wake()

    def wait(self, timeout_s: float, client: socket.socket | None = None) -> Message | None:
        """The next event, or None after `timeout_s`.

        Raises HungUp as soon as `client`, the HTTP connection that waits for it, is closed by
        its other end; an event that is already here comes first.
        """
        if self._events:
            return self._events.popleft()
        poll = select.poll()
        poll.register(self._waker.fileno(), select.POLLIN)
        if client is not None:
            poll.register(client.fileno(), _HANG_UP)
        ends = time.monotonic() + timeout_s
        while not self._events:
            left_s = ends - time.monotonic()
            if left_s <= 0:
                return None
            ready = poll.poll(math.ceil(left_s * 1000))
            self._waker.clear()
            if not self._events and any(fd != self._waker.fileno() for fd, _ in ready):
                raise HungUp
        return self._events.popleft()

    def close(self) -> None:
        self._waker.close()


def hung_up(client: socket.socket | None) -> bool:
    """Whether the other end of an HTTP connection has closed it."""
    if client is None:
        return False
    poll = select.poll()
    poll.register(client.fileno(), _HANG_UP)
    return bool(poll.poll(0))


@dataclass(frozen=True, slots=True)
class EngineView:
    """What is known of an engine now, for reports."""

    name: str
    state: State | None = None  # None: it does not answer
    notice: EngineNotice | None = None  # from the orchestrator, when it does not run
    seen_at: float = 0.0  # monotonic; when `state` came
    lost_at: float | None = None  # monotonic; when it went away
    start_s: float = TYPICAL_START_S  # how long it was away the last time

    def retry_after_s(self, now: float) -> float:
        """Seconds until the engine should be back."""
        if self.notice is not None and self.notice.next_try_s is not None:
            return self.notice.next_try_s + self.start_s
        away_s = now - self.lost_at if self.lost_at is not None else 0.0
        return max(1.0, self.start_s - away_s)


class Link:
    """Requests to one engine, from any thread. Pending requests belong to the link's thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path, me: str, engine: str):
        """me, engine: role and name of both ends, such as "front chat" and "engine chat"."""
        self._me = me
        self._context = context
        self._path = path
        self._commands: deque[tuple[Message, Mailbox | None]] = deque()
        self._pending: dict[str, Mailbox] = {}
        self._waker = Waker()
        self._closing = False
        self.view = EngineView(engine, lost_at=time.monotonic())
        self._thread = threading.Thread(target=self._run, name=f"link to {engine}", daemon=True)
        self._thread.start()

    def submit(self, message: Message) -> Mailbox:
        """Send a request; its events come into the mailbox, the last one ends it.

        message: one with a `request_id` that no running request has.
        The caller must `release` the mailbox. A missing engine is told by a `Failed`.
        """
        mailbox = Mailbox(message.request_id)  # type: ignore[attr-defined]
        self._post(message, mailbox)
        return mailbox

    def cancel(self, request_id: str) -> None:
        self._post(Cancel(request_id=request_id), None)

    def release(self, mailbox: Mailbox) -> None:
        """Forget a request; what still arrives for it is dropped."""
        self._post(_Release(request_id=mailbox.request_id), mailbox)

    def note(self, notice: EngineNotice) -> None:
        """Take what the orchestrator knows about the engine."""
        self._post(notice, None)

    def require_connected(self) -> None:
        """Raise EngineUnavailable, with when to come back, while nobody would take a request."""
        view = self.view
        if view.state is None:
            raise unavailable(view, time.monotonic())

    def close(self) -> None:
        self._closing = True
        self._waker.wake()
        self._thread.join(timeout=5)
        self._waker.close()

    def _post(self, message: Message, mailbox: Mailbox | None) -> None:
        self._commands.append((message, mailbox))
        self._waker.wake()

    # --- the link's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        client = Client(self._context, self._path)
        poller = zmq.Poller()
        for target in client.poll_targets:
            poller.register(target, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        while not self._closing:
            poller.poll(1000)
            self._waker.clear()
            while self._commands:
                self._command(client, *self._commands.popleft())
            while (event := client.receive()) is not None:
                self._event(client, event)
        while self._commands:  # mailboxes that were released just before the end
            self._command(client, *self._commands.popleft())
        client.close()

    def _command(self, client: Client, message: Message, mailbox: Mailbox | None) -> None:
        if isinstance(message, _Release):
            self._pending.pop(message.request_id, None)
            if mailbox is not None:
                mailbox.close()
            return
        if isinstance(message, EngineNotice):
            self.view = replace(self.view, notice=message if message.cause else None)
            return
        try:
            if self.view.state is None and mailbox is not None:
                raise NotConnected
            client.send(message)
        except NotConnected:
            if mailbox is not None:
                error = unavailable(self.view, time.monotonic())
                mailbox.put(failed(mailbox.request_id, error))
            return
        if mailbox is not None:
            self._pending[mailbox.request_id] = mailbox

    def _event(self, client: Client, event: Message | Connected | Disconnected) -> None:
        match event:
            case Connected():
                client.answer_connected(Hello(peer=self._me))
            case Disconnected():
                self._lose_engine()
            case State():
                self._see(event)
            case Tokens():
                for token in event.tokens:
                    self._deliver(token.request_id, token)
            case _:
                self._deliver(event.request_id, event)  # type: ignore[attr-defined]

    def _deliver(self, request_id: str, event: Message) -> None:
        mailbox = self._pending.get(request_id)
        if mailbox is not None:
            mailbox.put(event)

    def _see(self, state: State) -> None:
        now = time.monotonic()
        view = self.view
        if view.state is None:
            log.info("%s answers", view.name)
            away_s = now - view.lost_at if view.lost_at is not None else view.start_s
            view = replace(view, notice=None, lost_at=None, start_s=away_s)
        self.view = replace(view, state=state, seen_at=now)

    def _lose_engine(self) -> None:
        log.warning("%s is gone with %d requests", self.view.name, len(self._pending))
        if self.view.state is not None:
            self.view = replace(self.view, state=None, lost_at=time.monotonic())
        error = EngineLost(
            f"the connection to the {self.view.name} process ended while it worked on this "
            "request: it died and is being restarted, or this process had stood still",
            retry_after_s=self.view.retry_after_s(time.monotonic()),
        )
        for request_id, mailbox in self._pending.items():
            mailbox.put(failed(request_id, error))
        self._pending.clear()


class _Release(Message, frozen=True, kw_only=True):
    request_id: str


def unavailable(view: EngineView, now: float) -> EngineUnavailable:
    """Why the engine of `view` takes no request, and when it should."""
    retry_after_s = view.retry_after_s(now)
    if view.notice is None:
        return EngineUnavailable(
            f"the {view.name} process is starting", retry_after_s=retry_after_s
        )
    if view.notice.next_try_s is None:
        return EngineUnavailable(
            f"the {view.name} process does not start and will not be tried again: "
            f"{view.notice.cause}"
        )
    return EngineUnavailable(
        f"the {view.name} process is down ({view.notice.cause}); "
        f"next try in {view.notice.next_try_s:.0f} s",
        retry_after_s=retry_after_s,
    )

"""A process that does not read what an engine tells it: what it gets, and what the others get."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from worker.config import REPOSITORY
from worker.engine.host import EngineHost, Outbox, Report, Ticket
from worker.protocol import transport
from worker.protocol.link import Link
from worker.protocol.messages import (
    Cancel,
    Hello,
    Message,
    ModelChanged,
    Render,
    State,
    Token,
    Tokens,
)
from worker.protocol.transport import Client, Connected, Disconnected, Peer, PeerGone, Server

T = TypeVar("T")
DEADLINE_S = 30.0
QUEUE = 200  # messages that wait in a socket here, where a worker has 10,000
TEXT = "x" * 2000  # so that the kernel's own buffers are full soon
Context = zmq.Context[zmq.Socket[bytes]]


def until(look: Callable[[], T | None]) -> T:
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        found = look()
        if found:
            return found
        time.sleep(0.001)
    raise AssertionError(f"nothing came within {DEADLINE_S:g} s")


@dataclass
class Talker:
    """An engine that tells every request one more token in each step, as long as it has credit."""

    outbox: Outbox
    credit: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    running: dict[Ticket, None] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)  # set by the test: requests to end
    told: Counter[str] = field(default_factory=Counter)

    def submit(self, ticket: Ticket, message: Message) -> None:
        if isinstance(message, Render):
            self.running[ticket] = None

    def cancel(self, ticket: Ticket) -> None:
        if ticket in self.running:
            del self.running[ticket]
            self.cancelled.append(ticket.request_id)

    def step(self) -> bool:
        if not self.running or not self.credit.acquire(timeout=0.01):
            return False
        for ticket in list(self.running):
            name = ticket.request_id
            if name in self.ended:
                del self.running[ticket]
                self.outbox.send(
                    ticket, ModelChanged(request_id=name, model="m", changed=True, seconds=0.0)
                )
                continue
            token = Token(request_id=name, text=TEXT, completion_tokens=self.told[name])
            self.told[name] += 1
            self.outbox.send(ticket, Tokens(tokens=(token,)))
        return True

    def report(self) -> Report:
        return Report(status="ready")

    def finish(self) -> None:
        """Everything has been said."""


@dataclass
class Running:
    path: Path
    engine: Talker


@pytest.fixture
def path() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vbt-"))
    yield folder / "e.sock"
    shutil.rmtree(folder)


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_QUEUE_MESSAGES", QUEUE)


@pytest.fixture
def host(path: Path, small_queue: None) -> Iterator[Running]:
    made: list[Talker] = []

    def build(outbox: Outbox) -> Talker:
        made.append(Talker(outbox))
        return made[0]

    host = EngineHost(path, "engine chat")
    thread = threading.Thread(target=host.run, args=(build, lambda: "cpu"))
    thread.start()
    until(lambda: made)
    yield Running(path, made[0])
    host.stop()
    thread.join(DEADLINE_S)
    host._waker.close()  # a process ends instead


@pytest.fixture
def link(context: Context, host: Running) -> Iterator[Link]:
    made = Link(context, host.path, "front chat", "engine chat")
    until(lambda: made.view.state)
    yield made
    made.close()


def render(name: str) -> Render:
    return Render(request_id=name, model="m", prompt="p")


def told_with(engine: Talker, link: Link, done: Callable[[], bool]) -> tuple[list[int], Message]:
    """Numbers of the tokens of a request that goes on until `done`, read as they come, and how it
    ends. The engine makes a step for each token that is read, and so tells others as many."""
    mailbox = link.submit(render("quick"))
    until(lambda: len(engine.running) > 1)
    numbers: list[int] = []
    engine.credit.release(20)
    while True:
        event = mailbox.wait(DEADLINE_S)
        assert event is not None, "the quick one waits for the slow one"
        if not isinstance(event, Token):
            link.release(mailbox)
            return numbers, event
        numbers.append(event.completion_tokens)
        if done():
            engine.ended.add("quick")
        engine.credit.release()


def numbers_of(client: Client) -> tuple[list[int], list[object]]:
    """Of tokens, up to the end of the connection; and all other events but states."""
    numbers: list[int] = []
    others: list[object] = []

    def is_over() -> bool:
        event = client.receive()
        if isinstance(event, Tokens):
            numbers.extend(token.completion_tokens for token in event.tokens)
        elif event is not None and not isinstance(event, State):
            others.append(event)
        return isinstance(event, Disconnected)

    until(is_over)
    return numbers, others


def test_who_does_not_read_is_hung_up_on_and_the_others_go_on(
    context: Context, host: Running, link: Link
) -> None:
    slow = Client(context, host.path)
    until(slow.receive)
    slow.send(Hello(peer="front slow"))
    slow.send(render("slow"))
    until(lambda: host.engine.running)

    numbers, end = told_with(host.engine, link, lambda: "slow" in host.engine.cancelled)

    assert isinstance(end, ModelChanged)
    assert numbers == list(range(len(numbers)))
    assert host.engine.told["slow"] < 20 * QUEUE  # and no more of it is kept

    seen, others = numbers_of(slow)
    assert seen == list(range(len(seen)))  # a beginning without a gap
    assert len(seen) < host.engine.told["slow"]
    assert others == [Disconnected()]

    until(lambda: slow.receive() == Connected())
    slow.send(Hello(peer="front slow"))
    slow.send(render("again"))
    host.engine.credit.release(3)
    again = until(lambda: event if isinstance(event := slow.receive(), Tokens) else None)
    assert again.tokens[0].request_id == "again"
    slow.close()


def test_nothing_follows_a_message_that_was_not_taken(
    context: Context, path: Path, small_queue: None
) -> None:
    """One that found room again after another had found none made a hole in a text."""
    server = Server(context, path)
    slow = Client(context, path)
    until(slow.receive)
    slow.send(Hello(peer="front slow"))
    peer, _ = until(server.receive)
    sent = fill(server, peer)

    seen, others = numbers_of(slow)
    late = Token(request_id="r", text="late", completion_tokens=sent + 1)
    until(lambda: is_gone(server, peer, late))

    assert seen == list(range(len(seen)))
    assert others == [Disconnected()]
    assert until(slow.receive) == Connected()
    slow.send(Hello(peer="front slow"))
    fresh, _ = until(server.receive)
    assert fresh != peer
    server.send(fresh, Cancel(request_id="first of the new connection"))
    assert until(slow.receive) == Cancel(request_id="first of the new connection")
    slow.close()
    server.close()


def fill(server: Server, peer: Peer) -> int:
    """Send until nothing more is taken; returns how many were."""
    for number in range(100 * QUEUE):
        token = Token(request_id="r", text=TEXT, completion_tokens=number)
        try:
            server.send(peer, Tokens(tokens=(token,)))
        except PeerGone:
            return number
    raise AssertionError("the queue has no end")


def is_gone(server: Server, peer: Peer, message: Message) -> bool:
    try:
        server.send(peer, message)
    except PeerGone:
        return True
    return False


def test_a_connection_that_is_hung_up_on_is_no_other_one(
    context: Context, path: Path, small_queue: None
) -> None:
    """Its number may belong to something else by then, which must not be closed."""
    server = Server(context, path)
    gone, stays = Client(context, path), Client(context, path)
    for number, one in enumerate((gone, stays)):
        until(one.receive)
        one.send(Hello(peer=str(number)))
    peers = dict(until(server.receive) for _ in range(2))
    lost = next(peer for peer, hello in peers.items() if hello == Hello(peer="0"))
    kept = next(peer for peer, hello in peers.items() if hello == Hello(peer="1"))
    connections = server._connections
    connections[lost.identity] = transport._Connection(
        connections[kept.identity].descriptor, connections[lost.identity].inode
    )

    fill(server, lost)

    server.send(kept, Cancel(request_id="still here"))
    assert until(stays.receive) == Cancel(request_id="still here")
    for one in (gone, stays):
        one.close()
    server.close()


def test_connections_that_are_gone_are_forgotten(context: Context, path: Path) -> None:
    server = Server(context, path)
    for number in range(20):
        client = Client(context, path)
        until(client.receive)
        client.send(Hello(peer=str(number)))
        until(server.receive)
        client.close()
        until(lambda: not any(one.is_open for one in server._connections.values()))

    assert len(server._connections) <= 2
    server.close()


FRONT = """
import json, sys, time
from pathlib import Path
import zmq
from worker.protocol.link import Link
from worker.protocol.messages import Failed, Render, Token

link = Link(zmq.Context.instance(), Path(sys.argv[1]), "front slow", "engine chat")

def ask(name):
    while link.view.state is None:
        time.sleep(0.001)
    return link.submit(Render(request_id=name, model="m", prompt="p"))

def say(**what):
    print(json.dumps(what), flush=True)

mailbox = ask("slow")
numbers = []
while not isinstance(event := mailbox.wait(60), Failed):
    if not numbers:
        say(begun=True)
    numbers.append(event.completion_tokens)
say(gap=numbers != list(range(len(numbers))), code=event.code, error=event.error)
event = ask("again").wait(60)
say(again=isinstance(event, Token) and event.completion_tokens == 0)
"""


def test_the_requests_of_a_process_that_stood_still_fail_and_later_ones_work(
    host: Running, link: Link
) -> None:
    front = subprocess.Popen(
        [sys.executable, "-c", FRONT, str(host.path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert front.stdout is not None
        until(lambda: host.engine.running)
        host.engine.credit.release(3)
        assert json.loads(front.stdout.readline()) == {"begun": True}
        front.send_signal(signal.SIGSTOP)

        _, end = told_with(host.engine, link, lambda: "slow" in host.engine.cancelled)
        assert isinstance(end, ModelChanged)

        front.send_signal(signal.SIGCONT)
        said = json.loads(front.stdout.readline())
        assert (said["gap"], said["code"]) == (False, "engine_lost")
        assert "the connection to the engine chat process ended" in said["error"]
        until(lambda: any(one.request_id == "again" for one in host.engine.running))
        host.engine.credit.release(3)
        assert json.loads(front.stdout.readline()) == {"again": True}
        assert front.wait(DEADLINE_S) == 0
    finally:
        front.kill()
        front.wait()
        if front.stdout is not None:
            front.stdout.close()

"""Three processes that share one device by leases over real sockets, and are killed meanwhile.

The orchestrator's part is its own loop with its own parts: the wire, the lender and the broker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import zmq

from tests.integration.borrower import BUDGET, PROCESS, SLOTS, WHOLE, Book
from worker.config import REPOSITORY
from worker.lifeline import PARENT_VARIABLE
from worker.protocol.messages import Granted, Message
from worker.protocol.transport import make_run_dir
from worker.supervisor.lender import Lender
from worker.supervisor.wire import ChildWire
from worker.vram.broker import Broker

NAMES = tuple(f"engine {letter}" for letter in "abc")
KILLS = 10
RESTART_S = 0.2  # a process is never started in the round in which its predecessor was reaped
POLL_MS = 20
LONG_S = 60.0  # for what takes a moment on a machine that has nothing else to do
AFTER_DEATH_S = 1.0


class Watch(threading.Thread):
    """Looks at the book all the time."""

    def __init__(self, book: Book):
        super().__init__(name="watch", daemon=True)
        self._book = book
        self._ended = threading.Event()
        self.most_bytes = 0
        self.looks = 0

    def run(self) -> None:
        while not self._ended.wait(0.001):
            self.most_bytes = max(self.most_bytes, self._book.total())
            self.looks += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


class Pod:
    """The orchestrator's loop around three processes. Main thread only."""

    def __init__(self, folder: Path, keeps: tuple[str, ...] = ()):
        self._folder = folder
        self._keeps = keeps
        self._random = Random(20)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._run_dir = make_run_dir(folder)
        self._wire = ChildWire(self._context, folder, NAMES)
        self._poller = zmq.Poller()
        self._wire.register(self._poller)
        self.broker = Broker(BUDGET)
        self._lender = Lender(self.broker, PROCESS, self._send)
        self.book = Book(folder / "book")
        self.watch = Watch(self.book)
        self.watch.start()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._start_at = dict.fromkeys(NAMES, 0.0)
        self._killed: set[str] = set()
        self.grants: list[tuple[float, str]] = []

    def tick(self) -> None:
        """One round, as the daemon does it."""
        self._poller.poll(POLL_MS)
        self._wire.receive()
        now = time.monotonic()
        for name in NAMES:
            self._reap(name)
            self._start_if_due(name, now)
        self._lender.tick(self._wire.take_asked(), now)
        self._check()

    def until(self, look: Callable[[], bool]) -> None:
        ends = time.monotonic() + LONG_S
        while not look():
            assert time.monotonic() < ends, self.describe()
            self.tick()

    def kill(self, name: str) -> None:
        self._killed.add(name)
        self._processes[name].kill()

    def runs(self, name: str) -> bool:
        return name in self._processes

    def held(self, name: str) -> int:
        """Bytes that it believes to have."""
        return self.book.held(NAMES.index(name))

    def done(self, name: str) -> int:
        return self.book.done(NAMES.index(name))

    def waiting(self) -> set[str]:
        return {one["holder"] for one in self.broker.waiting(time.monotonic())}

    def describe(self) -> str:
        now = time.monotonic()
        logs = [path.read_text()[-2000:] for path in self._folder.glob("*.log")]
        report = self._lender.report("", now)
        return "\n".join([f"{report}", f"done: {[self.done(name) for name in NAMES]}", *logs])

    def close(self) -> None:
        self.watch.end()
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._wire.close()
        self._context.destroy(linger=0)
        for path in self._run_dir.glob("*"):
            path.unlink()
        self._run_dir.rmdir()
        self.book.close()

    def _check(self) -> None:
        """No grant is on its way here: this thread makes them."""
        self.broker.check()
        for name in NAMES:
            granted = self.broker.ledger.held_by(name)
            assert self.held(name) <= granted + PROCESS, f"{name}\n{self.describe()}"
        assert self.book.total() <= BUDGET, self.describe()

    def _reap(self, name: str) -> None:
        process = self._processes.get(name)
        code = process.poll() if process is not None else None
        if code is None:
            return
        assert (name in self._killed, code) == (True, -signal.SIGKILL), self.describe()
        del self._processes[name]
        self._killed.remove(name)
        self.book.write(NAMES.index(name), 0)
        now = time.monotonic()
        self._lender.ended(name, now)
        assert self.broker.ledger.held_by(name) == 0
        self._start_at[name] = now + RESTART_S

    def _start_if_due(self, name: str, now: float) -> None:
        if name in self._processes or now < self._start_at[name]:
            return
        self._wire.began(name, self._lender.began(name))
        slot, seed = NAMES.index(name), self._random.getrandbits(32)
        keeps = "keeps" if name in self._keeps else "gives"
        arguments = [name, self._folder, self._folder / "book", slot, seed, keeps]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.borrower", *map(str, arguments)],
                cwd=REPOSITORY,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _send(self, name: str, message: Message) -> None:
        if isinstance(message, Granted):
            self.grants.append((time.monotonic(), name))
        self._wire.send(name, message)


@pytest.fixture
def make_pod(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    pods: list[Pod] = []

    def make(**options: tuple[str, ...]) -> Pod:
        pods.append(Pod(tmp_path, **options))
        return pods[-1]

    yield make
    for pod in pods:
        pod.close()


def kill_some(pod: Pod, random: Random) -> None:
    """At some moment; then everybody goes on: those that live at once, the others when they have
    begun again."""
    later = sum(pod.done(name) for name in NAMES) + random.randint(1, 25)
    pod.until(lambda: sum(pod.done(name) for name in NAMES) >= later)
    victims = random.sample(NAMES, random.choice((1, 1, 2)))
    for name in victims:
        pod.kill(name)
    pod.until(lambda: not any(pod.runs(name) for name in victims))
    marks = {name: pod.done(name) + 2 for name in NAMES}
    pod.until(lambda: all(pod.done(name) >= marks[name] for name in NAMES))


def test_processes_that_are_killed_at_any_moment_never_hold_more_than_there_is(
    make_pod: Callable[..., Pod],
) -> None:
    pod, random = make_pod(), Random(4)
    pod.until(lambda: all(pod.done(name) for name in NAMES))

    for _ in range(KILLS):
        kill_some(pod, random)

    pod.watch.end()
    assert pod.watch.looks > 0
    assert SLOTS * PROCESS < pod.watch.most_bytes <= BUDGET
    assert pod.broker.counters["moved_bytes"] > 0  # they had to give way to each other


def test_what_a_killed_process_held_is_granted_within_a_second_after_it_was_reaped(
    make_pod: Callable[..., Pod],
) -> None:
    keeper, others = NAMES[0], set(NAMES[1:])
    pod = make_pod(keeps=(keeper,))
    pod.until(lambda: pod.held(keeper) == WHOLE + PROCESS)
    pod.until(lambda: pod.waiting() == others)
    granted, marks = len(pod.grants), {name: pod.done(name) for name in others}

    pod.kill(keeper)
    pod.until(lambda: not pod.runs(keeper))
    reaped = time.monotonic()
    pod.until(lambda: len(pod.grants) > granted)

    at, name = pod.grants[granted]
    assert name in others
    assert at - reaped < AFTER_DEATH_S
    pod.until(lambda: all(pod.done(name) > marks[name] for name in others))
    assert pod.watch.most_bytes <= BUDGET

"""Keeps every child process alive, and stops them in order.

Readiness is what a child says of itself on its socket, never a wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from worker.protocol.messages import ChildReport, Drain, EngineNotice, Message, State
from worker.supervisor.child import (
    HEALTHY_S,
    NO_RESTART,
    QUICK_FAILURES,
    SILENT_S,
    Child,
    ChildSpec,
    Process,
    exit_text,
    restart_delay,
)

log = logging.getLogger(__name__)

NOTICE_EVERY_S = 1.0


class Wire(Protocol):
    """Messages to and from the children."""

    def receive(self) -> list[tuple[str, State | None]]:
        """What children said since the last call: their states, None for one that went away."""
        ...

    def send(self, name: str, message: Message) -> None:
        """To a child, if it is there."""
        ...


class StandIn(Protocol):
    """Answers on the port of a front that does not start."""

    def open(self, port: int, report: Callable[[], ChildReport]) -> None: ...

    def close(self, port: int) -> None: ...


class Memory(Protocol):
    """Who is told when an engine begins and ends, because it holds device memory."""

    def began(self, name: str) -> None: ...

    def ended(self, name: str, now: float) -> None: ...


class Supervisor:
    """Owner of all children: their state changes inside `tick` and nowhere else.

    A signal handler may only call `stop`.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        spawn: Callable[[ChildSpec], Process],
        wire: Wire,
        stand_in: StandIn,
        memory: Memory,
        last_words: Callable[[str], str],
        grace_s: float,
        kill_after_s: float,
        clock: Callable[[], float],
    ):
        """spawn: starts a process. last_words: the last error in a child's log.

        grace_s: how long running work may finish after `stop`; kill_after_s: how long a child
        may take to end after SIGTERM. clock: monotonic, for reports asked for between ticks.
        """
        self._clock = clock
        self._spawn = spawn
        self._wire = wire
        self._stand_in = stand_in
        self._memory = memory
        self._last_words = last_words
        self._grace_s = grace_s
        self._kill_after_s = kill_after_s
        self.children = [Child(spec) for spec in specs]
        self._by_name = {child.name: child for child in self.children}
        self._stop_asked = 0
        self._drain_ends: float | None = None
        self._noticed_at = float("-inf")
        self._lost_work = False
        # Whether nothing was running when the children were told to end; None before that.
        self.drained: bool | None = None

    def stop(self) -> None:
        """Drain and end; asked twice, end without waiting for running work."""
        self._stop_asked += 1

    @property
    def stopping(self) -> bool:
        return self._stop_asked > 0

    @property
    def done(self) -> bool:
        """Stopped, with no child left."""
        return self.drained is not None and all(child.process is None for child in self.children)

    def tick(self, now: float) -> None:
        """Look at every child once. Never blocks."""
        self._hear(now)
        for child in self.children:
            self._reap(child, now)
            self._kill_the_silent(child, now)
            self._forgive(child, now)
            self._start_if_due(child, now)
        self._tell_fronts(now)
        if self.stopping:
            self._wind_down(now)

    def status(self) -> str:
        """One word for all: starting | ready | degraded | draining | stopped."""
        if self.stopping:
            return "stopped" if self.done else "draining"
        if all(child.is_ready() for child in self.children):
            models = [
                model for child in self.children if child.state for model in child.state.models
            ]
            return "degraded" if any(model.problem for model in models) else "ready"
        failed = any(child.failures or child.given_up for child in self.children)
        return "degraded" if failed else "starting"

    # --- the steps of a tick -------------------------------------------------------------------

    def _hear(self, now: float) -> None:
        for name, state in self._wire.receive():
            child = self._by_name[name]
            if child.process is None:
                continue  # the last words of one that has been reaped
            if state is not None:
                child.heard_at = now
            child.state = state
            if child.is_ready() and child.ready_at is None:
                child.ready_at = now
                log.info("%s is ready after %.1f s", name, now - child.started_at)

    def _reap(self, child: Child, now: float) -> None:
        code = child.process.poll() if child.process is not None else None
        if code is None:
            return
        child.process, child.state, child.ready_at = None, None, None
        if child.spec.is_engine:
            self._memory.ended(child.name, now)
        if self.stopping:
            # One that ends before it was told to takes its running work with it.
            self._lost_work = self._lost_work or child.terminated_at is None
            child.terminated_at = child.terminated_at or now
            return
        child.failures += 1
        child.given_up = code in NO_RESTART
        child.start_at = now + restart_delay(child.failures)
        words = self._last_words(child.name)
        child.cause = f"{exit_text(code)}: {words}" if words else exit_text(code)
        log.error(
            "%s %s; %s",
            child.name,
            child.cause,
            "it will not be started again"
            if child.given_up
            else f"failure {child.failures}, next try in {child.start_at - now:.0f} s",
        )
        if child.spec.port is not None and (child.given_up or child.failures >= QUICK_FAILURES):
            self._stand_in.open(child.spec.port, lambda: child.report(self._clock(), 0))

    def _kill_the_silent(self, child: Child, now: float) -> None:
        if child.process is None or self.stopping or now - child.heard_at <= SILENT_S:
            return
        log.error("%s has said nothing for %.0f s and is killed", child.name, SILENT_S)
        child.process.kill()
        child.heard_at = now  # once per silence; the next tick reaps it

    def _forgive(self, child: Child, now: float) -> None:
        if child.failures and child.ready_at is not None and now - child.ready_at >= HEALTHY_S:
            child.failures, child.cause = 0, None

    def _start_if_due(self, child: Child, now: float) -> None:
        if child.process is not None or child.given_up or self.stopping or now < child.start_at:
            return
        if child.spec.port is not None:
            self._stand_in.close(child.spec.port)
        if child.spec.is_engine:
            self._memory.began(child.name)
        child.process = self._spawn(child.spec)
        child.started_at = child.heard_at = now
        log.info("%s started, pid %d", child.name, child.process.pid)

    def _tell_fronts(self, now: float) -> None:
        """While an engine is down, whoever uses it knows why, and when it will be tried again."""
        if now - self._noticed_at < NOTICE_EVERY_S:
            return
        self._noticed_at = now
        for engine in self.children:
            if not engine.spec.is_engine:
                continue
            down = engine.process is None and not self.stopping
            notice = EngineNotice(
                name=engine.name,
                cause=engine.cause or "it has not been started" if down else None,
                next_try_s=engine.next_try_s(now),
            )
            for other in self.children:
                if not other.spec.is_engine and other.process is not None:
                    self._wire.send(other.name, notice)

    def _wind_down(self, now: float) -> None:
        """Tell fronts and the runner to drain; when they have, end them; then the engines."""
        fronts = [child for child in self.children if not child.spec.is_engine]
        if self._drain_ends is None:
            self._drain_ends = now + self._grace_s
            for front in fronts:
                if front.spec.port is not None:
                    self._stand_in.close(front.spec.port)
            log.info("draining, for %.0f s at most", self._grace_s)
        if self.drained is None:
            for front in fronts:  # told until it confirms: it may have been away for a moment
                if front.state is None or front.state.status != "draining":
                    self._wire.send(front.name, Drain(grace_s=max(0.0, self._drain_ends - now)))
            busy = any(_is_busy(front) for front in fronts)
            if busy and now < self._drain_ends and self._stop_asked < 2:
                return
            self.drained = not busy and not self._lost_work
            log.info("drained" if self.drained else "running work is cut short")
        for child in fronts:
            self._end(child, now)
        if all(front.process is None for front in fronts):
            for child in self.children:
                self._end(child, now)
        for child in self.children:
            if child.process is None:  # it waited for a start that does not come any more
                child.terminated_at = child.terminated_at or now

    def _end(self, child: Child, now: float) -> None:
        """SIGTERM once, SIGKILL when that has not been enough."""
        if child.process is None:
            return
        if child.terminated_at is None:
            child.terminated_at = now
            child.process.terminate()
        elif now - child.terminated_at > self._kill_after_s:
            log.error("%s did not end within %.0f s", child.name, self._kill_after_s)
            child.process.kill()


def _is_busy(front: Child) -> bool:
    """Whether a front or the runner has work that a drain waits for. One that has not yet confirmed
    the drain may still be taking a last request."""
    if front.process is None or front.state is None:
        return False
    return front.state.status != "draining" or front.state.active > 0

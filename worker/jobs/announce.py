"""When the ports are registered, looked at and signed off: decisions, without doing any of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from worker.storage.deliver import backoff_s

CHAT, MEDIA = "chat", "media"

PROBE_EVERY_S = 5.0  # a port that answers
PROBE_SOON_S = 1.0  # one that does not, or that drains
# Addresses may be lost: every function writes the whole document that they are in.
REGISTER_EVERY_S = 600.0
# One of the callers takes health that is older than two minutes for none.
CHECK_EVERY_S = 60.0
MAX_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class Port:
    """One port and what is known of it."""

    role: str  # CHAT | MEDIA
    url: str  # public
    answers: bool = False  # /health was 200 when it was last looked at
    probe_at: float = 0.0  # monotonic seconds, as all times here
    registered_at: float | None = None  # None: it has to be, since it was away or is new
    failures: int = 0  # of registering, in a row
    register_at: float = 0.0  # not before


@dataclass(frozen=True, slots=True)
class State:
    """All that decisions are made from."""

    ports: tuple[Port, ...]
    check_at: float | None = None  # None: nothing was registered yet
    check_failures: int = 0
    draining: bool = False
    signed_off: bool = False

    def port(self, role: str) -> Port:
        return next(port for port in self.ports if port.role == role)

    def with_port(self, changed: Port) -> State:
        ports = tuple(changed if port.role == changed.role else port for port in self.ports)
        return replace(self, ports=ports)


@dataclass(frozen=True, slots=True)
class Probe:
    """Look whether the port answers, from inside."""

    role: str


@dataclass(frozen=True, slots=True)
class Register:
    role: str


@dataclass(frozen=True, slots=True)
class CheckHealth:
    """Have the service look at both ports."""


Action = Probe | Register | CheckHealth


def due(state: State, now: float) -> list[Action]:
    """What is to be done now, in order. Pure.

    A port is registered only on a fresh look at it, so a look that is due goes first.
    """
    if state.signed_off:
        return []
    actions: list[Action] = []
    for port in state.ports:
        if now >= port.probe_at:
            actions.append(Probe(port.role))
        elif port.answers and not state.draining and _has_to_register(port, now):
            actions.append(Register(port.role))
    check_due = state.check_at is not None and now >= state.check_at
    if state.draining:
        # Not before all refuse: it would store once more that they are healthy.
        check_due = check_due and not any(port.answers for port in state.ports)
    if check_due:
        actions.append(CheckHealth())
    return actions


def _has_to_register(port: Port, now: float) -> bool:
    if now < port.register_at:
        return False
    return port.registered_at is None or now - port.registered_at >= REGISTER_EVERY_S


# --- what follows from how it went; pure -----------------------------------------------------


def with_urls(state: State, urls: Mapping[str, str]) -> State:
    """A port whose public address is another one is registered anew; one without an address is
    left alone."""
    known = {port.role: port for port in state.ports}
    ports = []
    for role, url in urls.items():
        port = known.get(role, Port(role, url))
        changed = Port(role, url, port.answers, port.probe_at)
        ports.append(port if port.url == url else changed)
    return replace(state, ports=tuple(ports))


def drained(state: State, now: float) -> State:
    """From now on nothing is registered, and the ports are looked at until all refuse.

    What has not been registered in this life may have been in an earlier one.
    """
    # A port is taken to answer until it was looked at once more.
    ports = tuple(replace(port, answers=True, probe_at=now) for port in state.ports)
    return replace(state, ports=ports, draining=True, check_at=now)


def probed(state: State, role: str, answers: bool, now: float) -> State:
    port = state.port(role)
    soon = state.draining or not answers
    next_port = replace(
        port, answers=answers, probe_at=now + (PROBE_SOON_S if soon else PROBE_EVERY_S)
    )
    if port.answers and not answers:
        # The service shall know at once, and again when it is back.
        next_port = replace(next_port, registered_at=None, failures=0, register_at=now)
        if state.check_at is not None:
            state = replace(state, check_at=min(state.check_at, now))
    return state.with_port(next_port)


def registered(state: State, role: str, now: float) -> State:
    """Only a check writes down what one of the callers looks at, so it follows at once."""
    port = replace(state.port(role), registered_at=now, failures=0)
    return replace(state.with_port(port), check_at=now)


def not_registered(state: State, role: str, now: float, random01: float) -> State:
    port = state.port(role)
    wait_s = _retry_s(port.failures + 1, random01)
    return state.with_port(replace(port, failures=port.failures + 1, register_at=now + wait_s))


def checked(state: State, now: float) -> State:
    return replace(state, check_at=now + CHECK_EVERY_S, check_failures=0, signed_off=state.draining)


def not_checked(state: State, now: float, random01: float) -> State:
    failures = state.check_failures + 1
    return replace(state, check_at=now + _retry_s(failures, random01), check_failures=failures)


def _retry_s(failures: int, random01: float) -> float:
    return min(MAX_RETRY_S, backoff_s(failures, random01))

"""A child process as its supervisor sees it, and the decisions about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker.protocol.messages import ChildReport, State

# gunicorn exits with these when its app cannot boot or cannot be found, and so do our engines
# for a wrong profile: starting again cannot help (gunicorn/arbiter.py).
NO_RESTART = frozenset({3, 4})
# After this many failures in a row the port's cause is explained by the orchestrator itself.
QUICK_FAILURES = 5
HEALTHY_S = 60.0
MAX_DELAY_S = 60.0
# A child that has said nothing for this long hangs; its socket thread speaks twice a second.
SILENT_S = 60.0


class Process(Protocol):
    """What a supervisor needs of a started process; subprocess.Popen fits."""

    pid: int

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to keep alive."""

    name: str  # role and name: "engine chat", "front media", "runner"
    arguments: tuple[str, ...]
    port: int | None = None  # of a front or a guest
    # A program of its own, which does not speak on our sockets: it is looked at over HTTP.
    is_guest: bool = False

    @property
    def is_engine(self) -> bool:
        """It computes on the device. The others are told what happens to engines, drain, and end
        before them."""
        return self.name.startswith("engine ")


class Child:
    """The state of one child. Changes only in `Supervisor.tick` and what it calls."""

    def __init__(self, spec: ChildSpec):
        self.spec = spec
        self.process: Process | None = None
        self.state: State | None = None  # what it last said; None: nothing since its start
        self.started_at = 0.0
        self.ready_at: float | None = None
        self.heard_at = 0.0
        self.failures = 0  # in a row, without a healthy minute between
        self.start_at = 0.0
        self.given_up = False
        self.cause: str | None = None
        self.terminated_at: float | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    def status(self) -> str:
        """One word for the table."""
        if self.process is None:
            if self.given_up:
                return "failed"
            if self.terminated_at is not None:
                return "stopped"
            return "failed" if self.failures >= QUICK_FAILURES else "waiting"
        if self.terminated_at is not None:
            return "stopping"
        return self.state.status if self.state is not None else "starting"

    def is_ready(self) -> bool:
        return self.process is not None and self.state is not None and self.state.status == "ready"

    def next_try_s(self, now: float) -> float | None:
        """Seconds until the next start; None when it runs or will not be started."""
        if self.process is not None or self.given_up or self.terminated_at is not None:
            return None
        return max(0.0, self.start_at - now)

    def report(self, now: float, rss_bytes: int) -> ChildReport:
        models = self.state.models if self.state is not None else ()
        return ChildReport(
            name=self.name,
            pid=self.process.pid if self.process is not None else None,
            status=self.status(),
            port=self.spec.port,
            models=tuple(f"{model.id}: {model.status}" for model in models),
            rss_bytes=rss_bytes,
            failures=self.failures,
            cause=self.cause,
            next_try_s=self.next_try_s(now),
            uptime_s=now - self.started_at if self.process is not None else 0.0,
        )


def restart_delay(failures: int) -> float:
    """Seconds to wait before the start that follows failure number `failures` in a row.

    1, 2, 4 … capped at MAX_DELAY_S. failures: 1 or more.
    """
    return float(min(MAX_DELAY_S, 2 ** min(failures - 1, 16)))


def exit_text(code: int) -> str:
    """How a process ended, in words. code: as subprocess gives it, negative for a signal."""
    if code >= 0:
        return f"exited with code {code}"
    import signal

    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"

"""The running orchestrator: one loop over ticks, the control socket and the view."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import zmq

from worker.config import Settings
from worker.errors import ConfigError, WorkerError
from worker.protocol.control import Query
from worker.protocol.messages import (
    ExplainQuery,
    Explanation,
    LedgerQuery,
    Message,
    PlanQuery,
    StatusReport,
    StopQuery,
)
from worker.protocol.transport import make_run_dir, run_dir
from worker.supervisor.budget import Budget, budget_of
from worker.supervisor.guests import BothWires, Guests
from worker.supervisor.lender import Lender
from worker.supervisor.logs import ChildLogs
from worker.supervisor.spawn import Spawner, child_specs, guest_environment
from worker.supervisor.standin import HttpStandIn
from worker.supervisor.supervisor import Supervisor
from worker.supervisor.view import LiveView, PlainView, QuietView, curl_lines, open_view
from worker.supervisor.wire import ChildWire, ControlServer
from worker.vram.broker import Broker
from worker.vram.probe import device_memory, first_card

log = logging.getLogger(__name__)

TICK_S = 0.1
SHOW_EVERY_S = 0.5


class AlreadyRunning(WorkerError):
    """Another orchestrator holds this state folder, or something else holds a port."""


def run(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Start everything and stay until told to stop. False when running work was cut short.

    Raises AlreadyRunning. Must be called on the main thread.
    """
    with _lock(settings.state_dir):
        _require_free_ports(settings)
        return _Daemon(settings, environment).run()


class _Daemon:
    """Owns everything the loop touches; main thread only."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]):
        self._settings = settings
        self._started = time.monotonic()
        make_run_dir(settings.state_dir)
        specs = child_specs(settings)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        guests = {spec.name: spec.port for spec in specs if spec.is_guest and spec.port is not None}
        host = settings.gateway.host if settings.gateway is not None else ""
        own = [spec.name for spec in specs if not spec.is_guest]
        self._wire = ChildWire(context, settings.state_dir, own)
        self._guests = Guests({name: (host, port) for name, port in guests.items()})
        self._control = ControlServer(context, settings.state_dir)
        self._poller = zmq.Poller()
        self._wire.register(self._poller)
        self._control.register(self._poller)
        # Children run in the repository's folder; a relative path would be another one there.
        absolute = {
            "VERBATIM_MODELS_DIR": str(settings.models_dir),
            "VERBATIM_STATE_DIR": str(settings.state_dir),
        }
        try:
            budget = budget_of(settings, first_card(), None)
        except ConfigError:  # the engines say it too, and the fronts tell who asks
            budget = Budget("no card", 0, 0)
        log.info("device memory: %d bytes of %s", budget.total_bytes, budget.name)
        self._on_card = budget.process_bytes > 0
        self._lender = Lender(Broker(budget.total_bytes), budget.process_bytes, self._wire.send)
        known = {**guest_environment(settings), **environment, **absolute}
        self._logs = ChildLogs(settings.state_dir / "logs")
        self._supervisor = Supervisor(
            specs,
            Spawner(self._logs, known),
            BothWires(self._wire, self._guests, list(guests)),
            HttpStandIn(settings.server.host),
            _EngineMemory(self._lender, self._wire),
            self._logs.last_words,
            settings.daemon.grace_s,
            settings.daemon.kill_after_s,
            time.monotonic,
        )
        self._view: LiveView | PlainView | QuietView = open_view(curl_lines(settings, environment))

    def run(self) -> bool:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._supervisor.stop())
        shown_at = 0.0
        self._guests.start()
        try:
            while not self._supervisor.done:
                now = time.monotonic()
                self._supervisor.tick(now)
                self._lender.tick(self._wire.take_asked(), now)
                self._answer_queries(now)
                if now - shown_at >= SHOW_EVERY_S:
                    shown_at = now
                    self._show(now)
                    states = [child.state for child in self._supervisor.children if child.state]
                    self._lender.reconcile(states, now)
                    if self._on_card:
                        card = device_memory("cuda")
                        self._lender.reconcile_driver(
                            states, card.total_bytes - card.free_bytes, now
                        )
                self._poller.poll(int(TICK_S * 1000))
            self._show(time.monotonic())
        finally:
            self._close_view()
            self._guests.close()
            self._control.close()
            self._wire.close()
            self._logs.close()
            _remove_run_dir(self._settings.state_dir)
        return bool(self._supervisor.drained)

    def _show(self, now: float) -> None:
        try:
            self._view.show(self._report(now))
        except OSError as exc:  # a closed pipe or terminal must not end the daemon
            log.warning("the output has gone (%s); status still answers", exc)
            self._view = QuietView()

    def _close_view(self) -> None:
        try:
            self._view.close()
        except OSError as exc:
            log.warning("the output has gone (%s)", exc)

    def _answer_queries(self, now: float) -> None:
        for peer, query in self._control.receive():
            if isinstance(query, StopQuery):
                self._supervisor.stop()
            try:
                self._control.reply(peer, self._answer(query, now))
            except Exception:  # a question may not end what it asks about
                log.exception("no answer to %s", type(query).__name__)

    def _answer(self, query: Query, now: float) -> Message:
        match query:
            case ExplainQuery():
                events = self._lender.explain(query.about)
                return Explanation(
                    request_id=query.request_id,
                    found=events is not None,
                    events=tuple(events or ()),
                )
            case PlanQuery():
                return self._lender.plan(query, now)
            case LedgerQuery():
                return self._lender.report(query.request_id, now)
        return self._report(now, query.request_id)

    def _report(self, now: float, request_id: str = "") -> StatusReport:
        children = self._supervisor.children
        rss = rss_bytes(child.process.pid for child in children if child.process is not None)
        return StatusReport(
            request_id=request_id,
            pid=os.getpid(),
            profile=self._settings.profile_name,
            status=self._supervisor.status(),
            uptime_s=now - self._started,
            children=tuple(
                child.report(now, rss.get(child.process.pid, 0) if child.process is not None else 0)
                for child in children
            ),
        )


class _EngineMemory:
    """Between the supervisor, who sees engines begin and end, and the broker of their memory."""

    def __init__(self, lender: Lender, wire: ChildWire):
        self._lender = lender
        self._wire = wire

    def began(self, name: str) -> None:
        self._wire.began(name, self._lender.began(name))

    def ended(self, name: str, now: float) -> None:
        self._lender.ended(name, now)


def rss_bytes(pids: Iterable[int]) -> dict[int, int]:
    """Resident bytes of each of these children and of its own ones (gunicorn's workers), by pid.

    All of them in one look: psutil reads the whole of /proc for each.
    """
    found = dict.fromkeys(pids, 0)
    parents, sizes = {}, {}
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended between two looks
            parents[one.pid], sizes[one.pid] = one.ppid(), one.memory_info().rss
    for pid, size in sizes.items():
        owner: int | None = pid
        while owner is not None and owner not in found:
            owner = parents.get(owner)
        if owner is not None:
            found[owner] += size
    return found


@contextmanager
def _lock(state_dir: Path) -> Iterator[None]:
    """Hold the state folder; the kernel lets go of it when we die, however that happens."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "orchestrator.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise AlreadyRunning(
                f"an orchestrator (pid {pid}) already runs with the state folder {state_dir}; "
                "stop it with: python orchestrator.py stop"
            ) from exc
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _require_free_ports(settings: Settings) -> None:
    server = settings.server
    places = [
        (server.host, server.chat_port, "[server] chat_port or VERBATIM_CHAT_PORT"),
        (server.host, server.media_port, "[server] media_port or VERBATIM_MEDIA_PORT"),
    ]
    if settings.gateway is not None:
        gateway = settings.gateway
        places.append((gateway.host, gateway.port, "[gateway] port or GATEWAY_PORT"))
    for host, port, setting in places:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                raise AlreadyRunning(
                    f"port {port} on {host} cannot be used ({exc.strerror}); stop what "
                    f"listens there, or set {setting}"
                ) from exc


def _remove_run_dir(state_dir: Path) -> None:
    """Children remove their sockets when they end in order; killed ones leave theirs."""
    folder = run_dir(state_dir)
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as exc:
        log.warning("the folder of the sockets stays: %s", exc)

"""The runner process put together, and its socket: what it says of itself and of its jobs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import zmq

from worker.catalog import media_catalog
from worker.config import Settings
from worker.jobs.announce import MEDIA
from worker.jobs.bell import Bell
from worker.jobs.board import Board
from worker.jobs.database import JOBS_FOLDER
from worker.jobs.decode import JobRequest, decode_job
from worker.jobs.intake import Intake
from worker.jobs.job import Status
from worker.jobs.journal import Journal
from worker.jobs.outbox import Outbox
from worker.jobs.pictures import Wanted
from worker.jobs.registration import public_urls, registration_from_environment
from worker.jobs.results import RESULTS_FOLDER, Results
from worker.jobs.runner import JobRunner
from worker.jobs.told import Tellers
from worker.jobs.uploads import Uploader
from worker.jobs.watch import RUNNER
from worker.protocol.link import Link
from worker.protocol.messages import (
    Drain,
    EngineNotice,
    Hello,
    JobNews,
    LookAgain,
    Reference,
    State,
)
from worker.protocol.transport import Peer, PeerGone, Server, Waker, socket_path
from worker.queues.configured import queues_from_environment, worker_name
from worker.queues.queue import QueueUnavailable
from worker.storage.addresses import Addresses
from worker.storage.configured import store_from_environment
from worker.storage.deliver import Sender
from worker.storage.pinned import PinnedHttp
from worker.storage.references import PictureLimits, SupabaseObjects, fetch_picture
from worker.storage.rows import JobRows
from worker.storage.service import project, service_from_environment

log = logging.getLogger(__name__)

STATE_EVERY_S = 0.5
CLOSE_S = 8.0  # the supervisor kills 10 s after it has told to end
SIGN_OFF_S = 10.0  # that a drain waits for the service to see that the ports refuse


class _Loop(Protocol):
    """Something that works on threads of its own."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class RunnerService:
    """Everything the runner process holds. Main thread, but for `stop`."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]):
        """Raises ConfigError, JournalUnavailable."""
        self._started_at = time.time()
        self._stopping = False
        self._drain_began: float | None = None
        self._news: deque[JobNews] = deque()
        self._waker = Waker()
        folder = settings.state_dir / JOBS_FOLDER
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        service = service_from_environment(environment)
        self._bell = Bell()
        self._journal = Journal(folder, self._bell)
        # Nobody here waits for steps, and every loop reads the journal when its bell is rung.
        self._board = Board(Bell(), self._tell_fronts)
        self._link = Link(
            context, socket_path(settings.state_dir, "engine media"), RUNNER, "engine media"
        )
        self._results = Results(folder / RESULTS_FOLDER)
        name = worker_name(environment, settings.state_dir)
        store = store_from_environment(environment)
        tellers = Tellers(
            name,
            calls_back=service is not None,
            stores=store is not None,
            media_url=public_urls(
                environment, settings.server.chat_port, settings.server.media_port
            ).get(MEDIA),
        )
        # What jobs name as pictures may lie in the project's own storage on the same network; what
        # they name as webhooks has no business with it.
        trusted = frozenset(settings.jobs.trusted_origins)
        found = project(environment)
        http = PinnedHttp(Addresses(trusted | {found[0]} if found is not None else trusted))
        self._runner = JobRunner(
            self._journal,
            self._board,
            self._bell,
            self._link,
            self._results,
            folder / "work",
            fetch=_Fetcher(settings, http, environment),
            tell=tellers.tell,
            places=tellers.places,
            keep_finished=settings.media.keep_finished,
            keep_bytes=settings.media.keep_bytes,
            batch_images=settings.limits.images,
        )
        self._uploader = (
            Uploader(self._journal, self._bell, self._results, store, tellers.tell)
            if store is not None
            else None
        )
        self._outbox = Outbox(
            self._journal,
            self._bell,
            Sender(service, PinnedHttp(Addresses(trusted))),
            settings.jobs.deliver_for_s,
        )
        catalog = media_catalog(settings)

        def decode(body: dict[str, Any]) -> JobRequest:
            return decode_job(body, catalog, settings.limits, settings.media.exactness)

        kinds = {spec.kind for spec in catalog.specs}
        lists = [name for name in settings.jobs.lists if _kind_of(name) in {None, *kinds}]

        def can_work(name: str) -> bool:
            """Whether the engine is there, with a model of the list's kind that is whole."""
            state, kind = self._link.view.state, _kind_of(name)
            return state is not None and any(
                kind in (None, model.kind) and not model.problem for model in state.models
            )

        self._intakes = [
            Intake(
                queue,
                self._journal,
                self._bell,
                decode,
                tellers.tell,
                JobRows(service) if service is not None else None,
                name,
                settings.jobs.take_ahead,
                partial(can_work, queue.name),
            )
            for queue in queues_from_environment(environment, lists, name)
        ]
        self._registration = registration_from_environment(
            environment, settings.server.chat_port, settings.server.media_port
        )
        self._server = Server(context, socket_path(settings.state_dir, RUNNER))

    def stop(self) -> None:
        """End `run`. For signal handlers."""
        self._stopping = True

    def run(self) -> None:
        """Work until `stop`. Raises JournalUnavailable when the journal cannot be begun with."""
        self._look_back()
        self._runner.start()
        loops: list[_Loop] = [self._outbox, *self._intakes]
        loops += [one for one in (self._uploader, self._registration) if one is not None]
        for loop in loops:
            loop.start()
        poller = zmq.Poller()
        poller.register(self._server.poll_target, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        peers: dict[Peer, None] = {}
        tell_at = 0.0
        while not self._stopping:
            poller.poll(int(STATE_EVERY_S * 1000))
            self._waker.clear()
            while (received := self._server.receive()) is not None:
                peer, message = received
                match message:
                    case Hello():
                        peers[peer] = None
                        tell_at = 0.0
                    case LookAgain():
                        self._bell.ring()
                    case EngineNotice():
                        self._link.note(message)
                    case Drain():
                        self._drain()
            while self._news:
                self._send(peers, self._news.popleft())
            if (now := time.monotonic()) >= tell_at:
                tell_at = now + STATE_EVERY_S
                self._send(peers, self._state())
        ending = [threading.Thread(target=one.close) for one in (*loops, self._runner)]
        for thread in ending:
            thread.start()
        ends = time.monotonic() + CLOSE_S
        for thread in ending:
            thread.join(max(0.0, ends - time.monotonic()))
        self._server.close()

    def _look_back(self) -> None:
        """What became of jobs of lists since the last time, before any of them begins."""
        for intake in self._intakes:
            try:
                intake.recover(Status.QUEUED, Status.PROCESSING)
            except QueueUnavailable as exc:
                log.error("%s; what was adopted by others meanwhile is not known", exc)
        self._journal.let_go_of_others([intake.name for intake in self._intakes])
        if self._uploader is None and (waiting := self._journal.outbox_counts()["uploads"]):
            log.error("%d files wait for a store, and none is configured", waiting)

    def _drain(self) -> None:
        if self._drain_began is not None:
            return
        self._drain_began = time.monotonic()
        log.info("draining: nothing new is begun")
        self._runner.stop_taking()
        for intake in self._intakes:
            intake.stop_taking()
        if self._registration is not None:
            self._registration.drain()

    def _signing_off(self) -> bool:
        """Whether a drain is to wait until the service has seen that the ports refuse."""
        return (
            self._drain_began is not None
            and self._registration is not None
            and time.monotonic() - self._drain_began < SIGN_OFF_S
            and not self._registration.wait_signed_off(0)
        )

    def _handing_over(self) -> int:
        """Lists whose waiting jobs are still to be handed to other workers."""
        if self._drain_began is None:
            return 0
        return sum(not intake.handed_over for intake in self._intakes)

    def _tell_fronts(self, news: JobNews) -> None:
        self._news.append(news)
        self._waker.wake()

    def _send(self, peers: dict[Peer, None], message: JobNews | State) -> None:
        for peer in list(peers):
            try:
                self._server.send(peer, message)
            except PeerGone:
                del peers[peer]

    def _state(self) -> State:
        return State(
            name=RUNNER,
            pid=os.getpid(),
            started_at=self._started_at,
            status="draining" if self._drain_began is not None else "ready",
            active=self._runner.active
            + self._outbox.active
            + int(self._signing_off())
            + self._handing_over(),
            rss_bytes=psutil.Process().memory_info().rss,
        )


def _kind_of(name: str) -> str | None:
    """Of model that a list's jobs need, by its name; None: of any."""
    return next((kind for kind in ("sdxl", "wan") if name.startswith(kind)), None)


class _Fetcher:
    """Fetches the pictures of jobs. Immutable; any thread."""

    def __init__(self, settings: Settings, http: PinnedHttp, environment: Mapping[str, str]):
        limits = settings.jobs
        self._http = http
        self._limits = PictureLimits(
            limits.reference_bytes, limits.reference_pixels, limits.reference_s
        )
        found = project(environment)
        self._storage = SupabaseObjects(*found, http) if found is not None else None

    def __call__(self, wanted: Wanted, folder: Path, should_stop: Callable[[], bool]) -> Reference:
        return fetch_picture(
            wanted.source,
            wanted.role,
            folder,
            self._http,
            self._limits,
            self._storage,
            should_stop,
        )

"""Puts a front together inside its gunicorn worker: `worker.front.wsgi:build()`.

Raising here ends gunicorn with exit code 3, which tells the supervisor not to try again.
"""

from __future__ import annotations

import os
from functools import partial

import zmq
from flask import Flask

from worker.catalog import chat_catalog, media_catalog
from worker.config import check_exposure, load_settings, read_keys
from worker.front.admission import Admission
from worker.front.app import Front, create_chat_app, create_media_app, places
from worker.front.control import FrontControl
from worker.front.drain import Drainer
from worker.front.media import JobDesk
from worker.jobs.bell import Bell
from worker.jobs.board import Board
from worker.jobs.database import JOBS_FOLDER
from worker.jobs.journal import Journal
from worker.jobs.results import RESULTS_FOLDER, Results
from worker.jobs.watch import RUNNER, RunnerWatch
from worker.protocol.control import ask_orchestrator
from worker.protocol.link import Link
from worker.protocol.transport import socket_path
from worker.vram.planner import Sizer
from worker.vram.probe import first_card
from worker.vram.sizes import Peaks
from worker.vram.tokenizers import Tokenizers

# How worker/front/__main__.py tells the gunicorn worker what to build.
NAME_VARIABLE = "VERBATIM_FRONT"
ORCHESTRATOR_S = 2.0  # its loop takes milliseconds
PROFILE_VARIABLE = "VERBATIM_PROFILE"


def build() -> Flask:
    name = os.environ[NAME_VARIABLE]
    settings = load_settings(os.environ[PROFILE_VARIABLE], os.environ)
    keys = read_keys(os.environ)
    check_exposure(settings, keys)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    me = f"front {name}"

    def link(engine: str) -> Link:
        return Link(context, socket_path(settings.state_dir, engine), me, engine)

    admission = Admission(places(settings))
    front = Front(
        settings,
        keys,
        Drainer(),
        chat_catalog(settings),
        media_catalog(settings),
        link("engine chat"),
        partial(ask_orchestrator, settings.state_dir, timeout_s=ORCHESTRATOR_S),
        Sizer(
            Peaks(settings.state_dir),
            "cpu" if settings.daemon.device == "cpu" or first_card() is None else "cuda",
            kv_bytes=settings.chat.kv_bytes,
            max_running=settings.chat.max_running,
        ),
        Tokenizers(settings.state_dir),
    )
    links = {"engine chat": front.chat_link}
    if name == "chat":
        app = create_chat_app(front, admission)

        def unfinished() -> int:
            return admission.taken
    else:
        media_link = links["engine media"] = link("engine media")
        bell = Bell()
        folder = settings.state_dir / JOBS_FOLDER
        journal, board = Journal(folder, bell), Board(bell)
        watch = RunnerWatch(context, socket_path(settings.state_dir, RUNNER), me, board, bell.ring)
        desk = JobDesk(journal, board, bell, Results(folder / RESULTS_FOLDER), watch.look)
        app = create_media_app(front, admission, media_link, desk)

        def unfinished() -> int:
            return admission.taken  # jobs are in the journal, and the runner's to finish

    FrontControl(socket_path(settings.state_dir, me), me, front.drainer, links, unfinished)
    return app

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
from worker.jobs.runner import JobRunner
from worker.jobs.table import JobTable
from worker.protocol.control import ask_orchestrator
from worker.protocol.link import Link
from worker.protocol.transport import socket_path
from worker.vram.planner import Sizer
from worker.vram.probe import first_card
from worker.vram.sizes import Peaks

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
    )
    links = {"engine chat": front.chat_link}
    if name == "chat":
        app = create_chat_app(front, admission)

        def unfinished() -> int:
            return admission.taken
    else:
        media_link = links["engine media"] = link("engine media")
        # The runner is made after the table, and the table drops files through it.
        table = JobTable(
            settings.media.max_waiting,
            settings.media.keep_finished,
            lambda job: runner.forget(job),
        )
        runner = JobRunner(table, media_link, settings.state_dir)
        runner.start()
        app = create_media_app(front, admission, media_link, table, runner)

        def unfinished() -> int:
            counts = table.counts()
            # Without an engine nothing queued can run; a drain need not wait for it.
            queued = counts["queued"] if media_link.view.state is not None else 0
            return admission.taken + queued + counts["processing"]

    FrontControl(socket_path(settings.state_dir, me), me, front.drainer, links, unfinished)
    return app

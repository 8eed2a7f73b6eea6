"""gunicorn around the gateway: one process with many threads, which mostly wait for workers."""

from __future__ import annotations

import socket
import struct
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication

from gateway.config import Settings
from gateway.lifeline import die_with, die_with_any_thread

# A request waits for a worker up to its deadline; those that only look must never queue behind.
THREADS = 64
# A client that stops in the middle of its request, or stops reading its answer, loses its
# connection after this long; else it would keep a thread for ever.
READ_S, WRITE_S = 20, 30
# Of a stop: how long running requests go on, and after how long the master kills the process; in
# between the log is written.
DRAIN_S, MASTER_S = 5, 9


class Server(BaseApplication):  # type: ignore[misc]
    """Runs until SIGTERM, which lets running requests go on for DRAIN_S; a supervisor kills what is
    left soon after."""

    def __init__(self, settings: Settings):
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        section = self._settings.section
        host = f"[{section.host}]" if ":" in section.host else section.host
        options: dict[str, Any] = {
            "bind": f"{host}:{section.port}",
            "worker_class": "gthread",
            # The replica loop, the log writer and the health loop live in this one process; more
            # throughput is more replicas, each on a port of its own.
            "workers": 1,
            "threads": THREADS,
            "worker_connections": 1000,
            "preload_app": False,  # threads and connections must be made after the fork
            "timeout": 30,  # a heartbeat of the process, not a limit for requests
            "graceful_timeout": MASTER_S,
            "keepalive": 75,  # longer than the 60 s after which proxies drop an idle connection
            "proc_name": "verbatim gateway",
            "accesslog": None,  # gateway/front/app.py logs requests, with their ids
            "errorlog": "-",
            "loglevel": "warning",
            "control_socket_disable": True,
            "when_ready": _limit_sockets,
            "post_fork": _bind_to_master,
            "worker_exit": _close_app,
        }
        for key, value in options.items():
            self.cfg.set(key, value)

    def load(self) -> Flask:
        # Imported here: the master loads no app, and a fault of the app is the worker's exit 3.
        from gateway.wsgi import build

        return build(self._settings)


def _limit_sockets(server: Any) -> None:
    for listener in server.LISTENERS:  # accepted connections inherit these
        for option, seconds in ((socket.SO_RCVTIMEO, READ_S), (socket.SO_SNDTIMEO, WRITE_S)):
            listener.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def _bind_to_master(server: Any, worker: Any) -> None:
    worker.cfg.set("graceful_timeout", DRAIN_S)  # this process's own copy
    die_with(worker.ppid)
    die_with_any_thread()


def _close_app(server: Any, worker: Any) -> None:
    from gateway.wsgi import CLOSE

    app = getattr(worker, "wsgi", None)  # None: it did not come to load it
    if app is not None:
        app.extensions[CLOSE]()

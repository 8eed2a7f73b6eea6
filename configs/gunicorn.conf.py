# gunicorn's settings for both fronts. A front is one process with many threads: everything slow
# happens in an engine, so threads only wait.
import os
import socket
import struct

from worker.config import load_settings
from worker.front import app, wsgi
from worker.lifeline import die_with_any_thread, die_with_parent

_name = os.environ[wsgi.NAME_VARIABLE]
_settings = load_settings(os.environ[wsgi.PROFILE_VARIABLE], os.environ)
_port = _settings.server.chat_port if _name == "chat" else _settings.server.media_port
_host = _settings.server.host

bind = f"[{_host}]:{_port}" if ":" in _host else f"{_host}:{_port}"
worker_class = "worker.front.threads.FrontWorker"  # gthread, with our shape of errors
workers = 1  # the links and the board of jobs live in this one process
threads = app.threads(_settings, _name)
worker_connections = 1000
preload_app = False  # links are threads and sockets; they must be made after the fork
timeout = 30  # a heartbeat of the worker, not a limit for requests
# The orchestrator has drained the front before it sends SIGTERM; what is left are idle watchers.
graceful_timeout = 5
keepalive = 75  # longer than the 60 s after which proxies drop an idle connection
proc_name = f"verbatim front {_name}"
accesslog = None  # worker/front/app.py logs requests, with their ids
errorlog = "-"
loglevel = "warning"
control_socket_disable = True  # the orchestrator has one


# A client that stops in the middle of its request's head, or stops reading its answer, loses its
# connection after this long; else it would keep a thread, and a generation, for ever.
_READ_S, _WRITE_S = 20, 30


def when_ready(server):
    for listener in server.LISTENERS:  # accepted connections inherit these
        for option, seconds in ((socket.SO_RCVTIMEO, _READ_S), (socket.SO_SNDTIMEO, _WRITE_S)):
            listener.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


def post_fork(server, worker):  # names are gunicorn's
    die_with_parent(parent=worker.ppid)
    die_with_any_thread()

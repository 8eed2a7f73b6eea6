"""Servers that answer as no server should, and a listener that nobody may call. On loopback."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

from worker.storage.pinned import begin_connection

STEP_S = 0.02  # between two pieces of what is sent too slowly


@dataclass(frozen=True)
class Seen:
    """A request that a server got."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes = b""


@dataclass
class Talk:
    """One connection, after its request was read."""

    request: Seen
    stopped: threading.Event
    connection: socket.socket

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def beats(self) -> Iterator[None]:
        """Goes on every STEP_S until the server stops."""
        while not self.stopped.wait(STEP_S):
            yield


Reply = Callable[[Talk], None]


@dataclass
class HostileServer:
    """Answers each path with its reply; a path without one with 404. A thread per connection."""

    tls: ssl.SSLContext | None = None
    replies: dict[str, Reply] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    reads_body: bool = True

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        handler = type("Bound", (_Handler,), {"hostile": self, "stopped": self._stopped})
        self._server = _Threads(("127.0.0.1", 0), handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def origin(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def asked(self) -> list[str]:
        return [one.path for one in self.seen]


class _Threads(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False  # closing waits for them, so none outlives its test
    block_on_close = True
    request_queue_size = 128


class _Handler(socketserver.BaseRequestHandler):
    hostile: HostileServer
    stopped: threading.Event

    def handle(self) -> None:
        self.hostile.connections += 1
        # A client that goes away in the middle is what these servers are for.
        with contextlib.suppress(OSError):
            connection = self.request
            connection.settimeout(5.0)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.hostile.tls:
                connection = self.hostile.tls.wrap_socket(connection, server_side=True)
            with connection:
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            line = file.readline().decode("latin-1")
            if not line.endswith(" HTTP/1.1\r\n"):  # nothing, or the begin of TLS's handshake
                return
            method, path, _ = line.split(" ")
            headers: dict[str, str] = {}
            while header := file.readline().strip():
                name, _, value = header.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            length = int(headers.get("content-length", "0")) if self.hostile.reads_body else 0
            request = Seen(method, path, headers, file.read(length))
        self.hostile.seen.append(request)
        reply = self.hostile.replies.get(path.partition("?")[0], answer(404))
        reply(Talk(request, self.stopped, connection))


# --- replies ----------------------------------------------------------------------------------


def answer(status: int, body: bytes = b"", **headers: str) -> Reply:
    """An orderly answer; `Content_Length="3"` replaces the true one."""
    named = {"Content-Length": str(len(body))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return raw(head(status, **named) + body)


def redirect(location: str, status: int = 302) -> Reply:
    return raw(head(status, Content_Length="0", Location=location))


def raw(data: bytes) -> Reply:
    """Sends exactly this and closes."""
    return lambda talk: talk.send(data)


def then_silence(data: bytes = b"") -> Reply:
    """Sends this and goes on holding the connection."""

    def reply(talk: Talk) -> None:
        talk.send(data)
        for _ in talk.beats():
            pass

    return reply


def dripping(start: bytes, slow: bytes) -> Reply:
    """Sends `start` at once and `slow` byte by byte, again and again."""

    def reply(talk: Talk) -> None:
        talk.send(start)
        for index, _ in enumerate(talk.beats()):
            talk.send(slow[index % len(slow)].to_bytes())

    return reply


def flooding(start: bytes, block: bytes) -> Reply:
    """Sends `start`, and `block` for ever as fast as it can."""

    def reply(talk: Talk) -> None:
        talk.send(start)
        while not talk.stopped.is_set():
            talk.send(block)

    return reply


def head(status: int, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Some Words"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass")


# --- who is called ----------------------------------------------------------------------------


class Canary:
    """Listens on every loopback address that there is, at one port, and never answers."""

    def __enter__(self) -> Self:
        self._listeners = [socket.create_server(("127.0.0.1", 0), backlog=128)]
        self.port = int(self._listeners[0].getsockname()[1])
        with contextlib.suppress(OSError):  # no IPv6 on this machine, or the port is taken there
            self._listeners.append(
                socket.create_server(("::1", self.port), family=socket.AF_INET6, backlog=128)
            )
        for listener in self._listeners:
            listener.setblocking(False)
        return self

    def __exit__(self, *_exc: object) -> None:
        for listener in self._listeners:
            listener.close()

    def calls(self) -> int:
        """Connections since it was last asked. A connection is here before its maker goes on."""
        count = 0
        for listener in self._listeners:
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    count += 1
        return count


class FullListener:
    """Listens, and its queue is full: a connection to it begins and never comes to be."""

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port = int(listener.getsockname()[1])
        self._sockets = [listener]
        while self._is_taken():
            assert len(self._sockets) < 100, "a queue that never fills"
        return self

    def __exit__(self, *_exc: object) -> None:
        for one in self._sockets:
            one.close()

    def _is_taken(self) -> bool:
        connection = begin_connection("127.0.0.1", self.port)
        self._sockets.append(connection)
        poll = select.poll()
        poll.register(connection, select.POLLOUT)
        return bool(poll.poll(200))


class Network:
    """The Internet of a test. `routes` says which port of this machine an address is; loopback is
    itself; nothing else is there."""

    def __init__(self, routes: dict[str, int] | None = None):
        self.routes = routes or {}
        self.dialled: list[str] = []

    def __call__(self, address: str, port: int) -> socket.socket:
        self.dialled.append(address)
        if address in self.routes:
            return begin_connection("127.0.0.1", self.routes[address])
        if address.startswith("127.") or address in ("::1", "0.0.0.0", "::"):
            return begin_connection(address, port)
        raise OSError(errno.EHOSTUNREACH, "nobody is there")


def closed_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])

"""A TCP proxy that cuts a connection after so many bytes, for tests of what comes after a cut."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

BLOCK_BYTES = 64 << 10
# SO_LINGER on, for 0 s: close() sends a reset instead of an orderly end.
RESET = struct.pack("ii", 1, 0)


@dataclass
class CuttingProxy:
    """Passes connections on to `upstream`. Its own threads count; a test reads between requests.

    Both limits count over all connections since `cut`, and each cuts one connection only.
    """

    upstream: tuple[str, int]
    url: str = ""
    sent: list[int] = field(default_factory=list)  # bytes to the server, one number a connection
    received: list[int] = field(default_factory=list)  # bytes from it, likewise
    _request_left: int | None = None
    _response_left: int | None = None

    def cut(self, *, request_after: int | None = None, response_after: int | None = None) -> None:
        """Reset the connection that brings the byte after so many; begins to count anew."""
        self.sent.clear()
        self.received.clear()
        self._request_left, self._response_left = request_after, response_after

    def serve_one(self, client: socket.socket) -> None:
        number = len(self.sent)
        self.sent.append(0)
        self.received.append(0)
        with client, contextlib.suppress(OSError):
            if self._request_left == 0:
                self._request_left = None
                _reset(client)
                return
            with socket.create_connection(self.upstream) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pass(client, server, number)

    def _pass(self, client: socket.socket, server: socket.socket, number: int) -> None:
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(BLOCK_BYTES)
                if not data:
                    return
                if ready is client:
                    data, cut = _until(data, self._request_left)
                    self.sent[number] += len(data)
                    if self._request_left is not None:
                        self._request_left = None if cut else self._request_left - len(data)
                    server.sendall(data)
                else:
                    data, cut = _until(data, self._response_left)
                    self.received[number] += len(data)
                    if self._response_left is not None:
                        self._response_left = None if cut else self._response_left - len(data)
                    client.sendall(data)
                if cut:
                    _reset(client)
                    _reset(server)
                    return


def _until(data: bytes, left: int | None) -> tuple[bytes, bool]:
    """What may still pass, and whether the connection is cut after it."""
    return (data, False) if left is None or len(data) < left else (data[:left], True)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


@contextlib.contextmanager
def cutting_proxy(url: str) -> Iterator[CuttingProxy]:
    """A proxy before the server at `url`; its own address is in `.url`."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    proxy = CuttingProxy((parts.hostname, parts.port))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        proxy.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threads: list[threading.Thread] = []
        ended = threading.Event()

        def accept() -> None:
            while True:
                client, _ = listener.accept()
                if ended.is_set():
                    client.close()
                    return
                threads[:] = [one for one in threads if one.is_alive()]
                threads.append(threading.Thread(target=proxy.serve_one, args=(client,)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield proxy
        finally:
            ended.set()
            socket.create_connection(listener.getsockname()).close()
            accepting.join()
            for thread in threads:
                thread.join()

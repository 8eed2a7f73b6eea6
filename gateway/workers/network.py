"""Connections to addresses that were checked, and reads that end with their deadline.

httpx has no hook for either, but httpcore, which it does its requests with, lets a program supply
the network. A client's timeout is for each read: a worker that sends a byte a second would hold a
thread for ever. So every read and write is also bounded by the deadline of the call that the
thread is in.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpcore
import httpx

from gateway.network.addresses import Resolver, look_up, system_addresses
from gateway.workers.urls import AddressPolicy

# Monotonic; of the call that this thread makes now.
_deadline: ContextVar[float] = ContextVar("deadline")

# Below the 75 s for which a worker keeps an idle connection (configs/gunicorn.conf.py), so that a
# request is not sent into one that is just being closed.
KEEP_ALIVE_S = 30.0


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Bound every read and write of this thread by `deadline` (monotonic seconds)."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


class CheckedNetwork(httpcore.NetworkBackend):
    """Looks names up once and connects to nothing that was not checked. Any thread."""

    def __init__(
        self,
        policy: AddressPolicy,
        resolve: Resolver = system_addresses,
        network: httpcore.NetworkBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._policy = policy
        self._resolve = resolve
        self._network = network or httpcore.SyncBackend()
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raises Invalid for an address that is refused, httpcore.ConnectError or ConnectTimeout.

        timeout: seconds for looking up and for trying every address together.
        """
        within_s = left_s(self._clock(), timeout)
        ends = self._clock() + within_s
        addresses = self.addresses(host, port, within_s)
        failure: Exception = httpcore.ConnectTimeout("no time was left to connect")
        for address in addresses:
            within_s = ends - self._clock()
            if within_s <= 0:
                break
            try:
                stream = self._network.connect_tcp(
                    address, port, within_s, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
                continue
            return _BoundedStream(stream, self._clock)
        raise failure

    def addresses(self, host: str, port: int, within_s: float) -> tuple[str, ...]:
        """Every address of a host, all of which may be connected to. Raises as `connect_tcp`."""
        try:
            found = look_up(host, port, within_s, self._resolve)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout("the name was not found in time") from exc
        except OSError as exc:
            raise httpcore.ConnectError("the name cannot be found") from exc
        return self._policy.check(host, port, found)


class _BoundedStream(httpcore.NetworkStream):
    """A connection whose reads and writes end with the deadline of the calling thread."""

    def __init__(self, stream: httpcore.NetworkStream, clock: Callable[[], float]):
        self._stream = stream
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        within_s = left_s(self._clock(), timeout)
        if within_s <= 0:
            raise httpcore.ReadTimeout("the deadline is over")
        return self._stream.read(max_bytes, within_s)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        within_s = left_s(self._clock(), timeout)
        if within_s <= 0:
            raise httpcore.WriteTimeout("the deadline is over")
        self._stream.write(buffer, within_s)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        within_s = max(0.001, left_s(self._clock(), timeout))
        return _BoundedStream(
            self._stream.start_tls(ssl_context, server_hostname, within_s), self._clock
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class CheckedTransport(httpx.BaseTransport):
    """httpx over `CheckedNetwork`. Errors are httpcore's, as they come. Any thread."""

    def __init__(self, network: httpcore.NetworkBackend, *, max_connections: int):
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context(),
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=KEEP_ALIVE_S,
            network_backend=network,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._pool.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(answer),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response):
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


def left_s(now: float, timeout: float | None) -> float:
    """Seconds until the deadline of this thread's call, at most `timeout`."""
    ends = _deadline.get(None)
    if ends is None:
        return 60.0 if timeout is None else timeout
    return ends - now if timeout is None else min(timeout, ends - now)

"""An HTTP client for URLs that somebody else chose. It connects to what was checked.

The name stays in the URL, so the Host header, TLS's server name and the certificate check are of
the name; only the connection itself goes to the addresses of `Addresses.check`. A name that leads
elsewhere a moment later changes nothing. There are no proxies, no kept connections (one to an
address was verified for one name only) and no unpacking of compressed answers.

httpcore is what httpx does its requests with. It is used directly because it lets a program supply
the network: the addresses, a deadline that holds for every single read, which httpx's timeouts do
not have (a server that sends one byte of its headers a second would be waited for all day), and an
end at once, wherever it waits, when nobody wants the answer any more.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar
from urllib.parse import urljoin

import httpcore

from worker.errors import Cancelled, ReferenceRefused, ReferenceTooLarge, ReferenceUnavailable
from worker.storage.addresses import (
    LOOK_EVERY_S,
    RETRY_AFTER_S,
    Addresses,
    ShouldStop,
    Target,
    has_scheme,
    is_plain,
    never,
    shown_host,
)

MAX_REDIRECTS = 5
MAX_ANSWER_BYTES = 64 << 10  # of an answer that is not a file: an error's text, a webhook's thanks
CONNECT_S = 5.0  # for one address, if there is another to try
USER_AGENT = "verbatim"  # some hosts refuse a request without one

# Address and port in; a connection that has begun, and is not waited for. Raises OSError.
Dial = Callable[[str, int], socket.socket]
T = TypeVar("T")

# What TLS waits for may be the other way than the step that it is asked to do.
_EVENTS: Mapping[type[OSError], int] = {
    ssl.SSLWantReadError: select.POLLIN,
    ssl.SSLWantWriteError: select.POLLOUT,
}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Ours to set, or of no meaning in a request like these.
_NOT_THE_CALLERS = frozenset(
    {"host", "accept-encoding", "connection", "content-length", "transfer-encoding", "expect"}
)
_FOR_ANYBODY = frozenset({"accept", "user-agent"})  # no key is in these


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  # names in lower case
    body: bytes = field(repr=False)  # as it was sent, never unpacked
    is_whole: bool = True  # False: there is more than the limit, or it broke off


class PinnedHttp:
    """GET and POST to places that `addresses` agrees to. Never changes; any thread."""

    def __init__(
        self,
        addresses: Addresses,
        verify: ssl.SSLContext | None = None,
        dial: Dial | None = None,
    ):
        """verify: whose certificates count; by default those that certifi and the system trust."""
        self._addresses = addresses
        self._verify = verify or httpcore.default_ssl_context()
        self._dial = dial or begin_connection

    def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        max_bytes: int,
        total_timeout_s: float,
        should_stop: ShouldStop = never,
    ) -> Answer:
        """The answer after at most 5 redirects, each of which is checked as `url` is.

        headers: not sent on to another origin, but for Accept. max_bytes: of the body of a 2xx;
        of any other status at most 64 KiB are read. total_timeout_s: from here to the last byte.
        should_stop: asked every LOOK_EVERY_S; once it is true nothing is waited for any more.
        Raises ReferenceRefused, ReferenceTooLarge, ReferenceUnavailable, Cancelled.
        """
        patience = _Patience(total_timeout_s, should_stop)
        target = self._addresses.check(url, patience.total_s, should_stop)
        for _ in range(MAX_REDIRECTS + 1):
            with self._open("GET", target, headers, None, patience) as response:
                location = _location(response)
                if location is None:
                    return _file(response, target, max_bytes)
            there = _joined(target, location)
            following = self._addresses.check(there, patience.left_s(), should_stop)
            if target.scheme == "https" and following.scheme == "http":
                raise ReferenceRefused(f"{shown_host(target.host)} redirects from https to http")
            if following.origin != target.origin:
                headers = {k: v for k, v in headers.items() if k.lower() in _FOR_ANYBODY}
            target = following
        raise ReferenceRefused(f"there are more than {MAX_REDIRECTS} redirects")

    def post(
        self, url: str, *, headers: Mapping[str, str], content: bytes, total_timeout_s: float
    ) -> Answer:
        """The answer, whatever its status; a redirect is one, and is not followed.

        Once the status is here the message is delivered, so a body that breaks off is no error.
        Raises ReferenceRefused, ReferenceUnavailable.
        """
        patience = _Patience(total_timeout_s, never)
        target = self._addresses.check(url, patience.total_s)
        with self._open("POST", target, headers, content, patience) as response:
            return _first_bytes(response)

    @contextmanager
    def _open(
        self,
        method: str,
        target: Target,
        headers: Mapping[str, str],
        content: bytes | None,
        patience: _Patience,
    ) -> Iterator[httpcore.Response]:
        """An answer whose status and headers are here; errors of the network as our own."""
        who = shown_host(target.host)
        url = httpcore.URL(
            scheme=target.scheme,
            host=target.host,
            port=target.port,
            target=target.path_and_query,
        )
        connection = httpcore.HTTPConnection(
            url.origin,
            ssl_context=self._verify,
            network_backend=_Pinned(self._dial, target.addresses, patience),
        )
        try:
            with connection, connection.stream(
                method, url, headers=_headers(target, headers), content=content
            ) as response:  # fmt: skip
                yield response
        except httpcore.TimeoutException as exc:
            raise ReferenceUnavailable(
                f"{who} did not answer completely within {patience.total_s:g} s",
                retry_after_s=RETRY_AFTER_S,
            ) from exc
        except httpcore.LocalProtocolError:
            # Its text quotes the header, which may be a key.
            raise ReferenceRefused(
                f"a header for {who} has a character that HTTP does not allow"
            ) from None
        except (httpcore.NetworkError, httpcore.RemoteProtocolError) as exc:
            if isinstance(exc.__cause__, ssl.SSLCertVerificationError):
                raise ReferenceRefused(f"the certificate of {who} is not valid for it") from exc
            raise ReferenceUnavailable(
                f"{who} cannot be reached, or broke off its answer", retry_after_s=RETRY_AFTER_S
            ) from exc


def begin_connection(address: str, port: int) -> socket.socket:
    """A TCP connection that is not waited for. address: no name. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = connection.connect_ex((address, port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except BaseException:
        connection.close()
        raise
    return connection


def connect_s(left_s: float, behind: int) -> float:
    """How long one address may be tried, with so many addresses behind it. Pure."""
    return min(CONNECT_S, left_s / (behind + 1)) if behind else left_s


class _Patience:
    """How long an answer is waited for: until a moment, and as long as somebody wants it."""

    def __init__(self, total_s: float, should_stop: ShouldStop):
        self.total_s = total_s
        self._should_stop = should_stop
        self._ends = time.monotonic() + total_s

    def left_s(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def for_at_most(self, seconds: float) -> Self:
        """Less of it, beginning now."""
        return type(self)(min(seconds, self.left_s()), self._should_stop)

    def check(self, late: type[httpcore.TimeoutException]) -> None:
        """Raises `late` when there is no time left, Cancelled when nobody waits any more."""
        if self._should_stop():
            raise Cancelled("nobody waits for this any more")
        if self.left_s() <= 0:
            raise late(f"{self.total_s:g} s are over")

    def until_ready(
        self, connection: socket.socket, events: int, late: type[httpcore.TimeoutException]
    ) -> None:
        """Wait for one of `events` of poll(2). Raises as `check`."""
        poll = select.poll()
        poll.register(connection, events)
        self.check(late)
        while not poll.poll(min(LOOK_EVERY_S, self.left_s()) * 1000):
            self.check(late)


class _Pinned(httpcore.NetworkBackend):
    """Connects to given addresses, whatever host is asked for."""

    def __init__(self, dial: Dial, addresses: tuple[str, ...], patience: _Patience):
        self._dial = dial
        self._addresses = addresses
        self._patience = patience

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """The first address that accepts. Each but the last leaves time for those behind it."""
        *others, last = self._addresses
        for index, address in enumerate(others):
            seconds = connect_s(self._patience.left_s(), len(others) - index)
            try:
                return self._connect(address, port, self._patience.for_at_most(seconds))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the last one's failure is told
        return self._connect(last, port, self._patience)

    def _connect(self, address: str, port: int, patience: _Patience) -> httpcore.NetworkStream:
        patience.check(httpcore.ConnectTimeout)
        try:
            connection = self._dial(address, port)
        except OSError as exc:
            raise httpcore.ConnectError(str(exc)) from exc
        try:
            patience.until_ready(connection, select.POLLOUT, httpcore.ConnectTimeout)
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise httpcore.ConnectError(os.strerror(code))
        except BaseException:
            connection.close()
            raise
        return _Stream(connection, self._patience)


class _Stream(httpcore.NetworkStream):
    """A connection on which no step outlasts the patience, however many there are.

    Its socket never blocks, with TLS or without: it is waited for in one place.
    """

    def __init__(self, connection: socket.socket, patience: _Patience):
        self._socket = connection
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        step = partial(self._socket.recv, max_bytes)
        return self._done(step, select.POLLIN, httpcore.ReadTimeout, httpcore.ReadError)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        left = memoryview(buffer)
        while left:
            step = partial(self._socket.send, left)
            sent = self._done(step, select.POLLOUT, httpcore.WriteTimeout, httpcore.WriteError)
            left = left[sent:]

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        try:
            secure = ssl_context.wrap_socket(
                self._socket, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            self._socket = secure  # of the one before it nothing is left
            self._done(
                secure.do_handshake, select.POLLIN, httpcore.ConnectTimeout, httpcore.ConnectError
            )
        except BaseException:
            self.close()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        """Nothing: httpcore asks whether another version of HTTP was agreed on."""
        return None

    def _done(
        self,
        step: Callable[[], T],
        events: int,
        late: type[httpcore.TimeoutException],
        broken: type[httpcore.NetworkError],
    ) -> T:
        """What `step` returns, once the socket is ready for it. events: that a socket without TLS
        waits for."""
        while True:
            self._patience.check(late)  # also of a server that always has something to read
            try:
                return step()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                wanted = _EVENTS.get(type(exc), events)
            except OSError as exc:
                raise broken(str(exc)) from exc
            self._patience.until_ready(self._socket, wanted, late)


def _headers(target: Target, given: Mapping[str, str]) -> list[tuple[str, str]]:
    own = {
        "Host": target.host_header,
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    if not any(name.lower() == "user-agent" for name in given):
        own["User-Agent"] = USER_AGENT
    kept = {k: v for k, v in given.items() if k.lower() not in _NOT_THE_CALLERS}
    return [*own.items(), *kept.items()]


def _answered(response: httpcore.Response) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode("ascii").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _location(response: httpcore.Response) -> str | None:
    """Where a redirect leads; None if the answer is not one."""
    if response.status not in _REDIRECTS:
        return None
    for name, value in response.headers:
        if name.lower() == b"location":
            return value.decode("utf-8", "surrogateescape")  # not plain, if it is not UTF-8
    return None


def _joined(target: Target, location: str) -> str:
    # urljoin drops control characters, and takes http:///x for a path of this host where others
    # see a host x; so it gets neither.
    if has_scheme(location):
        return location
    if is_plain(location):
        with suppress(ValueError):
            return urljoin(target.url, location)
    raise ReferenceRefused(f"{shown_host(target.host)} redirects to what is not a URL")


def _file(response: httpcore.Response, target: Target, max_bytes: int) -> Answer:
    """The answer to a GET, whole."""
    if not 200 <= response.status < 300:
        return _first_bytes(response)
    headers, who = _answered(response), shown_host(target.host)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ReferenceRefused(f"{who} compresses its answer, although it was asked not to")
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise ReferenceTooLarge(f"{who} announces {announced} bytes; at most {max_bytes}")
    body = bytearray()
    for block in response.iter_stream():
        body += block
        if len(body) > max_bytes:
            raise ReferenceTooLarge(f"{who} sends more than {max_bytes} bytes")
    return Answer(response.status, headers, bytes(body))


def _first_bytes(response: httpcore.Response) -> Answer:
    """Any answer, with as much of its body as may be wanted and comes."""
    headers, body = _answered(response), bytearray()
    is_whole = True
    try:
        for block in response.iter_stream():
            body += block
            if len(body) > MAX_ANSWER_BYTES:
                is_whole = False
                break
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.RemoteProtocolError):
        is_whole = False
    return Answer(response.status, headers, bytes(body[:MAX_ANSWER_BYTES]), is_whole)

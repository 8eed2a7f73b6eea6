"""An HTTP client for URLs that somebody else chose. It connects to what was checked.

The name stays in the URL, so the Host header, TLS's server name and the certificate check are of
the name; only the connection itself goes to the addresses of `Addresses.check`. A name that leads
elsewhere a moment later changes nothing. There are no proxies, no kept connections (one to an
address was verified for one name only) and no unpacking of compressed answers.

httpcore is what httpx does its requests with. It is used directly because it lets a program supply
the network: the addresses, and a deadline that holds for every single read, which httpx's timeouts
do not have (a server that sends one byte of its headers a second would be waited for all day).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin

import httpcore

from worker.errors import ReferenceRefused, ReferenceTooLarge, ReferenceUnavailable
from worker.storage.addresses import (
    RETRY_AFTER_S,
    Addresses,
    Target,
    has_scheme,
    is_plain,
    shown_host,
)

MAX_REDIRECTS = 5
MAX_ANSWER_BYTES = 64 << 10  # of an answer that is not a file: an error's text, a webhook's thanks
CONNECT_S = 5.0  # for one address, if there is another to try
USER_AGENT = "verbatim"  # some hosts refuse a request without one

_WRITE_BYTES = 16 << 10
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
        network: httpcore.NetworkBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """verify: whose certificates count; by default those that certifi and the system trust."""
        self._addresses = addresses
        self._verify = verify or httpcore.default_ssl_context()
        self._network = network or httpcore.SyncBackend()
        self._clock = clock

    def get(
        self, url: str, *, headers: Mapping[str, str], max_bytes: int, total_timeout_s: float
    ) -> Answer:
        """The answer after at most 5 redirects, each of which is checked as `url` is.

        headers: not sent on to another origin, but for Accept. max_bytes: of the body of a 2xx;
        of any other status at most 64 KiB are read. total_timeout_s: from here to the last byte.
        Raises ReferenceRefused, ReferenceTooLarge, ReferenceUnavailable.
        """
        deadline = _Deadline(total_timeout_s, self._clock)
        target = self._addresses.check(url, deadline.total_s)
        for _ in range(MAX_REDIRECTS + 1):
            with self._open("GET", target, headers, None, deadline) as response:
                location = _location(response)
                if location is None:
                    return _file(response, target, max_bytes)
            following = self._addresses.check(_joined(target, location), deadline.left_s())
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
        deadline = _Deadline(total_timeout_s, self._clock)
        target = self._addresses.check(url, deadline.total_s)
        with self._open("POST", target, headers, content, deadline) as response:
            return _first_bytes(response)

    @contextmanager
    def _open(
        self,
        method: str,
        target: Target,
        headers: Mapping[str, str],
        content: bytes | None,
        deadline: _Deadline,
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
            network_backend=_Pinned(self._network, target.addresses, deadline),
        )
        try:
            with connection, connection.stream(
                method, url, headers=_headers(target, headers), content=content
            ) as response:  # fmt: skip
                yield response
        except httpcore.TimeoutException as exc:
            raise ReferenceUnavailable(
                f"{who} did not answer completely within {deadline.total_s:g} s",
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


class _Deadline:
    """A moment, and how far away it is."""

    def __init__(self, total_s: float, clock: Callable[[], float]):
        self.total_s = total_s
        self._clock = clock
        self._at = clock() + total_s

    def left_s(self) -> float:
        return max(0.0, self._at - self._clock())

    def wait_s(self, late: type[httpcore.TimeoutException]) -> float:
        """How long the next step may take. Raises `late` if nothing is left."""
        left_s = self.left_s()
        if left_s <= 0:  # a socket takes 0 for "do not wait", which is another thing
            raise late(f"{self.total_s:g} s are over")
        return left_s


class _Pinned(httpcore.NetworkBackend):
    """Connects to given addresses, whatever host is asked for."""

    def __init__(
        self, network: httpcore.NetworkBackend, addresses: tuple[str, ...], deadline: _Deadline
    ):
        self._network = network
        self._addresses = addresses
        self._deadline = deadline

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
            left_s = self._deadline.wait_s(httpcore.ConnectTimeout)
            try:
                return self._connect(
                    address, port, min(CONNECT_S, left_s / (len(others) + 1 - index))
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the last one's failure is told
        return self._connect(last, port, self._deadline.wait_s(httpcore.ConnectTimeout))

    def _connect(self, address: str, port: int, timeout_s: float) -> httpcore.NetworkStream:
        stream = self._network.connect_tcp(address, port, timeout=timeout_s)
        return _Timed(stream, self._deadline)


class _Timed(httpcore.NetworkStream):
    """A connection on which no step lasts beyond the deadline, however many there are."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline):
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.wait_s(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # The stream below gives every piece that the system takes a new time limit.
        for start in range(0, len(buffer), _WRITE_BYTES):
            piece = buffer[start : start + _WRITE_BYTES]
            self._stream.write(piece, self._deadline.wait_s(httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        wait_s = self._deadline.wait_s(httpcore.ConnectTimeout)
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, wait_s), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


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

"""One HTTP exchange with a provider: bounded in time and bytes, to checked addresses, no redirects.

httpcore is what httpx does its requests with. It is used directly because it lets a program supply
the network: the addresses, and a deadline that holds over all reads. httpx's timeouts are for each
read, so a server that sends one byte a second would be waited for all day. It reads no proxy
settings, no netrc and no cookies.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpcore

from gateway.models import addresses
from gateway.models.faults import BROKEN, TIMEOUT, TOO_LARGE, UNREACHABLE, ProviderError
from gateway.network.addresses import Resolver, system_addresses

MAX_ERROR_BYTES = 64 << 10  # of the body of an answer that is not 2xx
CONNECT_S = 5.0  # for one address, if there is another to try
USER_AGENT = "verbatim-gateway"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server said, whole."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  # names in lower case
    body: bytes = field(repr=False)


class Exchange:
    """Sends requests. Never changes after it was made; any thread. Connections are not kept."""

    def __init__(
        self,
        *,
        private_allowed: bool = False,
        verify: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        resolve: Resolver = system_addresses,
    ):
        """private_allowed: http and private addresses too. verify: whose certificates count; by
        default those that certifi trusts. clock: monotonic seconds."""
        self._private_allowed = private_allowed
        self._verify = verify or httpcore.default_ssl_context()
        self._clock = clock
        self._resolve = resolve

    def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        content: bytes | None = None,
        deadline_s: float,
        max_bytes: int,
    ) -> Reply:
        """The answer, whatever its status; a redirect is one.

        deadline_s: from here to the last byte. max_bytes: of a 2xx's body; of another's at most
        64 KiB are read. Raises ProviderError.
        """
        target = addresses.read_url(url, self._private_allowed)
        deadline = _Deadline(deadline_s, self._clock)
        found = addresses.find(
            target.host.decode("ascii"),
            target.port or addresses.PORTS[target.scheme.decode("ascii")],
            private_allowed=self._private_allowed,
            within_s=max(0.0, deadline_s),
            resolve=self._resolve,
        )
        connection = httpcore.HTTPConnection(
            target.origin,
            ssl_context=self._verify,
            network_backend=_Pinned(httpcore.SyncBackend(), found, deadline),
        )
        sent = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": USER_AGENT}
        host = target.host.decode("ascii")
        bracketed = f"[{host}]" if ":" in host else host
        default = target.port == addresses.PORTS[target.scheme.decode("ascii")]
        sent["Host"] = bracketed if default else f"{bracketed}:{target.port}"
        try:
            with connection, connection.stream(
                method, target, headers=list({**sent, **headers}.items()), content=content
            ) as response:  # fmt: skip
                return _read(response, max_bytes)
        except httpcore.TimeoutException as exc:
            raise ProviderError(
                TIMEOUT, f"the provider did not answer completely within {deadline_s:.3g} s"
            ) from exc
        except httpcore.LocalProtocolError:
            # Its text quotes the header, which may be a key.
            raise ProviderError(
                BROKEN, "a header for the provider has a character that HTTP does not allow"
            ) from None
        except httpcore.RemoteProtocolError as exc:
            raise ProviderError(
                BROKEN, "the provider's answer is not whole, or is not HTTP"
            ) from exc
        except httpcore.NetworkError as exc:
            if isinstance(exc.__cause__, ssl.SSLCertVerificationError):
                raise ProviderError(
                    UNREACHABLE, "the provider's certificate is not valid for its name"
                ) from exc
            raise ProviderError(
                UNREACHABLE, "the provider cannot be reached, or broke off"
            ) from exc


def read_json(body: bytes) -> Any:
    """A JSON value of strict UTF-8, without numbers that JSON does not have.

    Raises ProviderError (broken).
    """

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise ProviderError(BROKEN, f"the provider's {len(body)} bytes are not JSON") from exc


class _Deadline:
    """A moment, and how far away it is."""

    def __init__(self, total_s: float, clock: Callable[[], float]):
        self._clock = clock
        self._at = clock() + total_s

    def wait_s(self, late: type[httpcore.TimeoutException]) -> float:
        """How long the next step may take. Raises `late` if nothing is left."""
        left_s = self._at - self._clock()
        if left_s <= 0:  # a socket takes 0 for "do not wait", which is another thing
            raise late("no time is left")
        return left_s


class _Pinned(httpcore.NetworkBackend):
    """Connects to given addresses, whatever host is asked for."""

    def __init__(
        self, network: httpcore.NetworkBackend, found: tuple[str, ...], deadline: _Deadline
    ):
        self._network = network
        self._found = found
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """The first address that accepts."""
        *others, last = self._found
        for index, address in enumerate(others):
            left_s = self._deadline.wait_s(httpcore.ConnectTimeout)
            wait_s = min(CONNECT_S, left_s / (len(others) + 1 - index))
            try:
                return self._connect(address, port, wait_s)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the last one's failure is told
        return self._connect(last, port, self._deadline.wait_s(httpcore.ConnectTimeout))

    def _connect(self, address: str, port: int, wait_s: float) -> httpcore.NetworkStream:
        stream = self._network.connect_tcp(address, port, timeout=wait_s)
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
        for start in range(0, len(buffer), 16 << 10):
            piece = buffer[start : start + (16 << 10)]
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


def _read(response: httpcore.Response, max_bytes: int) -> Reply:
    headers = {
        name.decode("ascii").lower(): value.decode("latin-1") for name, value in response.headers
    }
    is_good = 200 <= response.status < 300
    if is_good and headers.get("content-encoding", "identity").lower() != "identity":
        raise ProviderError(BROKEN, "the provider compresses its answer, although asked not to")
    body = bytearray()
    for block in response.iter_stream():
        body += block
        if is_good and len(body) > max_bytes:
            raise ProviderError(TOO_LARGE, f"the provider sends more than {max_bytes} bytes")
        if not is_good and len(body) > MAX_ERROR_BYTES:
            break
    return Reply(response.status, headers, bytes(body if is_good else body[:MAX_ERROR_BYTES]))

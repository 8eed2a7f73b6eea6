"""Which places may be talked to when somebody else chose the URL.

A picture's URL or a webhook must not make this machine talk to itself, to its neighbours, or to a
cloud's metadata service. So a URL is read strictly, once, by us; its name is looked up once; every
address found must be a public one; and whoever connects uses these addresses and looks nothing up
again (worker/storage/pinned.py).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread
from urllib.parse import quote

from worker.errors import (
    Cancelled,
    ConfigError,
    ReferenceRefused,
    ReferenceUnavailable,
    has_trap_word,
)

# Host and port in; every address of the host, as text, out. Raises OSError if there is none.
Resolver = Callable[[str, int], Iterable[str]]
# Whether what is waited for is not wanted any more.
ShouldStop = Callable[[], bool]

MAX_URL_CHARS = 8192  # a signed URL of the storage has some 500
LOOK_UP_S = 10.0
LOOK_EVERY_S = 0.1  # whether somebody still wants what is waited for
RETRY_AFTER_S = 5.0
PORTS = {"http": 80, "https": 443}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_REST = re.compile(r"//([^/?#]*)([^#]*)")
_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::([0-9]+))?")  # no %: a zone is of one machine
_PLAIN = re.compile(r"([^:\[\]]+)(?::([0-9]+))?")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# A last label like these makes a host an IPv4 address for many readers of URLs, in some spelling:
# 2130706433, 127.1, 0177.0.0.1, 0x7f.1 (url.spec.whatwg.org, "ends in a number"). No name has one.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# iana.org/assignments/iana-ipv4-special-registry, and multicast. Our own table, because Python's
# is_global changes its mind between patch releases.
_NOT_PUBLIC_V4 = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier NAT; a cloud has its metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # looks public, and is the host agent of every machine on Azure
        "169.254.0.0/16",  # link-local: cloud metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
# Global unicast is 2000::/3. All else is refused by that: ::, ::1, v4-mapped, v4-compatible,
# fc00::/7, fe80::/10, fec0::/10, ff00::/8, 64:ff9b:1::/48, 100::/64, 5f00::/16.
_UNICAST_V6 = ip_network("2000::/3")
# iana.org/assignments/iana-ipv6-special-registry, inside 2000::/3.
_NOT_PUBLIC_V6 = tuple(
    ip_network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
# An IPv6-only network reaches IPv4 through these; the last four bytes say whom.
_NAT64 = ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, read; from `Addresses.check`, with the addresses that may be connected to."""

    scheme: str  # http | https
    host: str  # lower case, no last dot; an IPv6 address without brackets
    port: int
    path_and_query: str = field(repr=False)  # printable ASCII; a signed URL's secret is in it
    addresses: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """The form of an allowed origin: scheme://host:port, the port always written."""
        return f"{self.scheme}://{self._bracketed}:{self.port}"

    @property
    def host_header(self) -> str:
        default = self.port == PORTS[self.scheme]
        return self._bracketed if default else f"{self._bracketed}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}{self.path_and_query}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def never() -> bool:
    """As `ShouldStop`, of what is wanted whatever happens."""
    return False


class Addresses:
    """Decides on URLs. Never changes after it was made; any thread."""

    def __init__(self, allowed_origins: frozenset[str], resolve: Resolver | None = None):
        """allowed_origins: scheme://host:port of places that the operator trusts, which may have
        private addresses. Only these exact ones: another port of the same host is another place.

        Raises ConfigError for one that is not an origin.
        """
        self._resolve = resolve or look_up
        try:
            self._allowed = frozenset(parse_url(origin).origin for origin in allowed_origins)
        except ReferenceRefused as exc:
            raise ConfigError(f"an allowed origin is not like https://host:port: {exc}") from exc

    def check(
        self, url: str, within_s: float = LOOK_UP_S, should_stop: ShouldStop = never
    ) -> Target:
        """`url` with its addresses, all of which may be connected to.

        within_s: for the look-up of the name. Raises ReferenceRefused, ReferenceUnavailable if
        the name cannot be looked up now, or Cancelled.
        """
        target = parse_url(url)
        addresses = self._addresses(target, within_s, should_stop)
        if target.origin not in self._allowed and not all(map(is_public, addresses)):
            raise ReferenceRefused(
                f"{shown_host(target.host)} has an address that is not a public one, and is not "
                "among the origins that the operator allows"
            )
        return replace(target, addresses=addresses)

    def _addresses(
        self, target: Target, within_s: float, should_stop: ShouldStop
    ) -> tuple[str, ...]:
        if _is_literal(target.host):
            return (target.host,)
        who = shown_host(target.host)
        looking: Future[tuple[str, ...]] = Future()

        def look() -> None:
            try:
                looking.set_result(tuple(self._resolve(target.host, target.port)))
            except BaseException as exc:
                looking.set_exception(exc)

        # The system's look-up takes no time limit and a name's owner may answer slowly, so it gets
        # a thread that is left behind when it takes too long.
        Thread(target=look, name="look-up", daemon=True).start()
        ends = time.monotonic() + within_s
        while not wait((looking,), min(LOOK_EVERY_S, ends - time.monotonic())).done:
            if should_stop():
                raise Cancelled("nobody waits for this any more")
            if time.monotonic() >= ends:
                raise ReferenceUnavailable(
                    f"the name of {who} was not found within {within_s:.3g} s",
                    retry_after_s=RETRY_AFTER_S,
                )
        try:
            addresses = looking.result()
        except OSError as exc:
            # Also for a name that does not exist: one of a container that is not up yet does not.
            raise ReferenceUnavailable(
                f"the name of {who} cannot be found", retry_after_s=RETRY_AFTER_S
            ) from exc
        if not addresses:
            raise ReferenceUnavailable(f"{who} has no address", retry_after_s=RETRY_AFTER_S)
        return addresses


def parse_url(url: str) -> Target:
    """Read an http or https URL, without looking anything up.

    Stricter than browsers: what two readers of URLs may understand differently is refused.
    Raises ReferenceRefused.
    """
    if len(url) > MAX_URL_CHARS:
        raise ReferenceRefused(f"the URL has {len(url)} characters; at most {MAX_URL_CHARS}")
    if not is_plain(url):
        raise ReferenceRefused("the URL has a space, a control character or a backslash in it")
    scheme = _SCHEME.match(url)
    name = scheme[1].lower() if scheme else ""
    if not scheme or name not in PORTS:
        raise ReferenceRefused("only http and https URLs are fetched")
    rest = _REST.match(url, scheme.end())
    if not rest or not rest[1]:
        raise ReferenceRefused("the URL has no host")
    authority, path = rest[1], rest[2]
    if "@" in authority:
        raise ReferenceRefused("the URL has a user name or password in it")
    pattern = _BRACKETED if authority.startswith("[") else _PLAIN
    found = pattern.fullmatch(authority)
    if not found:
        raise ReferenceRefused("the URL's host and port are not like host:443")
    port = PORTS[name] if found[2] is None else int(found[2][:6])
    if not 1 <= port <= 65535:
        raise ReferenceRefused("the URL's port is not within 1 to 65535")
    host = _address_v6(found[1]) if pattern is _BRACKETED else _host(found[1])
    return Target(name, host, port, _ascii(path if path.startswith("/") else f"/{path}"))


def has_scheme(text: str) -> bool:
    """Whether it is a whole URL rather than a path, whatever its scheme."""
    return _SCHEME.match(text) is not None


def is_plain(text: str) -> bool:
    """Whether there is nothing in it that some readers drop and others do not."""
    return text.isprintable() and " " not in text and "\\" not in text


def is_public(address: str) -> bool:
    """Whether an address, written as the system writes it, is of the public Internet: global
    unicast, and of no network with a special purpose."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed in _NAT64 and parsed.scope_id is None:
            parsed = IPv4Address(int(parsed) & 0xFFFFFFFF)
        else:
            special = any(parsed in network for network in _NOT_PUBLIC_V6)
            return parsed in _UNICAST_V6 and parsed.scope_id is None and not special
    return not any(parsed in network for network in _NOT_PUBLIC_V4)


def shown_host(host: str) -> str:
    """A host as an error may name it: some contain a word that a client misreads."""
    return "the host" if has_trap_word(host) else host


def look_up(host: str, port: int) -> list[str]:
    """Every address of a name, best first, as the system finds them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _host(text: str) -> str:
    host = text.lower().removesuffix(".")
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise ReferenceRefused(
            "the URL's host is not a name in ASCII; names in other scripts are written as xn--…"
        )
    if not _NUMBER.fullmatch(host.rpartition(".")[2]):
        return host
    try:
        return str(IPv4Address(host))
    except ValueError as exc:
        raise ReferenceRefused(
            "the URL's host is a number; an IPv4 address is written as four decimal numbers"
        ) from exc


def _address_v6(text: str) -> str:
    try:
        return str(IPv6Address(text))
    except ValueError as exc:
        raise ReferenceRefused("the URL's host in brackets is not an IPv6 address") from exc


def _is_literal(host: str) -> bool:
    return ":" in host or bool(_NUMBER.fullmatch(host.rpartition(".")[2]))


def _ascii(path: str) -> str:
    """As browsers send it: what is not ASCII as percent-encoded UTF-8, the rest as it is."""
    return "".join(char if char.isascii() else quote(char) for char in path)

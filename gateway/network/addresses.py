"""The one rule of which addresses are public, and the look-up of a name within a time limit.

Whoever registers a worker or edits a provider chooses the host, and a key is sent there. How a URL
is read, what is refused and with which error differs, and stays with those packages.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread

# Host and port in; every address of the host, as text, out. Raises OSError if there is none.
Resolver = Callable[[str, int], Iterable[str]]

# Not public, though `is_global` of some Python 3.11 patch releases says so, or because they carry
# another address inside (iana.org, special-purpose address registries).
_SPECIAL = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16/32",  # the host agent of every machine on Azure
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # protocol assignments, Teredo among them
        "2002::/16",  # 6to4: carries any IPv4 address
        "3fff::/20",  # documentation
    )
)
# An IPv6-only network reaches IPv4 through these; the last four bytes say whom.
_NAT64 = ip_network("64:ff9b::/96")
_UNICAST_V6 = ip_network("2000::/3")  # all else in IPv6 is local, mapped or reserved


def is_public(address: str) -> bool:
    """Whether an address, as the system writes it, is a host's on the public Internet."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed.scope_id is not None:
            return False
        if parsed in _NAT64:
            parsed = IPv4Address(int(parsed) & 0xFFFFFFFF)
        elif parsed not in _UNICAST_V6:
            return False
    special = any(parsed in network for network in _SPECIAL)
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved and not special


def system_addresses(host: str, port: int) -> list[str]:
    """Every address of a name, best first, as the system finds them, however long that takes.
    Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as exc:  # a part of the name is empty or longer than 63 characters
        raise OSError("it is not a name that the system can look up") from exc
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def look_up(
    host: str, port: int, within_s: float, resolve: Resolver = system_addresses
) -> tuple[str, ...]:
    """The addresses of `host`, in the order of `resolve`; of an address, itself.

    Raises TimeoutError after `within_s` seconds, OSError if the name cannot be found, and what
    else `resolve` raises. Nothing is checked here: see `is_public`.
    """
    if _is_address(host):
        return (host,)
    looking: Future[tuple[str, ...]] = Future()

    def look() -> None:
        try:
            looking.set_result(tuple(resolve(host, port)))
        except BaseException as exc:
            looking.set_exception(exc)

    # The system's look-up takes no time limit, and a name's owner may answer slowly, so it gets a
    # thread that is left behind when it takes too long.
    Thread(target=look, name="look-up", daemon=True).start()
    return looking.result(max(0.0, within_s))


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True

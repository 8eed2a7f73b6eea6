"""Which URLs a worker may have, and which addresses may be connected to for it.

Workers register themselves with a URL of their choice, and a key goes with what is sent there. So a
URL is read strictly; its name is looked up once for each connection; every address found has to be
a public one, unless the operator said otherwise; and who connects uses these addresses and looks
nothing up again (gateway/workers/network.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urlsplit

from gateway.errors import Invalid, InvalidRequest
from gateway.network.addresses import is_public

MAX_URL_CHARS = 2048
PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.(?!-)[a-z0-9_-]{1,63})*")
# A last label like these makes a host an IPv4 address for many readers of URLs, in some spelling:
# 2130706433, 127.1, 0x7f.1 (url.spec.whatwg.org, "ends in a number").
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class WorkerUrl:
    """A base URL, read and in one spelling, so that equal places have equal texts."""

    text: str  # scheme://host[:port][/path], no slash at the end; the port where not the default
    host: str  # lower case; an IPv6 address without brackets
    port: int

    @property
    def place(self) -> tuple[str, int]:
        return (self.host, self.port)


def parse_worker_url(text: object) -> WorkerUrl:
    """Read the base URL of a worker, without looking anything up. Raises InvalidRequest."""
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequest("worker_url must be an http or https URL")
    text = text.strip()
    if len(text) > MAX_URL_CHARS:
        raise InvalidRequest(f"worker_url has {len(text)} characters; at most {MAX_URL_CHARS}")
    if not text.isascii() or not text.isprintable() or re.search(r'[ \\"<>^`{|}]', text):
        raise InvalidRequest("worker_url has a character in it that no URL has")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise InvalidRequest("worker_url is no URL: its host or port cannot be read") from exc
    if parts.scheme not in PORTS or not parts.hostname:
        raise InvalidRequest("worker_url must be like https://host or http://host:7861")
    if "@" in parts.netloc:
        raise InvalidRequest("worker_url has a user name or password in it; keys are settings")
    if "?" in text or "#" in text:
        raise InvalidRequest("worker_url must be a base URL, without a query or a fragment")
    if port == 0 or parts.netloc.endswith(":"):
        raise InvalidRequest("worker_url's port is not within 1 to 65535")
    host = _host(parts.hostname)
    default = PORTS[parts.scheme]
    shown = f"[{host}]" if ":" in host else host
    shown += "" if port in (None, default) else f":{port}"
    path = parts.path.rstrip("/")
    if ".." in path or "%" in path:
        raise InvalidRequest("worker_url's path is not a plain one")
    return WorkerUrl(f"{parts.scheme}://{shown}{path}", host, port or default)


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Which addresses may be connected to. Immutable; any thread."""

    private_allowed: bool = False
    # (host, port) of the operator's own workers; another port of the same host is another place.
    trusted: frozenset[tuple[str, int]] = frozenset()

    def check(self, host: str, port: int, addresses: Iterable[str]) -> tuple[str, ...]:
        """The addresses, all of which may be connected to. Raises Invalid if one may not: a name
        with a public and a private address is refused as a whole."""
        found = tuple(addresses)
        if not found:
            raise Invalid("the worker's host has no address")
        if self.private_allowed or (host, port) in self.trusted:
            return found
        if not all(map(is_public, found)):
            raise Invalid(
                "the worker's address is not a public one; name it in chat_workers or "
                "media_workers of the profile, or set private_workers = true"
            )
        return found


def _host(text: str) -> str:
    if ":" in text:
        try:
            return str(IPv6Address(text)) if "%" not in text else _refuse()
        except ValueError as exc:
            raise InvalidRequest("worker_url's host in brackets is no IPv6 address") from exc
    host = text.lower().removesuffix(".")
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise InvalidRequest("worker_url's host is no name; other scripts are written as xn--…")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            return str(IPv4Address(host))
        except ValueError as exc:
            raise InvalidRequest(
                "worker_url's host is a number; an IPv4 address has four decimal numbers"
            ) from exc
    return host


def _refuse() -> str:
    raise InvalidRequest("worker_url's host is an address of one machine only (a zone)")

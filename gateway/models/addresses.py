"""Which places a provider's base URL may lead to.

Whoever edits the configuration chooses the URL, and a key is sent there. So it is https, with a
certificate that is valid for its name, at public addresses; private ones and http only where the
operator allowed them for the whole gateway.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import httpcore

from gateway.models.faults import ADDRESS, TIMEOUT, UNREACHABLE, ProviderError, shown
from gateway.network.addresses import Resolver, is_public, look_up

MAX_URL_CHARS = 2048
PORTS = {"http": 80, "https": 443}


def read_url(url: str, private_allowed: bool) -> httpcore.URL:
    """`url`, read strictly. Raises ProviderError (address)."""
    if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
        raise _refused(f"it is not at most {MAX_URL_CHARS} printable ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise _refused("its host or port cannot be read") from exc
    if parts.scheme not in PORTS:
        raise _refused("it does not begin with https://")
    if parts.scheme == "http" and not private_allowed:
        raise _refused("it begins with http://; use https://, or allow private addresses")
    if not parts.hostname or "@" in parts.netloc or "\\" in url or parts.fragment:
        raise _refused("it has no host, or has a user name, a backslash or a fragment")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return httpcore.URL(
        scheme=parts.scheme,
        host=parts.hostname,
        port=PORTS[parts.scheme] if port is None else port,
        target=target,
    )


def find(
    host: str, port: int, *, private_allowed: bool, within_s: float, resolve: Resolver
) -> tuple[str, ...]:
    """Addresses of `host` that may be connected to. Raises ProviderError."""
    try:
        addresses = look_up(host, port, within_s, resolve)
    except TimeoutError as exc:
        raise ProviderError(
            TIMEOUT, f"the name of {shown(host)} was not found within {within_s:.3g} s"
        ) from exc
    except OSError as exc:
        raise ProviderError(UNREACHABLE, f"the name of {shown(host)} cannot be found") from exc
    if not addresses:
        raise ProviderError(UNREACHABLE, f"{shown(host)} has no address")
    if not private_allowed and not all(map(is_public, addresses)):
        raise _refused(f"{shown(host)} has an address that is not a public one")
    return addresses


def _refused(why: str) -> ProviderError:
    return ProviderError(ADDRESS, f"the provider's base URL cannot be used: {why}")

"""The public keys of an identity provider, fetched from its JWKS URL and kept.

Only ES256 keys on P-256 and RS256 keys of 2048 bits or more are taken; all else in the set is left
out, secrets above all: a set that holds an `oct` key would let anyone who reads it sign.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from gateway.errors import StoreUnavailable

log = logging.getLogger(__name__)

ALGORITHMS = ("ES256", "RS256")
MIN_RSA_BITS = 2048
MAX_KEYS = 32
MAX_BYTES = 64 * 1024
FETCH_S = 5.0  # for the whole answer
REFRESH_S = 600.0  # a set of this age is read again, so that withdrawn keys go
UNKNOWN_S = 60.0  # least time between fetches, whatever ids are asked for
KEEP_S = 86_400.0  # a set that could not be read again for so long is used no more
MAX_ID_CHARS = 200

Fetch = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class PublicKey:
    algorithm: str
    key: EllipticCurvePublicKey | RSAPublicKey


class KeySet:
    """Keys by (id, algorithm). Any thread: the dict is replaced whole, under the lock, by one
    thread at a time; readers take the reference."""

    def __init__(self, url: str, fetch: Fetch) -> None:
        self._url = url
        self._fetch = fetch
        self._lock = threading.Lock()
        self._keys: Mapping[tuple[str, str], PublicKey] = {}
        self._read_at = float("-inf")
        self._tried_at = float("-inf")

    def find(self, key_id: str, algorithm: str, now: float) -> PublicKey | None:
        """The key; None where the set, read again if that is due, has none of this id and
        algorithm. Raises StoreUnavailable without a set that may be used. now: monotonic s."""
        key = self._keys.get((key_id, algorithm))
        if key is not None and now - self._read_at < REFRESH_S:
            return key
        # Whoever knows the key already does not wait for a fetch that another thread is at.
        if self._lock.acquire(blocking=key is None, timeout=FETCH_S + 1 if key is None else -1):
            try:
                self._refresh(key_id, algorithm, now)
            finally:
                self._lock.release()
        if now - self._read_at > KEEP_S:
            raise StoreUnavailable(
                "the keys that tokens are checked with cannot be read", retry_after_s=UNKNOWN_S
            )
        return self._keys.get((key_id, algorithm))

    def _refresh(self, key_id: str, algorithm: str, now: float) -> None:
        is_known = (key_id, algorithm) in self._keys  # by a thread that was before us
        if (is_known and now - self._read_at < REFRESH_S) or now - self._tried_at < UNKNOWN_S:
            return
        self._tried_at = now
        try:
            keys = parse_keys(self._fetch(self._url))
        except (httpx.HTTPError, ValueError) as exc:
            log.warning("the JWKS cannot be read, the last one counts: %s", type(exc).__name__)
            return
        self._keys, self._read_at = keys, now


def parse_keys(document: bytes) -> dict[tuple[str, str], PublicKey]:
    """The usable keys of a JWKS. Raises ValueError for what is no set, or has none."""
    try:
        parsed = json.loads(document)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
    listed = parsed.get("keys") if isinstance(parsed, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise ValueError(f"not a list of {MAX_KEYS} keys at most")
    found: dict[tuple[str, str], PublicKey] = {}
    for one in listed:
        key = _read_key(one)
        if key is not None:
            found.setdefault((one["kid"], key.algorithm), key)
    if not found:
        raise ValueError("no usable key")
    return found


def _read_key(one: Any) -> PublicKey | None:
    if not isinstance(one, dict) or not isinstance(one.get("kid"), str):
        return None
    algorithm = {"EC": "ES256", "RSA": "RS256"}.get(str(one.get("kty")))
    if algorithm is None or one.get("alg", algorithm) != algorithm:
        return None
    if len(one["kid"]) > MAX_ID_CHARS or one.get("use", "sig") != "sig" or "d" in one:
        return None
    try:
        key = jwt.PyJWK.from_dict(one, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        log.warning("a key of the JWKS cannot be read and is left out")
        return None
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return PublicKey(algorithm, key)
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return PublicKey(algorithm, key)
    return None


def fetch_jwks(
    url: str, clock: Callable[[], float], transport: httpx.BaseTransport | None = None
) -> bytes:
    """The body at the URL: 200 only, no redirects, MAX_BYTES and FETCH_S at most. Raises
    httpx.HTTPError or ValueError. clock: monotonic seconds, for the bound of the whole, since a
    read timeout alone lets a slow server drip for ever."""
    ends = clock() + FETCH_S
    body = bytearray()
    with (
        httpx.Client(transport=transport, timeout=FETCH_S, follow_redirects=False) as client,
        client.stream("GET", url, headers={"Accept": "application/json"}) as answer,
    ):
        if answer.status_code != 200:
            raise ValueError(f"status {answer.status_code}")
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > MAX_BYTES:
                raise ValueError(f"longer than {MAX_BYTES} bytes")
            if clock() > ends:
                raise ValueError(f"not read within {FETCH_S} s")
    return bytes(body)

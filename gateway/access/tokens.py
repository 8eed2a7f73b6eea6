"""Users' tokens in the form that Supabase issues: JWTs, signed with a secret or with a key of a
set. Which check applies follows from the algorithm, and each algorithm has its own kind of key, so
a public key is never used as a secret.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import jwt

from gateway.access.jwks import ALGORITHMS, MAX_ID_CHARS, KeySet, fetch_jwks
from gateway.access.users import parse_user_id
from gateway.config import Settings
from gateway.errors import ConfigError, Invalid, Unauthorized

log = logging.getLogger(__name__)

MAX_TOKEN_CHARS = 8192
MIN_SECRET_BYTES = 32  # RFC 7518, 3.2: as long as the hash
LEEWAY_S = 10.0
AUDIENCE = "authenticated"
ROLES = ("authenticated", "anon", "service_role")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says."""

    role: str  # one of ROLES
    user_id: str | None  # of role authenticated only


class TokenVerifier:
    """Checks tokens. Immutable but for the key set, which has its own lock."""

    def __init__(self, secret: str | None, keys: KeySet | None) -> None:
        if secret is not None and len(secret.encode()) < MIN_SECRET_BYTES:
            raise ConfigError(
                f"the JWT secret has {len(secret.encode())} bytes; HS256 needs {MIN_SECRET_BYTES}"
            )
        self._secret = secret
        self._keys = keys

    def verify(self, token: str, wall: datetime, now: float) -> Claims:
        """What the token says. Raises Unauthorized for one that does not hold. wall: the time that
        it is judged by; now: monotonic seconds, for the age of the key set."""
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized(f"a token has {MAX_TOKEN_CHARS} characters at most")
        try:
            header = jwt.get_unverified_header(token)
            algorithm, key = self._key_for(header, now)
            claims = jwt.decode(
                token,
                key=key,
                algorithms=[algorithm],
                # PyJWT would take the clock by itself; times are judged below, with `wall`.
                options={
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_aud": False,
                    "verify_sub": False,
                    "verify_jti": False,
                    "require": ["exp"],
                },
            )
        except (jwt.PyJWTError, ValueError, RecursionError) as exc:
            # The library's text may quote the token.
            log.info("a token was refused: %s", type(exc).__name__)
            raise Unauthorized("the token does not hold") from exc
        _check_times(claims, wall.astimezone(UTC).timestamp())
        return _read(claims)

    def _key_for(self, header: dict[str, Any], now: float) -> tuple[str, Any]:
        """The one algorithm that this token may be checked with, and the key of its kind. What the
        header says beside alg and kid (jku, jwk, x5u …) is never followed."""
        algorithm = header.get("alg")
        if "crit" in header or "b64" in header:
            raise Unauthorized("the token asks for an extension that is not understood")
        if algorithm == "HS256" and self._secret is not None:
            return "HS256", self._secret
        key_id = header.get("kid")
        if algorithm in ALGORITHMS and self._keys is not None:
            if not isinstance(key_id, str) or not 0 < len(key_id) <= MAX_ID_CHARS:
                raise Unauthorized("the token names no key")
            found = self._keys.find(key_id, algorithm, now)
            if found is not None:
                return found.algorithm, found.key
            raise Unauthorized("the token's key is not known")
        raise Unauthorized("tokens of this algorithm are not taken")


def verifier(settings: Settings, clock: Callable[[], float]) -> TokenVerifier | None:
    """By the environment; None where it names neither a secret nor a key set. Raises ConfigError.
    clock: monotonic seconds."""
    secret = settings.secret("GATEWAY_JWT_SECRET", "SUPABASE_JWT_SECRET")
    url = settings.secret("GATEWAY_JWKS_URL", "SUPABASE_JWKS_URL")
    if secret is None and url is None:
        return None
    if url is not None and not url.startswith(("https://", "http://")):
        raise ConfigError("the JWKS URL is not http or https")
    keys = KeySet(url, lambda place: fetch_jwks(place, clock)) if url is not None else None
    return TokenVerifier(secret, keys)


def _check_times(claims: dict[str, Any], wall_s: float) -> None:
    for name in ("exp", "nbf", "iat"):
        value = claims.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e12:
            raise Unauthorized(f"the token's {name} is no time")
    if wall_s >= claims["exp"] + LEEWAY_S:
        raise Unauthorized("the token has expired; sign in again")
    if wall_s < claims.get("nbf", 0) - LEEWAY_S:
        raise Unauthorized("the token is not valid yet")


def _read(claims: dict[str, Any]) -> Claims:
    role = claims.get("role")
    if role not in ROLES:
        raise Unauthorized("the token's role is not known")
    audience = claims.get("aud")
    if role != AUDIENCE:
        # The project's own keys of roles anon and service_role carry no audience.
        return Claims(cast(str, role), None)
    if AUDIENCE not in (audience if isinstance(audience, list) else [audience]):
        raise Unauthorized("the token is for another audience")
    try:
        return Claims(AUDIENCE, parse_user_id(str(claims.get("sub"))))
    except Invalid as exc:
        raise Unauthorized("the token names no user") from exc

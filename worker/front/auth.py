"""Who may call what. Keys are compared in constant time and never logged."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from enum import Enum

from worker.errors import Unauthorized


class Level(Enum):
    """What a route asks of its callers."""

    OPEN = "open"
    """Anybody: health and capabilities."""
    INFERENCE = "inference"
    """A key once any is configured, unless the profile allows keyless inference."""
    ADMIN = "admin"
    """A key once any is configured."""


# By blueprint; a route of any other blueprint needs a key.
LEVELS = {
    "health": Level.OPEN,
    "chat": Level.INFERENCE,
    "media": Level.INFERENCE,
    "status": Level.INFERENCE,
    "memory": Level.ADMIN,
    "debug": Level.ADMIN,
    "metrics": Level.ADMIN,
}


class Gate:
    """Decides about one header. Immutable."""

    def __init__(self, keys: Sequence[str], keyless_inference: bool):
        self._keys = tuple(key.encode() for key in keys)
        self._keyless_inference = keyless_inference

    def check(self, level: Level, authorization: str | None) -> None:
        """Raise Unauthorized unless a caller with this Authorization header may go on.

        With keys configured, a wrong key is refused for inference even where none is needed: its
        sender is mistaken about something, and would not notice otherwise. Open routes look at
        none: a prober with an old key must not take a healthy worker for dead.
        """
        if level is Level.OPEN or not self._keys:
            return
        if authorization is None:
            if level is Level.INFERENCE and self._keyless_inference:
                return
            raise Unauthorized("this route needs a key: send it as Authorization: Bearer KEY")
        scheme, _, given = authorization.partition(" ")
        # A WSGI header is its bytes as Latin-1. Every key is compared, so the time says nothing
        # about which one was near.
        given_bytes = given.strip().encode("latin-1", "backslashreplace")
        matches = [hmac.compare_digest(given_bytes, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("the key is wrong")

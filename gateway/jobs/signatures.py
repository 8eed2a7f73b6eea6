"""Signatures of callbacks: HMAC-SHA256 over exactly the bytes that came."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from gateway.errors import ConfigError, StoreUnavailable, Unauthorized

SECRET_FILE = "callback-secret"
MIN_CHARS = 32
_SCHEME = "sha256="


class Signatures:
    """Checks callbacks and makes the secrets that workers sign webhooks with. Immutable."""

    def __init__(self, own: str | None, shared: str | None):
        """own: known to nobody else; secrets of single jobs are derived from it, so a worker that
        learns one can sign for that job alone; None: it could not be kept, so no job is taken and
        no webhook. shared: JOB_CALLBACK_SECRET, which workers with a
        Supabase project sign all callbacks with; None: none is taken. Raises ConfigError for an
        `own` of less than MIN_CHARS."""
        if own is not None and len(own) < MIN_CHARS:
            raise ConfigError(
                f"the callbacks' secret has {len(own)} characters; {MIN_CHARS} are needed"
            )
        self._own = own.encode() if own is not None else None
        self._shared = shared.encode() if shared else None

    def secret_of(self, job_id: str) -> str:
        """What the worker of this job signs with. Raises StoreUnavailable."""
        if self._own is None:
            raise StoreUnavailable(
                "the callbacks' secret is not known: the state folder cannot be used; see the log"
            )
        return hmac.new(self._own, f"webhook:{job_id}".encode(), hashlib.sha256).hexdigest()

    def check_webhook(self, job_id: str, body: bytes, given: str) -> None:
        """Raises Unauthorized, StoreUnavailable."""
        _check(self.secret_of(job_id).encode(), body, given)

    def check_callback(self, body: bytes, given: str) -> None:
        """Raises Unauthorized; ConfigError where no JOB_CALLBACK_SECRET is set."""
        if self._shared is None:
            raise ConfigError("JOB_CALLBACK_SECRET is not set, so this signature cannot be checked")
        _check(self._shared, body, given)


def own_secret(state_dir: Path) -> str:
    """The gateway's own, made at the first start and kept. Raises ConfigError."""
    path = state_dir / SECRET_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
        found = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the callbacks' secret cannot be kept in {path}: {exc}") from exc
    if len(found) < MIN_CHARS:
        raise ConfigError(f"{path} does not hold a secret; remove it for a new one")
    return found


def _check(secret: bytes, body: bytes, given: str) -> None:
    expected = _SCHEME + hmac.new(secret, body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace")):
        raise Unauthorized("the callback's signature does not match its body")

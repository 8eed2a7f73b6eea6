"""API keys as rows: made, listed, revoked. The key itself is shown once and kept nowhere.

A key is `vgw_<prefix>_<secret>`: the prefix finds the row, the secret is 256 random bits. Only the
SHA-256 of the whole is stored; a slow hash would protect nothing, since such a secret cannot be
guessed from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, Row, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from gateway.access.caller import ALL_SCOPES, Scope, parse_scopes
from gateway.access.users import create_user
from gateway.errors import ConfigError, Conflict, Invalid, NotFound
from gateway.store.database import Database
from gateway.store.tables import api_keys, users

log = logging.getLogger(__name__)

MARK = "vgw_"
PREFIX_BYTES = 5
SECRET_BYTES = 32
USED_EVERY = timedelta(minutes=1)  # last_used_at is written so often at most
FIRST_KEY_NAME = "first admin key"
FIRST_KEY_FILE = "admin-key"
_FORM = re.compile(r"vgw_([0-9a-f]{10})_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A row of api_keys."""

    id: int
    name: str
    prefix: str
    key_hash: str = field(repr=False)
    scopes: frozenset[Scope]
    user_id: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_active(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def note_is_due(self, now: datetime) -> bool:
        return self.last_used_at is None or now - self.last_used_at >= USED_EVERY

    def opens_with(self, key: str) -> bool:
        """Whether this is the row of `key`; takes the same time whatever differs."""
        return hmac.compare_digest(self.key_hash, hash_of(key))


def prefix_of(key: str) -> str | None:
    """The part that finds the row; None for text that is not in the form of a key."""
    match = _FORM.fullmatch(key)
    return match[1] if match else None


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def create_key(
    connection: Connection,
    *,
    name: str,
    scopes: frozenset[Scope],
    now: datetime,
    user_id: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[Key, str]:
    """A new row and its key, which nothing can show again. Raises Conflict for a name that is
    taken, Invalid for a user that does not exist or an expiry that has passed."""
    if expires_at is not None and expires_at <= now:
        raise Invalid("expires_at has passed already")
    if user_id is not None and not connection.scalar(
        select(users.c.id).where(users.c.id == user_id)
    ):
        raise Invalid("there is no user with this user_id")
    prefix = secrets.token_hex(PREFIX_BYTES)
    while connection.scalar(select(api_keys.c.id).where(api_keys.c.prefix == prefix)):
        prefix = secrets.token_hex(PREFIX_BYTES)
    key = f"{MARK}{prefix}_{secrets.token_urlsafe(SECRET_BYTES)}"
    values = {
        "name": name,
        "prefix": prefix,
        "key_hash": hash_of(key),
        "scopes": sorted(scopes),
        "user_id": user_id,
        "created_at": now,
        "expires_at": expires_at,
    }
    try:
        row = connection.execute(insert(api_keys).values(values).returning(*api_keys.c)).one()
    except IntegrityError as exc:
        raise Conflict(
            f"a key named {name!r} exists; names are unique, also of revoked keys"
        ) from (exc)
    return read_key(row), key


def list_keys(connection: Connection, *, limit: int, after_id: int = 0) -> tuple[Key, ...]:
    """Keys by id, revoked ones too."""
    rows = connection.execute(
        select(api_keys).where(api_keys.c.id > after_id).order_by(api_keys.c.id).limit(limit)
    )
    return tuple(read_key(row) for row in rows)


def revoke_key(connection: Connection, key_id: int, now: datetime) -> Key:
    """Switch a key off for good. Raises NotFound, and Conflict for the last admin key that works:
    without one, nobody could make another over HTTP."""
    # Locked on PostgreSQL, so that two revocations cannot each take the other's key for the last.
    rows = connection.execute(select(api_keys).order_by(api_keys.c.id).with_for_update())
    keys = {one.id: one for one in map(read_key, rows)}
    if key_id not in keys:
        raise NotFound(f"there is no key {key_id}")
    key = keys[key_id]
    if key.revoked_at is not None:
        return key
    admins = [one.id for one in keys.values() if one.is_active(now) and Scope.ADMIN in one.scopes]
    if admins == [key_id]:
        raise Conflict("this is the last admin key; create another first, then revoke this one")
    row = connection.execute(
        update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(revoked_at=now)
        .returning(*api_keys.c)
    ).one()
    return read_key(row)


def find_key(connection: Connection, prefix: str) -> Key | None:
    """The row of a prefix; create_key sees to it that there is one at most."""
    row = connection.execute(select(api_keys).where(api_keys.c.prefix == prefix)).first()
    return None if row is None else read_key(row)


def note_use(connection: Connection, key: Key, now: datetime) -> None:
    """Write last_used_at, unless another process has done it within USED_EVERY."""
    due = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at <= now - USED_EVERY)
    connection.execute(
        update(api_keys).where(api_keys.c.id == key.id, due).values(last_used_at=now)
    )


def make_first_key(database: Database, state_dir: Path, now: datetime) -> Path | None:
    """Where there is no key at all: make one with every scope, and the user whose jobs and
    conversations it sees, and write it to a file that only its owner reads. Returns the file; None
    where keys exist. Raises ConfigError for a folder that cannot be written: then none is made."""
    path = state_dir / FIRST_KEY_FILE
    with database.transaction() as connection:
        if connection.scalar(select(api_keys.c.id).limit(1)) is not None:
            return None
        values = {"may_use_nsfw": True, "is_admin": True}
        try:
            user = create_user(connection, user_id=None, now=now, values=values)
            _, key = create_key(
                connection, name=FIRST_KEY_NAME, scopes=ALL_SCOPES, now=now, user_id=user.id
            )
        except Conflict:
            return None  # another process was first, and its file has the key
        # Before the commit: a key that nobody can read must not exist.
        _write_secret(path, key)
    log.info("the first admin key is in %s; make others with it, then revoke it", path)
    return path


def read_key(row: Row[tuple[object, ...]]) -> Key:
    values = dict(row._mapping)
    return Key(**{**values, "scopes": _known(values["scopes"])})


def _known(names: Sequence[str]) -> frozenset[Scope]:
    # A scope of a newer release gives nothing here, and the key's others still count.
    known = [name for name in names if name in list(Scope)]
    return parse_scopes(known) if known else frozenset()


def _write_secret(path: Path, secret: str) -> None:
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):  # it may never have been made
            scratch.unlink()
        raise ConfigError(f"{path} cannot be written: {exc.strerror}") from exc

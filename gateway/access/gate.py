"""From the headers of a request to its caller.

Wrong keys are not throttled by address: a secret of 256 bits is not found by trying, and behind a
proxy all callers share one address, so whoever sends wrong keys would lock out the others. They
are counted, and many of them are an alarm in the log.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from gateway.access.caller import Caller, Scope
from gateway.access.keys import MARK, Key, find_key, list_keys, note_use, prefix_of
from gateway.access.memory import MAX_ROWS, Memory
from gateway.access.tokens import TokenVerifier
from gateway.access.users import User, get_or_create_user, get_user
from gateway.errors import NotFound, StoreUnavailable, Unauthorized
from gateway.store.database import Database

log = logging.getLogger(__name__)

ALARM_AT = 30  # wrong keys of one address in ALARM_S
ALARM_S = 60.0
MAX_ADDRESSES = 1024
SERVICE_SCOPES = frozenset({Scope.CALL, Scope.WORKER})

SERVICE = Caller(kind="service", name="service", scopes=SERVICE_SCOPES, may_use_nsfw=True)
ANONYMOUS = Caller(kind="user", name="anon", scopes=frozenset())


class Gate:
    """Finds callers. Any thread; what it remembers is in Memory and WrongKeys, each with a lock."""

    def __init__(
        self,
        database: Database,
        service_keys: tuple[str, ...],
        tokens: TokenVerifier | None,
        wall: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        """wall: aware wall-clock time; clock: monotonic seconds."""
        self._database = database
        self._service_keys = tuple(key.encode() for key in service_keys)
        self._tokens = tokens
        self._wall = wall
        self._clock = clock
        self._keys: Memory[Key] = Memory("API keys")
        self._users: Memory[User] = Memory("users")
        self._wrong = WrongKeys()

    def identify(
        self, authorization: str | None, apikey: str | None, *, takes_basic: bool, address: str
    ) -> Caller | None:
        """Who sent these headers; None: they name nobody. Raises Unauthorized for what is wrong,
        StoreUnavailable where it cannot be known.

        With both headers Authorization counts: Supabase's clients send the project's public key as
        `apikey` beside the user's token.
        """
        if authorization is None and not apikey:
            return None
        try:
            given = (apikey or "") if authorization is None else _given(authorization, takes_basic)
            return self._caller(given)
        except Unauthorized:
            self._wrong.count(address, self._clock())
            raise

    def warm(self) -> None:
        """Read the keys that work, so that they are known should the database go away. Called once
        at the start; without a database it leaves a line in the log and nothing else."""
        wall, now = self._wall(), self._clock()
        try:
            with self._database.reading() as connection:
                found = list_keys(connection, limit=MAX_ROWS)
        except StoreUnavailable as exc:
            log.warning("keys are not known before the database answers: %s", exc)
            return
        for key in found:
            if key.is_active(wall):
                self._keys.put(key.prefix, key, now)

    def forget_key(self, prefix: str) -> None:
        """After an edit of a key: read it again. Other processes see it after memory.FRESH_S."""
        self._keys.forget(prefix)

    def forget_user(self, user_id: str) -> None:
        self._users.forget(user_id)

    def _caller(self, given: str) -> Caller:
        if given.startswith(MARK):
            return self._key_caller(given)
        # A WSGI header is its bytes as Latin-1. Every key is compared, so the time says nothing
        # about which one was near.
        given_bytes = given.encode("latin-1", "backslashreplace")
        if any([hmac.compare_digest(given_bytes, key) for key in self._service_keys]):
            return SERVICE
        if given.count(".") != 2 or self._tokens is None:
            raise Unauthorized("the key is wrong")
        return self._token_caller(given, self._tokens)

    def _key_caller(self, given: str) -> Caller:
        prefix = prefix_of(given)
        if prefix is None:
            raise Unauthorized("the key is wrong")
        now, wall = self._clock(), self._wall()
        key = self._keys.find(prefix, lambda: self._read_key(prefix), now)
        if key is None or not key.opens_with(given):
            raise Unauthorized("the key is wrong")
        if not key.is_active(wall):
            raise Unauthorized("the key has expired or was revoked")
        self._note_use(key, wall)
        user = None if key.user_id is None else self._user(key.user_id, may_create=False)
        return _of_key(key, user)

    def _token_caller(self, given: str, tokens: TokenVerifier) -> Caller:
        claims = tokens.verify(given, self._wall(), self._clock())
        if claims.role == "service_role":
            return SERVICE
        if claims.user_id is None:
            return ANONYMOUS
        return _of_user(self._user(claims.user_id, may_create=True))

    def _read_key(self, prefix: str) -> Key | None:
        with self._database.reading() as connection:
            return find_key(connection, prefix)

    def _user(self, user_id: str, *, may_create: bool) -> User:
        def read() -> User | None:
            try:
                with self._database.reading() as connection:
                    return get_user(connection, user_id)
            except NotFound:
                if not may_create:
                    return None
            with self._database.transaction() as connection:
                return get_or_create_user(connection, user_id, self._wall())

        user = self._users.find(user_id, read, self._clock())
        if user is None or not user.is_active:
            raise Unauthorized("this user is switched off")
        return user

    def _note_use(self, key: Key, wall: datetime) -> None:
        if not key.note_is_due(wall):
            return
        # First, so that one thread of those that come together writes, and none for a minute after
        # a failure: nothing depends on it, and the caller is known.
        self._keys.amend(key.prefix, replace(key, last_used_at=wall))
        try:
            with self._database.transaction() as connection:
                note_use(connection, key, wall)
        except StoreUnavailable as exc:
            log.warning("last_used_at of key %d is not written: %s", key.id, exc)


class WrongKeys:
    """Wrong keys by address, of the MAX_ADDRESSES that sent one last. Its lock owns the dict."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()  # since, how many

    def count(self, address: str, now: float) -> None:
        with self._lock:
            since, many = self._counts.pop(address, (now, 0))
            if now - since >= ALARM_S:
                since, many = now, 0
            self._counts[address] = (since, many + 1)
            if len(self._counts) > MAX_ADDRESSES:
                self._counts.popitem(last=False)
        if many + 1 == ALARM_AT:
            log.error("ALARM wrong_keys: %d from %s within %.0f s", ALARM_AT, address, ALARM_S)

    def __len__(self) -> int:
        return len(self._counts)


def _given(authorization: str, takes_basic: bool) -> str:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer" and given.strip():
        return given.strip()
    if takes_basic and scheme.lower() == "basic":
        try:
            pair = base64.b64decode(given.strip(), validate=True).decode("latin-1")
        except binascii.Error as exc:
            raise Unauthorized("the Authorization header cannot be read") from exc
        return pair.partition(":")[2]
    raise Unauthorized("send the key as Authorization: Bearer KEY")


def _of_user(user: User) -> Caller:
    scopes = frozenset({Scope.CALL, Scope.ADMIN} if user.is_admin else {Scope.CALL})
    return Caller(
        kind="user",
        name=user.id,
        scopes=scopes,
        user_id=user.id,
        tier=user.tier,
        may_use_nsfw=user.may_use_nsfw,
        content_mode=user.content_mode,
        is_admin=user.is_admin,
    )


def _of_key(key: Key, user: User | None) -> Caller:
    """A key of a user acts within what the user may see; one of nobody is a program, which decides
    about modes itself."""
    if user is None:
        return Caller(
            kind="key",
            name=key.name,
            scopes=key.scopes,
            may_use_nsfw=True,
            is_admin=Scope.ADMIN in key.scopes,
        )
    return Caller(
        kind="key",
        name=key.name,
        scopes=key.scopes,
        user_id=user.id,
        tier=user.tier,
        may_use_nsfw=user.may_use_nsfw,
        content_mode=user.content_mode,
        is_admin=Scope.ADMIN in key.scopes,
    )

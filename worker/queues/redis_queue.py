"""A queue on a Redis server, over a connection of its own."""

from __future__ import annotations

from typing import cast

import redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool, parse_url
from redis.retry import Retry

from worker.errors import ConfigError
from worker.queues.lists import ListQueue, Reply
from worker.queues.queue import RETRY_AFTER_S, QueueUnavailable, refused

SCHEMES = ("redis://", "rediss://", "unix://")
TIMEOUT_S = 5.0  # to connect, and then for each wait

_SERVER = "the Redis server"


class RedisQueue(ListQueue):
    """A JobQueue over the Redis protocol. Any thread; the library gives each its connection."""

    def __init__(self, url: str, name: str, worker: str, *, timeout_s: float = TIMEOUT_S):
        """url: redis://, rediss:// (the server's certificate is checked) or unix://, with the
        options of redis-py, such as `?ssl_ca_certs=FILE`. Nothing is opened yet.

        Raises ConfigError, without the address, because it may hold a password.
        """
        super().__init__(name, worker)
        self._timeout_s = timeout_s
        self._pool = _pool(url, timeout_s)
        self._client = redis.Redis(connection_pool=self._pool)

    def _run(self, *command: str | bytes | int) -> Reply:
        try:
            reply = self._client.execute_command(*command)  # type: ignore[no-untyped-call]
            return cast(Reply, reply)
        except redis.RedisError as exc:
            raise _unavailable(exc, self._timeout_s) from exc
        except UnicodeError as exc:  # a host that no name server could be asked for
            raise QueueUnavailable(f"{_SERVER} has an address that is no host name") from exc

    def close(self) -> None:
        self._client.close()
        self._pool.disconnect()


def _pool(url: str, timeout_s: float) -> ConnectionPool:
    if not url.startswith(SCHEMES):
        raise ConfigError(f"REDIS_URL must begin with {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}")
    ours = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # A command that was done and whose answer was lost must not be done twice. A connection
        # that the server closed meanwhile is noticed before a command is sent, and opened anew.
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "decode_responses": False,
        "protocol": 2,
    }
    try:
        theirs = parse_url(url)  # type: ignore[no-untyped-call]
        pool = ConnectionPool(**{**theirs, **ours})
        pool.connection_class(**pool.connection_kwargs)  # refuses options that it does not know
    except (ValueError, TypeError, redis.RedisError):
        raise ConfigError(
            "REDIS_URL cannot be read; write it as redis://[user:password@]host[:port][/database]"
        ) from None
    return pool


def _unavailable(exc: redis.RedisError, timeout_s: float) -> QueueUnavailable:
    text = f"{exc.status_code or ''} {exc}"
    if isinstance(exc, redis.TimeoutError):
        return QueueUnavailable(
            f"{_SERVER} did not answer within {timeout_s:g} s", retry_after_s=RETRY_AFTER_S
        )
    if isinstance(exc, redis.AuthenticationError) and exc.status_code != "NOAUTH":
        return refused(_SERVER, "WRONGPASS")  # older servers have no such word
    if isinstance(exc, redis.ConnectionError) and exc.status_code is None:
        cause = exc.__cause__ or exc.__context__
        kind = type(cause).__name__ if isinstance(cause, OSError) else "it closed the connection"
        return QueueUnavailable(f"{_SERVER} cannot be reached: {kind}", retry_after_s=RETRY_AFTER_S)
    if isinstance(exc, redis.InvalidResponse):
        return QueueUnavailable(f"{_SERVER} does not speak the protocol of Redis")
    return refused(_SERVER, text)

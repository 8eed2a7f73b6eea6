"""Lists that workers take jobs from: Redis, or Upstash over its REST interface.

An element is appended at the right, in the encoding of the producer whose place this takes: a JSON
array with one JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import httpx
import redis

from gateway.config import Settings
from gateway.errors import ConfigError, QueueUnavailable

TIMEOUT_S = 5.0
RETRY_AFTER_S = 5.0
REDIS_URL = "REDIS_URL"
REST_URL, REST_TOKEN = "UPSTASH_REDIS_REST_URL", "UPSTASH_REDIS_REST_TOKEN"


class JobQueue(Protocol):
    """Safe for threads."""

    def push(self, list_name: str, element: Mapping[str, Any]) -> int:
        """Append; returns the list's length. Raises QueueUnavailable: it may or may not be there,
        and the same element may be pushed again, since a worker joins jobs of one id."""

    def close(self) -> None: ...


def encode(element: Mapping[str, Any]) -> str:
    """The text of a list's element: `["{…}"]`."""
    return json.dumps([json.dumps(element, ensure_ascii=False)], ensure_ascii=False)


class RedisQueue:
    def __init__(self, url: str):
        """Opens nothing yet. Raises ConfigError for a URL that is none."""
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
            )
        except ValueError as exc:  # its text has the URL, which may have a password
            raise ConfigError(f"{REDIS_URL} is no redis://, rediss:// or unix:// URL") from exc

    def push(self, list_name: str, element: Mapping[str, Any]) -> int:
        try:
            length = self._client.rpush(list_name, encode(element))
        except redis.RedisError as exc:
            raise _unavailable(type(exc).__name__) from exc
        return int(length)

    def close(self) -> None:
        self._client.close()


class UpstashQueue:
    def __init__(self, url: str, token: str, transport: httpx.BaseTransport | None = None):
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    def push(self, list_name: str, element: Mapping[str, Any]) -> int:
        # The whole command as a JSON array; a path with a body would take the body as the element.
        command = ["RPUSH", list_name, encode(element)]
        try:
            answer = self._client.post("/", json=command)
            said = answer.json()
        except (httpx.HTTPError, ValueError) as exc:
            raise _unavailable(type(exc).__name__) from exc
        length = said.get("result") if isinstance(said, dict) else None
        if answer.status_code != 200 or type(length) is not int:
            raise _unavailable(f"status {answer.status_code}")
        return length

    def close(self) -> None:
        self._client.close()


def queue_of(settings: Settings) -> JobQueue | None:
    """The queue that the environment names; None where it names none, or the profile wants none.

    Raises ConfigError for half a setting, and for two servers: which one workers read is not
    known.
    """
    if not settings.section.queues:
        return None
    url = settings.secret(REDIS_URL)
    rest, token = settings.secret(REST_URL), settings.secret(REST_TOKEN)
    if bool(rest) != bool(token):
        raise ConfigError(f"a queue over Upstash needs {REST_URL} and {REST_TOKEN} to be set")
    choice = settings.secret("VERBATIM_QUEUE")
    if url and rest and choice not in ("redis", "upstash"):
        raise ConfigError(
            f"{REDIS_URL} and {REST_URL} name two servers; set VERBATIM_QUEUE to redis or upstash"
        )
    if rest and token and choice != "redis":
        return UpstashQueue(rest, token)
    return RedisQueue(url) if url and choice != "upstash" else None


def _unavailable(what: str) -> QueueUnavailable:
    return QueueUnavailable(
        f"the job queue did not take the job ({what}); send it again",
        retry_after_s=RETRY_AFTER_S,
    )

"""A queue on an Upstash database, over its REST interface.

A command is a JSON array, so elements go there as texts. Bytes that are not UTF-8 cannot be part
of JSON; the interface takes them only as the body of a request whose path is the command, which is
enough to remove such an element, give it back or bury it. Answers are asked for in base64, without
which the server would replace such bytes and no command would find the element again.
https://upstash.com/docs/redis/features/restapi
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any
from urllib.parse import quote

import httpx

from worker.errors import ConfigError
from worker.queues.lists import ListQueue, Reply
from worker.queues.queue import RETRY_AFTER_S, QueueUnavailable, refused

TIMEOUT_S = 10.0  # to connect, and then for each wait

_SERVER = "the Upstash server"


class UpstashQueue(ListQueue):
    """A JobQueue over HTTP. Any thread."""

    def __init__(
        self, url: str, token: str, name: str, worker: str, *, timeout_s: float = TIMEOUT_S
    ):
        """url: of the database's REST interface. Nothing is opened yet. Raises ConfigError."""
        super().__init__(name, worker)
        self._timeout_s = timeout_s
        self._client = httpx.Client(
            base_url=_checked_url(url),
            headers={
                "Authorization": f"Bearer {_checked_token(token)}",
                "Upstash-Encoding": "base64",
            },
            timeout=timeout_s,
            trust_env=False,  # a proxy of the environment would get the token
        )

    def _run(self, *command: str | bytes | int) -> Reply:
        try:
            answer = self._send(command)
        except httpx.TimeoutException as exc:
            raise QueueUnavailable(
                f"{_SERVER} did not answer within {self._timeout_s:g} s",
                retry_after_s=RETRY_AFTER_S,
            ) from exc
        except httpx.HTTPError as exc:
            raise QueueUnavailable(
                f"{_SERVER} cannot be reached: {type(exc).__name__}", retry_after_s=RETRY_AFTER_S
            ) from exc
        return _result(answer)

    def _send(self, command: tuple[str | bytes | int, ...]) -> httpx.Response:
        *words, last = command
        if isinstance(last, bytes) and not _is_text(last):
            path = "/".join(quote(str(word), safe="") for word in words)
            return self._client.post(f"/{path}", content=last)
        texts = [one.decode("utf-8") if isinstance(one, bytes) else one for one in command]
        return self._client.post("/", content=json.dumps(texts).encode("ascii"))

    def _bury(self, element: bytes, record: str) -> None:
        if _is_text(element):
            return super()._bury(element, record)
        # Beside the bytes only what fits into a path has room, and the record does not. A crash
        # between the two steps leaves the element here too, to be buried once more.
        self._run("RPUSH", self._dead, record)
        self._run("LREM", self._processing, 1, element)

    def close(self) -> None:
        self._client.close()


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("https", "http") or not parsed.host or parsed.userinfo:
        raise ConfigError("UPSTASH_REDIS_REST_URL must be an address such as https://HOST")
    return parsed


def _checked_token(token: str) -> str:
    if not token or not all("!" <= char <= "~" for char in token):
        raise ConfigError("UPSTASH_REDIS_REST_TOKEN must be of printable ASCII without spaces")
    return token


def _is_text(element: bytes) -> bool:
    try:
        element.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _result(answer: httpx.Response) -> Reply:
    try:
        body = answer.json()
    except ValueError:  # not JSON, or not UTF-8
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if answer.status_code == 401:
        raise refused(_SERVER, "WRONGPASS")
    if isinstance(error, str) and answer.status_code < 500:
        raise refused(_SERVER, error)
    if answer.status_code != 200 or not isinstance(body, dict) or "result" not in body:
        passing = answer.status_code == 429 or answer.status_code >= 500
        cure = "it may pass" if passing else "check UPSTASH_REDIS_REST_URL"
        raise QueueUnavailable(
            f"{_SERVER} gave no result but status {answer.status_code}; {cure}",
            retry_after_s=RETRY_AFTER_S if passing else None,
        )
    return _decoded(body["result"])


def _decoded(value: Any) -> Reply:
    if value is None or type(value) is int:
        return value
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if value == "OK":  # a status, which alone is not encoded
        return b"OK"
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, binascii.Error, ValueError):
        raise QueueUnavailable(f"{_SERVER} did not answer in base64 as it was asked to") from None

"""The Supabase project that jobs come from: where it is, with which keys, and one call of it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping

import httpx

from worker.errors import ConfigError
from worker.storage.configured import SERVICE_KEYS
from worker.storage.pinned import MAX_ANSWER_BYTES, Answer
from worker.storage.stores import check_address, check_secret

URL = "SUPABASE_URL"
CALLBACK_SECRET = "JOB_CALLBACK_SECRET"


class Service:
    """One project. Holds keys and connections and no other state; any thread."""

    def __init__(
        self,
        url: str,
        key: str,
        callback_secret: str | None = None,
        verify: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """key: the service key. callback_secret: what callbacks are signed with. verify: whose
        certificates count; by default those that certifi trusts.

        Raises ConfigError for an address or a key that cannot be one.
        """
        self._base = check_address("the address of Supabase", url)
        key = check_secret("the service key of Supabase", key)
        self.callback_secret = callback_secret
        self._clock = clock
        # The platform's gateway looks at either header, depending on what lies behind it.
        self._client = httpx.Client(
            headers={
                "Authorization": f"Bearer {key}",
                "apikey": key,
                "Accept-Encoding": "identity",
            },
            verify=verify or httpx.create_ssl_context(trust_env=False),
            trust_env=False,  # no proxy and no netrc: the key goes to this one host
            follow_redirects=False,
        )

    def close(self) -> None:
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Answer:
        """The answer, whatever its status, with at most MAX_ANSWER_BYTES of its body.

        path: with its query, percent-encoded. timeout_s: for each wait until the headers are here,
        and for the whole body after that. A body that breaks off, takes longer or is larger is no
        error: the status is what was asked for, and `is_whole` says so.
        Raises httpx.TransportError.
        """
        body, is_whole = bytearray(), True
        with self._client.stream(
            method, self._base + path, headers=headers, content=content, timeout=timeout_s
        ) as answer:
            ends = self._clock() + timeout_s
            try:
                for block in answer.iter_raw():
                    body += block
                    if len(body) > MAX_ANSWER_BYTES or self._clock() > ends:
                        is_whole = False
                        break
            except httpx.TransportError:
                is_whole = False
        # httpx gives the names in lower case.
        return Answer(
            answer.status_code, dict(answer.headers), bytes(body[:MAX_ANSWER_BYTES]), is_whole
        )


def project(env: Mapping[str, str]) -> tuple[str, str] | None:
    """SUPABASE_URL and one of SERVICE_KEYS (the first that is set); None when neither is set.
    Blanks around a value are dropped.

    Raises ConfigError for one without the other.
    """
    url = env.get(URL, "").strip()
    key = next((text for name in SERVICE_KEYS if (text := env.get(name, "").strip())), "")
    if bool(url) != bool(key):
        missing = " or ".join(SERVICE_KEYS) if url else URL
        raise ConfigError(f"{missing} is missing, without which nothing can be told to Supabase")
    return (url, key) if url else None


def service_from_environment(env: Mapping[str, str]) -> Service | None:
    """The `project`, with JOB_CALLBACK_SECRET. Raises as that does."""
    found = project(env)
    if found is None:
        return None
    return Service(*found, env.get(CALLBACK_SECRET, "").strip() or None)

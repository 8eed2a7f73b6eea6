"""Pictures that jobs begin from: whose they are, and URLs that a worker can fetch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx

from gateway.config import Settings
from gateway.errors import Forbidden, Invalid
from gateway.jobs.request import JobInput

log = logging.getLogger(__name__)

BUCKETS = ("user-library", "workspace-temp")
KEYS = ("reference_image_url", "start_reference_url", "end_reference_url")
SIGNED_S = 3600
TIMEOUT_S = 5.0
MAX_CHARS = 4096
_SEGMENT = re.compile(r"[A-Za-z0-9._~ ()+@=,!-]{1,255}")

# A path in storage → a URL for SIGNED_S seconds; None: it cannot be signed.
Sign = Callable[[str], str | None]


class CrossUserReference(Forbidden):
    """The picture lies in another user's folder."""

    code = "CROSS_USER_REFERENCE"


def prepare(asked: JobInput, user_id: str, sign: Sign | None) -> JobInput:
    """The job with its references as URLs. A path of the user's own is signed where there is a
    store to sign it; where that fails the path stays, and the worker fetches it with its own key.

    Raises CrossUserReference for a path of another user, Invalid for one that is no path or URL.
    """
    metadata: dict[str, Any] = dict(asked.metadata)
    for name in KEYS:
        given = metadata.get(name)
        if not given:
            continue
        if not isinstance(given, str):
            raise Invalid(f"metadata.{name} is not a text")
        metadata[name] = _prepared(given, user_id, sign)
    reference = asked.reference_image_url
    if reference:
        reference = _prepared(reference, user_id, sign)
    return replace(asked, metadata=metadata, reference_image_url=reference or None)


def _prepared(given: str, user_id: str, sign: Sign | None) -> str:
    if len(given) > MAX_CHARS:
        raise Invalid(f"a reference has {len(given)} characters; {MAX_CHARS} are the most")
    if given.lower().startswith(("http://", "https://")):
        return given  # public or signed already; the worker checks its address
    bucket, _, path = given.partition("/")
    segments = path.split("/")
    well_formed = (
        all(_SEGMENT.fullmatch(one) and one not in (".", "..") for one in segments)
        and len(segments) >= 2
    )
    if bucket not in BUCKETS or not well_formed:
        raise Invalid(
            "a reference is an http or https URL, or BUCKET/USER/FILE with one of the buckets "
            + ", ".join(BUCKETS)
        )
    if segments[0] != user_id:
        raise CrossUserReference(
            "this reference lies in another user's folder",
            fields={"code": CrossUserReference.code},  # where clients of queue-job look
        )
    signed = sign(given) if sign is not None else None
    return signed or given


class StorageSigner:
    """Signs paths at a Supabase project's storage. Any thread; one for a process."""

    def __init__(self, url: str, key: str, transport: httpx.BaseTransport | None = None):
        self._url = url.rstrip("/")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}", "apikey": key},
            timeout=TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    def __call__(self, path: str) -> str | None:
        """A URL, None where the store does not give one; the log says why."""
        try:
            answer = self._client.post(
                f"{self._url}/storage/v1/object/sign/{quote(path)}", json={"expiresIn": SIGNED_S}
            )
            said = answer.json()
        except (httpx.HTTPError, ValueError) as exc:
            log.warning("a reference is not signed: %s", type(exc).__name__)
            return None
        signed = said.get("signedURL") if isinstance(said, Mapping) else None
        if answer.status_code != 200 or not isinstance(signed, str):
            log.warning("a reference is not signed: status %d", answer.status_code)
            return None
        return f"{self._url}/storage/v1{signed}" if signed.startswith("/") else signed


def signer_of(settings: Settings) -> StorageSigner | None:
    """By the environment; None where it names no project."""
    url = settings.secret("SUPABASE_URL")
    key = settings.secret("SUPABASE_SERVICE_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    return StorageSigner(url, key) if url and key else None

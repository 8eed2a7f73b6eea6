"""Stores for finished files: what every store does, how one fails, and what its errors may say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from worker.errors import Cancelled, ConfigError, WorkerError, has_trap_word

MAX_SHOWN_CHARS = 200  # of an answer's body
MAX_SHOWN_NAME_CHARS = 80
MAX_KEY_BYTES = 1024  # of S3; Supabase keeps its objects in S3
MAX_RETRY_AFTER_S = 3600.0  # a store that names a longer time is asked again after an hour

# Besides all from 500 on. 409: another writer is at the same object just now; 423: so is another
# request, which a cut connection may have left behind.
_TRY_AGAIN = frozenset({408, 409, 423, 425, 429})


class StoreUnavailable(WorkerError):
    """The store could not be reached, or took too long, or has trouble: try again.

    `retry_after_s` is what the store asked for, None where it asked for nothing.
    """

    status = 503
    code = "store_unavailable"


class StoreRefused(WorkerError):
    """The store says no (wrong key, no such bucket, file too large): an operator has to act.

    The same put may succeed afterwards, so the caller decides whether it is tried again.
    """

    status = 502
    code = "store_refused"


class ObjectStore(Protocol):
    """A place where finished files go. Stores change nothing in themselves: any thread may call."""

    name: str

    def put(
        self,
        key: str,
        file: Path,
        mime_type: str,
        saved: dict[str, Any],
        save: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Store the bytes of `file` under `key`; on return the store has them all.

        Putting a file twice is harmless: the later one replaces the earlier.

        key: a path such as "user/job/0.png", without empty parts and without "." and "..".
        saved: what an earlier attempt for this key handed to `save`, {} at first. An attempt goes
            on from there, in another process too. What does not fit (another file, another store,
            an upload that has expired) is left aside and the upload begins anew.
        save: gets a small dict for JSON, which replaces all that was saved before. It must be
            durable when `save` returns.
        should_stop: asked between blocks or parts; when it is true the upload is left where it is.

        Raises StoreUnavailable, StoreRefused; Cancelled when `should_stop` said so; OSError when
        the file cannot be read.
        """
        ...


def check_key(store: str, key: str) -> None:
    """Raise StoreRefused for a key that would not name the same object everywhere."""
    parts = key.split("/")
    if (
        len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES
        or not key.isprintable()  # lone surrogates are not printable either
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise StoreRefused(
            f"{store}: the name of a file to store has {len(parts)} parts and {len(key)} "
            f"characters; allowed: up to {MAX_KEY_BYTES} bytes of printable text, no empty part, "
            'no "." and no ".." as a part'
        )


def check_address(setting: str, url: str) -> str:
    """`url` without a slash at its end. Raises ConfigError, naming `setting` and not the value,
    which may hold a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError(f"{setting} is not an address") from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
        or not url.isascii()
        or not url.isprintable()
        or " " in url
    ):
        raise ConfigError(
            f"{setting} must be an http or https address without a user, a query or a fragment"
        )
    return url.rstrip("/")


def check_secret(setting: str, value: str) -> str:
    """`value`, when it can stand in a header. Raises ConfigError, which does not repeat it."""
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"{setting} is empty or has characters that no key has; copy it again")
    return value


def shown_name(key: str) -> str:
    """The last part of a key as messages show it."""
    name = key.rsplit("/", 1)[-1][:MAX_SHOWN_NAME_CHARS]
    return "a file" if has_trap_word(name) else name


def shown_text(text: str, secrets: Iterable[str]) -> str:
    """What a message may repeat of an answer: its beginning, printable, without secrets."""
    for secret in secrets:
        for form in (secret, quote(secret, safe="")):
            text = text.replace(form, "***")
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return "…" if has_trap_word(text) else text[:MAX_SHOWN_CHARS]


def answered(
    store: str, key: str, status: int, said: str, retry_after: str | None = None
) -> StoreUnavailable | StoreRefused:
    """The error for an answer that is not a success.

    status: of HTTP. said: words of the answer, already through `shown_text`.
    retry_after: the header of that name, if there was one.
    """
    words = f"{store} answered {status} for {shown_name(key)}" + (f" ({said})" if said else "")
    if status >= 500 or status in _TRY_AGAIN:
        wait_s = retry_after_s(retry_after, time.time())
        return StoreUnavailable(f"{words}; try again", retry_after_s=wait_s)
    return StoreRefused(f"{words}; look at the store's address, bucket, key and size limit")


def unreachable(store: str, key: str, exc: Exception) -> StoreUnavailable:
    """The error for a request without an answer. The text of `exc` is left out: it may repeat a
    header."""
    return StoreUnavailable(
        f"{store} gave no answer for {shown_name(key)} ({type(exc).__name__}); try again"
    )


def stopped(store: str, key: str) -> Cancelled:
    """The error for an upload that `should_stop` ended."""
    return Cancelled(f"the upload of {shown_name(key)} to {store} was stopped; it is not complete")


def retry_after_s(header: str | None, now: float) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None without a usable one.

    now: wall-clock seconds.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        wait_s = float(text[:9])
    else:
        try:
            at = parsedate_to_datetime(text)
            # A date that ends in -0000 comes without a zone and means UTC (RFC 5322, 3.3).
            wait_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)

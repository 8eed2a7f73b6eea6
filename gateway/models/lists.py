"""Fetches a provider's list of models, all pages of it, within bounds.

A list that says there is more and gives no way to it that we know is refused whole: taken for the
whole list, it would make the rest look gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from gateway.models import faults
from gateway.models.exchange import Exchange, read_json
from gateway.models.faults import ProviderError, shown
from gateway.models.listing import BUILT_IN, MAX_LIST_BYTES, MAX_ROWS, Listing, read_rows, rows_of
from gateway.models.openai_client import raise_for_status
from gateway.models.provider_keys import authorization
from gateway.values.rows import Provider

MAX_PAGES = 40
DEADLINE_S = 30.0  # of all pages together

# Keys of an answer by which lists of other forms say that there is more.
_MORE = ("next", "next_page", "next_page_token", "nextPageToken", "next_cursor")


class ListFetcher:
    """Reads lists. Never changes; any thread."""

    def __init__(
        self,
        exchange: Exchange,
        secret: Callable[[str], str | None],
        deadline_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """secret: the value of an environment variable, None where it is not set."""
        self._exchange = exchange
        self._secret = secret
        self._deadline_s = deadline_s
        self._clock = clock

    def __call__(self, provider: Provider) -> Listing:
        """The provider's list. Kind openai: `{base_url}/models`; kind catalogue: the base URL is
        the list's own, and without one the built-in mapping is the list.

        Pages: `has_more` and `last_id`, asked for as `after_id`
        (docs.anthropic.com/en/api/models-list). Raises ProviderError.
        """
        if provider.kind == "catalogue" and provider.base_url is None:
            return BUILT_IN
        if provider.kind == "worker" or provider.base_url is None:
            raise ProviderError(
                faults.ADDRESS, f"provider {shown(provider.name)} has no list of models"
            )
        url = provider.base_url.rstrip("/")
        if provider.kind == "openai":
            url = f"{url}/models"
        headers = {
            "Accept": "application/json",
            **authorization(provider.secret_ref, self._secret),
        }
        ends = self._clock() + self._deadline_s
        rows: list[Any] = []
        left = MAX_LIST_BYTES
        seen: set[str] = set()
        page = url
        for _ in range(MAX_PAGES):
            reply = self._exchange.send(
                "GET", page, headers=headers, deadline_s=ends - self._clock(), max_bytes=left
            )
            raise_for_status(reply)
            left -= len(reply.body)
            document = read_json(reply.body)
            rows += rows_of(document)
            if len(rows) > MAX_ROWS:
                raise ProviderError(
                    faults.TOO_LARGE, f"the provider lists more than {MAX_ROWS} models"
                )
            cursor = _cursor(document)
            if cursor is None:
                return read_rows(rows, keys_are_ids=provider.kind == "openai")
            if cursor in seen:
                raise ProviderError(faults.BROKEN, "the provider's pages go round in a circle")
            seen.add(cursor)
            page = f"{url}{'&' if '?' in url else '?'}after_id={quote(cursor, safe='')}"
        raise ProviderError(
            faults.TOO_LARGE, f"the provider's list has more than {MAX_PAGES} pages"
        )


def _cursor(document: Any) -> str | None:
    """What the next page is asked for with; None: this was the last. Raises ProviderError."""
    if not isinstance(document, dict):
        return None
    if document.get("has_more"):
        cursor = document.get("last_id")
        if isinstance(cursor, str) and 0 < len(cursor) <= 200 and cursor.isprintable():
            return cursor
    elif not any(document.get(key) for key in _MORE):
        return None
    raise ProviderError(
        faults.BROKEN, "the provider's list has more pages, in a form that is not known here"
    )

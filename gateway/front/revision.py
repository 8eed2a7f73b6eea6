"""The configuration that a request works with, and what its answer says about it.

`held` is called once by every view that uses prompts; where a flow takes the configuration by
itself, the view gives it `minimum()` and says `used(…)` afterwards. The headers X-GW-Revision and
X-GW-Fallback-Level of the answer follow from that (gateway/front/app.py).
"""

from __future__ import annotations

from typing import Protocol

from flask import Response, g, has_request_context

from gateway.cache.holder import Held
from gateway.errors import InvalidRequest
from gateway.front.limits import number_header

REVISION = "X-GW-Revision"
LEVEL = "X-GW-Fallback-Level"
MIN_REVISION = "X-GW-Min-Revision"


class PromptSource(Protocol):
    """The façade of gateway/cache."""

    def held(self, min_revision: int | None = None) -> Held:
        """The configuration to use now. Raises RevisionNotReached where `min_revision` does not
        come in time."""


def held(prompts: PromptSource) -> Held:
    """The configuration for this request, not older than its X-GW-Min-Revision. Raises
    InvalidRequest for a header that is no revision, RevisionNotReached."""
    found = prompts.held(minimum())
    used(found)
    return found


class Telling:
    """A source for flows, whose configuration the answer's headers then name."""

    def __init__(self, prompts: PromptSource):
        self._prompts = prompts

    def held(self, min_revision: int | None = None) -> Held:
        found = self._prompts.held(min_revision)
        if has_request_context():
            used(found)
        return found


def minimum() -> int | None:
    """X-GW-Min-Revision. Raises InvalidRequest."""
    return number_header(MIN_REVISION)


def used(found: Held) -> None:
    """The answer of this request was made with `found`."""
    g.held = found


def mark(answer: Response) -> None:
    """Put revision and level into the answer of a view that called `held`."""
    found: Held | None = g.get("held")
    if found is not None:
        answer.headers[REVISION] = str(found.snapshot.revision)
        answer.headers[LEVEL] = str(found.level)


def expected(of_body: int | None) -> int | None:
    """The revision that an edit is based on: If-Match, or expected_revision of the body. Raises
    InvalidRequest where both are there and differ. None: the edit asks for none."""
    of_header = number_header("If-Match")
    if of_header is not None and of_body is not None and of_header != of_body:
        raise InvalidRequest("If-Match and expected_revision name different revisions")
    return of_body if of_header is None else of_header

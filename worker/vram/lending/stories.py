"""What happened to the memory of each request, kept so that it can be explained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

KEPT_STORIES = 1000  # requests that can be explained
KEPT_EVENTS = 200  # of each


class Stories:
    """Events by request; the request that was told of last is last. Owner: the broker."""

    def __init__(self) -> None:
        self._stories: OrderedDict[str, list[tuple[float, dict[str, Any]]]] = OrderedDict()

    def tell(self, requests: Sequence[str], now: float, what: str, **facts: Any) -> None:
        """Something happened to all of these requests."""
        for request_id in requests:
            story = self._story(request_id)
            if len(story) < KEPT_EVENTS:
                story.append((now, {"what": what, **facts}))

    def join(self, request_id: str, other: str) -> None:
        """What happened to another request happened to this one as well."""
        theirs = list(self._stories.get(other, []))
        own = self._story(request_id)
        own[:] = sorted([*theirs, *own], key=lambda event: event[0])[:KEPT_EVENTS]

    def of(self, request_id: str) -> list[dict[str, Any]] | None:
        """In order; t_s from its first event."""
        story = self._stories.get(request_id)
        if not story:
            return None
        began = story[0][0]
        return [{"t_s": round(at - began, 4), **event} for at, event in story]

    def _story(self, request_id: str) -> list[tuple[float, dict[str, Any]]]:
        story = self._stories.setdefault(request_id, [])
        self._stories.move_to_end(request_id)
        while len(self._stories) > KEPT_STORIES:
            self._stories.popitem(last=False)
        return story

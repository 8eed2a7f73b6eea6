"""Stop strings, found across token borders and never emitted."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text through, holding back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
        """stops: non-empty strings."""
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The part of the text so far that can be shown now. Nothing is after `found`.

        Of two stop strings the one that begins first is found; of two that begin at one place,
        the one that was given first.
        """
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        hit, open_ = self._first_hit(), self._first_open()
        # What begins earlier, or at the same place and was given before, may yet win.
        if hit is not None and (open_ is None or hit < open_):
            return self._cut(hit)
        show = len(self._held) if open_ is None else open_[0]
        shown, self._held = self._held[:show], self._held[show:]
        return shown

    def finish(self) -> str:
        """What was held back when the text ends without the rest of a stop string."""
        if self.found is not None:
            return ""
        # What was incomplete has failed; a complete one behind it counts now.
        hit = self._first_hit()
        if hit is not None:
            return self._cut(hit)
        shown, self._held = self._held, ""
        return shown

    def _cut(self, hit: tuple[int, int]) -> str:
        self.found = self._stops[hit[1]]
        shown, self._held = self._held[: hit[0]], ""
        return shown

    def _first_hit(self) -> tuple[int, int] | None:
        """(begin, order) of the first complete stop string."""
        hits = [(self._held.find(stop), order) for order, stop in enumerate(self._stops)]
        return min((hit for hit in hits if hit[0] >= 0), default=None)

    def _first_open(self) -> tuple[int, int] | None:
        """(begin, order) of the first tail that is a proper beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for begin in range(max(0, len(self._held) - longest), len(self._held)):
            tail = self._held[begin:]
            for order, stop in enumerate(self._stops):
                if len(tail) < len(stop) and stop.startswith(tail):
                    return begin, order
        return None

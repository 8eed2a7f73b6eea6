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
        hits = [(self._held.find(stop), order) for order, stop in enumerate(self._stops)]
        first = min((hit for hit in hits if hit[0] >= 0), default=None)
        # An earlier beginning that is still incomplete may yet win over a complete later one.
        open_from = self._open_from()
        if first is not None and first[0] <= open_from:
            self.found = self._stops[first[1]]
            shown, self._held = self._held[: first[0]], ""
            return shown
        shown, self._held = self._held[:open_from], self._held[open_from:]
        return shown

    def finish(self) -> str:
        """What was held back when the text ends without the rest of a stop string."""
        if self.found is not None:
            return ""
        # An incomplete earlier beginning has failed; a complete one behind it counts now.
        hits = [(self._held.find(stop), order) for order, stop in enumerate(self._stops)]
        first = min((hit for hit in hits if hit[0] >= 0), default=None)
        if first is not None:
            self.found = self._stops[first[1]]
            return self._held[: first[0]]
        shown, self._held = self._held, ""
        return shown

    def _open_from(self) -> int:
        """Where the earliest tail begins that is a proper beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            tail = self._held[start:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stops):
                return start
        return len(self._held)

"""How long phases take, learned from those that came to their end. Pure."""

from __future__ import annotations

from collections import deque

WHOLE = "whole"
KEPT = 32  # phases of each kind
SPREAD = 0.5  # of an estimate from a single phase, up and down; of one from n, an nth of it


class Paces:
    """Seconds per unit of work, by model and phase. One owner: the broker."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], deque[tuple[int, float]]] = {}

    def learn(
        self,
        model: str,
        phase: str,
        pixels: int,
        work: float,
        seconds: float,
        way: str = WHOLE,
    ) -> None:
        """A phase is over. pixels: of what the device computes at once; work: what it is
        proportional to beside them, such as denoise steps. seconds: without those that its way is
        taken to last longer than the whole one."""
        if pixels > 0 and work > 0:
            seen = self._seen.setdefault((model, phase, way), deque(maxlen=KEPT))
            seen.append((pixels, max(0.0, seconds) / work))

    def estimate(
        self, model: str, phase: str, pixels: int, work: float, way: str = WHOLE
    ) -> tuple[float, float] | None:
        """Seconds, (from, to); None while nothing like it has been seen, in this way or whole.

        Of the same size: the fastest and the slowest seen. Of another: what all sizes that were
        seen leave, because nothing becomes quicker by becoming larger, and nothing grows by more
        than the square of the pixels, as attention does.
        """
        seen = self._seen.get((model, phase, way)) or self._seen.get((model, phase, WHOLE))
        if not seen or pixels <= 0:
            return None
        same = [pace for size, pace in seen if size == pixels]
        if same:
            slack = 1 + SPREAD / len(same)
            return min(same) / slack * work, max(same) * slack * work
        spans = [sorted((pace, pace * (pixels / size) ** 2)) for size, pace in seen]
        # Where they contradict each other, because one was slowed by others, both are kept.
        low, high = sorted((max(low for low, _ in spans), min(high for _, high in spans)))
        slack = 1 + SPREAD / len(seen)
        return low / slack * work, high * slack * work

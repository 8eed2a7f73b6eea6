"""How long phases take, learned from those that came to their end. Pure."""

from __future__ import annotations

from collections import deque

KEPT = 32  # phases of each kind
SPREAD = 1.25  # of an estimate from a single phase, up and down


class Paces:
    """Seconds per unit of work, by model and phase. One owner: the broker."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], deque[tuple[int, float]]] = {}

    def learn(self, model: str, phase: str, pixels: int, work: float, seconds: float) -> None:
        """A phase is over. pixels: of all frames; work: what it is proportional to beside them,
        such as denoise steps."""
        if pixels > 0 and work > 0:
            seen = self._seen.setdefault((model, phase), deque(maxlen=KEPT))
            seen.append((pixels, seconds / work))

    def estimate(
        self, model: str, phase: str, pixels: int, work: float
    ) -> tuple[float, float] | None:
        """Seconds, (from, to); None while nothing like it has been seen.

        Of the same size: the fastest and the slowest seen. Of another: the nearest one, scaled
        between in proportion to the pixels and to their square, as attention is.
        """
        seen = self._seen.get((model, phase))
        if not seen or pixels <= 0:
            return None
        same = [pace for size, pace in seen if size == pixels]
        if same:
            slack = SPREAD if len(same) == 1 else 1.0
            return min(same) / slack * work, max(same) * slack * work
        size, pace = min(seen, key=lambda one: max(one[0], pixels) / min(one[0], pixels))
        ratio = pixels / size
        low, high = sorted((ratio, ratio**2))
        return pace * low / SPREAD * work, pace * high * SPREAD * work

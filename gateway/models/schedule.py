"""When the catalogue is refreshed by itself. Pure; chance comes as a number."""

from __future__ import annotations

from datetime import datetime, timedelta

JITTER = 0.1  # of the period, to both sides: replicas and gateways do not all ask at once
FIRST_WITHIN_S = 300.0  # of a gateway that has never refreshed


def next_run(
    last: datetime | None, every_s: float, random01: float, *, started: datetime
) -> datetime | None:
    """The time of the next refresh; None: only when somebody asks.

    last: of any replica; None: never. every_s: the period, 0 for never. random01: 0 ≤ x < 1, drawn
    once for a run and kept until it is over. started: when this process began.
    """
    if every_s <= 0:
        return None
    if last is None:
        return started + timedelta(seconds=random01 * min(FIRST_WITHIN_S, every_s))
    return last + timedelta(seconds=every_s * (1 - JITTER + 2 * JITTER * random01))

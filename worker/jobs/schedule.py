"""Which queued job runs next. Pure.

Higher priorities go first, and a job's own rises by one for every AGE_S that it has waited: after
twenty-one of them even the lowest one goes before whatever comes in. Among equals the oldest goes
first, but for jobs of the model that ran last, which save a change of models: they may overtake it
until MAX_OVERTAKEN jobs have done so. So a job that is at the front waits for at most that many.

Jobs that can share a batch run together where they would run one after the other anyway: sharing
changes nobody's place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

AGE_S = 60.0
MAX_OVERTAKEN = 4


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job, as far as its turn depends on it."""

    id: str
    number: int  # order of acceptance
    model: str
    priority: int = 0
    created_at: float = 0.0  # wall clock, seconds
    not_before: float = 0.0
    overtaken: int = 0  # jobs that came later and ran before it
    has_references: bool = False
    images: int = 1
    shape: object = None  # jobs of equal shapes can share a batch; None: it runs alone


def next_job(waiting: Iterable[Waiting], last_model: str | None, now: float) -> Waiting | None:
    """The job whose turn it is; None when none may begin now.

    last_model: of the job that ran last. now: wall clock, seconds.
    """

    def risen(one: Waiting) -> int:
        return one.priority + max(0, int((now - one.created_at) // AGE_S))

    due = sorted(
        (one for one in waiting if one.not_before <= now),
        key=lambda one: (-risen(one), one.number),
    )
    if not due:
        return None
    first = due[0]
    if first.model == last_model or first.overtaken >= MAX_OVERTAKEN:
        return first
    return next(
        (one for one in due if one.model == last_model and one.priority == first.priority), first
    )


def companions(
    first: Waiting, waiting: Iterable[Waiting], now: float, most_images: int
) -> list[Waiting]:
    """The jobs that share a batch with `first`, whose turn it is.

    They are those whose turns come next, one after the other, as long as they have its shape and
    all together no more than `most_images`. The first that has not, or does not fit, ends it: it
    would wait longer if a later one joined.
    """
    found: list[Waiting] = []
    if first.shape is None:
        return found
    left, images = _after(first, waiting), first.images
    while (one := next_job(left, first.model, now)) is not None:
        images += one.images
        if (one.model, one.shape) != (first.model, first.shape) or images > most_images:
            break
        found.append(one)
        left = _after(one, left)
    return found


def _after(begun: Waiting, waiting: Iterable[Waiting]) -> list[Waiting]:
    """What waits once a job has begun, as the journal counts it (`Journal.claim`)."""
    return [
        replace(one, overtaken=one.overtaken + (one.number < begun.number))
        for one in waiting
        if one.id != begun.id
    ]

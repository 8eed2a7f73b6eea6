"""A job and its states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Self

from worker.jobs.decode import JobRequest
from worker.protocol.messages import AssetFile


class Status(Enum):
    """Where a job is; only the runner moves it on after creation."""

    QUEUED = "queued"
    """Accepted; it waits for its turn, for its next try, or to go on where a process ended."""
    PROCESSING = "processing"
    """It is being made, or its files are there and are being uploaded."""
    COMPLETED = "completed"
    """All its files are there, uploaded too where that was wanted. Final."""
    FAILED = "failed"
    """It ended with an error, which it carries. Final."""
    CANCELLED = "cancelled"
    """Somebody asked for its end before it was complete. Final."""

    @property
    def is_final(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job at one moment. Change is a new value: `evolve`."""

    id: str
    request: JobRequest | None  # None: the body was refused, or is of another version
    created_at: float  # wall clock, seconds since the epoch; the others too
    number: int = 0  # order of acceptance
    given: dict[str, Any] = field(default_factory=dict)  # the body as it came
    source: str = "http"  # or the list that it came from
    element: bytes | None = None  # as it lies in this worker's processing list
    status: Status = Status.QUEUED
    started_at: float | None = None
    finished_at: float | None = None
    starts: int = 0  # how often the runner has begun it
    restarts: int = 0  # how often the runner ended while it worked on it
    attempts: int = 0  # how often an engine died over it
    assets: tuple[AssetFile, ...] = ()
    receipt: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    error_code: str | None = None
    cancel_requested: bool = False

    @property
    def is_uploading(self) -> bool:
        """Its files are made; what is left is to bring them away."""
        return self.status is Status.PROCESSING and bool(self.assets)

    @property
    def whole_receipt(self) -> dict[str, Any]:
        """The engine's, and what only the decoder knows."""
        request = self.request
        if request is None:
            return {}
        return {
            "request_id": self.id,
            **self.receipt,
            "type": request.type,
            "seconds": {phase: round(one, 4) for phase, one in self.seconds.items()},
            "adjusted": request.adjusted,
            "ignored": list(request.ignored),
        }

    def evolve(self, **changes: Any) -> Self:
        return replace(self, **changes)

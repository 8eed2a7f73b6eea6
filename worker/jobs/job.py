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
    """Accepted; nothing has been done for it yet, or its engine died and it waits to begin anew."""
    PROCESSING = "processing"
    """The engine has it."""
    COMPLETED = "completed"
    """All its files are there. Final."""
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
    request: JobRequest
    created_at: float  # wall clock, seconds since the epoch; the others too
    status: Status = Status.QUEUED
    started_at: float | None = None
    finished_at: float | None = None
    phase: str | None = None  # load | encode | denoise | decode | save, while processing
    step: int = 0
    steps: int = 0
    attempts: int = 0  # how often an engine has begun it
    assets: tuple[AssetFile, ...] = ()
    receipt: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    error_code: str | None = None
    cancel_requested: bool = False

    def evolve(self, **changes: Any) -> Self:
        return replace(self, **changes)

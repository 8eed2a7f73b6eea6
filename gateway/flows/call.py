"""What every flow is given with a request, and the parts of the gateway that flows use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.access.caller import Caller
from gateway.cache.holder import Held
from gateway.models.runner import Answer
from gateway.values.assembly import Assembled, AssembleRequest, Message, ModelChoice
from gateway.values.logentry import LogEntry
from gateway.values.rows import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who asks, how, and from when on."""

    caller: Caller
    request_id: str
    endpoint: str  # the route, for the log
    began: float  # monotonic seconds
    deadline_s: float  # from `began`
    min_revision: int | None = None  # the configuration has to be this new
    job_id: str | None = None  # of the job that it is for


class PromptSource(Protocol):
    def held(self, min_revision: int | None = None) -> Held: ...


class Models(Protocol):
    def run(
        self,
        choices: Sequence[ModelChoice],
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        deadline_s: float,
        request_id: str,
        now: float,
        route: str = "/chat",
    ) -> Answer: ...


class LogSink(Protocol):
    @property
    def keeps_bodies(self) -> bool: ...

    def add(self, entry: LogEntry) -> None:
        """Never raises and never waits for the database."""


Assemble = Callable[[Snapshot, AssembleRequest], Assembled]

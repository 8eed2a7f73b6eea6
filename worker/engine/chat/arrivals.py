"""Messages that have arrived and cannot begin yet: their model is away, or changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from worker.engine.host import Ticket
from worker.errors import DeadlineExceeded
from worker.protocol.messages import Generate, LoadModel, Message, UnloadModel


@dataclass(frozen=True, slots=True)
class Arrival:
    ticket: Ticket
    message: Message
    arrived: float  # monotonic
    pool_bytes: int = 0  # that it is known to need of the KV pool; 0: not looked at yet

    @property
    def model_id(self) -> str | None:
        """None for a message that the chat engine does not take."""
        match self.message:
            case Generate() | LoadModel() | UnloadModel():
                return self.message.model
        return None

    def too_late(self, now: float) -> DeadlineExceeded | None:
        """The error of a request whose time is over before it has begun."""
        message = self.message
        if isinstance(message, Generate) and now > self.arrived + message.deadline_s:
            return too_late(message.deadline_s)
        return None


def too_late(deadline_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"not complete within the deadline of {deadline_s:g} s")


class Arrivals:
    """In order of arrival. Engine thread only."""

    def __init__(self) -> None:
        self._waiting: deque[Arrival] = deque()

    def __iter__(self) -> Iterator[Arrival]:
        """Whoever iterates may remove."""
        return iter(list(self._waiting))

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)

    def put_back(self, arrival: Arrival) -> None:
        """One that had begun to wait for room in its model's pool, when the model was to leave."""
        self._waiting.appendleft(arrival)

    def remove(self, arrival: Arrival) -> None:
        self._waiting.remove(arrival)

    def models(self) -> set[str]:
        """That something waits for."""
        return {one.model_id for one in self._waiting if one.model_id is not None}

    def begin(self, begun: Callable[[Arrival, bool], bool]) -> bool:
        """Offer every message, in order; True when one is begun or done with.

        begun: is told whether an earlier message of the same model still waits, which holds this
        one back, and says whether it is begun or done with.
        """
        later: deque[Arrival] = deque()
        held: set[str | None] = set()
        began = False
        while self._waiting:
            arrival = self._waiting.popleft()
            if begun(arrival, arrival.model_id in held):
                began = True
            else:
                held.add(arrival.model_id)
                later.append(arrival)
        self._waiting = later
        return began

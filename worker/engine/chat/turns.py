"""Requests in work, and whose model computes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from worker.engine.chat.model import LanguageModel
from worker.engine.chat.request import Request
from worker.engine.chat.scheduler import Plan, TokenSequence
from worker.engine.host import Ticket


class Turns:
    """Requests that have begun, of models that take turns. Engine thread only."""

    def __init__(self) -> None:
        self._requests: dict[Ticket, Request] = {}
        self._of_sequence: dict[TokenSequence, Request] = {}
        self._models: deque[LanguageModel] = deque()  # that have work; the next one first

    def __iter__(self) -> Iterator[Request]:
        """In order of their beginning; whoever iterates may remove."""
        return iter(list(self._requests.values()))

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, sequence: TokenSequence) -> bool:
        return sequence in self._of_sequence

    @property
    def models(self) -> int:
        """That have work."""
        return len(self._models)

    def of_ticket(self, ticket: Ticket) -> Request | None:
        return self._requests.get(ticket)

    def of(self, sequence: TokenSequence) -> Request:
        return self._of_sequence[sequence]

    def add(self, request: Request) -> bool:
        """A request begins. True where it is the only one of its model."""
        self._requests[request.ticket] = request
        self._of_sequence[request.sequence] = request
        request.model.scheduler.add(request.sequence)
        if request.model in self._models:
            return False
        self._models.append(request.model)
        return True

    def remove(self, request: Request) -> bool:
        """A request has ended: its blocks are given back. True where its model has no other."""
        model = request.model
        del self._requests[request.ticket], self._of_sequence[request.sequence]
        model.runner.forget(request.sequence)
        model.scheduler.remove(request.sequence)
        if any(model.scheduler):
            return False
        self._models.remove(model)
        model.pool.check()
        assert model.pool.used == 0, "blocks are used by no sequence"
        return True

    def next(self) -> tuple[LanguageModel, Plan] | None:
        """The next model that can compute, and its pass; None where all wait for room."""
        for _ in range(len(self._models)):
            model = self._models[0]
            self._models.rotate(-1)
            if plan := model.scheduler.plan():
                return model, plan
        return None

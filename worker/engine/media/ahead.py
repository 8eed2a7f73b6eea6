"""Parts that the next phases need come while this one computes, where there is room anyway."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker.engine.leases import Leases, Question
from worker.engine.media.parts import Parts
from worker.protocol.messages import Way
from worker.vram.ways import tenant_id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    request_id: str
    parts: Parts
    names: tuple[str, ...]


class Ahead:
    """What is to come, in order. Engine thread only.

    One question at a time, answered at once: nothing moves for it. What is granted is brought
    between two denoise steps, and its lease released: from then on it is idle like any other part.
    """

    def __init__(self, leases: Leases):
        self._leases = leases
        self._wanted: list[_Wanted] = []
        self._asked: tuple[_Wanted, Question] | None = None

    def want(self, request_id: str, parts: Parts, names: Sequence[str]) -> None:
        """Parts of a model that will have to be there together."""
        self._wanted.append(_Wanted(request_id, parts, tuple(names)))

    def forget(self) -> None:
        """Whatever has not come is not wanted any more."""
        self._wanted.clear()
        if self._asked is not None:
            self._leases.withdraw(self._asked[1])
            self._asked = None

    def bring(self) -> None:
        """Between two steps: bring what has been granted, and ask for what comes next."""
        if self._asked is not None:
            wanted, question = self._asked
            if question.refused is not None:
                # What comes later needs room as well, and the order of what comes is the point.
                self._wanted.clear()
                self._asked = None
            elif question.granted is not None:
                self._asked = None
                try:
                    with wanted.parts.ready(question, wanted.names):
                        pass
                except torch.OutOfMemoryError as exc:  # it comes with its phase, or not at all
                    log.warning("%s could not come ahead: %s", ", ".join(wanted.names), exc)
                finally:
                    self._leases.release(question)
            return
        while self._wanted:
            wanted = self._wanted.pop(0)
            parts = [wanted.parts[name] for name in wanted.names]
            # A denoiser that computes block by block or in eight bits stays as it is meanwhile.
            if any(part.is_streamed or part.is_cast for part in parts):
                continue
            if not all(part.is_whole for part in parts):
                tenants = tuple(tenant_id(wanted.parts.model, name) for name in wanted.names)
                way = Way(name="whole", tenants=tenants, peak_bytes=0)
                question = self._leases.ask(wanted.request_id, "ahead", [way], free_only=True)
                self._asked = (wanted, question)
                return

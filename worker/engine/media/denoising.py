"""The denoising of all pictures of a job, one after the other: it can stop between any two steps,
and goes on with the same bits, in this process or, from a checkpoint, in another one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from worker.engine.media.checkpoints import Checkpoint, Keeper
from worker.engine.media.course import CheckpointRefused, Course, Snapshot
from worker.engine.media.embeddings import Tensors
from worker.engine.media.previews import Glimpses
from worker.engine.media.progress import Track
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.protocol.messages import RenderParams, Way

log = logging.getLogger(__name__)


class Paused(Exception):
    """Stopped for a more urgent request; `Denoising.run` goes on. Never leaves the engine."""


def keep_way(ways: dict[str, str], way: Way) -> None:
    """Note that something was made in `way`, which is the last of `ways` then."""
    ways.pop(way.name, None)
    ways[way.name] = way.exactness


class Denoising:
    """What has come of the denoising of one job. Engine thread only."""

    def __init__(
        self,
        model: Sdxl | Wan,
        params: RenderParams,
        more: dict[str, Any],
        track: Track,
        keeper: Keeper,
        glimpses: Glimpses,
    ):
        """Takes up the job's checkpoint, if there is one. more: arguments of the model's `denoise`
        beside the job's own."""
        self._model = model
        self._params = params
        self._more = more
        self._track = track
        self._keeper = keeper
        self._glimpses = glimpses
        self._finished: list[torch.Tensor] = []  # latents, in host memory
        self._begin: Snapshot | None = None  # of the picture after them
        self.resumed_from = 0  # steps, of all pictures, that an earlier process has done
        self.scheduler_class: str | None = None  # that made the latents
        # Ways in which what has come of it was made, with their exactness: it may go on in another.
        self.ways: dict[str, str] = {}
        self._way: Way | None = None  # in which it goes on now
        found = keeper.taken_up()
        if found is not None:
            self._finished, self._begin = list(found.finished), found.going_on
            self.scheduler_class = found.scheduler_class
            self.ways |= found.ways
            self.resumed_from = self._done

    @property
    def is_over(self) -> bool:
        return len(self._finished) == self._params.num_images

    @property
    def share_left(self) -> float:
        """Of its steps, 0 to 1."""
        return 1 - self._done / (self._params.passes * self._params.num_images)

    def take(self) -> list[torch.Tensor]:
        """The latents of all pictures, in host memory, once it is over."""
        assert self.is_over, "it is not over"
        taken, self._finished = self._finished, []
        return taken

    def run(
        self,
        texts: Tensors,
        way: Way | None,
        wanted_back: Callable[[], bool],
        listen: Callable[[], None],
        go_on: Callable[[], None],
    ) -> None:
        """Denoise what is left, with everything on the device.

        way: that was granted for it; None where nothing computes. wanted_back: whether to pause,
        which raises Paused. listen: called after every step; may raise to end it. go_on: called
        after a step, if it goes on then.
        """
        self._way = way
        while not self.is_over:
            index = len(self._finished)
            self._track.denoises(index, self._begin.step if self._begin is not None else 0)
            try:
                latents = self._one(index, texts, wanted_back, listen, go_on)
            except CheckpointRefused as exc:  # what it was taken up with does not fit after all
                self._keeper.refuse(exc)
                self._finished.clear()
                self._begin, self.resumed_from = None, 0
                self.ways.clear()
                continue
            self._finished.append(latents.cpu())
            self._begin = None
            self._keep_way(self.ways)
            self._keeper.step_done(lambda: self._checkpoint(None))
            if wanted_back() and not self.is_over:
                raise Paused

    def _one(
        self,
        index: int,
        texts: Tensors,
        wanted_back: Callable[[], bool],
        listen: Callable[[], None],
        go_on: Callable[[], None],
    ) -> torch.Tensor:
        """Latents of one picture or video."""

        def on_step(step: int, _: torch.Tensor) -> None:
            is_last = step >= self._params.passes
            self.scheduler_class = self._model.scheduler_class
            self._track.step(step, self._glimpses.of(course.expected, last=is_last))
            listen()
            if is_last:  # the picture is nearly there: `run` does the rest
                return
            self._keeper.step_done(
                lambda: self._checkpoint(one) if (one := course.snapshot()) is not None else None
            )
            if wanted_back() and (snapshot := course.snapshot()) is not None:
                self._begin = snapshot
                self._keep_way(self.ways)
                raise Paused
            go_on()

        course = Course(self._params.seed + index, on_step, self._begin)
        made: torch.Tensor = self._model.denoise(self._params, texts, course, **self._more)
        return made

    def _checkpoint(self, going_on: Snapshot | None) -> Checkpoint:
        ways = dict(self.ways)
        self._keep_way(ways)
        return Checkpoint(tuple(self._finished), going_on, self.scheduler_class, ways)

    def _keep_way(self, ways: dict[str, str]) -> None:
        if self._way is not None:
            keep_way(ways, self._way)

    @property
    def _done(self) -> int:
        step = self._begin.step if self._begin is not None else 0
        return len(self._finished) * self._params.passes + step

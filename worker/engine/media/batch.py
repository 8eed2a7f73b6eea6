"""The denoising of the pictures of several SDXL jobs in one batch.

Every picture has its own text and its own random numbers, those of its job alone; only the
denoiser's sums may round otherwise. Each job hears of its own steps and sees its own previews, and
one that is cancelled leaves the batch after the step. Nothing of it is kept in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from worker.engine.media.course import Course, Snapshot
from worker.engine.media.denoising import Paused, keep_way
from worker.engine.media.embeddings import Tensors
from worker.engine.media.previews import Glimpses
from worker.engine.media.run import Run
from worker.engine.media.sdxl import Sdxl
from worker.errors import Cancelled
from worker.protocol.messages import Way


class _Smaller(Exception):
    """Somebody has left; what remains goes on in a batch of its own size."""


class Batch:
    """Jobs that are denoised together. Engine thread only.

    runs: those that are still in it; they get their latents when it is over.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        glimpses: Callable[[Run], Glimpses],
        leave: Callable[[Run], None],
    ):
        """runs: two or more of one model and batch shape, that allow it, with texts of one shape.
        leave: is given each job that is cancelled, once it is out."""
        assert isinstance(runs[0].model, Sdxl)
        self.runs = [*runs]
        self._model = runs[0].model
        self._params = runs[0].job.params
        self._given = runs[0].given  # of a job that brings nothing but its texts
        self._glimpses = {run: glimpses(run) for run in runs}
        self._leave = leave
        self._begin: Snapshot | None = None  # where it goes on
        # Ways in which what has come of it was made, with their exactness.
        self.ways: dict[str, str] = {}

    @property
    def images(self) -> int:
        return sum(run.job.params.num_images for run in self.runs)

    @property
    def share_left(self) -> float:
        """Of its steps, 0 to 1."""
        return 1 - self._done / self._params.passes

    def let_go(self) -> bool:
        """Those that were cancelled are out. Whether there were any; raises Cancelled when nobody
        is left."""
        gone = [run for run in self.runs if run.is_cancelled()]
        for run in gone:
            self.runs.remove(run)
            self._leave(run)
        if not self.runs:
            raise Cancelled("all jobs of the batch were cancelled")
        return bool(gone)

    def run(
        self,
        way: Way,
        wanted_back: Callable[[], bool],
        listen: Callable[[], None],
        go_on: Callable[[], None],
    ) -> None:
        """Denoise what is left, with everything on the device.

        way: that was granted for it. wanted_back, go_on: as for `Denoising.run`. listen: called
        after every step. Raises Paused, and Cancelled as `let_go` does.
        """
        while self.runs[0].latents is None:
            try:
                self._together(way, wanted_back, listen, go_on)
            except _Smaller:
                continue

    def _together(
        self,
        way: Way,
        wanted_back: Callable[[], bool],
        listen: Callable[[], None],
        go_on: Callable[[], None],
    ) -> None:
        rows = [run for run in self.runs for _ in range(run.job.params.num_images)]
        seeds = [
            run.job.params.seed + index
            for run in self.runs
            for index in range(run.job.params.num_images)
        ]
        for run in self.runs:
            run.track.denoises(0, self._done, at_once=run.job.params.num_images)

        def on_step(step: int, _: torch.Tensor) -> None:
            is_last = step >= self._params.passes
            for run in self.runs:
                row = rows.index(run)
                seen = self._glimpses[run].of(
                    lambda row=row: course.expected()[row : row + 1],  # type: ignore[misc]
                    last=is_last,
                )
                run.track.step(step, seen)
            listen()
            some_left = self.let_go()
            if is_last:
                return
            pauses = wanted_back()
            if (some_left or pauses) and (snapshot := course.snapshot()) is not None:
                kept = [row for row, run in enumerate(rows) if run in self.runs]
                self._begin = snapshot.of_rows(kept)
                keep_way(self.ways, way)
                raise Paused if pauses else _Smaller
            go_on()

        course = Course(seeds, on_step, self._begin)
        texts = {name: torch.cat([_texts(run)[name] for run in rows]) for name in _texts(rows[0])}
        made = self._model.denoise(self._params, texts, course, self._given)
        for run in self.runs:
            run.scheduler_class = self._model.scheduler_class
            run.latents = [
                made[row : row + 1].to("cpu", copy=True)
                for row, whose in enumerate(rows)
                if whose is run
            ]

    @property
    def _done(self) -> int:
        return self._begin.step if self._begin is not None else 0


def text_shapes(run: Run) -> dict[str, torch.Size]:
    """Jobs share a batch only where these are equal: a longer text is read in more pieces."""
    return {name: one.shape for name, one in _texts(run).items()}


def _texts(run: Run) -> Tensors:
    assert run.texts is not None, "its texts were read before"
    return run.texts

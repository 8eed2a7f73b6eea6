"""Tells where a job is, how long its phases took, and how long it will still take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from worker.engine.host import Outbox, Ticket
from worker.protocol.messages import Progress, RenderJob
from worker.vram.pace import Paces
from worker.vram.planner import shape_of

KEPT_STEPS = 8  # whose median is the pace of the next ones
# Between two steps that are told, at the least. Each costs the runner and the front a millisecond
# together, on a CPU on the cores that denoise (docs/performance.md).
TELL_EVERY_S = 0.1


def seconds_left(steps_left: int, step_s: Sequence[float], after_s: float | None) -> float | None:
    """Until a job's files are there, as far as is known; None while nothing is. Pure.

    step_s: of the last steps. after_s: of what follows the steps; None: unknown.
    """
    if not steps_left:
        return after_s
    return steps_left * median(step_s) + (after_s or 0.0) if step_s else None


class Track:
    """Where one job is. Engine thread only."""

    def __init__(
        self,
        outbox: Outbox,
        ticket: Ticket,
        job: RenderJob,
        paces: Paces,
        clock: Callable[[], float],
    ):
        """paces: of the decoding and saving of earlier jobs, by model; read only."""
        self.steps = job.params.passes * job.params.num_images
        self.done = 0
        self.image = 0
        # By phase, in the order in which they began.
        self.seconds: dict[str, float] = {}
        self._outbox = outbox
        self._ticket = ticket
        self._job = job
        self._paces = paces
        self._clock = clock
        self._phase: str | None = None
        self._since = clock()
        self._stepped_at: float | None = None
        self._told_at = -math.inf
        self._at_once = 1  # pictures that a step is one of
        self._step_s: deque[float] = deque(maxlen=KEPT_STEPS)

    def phase(self, name: str) -> None:
        if name != self._phase:
            self.end()
            self._phase = name
            self._stepped_at = None  # whatever comes between two phases is no part of a step
            self._tell()

    def denoises(self, image: int, step: int = 0, *, at_once: int = 1) -> None:
        """The denoising of an image begins, or goes on after `step` of it. at_once: images from
        that one on that go step by step together."""
        before, self.image, self._at_once = self.done, image, at_once
        self.done = image * self._job.params.passes + step * at_once
        self._stepped_at = self._clock()
        if self.done != before:
            self._tell()

    def step(self, step: int, preview: bytes = b"") -> None:
        """Step `step` of the current image is done. Told if it is its last one, has a preview, or
        none was told for TELL_EVERY_S."""
        now = self._clock()
        if self._stepped_at is not None:
            self._step_s.append((now - self._stepped_at) / self._at_once)
        self._stepped_at = now
        self.done = self.image * self._job.params.passes + step * self._at_once
        is_last = step >= self._job.params.passes
        if preview or is_last or now - self._told_at >= TELL_EVERY_S:
            self._tell(preview)

    def end(self) -> None:
        """The current phase is over."""
        now = self._clock()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._since = now

    def _tell(self, preview: bytes = b"") -> None:
        self._told_at = self._clock()
        self._outbox.send(
            self._ticket,
            Progress(
                request_id=self._ticket.request_id,
                phase=self._phase or "load",
                step=self.done,
                steps=self.steps,
                left_s=self._left_s(),
                image=self.image,
                preview=preview,
            ),
        )

    def _left_s(self) -> float | None:
        decode_s, save_s = self._expected_s("decode"), self._expected_s("save")
        if self._phase == "save":
            return save_s
        known = [one for one in (decode_s, save_s) if one is not None]
        return seconds_left(self.steps - self.done, self._step_s, sum(known) if known else None)

    def _expected_s(self, phase: str) -> float | None:
        pixels = shape_of(self._job.params).pixels
        found = self._paces.estimate(self._job.model, phase, pixels, self._job.params.num_images)
        return math.sqrt(found[0] * found[1]) if found is not None else None

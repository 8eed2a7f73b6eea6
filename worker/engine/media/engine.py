"""The media engine: takes jobs, renders one or one batch at a time, answers them in their order.

How a job is rendered is in worker/engine/media/rendering.py. Its files are written beside the next
job, by worker/engine/media/saver.py.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from worker.catalog import Catalog, ModelSpec
from worker.engine.answers import answer, quietly
from worker.engine.device import translated
from worker.engine.host import Outbox, Report, Ticket
from worker.engine.leases import Leases
from worker.engine.media.checkpoints import EVERY_S, configs_sha256
from worker.engine.media.embeddings import EmbeddingCache, Tensors
from worker.engine.media.previews import Previews
from worker.engine.media.progress import Track
from worker.engine.media.rendering import WAIT_S, Made, Renderer
from worker.engine.media.run import Run
from worker.engine.media.saver import Saver, Work, save_files
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.engine.residents import Residents
from worker.errors import Cancelled, InvalidRequest, WorkerError
from worker.log import request_scope
from worker.protocol.messages import (
    JobRendered,
    LoadModel,
    Message,
    RenderJob,
    UnloadModel,
    failed,
)
from worker.vram.pace import Paces
from worker.vram.planner import HOST_PHASE, shape_of
from worker.vram.sizes import Peaks

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Took:
    """How long a phase of a finished job took."""

    model: str
    phase: str
    pixels: int  # of one picture, or of all latent frames of a video
    pictures: int
    seconds: float


# That files may still be written after the last step; the supervisor kills after 10 s.
SAVE_S = 8.0
# That a job waits for those that are to share its batch. They are sent right behind it; one that
# does not come is not missed, and is rendered alone if it comes later.
JOIN_S = 1.0


class MediaEngine:
    """SDXL and WAN pipelines on one device.

    Thread-confined: every method runs on the engine thread (worker/engine/host.py).
    """

    def __init__(
        self,
        catalog: Catalog,
        preload: Sequence[str],
        max_resident: int,
        device: torch.device,
        state_dir: Path,
        outbox: Outbox,
        leases: Leases,
        peaks: Peaks,
        clock: Callable[[], float] = time.monotonic,
        long_prompts: str = "chunk",
    ):
        """long_prompts: chunk | refuse, of texts that a picture's encoders do not take at once."""
        self.checkpoint_every_s = EVERY_S  # 0: after every step
        self._device = device
        self._state_dir = state_dir
        self._outbox = outbox
        self._leases = leases
        self._clock = clock
        self._long_prompts = long_prompts
        self._embeddings = EmbeddingCache(state_dir / "embeddings")
        self._configs: dict[str, str] = {}  # by model, as it was loaded
        self._models: Residents[Sdxl | Wan] = Residents(
            catalog.specs, device, self._load, lambda: outbox.publish(self.report()), max_resident
        )
        self._renderer = Renderer(
            device, outbox, leases, peaks, self._models, self._embeddings,
            Previews(state_dir / "previews"), clock,
        )  # fmt: skip
        self._saver = Saver(outbox)
        self._paces = Paces()  # of decoding and saving
        self._took: deque[_Took] = deque()  # not learned yet; the saver's thread appends
        self._preload = deque(preload)
        self._waiting: deque[tuple[Ticket, Message]] = deque()
        self._running: list[Ticket] = []  # one, or those of a batch that are not answered yet
        self._cancelled: set[Ticket] = set()  # of these
        self._batches_given_up = 0
        self._jobs_rendered = 0

    # --- what the host calls -------------------------------------------------------------------

    def submit(self, ticket: Ticket, message: Message) -> None:
        """Take a request; every answer and error goes to the outbox."""
        if not self._leases.take(message):
            self._waiting.append((ticket, message))

    def cancel(self, ticket: Ticket) -> None:
        """Stop a job: a waiting one now, the running one after its current step, one whose files
        are written after the current file."""
        if ticket in self._running:
            self._cancelled.add(ticket)
            return
        if self._saver.cancel(ticket):
            return
        for entry in list(self._waiting):
            if entry[0] == ticket:
                self._waiting.remove(entry)
                error = Cancelled("the job was cancelled before it began")
                self._outbox.send(ticket, failed(ticket.request_id, error))

    def step(self) -> bool:
        """Load a model or do one whole job; with nothing else to do, wait until the files of the
        last ones are there. False when idle."""
        did_something = self._step()
        self._learn()
        return did_something

    def report(self) -> Report:
        """Status, models and counts, for the state that fronts see."""
        return self._models.report(
            more_to_load=bool(self._preload),
            # What is still being saved is drained for, too.
            active=len(self._running) + self._saver.jobs,
            waiting=len(self._waiting),
            counters={
                "jobs_rendered": self._jobs_rendered,
                **self._renderer.counters,
                "batches_given_up": self._batches_given_up,
                "embeddings_found": self._embeddings.hits,
                "embeddings_computed": self._embeddings.misses,
            },
            gauges={
                "device_bytes_held": sum(one.parts.all_held_bytes for one in self._models.loaded()),
            },
        )

    # --- work ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """What is being saved comes to its end, unless that takes too long."""
        self._saver.wait(SAVE_S)

    def _step(self) -> bool:
        if self._preload:
            model_id = self._preload.popleft()
            quietly(lambda: self._models.ensure(model_id))
        elif self._waiting and self._leases.connected:
            self._do(*self._waiting.popleft())
        elif self._saver.jobs:
            # This is no time to be told to stop: that is looked at between two steps.
            while self._saver.jobs and not self._waiting:
                self._outbox.wait(WAIT_S)
        else:
            return False
        return True

    def _do(self, ticket: Ticket, message: Message) -> None:
        self._running = [ticket]
        self._cancelled.clear()
        self._outbox.publish(self.report())
        match message:
            case RenderJob():
                self._do_jobs([(ticket, message), *self._companions(ticket, message)])
            case LoadModel():
                answer(self._outbox, ticket, lambda: self._models.load_for(message))
            case UnloadModel():
                answer(self._outbox, ticket, lambda: self._models.unload_for(message))
            case _:
                log.error("the media engine does not take %s", type(message).__name__)
                error = InvalidRequest("the media engine does not take this message")
                self._outbox.send(ticket, failed(ticket.request_id, error))
        self._running = []

    def _companions(self, ticket: Ticket, job: RenderJob) -> list[tuple[Ticket, RenderJob]]:
        """The jobs that are to share a job's batch, as far as they have come."""
        wanted = [Ticket(ticket.peer, one) for one in job.companions]
        until = self._clock() + JOIN_S
        while not {one for one, _ in self._waiting} >= {*wanted} and self._clock() < until:
            self._outbox.wait(WAIT_S)
        found = [
            (its, message)
            for its, message in self._waiting
            if its in wanted and isinstance(message, RenderJob) and message.model == job.model
        ]
        for entry in found:
            self._waiting.remove(entry)
        return sorted(found, key=lambda entry: wanted.index(entry[0]))

    def _do_jobs(self, jobs: Sequence[tuple[Ticket, RenderJob]]) -> None:
        """Render one job, or several of which those that can share the first one's batch; and leave
        the answers to the saver, so that jobs are answered in their order."""
        self._running = [ticket for ticket, _ in jobs]
        runs = [
            run
            for ticket, job in jobs
            if (run := self._tried(ticket, partial(self._begun, ticket, job))) is not None
        ]
        if len(runs) > 1:
            self._share(runs)
        for run in runs:
            if run.ticket not in self._running:  # it has ended
                continue
            work = self._tried(run.ticket, partial(self._rendered, run))
            if work is not None:
                self._saver.give(run.ticket, work)
                self._running.remove(run.ticket)

    def _tried(self, ticket: Ticket, work: Callable[[], T]) -> T | None:
        """What `work` for a job returns. None where it fails, and the job is answered then: at once
        where it was cancelled, else in its order."""
        try:
            with request_scope(ticket.request_id), translated():
                return work()
        except WorkerError as exc:
            if exc.status >= 500:
                with request_scope(ticket.request_id):
                    log.error("%s", exc)
            error = failed(ticket.request_id, exc)
        self._running.remove(ticket)
        if error.code == Cancelled.code:
            self._outbox.send(ticket, error)
        else:
            self._saver.give(ticket, lambda _: error)
        return None

    def _begun(self, ticket: Ticket, job: RenderJob) -> Run:
        track = Track(self._outbox, ticket, job, self._paces, self._clock)
        track.phase("load")
        was_loaded = job.model in self._models
        model = self._models.ensure(job.model)
        spec, configs = self._models.spec(job.model), self._configs[job.model]
        run = Run(ticket, job, spec, model, configs, track, lambda: ticket in self._cancelled)
        run.was_loaded = was_loaded
        return run

    def _share(self, runs: Sequence[Run]) -> None:
        """Denoise in one batch what can be; what fails for all of them is tried for each alone, so
        that the one at fault fails alone."""

        def prepared(run: Run) -> Tensors:
            if run.is_cancelled():
                raise Cancelled("the job was cancelled before it began")
            self._renderer.prepare(run)
            texts = self._renderer.read(run)
            run.track.phase("wait")  # for the others' texts
            return texts

        sharing = [
            run
            for run in runs
            if can_share(runs[0], run)
            and self._tried(run.ticket, partial(prepared, run)) is not None
        ]
        if len(sharing) < 2:
            return
        try:
            with request_scope(sharing[0].ticket.request_id), translated():
                self._renderer.denoise_together(sharing, self._leave)
        except WorkerError as exc:
            log.error("a batch of %d jobs failed, each is rendered alone: %s", len(sharing), exc)
            self._batches_given_up += 1

    def _leave(self, run: Run) -> None:
        """A job of a batch was cancelled; the others go on."""
        self._running.remove(run.ticket)
        self._outbox.send(run.ticket, failed(run.ticket.request_id, run.ended))

    def _rendered(self, run: Run) -> Work:
        """Make a job's pictures. Returns what makes its files and its answer of them."""
        job, track = run.job, run.track
        made = self._renderer.render(run, self.checkpoint_every_s)
        track.phase("save")
        while self._saver.is_full:
            self._outbox.wait(WAIT_S)
            if run.is_cancelled():
                raise Cancelled("the job was cancelled before its files were written")
        self._took.append(self._time_of(job, "decode", track.seconds["decode"]))
        return self._saving(run, made)

    def _saving(self, run: Run, made: Made) -> Work:
        """What the saver's thread does for a job; it has the job's track from then on."""
        job, spec, track = run.job, run.spec, run.track

        def work(check: Callable[[], None]) -> Message:
            began = self._clock()
            assets = save_files(job, spec.kind, made.pictures, check)
            track.end()
            took = self._time_of(job, "save", self._clock() - began)
            self._took.append(took)
            if run.was_loaded:
                seconds = track.seconds["load"] + took.seconds
                self._took.append(self._time_of(job, HOST_PHASE, seconds))
            receipt = made.receipt | {
                "seeds": [asset.seed for asset in assets],
                "assets_sha256": [asset.sha256 for asset in assets],
            }
            return JobRendered(
                request_id=job.request_id, assets=assets, receipt=receipt, seconds=track.seconds
            )

        return work

    def _time_of(self, job: RenderJob, phase: str, seconds: float) -> _Took:
        pixels = shape_of(job.params).pixels
        return _Took(job.model, phase, pixels, job.params.num_images, seconds)

    def _learn(self) -> None:
        """From jobs that are over."""
        while self._took:
            took = self._took.popleft()
            if took.phase == HOST_PHASE:
                self._leases.took(took.model, took.phase, took.pixels, took.pictures, took.seconds)
                continue
            self._paces.learn(took.model, took.phase, took.pixels, took.pictures, took.seconds)
            self._jobs_rendered += took.phase == "save"

    def _load(self, spec: ModelSpec) -> Sdxl | Wan:
        self._configs[spec.id] = configs_sha256(spec)
        if spec.kind == "wan":
            return Wan(spec, self._device, self._state_dir, self._leases)
        return Sdxl(spec, self._device, self._state_dir, self._leases, self._long_prompts)


def can_share(first: Run, run: Run) -> bool:
    """Whether a job allows, as the first one does, what sharing its batch changes."""
    shape = first.job.params.batch_shape
    return (
        "bit" not in (first.job.exactness, run.job.exactness)
        and isinstance(run.model, Sdxl)
        and run.model is first.model
        and shape is not None
        and run.job.params.batch_shape == shape
    )

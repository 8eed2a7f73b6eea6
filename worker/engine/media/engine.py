"""The media engine: one job at a time; each image of a job is a render of its own.

Cancellation and new messages are taken after every denoise step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from worker.catalog import Catalog, ModelSpec
from worker.engine.answers import answer, quietly
from worker.engine.host import Outbox, Report, Ticket
from worker.engine.media.files import save_image, save_video
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.engine.residents import Residents
from worker.errors import Cancelled, InvalidRequest
from worker.protocol.messages import (
    AssetFile,
    JobRendered,
    LoadModel,
    Message,
    Progress,
    RenderJob,
    UnloadModel,
    failed,
)
from worker.receipt import text_sha256

log = logging.getLogger(__name__)


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
        clock: Callable[[], float] = time.monotonic,
    ):
        self._device = device
        self._state_dir = state_dir
        self._outbox = outbox
        self._clock = clock
        self._models: Residents[Sdxl | Wan] = Residents(
            catalog.specs, device, self._load, lambda: outbox.publish(self.report()), max_resident
        )
        self._preload = deque(preload)
        self._waiting: deque[tuple[Ticket, Message]] = deque()
        self._running: Ticket | None = None
        self._cancelled = False  # the running job's
        self._jobs_rendered = 0
        self._steps_done = 0

    # --- what the host calls -------------------------------------------------------------------

    def submit(self, ticket: Ticket, message: Message) -> None:
        """Take a request; every answer and error goes to the outbox."""
        self._waiting.append((ticket, message))

    def cancel(self, ticket: Ticket) -> None:
        """Stop a job: a waiting one now, the running one after its current step."""
        if ticket == self._running:
            self._cancelled = True
            return
        for entry in list(self._waiting):
            if entry[0] == ticket:
                self._waiting.remove(entry)
                error = Cancelled("the job was cancelled before it began")
                self._outbox.send(ticket, failed(ticket.request_id, error))

    def step(self) -> bool:
        """Load a model or do one whole job. False when idle."""
        if self._preload:
            model_id = self._preload.popleft()
            quietly(lambda: self._models.ensure(model_id))
        elif self._waiting:
            self._do(*self._waiting.popleft())
        else:
            return False
        return True

    def report(self) -> Report:
        """Status, models and counts, for the state that fronts see."""
        return self._models.report(
            more_to_load=bool(self._preload),
            active=int(self._running is not None),
            waiting=len(self._waiting),
            counters={"jobs_rendered": self._jobs_rendered, "denoise_steps": self._steps_done},
        )

    # --- work ----------------------------------------------------------------------------------

    def _do(self, ticket: Ticket, message: Message) -> None:
        self._running, self._cancelled = ticket, False
        self._outbox.publish(self.report())
        match message:
            case RenderJob():
                answer(self._outbox, ticket, lambda: self._render(ticket, message))
            case LoadModel():
                answer(self._outbox, ticket, lambda: self._models.load_for(message))
            case UnloadModel():
                answer(self._outbox, ticket, lambda: self._models.unload_for(message))
            case _:
                log.error("the media engine does not take %s", type(message).__name__)
                error = InvalidRequest("the media engine does not take this message")
                self._outbox.send(ticket, failed(ticket.request_id, error))
        self._running = None

    def _render(self, ticket: Ticket, job: RenderJob) -> JobRendered:
        seconds: dict[str, float] = {}
        track = _Track(self._outbox, ticket, job, seconds, self._clock)
        track.phase("load")
        model = self._models.ensure(job.model)
        track.phase("encode")
        counts = model.token_counts(job.params.prompt)
        if job.params.negative_prompt is not None:
            model.token_counts(job.params.negative_prompt)
        render = self._images if isinstance(model, Sdxl) else self._video
        assets = render(model, job, track)  # type: ignore[arg-type]
        track.end()
        self._jobs_rendered += 1
        return JobRendered(
            request_id=job.request_id,
            assets=tuple(assets),
            receipt=self._receipt(job, model, counts, assets),
            seconds=seconds,
        )

    def _images(self, model: Sdxl, job: RenderJob, track: _Track) -> list[AssetFile]:
        assets = []
        for index in range(job.params.num_images):
            seed = job.params.seed + index
            picture = model.image(job.params, seed, lambda step: self._on_step(track, step))
            track.phase("save")
            assets.append(save_image(Path(job.staging_dir), index, picture, seed))
            track.image_done()
        return assets

    def _video(self, model: Wan, job: RenderJob, track: _Track) -> list[AssetFile]:
        frames = model.frames(job.params, lambda step: self._on_step(track, step))
        track.phase("save")
        folder = Path(job.staging_dir)
        if job.output == "image":
            from PIL import Image

            return [save_image(folder, 0, Image.fromarray(frames[0]), job.params.seed)]
        return [save_video(folder, frames, job.params.fps, job.params.seed)]

    def _on_step(self, track: _Track, step: int) -> None:
        """Between two denoise steps: tell, listen, and stop if told to."""
        self._steps_done += 1
        track.step(step)
        self._outbox.poll()
        if self._cancelled:
            raise Cancelled(f"the job was cancelled after step {track.done} of {track.steps}")

    def _receipt(
        self,
        job: RenderJob,
        model: Sdxl | Wan,
        counts: dict[str, int],
        assets: Sequence[AssetFile],
    ) -> dict[str, Any]:
        params = job.params
        return {
            "model": job.model,
            "components": model.components,
            "prompt_sha256": text_sha256(params.prompt),
            "prompt_tokens": counts,
            "parameters": msgspec.to_builtins(params),
            "scheduler_class": model.scheduler_class,
            # Without guidance the pipeline computes no second pass, so nothing reads this text.
            "negative_prompt_used": params.negative_prompt is not None
            and params.guidance_scale > 1,
            "seeds": [asset.seed for asset in assets],
            "assets_sha256": [asset.sha256 for asset in assets],
            "exactness": "bit",
            "device": str(self._device),
            # Sums are split over threads, so another count may round another way.
            "cpu_threads": torch.get_num_threads() if self._device.type == "cpu" else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }

    def _load(self, spec: ModelSpec) -> Sdxl | Wan:
        build = Sdxl if spec.kind == "sdxl" else Wan
        return build(spec, self._device, self._state_dir)


class _Track:
    """Tells where a job is and how long its phases took."""

    def __init__(
        self,
        outbox: Outbox,
        ticket: Ticket,
        job: RenderJob,
        seconds: dict[str, float],
        clock: Callable[[], float],
    ):
        self._outbox = outbox
        self._ticket = ticket
        self._per_image = job.params.steps
        self.steps = job.params.steps * job.params.num_images
        self.done = 0
        self._before = 0  # steps of the images that are finished
        self._seconds = seconds
        self._clock = clock
        self._phase: str | None = None
        self._since = clock()

    def phase(self, name: str) -> None:
        self.end()
        self._phase = name
        self._tell()

    def step(self, step: int) -> None:
        """Step `step` of the current image is done."""
        if self._phase != "denoise":
            self.end()
            self._phase = "denoise"
        self.done = self._before + step
        self._tell()
        if step == self._per_image:
            self.phase("decode")

    def image_done(self) -> None:
        self._before += self._per_image

    def end(self) -> None:
        now = self._clock()
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since = now

    def _tell(self) -> None:
        self._outbox.send(
            self._ticket,
            Progress(
                request_id=self._ticket.request_id,
                phase=self._phase or "load",
                step=self.done,
                steps=self.steps,
            ),
        )

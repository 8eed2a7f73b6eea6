"""The media engine: one job at a time, in phases: encode, denoise, decode.

Each phase computes with other parts of the model and asks for a lease of what it takes; what no
lease keeps on the device may be asked back meanwhile. Cancellation and new messages are taken after
every denoise step and while a lease is waited for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from worker.catalog import Catalog, ModelSpec
from worker.engine.answers import answer, quietly
from worker.engine.device import release_cache
from worker.engine.host import Outbox, Report, Ticket
from worker.engine.leases import Leases
from worker.engine.media.ahead import Ahead
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache, Tensors
from worker.engine.media.files import save_image, save_video
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.engine.residents import Residents
from worker.errors import Cancelled, InvalidRequest, OutOfDeviceMemory
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
from worker.vram.planner import phase_ways, shape_of
from worker.vram.sizes import Peaks
from worker.vram.ways import EXACTNESS

log = logging.getLogger(__name__)

T = TypeVar("T")
WAIT_S = 0.25  # how long a lease is waited for before a look at what else has arrived
MAX_CLIMBS = 4  # ways that a phase tries after the device ran out of memory


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
    ):
        self._device = device
        self._state_dir = state_dir
        self._outbox = outbox
        self._leases = leases
        self._clock = clock
        self._peaks = peaks
        self._ahead = Ahead(leases)
        self._embeddings = EmbeddingCache(state_dir / "embeddings")
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
        if not self._leases.take(message):
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
        elif self._waiting and self._leases.connected:
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
            counters={
                "jobs_rendered": self._jobs_rendered,
                "denoise_steps": self._steps_done,
                "embeddings_found": self._embeddings.hits,
                "embeddings_computed": self._embeddings.misses,
            },
            gauges={
                "device_bytes_held": sum(one.parts.all_held_bytes for one in self._models.loaded()),
            },
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
        counts = model.token_counts(job.params.prompt)
        if job.params.negative_prompt is not None:
            model.token_counts(job.params.negative_prompt)
        taken: list[dict[str, Any]] = []
        texts = model.known_texts(job.params, self._embeddings)
        found = texts is not None
        if texts is None:
            texts = self._phase(
                "encode", model, job, track, taken,
                lambda: model.encode(job.params, self._embeddings),
            )  # fmt: skip
        self._look_ahead(model, job)
        try:
            latents = self._phase(
                "denoise", model, job, track, taken,
                lambda: self._denoise(model, job, texts, track),
            )  # fmt: skip
        finally:
            # Between no steps nobody brings it, and until then its bytes are kept from others.
            self._ahead.forget()
        made: list[Any] = []

        def decode() -> None:
            while latents:  # what is decoded stays so where a later one runs out of memory
                made.append(model.decode(latents[0]))
                del latents[0]

        self._phase("decode", model, job, track, taken, decode)
        track.phase("save")
        assets = self._save(job, made)
        track.end()
        self._jobs_rendered += 1
        receipt = self._receipt(job, model, counts, assets) | {
            "exactness": max((one["exactness"] for one in taken), key=EXACTNESS.index),
            "plan": taken,
            "embeddings": "found" if found else "computed",
        }
        return JobRendered(
            request_id=job.request_id, assets=tuple(assets), receipt=receipt, seconds=seconds
        )

    def _phase(
        self,
        name: str,
        model: Sdxl | Wan,
        job: RenderJob,
        track: _Track,
        taken: list[dict[str, Any]],
        work: Callable[[], T],
    ) -> T:
        """Run a phase in the cheapest way that can be had; out of memory, in the next one.

        taken: gets what was done. Raises OutOfDeviceMemory and what `work` raises.
        """
        phase = model.phases(job.params)[name]
        asked = phase_ways(
            self._models.spec(job.model), phase, model.parts.sizes(), self._peaks,
            shape_of(job.params), steps=job.params.steps, images=job.params.num_images,
            exactness=job.exactness,
        )  # fmt: skip
        left = asked.ways
        for climbs in range(MAX_CLIMBS + 1):
            with self._leases.phase(
                job.request_id, name, left, lambda: self._wait(track), priority=job.priority,
                keep_alive_s=job.keep_alive_s,
                model=asked.model, work=asked.work, pixels=asked.pixels,
            ) as lease:  # fmt: skip
                track.phase(name)
                way = lease.way
                try:
                    with model.parts.ready(lease, phase.parts):
                        result = work()
                    taken.append(
                        {"phase": name, "way": way.name, "exactness": way.exactness}
                        | ({"out_of_memory": climbs} if climbs else {})
                    )
                    return result
                except torch.OutOfMemoryError as exc:
                    lease.failed = True
                    log.warning("%s (%s) ran out of device memory: %s", name, way.name, exc)
            # Here, outside of the except: its traceback would keep the tensors alive.
            release_cache(self._device)
            left = left[left.index(way) + 1 :]
            if not left:
                break
        raise OutOfDeviceMemory(
            f"the device ran out of memory in {name}, in every way that {job.exactness} allows, "
            f"with {job.params.width}x{job.params.height}; a smaller size would do",
            retry_after_s=5,
        )

    def _denoise(
        self, model: Sdxl | Wan, job: RenderJob, texts: Tensors, track: _Track
    ) -> list[torch.Tensor]:
        """Latents of every image, so that the denoiser comes and goes once for all of them."""
        track.begin_denoising()
        latents = []
        for index in range(job.params.num_images):
            latents.append(
                model.denoise(
                    job.params,
                    texts,
                    Course(
                        job.params.seed + index,
                        lambda step, latents: self._on_step(track, step),
                    ),
                )
            )
            track.image_done()
        return latents

    def _save(self, job: RenderJob, made: Sequence[Any]) -> list[AssetFile]:
        """made: pictures, or the frames of one video."""
        folder, params = Path(job.staging_dir), job.params
        if self._models.spec(job.model).kind == "sdxl":
            return [
                save_image(folder, index, picture, params.seed + index)
                for index, picture in enumerate(made)
            ]
        frames = made[0]
        if job.output == "image":
            from PIL import Image

            return [save_image(folder, 0, Image.fromarray(frames[0]), params.seed)]
        return [save_video(folder, frames, params.fps, params.seed)]

    def _look_ahead(self, model: Sdxl | Wan, job: RenderJob) -> None:
        """Ask for what comes after the denoising, of this job and of the next one."""
        phases = model.phases(job.params)
        self._ahead.want(job.request_id, model.parts, phases["decode"].parts)
        if job.next_model is not None and job.next_model in self._models:
            following = self._models.get(job.next_model)
            for names in following.parts_in_order():
                self._ahead.want(job.request_id, following.parts, names)

    def _wait(self, track: _Track) -> None:
        """For a lease."""
        track.phase("wait")
        self._ahead.forget()  # nobody brings it meanwhile, and it may be what is waited for
        self._outbox.wait(WAIT_S)
        if self._cancelled:
            raise Cancelled("the job was cancelled while it waited for device memory")

    def _on_step(self, track: _Track, step: int) -> None:
        """Between two denoise steps: tell, listen, and stop if told to."""
        self._steps_done += 1
        track.step(step)
        self._outbox.poll()
        self._ahead.bring()
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
            "negative_prompt_used": params.negative_prompt is not None and params.guided,
            "seeds": [asset.seed for asset in assets],
            "assets_sha256": [asset.sha256 for asset in assets],
            "device": str(self._device),
            # Sums are split over threads, so another count may round another way.
            "cpu_threads": torch.get_num_threads() if self._device.type == "cpu" else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }

    def _load(self, spec: ModelSpec) -> Sdxl | Wan:
        build = Sdxl if spec.kind == "sdxl" else Wan
        return build(spec, self._device, self._state_dir, self._leases)


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
        if name != self._phase:
            self.end()
            self._phase = name
            self._tell()

    def begin_denoising(self) -> None:
        self.done = self._before = 0

    def step(self, step: int) -> None:
        """Step `step` of the current image is done."""
        self.done = self._before + step
        self._tell()

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

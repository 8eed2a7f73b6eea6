"""One job, phase by phase: its pictures are made here, and what its receipt says of them.

Each phase computes with other parts of the model and asks for a lease of what it takes; what no
lease keeps on the device may be asked back meanwhile, and a denoising may be asked to pause.
Cancellation and new messages are taken after every denoise step and while a lease is waited for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from worker.catalog import ModelSpec
from worker.engine.device import release_cache
from worker.engine.host import Outbox
from worker.engine.leases import Leases, Question
from worker.engine.media.ahead import Ahead
from worker.engine.media.checkpoints import Keeper, job_fingerprint
from worker.engine.media.denoising import Denoising, Paused
from worker.engine.media.embeddings import EmbeddingCache, Tensors, computed_on
from worker.engine.media.previews import Glimpses, Previews
from worker.engine.media.progress import Track
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.engine.residents import Residents
from worker.errors import Cancelled, OutOfDeviceMemory
from worker.protocol.messages import RenderJob
from worker.receipt import text_sha256
from worker.vram.planner import phase_ways, shape_of
from worker.vram.sizes import Peaks
from worker.vram.ways import EXACTNESS

log = logging.getLogger(__name__)

T = TypeVar("T")
WAIT_S = 0.25  # how long a lease is waited for before a look at what else has arrived
MAX_CLIMBS = 4  # ways that a phase tries after the device ran out of memory


@dataclass(slots=True)
class Run:
    """A job while it is rendered. Engine thread only."""

    job: RenderJob
    spec: ModelSpec
    model: Sdxl | Wan
    configs: str  # names the model's configs, as they were loaded
    track: Track
    given: Any = None  # what the job brings with it; None where it brings nothing
    taken: list[dict[str, Any]] = field(default_factory=list)  # what was done, by phase

    @property
    def more(self) -> dict[str, Any]:
        return {} if self.given is None else {"given": self.given}

    @property
    def vae(self) -> tuple[Any, str]:
        """The VAE and the hash of its weights."""
        components = self.model.components
        return self.model.parts["vae"].module, components.get("vae") or components["checkpoint"]


@dataclass(frozen=True, slots=True)
class Made:
    """The pictures of a job, in host memory, and its receipt but for what their files add."""

    pictures: list[Any]  # PIL images, or the frames of one video
    receipt: dict[str, Any]


class Renderer:
    """Makes pictures, one job at a time. Engine thread only."""

    def __init__(
        self,
        device: torch.device,
        outbox: Outbox,
        leases: Leases,
        peaks: Peaks,
        models: Residents[Sdxl | Wan],
        embeddings: EmbeddingCache,
        previews: Previews,
        is_cancelled: Callable[[], bool],
        clock: Callable[[], float],
    ):
        """is_cancelled: whether the job that is rendered is to end."""
        self.counters = Counter(dict.fromkeys(("denoise_steps", "pauses", "jobs_resumed"), 0))
        self._device = device
        self._outbox = outbox
        self._leases = leases
        self._ahead = Ahead(leases)
        self._peaks = peaks
        self._models = models
        self._embeddings = embeddings
        self._previews = previews
        self._is_cancelled = is_cancelled
        self._clock = clock

    def render(self, run: Run, checkpoint_every_s: float) -> Made:
        """Raises Cancelled, and what the phases raise."""
        job, model, params = run.job, run.model, run.job.params
        model.check(params)
        counts = model.token_counts(params.prompt)
        if params.negative_prompt is not None:
            model.token_counts(params.negative_prompt)
        run.given = model.given(params, job.references)
        keeper = self._keeper(run, checkpoint_every_s)
        glimpses = Glimpses(self._previews.of(*run.vae), self._clock)
        denoising = Denoising(model, params, run.more, run.track, keeper, glimpses)
        self.counters["jobs_resumed"] += denoising.resumed_from > 0
        found = None if denoising.is_over else self._denoised(run, denoising)
        pictures = self._decoded(run, denoising.take())
        receipt = {
            "model": job.model,
            "components": model.components,
            "prompt_sha256": text_sha256(params.prompt),
            "prompt_tokens": counts,
            "parameters": msgspec.to_builtins(params),
            "scheduler_class": denoising.scheduler_class,
            # Without guidance the pipeline computes no second pass, so nothing reads this text.
            "negative_prompt_used": params.negative_prompt is not None and params.guided,
            "device": str(self._device),
            # Sums are split over threads, so another count may round another way.
            "cpu_threads": torch.get_num_threads() if self._device.type == "cpu" else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
            "exactness": max((one["exactness"] for one in run.taken), key=EXACTNESS.index),
            "plan": run.taken,
            "embeddings": found,
            "paused": sum(one.get("paused", 0) for one in run.taken),
            **(run.given.receipt if run.given is not None else {}),
        }
        if job.checkpoint is not None:
            resumed_from = denoising.resumed_from
            receipt |= {
                "resumed_from": resumed_from,
                "checkpoint": f"refused: {keeper.refused}"
                if keeper.refused
                else "resumed"
                if resumed_from
                else "none",
                "checkpoints_written": keeper.written,
            }
        return Made(pictures, receipt)

    # --- phases ----------------------------------------------------------------------------------

    def _denoised(self, run: Run, denoising: Denoising) -> str:
        """All phases up to the latents. Returns where the embeddings of the texts are from."""
        model, params = run.model, run.job.params
        phases = model.phases(params)
        if "picture" in phases:
            assert isinstance(model, Sdxl)
            self._phase("picture", run, lambda _: model.see(params, run.given))
        known = model.known_texts(params, self._embeddings)
        texts: Tensors = (
            known
            if known is not None
            else self._phase(
                "encode", run, lambda _: model.encode(params, self._embeddings, **run.more)
            )
        )

        def listen() -> None:
            self.counters["denoise_steps"] += 1
            self._outbox.poll()
            if self._is_cancelled():
                done, steps = run.track.done, run.track.steps
                raise Cancelled(f"the job was cancelled after step {done} of {steps}")

        def denoise(lease: Question) -> None:
            self._look_ahead(run)
            try:
                denoising.run(texts, lambda: lease.wanted_back, listen, self._ahead.bring)
            finally:
                # Between no steps nobody brings it, and until then its bytes are kept from others.
                self._ahead.forget()

        if "denoise" in phases:
            self._phase("denoise", run, denoise, lambda: denoising.share_left)
        else:  # what the job begins from is what it ends with
            denoising.run(texts, lambda: False, listen, lambda: None)
        return "computed" if known is None else "found"

    def _decoded(self, run: Run, latents: list[torch.Tensor]) -> list[Any]:
        made: list[Any] = []

        def decode(_: Question) -> None:
            while latents:  # what is decoded stays so where a later one runs out of memory
                one = latents[0].to(self._device)
                made.append(run.model.decode(one))
                del latents[0]
                self._previews.learn(*run.vae, one, made[-1])

        self._phase("decode", run, decode)
        return made

    def _phase(
        self,
        name: str,
        run: Run,
        work: Callable[[Question], T],
        share_left: Callable[[], float] = lambda: 1.0,
    ) -> T:
        """Run a phase in the cheapest way that can be had; out of memory, in the next one; after a
        pause, go on. share_left: of its work.

        Raises OutOfDeviceMemory and what `work` raises.
        """
        job, model, params = run.job, run.model, run.job.params
        phase = model.phases(params)[name]
        asked = phase_ways(
            run.spec, phase, model.parts.sizes(), self._peaks, shape_of(params),
            steps=params.passes, images=params.num_images, exactness=job.exactness,
        )  # fmt: skip
        left, climbs, pauses = asked.ways, 0, 0
        while left and climbs <= MAX_CLIMBS:
            with self._leases.phase(
                job.request_id, name, left, lambda: self._wait(run.track), priority=job.priority,
                keep_alive_s=job.keep_alive_s, pausable=name == "denoise",
                model=asked.model, work=asked.work * share_left(), pixels=asked.pixels,
            ) as lease:  # fmt: skip
                run.track.phase(name)
                way = lease.way
                try:
                    with model.parts.ready(lease, phase.parts):
                        result = work(lease)
                    run.taken.append(
                        {"phase": name, "way": way.name, "exactness": way.exactness}
                        | ({"out_of_memory": climbs} if climbs else {})
                        | ({"paused": pauses} if pauses else {})
                    )
                    return result
                except torch.OutOfMemoryError as exc:
                    log.warning("%s (%s) ran out of device memory: %s", name, way.name, exc)
                    climbs += 1
                    left = left[left.index(way) + 1 :]
                except Paused:
                    log.info("%s pauses after step %d", name, run.track.done)
                    self.counters["pauses"] += 1
                    pauses += 1
                    run.track.phase("wait")
                # Here, outside of the except: its traceback would keep the tensors alive. Before
                # the lease is given back: others are granted these bytes then.
                lease.failed = True
                release_cache(self._device)
        raise OutOfDeviceMemory(
            f"the device ran out of memory in {name}, in every way that {job.exactness} allows, "
            f"with {params.width}x{params.height}; a smaller size would do",
            retry_after_s=5,
        )

    def _wait(self, track: Track) -> None:
        """For a lease."""
        track.phase("wait")
        self._ahead.forget()  # nobody brings it meanwhile, and it may be what is waited for
        self._outbox.wait(WAIT_S)
        if self._is_cancelled():
            raise Cancelled("the job was cancelled while it waited for device memory")

    def _look_ahead(self, run: Run) -> None:
        """Ask for what comes after the denoising, of this job and of the next one."""
        job, model = run.job, run.model
        self._ahead.want(job.request_id, model.parts, model.phases(job.params)["decode"].parts)
        if job.next_model is not None and job.next_model in self._models:
            following = self._models.get(job.next_model)
            for names in following.parts_in_order():
                self._ahead.want(job.request_id, following.parts, names)

    # --- small things ----------------------------------------------------------------------------

    def _keeper(self, run: Run, every_s: float) -> Keeper:
        job = run.job
        if job.checkpoint is None:
            return Keeper(None, "", every_s, self._clock)
        fingerprint = job_fingerprint(
            job.params, job.references,
            components=run.model.components, configs=run.configs, dtype=run.spec.dtype,
            given=run.given.receipt if run.given is not None else None,
            **computed_on(self._device),
        )  # fmt: skip
        return Keeper(Path(job.checkpoint), fingerprint, every_s, self._clock)

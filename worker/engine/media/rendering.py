"""A job, phase by phase: its pictures are made here, and what its receipt says of them.

Each phase computes with other parts of the model and asks for a lease of what it takes; what no
lease keeps on the device may be asked back meanwhile, and a denoising may be asked to pause.
Cancellation and new messages are taken after every denoise step and while a lease is waited for.
Several jobs that allow it are denoised in one batch; all else each of them does by itself.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
import torch

from worker.engine.casting import STORED
from worker.engine.device import release_cache
from worker.engine.host import Outbox
from worker.engine.leases import Leases, Question
from worker.engine.media.ahead import Ahead
from worker.engine.media.batch import Batch, text_shapes
from worker.engine.media.checkpoints import Keeper, job_fingerprint
from worker.engine.media.denoising import Denoising, Paused, keep_way
from worker.engine.media.embeddings import EmbeddingCache, Tensors, computed_on
from worker.engine.media.previews import Glimpses, Previews
from worker.engine.media.run import Run
from worker.engine.media.sdxl import Sdxl
from worker.engine.media.wan import Wan
from worker.engine.residents import Residents
from worker.errors import Cancelled, OutOfDeviceMemory
from worker.protocol.messages import PhaseWays
from worker.receipt import text_sha256
from worker.versions import computing
from worker.vram.phases import DENOISERS, Phase
from worker.vram.planner import batch_ways, phase_ways, shape_of
from worker.vram.sizes import Peaks
from worker.vram.ways import least_exact, strictest

log = logging.getLogger(__name__)

T = TypeVar("T")
WAIT_S = 0.25  # how long a lease is waited for before a look at what else has arrived
MAX_CLIMBS = 4  # ways that a phase tries after the device ran out of memory
NOTHING_EARLIER: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Made:
    """The pictures of a job, in host memory, and its receipt but for what their files add."""

    pictures: list[Any]  # PIL images, or the frames of one video
    receipt: dict[str, Any]


class Renderer:
    """Makes pictures, one job or one batch at a time. Engine thread only."""

    def __init__(
        self,
        device: torch.device,
        outbox: Outbox,
        leases: Leases,
        peaks: Peaks,
        models: Residents[Sdxl | Wan],
        embeddings: EmbeddingCache,
        previews: Previews,
        clock: Callable[[], float],
    ):
        names = ("denoise_steps", "pauses", "jobs_resumed", "jobs_in_batches")
        self.counters = Counter(dict.fromkeys(names, 0))
        self._device = device
        self._outbox = outbox
        self._leases = leases
        self._ahead = Ahead(leases)
        self._peaks = peaks
        self._models = models
        self._embeddings = embeddings
        self._previews = previews
        self._clock = clock

    def prepare(self, run: Run) -> None:
        """Look whether the job can be done, and make ready what it brings with it. Touches no
        device; raises what `check` and `given` of the model raise."""
        job, model, params = run.job, run.model, run.job.params
        model.check(params)
        counts = model.token_counts(params.prompt)
        if params.negative_prompt is not None:
            model.token_counts(params.negative_prompt)
        run.given = model.given(params, job.references)
        run.counts = counts

    def read(self, run: Run) -> Tensors:
        """What the denoiser reads of the texts of a prepared job."""
        model, params = run.model, run.job.params
        if run.texts is None:
            run.texts, run.embeddings = model.known_texts(params, self._embeddings), "found"
        if run.texts is None:
            run.texts, run.embeddings = (
                self._phase(
                    "encode", run, lambda _: model.encode(params, self._embeddings, **run.more)
                ),
                "computed",
            )
        return run.texts

    def denoise_together(self, runs: Sequence[Run], leave: Callable[[Run], None]) -> None:
        """Denoise in one batch what prepared jobs make whose texts are read. Those that it made
        have latents then; the others, whose texts have another shape or for which there is no room
        together, are left as they were, to be rendered alone.

        runs: of one model and batch shape, all of which allow it. leave: is given each job that is
        cancelled meanwhile.
        """
        first = runs[0]
        fitting = [run for run in runs if text_shapes(run) == text_shapes(first)]
        if len(fitting) < 2:
            return
        batch = Batch(fitting, self._glimpses, leave)
        shared = {"jobs": len(fitting), "images": batch.images}
        params, phase = first.job.params, first.model.phases(first.job.params)["denoise"]
        asked = batch_ways(
            first.spec, phase, first.model.parts.sizes(), self._peaks,
            steps=params.passes, pictures=batch.images,
            exactness=strictest(run.job.exactness for run in fitting),
        )  # fmt: skip

        def denoise(lease: Question) -> None:
            for run in batch.runs[1:]:  # it is their lease, too
                self._leases.also(lease, run.job.request_id)
            self._look_ahead(first)
            try:
                batch.run(lease.way, lambda: lease.wanted_back, self._step_done, self._ahead.bring)
            finally:
                self._ahead.forget()

        try:
            batch.let_go()
            self._in_some_way(
                batch.runs, phase, asked, denoise, lambda: batch.share_left, batch.let_go,
                batch.ways,
            )  # fmt: skip
        except Cancelled:  # all of them
            return
        except OutOfDeviceMemory as exc:
            log.warning("%d jobs are denoised alone, not together: %s", len(batch.runs), exc)
            return
        for run in batch.runs:
            run.batch = shared
            run.track.phase("wait")  # for the others' decode
        self.counters["jobs_in_batches"] += len(batch.runs)

    def render(self, run: Run, checkpoint_every_s: float) -> Made:
        """Make what is still to be made of a job. Raises Cancelled, and what the phases raise."""
        job, model, params = run.job, run.model, run.job.params
        if run.counts is None:
            self.prepare(run)
        if run.latents is None:
            self._denoise_alone(run, checkpoint_every_s)
        pictures = self._decoded(run)
        receipt = {
            "model": job.model,
            "components": model.components,
            "prompt_sha256": text_sha256(params.prompt),
            "prompt_tokens": run.counts,
            "parameters": msgspec.to_builtins(params),
            "scheduler_class": run.scheduler_class,
            # Without guidance the pipeline computes no second pass, so nothing reads this text.
            "negative_prompt_used": params.negative_prompt is not None and params.guided,
            "device": str(self._device),
            # Sums are split over threads, so another count may round another way.
            "cpu_threads": torch.get_num_threads() if self._device.type == "cpu" else None,
            "versions": computing(),
            "exactness": least_exact(one["exactness"] for one in run.taken),
            "plan": run.taken,
            "embeddings": run.embeddings,
            "paused": sum(one.get("paused", 0) for one in run.taken),
            **(run.given.receipt if run.given is not None else {}),
            **run.told,
            **({"batch": run.batch} if run.batch is not None else {}),
        }
        return Made(pictures, receipt)

    # --- phases ----------------------------------------------------------------------------------

    def _denoise_alone(self, run: Run, checkpoint_every_s: float) -> None:
        keeper = self._keeper(run, checkpoint_every_s)
        denoising = Denoising(
            run.model, run.job.params, run.more, run.track, keeper, self._glimpses(run)
        )
        self.counters["jobs_resumed"] += denoising.resumed_from > 0
        if not denoising.is_over:
            self._denoised(run, denoising)
        elif denoising.ways:
            phase = run.model.phases(run.job.params)["denoise"]
            run.taken.append(_told_of(phase, denoising.ways))
        run.latents, run.scheduler_class = denoising.take(), denoising.scheduler_class
        if run.job.checkpoint is not None:
            run.told = {
                "resumed_from": denoising.resumed_from,
                "checkpoint": f"refused: {keeper.refused}"
                if keeper.refused
                else "resumed"
                if denoising.resumed_from
                else "none",
                "checkpoints_written": keeper.written,
            }

    def _denoised(self, run: Run, denoising: Denoising) -> None:
        """All phases up to the latents."""
        model, params = run.model, run.job.params
        phases = model.phases(params)
        if "picture" in phases:
            assert isinstance(model, Sdxl)
            self._phase("picture", run, lambda _: model.see(params, run.given))
        texts = self.read(run)

        def listen() -> None:
            self._step_done()
            if run.is_cancelled():
                raise run.ended

        def denoise(lease: Question) -> None:
            self._look_ahead(run)
            try:
                denoising.run(
                    texts, lease.way, lambda: lease.wanted_back, listen, self._ahead.bring
                )
            finally:
                # Between no steps nobody brings it, and until then its bytes are kept from others.
                self._ahead.forget()

        if "denoise" in phases:
            self._phase("denoise", run, denoise, lambda: denoising.share_left, denoising.ways)
        else:  # what the job begins from is what it ends with
            denoising.run(texts, None, lambda: False, listen, lambda: None)

    def _step_done(self) -> None:
        self.counters["denoise_steps"] += 1
        self._outbox.poll()

    def _decoded(self, run: Run) -> list[Any]:
        made: list[Any] = []
        latents = run.latents
        assert latents is not None, "it is not denoised"

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
        earlier: Mapping[str, str] = NOTHING_EARLIER,
    ) -> T:
        """Run a phase of one job. share_left: of its work. earlier: ways in which something of it
        was made before, with their exactness.

        Raises OutOfDeviceMemory, Cancelled and what `work` raises.
        """
        job, model, params = run.job, run.model, run.job.params
        phase = model.phases(params)[name]
        asked = phase_ways(
            run.spec, phase, model.parts.sizes(), self._peaks, shape_of(params),
            steps=params.passes, images=params.num_images, exactness=job.exactness,
        )  # fmt: skip

        def look() -> None:
            if run.is_cancelled():
                raise Cancelled("the job was cancelled while it waited for device memory")

        return self._in_some_way([run], phase, asked, work, share_left, look, earlier)

    def _in_some_way(
        self,
        runs: Sequence[Run],
        phase: Phase,
        asked: PhaseWays,
        work: Callable[[Question], T],
        share_left: Callable[[], float],
        look: Callable[[], object],
        earlier: Mapping[str, str],
    ) -> T:
        """Run a phase in the cheapest way that can be had; out of memory, in the next one; after a
        pause, go on.

        runs: that go through it together; some may leave. look: called while a lease is waited
        for; may raise to give up. earlier: as of `_phase`; read when the phase is over. Raises
        OutOfDeviceMemory and what `work` and `look` raise.
        """
        job, params, track = runs[0].job, runs[0].job.params, runs[0].track
        name = phase.name
        keep_alive = [one.job.keep_alive_s for one in runs if one.job.keep_alive_s is not None]
        left, climbs, pauses = asked.ways, 0, 0

        def wait() -> None:
            for one in runs:
                one.track.phase("wait")
            self._ahead.forget()  # nobody brings it meanwhile, and it may be what is waited for
            self._outbox.wait(WAIT_S)
            look()

        while left and climbs <= MAX_CLIMBS:
            with self._leases.phase(
                job.request_id, name, left, wait, max(keep_alive, default=None),
                priority=max(one.job.priority for one in runs), pausable=name == "denoise",
                model=asked.model, work=asked.work * share_left(), pixels=asked.pixels,
            ) as lease:  # fmt: skip
                for one in runs:
                    one.track.phase(name)
                way = lease.way
                try:
                    with runs[0].model.parts.ready(lease, phase.parts):
                        result = work(lease)
                    made_in = dict(earlier)
                    keep_way(made_in, way)
                    for one in runs:
                        one.taken.append(
                            _told_of(phase, made_in)
                            | ({"out_of_memory": climbs} if climbs else {})
                            | ({"paused": pauses} if pauses else {})
                        )
                    return result
                except torch.OutOfMemoryError as exc:
                    log.warning("%s (%s) ran out of device memory: %s", name, way.name, exc)
                    climbs += 1
                    left = left[left.index(way) + 1 :]
                except Paused:
                    log.info("%s pauses after step %d", name, track.done)
                    self.counters["pauses"] += 1
                    pauses += 1
                    for one in runs:
                        one.track.phase("wait")
                # Here, outside of the except: its traceback would keep the tensors alive. Before
                # the lease is given back: others are granted these bytes then.
                lease.failed = True
                release_cache(self._device)
        raise OutOfDeviceMemory(
            f"the device ran out of memory in {name}, in every way that {job.exactness} allows, "
            f"with {params.width}x{params.height}; a smaller size would do",
            retry_after_s=5,
        )

    def _look_ahead(self, run: Run) -> None:
        """Ask for what comes after the denoising, of this job and of the next one."""
        job, model = run.job, run.model
        self._ahead.want(job.request_id, model.parts, model.phases(job.params)["decode"].parts)
        if job.next_model is not None and job.next_model in self._models:
            following = self._models.get(job.next_model)
            for names in following.parts_in_order():
                self._ahead.want(job.request_id, following.parts, names)

    # --- small things ----------------------------------------------------------------------------

    def _glimpses(self, run: Run) -> Glimpses:
        return Glimpses(self._previews.of(*run.vae), self._clock)

    def _keeper(self, run: Run, every_s: float) -> Keeper:
        job = run.job
        if job.checkpoint is None:
            return Keeper(None, "", every_s, self._clock)
        fingerprint = job_fingerprint(
            job.params, job.references,
            components=run.model.components, configs=run.configs, dtype=run.spec.dtype,
            given=run.given.receipt if run.given is not None else None,
            exactness=job.exactness,  # what a stricter job may go on from is no less exact
            **computed_on(self._device),
        )  # fmt: skip
        return Keeper(Path(job.checkpoint), fingerprint, every_s, self._clock)


def _told_of(phase: Phase, ways: Mapping[str, str]) -> dict[str, Any]:
    """For the receipt: the way in which a phase ended, and all that it was made in.

    ways: in their order, with their exactness.
    """
    told: dict[str, Any] = {
        "phase": phase.name, "way": [*ways][-1], "exactness": least_exact(ways.values()),
    }  # fmt: skip
    if len(ways) > 1:
        told["ways"] = [*ways]
    if "quantised" in ways:
        stored = str(STORED).removeprefix("torch.")
        told["quantised"] = {part: stored for part in phase.parts if part in DENOISERS}
    return told

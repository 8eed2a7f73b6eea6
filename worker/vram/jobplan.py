"""What a job asks for, phase by phase, before its model is loaded.

Its engine asks for the same: the shape of a job, its phases and their ways are made by the same
functions (tests/integration/test_plan_is_asked.py), and refused for the same reasons.
"""

from __future__ import annotations

from worker.catalog import ModelSpec
from worker.errors import OutOfRange, Unsupported
from worker.protocol.messages import PhaseWays, RenderParams, TenantSpec
from worker.vram.adapters import adapters_of, require_vace
from worker.vram.phases import Adapters, Shape
from worker.vram.planner import Sizer, host_phase, image_shape, shape_of
from worker.vram.texts import require_short, text_pieces, token_counts
from worker.vram.tokenizers import Tokenizers


class JobPlanner:
    """Asks of image and video jobs. Not for several threads at a time."""

    def __init__(
        self, sizer: Sizer, tokenizers: Tokenizers, *, long_prompts: str, most_pictures: int
    ):
        """long_prompts: chunk | refuse. most_pictures: of a batch that jobs share."""
        self._sizer = sizer
        self._tokenizers = tokenizers
        self._long_prompts = long_prompts
        self._most_pictures = most_pictures

    def tenants(self, spec: ModelSpec) -> tuple[TenantSpec, ...]:
        """Raises ModelUnavailable, and WorkerError when something cannot be measured."""
        return self._sizer.media_tenants(spec)

    def adapters(self, spec: ModelSpec, params: RenderParams) -> Adapters:
        """What it brings with it beside the model's own parts. Raises as `adapters_of`."""
        return adapters_of(spec, params) if spec.kind == "sdxl" else Adapters()

    def phases(
        self, spec: ModelSpec, params: RenderParams, exactness: str, jobs: int = 1
    ) -> tuple[PhaseWays, ...]:
        """In the order in which they are asked for; the last one of a job alone is what is done for
        it beside the device.

        exactness: the least that will do. jobs: so many like this one share a batch. Raises what
        the engine refuses the job with, OutOfRange and Unsupported for jobs that share none, and as
        `tenants`.
        """
        if jobs != 1:
            self._require_sharing(spec, params, exactness, jobs)
        shape = self._shape(spec, params)
        alone = self._sizer.media_phases(
            spec, shape, steps=params.passes, images=params.num_images, exactness=exactness
        )
        if jobs == 1:
            return (*alone, host_phase(spec, shape, params.num_images))
        encode, _, decode = alone
        denoise = self._sizer.media_batch(
            spec, shape, steps=params.passes, pictures=jobs * params.num_images,
            exactness=exactness,
        )  # fmt: skip
        return (*[encode] * jobs, denoise, *[decode] * jobs)

    def _require_sharing(
        self, spec: ModelSpec, params: RenderParams, exactness: str, jobs: int
    ) -> None:
        if jobs < 1:
            raise OutOfRange(f"jobs is {jobs}; allowed: at least 1")
        if spec.kind != "sdxl" or params.batch_shape is None:
            raise Unsupported("videos, and jobs with pictures or LoRAs, share no batch")
        if exactness == "bit":
            raise Unsupported("a batch is shared only where exactness allows close")
        pictures = jobs * params.num_images
        if pictures > self._most_pictures:
            raise OutOfRange(
                f"{jobs} jobs make {pictures} pictures; a batch has at most {self._most_pictures}"
            )

    def _shape(self, spec: ModelSpec, params: RenderParams) -> Shape:
        texts = [text for text in (params.prompt, params.negative_prompt) if text]
        # Without a text nobody has to count, and the model's files need not be there.
        readers = self._tokenizers.of(spec) if texts or params.weighted else ()
        if spec.kind == "wan":
            for text in texts:
                require_short(readers[0].count(text))
            configs = self._sizer.configs(spec)
            own = str(configs["transformer"].get("_class_name", ""))
            require_vace(spec, params, "vace" in configs or own.startswith("WanVACE"))
            return shape_of(params)
        for text in texts:
            token_counts(text, readers, self._long_prompts)
        return image_shape(spec, params, text_pieces(params, readers, self._long_prompts))

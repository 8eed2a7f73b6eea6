"""What models and jobs take on the device, as tenants and ways: from configs, before loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from worker.catalog import ModelSpec
from worker.protocol.messages import PhaseWays, RenderParams, TenantSpec, Way
from worker.vram.adapters import adapters_of
from worker.vram.peak import Question
from worker.vram.phases import (
    WIDTHS,
    Configs,
    Phase,
    Shape,
    block_tokens,
    chat_phases,
    forms,
    graph_phase,
    image_phases,
    reads_pages,
    video_phases,
)
from worker.vram.sizes import Peaks, chat_weight_bytes, part_configs
from worker.vram.ways import HOST_BANDWIDTH, PartBytes, least_exact, tenant_id, ways

WEIGHTS, KV = "weights", "kv"
LEAST_SHARE = 0.25  # of a KV pool: stays when others need its bytes
# Until a load was timed: to build a model, and bytes a second from disk.
BUILD_S, READ_BANDWIDTH = 1.0, 1e9
POOL_BANDWIDTH = 50e9  # bytes a second of a pool that is allocated and cleared
# What is done for a job beside the device: what it brings is read, its files are written.
HOST_PHASE = "host"
GIVEN_FRAMES = {"start": 1, "end": 1, "both": 2}  # of a video, by the mode of its job


@dataclass(frozen=True, slots=True)
class ChatBytes:
    """A chat model on the device."""

    weights: int
    pool: int  # whole KV pool
    least_pool: int  # that it can work with
    pass_peak: int  # of passes, with those that are recorded; reserved as long as there is a pool

    def tenants(self, spec: ModelSpec, *, host_copy: bool) -> tuple[TenantSpec, TenantSpec]:
        """host_copy: whether its weights are parked in host memory when they leave."""
        back_s = self.weights / HOST_BANDWIDTH
        if not host_copy:
            back_s = BUILD_S + self.weights / READ_BANDWIDTH
        pool_bytes = self.pool + self.pass_peak
        about: dict[str, Any] = {
            "model": spec.id,
            "priority": spec.priority,
            "keep_alive_s": spec.keep_alive_s,
        }
        return (
            TenantSpec(
                id=tenant_id(spec.id, WEIGHTS),
                size_bytes=self.weights,
                floor_bytes=self.weights,
                host_copy=host_copy,
                pinned=spec.pinned,
                back_s=back_s,
                **about,
            ),
            # Not pinned with the weights: what a pool has above its floor is for others. Its floor
            # is worth the most, because without it the weights are of no use.
            TenantSpec(
                id=tenant_id(spec.id, KV),
                size_bytes=pool_bytes,
                floor_bytes=self.least_pool + self.pass_peak,
                host_copy=False,
                back_s=pool_bytes / POOL_BANDWIDTH,
                **about,
            ),
        )


@dataclass(frozen=True, slots=True)
class ChatPool:
    """A chat model's whole KV pool."""

    blocks: int
    block_tokens: int
    block_bytes: int


def chat_phase(model: str, least_pool_bytes: int = 0) -> PhaseWays:
    """How a chat model asks for the device, and keeps it. least_pool_bytes: that a request needs of
    the pool, with what is reserved for passes."""
    weights, kv = tenant_id(model, WEIGHTS), tenant_id(model, KV)
    return PhaseWays(
        name="chat",
        ways=(Way(name="whole", tenants=(weights, kv), peak_bytes=0),),
        least_bytes={kv: least_pool_bytes} if least_pool_bytes else {},
    )


def kv_block_bytes(config: Mapping[str, Any], dtype: str, device: str) -> int:
    """Of a block in all layers. config: config.json of a chat model. device: cpu | cuda."""
    heads, size = int(config["num_attention_heads"]), head_size(config)
    per_token = 2 * int(config["num_hidden_layers"]) * WIDTHS[dtype] * size
    tokens = block_tokens(device, dtype, size)
    return per_token * int(config.get("num_key_value_heads") or heads) * tokens


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def shape_of(params: RenderParams) -> Shape:
    """Of one image or video of a job; with a text of one piece and without adapters."""
    return Shape(
        params.width, params.height, params.frames, guided=params.guided,
        given_frames=GIVEN_FRAMES.get(params.mode, 0), references=int(params.mode == "single"),
        from_picture=params.mode in ("image", "copy"), denoised=params.passes > 0,
        weighted_terms=len(params.weighted),
    )  # fmt: skip


def image_shape(spec: ModelSpec, params: RenderParams, text_pieces: int) -> Shape:
    """Of one image of a job, with what it brings with it. Raises as `adapters_of`."""
    return replace(shape_of(params), text_pieces=text_pieces, adapters=adapters_of(spec, params))


def phase_ways(
    spec: ModelSpec,
    phase: Phase,
    parts: Mapping[str, PartBytes],
    peaks: Peaks,
    shape: Shape,
    *,
    steps: int,
    images: int,
    exactness: str,
) -> PhaseWays:
    """The ways of one phase of a job, as its engine asks for it and as it is planned."""
    texts = 2 if shape.guided else 1
    passes = {  # of the largest part
        "picture": 1,
        "encode": texts,
        "denoise": images * steps * (texts if spec.kind == "wan" else 1),
        "decode": images,
    }[phase.name]
    pixels = shape.pixels  # computed at once
    if phase.name == "encode":
        pixels = 1  # a text has no size
    elif phase.name == "denoise" and spec.kind == "sdxl":
        pixels *= texts
    return PhaseWays(
        name=phase.name,
        ways=ways(
            spec.id,
            {part: parts[part] for part in phase.parts},
            peaks.of_phases(forms(phase, exactness)),
            passes=passes,
        ),
        model=spec.id,
        pixels=pixels,
        work=passes,
    )


def host_phase(spec: ModelSpec, shape: Shape, images: int) -> PhaseWays:
    """What is done for a job beside the device, which asks for nothing."""
    return PhaseWays(name=HOST_PHASE, ways=(), model=spec.id, pixels=shape.pixels, work=images)


def batch_ways(
    spec: ModelSpec,
    phase: Phase,
    parts: Mapping[str, PartBytes],
    peaks: Peaks,
    *,
    steps: int,
    pictures: int,
    exactness: str,
) -> PhaseWays:
    """The ways of denoising so many pictures of SDXL in one batch. phase: the denoising of one of
    them, without adapters. exactness: the least that will do for all of them. Sums over a larger
    batch may round otherwise, so no way is `bit`."""
    whole = replace(
        phase,
        passes=tuple(replace(one, batch=one.batch * pictures) for one in phase.passes),
        beside_bytes=phase.beside_bytes * pictures,
    )
    rungs = ways(
        spec.id,
        {part: parts[part] for part in phase.parts},
        peaks.of_phases(forms(whole, exactness)),
        passes=steps,
    )
    return PhaseWays(
        name=phase.name,
        ways=tuple(
            msgspec.structs.replace(one, exactness=least_exact(["close", one.exactness]))
            for one in rungs
        ),
        model=spec.id,
        pixels=0,  # what a batch takes says nothing of a picture alone
        work=steps,
    )


def part_tenants(spec: ModelSpec, sizes: Mapping[str, PartBytes]) -> tuple[TenantSpec, ...]:
    """Of an image or video model. sizes: by part."""

    def tenant(part: str, size: PartBytes, *, cast: bool) -> TenantSpec:
        held = size.cast if cast else size.whole
        return TenantSpec(
            id=tenant_id(spec.id, part, cast=cast), model=spec.id, size_bytes=held,
            floor_bytes=held, host_copy=True,
            # A denoiser in eight bits leaves whenever the model's own weights come.
            pinned=spec.pinned and not cast,
            priority=spec.priority, keep_alive_s=spec.keep_alive_s,
            back_s=size.whole / HOST_BANDWIDTH,  # it is cast on the device, of what comes whole
        )  # fmt: skip

    return (
        *(tenant(part, size, cast=False) for part, size in sizes.items()),
        *(tenant(part, size, cast=True) for part, size in sizes.items() if size.cast),
    )


class Sizer:
    """Sizes of models and jobs. What is not known yet is measured, which takes seconds."""

    def __init__(self, peaks: Peaks, device: str, *, kv_bytes: int, max_running: int):
        """device: cpu | cuda. kv_bytes, max_running: of each chat model."""
        self._peaks = peaks
        self._device = device
        self._kv_bytes = kv_bytes
        self._max_running = max_running
        self._configs: dict[str, Configs] = {}

    def chat(self, spec: ModelSpec) -> ChatBytes:
        """As it is loaded; its files may hold another type.

        Raises ModelUnavailable, and WorkerError when a pass cannot be measured.
        """
        config = self.configs(spec)["weights"]
        phases = chat_phases(config, spec.dtype, self._device, self._max_running)
        pool = self.chat_pool(spec)
        block, blocks = pool.block_bytes, pool.blocks
        [counted] = self._peaks.ask([phases[-1].passes[0]])
        pass_peak = max(self._peaks.of_phase(phase) for phase in phases)
        if reads_pages(self._device, spec.dtype, head_size(config)):
            pass_peak += self._peaks.of_phase(
                graph_phase(config, spec.dtype, self._max_running, block)
            )
        return ChatBytes(
            weights=chat_weight_bytes(spec, config, counted.weight_bytes, self._device),
            pool=blocks * block,
            least_pool=max(1, int(blocks * LEAST_SHARE)) * block,
            pass_peak=pass_peak,
        )

    def chat_pool(self, spec: ModelSpec) -> ChatPool:
        """Raises ModelUnavailable."""
        config = self.configs(spec)["weights"]
        block = kv_block_bytes(config, spec.dtype, self._device)
        return ChatPool(
            blocks=self._kv_bytes // block,
            block_tokens=block_tokens(self._device, spec.dtype, head_size(config)),
            block_bytes=block,
        )

    def media_tenants(self, spec: ModelSpec) -> tuple[TenantSpec, ...]:
        """Raises as `chat`."""
        return part_tenants(spec, self._parts(spec))

    def media_phases(
        self, spec: ModelSpec, shape: Shape, *, steps: int, images: int, exactness: str
    ) -> tuple[PhaseWays, ...]:
        """Raises as `chat`. exactness: the least that will do."""
        parts, phases = self._parts(spec), self._phases(spec, shape)
        self._peaks.ask(  # together: each time that something has to be measured takes seconds
            [
                question
                for phase in phases
                for form in forms(phase, exactness).values()
                for question in form.questions
            ]
        )
        return tuple(
            phase_ways(
                spec, phase, parts, self._peaks, shape,
                steps=steps, images=images, exactness=exactness,
            )
            for phase in phases
        )  # fmt: skip

    def media_batch(
        self, spec: ModelSpec, shape: Shape, *, steps: int, pictures: int, exactness: str
    ) -> PhaseWays:
        """The denoising of so many pictures of SDXL in one batch. exactness: the least that will do
        for all of them. Raises as `chat`."""
        [denoise] = [one for one in self._phases(spec, shape) if one.name == "denoise"]
        return batch_ways(
            spec, denoise, self._parts(spec), self._peaks,
            steps=steps, pictures=pictures, exactness=exactness,
        )  # fmt: skip

    def configs(self, spec: ModelSpec) -> Configs:
        """Raises ModelUnavailable."""
        if spec.id not in self._configs:
            self._configs[spec.id] = part_configs(spec)
        return self._configs[spec.id]

    def _phases(self, spec: ModelSpec, shape: Shape) -> list[Phase]:
        make = image_phases if spec.kind == "sdxl" else video_phases
        return make(self.configs(spec), spec.dtype, shape)

    def _parts(self, spec: ModelSpec) -> dict[str, PartBytes]:
        """By part. Weights do not depend on the shape, and a small one is measured quickly."""
        questions: dict[str, Question] = {}
        shapes = (Shape(64, 64), Shape(64, 64, given_frames=1))  # every part is in one of them
        for phase in [one for shape in shapes for one in self._phases(spec, shape)]:
            lying = [phase.converted[0]] if phase.converted else [*phase.passes]
            for part, question in zip(phase.parts, lying, strict=False):
                questions.setdefault(part, question)
        answers = self._peaks.ask([*questions.values()])
        return {
            part: PartBytes(
                whole=answer.parked_bytes, streamed=answer.streamed_bytes, cast=answer.cast_bytes
            )
            for part, answer in zip(questions, answers, strict=True)
        }

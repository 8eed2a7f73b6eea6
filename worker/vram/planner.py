"""What models and jobs take on the device, as tenants and ways: from configs, before loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from worker.catalog import ModelSpec
from worker.protocol.messages import PhaseWays, RenderParams, TenantSpec, Way
from worker.vram.peak import Question
from worker.vram.phases import (
    BLOCK_TOKENS,
    WIDTHS,
    Configs,
    Phase,
    Shape,
    chat_phases,
    image_phases,
    video_phases,
)
from worker.vram.sizes import Peaks, chat_weight_bytes, part_configs
from worker.vram.ways import HOST_BANDWIDTH, PartBytes, tenant_id, ways

WEIGHTS, KV = "weights", "kv"
LEAST_SHARE = 0.25  # of a KV pool: stays when others need its bytes
# Until a load was timed: to build a model, and bytes a second from disk.
BUILD_S, READ_BANDWIDTH = 1.0, 1e9
POOL_BANDWIDTH = 50e9  # bytes a second of a pool that is allocated and cleared
GIVEN_FRAMES = {"start": 1, "end": 1, "both": 2}  # of a video, by the mode of its job


@dataclass(frozen=True, slots=True)
class ChatBytes:
    """A chat model on the device."""

    weights: int
    pool: int  # whole KV pool
    least_pool: int  # that it can work with
    pass_peak: int  # of a forward pass; reserved as long as there is a pool

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


def kv_block_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Of BLOCK_TOKENS tokens in all layers. config: config.json of a chat model."""
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    per_token = 2 * int(config["num_hidden_layers"]) * WIDTHS[dtype] * size
    return per_token * int(config.get("num_key_value_heads") or heads) * BLOCK_TOKENS


def shape_of(params: RenderParams) -> Shape:
    """Of one image or video of a job; with a text of one piece and without adapters, which only
    the engine knows."""
    return Shape(
        params.width, params.height, params.frames, guided=params.guided,
        given_frames=GIVEN_FRAMES.get(params.mode, 0), references=int(params.mode == "single"),
        from_picture=params.mode in ("image", "copy"), denoised=params.passes > 0,
        weighted_terms=len(params.weighted),
    )  # fmt: skip


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
    tiled = phase.name == "decode" and exactness != "bit"
    return PhaseWays(
        name=phase.name,
        ways=ways(
            spec.id,
            {part: parts[part] for part in phase.parts},
            peaks.of_phase(phase),
            passes=passes,
            tiled_bytes=peaks.of_phase(phase, tiled=True) if tiled else None,
        ),
        model=spec.id,
        pixels=1 if phase.name == "encode" else shape.pixels,  # a text has no size
        work=passes,
    )


def batch_ways(
    spec: ModelSpec,
    phase: Phase,
    parts: Mapping[str, PartBytes],
    peaks: Peaks,
    *,
    steps: int,
    pictures: int,
) -> PhaseWays:
    """The ways of denoising so many pictures of SDXL in one batch. phase: the denoising of one of
    them, without adapters. Sums over a larger batch may round otherwise, so no way is `bit`."""
    whole = replace(
        phase,
        passes=tuple(replace(one, batch=one.batch * pictures) for one in phase.passes),
        beside_bytes=phase.beside_bytes * pictures,
    )
    rungs = ways(
        spec.id,
        {part: parts[part] for part in phase.parts},
        peaks.of_phase(whole),
        passes=steps,
    )
    close = tuple(
        Way(
            name=one.name,
            tenants=one.tenants,
            peak_bytes=one.peak_bytes,
            longer_s=one.longer_s,
            exactness="close",
        )
        for one in rungs
    )
    return PhaseWays(
        name=phase.name,
        ways=close,
        model=spec.id,
        pixels=0,  # what a batch takes says nothing of a picture alone
        work=steps,
    )


def part_tenants(spec: ModelSpec, sizes: Mapping[str, PartBytes]) -> tuple[TenantSpec, ...]:
    """Of an image or video model. sizes: by part."""
    return tuple(
        TenantSpec(
            id=tenant_id(spec.id, part), model=spec.id, size_bytes=size.whole,
            floor_bytes=size.whole, host_copy=True, pinned=spec.pinned,
            priority=spec.priority, keep_alive_s=spec.keep_alive_s,
            back_s=size.whole / HOST_BANDWIDTH,
        )
        for part, size in sizes.items()
    )  # fmt: skip


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
        block = kv_block_bytes(config, spec.dtype)
        blocks = self._kv_bytes // block
        [counted] = self._peaks.ask([phases[-1].passes[0]])
        return ChatBytes(
            weights=chat_weight_bytes(spec, config, counted.weight_bytes, self._device),
            pool=blocks * block,
            least_pool=max(1, int(blocks * LEAST_SHARE)) * block,
            pass_peak=max(self._peaks.of_phase(phase) for phase in phases),
        )

    def media_tenants(self, spec: ModelSpec) -> tuple[TenantSpec, ...]:
        """Raises as `chat`."""
        return part_tenants(spec, self._parts(spec))

    def media_phases(
        self, spec: ModelSpec, shape: Shape, *, steps: int, images: int, exactness: str
    ) -> tuple[PhaseWays, ...]:
        """Raises as `chat`. exactness: the least that will do."""
        parts = self._parts(spec)
        return tuple(
            phase_ways(
                spec, phase, parts, self._peaks, shape,
                steps=steps, images=images, exactness=exactness,
            )
            for phase in self._phases(spec, shape)
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
            part: PartBytes(whole=answer.weight_bytes, streamed=answer.streamed_bytes)
            for part, answer in zip(questions, answers, strict=True)
        }

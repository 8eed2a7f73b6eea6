"""How one denoising goes: its random numbers, who is told of its steps, and how it goes on from the
middle.

To go on, the pipeline's own call runs again from its beginning, because everything that it prepares
is needed. Until the step that was taken its denoiser and its scheduler compute nothing; after that
step latents, scheduler and generator are made what they were, and from there on nobody can tell the
difference: every later bit is that of a denoising that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import nn

from worker.engine.media.standing_in import standing_in

# Called after denoise step `step` (from 1) with the latents that it made; may raise to end the
# denoising.
OnStep = Callable[[int, torch.Tensor], None]

# Of a scheduler's attributes: its config does not change, and `step` is ours while it is watched.
_NO_STATE = ("_internal_dict", "step")


class CheckpointRefused(Exception):
    """It is not what this denoising can go on from; the message says why, in a word or two.

    Never leaves the engine, which begins anew then.
    """


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of a scheduler's state, in host memory."""

    tensor: torch.Tensor
    on_device: bool  # it was where the latents are; else it belongs to the CPU


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the steps after `step` depend on and that steps change. In host memory, and
    nothing of it is shared with the denoising that goes on."""

    step: int  # that is done; from 1
    latents: torch.Tensor
    generator: torch.Tensor  # state of the CPU generator, uint8; of a batch, one row for each
    # Attributes of the scheduler: None, numbers, texts, lists and tuples of them, and Kept.
    scheduler: dict[str, Any]
    made_by: str  # of which scheduler with which config

    def of_rows(self, rows: Sequence[int]) -> Snapshot:
        """Of a batch: the same of these pictures alone, in this order."""
        shape = self.latents.shape
        return replace(
            self,
            latents=self.latents[[*rows]],
            generator=self.generator[[*rows]],
            scheduler={name: _rows(one, shape, rows) for name, one in self.scheduler.items()},
        )


class Course:
    """One denoising of one picture or video, or of a batch of pictures. Engine thread only."""

    def __init__(self, seed: int | Sequence[int], on_step: OnStep, begin: Snapshot | None = None):
        """seed: of the CPU generator that every random number comes from; of a batch, one for each
        picture. begin: where it goes on; nobody is told of the steps up to there."""
        self._is_batch = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else seed
        self._generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        self._on_step = on_step
        self._begin = begin
        self._scheduler: Any = None
        self._last = _Step()

    @contextmanager
    def of(self, pipeline: Any, denoiser: nn.Module) -> Iterator[dict[str, Any]]:
        """Arguments of the pipeline's call, which has to happen within it; the pipeline has its
        fresh scheduler by now. denoiser: the module that it calls in every step.

        Raises CheckpointRefused where the call cannot go on from `begin`.
        """
        self._scheduler = scheduler = pipeline.scheduler
        begin = self._begin
        if begin is not None and begin.made_by != _kind(scheduler):
            raise CheckpointRefused("of another scheduler")

        def step_done(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal begin
            step = index + 1
            if begin is None:
                self._last.done, self._last.latents = step, tensors["latents"]
                self._on_step(step, tensors["latents"])
                self._last = _Step()  # nothing of it is held while the next one computes
            elif step == begin.step:
                tensors["latents"] = self._restored(begin, tensors["latents"])
                begin = None
                idling.close()
            return tensors

        vars(scheduler)["step"] = self._watched(scheduler.step, lambda: begin is not None)
        with ExitStack() as idling:
            if begin is not None:
                idling.enter_context(_idle(denoiser))
            try:
                generator = self._generators if self._is_batch else self._generators[0]
                yield {"generator": generator, "callback_on_step_end": step_done}
                if begin is not None:
                    raise CheckpointRefused("of a longer schedule")
            finally:
                vars(scheduler).pop("step")
                self._last = _Step()

    def snapshot(self) -> Snapshot | None:
        """Within `on_step`: what the denoising can go on from after this step. None for a scheduler
        whose state is more than values and tensors, such as a random generator of its own."""
        last = self._last
        assert last.latents is not None, "no step has just been done"
        device = last.latents.device
        try:
            state = {
                name: _kept(value, device)
                for name, value in vars(self._scheduler).items()
                if name not in _NO_STATE
            }
        except _Unkeepable:
            return None
        states = [one.get_state() for one in self._generators]
        return Snapshot(
            step=last.done,
            latents=_copied(last.latents),
            generator=torch.stack(states) if self._is_batch else states[0],
            scheduler=state,
            made_by=_kind(self._scheduler),
        )

    def expected(self) -> torch.Tensor:
        """Within `on_step`: the latents at the end, as the step that was just done expects them;
        those that it made where its scheduler does not say."""
        last = self._last
        assert last.latents is not None, "no step has just been done"
        found: torch.Tensor | None = getattr(last.made, "pred_original_sample", None)
        config = getattr(self._scheduler, "config", {})
        outputs = getattr(self._scheduler, "model_outputs", None) or [None]
        if found is None and _predicts_the_end(config):
            found = outputs[-1]
        if found is None and last.sigma is not None:  # of a flow
            assert last.before is not None and last.model_output is not None
            found = last.before - last.sigma * last.model_output
        return last.latents if found is None else found

    def _restored(self, begin: Snapshot, latents: torch.Tensor) -> torch.Tensor:
        """Make scheduler and generator what they were; returns the latents as they were."""
        if (begin.latents.shape, begin.latents.dtype) != (latents.shape, latents.dtype):
            raise CheckpointRefused("of another size")
        vars(self._scheduler).update(
            {name: _given_back(value, latents.device) for name, value in begin.scheduler.items()}
        )
        states = begin.generator if self._is_batch else begin.generator.unsqueeze(0)
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state.clone())  # torch crashes on a row that begins elsewhere
        return _copied(begin.latents, latents.device)

    def _watched(self, step: Callable[..., Any], idle: Callable[[], bool]) -> Callable[..., Any]:
        """A scheduler's step that does nothing while `idle`, and remembers what it did else."""

        @wraps(step)  # pipelines look at the names of its arguments
        def watched(model_output: Any, timestep: Any, sample: Any, *args: Any, **more: Any) -> Any:
            if idle():
                return (sample,)
            self._last = _Step(before=sample, model_output=model_output)
            if type(self._scheduler).__name__.startswith("FlowMatch"):
                number = self._scheduler.step_index
                self._last.sigma = float(self._scheduler.sigmas[number or 0])
            if more.get("return_dict", True) or args:
                return step(model_output, timestep, sample, *args, **more)
            self._last.made = step(model_output, timestep, sample, **{**more, "return_dict": True})
            return (self._last.made.prev_sample,)

        return watched


@dataclass(slots=True)
class _Step:
    """What is known of the step that was just done, until its listener returns."""

    done: int = 0
    latents: torch.Tensor | None = None
    before: torch.Tensor | None = None
    model_output: torch.Tensor | None = None
    sigma: float | None = None
    made: Any = None  # the scheduler's output


class _Unkeepable(Exception):
    """A value of a scheduler that is no plain one."""


@contextmanager
def _idle(denoiser: nn.Module) -> Iterator[None]:
    """Within it a denoiser computes nothing and answers with zeros that take no memory. Its hooks
    run; its blocks, and what streams them, are not called at all."""
    channels = getattr(getattr(denoiser, "config", None), "out_channels", None)

    def zeros(*args: Any, **more: Any) -> tuple[torch.Tensor]:
        # The UNet is called by position, the transformers of WAN by name.
        sample: torch.Tensor = args[0] if args else more["hidden_states"]
        batch, width, *rest = sample.shape
        return (sample.new_zeros(1).expand(batch, channels or width, *rest),)

    with standing_in(denoiser, zeros):
        yield


def _predicts_the_end(config: Any) -> bool:
    """Whether what a multistep scheduler keeps of its last steps is where they would end."""
    return bool(config.get("predict_x0")) or str(config.get("algorithm_type", "")).endswith(
        "dpmsolver++"
    )


def _kind(scheduler: Any) -> str:
    """Names a scheduler's class and config."""
    config = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    body = json.dumps(config, sort_keys=True, default=str)
    return f"{type(scheduler).__name__} {hashlib.sha256(body.encode()).hexdigest()}"


def laid_out(
    tensor: torch.Tensor, stride: Sequence[int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A copy with these strides: by them a convolution chooses its kernel, and kernels round in
    different ways. Where elements would share a place, it is contiguous."""
    shape = tensor.shape
    if any(step == 0 and size > 1 for step, size in zip(stride, shape, strict=True)):
        return tensor.to(device, copy=True).contiguous()
    return torch.empty_strided(shape, tuple(stride), dtype=tensor.dtype, device=device).copy_(
        tensor
    )


def _copied(tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    return laid_out(tensor.detach(), tensor.stride(), device)


def _kept(value: Any, device: torch.device) -> Any:
    """A value of a scheduler's state, for a snapshot. device: where the latents are."""
    match value:
        case torch.Tensor():
            on_device = value.device == device and device.type != "cpu"
            return Kept(_copied(value), on_device)
        case list():
            return [_kept(one, device) for one in value]
        case tuple():
            return tuple(_kept(one, device) for one in value)
        case None | bool() | int() | float() | str():
            return value
    raise _Unkeepable


def _rows(value: Any, shape: torch.Size, rows: Sequence[int]) -> Any:
    """Of a value of a snapshot's scheduler: what belongs to these rows of a batch of `shape`."""
    match value:
        case Kept() if value.tensor.shape == shape:
            return Kept(value.tensor[[*rows]], value.on_device)
        case list():
            return [_rows(one, shape, rows) for one in value]
        case tuple():
            return tuple(_rows(one, shape, rows) for one in value)
    return value


def _given_back(value: Any, device: torch.device) -> Any:
    """The inverse of `_kept`; a copy, so that a snapshot can be taken up twice."""
    match value:
        case Kept():
            return _copied(value.tensor, device if value.on_device else "cpu")
        case list():
            return [_given_back(one, device) for one in value]
        case tuple():
            return tuple(_given_back(one, device) for one in value)
    return value

"""Where chat models are: brought when wanted, taken away and resized when the broker asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from worker.catalog import ModelSpec
from worker.engine.answers import quietly
from worker.engine.chat.forward import Forward
from worker.engine.chat.lane import Lane
from worker.engine.chat.model import LanguageModel
from worker.engine.chat.scheduler import TokenSequence
from worker.engine.leases import Leases
from worker.engine.residents import Residents
from worker.errors import ModelUnavailable
from worker.protocol.messages import Yield
from worker.vram.planner import KV, WEIGHTS, ChatBytes, Sizer

COMPILE_AFTER_S = 20.0  # that a model has been here


class Residency:
    """Owner of the lanes and of all that is on the device. Engine thread only."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        models: Residents[LanguageModel],
        device: torch.device,
        leases: Leases,
        sizer: Sizer,
        clock: Callable[[], float],
        *,
        preload: Sequence[str],
        compiled: Path | None,
        pinned: Sequence[str],
        pinned_deterministic: bool,
    ):
        """preload: models that are brought before the first request. compiled: where compiled code
        is kept; None where nothing is compiled. pinned: as ChatEngine takes it."""
        self._models = models
        self._leases = leases
        self._sizer = sizer
        self._clock = clock
        self._preload = deque(preload)
        self._of_the_start = frozenset(preload)
        # On a card the time goes into the kernels' launches, which CUDA graphs save.
        self._compiled = compiled if device.type == "cpu" else None
        self._compiling: Forward | None = None
        self._pinned = tuple(pinned)
        self._pinned_deterministic = pinned_deterministic
        self._grown: set[str] = set()  # models whose pinned prompts may have room now
        host_copy = LanguageModel.parks(device)
        self._lanes = {
            spec.id: Lane(spec, partial(self._sizes, spec), leases, self, host_copy=host_copy)
            for spec in specs
        }

    @property
    def is_starting(self) -> bool:
        """A model of the start is still to come."""
        return bool(self._preload)

    def lane(self, model_id: str) -> Lane:
        return self._lanes[model_id]

    # --- coming ----------------------------------------------------------------------------------

    def bring_the_first(self) -> bool:
        """Whether something was done for the models that are brought before the first request."""
        if not self._preload:
            return False
        lane = self._lanes[self._preload[0]]
        if not lane.here:
            quietly(partial(lane.want, "start"))  # says so when it was refused
        if lane.granted:
            quietly(partial(self._bring, lane))
        if lane.wanted:
            return False  # for its lease, or while it is loaded
        self._preload.popleft()
        return True

    def is_here(self, model_id: str, request_id: str, pool_bytes: int) -> bool:
        """Whether a model can compute; asks for what it lacks. Raises what bringing it raises.

        pool_bytes: that the request is known to need of the pool.
        """
        lane = self._lanes[model_id]
        if lane.here and not lane.leaving:
            return True
        if lane.leaving:
            return False
        if self._models.coming is not None and not lane.is_declared:
            return False  # to find its sizes a model is built, and only one may be at a time
        lane.want(request_id, pool_bytes)
        if lane.granted:
            self._bring(lane)
        return lane.here

    def also_waits(self, model_id: str, request_id: str) -> None:
        """One more request waits for a model."""
        lane = self._lanes[model_id]
        if lane.wanted and not lane.granted:
            lane.also(request_id)

    def here(self) -> list[tuple[str, LanguageModel]]:
        """Models that can compute."""
        return [(name, self._models.get(name)) for name, lane in self._lanes.items() if lane.here]

    def make_room(self, model_id: str, sequence: TokenSequence, request_id: str) -> None:
        """Ask for a pool that holds a sequence, and grow to it once that is granted.

        Raises OutOfDeviceMemory where it can never be had, and what growing raises.
        """
        lane, model = self._lanes[model_id], self._models.get(model_id)
        granted_bytes = lane.want_room(request_id, model.pool_bytes_for(sequence))
        if granted_bytes is None:
            return
        try:
            model.resize(granted_bytes)
        except Exception:
            lane.has_room(0)
            raise
        sequence.has_room = True
        lane.has_room(model.pool_bytes)
        self._grown.add(model_id)

    def pin_one(self) -> bool:
        """Compute the pinned prompts of a model whose pool has grown: some may have had no room
        before, or have gone. Called while nothing runs. False where there is none."""
        while self._grown:
            model_id = self._grown.pop()
            if self._pinned and self._lanes[model_id].here:
                quietly(partial(self._pin, self._models.get(model_id)))
                return True
        return False

    def give_up_all_but(self, wanted: set[str]) -> None:
        """Nobody waits for the other models any more."""
        for model_id, lane in self._lanes.items():
            if not lane.wanted or model_id in wanted or model_id in self._preload:
                continue
            if self._models.coming == model_id:  # it has the memory until it is loaded
                quietly(partial(self._bring, lane))
            else:
                lane.give_up()

    def compile_one(self) -> None:
        """Those of the start first, another once it has been here a while, because compiling takes
        a core for seconds and the model may leave again."""
        if self._compiled is None or self._preload:
            return
        if self._compiling is not None and self._compiling.is_compiling:
            return
        now = self._clock()
        for name, lane in self._lanes.items():
            stays = name in self._of_the_start or now - lane.here_since >= COMPILE_AFTER_S
            if lane.here and stays:
                forward = self._models.get(name).forward
                forward.compile_in_background(self._compiled)
                if forward.is_compiling:
                    self._compiling = forward
                    return

    def _bring(self, lane: Lane) -> None:
        """Put a model where its lease says, or begin to: loading goes on beside the passes of
        other models. Raises what loading raises."""
        model_id = lane.spec.id
        began = self._clock()
        there = model_id in self._models and self._models.get(model_id).on_device
        try:
            model = self._models.ensure_soon(model_id)
            if model is None:
                lane.loading_since = lane.loading_since or began
                return
            model.wake()
            woken = self._clock()
            had_a_pool = model.pool.count > 0
            model.resize(lane.pool_bytes())
            resized = self._clock()
            if not had_a_pool:
                self._pin(model)
        except Exception as exc:
            lane.loading_since = None
            if not isinstance(exc, torch.OutOfMemoryError):  # else its copy in host memory is good
                self._models.drop(model_id)
            if isinstance(exc, ModelUnavailable):
                self._models.broken(model_id, str(exc))
            lane.failed()
            for tenant in (lane.weights, lane.kv):  # also of what was there before
                self._leases.gave(tenant, self.held_bytes(tenant))
            raise
        weights_s = 0.0 if there else woken - (lane.loading_since or began)
        lane.loading_since = None
        lane.arrived(model.pool_bytes, now=resized, weights_s=weights_s, pool_s=resized - woken)

    def _pin(self, model: LanguageModel) -> None:
        model.pin(self._pinned, deterministic=self._pinned_deterministic)

    def _sizes(self, spec: ModelSpec) -> ChatBytes:
        """Raises ModelUnavailable."""
        self._models.require_files(spec.id)
        return self._sizer.chat(spec)

    # --- going -----------------------------------------------------------------------------------

    def give_back(self, order: Yield) -> int | None:
        """What the broker asks for: bytes of a pool, or of a model on which nothing runs."""
        model_id, part = order.tenant.rsplit(".", 1)
        lane = self._lanes[model_id]
        if lane.granted or model_id not in self._models:  # it is being brought, or is not there
            return self.held_bytes(order.tenant)
        model = self._models.get(model_id)
        if order.kind in ("shrink", "grow"):
            self._resize(lane, model, order)
        elif not any(model.scheduler):
            self._take_away(lane, part)
        elif order.wait:
            return None  # `rests` does it
        return self.held_bytes(order.tenant)

    def rests(self, model_id: str, keep_alive_s: float | None) -> None:
        """Nothing runs on a model any more. keep_alive_s: as its last request wished."""
        lane = self._lanes[model_id]
        lane.use(busy=False, keep_alive_s=keep_alive_s)
        if lane.leaving:
            for part in (lane.weights, lane.kv):
                if self._leases.is_wanted(part) is not None:
                    if model_id in self._models:
                        self._take_away(lane, part.rsplit(".", 1)[1])
                    self._leases.gave(part, self.held_bytes(part))

    def unloaded(self, model_id: str) -> None:
        """By hand: the memory goes back, and the lease with it."""
        lane = self._lanes[model_id]
        lane.left()
        if lane.is_declared:
            for tenant in (lane.weights, lane.kv):
                self._leases.gave(tenant, 0)

    def _take_away(self, lane: Lane, part: str) -> None:
        """A tenant leaves the device. Nothing runs on the model."""
        model = self._models.get(lane.spec.id)
        if part == KV:
            model.resize(0)
        elif model.can_park:
            model.park()
        else:
            self._models.drop(lane.spec.id)
            self._leases.gave(lane.kv, 0)  # the pool went with the object
        lane.left()

    def _resize(self, lane: Lane, model: LanguageModel, order: Yield) -> None:
        """Another size for a pool; at least what it has to keep for its sequences."""
        wanted = max(order.held_bytes - lane.sizes.pass_peak, model.needed_pool_bytes)
        if order.kind == "shrink":
            model.resize(min(model.pool_bytes, wanted))
            return
        model.resize(wanted)
        self._grown.add(lane.spec.id)

    # --- what is there ---------------------------------------------------------------------------

    def held_bytes(self, tenant: str) -> int:
        """What is there now, by the model itself."""
        model_id, part = tenant.rsplit(".", 1)
        if model_id not in self._models:
            return 0
        model, sizes = self._models.get(model_id), self._lanes[model_id].sizes
        if part == WEIGHTS:
            return sizes.weights if model.on_device else 0
        return model.pool_bytes + sizes.pass_peak if model.pool.count else 0

    def gauges(self) -> dict[str, int]:
        """Bytes that are held, and those of them that are reserved for passes and lie idle."""
        held = reserved = 0
        for name, lane in self._lanes.items():
            if lane.is_declared:
                held += self.held_bytes(lane.weights) + self.held_bytes(lane.kv)
                if name in self._models and self._models.get(name).pool.count:
                    reserved += lane.sizes.pass_peak
        return {"device_bytes_held": held, "device_bytes_reserved": reserved}

"""Which models of an engine are loaded. One construction at a time.

Libraries patch `torch.nn.Module` and the default type process-wide while they build a model, so
nothing else may be built meanwhile, and what computes meanwhile may not depend on the default type.
Owning all of it in one object of one thread keeps the first true; the second is tested.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from worker.catalog import ModelSpec
from worker.engine.device import compute_alone, release_cache
from worker.engine.host import Report
from worker.errors import ModelUnavailable, OutOfHostMemory
from worker.modelfiles import check_files, require_files, weight_bytes
from worker.protocol.messages import LoadModel, ModelChanged, ModelState, UnloadModel
from worker.vram.probe import host_memory

log = logging.getLogger(__name__)

# Of a model's weights, that loading it takes of host memory at the most: they are read one by one.
LOADING_FACTOR = 1.1
LOADING_NICE = 10  # of the thread that loads; more than the engine's own


class Loaded(Protocol):
    """A model on the device."""

    weight_bytes: int

    def describe(self) -> dict[str, Any]:
        """What /worker/info tells about it."""
        ...

    def close(self) -> None:
        """Give its device memory back to the broker; called once it is no longer used."""
        ...


T = TypeVar("T", bound=Loaded)


class _Coming:
    """A load on its own thread. That thread writes `model` or `error`, and then `done`."""

    def __init__(self, model_id: str, started: float):
        self.model_id = model_id
        self.started = started
        self.done = False
        self.model: Any = None
        self.error: Exception | None = None

    def run(self, load: Callable[[], Any], wake: Callable[[], None]) -> None:
        # Behind the passes of the models that are there, where they compute on the same processor.
        if sys.platform == "linux":  # elsewhere a priority is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICE)
        compute_alone()
        try:
            self.model = load()
        except Exception as exc:  # for the engine thread, which raises it
            self.error = exc
        self.done = True
        wake()


class Residents(Generic[T]):
    """Loaded models by catalog id, least recently used first. Engine thread only."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        device: torch.device,
        load: Callable[[ModelSpec], T],
        changed: Callable[[], None],
        max_resident: int | None = None,
        wake: Callable[[], None] = lambda: None,
        host_free: Callable[[], int] = lambda: host_memory().free_bytes,
    ):
        """load: builds one model. changed: called when what `report` says has changed, before slow
        work begins and before it is answered.

        max_resident: models held at a time; None holds all that were ever used. wake: called on
        another thread when what `ensure_soon` loads has come. host_free: bytes of host memory.
        """
        self._specs = {spec.id: spec for spec in specs}
        self._device = device
        self._load = load
        self._changed = changed
        self._max_resident = max_resident
        self._wake = wake
        self._host_free = host_free
        self._coming: _Coming | None = None
        self._models: dict[str, T] = {}
        self._loads = 0
        self._unloads = 0
        self._states = {
            spec.id: ModelState(
                id=spec.id, kind=spec.kind, status="unloaded", display_name=spec.display_name
            )
            for spec in specs
        }
        for spec in specs:
            problems = check_files(spec)
            if problems:
                self._set(spec.id, status="broken", problem=str(problems[0]))

    def loaded(self) -> list[T]:
        """The models that are loaded now."""
        return list(self._models.values())

    def report(
        self,
        *,
        more_to_load: bool,
        active: int,
        waiting: int,
        counters: dict[str, int],
        gauges: dict[str, int] | None = None,
    ) -> Report:
        """The engine's report: its work and counters, with what is said here of its models."""
        states = tuple(self._states.values())
        loading = more_to_load or any(state.status == "loading" for state in states)
        return Report(
            status="loading" if loading else "ready",
            models=states,
            active=active,
            waiting=waiting,
            counters={**counters, "model_loads": self._loads, "model_unloads": self._unloads},
            gauges=gauges,
        )

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._models

    def get(self, model_id: str) -> T:
        """One that is loaded."""
        return self._models[model_id]

    def spec(self, model_id: str) -> ModelSpec:
        return self._specs[model_id]

    def ensure(self, model_id: str) -> T:
        """The model, loaded now if it was not. Raises ModelUnavailable and what loading raises."""
        model = self._models.pop(model_id, None)
        if model is None:
            self.require_files(model_id)  # before a good model has to go for it
            self._make_room(model_id)
            model = self._load_now(model_id)
        self._models[model_id] = model  # last: the most recently used
        return model

    @property
    def coming(self) -> str | None:
        """The model that `ensure_soon` is loading, or has loaded and not yet given."""
        return self._coming.model_id if self._coming is not None else None

    def ensure_soon(self, model_id: str) -> T | None:
        """As `ensure`, on a thread beside this one: None until it is loaded. One at a time."""
        if model_id in self._models:
            return self.ensure(model_id)
        if self._coming is None:
            self.require_files(model_id)
            self._make_room(model_id)
            self._coming = _Coming(model_id, self._loading(model_id))
            spec, coming = self._specs[model_id], self._coming
            threading.Thread(
                target=lambda: coming.run(lambda: self._load(spec), self._wake),
                name=f"load {model_id}", daemon=True,
            ).start()  # fmt: skip
        if self._coming.model_id != model_id or not self._coming.done:
            return None
        coming, self._coming = self._coming, None
        if coming.error is not None:
            self._not_loaded(model_id, coming.error)
            raise coming.error
        self._models[model_id] = coming.model
        self._loaded(model_id, coming.model, coming.started)
        return self._models[model_id]

    def drop(self, model_id: str) -> bool:
        """Give a model's memory back. False when it was not loaded."""
        if model_id not in self._models:
            return False
        self._models.pop(model_id).close()
        release_cache(self._device)
        self._unloads += 1
        self._set(model_id, status="unloaded", device=None)
        self._changed()
        log.info("unloaded %s", model_id)
        return True

    def load_for(self, message: LoadModel) -> ModelChanged:
        """Answer a request to load."""
        started = time.monotonic()
        changed = message.model not in self._models
        self.ensure(message.model)
        return _changed(message, changed, started)

    def unload_for(self, message: UnloadModel) -> ModelChanged:
        """Answer a request to unload."""
        started = time.monotonic()
        return _changed(message, self.drop(message.model), started)

    def require_files(self, model_id: str) -> None:
        """Raises ModelUnavailable, and reports the model as broken, where files are missing."""
        try:
            require_files(self._specs[model_id])
        except ModelUnavailable as exc:
            self.broken(model_id, str(exc))
            raise

    def broken(self, model_id: str, problem: str) -> None:
        """Report a model as one that cannot be used until `problem` is mended."""
        self._set(model_id, status="broken", problem=problem)

    def _make_room(self, model_id: str) -> None:
        """Raises OutOfHostMemory when there is none, with all others unloaded that may be."""
        while self._max_resident is not None and len(self._models) >= self._max_resident:
            self.drop(next(iter(self._models)))
        needed = int(weight_bytes(self._specs[model_id]) * LOADING_FACTOR)
        while (free := self._host_free()) < needed:
            if self._max_resident is None or not self._models:
                raise OutOfHostMemory(
                    f"{model_id}: loading it takes {needed >> 20} MiB of host memory, and "
                    f"{free >> 20} MiB are free in this container; unload another model, or give "
                    "it more",
                    retry_after_s=30,
                )
            self.drop(next(iter(self._models)))

    def _load_now(self, model_id: str) -> T:
        started = self._loading(model_id)
        try:
            model = self._load(self._specs[model_id])
        except Exception as exc:
            self._not_loaded(model_id, exc)
            raise
        self._loaded(model_id, model, started)
        return model

    def _loading(self, model_id: str) -> float:
        self._set(model_id, status="loading", problem=None)
        self._changed()
        return time.monotonic()

    def _not_loaded(self, model_id: str, exc: Exception) -> None:
        problem = str(exc)
        if not isinstance(exc, ModelUnavailable):
            why = "out of device memory" if isinstance(exc, torch.OutOfMemoryError) else "an error"
            problem = f"{model_id}: loading it ended with {why}; the engine's log has it"
        self.broken(model_id, problem)

    def _loaded(self, model_id: str, model: T, started: float) -> None:
        self._loads += 1
        self._set(
            model_id,
            status="loaded",
            device=str(self._device),
            weight_bytes=model.weight_bytes,
            details=model.describe(),
        )
        self._changed()
        log.info("loaded %s in %.2f s", model_id, time.monotonic() - started)

    def _set(self, model_id: str, **changes: Any) -> None:
        state = self._states[model_id]
        fields = {name: getattr(state, name) for name in state.__struct_fields__}
        self._states[model_id] = ModelState(**(fields | changes))


def _changed(message: LoadModel | UnloadModel, changed: bool, started: float) -> ModelChanged:
    return ModelChanged(
        request_id=message.request_id,
        model=message.model,
        changed=changed,
        seconds=time.monotonic() - started,
    )

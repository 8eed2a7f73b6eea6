"""Which models of an engine are loaded. One construction at a time, on the engine thread.

Libraries patch `torch.nn.Module` process-wide while they build a model, so nothing else may be
built or moved meanwhile; owning all of it in one object of one thread keeps that true.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from worker.catalog import ModelSpec
from worker.engine.device import release_cache
from worker.engine.host import Report
from worker.errors import ModelUnavailable
from worker.modelfiles import check_files, require_files
from worker.protocol.messages import LoadModel, ModelChanged, ModelState, UnloadModel

log = logging.getLogger(__name__)


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


class Residents(Generic[T]):
    """Loaded models by catalog id, least recently used first. Engine thread only."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        device: torch.device,
        load: Callable[[ModelSpec], T],
        changed: Callable[[], None],
        max_resident: int | None = None,
    ):
        """load: builds one model. changed: called when what `report` says has changed, before slow
        work begins and before it is answered.

        max_resident: models held at a time; None holds all that were ever used.
        """
        self._specs = {spec.id: spec for spec in specs}
        self._device = device
        self._load = load
        self._changed = changed
        self._max_resident = max_resident
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
            self._make_room()
            model = self._load_now(model_id)
        self._models[model_id] = model  # last: the most recently used
        return model

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

    def _make_room(self) -> None:
        while self._max_resident is not None and len(self._models) >= self._max_resident:
            self.drop(next(iter(self._models)))

    def _load_now(self, model_id: str) -> T:
        self._set(model_id, status="loading", problem=None)
        self._changed()
        started = time.monotonic()
        try:
            model = self._load(self._specs[model_id])
        except ModelUnavailable as exc:
            self._set(model_id, status="broken", problem=str(exc))
            raise
        except Exception as exc:
            why = "out of device memory" if isinstance(exc, torch.OutOfMemoryError) else "an error"
            problem = f"{model_id}: loading it ended with {why}; the engine's log has it"
            self._set(model_id, status="broken", problem=problem)
            raise
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
        return model

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

"""One stage of training: seeded, shown, saved every minute, and resumed where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

SAVE_EVERY_S = 60.0


def run_stage(
    name: str,
    steps: int,
    step: Callable[[int], Mapping[str, float]],
    state: Mapping[str, Any],
    folder: Path,
    seed: int,
) -> None:
    """Call `step(index)` for every index below `steps`, or for those that are left.

    step: one update; returns the losses to show. The random numbers of torch depend on seed, name
    and index alone, so a resumed run draws what an uninterrupted one draws.
    state: what is saved and loaded, each with `state_dict` and `load_state_dict`.
    folder: holds one file per stage, replaced whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.pt"
    start = 0
    if file.is_file():
        saved = torch.load(file, weights_only=False)
        start = saved.pop("step")
        for key, part in state.items():
            part.load_state_dict(saved[key])
        print(f"{name}: resumed at step {start} of {steps}", flush=True)
    base = seed * 1_000_003 + sum(map(ord, name)) * 100_003
    saved_at = time.monotonic()
    with _progress() as progress:
        task = progress.add_task(name, total=steps, completed=start, losses="")
        shown: dict[str, float] = {}
        for index in range(start, steps):
            torch.manual_seed(base + index)
            for key, value in step(index).items():
                shown[key] = value if key not in shown else 0.97 * shown[key] + 0.03 * value
            losses = " ".join(f"{key} {value:.4f}" for key, value in shown.items())
            progress.update(task, advance=1, losses=losses)
            if not progress.console.is_terminal and (index + 1) % 50 == 0:
                print(f"{name} {index + 1}/{steps} {losses}", flush=True)
            if time.monotonic() > saved_at + SAVE_EVERY_S or index + 1 == steps:
                _save(file, {"step": index + 1, **{k: p.state_dict() for k, p in state.items()}})
                saved_at = time.monotonic()


def learning_rate(index: int, steps: int, peak: float, *, warm_up: int = 50) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if index < warm_up:
        return peak * (index + 1) / warm_up
    done = (index - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """rate: multiplies each group's own `scale` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


class Average:
    """A running average of a module's weights; the average is what is published."""

    def __init__(self, module: nn.Module, decay: float):
        self._module = module
        self._decay = decay
        self._updates = 0
        self.average = deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """After each optimizer step. Early updates weigh more, so that the start is forgotten."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        mine = dict(self.average.named_parameters())
        for name, parameter in self._module.named_parameters():
            mine[name].lerp_(parameter, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._updates = state["updates"]
        self.average.load_state_dict(state["average"])


def count_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _save(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    torch.save(dict(content), partial)
    partial.replace(file)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:14}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )

"""The model's forward pass: transformers' own code, compiled once that is ready.

Compiling takes half a minute on two cores, or seconds where a start before this one left its files
(`cache`). Meanwhile the same code runs uncompiled, so nobody waits for it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

from worker.engine.chat import kernels
from worker.engine.chat.attention import NAME, PagedPass, Rehearsal, computing
from worker.errors import ConfigError

log = logging.getLogger(__name__)

_Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
INPUTS = ("L['ids']", "L['positions']", "L['kept']")
NICE = 10  # more than the engine's own
# The compiled code may round otherwise; by more than this share of the largest logit it is wrong.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class Forward:
    """One model's forward. Called on the engine thread; compiled on a thread of its own."""

    def __init__(self, name: str, model: Any, device: torch.device):
        """name: for the log. model: loaded with the attention implementation `attention.NAME`.
        device: on which it computes."""
        assert model.config._attn_implementation == NAME
        self._name = name
        # The compiler keeps what it made by code object, and what it made is this model's.
        self._run: _Run = _of_its_own(_run, model)
        self._device = device
        self._compiled: _Run | None = None  # set once, by the compiling thread
        self._thread: threading.Thread | None = None

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    @property
    def is_compiling(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def __call__(self, paged: PagedPass, *, compiled: bool = True) -> torch.Tensor:
        """Logits (places that are kept, vocabulary). compiled: False never takes compiled code, so
        that the bits do not depend on whether it is ready."""
        run = self._compiled if compiled and self._compiled is not None else self._run
        with computing(paged):
            return run(paged.ids, paged.positions, paged.kept)[0]

    def compile_in_background(self, cache: Path) -> None:
        """Begin, once; a second call does nothing. cache: folder for the compiled code."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._compile, args=(cache,), name=f"compile {self._name}", daemon=True
            )
            self._thread.start()

    def wait_until_compiled(self, timeout_s: float) -> bool:
        """For benchmarks and tests: whether compiled code is in place."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.compiled

    def _compile(self, cache: Path) -> None:
        started = time.monotonic()
        try:
            self._compiled = self._compiled_and_checked(cache)
        # Whatever the compiler says: without its work the same answers come, later.
        except Exception as exc:
            why = " ".join(str(exc).split("\n")[:2]) or type(exc).__name__
            if "C++" in why:
                why += " (it needs g++ and Python's headers: apt install g++ python3-dev)"
            log.warning(
                "%s stays uncompiled, which is slower and no other harm: %s", self._name, why
            )
            log.debug("what the compiler said", exc_info=True)
            return
        log.info("%s is compiled after %.1f s", self._name, time.monotonic() - started)

    def _compiled_and_checked(self, cache: Path) -> _Run:
        if any(char.isspace() for char in str(cache)):
            raise ConfigError(
                f"the compiler takes no folder with a space in its path, and {cache} has one; "
                "VERBATIM_STATE_DIR names another"
            )
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        if sys.platform == "linux":  # elsewhere a priority is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        if self._device.type == "cpu":
            kernels.load(cache)
        import torch._inductor.config

        # The compiler's own processes would be copies of this one, with all it holds.
        torch._inductor.config.compile_threads = 1
        compiled = torch.compile(
            self._run,
            fullgraph=True,
            dynamic=True,
            options={
                "emulate_precision_casts": True,  # round where the uncompiled code does
                "guard_filter_fn": _guards_of_inputs,
            },
        )
        with torch.inference_mode(), computing(Rehearsal()), self._device:
            ids, positions, kept = torch.arange(1, 8)[None], torch.arange(7)[None], torch.arange(3)
            for tensor, dim in ((ids, 1), (positions, 1), (kept, 0)):
                torch._dynamo.mark_dynamic(tensor, dim)
            found = compiled(ids, positions, kept)
            right = self._run(ids, positions, kept)
        off = float((found - right).abs().max() / right.abs().max())
        if not off <= TOLERANCE[right.dtype]:
            raise ArithmeticError(f"the compiled code's logits are off by {off:.2g} of the largest")
        # Only what is compiled is run: a shape that is not would stop the engine for the compiler.
        run: _Run = torch._dynamo.run(self._run)
        return run


def _run(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=kept
    ).logits
    return logits


def _of_its_own(function: Callable[..., torch.Tensor], first: Any) -> _Run:
    """`function` with its first argument, as a method whose code object nobody else has."""
    assert isinstance(function, FunctionType)
    copied = FunctionType(function.__code__.replace(), function.__globals__)
    return MethodType(copied, first)


def _guards_of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which conditions of the compiled code are checked at each call: those on its inputs.

    The others are on the model's hundreds of parts. Nobody changes them while it is served, and
    looking at them takes half a millisecond of a step of nine.
    """
    return [guard.guard_type == "SHAPE_ENV" or guard.name in INPUTS for guard in guards]

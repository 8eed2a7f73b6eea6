"""Noise schedulers by the names that requests use. A fresh one per call: they keep state."""

from __future__ import annotations

from typing import Any

from worker.errors import Unsupported

# name -> (diffusers class, settings on top of the model's own scheduler config)
_SDXL: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    # Latents are no pixels: without its word the class clips them to -1 .. 1.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}
# WAN is a flow model: the multistep solvers need flow sigmas and predictions.
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_WAN: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", _FLOW),
    "unipc": ("UniPCMultistepScheduler", _FLOW),
}


def fresh_sdxl(own: Any, name: str | None) -> Any:
    """A new scheduler of this name, or of the model's own class, on the model's own config."""
    return type(own).from_config(own.config) if name is None else _build(_SDXL, own, name, {})


def fresh_wan(own: Any, name: str | None, shift: float | None) -> Any:
    """As `fresh_sdxl`; shift: the flow shift, None for the model's own."""
    if name is None and shift is None:
        return type(own).from_config(own.config)
    if name is None:
        return type(own).from_config(own.config, **_shift(type(own).__name__, shift))
    if shift is None:
        shift = own.config.get("flow_shift", own.config.get("shift"))
    return _build(_WAN, own, name, _shift(_WAN[name][0] if name in _WAN else "", shift))


def _shift(class_name: str, shift: float | None) -> dict[str, float]:
    if shift is None:
        return {}
    return {"shift" if class_name.startswith("FlowMatch") else "flow_shift": shift}


def _build(
    table: dict[str, tuple[str, dict[str, Any]]], own: Any, name: str, extra: dict[str, Any]
) -> Any:
    import diffusers

    if name not in table:
        raise Unsupported(f"this scheduler is unknown; known: {', '.join(sorted(table))}")
    class_name, settings = table[name]
    return getattr(diffusers, class_name).from_config(own.config, **(settings | extra))

"""Three phases make the picture of the pipeline's own single call, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rendering import load, render
from worker.catalog import media_catalog
from worker.config import load_settings
from worker.engine.media.sdxl import PARTS
from worker.protocol.messages import RenderParams


# The library's own call warns of a method of its own.
@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        ("float32", {"negative_prompt": None}),
        ("float32", {"negative_prompt": "a square", "scheduler": "dpm++"}),
        ("float32", {"negative_prompt": "", "guidance_scale": 1.0}),
        # Its VAE is decoded in float32 and put back, and then it has to be parked as it was.
        ("float16", {"negative_prompt": "a square"}),
    ],
)
def test_sdxl(dtype: str, more: dict[str, Any], tmp_path: Path) -> None:
    spec = replace(media_catalog(load_settings("demo", {})).default("sdxl"), dtype=dtype)
    params = RenderParams(
        **{
            "prompt": "a red circle", "width": 64, "height": 64, "steps": 2,
            "guidance_scale": 5.0, "seed": 7, **more,
        }
    )  # fmt: skip
    model = load(spec, tmp_path)
    pipeline = model._pipeline
    kept = {name: part.module.state_dict() for name, part in _parts(model).items()}

    ours = [render(model, params, tmp_path) for _ in range(2)]

    for name in PARTS:
        model.parts[name].wake()
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    theirs = pipeline(
        prompt=params.prompt, negative_prompt=params.negative_prompt, width=64, height=64,
        num_inference_steps=2, guidance_scale=params.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip

    assert np.array_equal(np.asarray(ours[0]), np.asarray(theirs))
    assert np.array_equal(np.asarray(ours[1]), np.asarray(theirs))
    for name, part in _parts(model).items():
        part.park()
        now = part.module.state_dict()
        assert all(torch.equal(now[key], value) for key, value in kept[name].items())
        assert {value.dtype for value in now.values() if value.is_floating_point()} == {
            getattr(torch, dtype)
        }


def _parts(model: Any) -> dict[str, Any]:
    return {name: model.parts[name] for name in PARTS}

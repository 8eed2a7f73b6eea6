"""WAN's prompt is encoded as it arrived, and otherwise the video is the pipeline's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_vace

from tests.rendering import load, render
from worker.catalog import media_catalog
from worker.config import load_settings
from worker.engine.media.wan import PARTS
from worker.errors import PromptTooLong
from worker.protocol.messages import RenderParams
from worker.vram.phases import VIDEO_TEXT_TOKENS

PARAMS: dict[str, Any] = {
    "width": 96,
    "height": 96,
    "steps": 2,
    "guidance_scale": 5.0,
    "seed": 3,
    "frames": 5,
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = media_catalog(load_settings("demo", {})).default("wan")
    return load(spec, tmp_path_factory.mktemp("state"))


@pytest.mark.parametrize("negative", [None, "a green sphere"])
def test_a_prompt_that_needs_no_repair_gives_the_pipelines_own_video(
    wan, negative, monkeypatch, tmp_path
):
    # Its repair would change nothing here, and needs a library that the worker does without.
    monkeypatch.setattr(pipeline_wan_vace, "prompt_clean", lambda text: text)
    params = RenderParams(prompt="a red cube moves left", negative_prompt=negative, **PARAMS)

    ours = render(wan, params, tmp_path)

    for name in PARTS:
        wan.parts[name].wake()
    theirs = wan._pipeline(
        prompt=params.prompt,
        negative_prompt=negative,
        width=96,
        height=96,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).frames[0]
    assert np.array_equal(ours, (theirs * 255).round().astype(np.uint8))


@pytest.mark.parametrize("prompt", ["a &amp; b", "a & b", "a b 😀", "a b 😁"])
def test_no_two_texts_become_one(wan, prompt):
    others = {"a &amp; b", "a & b", "a b 😀", "a b 😁", "a b"} - {prompt}

    wan.parts["text_encoder"].wake()
    assert not any(torch.equal(wan.encoded(prompt), wan.encoded(other)) for other in others)


def test_a_prompt_over_the_encoders_length_is_refused(wan):
    with pytest.raises(PromptTooLong, match=str(VIDEO_TEXT_TOKENS)):
        wan.token_counts("red " * VIDEO_TEXT_TOKENS)


def test_the_scheduler_and_its_shift_are_what_was_asked_for(wan, tmp_path):
    videos = [
        render(
            wan,
            RenderParams(prompt="a", negative_prompt=None, scheduler=name, shift=shift, **PARAMS),
            tmp_path,
        ).tobytes()
        for name, shift in (("unipc", 5.0), ("dpm++", 5.0), ("euler", 5.0), ("unipc", 2.0))
    ]

    assert len(set(videos)) == len(videos)

"""WAN checkpoints are run by the pipeline that they name: text to video, or VACE."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from demo_models.vocabulary import t5_tokenizer
from tests.rendering import load, render
from worker.catalog import ModelSpec
from worker.errors import ModelUnavailable
from worker.protocol.messages import RenderParams

SIZES = {
    "num_attention_heads": 1,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 8,
    "num_layers": 2,
    "vace_layers": [0],
    "vace_in_channels": 96,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    made = tmp_path_factory.mktemp("vace")
    WanVACEPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
            )
        ),
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=WanVACETransformer3DModel(**SIZES),
    ).save_pretrained(made, safe_serialization=True)
    return made


def test_a_vace_checkpoint_is_run_whole(folder, tmp_path):
    wan = load(_spec(folder), tmp_path)

    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded = wan._pipeline.transformer.state_dict()
    assert wan.describe()["pipeline"] == "WanVACEPipeline"
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in loaded.items())


def test_a_text_alone_makes_a_clip_with_a_vace_checkpoint(folder, tmp_path):
    wan = load(_spec(folder), tmp_path)
    steps = []

    clip = render(wan, _params(), tmp_path, steps.append)

    assert clip.shape == (5, 32, 48, 3)
    assert steps == [1, 2]


def test_a_text_to_video_checkpoint_is_run_as_one(folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    WanTransformer3DModel(
        **{name: size for name, size in SIZES.items() if not name.startswith("vace")}
    ).save_pretrained(plain / "transformer")
    index = plain / "model_index.json"
    index.write_text(
        index.read_text()
        .replace("WanVACEPipeline", "WanPipeline")
        .replace("WanVACETransformer3DModel", "WanTransformer3DModel")
    )

    wan = load(_spec(plain), tmp_path)

    assert wan.describe()["pipeline"] == "WanPipeline"
    assert render(wan, _params(), tmp_path).shape == (5, 32, 48, 3)


def test_a_checkpoint_of_another_kind_is_refused_by_its_name(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    index = other / "model_index.json"
    index.write_text(index.read_text().replace("WanVACEPipeline", "WanVideoToVideoPipeline"))

    with pytest.raises(ModelUnavailable, match="WanVideoToVideoPipeline"):
        load(_spec(other), tmp_path)


def test_a_vace_checkpoint_that_lacks_a_weight_is_refused(folder, tmp_path):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    lacking = {name: tensor for name, tensor in whole.items() if name != "proj_out.bias"}
    save_file(lacking, weights, metadata={"format": "pt"})

    with pytest.raises(ModelUnavailable, match=r"lacks 1 weights, transformer\.proj_out\.bias"):
        load(_spec(folder), tmp_path)

    save_file(whole, weights, metadata={"format": "pt"})


def _params() -> RenderParams:
    return RenderParams(
        prompt="a red circle",
        negative_prompt=None,
        width=48,
        height=32,
        steps=2,
        guidance_scale=2.0,
        seed=3,
        frames=5,
    )


def _spec(folder: Path) -> ModelSpec:
    return ModelSpec(
        id="a-vace-model",
        kind="wan",
        path=folder,
        shown_path=str(folder),
        aliases=(),
        dtype="float32",
        chat_template="none",
        config_path=None,
        display_name="a VACE model",
        default_size=(96, 96),
        default_frames=17,
    )

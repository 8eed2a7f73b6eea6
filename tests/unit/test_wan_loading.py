"""A VACE checkpoint is a text-to-video one with more beside it: the worker takes what it needs."""

from __future__ import annotations

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
from worker.catalog import ModelSpec
from worker.engine.media.wan import Wan
from worker.errors import ModelUnavailable

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


def test_the_base_of_a_vace_checkpoint_serves_text_to_video(folder, tmp_path):
    wan = Wan(_spec(folder), torch.device("cpu"), tmp_path)

    transformer = wan._pipeline.transformer
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert isinstance(transformer, WanTransformer3DModel)
    assert wan.describe()["pipeline"] == "WanPipeline"
    assert transformer.state_dict().keys() == {k for k in saved if not k.startswith("vace_")}
    assert all(torch.equal(saved[k], v) for k, v in transformer.state_dict().items())


def test_a_vace_checkpoint_that_lacks_a_base_weight_is_refused(folder, tmp_path):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    lacking = {name: tensor for name, tensor in whole.items() if name != "proj_out.bias"}
    save_file(lacking, weights, metadata={"format": "pt"})

    with pytest.raises(ModelUnavailable, match=r"lacks 1 weights, proj_out\.bias among them"):
        Wan(_spec(folder), torch.device("cpu"), tmp_path)

    save_file(whole, weights, metadata={"format": "pt"})


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

"""WAN checkpoints are run by the pipeline that they name: text to video, alone or with VACE beside
it, or VACE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from demo_models.vocabulary import t5_tokenizer
from tests.rendering import load, render
from worker.catalog import AdapterSpec, ModelSpec
from worker.config import load_settings
from worker.engine.media.course import Course
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.peaks import measure
from worker.errors import ConfigError, ModelUnavailable, Unsupported, has_trap_word
from worker.modelfiles import check_files, weight_bytes
from worker.protocol.messages import Reference, RenderParams
from worker.vram.planner import Sizer, part_tenants
from worker.vram.sizes import Peaks

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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    wan = load(_spec(_plain(folder, tmp_path)), tmp_path)

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


# --- VACE beside a text-to-video checkpoint -------------------------------------------------------


def test_videos_of_pictures_are_those_of_the_whole_vace_checkpoint(folder, tmp_path):
    beside = load(_with_vace(_plain(folder, tmp_path), folder), tmp_path)
    whole = load(_spec(folder), tmp_path)
    for mode in ("single", "start", "both"):
        clips = [_film(one, mode, tmp_path) for one in (beside, whole)]

        assert clips[0].shape == (5, 32, 48, 3)
        assert np.array_equal(*clips)


def test_videos_of_a_text_are_those_of_the_text_to_video_checkpoint(folder, tmp_path):
    plain = _plain(folder, tmp_path)
    clips = [
        render(load(one, tmp_path), _params(), tmp_path)
        for one in (_spec(plain), _with_vace(plain, folder), _spec(folder))
    ]

    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_text_encoder_and_vae_are_there_once_for_both(folder, tmp_path):
    spec = _with_vace(_plain(folder, tmp_path), folder)
    wan = load(spec, tmp_path)

    assert [part.name for part in wan.parts] == ["text_encoder", "transformer", "vae", "vace"]
    for name in ("text_encoder", "vae"):
        assert getattr(wan._vace, name) is getattr(wan._pipeline, name)
    assert [wan.phases(_params(mode))["denoise"].parts for mode in ("text", "single", "start")] == [
        ("transformer",),
        ("vace", "vae"),
        ("vace", "vae"),
    ]
    assert wan.describe()["modes"] == ["text", "single", "start", "end", "both"]
    assert sorted(wan.components) == ["text_encoder", "transformer", "vace", "vae"]
    assert wan.weight_bytes == weight_bytes(replace(spec, adapters=())) + sum(
        weight.nbytes for weight in load_file(_weights(folder)).values()
    )


def test_what_is_planned_before_loading_are_the_parts_that_are_loaded(folder, tmp_path):
    spec = _with_vace(_plain(folder, tmp_path), folder)
    peaks = Peaks(tmp_path, lambda asked: [measure(one) for one in asked])
    sizer = Sizer(peaks, "cpu", kv_bytes=0, max_running=1)

    assert sizer.media_tenants(spec) == part_tenants(spec, load(spec, tmp_path).parts.sizes())


FETCH = "run python scripts/fetch_models.py beside"


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ((), "a-vace-model has none; fetch them"),
        (
            (AdapterSpec("beside", "vace", Path("/gone"), None, cure=FETCH),),
            f"without those of adapter beside, whose folder was missing; {FETCH}, and load",
        ),
    ],
)
def test_without_vace_weights_a_video_of_pictures_is_refused_with_what_to_do(
    folder, adapters, said, tmp_path
):
    wan = load(replace(_spec(_plain(folder, tmp_path)), adapters=adapters), tmp_path)

    wan.check(_params())
    for refuse in (wan.check, lambda params: wan.given(params, ())):
        with pytest.raises(Unsupported, match=f"mode start needs VACE weights, .*{said}") as caught:
            refuse(_params("start"))
        assert "scripts/fetch_models.py" in str(caught.value)
        assert not has_trap_word(str(caught.value))
    assert wan.describe()["modes"] == ["text"]


def test_a_damaged_vace_transformer_is_found_before_loading(folder, tmp_path):
    spec = _with_vace(_plain(folder, tmp_path), shutil.copytree(folder, tmp_path / "other"))
    assert check_files(spec) == []
    weights = _weights(tmp_path / "other")
    weights.write_bytes(weights.read_bytes()[:-1])

    [problem] = check_files(spec)

    assert "its header promises" in problem.what
    assert "move its folder away" in problem.cure
    with pytest.raises(ModelUnavailable):
        load(spec, tmp_path)


@pytest.mark.parametrize("size", ["text_dim", "in_channels"])
def test_a_vace_transformer_of_another_model_is_refused(folder, size, tmp_path):
    other = WanVACETransformer3DModel(**(SIZES | {size: 32}))
    other.save_pretrained(tmp_path / "other" / "transformer")
    spec = _with_vace(_plain(folder, tmp_path), tmp_path / "other")

    with pytest.raises(ModelUnavailable, match=f"{size} is .*, and 32 of the VACE transformer"):
        load(spec, tmp_path)


def test_a_vace_checkpoint_takes_no_second_vace_transformer(folder, tmp_path):
    with pytest.raises(ModelUnavailable, match="belongs to a WanPipeline"):
        load(_with_vace(folder, folder), tmp_path)


def test_the_catalog_has_vace_beside_text_to_video_and_by_itself(tmp_path):
    settings = load_settings("gpu-24gb", {"VERBATIM_MODELS_DIR": str(tmp_path)})

    [vace] = [one for one in settings.adapters if one.kind == "vace"]
    [whole] = [one for one in settings.models if one.id == "wan_2_1_vace_1_3b"]
    assert vace.model == "wan_2_1_t2v_1_3b"
    assert vace.path == f"{whole.path}/transformer"


def test_vace_weights_of_a_model_that_makes_no_videos_are_refused(tmp_path):
    profile = tmp_path / "mine.toml"
    profile.write_text(
        '[[adapters]]\nid = "x"\nkind = "vace"\nmodel = "sdxl_lustify"\npath = "x"\n'
    )

    with pytest.raises(ConfigError, match="kind vace belongs to a model of kind wan"):
        load_settings(str(profile), {})


def _plain(folder: Path, tmp_path: Path) -> Path:
    """The same checkpoint with another transformer, for text to video."""
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    torch.manual_seed(1)
    WanTransformer3DModel(
        **{name: size for name, size in SIZES.items() if not name.startswith("vace")}
    ).save_pretrained(plain / "transformer")
    index = plain / "model_index.json"
    names = json.loads(index.read_text())
    names["_class_name"] = "WanPipeline"
    names["transformer"][1] = "WanTransformer3DModel"
    index.write_text(json.dumps(names))
    return plain


def _with_vace(plain: Path, vace: Path) -> ModelSpec:
    adapter = AdapterSpec("beside", "vace", vace / "transformer", None)
    return replace(_spec(plain), adapters=(adapter,))


def _weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def _film(wan: Any, mode: str, tmp_path: Path) -> Any:
    """With the parts of the job's phases resident and no other."""
    pictures = {"image": "red", "first": "green", "last": "blue"}
    for role, colour in pictures.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{role}.png")
    roles = {"single": ["image"], "start": ["first"], "both": ["first", "last"]}[mode]
    params = _params(mode)
    given = wan.given(
        params, [Reference(role=one, file=str(tmp_path / f"{one}.png"), sha256="") for one in roles]
    )
    for name in {part for phase in wan.phases(params).values() for part in phase.parts}:
        wan.parts[name].wake()
    texts = wan.encode(params, EmbeddingCache(tmp_path / "embeddings"))
    clip = wan.decode(wan.denoise(params, texts, Course(3, lambda *_: None), given=given))
    for part in wan.parts:
        part.park()
    return clip


def _params(mode: str = "text") -> RenderParams:
    return RenderParams(
        mode=mode,
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

"""SDXL from one checkpoint file, as public models are handed out, instead of a diffusers folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.single_file import copy_configs, write_single_file
from tests.rendering import load, render
from worker.catalog import ModelSpec, media_catalog
from worker.config import load_settings
from worker.errors import ModelUnavailable
from worker.modelfiles import check_files
from worker.protocol.messages import RenderParams

CPU = torch.device("cpu")
PARAMS = RenderParams(
    prompt="A red cube on a table!",
    negative_prompt="blue",
    width=128,
    height=64,
    steps=4,
    guidance_scale=5.0,
    seed=7,
)


@pytest.fixture(scope="module")
def folder() -> ModelSpec:
    return media_catalog(load_settings("demo", {})).default("sdxl")


@pytest.fixture(scope="module")
def single_file(folder: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The same model as one file, beside a folder that holds its configs and no weights."""
    return as_single_file(folder, tmp_path_factory.mktemp("models"), "float32")


def as_single_file(folder: ModelSpec, place: Path, dtype: str) -> ModelSpec:
    checkpoint, configs = place / "one.safetensors", place / "configs"
    write_single_file(folder.path, checkpoint, getattr(torch, dtype))
    copy_configs(folder.path, configs)
    return replace(
        folder,
        id="single",
        path=checkpoint,
        shown_path="models/one.safetensors",
        config_path=configs,
        dtype=dtype,
    )


def test_a_single_file_makes_the_picture_of_its_folder_pixel_for_pixel(
    folder: ModelSpec, single_file: ModelSpec, tmp_path: Path
) -> None:
    from_folder = load(folder, tmp_path)
    from_file = load(single_file, tmp_path)

    expected, picture, other = (
        render(model, msgspec.structs.replace(PARAMS, seed=seed), tmp_path)
        for model, seed in ((from_folder, 7), (from_file, 7), (from_file, 8))
    )

    assert picture.size == expected.size == (128, 64)
    assert picture.tobytes() == expected.tobytes()
    assert picture.tobytes() != other.tobytes()


def test_a_single_file_reads_a_text_as_its_folder_does(
    folder: ModelSpec, single_file: ModelSpec, tmp_path: Path
) -> None:
    from_folder = load(folder, tmp_path)
    from_file = load(single_file, tmp_path)

    counts = from_file.token_counts("It's a red cube — naïve 😀!!")

    assert counts == from_folder.token_counts("It's a red cube — naïve 😀!!")
    assert counts["tokenizer"] == counts["tokenizer_2"] > 10


def test_a_single_file_in_half_precision_loads_in_half_precision(
    folder: ModelSpec, tmp_path: Path
) -> None:
    spec = as_single_file(folder, tmp_path, "float16")

    pipeline = load(spec, tmp_path)._pipeline

    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float16}


def test_a_single_file_with_its_configs_is_whole(single_file: ModelSpec) -> None:
    assert check_files(single_file, full=True) == []


def test_a_single_file_that_was_cut_short_is_told(single_file: ModelSpec, tmp_path: Path) -> None:
    content = single_file.path.read_bytes()
    cut = tmp_path / "one.safetensors"
    cut.write_bytes(content[: len(content) // 2])

    [problem] = check_files(replace(single_file, path=cut))

    assert problem.path == "models/one.safetensors"
    assert problem.what == (
        f"is damaged: {len(content) // 2} bytes, its header promises {len(content)}"
    )


def test_a_single_file_without_the_folder_of_its_configs_is_told(
    single_file: ModelSpec, tmp_path: Path
) -> None:
    [problem] = check_files(replace(single_file, config_path=tmp_path / "gone"))

    assert problem.path == str(tmp_path / "gone" / "model_index.json")
    assert problem.what == "is missing"


@pytest.mark.parametrize(
    "lacks",
    [
        "model.diffusion_model.",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.",
        "first_stage_model.decoder.conv_out.weight",
        "conditioner.",
        "conditioner.embedders.0.",
        "conditioner.embedders.1.",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_single_file_that_lacks_weights_does_not_load(
    single_file: ModelSpec, tmp_path: Path, lacks: str
) -> None:
    weights = load_file(single_file.path)
    path = tmp_path / "one.safetensors"
    save_file({name: weights[name] for name in weights if not name.startswith(lacks)}, path)

    with pytest.raises(ModelUnavailable, match=r"models/one\.safetensors does not load: "):
        load(replace(single_file, path=path), tmp_path)


@pytest.mark.parametrize(
    "lacks",
    [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer_config.json",
    ],
)
def test_a_config_that_a_single_file_needs_is_missed(
    single_file: ModelSpec, tmp_path: Path, lacks: str
) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(single_file.config_path, configs)
    (configs / lacks).unlink()

    [problem] = check_files(replace(single_file, config_path=configs))

    assert (problem.path, problem.what) == (str(configs / lacks), "is missing")

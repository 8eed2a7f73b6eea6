"""LoRAs of image jobs: added for a job, and gone without a trace afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.adapters import lora_layers, with_adapters, write_ip_adapter, write_lora
from tests.rendering import load
from tests.sdxl_jobs import (
    assert_same,
    done,
    drawn,
    params,
    reference,
    state,
    there,
    through_engine,
)
from worker.catalog import AdapterSpec, ModelSpec, media_catalog
from worker.config import load_settings
from worker.engine.media.embeddings import EmbeddingCache
from worker.engine.peaks import build, measure, peak_of
from worker.errors import Cancelled, ModelUnavailable, Unsupported
from worker.modelfiles import file_sha256
from worker.protocol.messages import JobRendered, LoraUse
from worker.vram.peak import Question


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return media_catalog(load_settings("demo", {})).default("sdxl")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterSpec]:
    folder = tmp_path_factory.mktemp("loras")
    return [
        write_lora(folder / "kohya.safetensors"),
        write_lora(folder / "kohya-alpha.safetensors", alphas=(2.0,), seed=1),
        write_lora(folder / "diffusers.safetensors", "diffusers", seed=2),
        write_lora(folder / "peft.safetensors", "peft", seed=3),
        write_lora(folder / "peft-alpha.safetensors", "peft", alphas=(6.0,), seed=4),
        write_lora(folder / "unet-only.safetensors", "peft", parts=("unet",), seed=5),
    ]


@pytest.fixture(scope="module")
def model(
    spec: ModelSpec, adapters: list[AdapterSpec], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("model")
    one = load(with_adapters(spec, *adapters), folder)
    done(one, params(steps=1), folder)  # transformers puts hooks of its own at the first call
    return one


def using(*pairs: tuple[str, float], **more: Any) -> Any:
    return params(loras=tuple(LoraUse(name, weight) for name, weight in pairs), **more)


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    "pairs",
    [
        [("kohya", 0.7)],
        [("kohya-alpha", 1.0)],
        [("diffusers", 0.7)],
        [("peft", -0.5)],
        [("peft-alpha", 0.3)],
        [("kohya", 0.7), ("unet-only", 0.4), ("diffusers", 0.2)],
    ],
)
def test_the_picture_is_that_of_the_librarys_own_loading(
    pairs: list[tuple[str, float]],
    spec: ModelSpec,
    model: Any,
    adapters: list[AdapterSpec],
    tmp_path: Path,
) -> None:
    job = using(*pairs)
    [ours], _ = done(model, job, tmp_path)
    [without], _ = done(model, params(), tmp_path)

    other = load(spec, tmp_path)
    for part in other.parts:
        part.wake()
    pipeline, files = other._pipeline, {one.id: one.path for one in adapters}
    for name, _ in pairs:
        pipeline.load_lora_weights(str(files[name]), adapter_name=name)
    pipeline.set_adapters([name for name, _ in pairs], [weight for _, weight in pairs])
    theirs = pipeline(
        prompt=job.prompt, negative_prompt=job.negative_prompt, width=64, height=64,
        num_inference_steps=job.steps, guidance_scale=job.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
    ).images[0]  # fmt: skip

    assert np.array_equal(ours, np.asarray(theirs))
    assert not np.array_equal(ours, without)


def test_alphas_that_differ_from_layer_to_layer_count_each_for_its_own(
    spec: ModelSpec, tmp_path: Path
) -> None:
    alphas = (1.0, 2.0, 8.0)
    with_alphas = write_lora(tmp_path / "a.safetensors", alphas=alphas)
    scaled = write_lora(tmp_path / "b.safetensors")
    tensors, known = load_file(scaled.path), load_file(with_alphas.path)
    for key in tensors:
        if key.endswith(".lora_up.weight"):
            base = key.removesuffix(".lora_up.weight")
            rank = tensors[f"{base}.lora_down.weight"].shape[0]
            tensors[key] = tensors[key] * (known[f"{base}.alpha"] / rank)  # powers of two
    save_file(tensors, scaled.path)
    model = load(with_adapters(spec, with_alphas, scaled), tmp_path)

    (said,), (computed,) = (
        done(model, using((name, 1.0)), tmp_path / name)[0] for name in ("a", "b")
    )

    assert np.array_equal(said, computed)


def test_names_of_the_original_blocks_mean_the_same_layers(spec: ModelSpec, tmp_path: Path) -> None:
    """Most published LoRAs for SDXL call its blocks as its authors did."""
    ours = write_lora(tmp_path / "ours.safetensors", parts=("unet",))
    tensors = {
        key: tensor
        for key, tensor in load_file(ours.path).items()
        if "down_blocks_1_attentions_0" in key or "mid_block_attentions" in key
    }
    save_file(tensors, ours.path)
    names = {
        "down_blocks_1_attentions_0": "input_blocks_3_1",
        "mid_block_attentions_0": "middle_block_1",
    }
    for new, old in names.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = AdapterSpec("theirs", "lora", tmp_path / "theirs.safetensors", None)
    model = load(with_adapters(spec, ours, theirs), tmp_path)

    (one,), (other,), (without,) = (
        done(model, job, tmp_path)[0]
        for job in (using(("ours", 1.0)), using(("theirs", 1.0)), params())
    )

    assert np.array_equal(one, other)
    assert not np.array_equal(one, without)


def test_begun_from_a_picture_and_with_another_that_is_read_it_is_added_too(
    spec: ModelSpec, adapters: list[AdapterSpec], tmp_path: Path
) -> None:
    drawn(tmp_path / "disc.png")
    sent = [reference(tmp_path / "disc.png")]
    reads = write_ip_adapter(tmp_path / "ip")
    model = load(with_adapters(spec, *adapters, reads), tmp_path)
    done(model, params(steps=1), tmp_path)
    before = state(model)

    for mode in ("image", "style"):
        plain = done(model, params(mode=mode, strength=0.7), tmp_path, sent)[0]
        added = done(model, using(("peft", 0.5), mode=mode, strength=0.7), tmp_path, sent)[0]
        assert not np.array_equal(plain, added)
        streamed = done(
            model, using(("peft", 0.5), mode=mode, strength=0.7), tmp_path, sent, streamed=True
        )[0]
        assert np.array_equal(added, streamed)
    assert_same(before, state(model))


def test_an_engine_with_little_memory_makes_the_same_pictures_and_tells_of_it(
    spec: ModelSpec, model: Any, adapters: list[AdapterSpec], tmp_path: Path
) -> None:
    job = using(("kohya", 0.7), ("diffusers", 0.2), num_images=2)
    expected, given = done(model, job, tmp_path / "other")

    answered = through_engine(with_adapters(spec, *adapters), job, tmp_path, 10 << 20)

    assert isinstance(answered, JobRendered), answered
    for asset, picture in zip(answered.assets, expected, strict=True):
        with Image.open(tmp_path / "job" / asset.file) as file:
            assert np.array_equal(np.asarray(file), picture)
    assert answered.receipt["loras"] == given.receipt["loras"]
    assert {"phase": "denoise", "way": "streamed", "exactness": "bit"} in answered.receipt["plan"]


# --- what is left of it ---------------------------------------------------------------------------


def test_afterwards_modules_weights_and_pictures_are_what_they_were(
    model: Any, tmp_path: Path
) -> None:
    before, [first] = state(model), done(model, params(), tmp_path)[0]

    done(model, using(("kohya", 0.7), ("peft-alpha", 1.2), num_images=2), tmp_path)

    assert_same(before, state(model))
    assert np.array_equal(done(model, params(), tmp_path / "fresh")[0], [first])


def test_a_job_that_is_cancelled_in_the_middle_leaves_nothing_either(
    model: Any, tmp_path: Path
) -> None:
    before, [first] = state(model), done(model, params(), tmp_path)[0]

    def stop(step: int) -> None:
        layer = model._pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        assert len(layer._forward_hooks) == 1
        if step == 2:
            raise Cancelled("")

    with pytest.raises(Cancelled):
        done(model, using(("kohya", 0.7)), tmp_path, on_step=stop)

    assert_same(before, state(model))
    assert np.array_equal(done(model, params(), tmp_path)[0], [first])


def test_a_denoiser_that_is_streamed_computes_the_same_with_it(model: Any, tmp_path: Path) -> None:
    job = using(("kohya", 0.7), num_images=2)
    assert np.array_equal(
        done(model, job, tmp_path)[0], done(model, job, tmp_path, streamed=True)[0]
    )


def test_weight_0_is_the_same_as_without(model: Any, tmp_path: Path) -> None:
    assert np.array_equal(
        done(model, using(("kohya", 0.0)), tmp_path)[0], done(model, params(), tmp_path)[0]
    )


# --- what is told, kept and counted ---------------------------------------------------------------


def test_the_receipt_has_id_weight_and_hash_of_each(
    model: Any, adapters: list[AdapterSpec]
) -> None:
    job = using(("KOHYA", 0.7), ("peft", 0.0))
    assert model.given(job, ()).receipt["loras"] == [
        {"id": "kohya", "weight": 0.7, "sha256": file_sha256(adapters[0].path)},
        {"id": "peft", "weight": 0.0, "sha256": file_sha256(adapters[3].path)},
    ]
    assert model.describe()["loras"] == [one.id for one in adapters]


def test_embeddings_are_those_of_the_loras_that_touch_the_text_encoders(
    model: Any, tmp_path: Path
) -> None:
    cache = EmbeddingCache(tmp_path)
    with there(model, ("text_encoder", "text_encoder_2")):
        plain = model.encode(params(), cache)
        assert model.known_texts(using(("kohya", 0.7)), cache) is None
        touched = model.encode(using(("kohya", 0.7)), cache, model.given(using(("kohya", 0.7)), ()))

    assert model.known_texts(using(("kohya", 0.6)), cache) is None
    assert model.known_texts(using(("peft", 0.7)), cache) is None
    for name, tensor in plain.items():
        assert not torch.equal(touched[name], tensor)
        for same in (using(("unet-only", 0.7)), using(("kohya", 0.0)), params()):
            found = model.known_texts(same, cache)
            assert found is not None
            assert torch.equal(found[name], tensor)


def test_a_file_that_was_exchanged_is_not_taken_for_the_one_before(
    spec: ModelSpec, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "one.safetensors")
    model = load(with_adapters(spec, adapter), tmp_path)
    job = using(("one", 1.0))
    [before], told = done(model, job, tmp_path)
    write_lora(tmp_path / "one.safetensors", seed=9)
    [after], told_after = done(model, job, tmp_path)

    assert told.receipt["loras"] != told_after.receipt["loras"]
    assert not np.array_equal(before, after)


def test_its_bytes_are_part_of_the_phases_that_it_computes_in(
    model: Any, adapters: list[AdapterSpec]
) -> None:
    plain, used = model.phases(params()), model.phases(using(("kohya", 0.7), ("peft", 0.1)))
    numbers = {"unet": 0, "text": 0}
    for path in (adapters[0].path, adapters[3].path):
        for key, tensor in load_file(path).items():
            part = "text" if key.startswith(("lora_te", "text_encoder")) else "unet"
            numbers[part] += tensor.numel()

    assert used["encode"].beside_bytes - plain["encode"].beside_bytes == 4 * numbers["text"]
    assert used["denoise"].beside_bytes - plain["denoise"].beside_bytes == 4 * numbers["unet"]
    assert {one.rank for one in used["encode"].passes + used["denoise"].passes} == {4}
    assert used["decode"] == plain["decode"]
    assert (
        measure(used["denoise"].passes[0]).peak_bytes
        > measure(plain["denoise"].passes[0]).peak_bytes
    )
    assert model.phases(using(("kohya", 0.0))) == plain


def test_an_ip_adapter_is_counted_as_well(spec: ModelSpec, tmp_path: Path) -> None:
    for kind, tokens in (("plain", 4), ("plus", 4)):
        adapter = write_ip_adapter(tmp_path / kind, kind)
        model = load(with_adapters(spec, adapter), tmp_path)
        plain = model.phases(params())["denoise"]
        reads = model.phases(params(mode="style", strength=0.5))["denoise"]
        numbers = sum(tensor.numel() for tensor in load_file(adapter.path).values())
        assert reads.beside_bytes - plain.beside_bytes == 4 * numbers
        assert reads.passes[0].picture_tokens == tokens


@pytest.mark.parametrize(
    ("part", "more"),
    [
        ("unet", {"rank": 8}),
        ("unet", {"picture_tokens": 16}),
        ("unet", {"rank": 4, "picture_tokens": 4, "tokens": 154}),
        ("text_encoder_2", {"rank": 16}),
        ("image_vae_encoder", {}),
    ],
)
def test_measured_passes_hold_what_real_ones_hold_to_the_byte(
    part: str, more: dict[str, Any], model: Any
) -> None:
    config = model._configs["vae" if part == "image_vae_encoder" else part]
    asked = Question(part=part, config=config, dtype="float32", width=96, height=64, **more)
    with torch.no_grad():
        found = peak_of(build(asked), asked)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        expected = peak_of(build(asked), asked)

    assert expected == found > 0
    assert measure(asked).weight_bytes == measure(replace(asked, rank=0)).weight_bytes


# --- what is refused ------------------------------------------------------------------------------


def test_a_lora_that_the_catalog_does_not_have_is_refused_with_those_it_has(model: Any) -> None:
    with pytest.raises(Unsupported, match=r"no such LoRA for demo-image; known: kohya, "):
        model.check(using(("other", 1.0)))


def test_files_that_are_missing_or_damaged_say_which_and_the_next_job_is_done(
    spec: ModelSpec, adapters: list[AdapterSpec], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(adapters[0].path.read_bytes()[:-10])
    broken = [
        AdapterSpec("gone", "lora", tmp_path / "gone.safetensors", None),
        AdapterSpec("damaged", "lora", damaged, None),
    ]
    model = load(with_adapters(spec, *broken), tmp_path)

    for name, why in (("gone", "is missing"), ("damaged", "is damaged")):
        for refused in (model.check, model.phases, lambda job: model.given(job, ())):
            with pytest.raises(ModelUnavailable, match=f"LoRA {name}: {name}.safetensors {why}"):
                refused(using((name, 1.0)))
    assert len(done(model, params(), tmp_path)[0]) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora_unet_mid_block_attentions_0.hada_w1_a": torch.zeros(2, 2)}, "is a LoHa"),
        ({"unet.x.dora_scale": torch.zeros(2)}, "is a DoRA"),
        ({"lora_unet_x.alpha": torch.ones(1)}, "an alpha that belongs to no matrix"),
        ({"other.lora_down.weight": torch.zeros(2, 2)}, "are for no part of SDXL"),
        (
            {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 96)},
            "of no trainer that is known",
        ),
        (
            {
                "lora_unet_mid_block_attentions_7_proj_in.lora_down.weight": torch.zeros(2, 96),
                "lora_unet_mid_block_attentions_7_proj_in.lora_up.weight": torch.zeros(96, 2),
            },
            "does not fit this model",
        ),
    ],
)
def test_what_is_no_lora_for_this_model_is_refused_with_the_reason(
    change: dict[str, Any], why: str, spec: ModelSpec, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "odd.safetensors")
    save_file(load_file(adapter.path) | change, adapter.path)
    model = load(with_adapters(spec, adapter), tmp_path)

    with pytest.raises(Unsupported, match=why):
        model.given(using(("odd", 1.0)), ())
    assert len(done(model, params(), tmp_path)[0]) == 1


def test_one_for_a_model_of_another_size_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "wide.safetensors", "peft")
    tensors = load_file(adapter.path)
    key = next(key for key in tensors if key.endswith("attn2.to_k.lora_A.weight"))
    save_file(tensors | {key: torch.zeros(4, 2048)}, adapter.path)
    model = load(with_adapters(spec, adapter), tmp_path)

    with pytest.raises(Unsupported, match=r"does not fit this model: \(4, 2048\) and \(96, "):
        model.given(using(("wide", 1.0)), ())


def test_the_small_loras_touch_layers_that_are_there(model: Any) -> None:
    config = json.loads(model.parts["unet"].module.to_json_string())
    assert config["block_out_channels"] == [64, 96]
    for part, layer, _, _ in lora_layers():
        name = layer.removeprefix("text_model.") if part == "text_encoder" else layer
        assert model.parts[part].module.get_submodule(name).weight is not None

"""Model files: whole or not, told from names, sizes and headers; contents told from hashes."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.catalog import NATIVE_FRAMES, NATIVE_SIZE, AdapterSpec, ModelSpec
from worker.config import Kind
from worker.errors import ModelUnavailable
from worker.modelfiles import (
    MANIFEST,
    MAX_HEADER_BYTES,
    adapter_files,
    check_adapter,
    check_files,
    combined_sha256,
    file_sha256,
    is_recorded,
    read_header,
    require_files,
    weight_bytes,
    weight_files,
    weights_sha256,
)

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def spec(path: Path, kind: Kind = "chat", model_id: str = "m", **more: Any) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        kind=kind,
        path=path,
        shown_path=f"models/{path.name}",
        aliases=(),
        dtype="float32",
        chat_template="chatml",
        config_path=more.get("config_path"),
        display_name=model_id,
        default_size=NATIVE_SIZE[kind],
        default_frames=NATIVE_FRAMES,
        cure=f"run python scripts/fetch_models.py {model_id}",
    )


def safetensors(tensors: dict[str, bytes], metadata: bool = True) -> bytes:
    """A file in the format of github.com/huggingface/safetensors, with tensors of bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    begin = 0
    for name, data in tensors.items():
        end = begin + len(data)
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


WEIGHTS = safetensors({"a": bytes(range(100)), "b": b"\7" * 28})


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def chat_model(folder: Path) -> ModelSpec:
    write(folder / "config.json", "{}")
    write(folder / "tokenizer.json", "{}")
    write(folder / "model.safetensors", WEIGHTS)
    return spec(folder)


def sharded_chat_model(folder: Path) -> ModelSpec:
    write(folder / "config.json", "{}")
    write(folder / "tokenizer.json", "{}")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    write(folder / names[0], safetensors({"a": b"x" * 10}))
    write(folder / names[1], safetensors({"b": b"y" * 20}))
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    write(folder / "model.safetensors.index.json", json.dumps(index))
    return spec(folder)


PARTS = {
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "wan": ("transformer", "vae", "text_encoder"),
}
TOKENIZERS = {"sdxl": ("tokenizer", "tokenizer_2"), "wan": ("tokenizer",)}


def pipeline_model(folder: Path, kind: Kind) -> ModelSpec:
    write_configs(folder, kind)
    for part in PARTS[kind]:
        write(folder / part / "diffusion_pytorch_model.safetensors", WEIGHTS)
    return spec(folder, kind)


def write_configs(folder: Path, kind: Kind) -> None:
    """The text files of a pipeline."""
    write(folder / "model_index.json", "{}")
    write(folder / "scheduler" / "scheduler_config.json", "{}")
    for part in PARTS[kind]:
        write(folder / part / "config.json", "{}")
    for part in TOKENIZERS[kind]:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            write(folder / part / name, "{}")


def single_file_model(folder: Path) -> ModelSpec:
    write_configs(folder / "config", "sdxl")
    path = write(folder / "one.safetensors", WEIGHTS)
    return spec(path, "sdxl", config_path=folder / "config")


def write_manifest(folder: Path, *names: str) -> None:
    """What the scripts that make or fetch a model leave behind."""
    files = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    write(folder / MANIFEST, json.dumps({"files": files}))


def flip_a_byte(path: Path) -> None:
    """Change the last byte and nothing that a file system tells of its age."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def said(model: ModelSpec, *, full: bool = False) -> list[str]:
    return [f"{problem.path}: {problem.what}" for problem in check_files(model, full=full)]


# --- whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chat_model, sharded_chat_model])
def test_a_whole_chat_model_has_no_problem(
    tmp_path: Path, make: Callable[[Path], ModelSpec]
) -> None:
    model = make(tmp_path / "m")

    require_files(model)

    assert check_files(model, full=True) == []


@pytest.mark.parametrize("kind", ["sdxl", "wan"])
def test_a_whole_pipeline_has_no_problem(tmp_path: Path, kind: Kind) -> None:
    model = pipeline_model(tmp_path / "m", kind)

    assert check_files(model, full=True) == []


def test_a_single_file_with_its_configs_has_no_problem(tmp_path: Path) -> None:
    assert check_files(single_file_model(tmp_path), full=True) == []


# --- missing files -----------------------------------------------------------------------------


def test_a_missing_model_is_told_with_its_path_and_the_cure(tmp_path: Path) -> None:
    model = spec(tmp_path / "gone", model_id="qwen")

    with pytest.raises(ModelUnavailable) as caught:
        require_files(model)

    assert str(caught.value) == (
        "qwen: models/gone: is missing; run python scripts/fetch_models.py qwen"
    )
    assert caught.value.status == 503


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_file_that_a_chat_model_needs_is_missed(tmp_path: Path, name: str) -> None:
    model = chat_model(tmp_path / "m")
    (tmp_path / "m" / name).unlink()

    problems = said(model)

    assert len(problems) == 1
    assert "models/m" in problems[0]


@pytest.mark.parametrize("kind", ["sdxl", "wan"])
def test_every_part_that_a_pipeline_needs_is_missed(tmp_path: Path, kind: Kind) -> None:
    folder = tmp_path / "m"
    model = pipeline_model(folder, kind)
    for part in (*PARTS[kind], *TOKENIZERS[kind]):
        (folder / part).rename(tmp_path / f"hidden-{part}")

    problems = said(model)

    assert sorted(problems) == sorted(
        f"models/m/{part}: is missing" for part in (*PARTS[kind], *TOKENIZERS[kind])
    )


CONFIGS = [
    ("sdxl", "model_index.json"),
    ("sdxl", "unet/config.json"),
    ("sdxl", "tokenizer/tokenizer_config.json"),
    ("sdxl", "tokenizer_2/tokenizer_config.json"),
    ("wan", "model_index.json"),
    ("wan", "vae/config.json"),
    ("wan", "tokenizer/tokenizer.json"),
]


@pytest.mark.parametrize(("kind", "name"), CONFIGS)
def test_every_config_that_a_pipeline_needs_is_missed(
    tmp_path: Path, kind: Kind, name: str
) -> None:
    model = pipeline_model(tmp_path / "m", kind)
    (tmp_path / "m" / name).unlink()

    assert said(model) == [f"models/m/{name}: is missing"]


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_every_config_that_a_single_file_needs_is_missed(tmp_path: Path, name: str) -> None:
    model = single_file_model(tmp_path)
    (tmp_path / "config" / name).unlink()

    problems = said(model)

    assert len(problems) == 1
    assert problems[0].endswith(f"config/{name}: is missing")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_clip_tokenizer_may_be_in_two_files_and_then_needs_both(
    tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "m" / "tokenizer"
    model = pipeline_model(tmp_path / "m", "sdxl")
    (folder / "tokenizer.json").unlink()
    write(folder / "vocab.json", "{}")
    write(folder / "merges.txt", "a b")
    whole = said(model)

    (folder / missing).unlink()

    assert whole == []
    assert said(model) == [f"models/m/tokenizer/{missing}: is missing"]


def test_a_part_without_weights_is_missed(tmp_path: Path) -> None:
    model = pipeline_model(tmp_path / "m", "wan")
    (tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors").unlink()

    assert said(model) == ["models/m/vae: has no .safetensors file"]


def test_a_missing_shard_of_an_index_is_told_by_its_name(tmp_path: Path) -> None:
    model = sharded_chat_model(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()

    assert said(model) == ["models/m/model-00002-of-00002.safetensors: is missing"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_told_and_not_raised(tmp_path: Path, text: str) -> None:
    model = sharded_chat_model(tmp_path / "m")
    write(tmp_path / "m" / "model.safetensors.index.json", text)

    problems = said(model)

    assert len(problems) == 1
    assert problems[0].startswith("models/m/model.safetensors.index.json: is ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_config_that_is_no_json_is_told(tmp_path: Path, name: str) -> None:
    model = chat_model(tmp_path / "m")
    write(tmp_path / "m" / name, "{cut shor")

    assert said(model) == [f"models/m/{name}: is damaged: not JSON"]


def test_a_config_is_read_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large tokenizer takes a tenth of a second, in which no other model computes."""
    model = chat_model(tmp_path / "m")
    file = model.path / "tokenizer.json"
    good = file.read_bytes()
    read: list[Path] = []
    real = Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    for _ in range(3):
        assert check_files(model) == []
    assert read.count(file) == 1

    damaged = b"{" * len(good)
    for content, problems in ((damaged, 1), (good, 0), (damaged, 1)):
        file.write_bytes(content)
        os.utime(file, ns=(1, len(read)))  # a file system's clock is coarse
        assert len(check_files(model)) == problems


def test_a_chat_model_that_is_one_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", WEIGHTS)

    assert said(spec(path)) == [
        "models/m.safetensors: is one file; a model of kind chat is a folder"
    ]


def test_a_single_file_without_a_config_folder_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", WEIGHTS)

    problems = said(spec(path, "sdxl"))

    assert problems == [
        "models/one.safetensors: is a single file and its catalog entry has no config_path"
    ]


def test_a_single_files_config_folder_is_missed(tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", WEIGHTS)

    problems = said(spec(path, "sdxl", config_path=tmp_path / "config"))

    assert len(problems) == 1
    assert problems[0].endswith("config/model_index.json: is missing")


# --- damaged weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 8, 40, len(WEIGHTS) - 1])
def test_a_truncated_file_is_damaged(tmp_path: Path, kept: int) -> None:
    model = chat_model(tmp_path / "m")
    write(tmp_path / "m" / "model.safetensors", WEIGHTS[:kept])

    problems = said(model)

    assert len(problems) == 1
    assert problems[0].startswith("models/m/model.safetensors: is damaged: ")


def test_a_file_that_is_too_long_is_damaged(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    write(tmp_path / "m" / "model.safetensors", WEIGHTS + b"\0")

    assert said(model) == [
        f"models/m/model.safetensors: is damaged: {len(WEIGHTS) + 1} bytes, "
        f"its header promises {len(WEIGHTS)}"
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 15\n",
        b"<html>the proxy is down</html>",
        b"\xff" * 64,
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * 64,
    ],
)
def test_garbage_instead_of_weights_is_damaged(tmp_path: Path, data: bytes) -> None:
    model = chat_model(tmp_path / "m")
    write(tmp_path / "m" / "model.safetensors", data)

    problems = said(model)

    assert len(problems) == 1
    assert "is damaged: no safetensors header" in problems[0]


def headed(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 30) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "data_offsets", "__metadata__", "dtype"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, **PATIENT)
@given(
    data=st.binary(max_size=64)
    | JSON.map(headed)
    | JSON.map(lambda offsets: headed({"a": {"data_offsets": offsets}}))
)
def test_no_content_of_a_file_breaks_the_look_at_its_header(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes(data)

    try:
        header = read_header(path)
    except ValueError as exc:
        assert str(exc)
    else:
        assert isinstance(header, dict)


# --- manifests ---------------------------------------------------------------------------------


def test_a_file_that_the_manifest_lists_is_missed(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    write(tmp_path / "m" / "merges.txt", "a b")
    write_manifest(tmp_path / "m", "merges.txt")
    (tmp_path / "m" / "merges.txt").unlink()

    assert said(model) == ["models/m/merges.txt: is missing"]


def test_a_size_that_is_not_the_manifests_is_told_with_both(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    write_manifest(tmp_path / "m", "model.safetensors")
    other = safetensors({"a": b"x"})
    write(tmp_path / "m" / "model.safetensors", other)

    assert said(model) == [
        f"models/m/model.safetensors: {len(other)} bytes instead of {len(WEIGHTS)}"
    ]


def test_a_flipped_byte_is_found_by_the_full_check_only(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    write_manifest(tmp_path / "m", "config.json", "model.safetensors")
    flip_a_byte(tmp_path / "m" / "model.safetensors")

    quick, full = said(model), said(model, full=True)

    assert quick == []
    assert len(full) == 1
    assert full[0].startswith("models/m/model.safetensors: is damaged: sha256 ")


def test_a_flipped_byte_of_a_single_file_is_found_by_the_manifest_beside_it(
    tmp_path: Path,
) -> None:
    model = single_file_model(tmp_path)
    write(tmp_path / "other.txt", "not this model's")
    write_manifest(tmp_path, "one.safetensors", "other.txt")
    flip_a_byte(tmp_path / "one.safetensors")

    full = said(model, full=True)

    assert len(full) == 1
    assert "is damaged: sha256 " in full[0]
    with pytest.raises(ModelUnavailable, match=r"models/one\.safetensors: sha256"):
        weights_sha256(model, tmp_path / "state")


def test_the_full_check_tells_its_progress_in_bytes(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    write_manifest(tmp_path / "m", "config.json", "model.safetensors")
    read: list[int] = []

    check_files(model, full=True, progress=read.append)

    assert sum(read) == len(WEIGHTS) + len("{}")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}'])
def test_a_damaged_manifest_is_a_problem_and_no_crash(tmp_path: Path, text: str) -> None:
    model = chat_model(tmp_path / "m")
    write(tmp_path / "m" / "a", "")
    write(tmp_path / "m" / MANIFEST, text)

    problems = said(model, full=True)

    assert [problem for problem in problems if MANIFEST in problem]


# --- hashes ------------------------------------------------------------------------------------


def test_weights_are_hashed_by_their_path_in_the_model(tmp_path: Path) -> None:
    model = pipeline_model(tmp_path / "m", "wan")

    hashes = weights_sha256(model, tmp_path / "state")

    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert hashes == {
        f"{part}/diffusion_pytorch_model.safetensors": digest for part in PARTS["wan"]
    }


def test_a_flipped_byte_is_refused_when_weights_are_hashed(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    write_manifest(tmp_path / "m", "model.safetensors")
    flip_a_byte(tmp_path / "m" / "model.safetensors")

    with pytest.raises(ModelUnavailable, match=r"models/m/model\.safetensors: sha256"):
        weights_sha256(model, tmp_path / "state")


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    first = weights_sha256(model, tmp_path / "state")
    flip_a_byte(tmp_path / "m" / "model.safetensors")  # leaves size, time and inode as they were

    second = weights_sha256(model, tmp_path / "state")

    assert second == first


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights_sha256(model, tmp_path / "state")
    before = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    hashes = weights_sha256(model, tmp_path / "state")

    assert hashes == {"model.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_file_that_took_the_place_of_another_is_hashed_again(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights_sha256(model, tmp_path / "state")
    before = path.stat()
    new = write(tmp_path / "new", WEIGHTS[:-1] + b"\0")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)

    hashes = weights_sha256(model, tmp_path / "state")

    assert hashes == {"model.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("text", ["", '{"cut sho'])
def test_a_damaged_memory_of_hashes_is_made_anew(tmp_path: Path, text: str) -> None:
    model = chat_model(tmp_path / "m")
    expected = weights_sha256(model, tmp_path / "state")
    [memory] = (tmp_path / "state").iterdir()
    memory.write_text(text)

    assert weights_sha256(model, tmp_path / "state") == expected


def test_two_models_keep_their_hashes_beside_each_other(tmp_path: Path) -> None:
    one, two = chat_model(tmp_path / "one"), sharded_chat_model(tmp_path / "two")
    state = tmp_path / "state"
    known = (weights_sha256(one, state), weights_sha256(two, state))
    for folder in ("one", "two"):
        for file in (tmp_path / folder).glob("*.safetensors"):
            flip_a_byte(file)

    assert (weights_sha256(one, state), weights_sha256(two, state)) == known


def test_a_models_one_hash_is_of_its_files_hashes_in_the_order_of_their_paths() -> None:
    files = {"b.safetensors": "22", "a.safetensors": "11"}

    combined = combined_sha256(files)

    assert combined == hashlib.sha256(b"11  a.safetensors\n22  b.safetensors\n").hexdigest()


def test_a_files_hash_is_sha256_of_its_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"abc")

    assert file_sha256(path) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    )


# --- which files, and how much -----------------------------------------------------------------


def test_the_weights_of_a_model_are_its_tensors_bytes_without_the_headers(tmp_path: Path) -> None:
    assert weight_bytes(chat_model(tmp_path / "one")) == 128
    assert weight_bytes(sharded_chat_model(tmp_path / "two")) == 30
    assert weight_bytes(pipeline_model(tmp_path / "three", "sdxl")) == 4 * 128


def test_only_files_that_a_loader_reads_are_weights(tmp_path: Path) -> None:
    plain = chat_model(tmp_path / "plain")
    write(tmp_path / "plain" / "model.fp16.safetensors", WEIGHTS)
    sharded = sharded_chat_model(tmp_path / "sharded")
    write(tmp_path / "sharded" / "consolidated.safetensors", WEIGHTS)

    assert [file.name for file in weight_files(plain)] == ["model.safetensors"]
    assert [file.name for file in weight_files(sharded)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", safetensors({"x": b"12"}, metadata=False))

    header = read_header(path)

    assert header == {"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", safetensors({}, metadata=False))

    assert read_header(path) == {}


# --- adapters ----------------------------------------------------------------------------------


def ip_adapter(folder: Path) -> AdapterSpec:
    path = write(folder / "reads.safetensors", WEIGHTS)
    write(folder / "encoder" / "config.json", "{}")
    write(folder / "encoder" / "model.safetensors", WEIGHTS)
    return AdapterSpec("reads", "ip_adapter", path, folder / "encoder", cure="fetch it")


def vace(folder: Path) -> AdapterSpec:
    write(folder / "transformer" / "config.json", "{}")
    write(folder / "transformer" / "diffusion_pytorch_model.safetensors", WEIGHTS)
    return AdapterSpec("frames", "vace", folder / "transformer", None, cure="fetch it")


def lora(folder: Path) -> AdapterSpec:
    return AdapterSpec("grain", "lora", write(folder / "grain.safetensors", WEIGHTS), None)


@pytest.mark.parametrize("make", [ip_adapter, vace, lora])
def test_a_whole_adapter_has_no_problems_and_its_files_are_known(
    make: Callable[[Path], AdapterSpec], tmp_path: Path
) -> None:
    adapter = make(tmp_path)

    assert check_adapter(adapter, full=True) == []
    assert adapter_files(adapter) == sorted(tmp_path.rglob("*.safetensors"))
    assert not is_recorded(adapter)


@pytest.mark.parametrize(
    ("make", "file", "what"),
    [
        (ip_adapter, "reads.safetensors", "is missing"),
        (ip_adapter, "encoder/config.json", "is missing"),
        (ip_adapter, "encoder/model.safetensors", "is missing"),
        (vace, "transformer/config.json", "is missing"),
        (lora, "grain.safetensors", "is missing"),
    ],
)
def test_a_file_that_an_adapter_lacks_is_named(
    make: Callable[[Path], AdapterSpec], file: str, what: str, tmp_path: Path
) -> None:
    adapter = make(tmp_path)
    (tmp_path / file).unlink()

    found = check_adapter(adapter)

    assert f"{adapter.id}: {tmp_path / file}: {what}; {adapter.cure}" in map(str, found)


def test_an_image_encoder_under_another_name_is_not_taken(tmp_path: Path) -> None:
    adapter = ip_adapter(tmp_path)
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.rename(weights.with_name("other.safetensors"))

    assert [one.path for one in check_adapter(adapter)] == [str(weights)]


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_adapter_is_found_by_its_header_or_its_hash(cut: bool, tmp_path: Path) -> None:
    adapter = ip_adapter(tmp_path)
    write_manifest(tmp_path, "reads.safetensors")
    write_manifest(tmp_path / "encoder", "config.json", "model.safetensors")
    assert is_recorded(adapter)
    assert check_adapter(adapter, full=True) == []
    file = tmp_path / "encoder" / "model.safetensors"
    file.write_bytes(WEIGHTS[:-1] if cut else WEIGHTS[:-1] + b"!")

    found = check_adapter(adapter, full=True)

    assert {one.path for one in found} == {str(file)}
    assert ("its header promises" if cut else "sha256") in found[0].what
    assert bool(check_adapter(adapter)) == cut


def test_the_bytes_that_are_hashed_are_told(tmp_path: Path) -> None:
    adapter = ip_adapter(tmp_path)
    write_manifest(tmp_path, "reads.safetensors")
    write_manifest(tmp_path / "encoder", "model.safetensors")
    told: list[int] = []

    check_adapter(adapter, full=True, progress=told.append)

    assert sum(told) == 2 * len(WEIGHTS)


def test_a_transformer_of_a_model_that_was_fetched_whole_has_that_models_record(
    tmp_path: Path,
) -> None:
    adapter = vace(tmp_path)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    write(tmp_path / "model_index.json", "{}")
    write_manifest(tmp_path, "model_index.json", weights)
    assert is_recorded(adapter)
    assert check_adapter(adapter, full=True) == []

    (tmp_path / weights).write_bytes(WEIGHTS[:-1] + b"!")

    [problem] = check_adapter(adapter, full=True)
    assert problem.path == str(tmp_path / weights)


def test_a_vace_transformer_that_is_not_as_it_was_fetched_is_not_loaded(tmp_path: Path) -> None:
    adapter = vace(tmp_path / "vace")
    weights = "diffusion_pytorch_model.safetensors"
    write_manifest(adapter.path, "config.json", weights)
    model = replace(pipeline_model(tmp_path / "wan", "wan"), adapters=(adapter,))
    assert f"vace/{weights}" in weights_sha256(model, tmp_path / "state")
    (adapter.path / weights).write_bytes(WEIGHTS[:-1] + b"!")

    with pytest.raises(ModelUnavailable, match=r"sha256 .* is not the recorded .*"):
        weights_sha256(model, tmp_path / "state")

    (adapter.path / "manifest.json").write_text("[]")
    assert [one.what for one in check_files(model)] == [
        "is damaged: not a list of files with sizes and hashes"
    ]

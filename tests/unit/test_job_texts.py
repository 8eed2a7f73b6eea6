"""Tokens that are counted before a model is loaded are those that its engine counts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from worker.catalog import ModelSpec, media_catalog
from worker.config import load_settings
from worker.engine.tokenizers import exported
from worker.errors import ModelUnavailable, PromptTooLong, WorkerError
from worker.protocol.messages import RenderParams, WeightedTerm
from worker.vram.texts import Reader, require_short, text_pieces
from worker.vram.tokenizers import Tokenizers, exported_apart

CATALOG = media_catalog(load_settings("demo", {}))
IMAGE, VIDEO = CATALOG.default("sdxl"), CATALOG.default("wan")
# What tokenizers treat in a way of their own: tokens that end texts, blanks, half characters.
ODD = ["<|endoftext|>", "<|startoftext|>", "!", " \t\n", "it's", "İ", "é", "e\u0301", "🟥", "1234"]
TEXTS = st.lists(st.sampled_from(ODD) | st.text(max_size=12), max_size=12).map("".join)


def params(**more: Any) -> RenderParams:
    return RenderParams(
        **{
            "prompt": "a red circle", "negative_prompt": None, "width": 64, "height": 64,
            "steps": 1, "guidance_scale": 5.0, "seed": 1, **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizers of an image model as published ones have them: a vocabulary and merges, and
    the second one padded with a token that texts contain."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(IMAGE.path / "model_index.json", folder)
    model = json.loads((IMAGE.path / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def readers(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Reader]]:
    """Each tokenizer as the engine has it, and as a plan has it."""
    kept = Tokenizers(tmp_path_factory.mktemp("state"), exported)
    found = []
    for spec in (IMAGE, replace(IMAGE, id="published", path=vocabulary)):
        for reader in kept.of(spec):
            theirs = CLIPTokenizer.from_pretrained(spec.path / reader.name, local_files_only=True)
            found.append((theirs, reader))
    return found


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_an_image_models_tokens_are_those_of_its_pipeline(
    readers: list[tuple[Any, Reader]], text: str
) -> None:
    for theirs, ours in readers:
        assert ours.count(text) == len(theirs(text, truncation=False, verbose=False).input_ids)
        assert ours.limit == theirs.model_max_length


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_a_video_models_tokens_are_those_of_its_file(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(VIDEO.path / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    [reader] = Tokenizers(Path("nowhere")).of(VIDEO)
    assert reader.count(text) == len(tokenizer.encode(text).ids)


@pytest.mark.timeout(120)
def test_the_library_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    [first, second] = Tokenizers(tmp_path).of(IMAGE)
    assert (first.name, second.name) == ("tokenizer", "tokenizer_2")
    assert first.count("a red circle") == second.count("a red circle") == 5
    (tmp_path / "gone").mkdir()
    with pytest.raises(WorkerError, match=r"tokenizers of gone cannot be read: .*model_index"):
        exported_apart(tmp_path / "gone")


def test_it_is_asked_once_for_each_content_of_the_files(vocabulary: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vocabulary, tmp_path / "model")
    spec = replace(IMAGE, path=folder)
    asked: list[Path] = []

    def ask(one: Path) -> Any:
        asked.append(one)
        return exported(one)

    def count(text: str) -> int:
        return Tokenizers(tmp_path / "state", ask).of(spec)[1].count(text)

    assert count("wow!!") > 2
    count("again")
    assert len(asked) == 1
    [kept] = (tmp_path / "state" / "tokenizers").iterdir()
    kept.write_text("{cut sho")
    count("damaged")
    assert len(asked) == 2
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"!"', '"<|endoftext|>"'))
    count("changed")
    assert len(asked) == 3


def test_a_single_files_tokenizers_are_those_of_its_configuration(tmp_path: Path) -> None:
    single = replace(IMAGE, path=tmp_path / "gone.safetensors", config_path=IMAGE.path)
    assert Tokenizers(tmp_path, exported).of(single)[0].count("a red circle") == 5


@pytest.mark.parametrize("spec", [IMAGE, VIDEO], ids=["image", "video"])
def test_without_files_nobody_counts(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"its tokenizer is missing, .*; restore"):
        Tokenizers(tmp_path, exported).of(replace(spec, path=tmp_path / "gone"))


# --- pieces --------------------------------------------------------------------------------------

WORDS = (
    Reader("first", lambda text: len(text.split()) + 2, 77),
    Reader("second", lambda text: 2 * len(text.split()) + 2, 77),
)


@pytest.mark.parametrize(
    ("job", "pieces"),
    [
        (params(prompt=""), 1),
        (params(prompt="red " * 37), 1),
        (params(prompt="red " * 38), 2),  # 76 of the second reader
        (params(prompt="red", negative_prompt="red " * 76), 3),
        (params(prompt="red", negative_prompt="red " * 76, guidance_scale=1.0), 1),
        (params(prompt="red " * 37, weighted=(WeightedTerm("blue", 1.2),)), 2),
    ],
)
def test_a_text_has_as_many_pieces_as_its_longer_reading_needs(
    job: RenderParams, pieces: int
) -> None:
    assert text_pieces(job, WORDS, "chunk") == pieces


def test_more_than_is_taken_is_refused_with_the_counts() -> None:
    assert text_pieces(params(prompt="red " * 750), WORDS, "chunk") == 20
    with pytest.raises(PromptTooLong, match=r"has 1502 tokens .* takes 1500"):
        text_pieces(params(prompt="red " * 751), WORDS, "chunk")
    with pytest.raises(PromptTooLong, match=r"has 76 tokens .* takes 75"):
        text_pieces(params(prompt="red " * 38), WORDS, "refuse")
    require_short(512)
    with pytest.raises(PromptTooLong, match=r"has 513 tokens .* takes 512"):
        require_short(513)

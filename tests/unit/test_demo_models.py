"""The demo models: their making, repair and check, and that they are what loaders expect."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from scripts import make_demo_models

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "make_demo_models.py"

# diffusers 0.42's Euler scheduler, with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and while another process keeps the
    cores busy, the threads' waiting for each other makes a step a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "models"
    result = run("--models-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def own_models(models: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(models, tmp_path / "models")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=150
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")
    }


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_whole_models_are_left_alone_without_loading_any_library(models: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in models.rglob("*")}
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "print({'torch', 'transformers', 'diffusers', 'numpy', 'rich'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, SCRIPT, "--models-dir", models],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.splitlines() == [
        f"the demo models in {models} are there and whole",
        "exit 0",
        "set()",
    ], result.stderr
    assert {file: file.stat().st_mtime_ns for file in models.rglob("*")} == before


def test_they_are_small_and_nothing_is_left_behind(models: Path) -> None:
    assert sum(file.stat().st_size for file in models.rglob("*") if file.is_file()) < 20e6
    assert {path.name for path in models.iterdir()} == {
        *make_demo_models.NAMES,
        make_demo_models.LOCK,
    }


def test_weights_can_be_read_by_whoever_can_read_the_rest(models: Path) -> None:
    assert len({file.stat().st_mode for file in models.rglob("*.*") if file.is_file()}) == 1


def test_two_processes_repair_the_same_folder_and_make_the_same_weights(
    models: Path, own_models: Path
) -> None:
    flip_byte(own_models / "demo-chat" / "model.safetensors")
    manifest = own_models / "demo-image" / make_demo_models.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"builder": "0"}))
    (own_models / ".demo-chat.partial-1").mkdir()
    (own_models / ".demo-video.old-1").mkdir()
    untouched = (own_models / "demo-video" / "model_index.json").stat().st_ino

    builds = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--models-dir", own_models], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = sorted(build.communicate(timeout=150)[0].splitlines()[-1] for build in builds)

    assert [build.returncode for build in builds] == [0, 0]
    assert said[0].startswith("made demo-chat, demo-image in ")
    assert said[1].endswith("are there and whole")
    assert make_demo_models.find_problems(own_models) == {}
    assert weights(own_models) == weights(models)
    assert (own_models / "demo-video" / "model_index.json").stat().st_ino == untouched
    assert {path.name for path in own_models.iterdir()} == {path.name for path in models.iterdir()}


def test_check_says_what_is_wrong_and_changes_nothing(
    own_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--check", "--models-dir", str(own_models)]
    assert make_demo_models.main(arguments) == 0
    assert capsys.readouterr().out == f"the demo models in {own_models} are there and whole\n"

    flip_byte(own_models / "demo-image" / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(own_models / "demo-video")
    assert make_demo_models.main(arguments) == 1
    cure = f"run python scripts/make_demo_models.py --models-dir {own_models}"
    assert capsys.readouterr().out.splitlines() == [
        "demo-image: vae/diffusion_pytorch_model.safetensors is damaged: its sha256 is not the"
        f" recorded one; {cure}",
        f"demo-video: is missing; {cure}",
    ]
    assert not (own_models / "demo-video").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", None, "config.json is missing or cannot be read"),
        ("config.json", b"{", "config.json is damaged: 1 bytes instead of "),
        (make_demo_models.MANIFEST, None, "is missing or damaged"),
        (make_demo_models.MANIFEST, b"{", "is missing or damaged"),
        (make_demo_models.MANIFEST, b'{"builder": "1", "files": []}', "is missing or damaged"),
        (make_demo_models.MANIFEST, b'{"builder": "0", "files": {}}', "builder version 0"),
    ],
)
def test_every_damage_is_noticed(
    own_models: Path, name: str, content: bytes | None, expected: str
) -> None:
    file = own_models / "demo-chat" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    problems = make_demo_models.find_problems(own_models)
    assert list(problems) == ["demo-chat"]
    assert expected in problems["demo-chat"]


def test_a_folder_that_cannot_be_written_is_one_line_of_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("--models-dir", tmp_path / "file")
    assert result.returncode == 1
    assert result.stderr.startswith(f"cannot make the demo models in {tmp_path / 'file'}: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="session")
def chat_tokenizer(models: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models / "demo-chat", local_files_only=True)


@settings(deadline=None, max_examples=300)
@given(text=st.text())
def test_chat_tokens_give_any_text_back(chat_tokenizer: Any, text: str) -> None:
    # Qwen2's tokenizer composes characters first; beyond that nothing is lost.
    assert chat_tokenizer.decode(chat_tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_chat_specials_follow_the_vocabulary_and_end_an_answer(
    models: Path, chat_tokenizer: Any
) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ordinary = json.loads((models / "demo-chat" / "tokenizer.json").read_bytes())["model"]["vocab"]
    end_of_text, start, end = chat_tokenizer.convert_tokens_to_ids(specials)
    assert (end_of_text, start, end) == tuple(len(ordinary) + number for number in range(3))
    assert 1500 <= len(ordinary) <= 2000
    assert len(chat_tokenizer) == len(ordinary) + 3
    assert chat_tokenizer.eos_token_id == end
    assert chat_tokenizer.pad_token_id == end_of_text
    generation = json.loads((models / "demo-chat" / "generation_config.json").read_bytes())
    assert generation["eos_token_id"] == [end, end_of_text]


def test_the_chat_template_adds_no_message(chat_tokenizer: Any) -> None:
    text = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": " hi "}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n"


def test_chat_answers_are_varied(models: Path, chat_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "demo-chat", local_files_only=True)
    assert_same_tensors(model, models / "demo-chat")
    assert 0.8e6 < model.num_parameters() < 1.2e6
    tokens = chat_tokenizer("<|im_start|>user\nHello<|im_end|>\n", return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=40, do_sample=False)[0]
    assert len(set(answer[tokens.input_ids.shape[1] :].tolist())) > 10
    with torch.inference_mode():
        chances = model(**tokens).logits[0, -1].softmax(-1)
    even = 1 / len(chat_tokenizer)
    assert even / 100 < chances[chat_tokenizer.eos_token_id] < even * 100


@pytest.fixture(scope="session")
def image_pipeline(models: Path) -> Any:
    return load_pipeline("StableDiffusionXLPipeline", models / "demo-image")


@pytest.fixture(scope="session")
def video_pipeline(models: Path) -> Any:
    return load_pipeline("WanPipeline", models / "demo-video")


def load_pipeline(kind: str, folder: Path) -> Any:
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_tensors(network: torch.nn.Module, folder: Path) -> None:
    """Every tensor in use is a saved one: nothing was initialised anew by the loader."""
    (file,) = folder.glob("*.safetensors")
    saved = load_file(file)
    tensors = network.state_dict()
    owners = {tensor.data_ptr(): name for name, tensor in tensors.items() if name in saved}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved[owners[tensor.data_ptr()]]), name
    assert set(owners.values()) == set(saved)


def image(pipeline: Any, prompt: str, seed: int = 0, negative: str | None = None) -> Any:
    return pipeline(
        prompt,
        negative_prompt=negative,
        num_inference_steps=15,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]


def video(pipeline: Any, prompt: str, seed: int = 0, negative: str = "", frames: int = 5) -> Any:
    return pipeline(
        prompt,
        negative_prompt=negative,
        height=96,
        width=96,
        num_frames=frames,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]


def difference(one: Any, other: Any) -> float:
    """Mean difference of pixels, in steps of 255."""
    return float(np.abs(one - other).mean() * 255)


def test_image_components_hold_the_saved_weights(models: Path, image_pipeline: Any) -> None:
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        assert_same_tensors(getattr(image_pipeline, part), models / "demo-image" / part)


def test_image_shows_prompt_seed_and_negative_prompt(image_pipeline: Any) -> None:
    first = image(image_pipeline, "a red lighthouse")
    assert first.shape == (128, 128, 3)
    assert np.isfinite(first).all()
    assert first.std() * 255 > 15
    assert difference(first, image(image_pipeline, "a quiet blue river")) > 2
    assert difference(first, image(image_pipeline, "a red lighthouse", seed=1)) > 2
    assert difference(first, image(image_pipeline, "a red lighthouse", negative="blurry")) > 2


def test_image_reload_draws_the_same_picture(
    models: Path, image_pipeline: Any, tmp_path: Path
) -> None:
    image_pipeline.save_pretrained(tmp_path)
    assert weights(tmp_path) == weights(models / "demo-image")
    again = load_pipeline("StableDiffusionXLPipeline", tmp_path)
    first = image(image_pipeline, "an owl, 梟 🦉")
    assert np.array_equal(first, image(again, "an owl, 梟 🦉"))


@settings(deadline=None)
@given(text=st.text())
def test_image_tokenizers_take_any_text(image_pipeline: Any, text: str) -> None:
    for tokenizer in (image_pipeline.tokenizer, image_pipeline.tokenizer_2):
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77
        assert ids[0] == tokenizer.bos_token_id
        end = ids.index(tokenizer.eos_token_id)
        # The unknown token is the end token: behind the first one there is only padding.
        assert set(ids[end + 1 :]) <= {tokenizer.pad_token_id}
    assert image_pipeline.tokenizer.pad_token_id == image_pipeline.tokenizer.eos_token_id
    assert image_pipeline.tokenizer_2.pad_token_id == 0


def test_image_prompts_are_lower_cased(image_pipeline: Any) -> None:
    assert image_pipeline.tokenizer("A Red OWL").input_ids == (
        image_pipeline.tokenizer("a red owl").input_ids
    )


def test_video_components_hold_the_saved_weights(models: Path, video_pipeline: Any) -> None:
    for part in ("text_encoder", "transformer", "vae"):
        assert_same_tensors(getattr(video_pipeline, part), models / "demo-video" / part)


def test_video_shows_prompt_seed_and_time(video_pipeline: Any) -> None:
    first = video(video_pipeline, "a red lighthouse")
    assert first.shape == (5, 96, 96, 3)
    assert np.isfinite(first).all()
    assert min(frame.std() for frame in first) * 255 > 15
    assert difference(first[1:], first[:-1]) > 2
    assert difference(first, video(video_pipeline, "a quiet blue river")) > 2
    assert difference(first, video(video_pipeline, "a red lighthouse", seed=1)) > 2
    assert difference(first, video(video_pipeline, "a red lighthouse", negative="blurry")) > 2
    assert video(video_pipeline, "a red lighthouse", frames=1).shape == (1, 96, 96, 3)


def test_video_reload_makes_the_same_film(
    models: Path, video_pipeline: Any, tmp_path: Path
) -> None:
    video_pipeline.save_pretrained(tmp_path)
    assert weights(tmp_path) == weights(models / "demo-video")
    again = load_pipeline("WanPipeline", tmp_path)
    first = video(video_pipeline, "an owl, 梟 🦉")
    assert np.array_equal(first, video(again, "an owl, 梟 🦉"))


@settings(deadline=None)
@given(text=st.text())
def test_video_tokenizer_takes_any_text(video_pipeline: Any, text: str) -> None:
    tokenizer = video_pipeline.tokenizer
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id not in ids

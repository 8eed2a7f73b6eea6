"""Training of the demo models: resumed runs equal uninterrupted ones, and every stage runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train_demo_chat
import train_demo_video
from demo_models import (
    image_training,
    video_autoencoder,
    video_data,
    video_denoiser,
    video_text,
)
from demo_models.image_checks import load_image_pipeline, paint
from demo_models.publishing import publish
from demo_models.reading import Reader, labels, reading_loss, share_right
from demo_models.scenes import ATTRIBUTES, Description, Thing
from demo_models.training import Average, learning_rate, run_stage
from demo_models.video_checks import film, load_video_pipeline
from demo_models.whitening import whiten
from worker.config import REPOSITORY


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose much to waiting for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stop(Exception):
    pass


def _files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def train(folder: Path, *, steps: int = 12, stop_before: int | None = None) -> dict[str, object]:
    """A stage on a tiny network whose every update depends on random numbers."""
    torch.manual_seed(5)
    network = nn.Linear(3, 2)
    average = Average(network, 0.9)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)

    def step(index: int) -> Mapping[str, float]:
        if index == stop_before:
            raise Stop
        loss = network(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update()
        return {"loss": loss.item()}

    state = {"network": network, "average": average, "optimizer": optimizer}
    run_stage("toy", steps, step, state, folder, seed=1)
    return {"weight": network.weight.detach(), "average": average.average.weight}


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo_models.training.SAVE_EVERY_S", -1.0)  # after every step
    whole = train(tmp_path / "whole")

    with pytest.raises(Stop):
        train(tmp_path / "parts", stop_before=7)
    resumed = train(tmp_path / "parts")

    assert torch.equal(resumed["weight"], whole["weight"])
    assert torch.equal(resumed["average"], whole["average"])


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    first = train(tmp_path)

    again = train(tmp_path, stop_before=0)

    assert torch.equal(again["weight"], first["weight"])


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(index, 1000, 2.0) for index in range(1000)]

    assert max(rates) == pytest.approx(2.0)
    assert rates[:50] == sorted(rates[:50])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(0.04, rel=0.01)


def test_published_folders_keep_their_card_and_list_their_files(tmp_path: Path) -> None:
    target = tmp_path / "demo-x"
    target.mkdir()
    (target / "README.md").write_text("card")
    (target / "old.bin").write_text("old")

    publish(target, lambda folder: (folder / "new.bin").write_text("new"))

    files = json.loads((target / "manifest.json").read_bytes())["files"]
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md",
        "manifest.json",
        "new.bin",
    ]
    assert files == {
        "new.bin": {
            "size": 3,
            "sha256": "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437",
        }
    }
    assert [path.name for path in tmp_path.iterdir()] == ["demo-x"]


def test_a_failed_publication_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "demo-x"
    publish(target, lambda folder: (folder / "a.bin").write_text("a"))

    def fails(folder: Path) -> None:
        (folder / "half.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(target, fails)

    assert (target / "a.bin").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["demo-x"]


def test_every_stage_of_the_image_model_runs_and_gives_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "VAE_STEPS": 2,
        "TEXT_STEPS": 1,
        "UNET_STEPS": 1,
        "UNET_BATCH": 2,
        "SCENES": {(128, 128): 4, (192, 128): 2},
    }.items():
        monkeypatch.setattr(image_training, name, value)
    job = image_training.Job(tmp_path / "work", tmp_path / "demo-image", seed=3)

    job.train_vae()
    job.train_text()
    job.make_latents()
    job.train_unet()
    job.publish()

    made = torch.load(tmp_path / "work" / "latents.pt", weights_only=False)
    latents, descriptions, scenes = made[128, 128]
    assert latents.shape == (4, 4, 16, 16)
    assert len(descriptions) == len(scenes) == 4
    pipeline = load_image_pipeline(tmp_path / "demo-image")
    [picture] = paint(pipeline, ["a red circle"], [1], steps=2)
    assert picture.shape == (128, 128, 3)


def test_every_stage_of_the_video_model_runs_and_gives_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, values in {
        video_autoencoder: {"FRAME_STEPS": 1, "CLIP_STEPS": 1},
        video_text: {"TEXT_STEPS": 1},
        video_data: {"IMAGES": 2, "CLIPS": 3, "CONTEXTS": 2},
        video_denoiser: {
            "STEPS": {"image": 1, "clip": 1},
            "FURTHER_STEPS": 1,
            "BATCH": {"image": 2, "clip": 2},
            "GIVEN": 1,
        },
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    train_demo_video.train(tmp_path / "work", tmp_path / "demo-video", seed=3)

    pipeline = load_video_pipeline(tmp_path / "demo-video")
    clip = film(pipeline, "a red circle", 1, frames=5, steps=2)
    assert clip.shape == (5, 96, 96, 3)
    before = _files(tmp_path / "demo-video")

    train_demo_video.train_further(tmp_path / "more", tmp_path / "demo-video", seed=4)

    after = _files(tmp_path / "demo-video")
    assert {name for name in after if after[name] != before.get(name)} == {
        "manifest.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    assert after.keys() == before.keys()


def test_three_of_eight_clips_turn_and_the_same_numbers_give_the_same_clip() -> None:
    clips = [video_data.clip(5, index) for index in range(400)]
    turning = sum(one.wanted.motion == "turning" for one in clips)
    assert 120 <= turning <= 180
    assert clips[7] == video_data.clip(5, 7)


def test_chat_stages_run_and_go_on_from_published_weights_and_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "demo-chat"
    train_demo_chat.train(folder, tmp_path / "work", 0.0, seed=3, go_on=False)
    first = load_file(folder / "model.safetensors")
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = [json.loads((folder / name).read_bytes()) for name in names]

    train_demo_chat.train(folder, tmp_path / "more", 0.0, seed=3, go_on=True)

    again = load_file(folder / "model.safetensors")
    assert first.keys() == again.keys()
    assert any(not torch.equal(first[name], again[name]) for name in first)
    assert [json.loads((folder / name).read_bytes()) for name in names] == tokenizer


def test_going_on_from_published_weights_trains_the_denoiser_alone(tmp_path: Path) -> None:
    """It trained an autoencoder for ten minutes that nothing used."""
    job = image_training.Job(tmp_path / "work", tmp_path / "demo-image", seed=3, go_on=True)

    job.train_vae()
    job.train_text()

    assert not (tmp_path / "work").exists()


def test_going_on_draws_new_pictures_every_second_one_of_two_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder for them was missed: only stages that do not run here had made it."""
    monkeypatch.setattr(image_training, "SCENES", {(128, 128): 8})
    published = REPOSITORY / "models" / "demo-image"

    image_training.Job(tmp_path / "work", published, seed=3, go_on=True).make_latents()

    [(latents, wanted, scenes)] = torch.load(
        tmp_path / "work" / "latents.pt", weights_only=False
    ).values()
    assert latents.shape == (8, 4, 16, 16)
    assert len(scenes) == 8
    assert all(len(one.things) == 2 for one in wanted[1::2])


def test_whitened_latents_are_uncorrelated_and_decode_to_the_same_picture() -> None:
    torch.manual_seed(1)
    plain, white = image_training.new_vae().eval(), image_training.new_vae().eval()
    white.load_state_dict(plain.state_dict())
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1

    with torch.inference_mode():
        before = plain.encode(pictures).latent_dist
        whiten(
            white.quant_conv,
            white.post_quant_conv,
            before.mean,
            before.var,
            1 / white.config.scaling_factor,
        )
        after = white.encode(pictures).latent_dist
        decoded = (plain.decode(before.mean).sample, white.decode(after.mean).sample)

    flat = after.mean.permute(1, 0, 2, 3).flatten(1) * white.config.scaling_factor
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-2)
    torch.testing.assert_close(torch.cov(flat), torch.eye(4), rtol=0, atol=1e-2)
    torch.testing.assert_close(*decoded, rtol=1e-3, atol=1e-3)


def test_the_heads_that_teach_reading_ignore_padding_and_count_whole_texts() -> None:
    torch.manual_seed(2)
    reader = Reader(8)
    states, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = states.clone()
    other[0, 3:] = 9.0
    truth = labels([Description((Thing("circle", "red"),)), Description(background="grey")])

    logits = reader(states, mask)

    for one, two in zip(logits, reader(other, mask), strict=True):
        torch.testing.assert_close(one, two)
    assert reading_loss(logits, truth) > 0
    sure = [
        nn.functional.one_hot(truth[:, index], count).float() * 9
        for index, count in enumerate(ATTRIBUTES.values())
    ]
    assert share_right(sure, truth) == 1.0
    sure[0] = -sure[0]
    assert share_right(sure, truth) == 0.0


@pytest.mark.parametrize("call", ['clip_tokenizer(pad_token="!")', "t5_tokenizer()"])
def test_a_tokenizer_is_the_same_in_every_process(call: str) -> None:
    """Encoders trained in one process read with the tokenizer that another one makes."""
    program = (
        "import hashlib; from demo_models.vocabulary import *; "
        f"print(hashlib.sha256({call}.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    folder = Path(image_training.__file__).parents[1]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True
        ).stdout.split()[-1]
        for _ in range(2)
    }

    assert len(digests) == 1

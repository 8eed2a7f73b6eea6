"""How demo-video is trained and measured: the shortcuts are exact, and the measures see motion."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline
from PIL import Image

from demo_models import (
    muon,
    video_autoencoder,
    video_checks,
    video_context,
    video_data,
    video_denoiser,
)
from demo_models.checkers import motion_of
from demo_models.drawing import PALETTE
from demo_models.layout import layout
from demo_models.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    Description,
    Scene,
    Thing,
    held_out,
)
from demo_models.whitening import whiten


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(5)
    made = video_autoencoder.new_autoencoder()
    torch.nn.init.normal_(made.encoder.conv_in.weight, std=0.2)  # every tap over time counts
    made.register_to_config(
        latents_mean=[0.1 * i for i in range(16)], latents_std=[1 + 0.1 * i for i in range(16)]
    )
    return made.requires_grad_(False)


def test_many_equal_zero_positions_may_be_one_key_with_their_number_as_weight():
    torch.manual_seed(1)
    network = video_denoiser.new_denoiser()
    lengths = torch.tensor([3, 7])
    texts = torch.randn(2, 8, 64) * (torch.arange(8) < lengths[:, None]).unsqueeze(-1)
    latents, level = torch.randn(2, 16, 1, 4, 4), torch.tensor([200.0, 900.0])
    given = torch.randn(2, 96, 1, 4, 4)
    padded = torch.nn.functional.pad(texts, (0, 0, 0, video_denoiser.TEXT_TOKENS - 8))
    with torch.no_grad():
        for parameter in network.parameters():  # zero keys and values are not special
            parameter += 0.05 * torch.randn_like(parameter)
        expected = network(latents, level, padded, None, given, return_dict=False)[0]

        video_denoiser.use_short_texts(network).set_lengths(lengths, 8)
        short = network(latents, level, texts, None, given, return_dict=False)[0]

    assert torch.allclose(short, expected, atol=1e-5)


def test_the_context_of_given_frames_is_the_pipelines_own(vae):
    network = video_denoiser.new_denoiser()
    pipeline = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=UniPCMultistepScheduler(),
        transformer=network,
    )
    clip = video_autoencoder.pixels(video_data.clip(3, 0).scenes)[None, :, :, 40:56, 40:56]
    for mode in video_context.MODES:
        video, masks = video_context.given_only(clip, [mode])
        latents = pipeline.prepare_video_latents(
            video, masks.expand(-1, 3, -1, -1, -1), [[]], None, torch.device("cpu")
        )
        folded = pipeline.prepare_masks(masks.expand(-1, 3, -1, -1, -1), [[]])

        ours = video_context.context(
            video_context.normalised(vae, video),
            video_context.normalised(vae, torch.zeros_like(video)),
            masks,
        )

        assert torch.allclose(ours, torch.cat([latents, folded], dim=1), atol=1e-4)


def test_a_lesson_gives_the_frames_of_its_first_rows_only(vae, monkeypatch):
    side = 32
    monkeypatch.setattr(video_data, "SIDE", side)
    blank = torch.zeros(1, 3, 17, side, side)
    clip = video_autoencoder.pixels(video_data.clip(3, 0).scenes)[None, :, :, :side, :side]
    modes = [video_data.mode_of(row) for row in range(3)]
    given, masks = video_context.given_only(clip.expand(3, -1, -1, -1, -1), modes)
    inactive = torch.cat([video_context.normalised(vae, one[None]) for one in given])
    empty = video_context.normalised(vae, blank)
    lessons = video_data.Lessons(inactive, [], torch.empty(0), inactive, empty)

    made = lessons.context([2, 0, 1], given=2)

    for at, row in ((0, 2), (1, 0)):
        expected = video_context.context(inactive[row : row + 1], empty, masks[row : row + 1])
        assert torch.equal(made[at : at + 1], expected)
    assert torch.equal(made[2:], video_context.context(empty, empty, torch.ones_like(masks[:1])))


def test_a_denoiser_learns_from_pictures_and_then_from_clips(tmp_path, monkeypatch):
    """The second stage could not start: a network that is overheard cannot be copied."""
    monkeypatch.setattr(video_denoiser, "STEPS", {"image": 2, "clip": 2})
    monkeypatch.setattr(video_denoiser, "BATCH", {"image": 2, "clip": 3})
    monkeypatch.setattr(video_denoiser, "GIVEN", 1)
    torch.manual_seed(8)
    network = video_denoiser.new_denoiser()
    start = deepcopy(network.state_dict())

    def encode(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.full((len(texts),), 3)
        return torch.randn(len(texts), 4, 64) * (torch.arange(4) < 3)[:, None], lengths

    for kind, frames in (("image", 1), ("clip", 5)):
        drawn = [video_data.clip(3, row) for row in range(4)]
        layouts = layout([one.scenes[0] for one in drawn], 6, 6)
        lessons = video_data.Lessons(
            torch.randn(4, 16, frames, 12, 12),
            [one.wanted for one in drawn],
            layouts.unsqueeze(2).expand(-1, -1, frames, -1, -1),
            inactive=torch.randn(2, 16, frames, 12, 12),
            empty=torch.randn(1, 16, frames, 12, 12),
        )
        best = video_denoiser.train_denoiser(network, kind, lessons, encode, tmp_path, seed=1)

    for part in ("blocks.4.ffn.net.2.weight", "vace_blocks.1.attn1.to_q.weight"):
        assert not torch.equal(best.state_dict()[part], start[part]), part


def test_whitening_makes_unit_latents_and_changes_no_clip(vae):
    made = deepcopy(vae)
    clips = torch.rand(6, 3, 5, 32, 32) * 2 - 1
    expected = _round_trip(made, clips)

    before = made.encode(clips).latent_dist
    whiten(made.quant_conv, made.post_quant_conv, before.mean, before.var, 1.0)

    flat = made.encode(clips).latent_dist.mode().transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(flat), torch.eye(16), atol=2e-2)
    assert float(flat.mean(dim=1).abs().max()) < 1e-2
    assert torch.allclose(_round_trip(made, clips), expected, atol=1e-3)


def test_moments_are_near_zero_for_unit_latents_and_far_for_equal_channels():
    torch.manual_seed(6)
    unit, equal = video_autoencoder._Moments(), video_autoencoder._Moments()
    for _ in range(20):
        near = unit.distance(torch.randn(4, 16, 2, 12, 12))
        far = equal.distance(torch.randn(4, 1, 2, 12, 12).expand(-1, 16, -1, -1, -1))

    assert float(near) < 0.01 < 0.5 < float(far)


def test_a_latent_frames_colours_are_those_of_its_frames():
    scenes = [Scene((), ground) for ground in ("white", *["black"] * 2, *["grey"] * 2)]

    shares = video_autoencoder._colours(video_autoencoder.pixels(scenes)[None])

    assert shares.shape == (1, len(PALETTE), 2, 12, 12)
    names = (*COLOURS, *BACKGROUNDS)
    of = {name: shares[0, names.index(name), :, 5, 5].tolist() for name in BACKGROUNDS}
    assert of == {"white": [1.0, 0.0], "grey": [0.0, 0.5], "black": [0.0, 0.5]}


def test_the_quick_autoencoder_computes_the_same(vae):
    clips = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    expected = [_round_trip(vae, one) for one in (clips, clips[:, :, :1])]

    with video_autoencoder.quick_autoencoder():
        quick = [_round_trip(vae, one) for one in (clips, clips[:, :, :1])]

    for one, other in zip(quick, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_muon_makes_the_singular_values_of_all_matrices_alike():
    torch.manual_seed(3)
    for matrices in (torch.randn(2, 16, 40), torch.randn(2, 40, 16)):
        values = torch.linalg.svdvals(muon.orthogonal(matrices))

        assert matrices.shape == muon.orthogonal(matrices).shape
        assert 0.5 < float(values.min()) and float(values.max()) < 1.5


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_motion_of_a_drawn_clip_is_seen(motion):
    chance = random.Random(motion)
    wanted = Description((Thing("star", "green"), Thing("square", "red")), None, "grey", motion)

    filmed = video_checks.judged("", wanted, video_checks.drawn(wanted, chance))

    assert (filmed.motion, filmed.wrong) == (motion, [])


def test_a_still_clip_and_an_empty_one_have_no_motion():
    wanted = Description((Thing("star", "green"),), None, "grey", "left")
    still = [video_checks.drawn(wanted, random.Random(4))[0]] * 17

    assert motion_of(still) is None
    assert motion_of([np.full((96, 96, 3), 245, np.uint8)] * 17) is None


def test_the_error_of_given_frames_counts_those_only():
    truth = np.zeros((17, 96, 96, 3), np.uint8)
    clip = truth.copy()
    clip[1:] = 255

    assert video_checks.frame_error(clip, truth, "start") == 0
    assert video_checks.frame_error(clip, truth, "end") == 1
    assert video_checks.frame_error(clip, truth, "both") == 0.5


def test_the_error_on_things_leaves_the_background_out():
    truth = np.zeros((17, 8, 8, 3), np.uint8)
    truth[:, 2:4, 2:4] = 255
    nothing = np.zeros_like(truth)

    assert video_checks.frame_error(nothing, truth, "start") == 4 / 64
    assert video_checks.frame_error(nothing, truth, "start", things=True) == 1


def test_training_clips_are_the_same_for_the_same_number_and_never_held_out():
    first, again = video_data.clip(11, 5), video_data.clip(11, 5)
    other = video_data.clip(11, 6)

    assert first == again != other
    assert not any(held_out(video_data.clip(11, number).wanted) for number in range(30))


def test_training_captions_are_sometimes_empty():
    chance = random.Random(6)
    wanted = Description((Thing("star", "green"),), None, None, "left")
    texts = [video_denoiser.random_caption(wanted, chance) for _ in range(300)]

    assert 10 < sum(not text for text in texts) < 60
    assert sum("star" in text for text in texts) > 200


def test_a_sheet_has_a_row_for_every_clip():
    wanted = Description((Thing("star", "green"),), None, None, "left")
    filmed = video_checks.judged("x", wanted, video_checks.drawn(wanted, random.Random(1)))

    sheet = video_checks.film_sheet([filmed, filmed])

    assert isinstance(sheet, Image.Image)
    assert sheet.height >= 2 * 96


def _round_trip(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(clips).latent_dist.mode()).sample

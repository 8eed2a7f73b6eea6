"""Colours of latents: fitted to what a VAE makes, kept, and shown no more often than wanted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from worker.config import REPOSITORY
from worker.engine.media import previews
from worker.engine.media.previews import (
    EDGE,
    PICTURES,
    Colours,
    Glimpses,
    Moments,
    Previews,
    as_webp,
    drawn_pictures,
    features,
    pairs,
)

GREY = Colours(np.repeat([0.25, 0.0], [4, 14])[:, None].repeat(3, 1), np.full(3, 0.5))


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class LinearVae(torch.nn.Module):
    """Latents that are a linear map of colours, in a space of its own. Counts what it encodes."""

    def __init__(self, channels: int, *, video: bool = False, **config: Any):
        super().__init__()
        self.config = {"scaling_factor": 0.5} | config
        if video:
            self.config = Config(z_dim=channels, **config)
        else:
            self.config = Config(**self.config)
        chance = torch.Generator().manual_seed(3)
        self.map = torch.nn.Parameter(torch.randn(channels, 3, generator=chance))
        self.dtype = torch.float32
        self.encoded: list[tuple[int, ...]] = []

    def latents(self, colours: torch.Tensor) -> torch.Tensor:
        """colours: (..., 3) from 0 to 1. In the denoiser's space."""
        latents = (colours * 2 - 1) @ self.map.T + 1.5
        if (mean := self.config.get("latents_mean")) is not None:
            return (latents - torch.tensor(mean)) / torch.tensor(self.config["latents_std"])
        scaled: torch.Tensor = latents * self.config["scaling_factor"]
        return scaled

    def encode(self, picture: torch.Tensor) -> Any:
        self.encoded.append(tuple(picture.shape))
        small = torch.nn.functional.avg_pool2d(picture.flatten(0, -4).flatten(0, -4), 8)
        small = small.view(*picture.shape[:-2], *small.shape[-2:])
        return Encoded(torch.einsum("cr,br...->bc...", self.map, small) + 1.5)


class Config(dict[str, Any]):
    """As diffusers has them: a dictionary whose keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as exc:
            raise AttributeError(name) from exc


class Encoded:
    def __init__(self, latents: torch.Tensor):
        self.latent_dist = self
        self._latents = latents

    def mode(self) -> torch.Tensor:
        return self._latents


def shown(webp: bytes) -> Image.Image:
    return Image.open(io.BytesIO(webp))


SPREAD = {"latents_mean": [0.5, -1.0, 0.0, 2.0, 0.1], "latents_std": [0.5, 2.0, 1.0, 3.0, 0.7]}


@pytest.mark.parametrize(
    "vae",
    [LinearVae(4), LinearVae(4, latents_mean=None), LinearVae(5, video=True, **SPREAD)],
)
def test_the_colours_of_a_linear_vae_are_found_in_the_space_of_its_denoiser(vae: Any) -> None:
    colours = drawn_pictures(vae).colours()
    wanted = torch.tensor([[0.9, 0.1, 0.4], [0.3, 0.3, 0.3], [0.05, 0.95, 0.6]])

    latents = vae.latents(wanted).detach()[:, :, None, None]  # three pictures of one pixel
    found = [np.asarray(colours.picture(one[None]), float)[0, 0] / 255 for one in latents]

    assert np.abs(np.array(found) - wanted.numpy()).max() < 0.03  # the ridge takes a little
    side, video = previews.SIDE, bool(vae.config.get("z_dim"))
    assert set(vae.encoded) == {(1, 3, previews.STILL, side, side) if video else (1, 3, side, side)}
    assert len(vae.encoded) == previews.DRAWN


@given(seed=st.integers(0, 2**32), channels=st.integers(1, 17), height=st.integers(1, 5))
def test_a_picture_is_what_its_features_weigh(seed: int, channels: int, height: int) -> None:
    chance = np.random.default_rng(seed)
    latents = chance.normal(size=(channels, height, 7)).astype(np.float32)
    seen = features(latents)
    map_ = Colours(chance.normal(size=(seen.shape[1], 3)) / channels, chance.random(3))

    picture = map_.picture(torch.tensor(latents)[None])

    wanted = (seen @ map_.weights + map_.bias).clip(0, 1).reshape(height, 7, 3) * 255
    assert np.abs(np.asarray(picture, float) - wanted).max() < 0.6


def test_what_a_decoder_bends_is_followed() -> None:
    """The nearest linear map of this one is grey, and wrong by 32 of 255."""
    chance = np.random.default_rng(1)
    moments = Moments(0, np.zeros((8, 8)), np.zeros((8, 3)))
    for _ in range(40):
        latents = np.tile(chance.uniform(-1, 1, (2, 1, 1)), (1, 4, 4))
        lightness = (latents[0] * latents[1] + 1) / 2
        moments = moments.plus(latents, np.stack([lightness] * 3, axis=-1))

    new = torch.tensor([0.8, -0.9]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    preview = moments.colours().picture(new)

    assert np.abs(np.asarray(preview, float) - 255 * (1 - 0.72) / 2).max() < 4


@pytest.mark.parametrize("kind", ["image", "video"])
def test_grounds_that_no_picture_had_yet_are_shown_in_their_colour(kind: str) -> None:
    """Of a linear map and pictures of one colour, a grey ground became magenta after a first
    picture with a white one: the demo VAE has seen no such pictures, and its decoder bends."""
    vae = demo_vae(kind)
    moments = drawn_pictures(vae).plus(*of_scene(vae, (245, 245, 245)))
    colours = moments.colours()

    for ground in ((140, 140, 140), (16, 16, 16)):
        latents, wanted = of_scene(vae, ground)
        preview = np.asarray(colours.picture(torch.tensor(latents)[None]), float)
        wrong = np.median(preview, axis=(0, 1)) - np.median(255 * wanted, axis=(0, 1))
        assert np.abs(wrong).max() < 45  # 130 of the linear map, of 255
        assert wrong.max() - wrong.min() < 20  # nothing of another hue; 127


def demo_vae(kind: str) -> Any:
    import diffusers

    named = {"image": diffusers.AutoencoderKL, "video": diffusers.AutoencoderKLWan}[kind]
    folder = REPOSITORY / "models" / f"demo-{kind}" / "vae"
    return named.from_pretrained(str(folder), local_files_only=True)


@torch.inference_mode()
def of_scene(vae: Any, ground: tuple[int, int, int]) -> Any:
    """Latents of a red square on this ground, and the colours that are decoded of them."""
    pixels = np.full((96, 96, 3), ground, np.uint8)
    pixels[30:60, 18:54] = (222, 38, 38)
    scene = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    is_video = hasattr(vae.config, "z_dim")
    if is_video:
        scene = scene.unsqueeze(2).repeat(1, 1, 5, 1, 1)
    latents = vae.encode(scene).latent_dist.mode()
    decoded = ((vae.decode(latents).sample[0].clamp(-1, 1) + 1) * 127.5).round().byte()
    made = decoded.permute(1, 2, 3, 0).numpy() if is_video else to_picture(decoded)
    found = pairs(previews._normalised(vae, latents), made)
    assert found is not None
    return found


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """pixels: (3, height, width) bytes."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def test_a_preview_is_a_small_webp_of_the_middle_frame() -> None:
    video = torch.zeros(1, 4, 5, 60, 104)
    video[:, :, 2] = 1.0
    chance = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 160, 120, generator=chance)

    middle = shown(as_webp(GREY.picture(video)))
    large = as_webp(GREY.picture(noise))

    assert (middle.format, middle.size) == ("WEBP", (104, 60))
    assert np.asarray(middle).min() > 250  # 0.5 and four times a quarter is more than white
    assert shown(large).size == (96, EDGE)
    assert len(large) < 16 << 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_no_numbers_are_shown_somehow(value: float) -> None:
    picture = GREY.picture(torch.full((1, 4, 8, 8), value))

    assert picture.size == (8, 8)


def test_previews_come_every_half_second_and_at_the_last_step() -> None:
    now = [10.0]
    glimpses = Glimpses(GREY, lambda: now[0])
    asked: list[float] = []

    def latents() -> torch.Tensor:
        asked.append(now[0])
        return torch.zeros(1, 4, 8, 8)

    for at, last, comes in [
        (10.0, False, True), (10.3, False, False), (10.4, True, True), (10.6, False, False),
        (10.9, False, True), (11.3, True, True),
    ]:  # fmt: skip
        now[0] = at
        assert bool(glimpses.of(latents, last=last)) == comes
    assert asked == [10.0, 10.4, 10.9, 11.3]
    assert Glimpses(None, lambda: 0.0).of(latents, last=True) == b""


def test_a_map_is_fitted_once_and_kept_for_the_next_process(tmp_path: Path) -> None:
    vae, made = LinearVae(4), Image.new("RGB", (64, 64), (200, 100, 50))
    latents = vae.latents(torch.tensor([200, 100, 50]) / 255)
    latents = latents.detach().view(1, 4, 1, 1).expand(1, 4, 8, 8)
    first = Previews(tmp_path)
    before = first.of(vae, "weights")

    for _ in range(PICTURES + 3):
        first.learn(vae, "weights", latents, made)
    later = Previews(tmp_path).of(vae, "weights")

    assert before is None
    assert later is not None
    assert np.abs(np.asarray(later.picture(latents)) - np.array([200, 100, 50])).max() <= 2
    assert len(vae.encoded) == previews.DRAWN
    [file] = tmp_path.iterdir()
    assert f'"pictures": {PICTURES}' in file.read_text()
    assert Previews(tmp_path).of(vae, "other weights") is None


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pictures": 1, "squares": [], "products": []}'])
def test_a_damaged_file_is_fitted_anew(content: bytes, tmp_path: Path) -> None:
    vae, made = LinearVae(4), Image.new("RGB", (64, 64))
    Previews(tmp_path).learn(vae, "weights", torch.zeros(1, 4, 8, 8), made)
    [file] = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(content)

    fresh = Previews(tmp_path)
    assert fresh.of(vae, "weights") is None
    fresh.learn(vae, "weights", torch.zeros(1, 4, 8, 8), made)

    assert file.read_bytes() == good


def test_a_device_without_room_for_the_fit_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> Moments:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(previews, "drawn_pictures", full)
    made = Previews(tmp_path)
    made.learn(LinearVae(4), "weights", torch.zeros(1, 4, 8, 8), Image.new("RGB", (64, 64)))

    assert made.of(LinearVae(4), "weights") is None


def test_frames_of_a_video_are_paired_with_their_latents() -> None:
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    frames[1:5] = 255  # of the second latent frame of three
    latents = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 4, 3, 2, 2)

    found = pairs(latents, frames)

    assert found is not None
    assert (found[0] == 1).all()
    assert (found[1] == 1).all()
    assert pairs(latents, frames[:8]) is None
    assert pairs(latents[:, :, :1], frames[:1]) is not None


def test_half_precision_is_fitted_in_float32_where_its_vae_would_overflow() -> None:
    vae = demo_vae("image")
    whole = drawn_pictures(vae)
    half = drawn_pictures(vae.to(torch.float16))

    assert vae.dtype == torch.float16
    assert np.abs(half.products - whole.products).max() < 0.01

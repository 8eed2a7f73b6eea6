"""Small pictures of what is being denoised, without a decode.

A linear map makes colours of latents that are near enough. It is fitted per VAE, first to what the
VAE makes of pictures of one colour, and then to the first pictures that are decoded anyway: how
near the former come depends on the VAE, and the latter are what jobs look like.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from worker.receipt import canonical_json

log = logging.getLogger(__name__)

FORMAT = 1  # of the files
EVERY_S = 0.5  # between two previews of a job
EDGE = 128  # pixels, of a preview's longer side, at most
QUALITY = 80
LEVELS = 3  # of each of red, green, blue, among the plain colours
SIDE = 64  # pixels, of the plain pictures
PICTURES = 16  # decoded ones that a map is fitted to
PLAIN = 0.2  # what all plain colours together count, where a decoded picture counts 1
# Of the channels' mean variance, against large weights of channels that hardly vary: they would
# turn texture into glaring colours.
RIDGE = 1e-3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Colours:
    """A map from a latent pixel to red, green and blue from 0 to 1."""

    weights: Floats  # (channels, 3)
    bias: Floats  # (3,)

    def picture(self, latents: torch.Tensor) -> Image.Image:
        """latents: (1, channels, height, width), or (1, channels, frames, height, width), of which
        the middle frame is shown; as the denoiser has them. One pixel for each of theirs, fewer
        where that is more than EDGE."""
        if latents.dim() == 5:
            latents = latents[:, :, latents.shape[2] // 2]
        pixels = latents[0].float().cpu().numpy().transpose(1, 2, 0)
        shown = pixels @ self.weights.astype(np.float32) + self.bias.astype(np.float32)
        made = Image.fromarray((np.nan_to_num(shown).clip(0, 1) * 255).round().astype(np.uint8))
        made.thumbnail((EDGE, EDGE), Image.Resampling.BOX)
        return made


def as_webp(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=QUALITY, method=0)
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Moments:
    """What a map is computed from: sums over pairs of latent pixels and colours."""

    pictures: int  # decoded ones
    squares: Floats  # (channels + 1, channels + 1), of the latent pixels and a constant 1
    products: Floats  # (channels + 1, 3), of these with the colours

    def plus(self, latents: Floats, colours: Floats) -> Moments:
        """With one more picture. latents: (count, channels); colours: (count, 3), 0 to 1."""
        squares, products = _means(latents, colours)
        return Moments(self.pictures + 1, self.squares + squares, self.products + products)

    def colours(self) -> Colours:
        """Least squares, with a ridge."""
        total = self.squares[-1, -1]
        mean, mean_colour = self.squares[-1, :-1] / total, self.products[-1] / total
        spread = self.squares[:-1, :-1] / total - np.outer(mean, mean)
        together = self.products[:-1] / total - np.outer(mean, mean_colour)
        ridge = RIDGE * np.trace(spread) / len(spread) * np.eye(len(spread))
        weights = np.linalg.solve(spread + ridge, together)
        return Colours(weights, mean_colour - mean @ weights)


class Previews:
    """Colour maps by VAE, in memory and in a folder. Engine thread only."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[str, Moments | None] = {}

    def of(self, vae: Any, weights: str) -> Colours | None:
        """None until it was fitted. weights: names the VAE's weights, such as their hash."""
        moments = self._moments(_key(vae, weights))
        return moments.colours() if moments is not None else None

    def learn(self, vae: Any, weights: str, latents: torch.Tensor, made: Any) -> None:
        """Fit the map of a VAE that is on the device to what it has decoded, while that improves
        it. made: a picture, or the frames of a video (frames, height, width, 3)."""
        key = _key(vae, weights)
        moments = self._moments(key)
        if moments is not None and moments.pictures >= PICTURES:
            return
        try:
            moments = moments or plain_colours(vae)
        except torch.OutOfMemoryError as exc:  # there are no previews then, and the next job tries
            log.warning("no previews yet, for want of device memory: %s", exc)
            return
        pairs = _pairs(latents, made)
        self._known[key] = moments = moments.plus(*pairs) if pairs is not None else moments
        try:
            _write(self._path(key), moments)
        except OSError as exc:
            log.warning("the colours of previews are not kept on disk: %s", exc)

    def _moments(self, key: str) -> Moments | None:
        if key not in self._known:
            self._known[key] = _read(self._path(key))
        return self._known[key]

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"


class Glimpses:
    """When previews of one job are made. Engine thread only."""

    def __init__(self, colours: Colours | None, clock: Callable[[], float]):
        """colours: None makes none."""
        self._colours = colours
        self._clock = clock
        self._last_at: float | None = None

    def of(self, latents: Callable[[], torch.Tensor], *, last: bool) -> bytes:
        """A WebP of the latents after a step; empty where it is too soon. last: it is the last step
        of its picture, which is always shown."""
        now = self._clock()
        soon = self._last_at is not None and now - self._last_at < EVERY_S
        if self._colours is None or (soon and not last):
            return b""
        self._last_at = now
        return as_webp(self._colours.picture(latents()))


@torch.inference_mode()
def plain_colours(vae: Any) -> Moments:
    """What a VAE's encoder makes of plain pictures of LEVELS ** 3 colours, in the space that the
    denoiser works in.

    vae: AutoencoderKL or AutoencoderKLWan, on its device. Raises torch.OutOfMemoryError.
    """
    device = next(vae.parameters()).device
    # In float16 the published VAE overflows, as when it decodes.
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", True)
    colours = np.array([*itertools.product(np.linspace(0.0, 1.0, LEVELS), repeat=3)])
    seen = []
    try:
        if upcast:
            vae.to(dtype=torch.float32)
        for colour in colours:
            plain = torch.tensor(colour * 2 - 1, device=device, dtype=vae.dtype)
            shape = (1, 3, 1, SIDE, SIDE) if _is_video(vae) else (1, 3, SIDE, SIDE)
            picture = plain.view(1, 3, *(1 for _ in shape[2:])).expand(shape).contiguous()
            latents = _normalised(vae, vae.encode(picture).latent_dist.mode())
            # Borders see what lies beyond the picture.
            middle = latents[0, ..., latents.shape[-2] // 2, latents.shape[-1] // 2]
            seen.append(middle.flatten().double().cpu().numpy())
    finally:
        if upcast:
            vae.to(dtype=torch.float16)
    squares, products = _means(np.array(seen), colours)
    return Moments(0, PLAIN * squares, PLAIN * products)


def _means(latents: Floats, colours: Floats) -> tuple[Floats, Floats]:
    """Mean squares and products, as Moments has them."""
    pixels = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    return pixels.T @ pixels / len(pixels), pixels.T @ colours / len(pixels)


def _pairs(latents: torch.Tensor, made: Any) -> tuple[Floats, Floats] | None:
    """Latent pixels and the mean colours of what each became; of the middle of a video. None where
    they are not of the same moments, or no numbers."""
    if latents.dim() == 5:
        count, middle = latents.shape[2], latents.shape[2] // 2
        each, rest = divmod(len(made) - 1, count - 1) if count > 1 else (0, len(made) - 1)
        if rest or (count > 1 and not each):
            return None
        # After the first one, a latent frame is the `each` frames up to its own.
        latents = latents[:, :, middle]
        made = Image.fromarray(made[max(0, each * middle - each // 2)])
    _, channels, height, width = latents.shape
    small = made.convert("RGB").resize((width, height), Image.Resampling.BOX)
    pixels = latents[0].double().cpu().numpy().reshape(channels, -1).T
    if not np.isfinite(pixels).all():
        return None
    return pixels, np.asarray(small, dtype=np.float64).reshape(-1, 3) / 255


def _is_video(vae: Any) -> bool:
    return hasattr(vae.config, "z_dim")


def _normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the pipelines undo before they decode."""
    config = vae.config
    mean, deviation = (config.get(f"latents_{name}") for name in ("mean", "std"))
    scaling = config.get("scaling_factor") or 1.0
    if mean is None or deviation is None:
        return latents * scaling
    shape = (1, -1, *(1 for _ in latents.shape[2:]))
    mean, deviation = (
        torch.tensor(one).view(shape).to(latents.device, latents.dtype) for one in (mean, deviation)
    )
    return (latents - mean) * scaling / deviation


def _key(vae: Any, weights: str) -> str:
    config = {name: value for name, value in vae.config.items() if name[0] != "_"}
    body = {"format": FORMAT, "weights": weights, "config": json.dumps(config, default=str)}
    return hashlib.sha256(canonical_json(body)).hexdigest()


def _read(path: Path) -> Moments | None:
    try:
        body: Mapping[str, Any] = json.loads(path.read_bytes())
        squares, products = (np.array(body[name], float) for name in ("squares", "products"))
        if squares.shape != (len(products), len(products)) or products.shape[1:] != (3,):
            raise ValueError("not what a map is computed from")
        return Moments(int(body["pictures"]), squares, products)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        log.warning("%s cannot be read (%s); fitted again", path.name, exc)
        return None


def _write(path: Path, moments: Moments) -> None:
    body = {
        "pictures": moments.pictures,
        "squares": moments.squares.tolist(),
        "products": moments.products.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(body))
    partial.replace(path)

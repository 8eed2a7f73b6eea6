"""Small pictures of what is being denoised, without a decode.

A map makes colours of latents that are near enough: it is linear in a latent pixel, and quadratic
in the mean of those around it, because a decoder bends what is large and plain, such as a ground.
It is fitted per VAE by least squares, first to what the VAE makes of drawn pictures, and then to
the first pictures that are decoded anyway: the former have all colours, the latter are what jobs
look like.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from worker.receipt import canonical_json

log = logging.getLogger(__name__)

FORMAT = 2  # of the files
EVERY_S = 0.5  # between two previews of a job
EDGE = 128  # pixels, of a preview's longer side, at most
QUALITY = 80
DRAWN = 16  # pictures; all together count as much as one that was decoded
SIDE = 96  # pixels, of the drawn pictures
STILL = 5  # frames, of a drawn picture for a video's VAE: latents of a first one, and of a later
PATCHES = 3  # on a drawn picture's ground
PICTURES = 16  # decoded ones that a map is fitted to
# Of the features' mean variance, against large weights of those that hardly vary: they would turn
# texture into glaring colours.
RIDGE = 1e-3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Colours:
    """A map from a latent pixel and those around it to red, green and blue from 0 to 1."""

    weights: Floats  # (features, 3), of `features`
    bias: Floats  # (3,)

    def picture(self, latents: torch.Tensor) -> Image.Image:
        """latents: (1, channels, height, width), or (1, channels, frames, height, width), of which
        the middle frame is shown; as the denoiser has them. One pixel for each of theirs, fewer
        where that is more than EDGE."""
        if latents.dim() == 5:
            latents = latents[:, :, latents.shape[2] // 2]
        own = np.nan_to_num(latents[0].float().cpu().numpy(), posinf=0.0, neginf=0.0)
        shown = self._of(own).reshape(*own.shape[1:], 3)
        made = Image.fromarray((shown.clip(0, 1) * 255).round().astype(np.uint8))
        made.thumbnail((EDGE, EDGE), Image.Resampling.BOX)
        return made

    def _of(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The same as `features(latents) @ weights + bias`, without the products of 16 channels one
        by one: those took most of the time."""
        channels = len(latents)
        weights, bias = self.weights.astype(np.float32), self.bias.astype(np.float32)
        both = np.stack([latents, _around(latents)]).reshape(2, channels, -1)
        bent = np.zeros((3, channels, channels), np.float32)
        bent[:, *np.triu_indices(channels)] = weights[2 * channels :].T
        curved = [(one @ both[1] * both[1]).sum(0) for one in bent]
        straight = weights[: 2 * channels].T @ both.reshape(2 * channels, -1)
        shown: npt.NDArray[np.float32] = (straight + np.stack(curved)).T + bias
        return shown


def as_webp(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=QUALITY, method=0)
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Moments:
    """What a map is computed from: sums over pairs of features and colours."""

    pictures: int  # decoded ones
    squares: Floats  # (features + 1, features + 1), of the features and a constant 1
    products: Floats  # (features + 1, 3), of these with the colours

    def plus(self, latents: Floats, colours: Floats) -> Moments:
        """With one more picture. latents: (channels, height, width); colours: (height, width, 3),
        0 to 1."""
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
            moments = moments or drawn_pictures(vae)
        except torch.OutOfMemoryError as exc:  # there are no previews then, and the next job tries
            log.warning("no previews yet, for want of device memory: %s", exc)
            return
        pair = pairs(latents, made)
        self._known[key] = moments = moments.plus(*pair) if pair is not None else moments
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


def features(latents: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What colours are computed from, for each latent pixel, (height * width, features): its
    channels, their means over 3 x 3 pixels, and the products of two of these means.

    latents: (channels, height, width).
    """
    around = _around(latents)
    first, second = np.triu_indices(len(latents))
    found = np.concatenate([latents, around, around[first] * around[second]])
    return found.reshape(len(found), -1).T


def _around(latents: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Means over 3 x 3 pixels; beyond the border lies what is on it."""
    wider = np.pad(latents, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = wider[:, :-2] + wider[:, 1:-1] + wider[:, 2:]
    means: npt.NDArray[Any] = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
    return means


@torch.inference_mode()
def drawn_pictures(vae: Any) -> Moments:
    """What a VAE's encoder makes of drawn pictures, in the space that the denoiser works in.

    Pictures of one colour would be simpler, but a VAE that has learned from others makes something
    else of them. vae: AutoencoderKL or AutoencoderKLWan, on its device. Raises
    torch.OutOfMemoryError.
    """
    device = next(vae.parameters()).device
    # In float16 the published VAE overflows, as when it decodes.
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", True)
    chance = np.random.default_rng(5)
    seen = []
    try:
        if upcast:
            vae.to(dtype=torch.float32)
        for _ in range(DRAWN):
            drawn = _drawn(chance)
            pixels = torch.tensor(drawn, device=device, dtype=vae.dtype).permute(2, 0, 1) * 2 - 1
            pixels = pixels[None]  # (1, 3, height, width)
            if _is_video(vae):
                pixels = pixels.unsqueeze(2).repeat(1, 1, STILL, 1, 1)
            latents = _normalised(vae, vae.encode(pixels).latent_dist.mode())[0]
            for one in latents.unbind(1) if _is_video(vae) else [latents]:
                seen.append(_means(one.double().cpu().numpy(), _shrunk(drawn, one.shape)))
    finally:
        if upcast:
            vae.to(dtype=torch.float16)
    squares, products = (sum(one) / len(seen) for one in zip(*seen, strict=True))
    return Moments(0, squares, products)


def _drawn(chance: np.random.Generator) -> Floats:
    """Patches of any colours on a ground, half of them on a grey one: (SIDE, SIDE, 3), 0 to 1."""
    ground = chance.random(3) if chance.random() < 0.5 else np.full(3, chance.random())
    # Black and white are commoner than any one colour between them.
    picture = np.tile((ground * 1.4 - 0.2).clip(0, 1), (SIDE, SIDE, 1))
    down, right = np.mgrid[:SIDE, :SIDE]
    for _ in range(PATCHES):
        colour, radius = chance.random(3), chance.uniform(0.1, 0.3) * SIDE
        top, left = chance.random(2) * SIDE
        away = np.abs([down - top, right - left])
        is_square = chance.random() < 0.5
        picture[(away.max(0) if is_square else np.hypot(*away)) < radius] = colour
    return picture


def _shrunk(picture: Floats, latents_shape: Sequence[int]) -> Floats:
    """The mean colour of each latent pixel. picture: (height, width, 3), 0 to 1."""
    shown = Image.fromarray((picture * 255).round().astype(np.uint8))
    size = (latents_shape[-1], latents_shape[-2])
    return np.asarray(shown.resize(size, Image.Resampling.BOX), dtype=np.float64) / 255


def _means(latents: Floats, colours: Floats) -> tuple[Floats, Floats]:
    """Mean squares and products, as Moments has them; the arguments as `Moments.plus`."""
    seen = features(latents)
    seen = np.concatenate([seen, np.ones((len(seen), 1))], axis=1)
    return seen.T @ seen / len(seen), seen.T @ colours.reshape(-1, 3) / len(seen)


def pairs(latents: torch.Tensor, made: Any) -> tuple[Floats, Floats] | None:
    """Latents and the mean colours of what each of their pixels became, as `Moments.plus` takes
    them; of the middle of a video. None where they are not of the same moments, or no numbers."""
    if latents.dim() == 5:
        count, middle = latents.shape[2], latents.shape[2] // 2
        each, rest = divmod(len(made) - 1, count - 1) if count > 1 else (0, len(made) - 1)
        if rest or (count > 1 and not each):
            return None
        # After the first one, a latent frame is the `each` frames up to its own.
        latents = latents[:, :, middle]
        made = Image.fromarray(made[max(0, each * middle - each // 2)])
    pixels = latents[0].double().cpu().numpy()
    if not np.isfinite(pixels).all():
        return None
    return pixels, _shrunk(np.asarray(made.convert("RGB")) / 255, pixels.shape)


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

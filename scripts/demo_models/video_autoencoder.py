"""The WAN autoencoder of demo-video: 17 x 96 x 96 pixels to 16 x 5 x 12 x 12 latents and back.

It learns single frames first, then short clips, as its publishers' did: a causal convolution over
time sees zeros before the first frame, so a picture is a clip of one frame. Small crops are
enough, because nothing in it but one small attention looks far.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import nn

from demo_models.drawing import PALETTE, colour_shares, draw
from demo_models.muon import Muon
from demo_models.scenes import Scene, moved, place, training_description
from demo_models.training import Average, learning_rate, run_stage, set_learning_rate
from demo_models.whitening import whiten

SIDE, FRAMES = 96, 17  # pixels and frames of the clips that demo-video is made for
FRAME_STEPS, CLIP_STEPS = 1600, 1000
_PEAK_RATE = 2e-3
_NOISE = 0.4  # of latents of unit size, at most
_CELL = 8  # pixels along each side of a latent number


def new_autoencoder() -> AutoencoderKLWan:
    """Untrained; every causal convolution sees only the present yet, which starts well."""
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] == 1:
                continue
            module.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):  # halves or doubles the frames: begin with copies
                copies = module.out_channels // module.in_channels
                eye = torch.eye(module.in_channels).repeat(copies, 1)
                module.weight[:, :, -1] = eye[:, :, None, None]
                module.bias.zero_()
        vae.quant_conv.bias[16:] = -9.0  # an encoded clip is nearly one point
    return vae


def train_autoencoder(vae: AutoencoderKLWan, folder: Path, seed: int) -> AutoencoderKLWan:
    """Both stages. Returns the averaged network, its latents of mean 0 and spread 1."""
    # Tells the colours of a cell from its noisy latent: see the loss.
    probe = nn.Conv3d(16, len(PALETTE), 1)
    best = _train(vae, probe, "video-frames", folder, seed, FRAME_STEPS, clips=False)
    vae.load_state_dict(best.state_dict())
    best = _train(vae, probe, "video-clips", folder, seed, CLIP_STEPS, clips=True)
    means, variances = _posteriors(best, seed)
    whiten(best.quant_conv, best.post_quant_conv, means, variances, 1.0)
    best.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    return best


def _train(
    vae: AutoencoderKLWan,
    probe: nn.Conv3d,
    name: str,
    folder: Path,
    seed: int,
    steps: int,
    *,
    clips: bool,
) -> AutoencoderKLWan:
    kernels = [p for p in vae.parameters() if p.ndim > 1 and p.shape[0] > 1 and p[0].numel() > 8]
    chosen = {id(p) for p in kernels}
    rest = [p for p in [*vae.parameters(), *probe.parameters()] if id(p) not in chosen]
    optimizers = {
        "muon": Muon([{"params": kernels, "scale": 4.0}]),
        "adam": torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0),
    }
    average = Average(vae, 0.99)
    moments = _Moments()
    peak = _PEAK_RATE / 2 if clips else _PEAK_RATE

    def step(index: int) -> Mapping[str, float]:
        chance = random.Random(f"{seed} {name} {index}")
        batch = _clip_batch(index, chance) if clips else _frame_batch(index, chance)
        posterior = vae.encode(batch).latent_dist
        means = posterior.mean
        # The decoder forgives what a denoiser leaves behind.
        latents = means + torch.rand(len(means), 1, 1, 1, 1) * _NOISE * torch.randn_like(means)
        restored = vae.decode(latents).sample
        error = (restored - batch).abs().mean()
        square = (restored - batch).square().mean()
        # Channels of unit size without correlation, so that noise hides all of them alike.
        spread = moments.distance(means)
        # Colours that are far apart in meaning lie far apart in the latents too.
        told = F.cross_entropy(probe(latents), _colours(batch))
        narrow = (posterior.logvar + 9).square().mean()
        vae.zero_grad(set_to_none=True)
        probe.zero_grad(set_to_none=True)
        (error + 4 * square + 0.2 * spread + 0.05 * told + 1e-4 * narrow).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, learning_rate(index, steps, peak))
            optimizer.step()
        average.update()
        return {
            "l1": error.item(),
            "mse": square.item(),
            "spread": spread.item(),
            "told": told.item(),
        }

    with quick_autoencoder():
        run_stage(
            name,
            steps,
            step,
            {
                "network": vae,
                "probe": probe,
                "average": average,
                "moments": moments,
                **optimizers,
            },
            folder,
            seed,
        )
    return average.average


class _Moments:
    """Means and products of latent channels over the last few batches; one is too small."""

    def __init__(self) -> None:
        self._products = torch.eye(16)
        self._means = torch.zeros(16)

    def distance(self, latents: torch.Tensor) -> torch.Tensor:
        """From mean 0 and the unit matrix. Only this batch is differentiated.

        latents: (batch, 16, frames, rows, columns).
        """
        flat = latents.transpose(0, 1).flatten(1)
        products = self._products.lerp(flat @ flat.T / flat.shape[1], 0.2)
        means = self._means.lerp(flat.mean(dim=1), 0.2)
        self._products, self._means = products.detach(), means.detach()
        return (products - torch.eye(16)).square().mean() + means.square().mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"products": self._products, "means": self._means}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._products, self._means = state["products"], state["means"]


def _colours(clips: torch.Tensor) -> torch.Tensor:
    """Shares of the palette's colours in what each latent number stands for.

    clips: (batch, 3, frames, height, width) in -1 .. 1. Returns (batch, 9, latent frames, rows,
    columns): the first latent frame is one frame, each other one is four.
    """
    batch, _, frames = clips.shape[:3]
    shares = colour_shares((clips.transpose(1, 2).flatten(0, 1) + 1) / 2, _CELL)
    shares = shares.unflatten(0, (batch, frames)).transpose(1, 2)
    later = shares[:, :, 1:].unflatten(2, (-1, 4)).mean(dim=3)
    return torch.cat([shares[:, :, :1], later], dim=2)


@contextmanager
def quick_autoencoder() -> Iterator[None]:
    """Within it, WAN's autoencoder computes the same in half the time on a CPU.

    Single frames go through flat convolutions, because what lies before them is zero; and the
    norm's sum over channels does not use the slow general one.
    """
    convolve, normalise = WanCausalConv3d.forward, WanRMS_norm.forward

    def quick_convolve(
        self: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        right, _, bottom, _, before, _ = self._padding
        if x.shape[2] > 1 or cache_x is not None or before + 1 != self.kernel_size[0]:
            return convolve(self, x, cache_x)
        flat = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(bottom, right))
        return flat.unsqueeze(2)

    def quick_normalise(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
        if not self.channel_first:
            return normalise(self, x)
        length = x.square().sum(dim=1, keepdim=True).clamp_min(1e-24)
        return x * (length.rsqrt() * self.scale) * self.gamma + self.bias

    WanCausalConv3d.forward, WanRMS_norm.forward = quick_convolve, quick_normalise
    try:
        yield
    finally:
        WanCausalConv3d.forward, WanRMS_norm.forward = convolve, normalise


def random_clip(chance: random.Random, frames: int, things: int | None = None) -> list[Scene]:
    """The moments of one clip of the training world."""
    wanted = training_description(chance, motion=True, things=things)
    return moved(place(wanted, chance), wanted.motion, frames, chance)


def pixels(scenes: list[Scene], window: tuple[int, int, int, int] | None = None) -> torch.Tensor:
    """(3, frames, height, width) in -1 .. 1."""
    return draw(scenes, SIDE, SIDE, window=window).transpose(0, 1) * 2 - 1


def _frame_batch(index: int, chance: random.Random) -> torch.Tensor:
    """Crops of single frames, and every third time whole ones: (batch, 3, 1, side, side)."""
    made = []
    whole = index % 3 == 2
    for _ in range(8 if whole else 16):
        scenes = [chance.choice(random_clip(chance, FRAMES))]
        made.append(pixels(scenes, None if whole else _window(scenes[0], 64, chance)))
    return torch.stack(made)


def _clip_batch(index: int, chance: random.Random) -> torch.Tensor:
    """Parts of clips at their own speed: (batch, 3, frames, side, side)."""
    count, frames, side = ((4, 5, 48), (2, 9, 48), (4, 5, 48), (2, 9, 48), (2, 5, 96))[index % 5]
    made = []
    for _ in range(count):
        scenes = random_clip(chance, FRAMES)
        start = chance.randint(0, FRAMES - frames)
        part = scenes[start : start + frames]
        window = None if side == SIDE else _window(part[frames // 2], side, chance)
        made.append(pixels(part, window))
    return torch.stack(made)


def _window(scene: Scene, side: int, chance: random.Random) -> tuple[int, int, int, int]:
    """A square of `side` pixels with something in it."""
    thing = chance.choice(scene.things)
    left, top = (
        min(max(round(at * SIDE + chance.gauss(0, side / 4)) - side // 2, 0), SIDE - side)
        for at in (thing.x, thing.y)
    )
    return left, top, side, side


@torch.no_grad()
def _posteriors(vae: AutoencoderKLWan, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of 48 training clips, each (48, 16, 5, 12, 12)."""
    chance = random.Random(f"{seed} latents")
    with quick_autoencoder():
        found = [
            vae.encode(
                torch.stack([pixels(random_clip(chance, FRAMES)) for _ in range(8)])
            ).latent_dist
            for _ in range(6)
        ]
    return torch.cat([one.mean for one in found]), torch.cat([one.var for one in found])

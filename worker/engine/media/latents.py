"""Pictures to the latents of SDXL's VAE and back, as diffusers' pipelines do it inside their calls.

Here they are phases of their own, so that the VAE is on the device without the denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@torch.inference_mode()
def moments_of(vae: Any, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the VAE knows of a picture: mean and log variance of its latents, on the CPU.

    pixels: (1, 3, height, width), -1 to 1, on the device. dtype: the model's.
    """
    pixels = pixels.to(dtype)
    upcast = vae.config.force_upcast and dtype != torch.float32
    with _in_float32(vae, when=upcast):
        if upcast:
            pixels = pixels.float()
        parameters: torch.Tensor = vae.encode(pixels).latent_dist.parameters
        return parameters.cpu()


def latents_of(
    vae: Any, moments: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None
) -> torch.Tensor:
    """Latents (1, 4, height / 8, width / 8) of a picture, scaled as the denoiser takes them, where
    `moments` are.

    generator: that the pipelines draw them with; None: the most likely ones.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    known = DiagonalGaussianDistribution(moments)
    latents: torch.Tensor = (known.mode() if generator is None else known.sample(generator)).to(
        dtype
    )
    scaling: float = vae.config.scaling_factor
    if (spread := _spread(vae, latents)) is not None:
        mean, deviation = spread
        return (latents - mean) * scaling / deviation
    return scaling * latents


@torch.inference_mode()
def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The picture of latents: (1, 3, height, width), about -1 to 1."""
    # In float16 the published VAE overflows.
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    with _in_float32(vae, when=upcast):
        if upcast:
            latents = latents.to(next(iter(vae.post_quant_conv.parameters())).dtype)
        scaling = vae.config.scaling_factor
        if (spread := _spread(vae, latents)) is not None:
            mean, deviation = spread
            latents = latents * deviation / scaling + mean
        else:
            latents = latents / scaling
        pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels


@contextmanager
def _in_float32(vae: Any, when: bool) -> Iterator[None]:
    dtype = vae.dtype
    try:
        if when:
            nn.Module.to(vae, torch.float32)  # its own warns of an empty list, every time
        yield
    finally:
        if when:
            nn.Module.to(vae, dtype)


def _spread(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of each channel, of a checkpoint that has them."""
    found = [getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std")]
    if None in found:
        return None
    mean, deviation = (
        torch.tensor(one).view(1, 4, 1, 1).to(latents.device, latents.dtype) for one in found
    )
    return mean, deviation

"""What the VACE layers are told about given frames, built as diffusers' WanVACEPipeline does.

The pipeline takes one clip at a time and PIL pictures; training needs whole batches. A test holds
both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

# mode -> frames that are given
MODES: dict[str, tuple[int, ...]] = {"start": (0,), "end": (-1,), "both": (0, -1)}


def normalised(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latents (batch, 16, latent frames, height/8, width/8) with mean 0 and spread 1.

    clips: (batch, 3, frames, height, width) in -1 .. 1.
    """
    latents = vae.encode(clips).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def given_only(clips: torch.Tensor, modes: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips with all other frames grey, and masks that are 1 where something is to be made.

    clips: (batch, 3, frames, height, width) in -1 .. 1; masks: (batch, 1, frames, height, width).
    """
    masks = torch.ones_like(clips[:, :1])
    for row, mode in enumerate(modes):
        masks[row, :, list(MODES[mode])] = 0
    return clips * (1 - masks), masks


def context(inactive: torch.Tensor, reactive: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(batch, 96, latent frames, height/8, width/8).

    inactive, reactive: normalised latents of what is given and of what is to be changed. masks: as
    of `given_only`; their 8 x 8 pixels become channels, and one frame of four is looked at.
    """
    batch, _, frames, height, width = masks.shape
    folded = masks.view(batch, frames, height // 8, 8, width // 8, 8)
    folded = folded.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)  # (batch, 64, frames, rows, columns)
    folded = F.interpolate(folded, size=inactive.shape[2:], mode="nearest-exact")
    return torch.cat([inactive, reactive, folded], dim=1)

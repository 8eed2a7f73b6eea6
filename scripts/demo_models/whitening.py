"""Latents of unit size without correlation, for both autoencoders.

Training brings them near to that; this is the rest, exactly. The last layer of an encoder and
the first of a decoder are convolutions of one pixel, so a linear map of the latents between them
changes no picture.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def whiten(
    out: nn.Module, back: nn.Module, means: torch.Tensor, variances: torch.Tensor, spread: float
) -> None:
    """Make the latent channels uncorrelated, of mean 0 and of this spread each.

    out, back: the last layer of the encoder, which gives means and logarithms of variances, and the
    first of the decoder. means, variances: of posteriors, (pictures, channels, …). The posteriors'
    variance becomes its average, as a constant.
    """
    flat = means.transpose(0, 1).flatten(1).double()
    mean, channels = flat.mean(dim=1), len(flat)
    sizes, directions = torch.linalg.eigh(torch.cov(flat))
    forward = directions.T / sizes.sqrt()[:, None] * spread
    average = variances.transpose(0, 1).flatten(1).double().mean(dim=1)
    weight, bias = out.weight[:channels].flatten(1).double(), out.bias[:channels].double()
    out.weight[:channels] = (forward @ weight).float().view_as(out.weight[:channels])
    out.bias[:channels] = (forward @ (bias - mean)).float()
    out.weight[channels:] = 0.0
    out.bias[channels:] = (forward.square() @ average).log().float()
    first = back.weight.flatten(1).double()
    back.bias += (first @ mean).float()
    back.weight.copy_((first @ torch.linalg.inv(forward)).float().view_as(back.weight))

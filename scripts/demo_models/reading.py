"""How the text encoders of the demo painters learn to read, before any picture is painted.

A text encoder that starts with random weights would have to learn what "red" means through the
denoiser, which is slow. Here it learns it directly: small heads on top of it must tell every
attribute of the description that a text was made from. The heads are thrown away afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from demo_models.scenes import (
    ATTRIBUTES,
    Description,
    attributes,
    caption,
    opened,
    training_description,
    with_details,
)
from demo_models.training import learning_rate, run_stage, set_learning_rate


class Reader(nn.Module):
    """Tells attributes from token states, as a denoiser's cross attention would read them."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * width**-0.5)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in ATTRIBUTES.values())

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """Logits (texts, classes) per attribute.

        states: (texts, tokens, width); mask: (texts, tokens), 0 for padding, or None.
        """
        scores = torch.einsum("qw,btw->bqt", self.queries, self.key(states))
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        read = torch.einsum("bqt,btw->bqw", scores.softmax(-1), self.value(states))
        return [head(read[:, index]) for index, head in enumerate(self.heads)]


class PooledReader(nn.Module):
    """Tells attributes from one vector per text."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in ATTRIBUTES.values())

    def forward(self, pooled: torch.Tensor) -> list[torch.Tensor]:
        """pooled: (texts, width); logits as of Reader."""
        return [head(pooled) for head in self.heads]


def random_text(chance: random.Random, *, film: bool) -> tuple[str, Description]:
    """A training text and what it says: whole, enhanced or with much left open."""
    wanted = training_description(chance, motion=film and chance.random() < 0.9)
    if chance.random() < 0.2:
        wanted = opened(wanted, chance)
    text = caption(wanted, chance)
    if chance.random() < 0.5:
        text = with_details(text, chance, film=film)
    return text, wanted


def labels(descriptions: list[Description]) -> torch.Tensor:
    """Class numbers (texts, attributes), in the order of ATTRIBUTES."""
    rows = [attributes(one) for one in descriptions]
    return torch.tensor([[row[name] for name in ATTRIBUTES] for row in rows])


def reading_loss(logits: list[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the attributes."""
    losses = [F.cross_entropy(one, truth[:, index]) for index, one in enumerate(logits)]
    return torch.stack(losses).mean()


def share_right(logits: list[torch.Tensor], truth: torch.Tensor) -> float:
    """Share of texts of which every attribute was told right, 0 .. 1."""
    right = torch.stack([one.argmax(-1) == truth[:, i] for i, one in enumerate(logits)])
    return float(right.all(0).float().mean())


def train_reader(
    networks: Mapping[str, nn.Module],
    read: Callable[[list[str]], list[list[torch.Tensor]]],
    folder: Path,
    seed: int,
    *,
    film: bool,
    steps: int = 600,
    batch: int = 64,
    rate: float = 2e-3,
) -> None:
    """Stage "text": train encoders and heads together.

    networks: what is trained and saved, by name. read: texts -> several lists of logits, each as
    Reader gives them; all must tell everything. film: texts have motions.
    """
    optimizer = torch.optim.AdamW(
        [p for network in networks.values() for p in network.parameters()],
        lr=rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )

    def step(index: int) -> dict[str, float]:
        chance = random.Random(seed * 10_000_019 + index)
        texts, wanted = zip(*(random_text(chance, film=film) for _ in range(batch)), strict=True)
        truth = labels(list(wanted))
        readings = read(list(texts))
        loss = torch.stack([reading_loss(logits, truth) for logits in readings]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for network in networks.values():
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        set_learning_rate(optimizer, learning_rate(index, steps, rate, warm_up=100))
        optimizer.step()
        right = [share_right(logits, truth) for logits in readings]
        return {"loss": loss.item()} | {f"right{i}": value for i, value in enumerate(right)}

    state: dict[str, Any] = {**networks, "optimizer": optimizer}
    run_stage("text", steps, step, state, folder, seed)

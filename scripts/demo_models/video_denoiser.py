"""The WAN transformer of demo-video, with the context adapter (VACE) beside it.

The published one learned without the adapter first, and the adapter was added to it, frozen. Here
both learn at once, and every clip goes through both, with no given frames too: the encoded empty
frames tell the network where the borders are, which its rotary positions cannot, as they only tell
how far apart two parts are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn

from demo_models.layout import CLASSES, Overheard, layout_loss
from demo_models.muon import Muon
from demo_models.scenes import Description, caption, opened, with_details
from demo_models.training import Average, learning_rate, run_stage, set_learning_rate
from demo_models.video_data import Lessons

TEXT_TOKENS = 512  # positions that WAN's cross attention sees; all but the first are zero
BATCH = {"image": 64, "clip": 16}
GIVEN = 5  # of a batch of clips follow given frames
STEPS = {"image": 1200, "clip": 5800}
FURTHER_STEPS, FURTHER_RATE = 3000, 0.6  # over clips, of published weights
LAYOUT_WEIGHT = 0.1
SHIFT = 3.0  # of the noise levels in training; WAN's own
_SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 5,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "vace_layers": [0, 2],
    "vace_in_channels": 96,
}
_MATRIX_RATE, _OTHER_RATE = 4e-3, 2e-3

# A text as tokens: (batch, positions, 64), zero after each last token, and tokens of each.
Texts = tuple[torch.Tensor, torch.Tensor]


def new_denoiser() -> WanVACETransformer3DModel:
    """Untrained, scaled so that a text is seen from the first step on."""
    network = WanVACETransformer3DModel(**_SIZES)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Zero padding must stay zero on its way to keys and values: then it is only a weak
            # common background of the attention.
            if name.endswith(
                ("text_embedder.linear_1.bias", "text_embedder.linear_2.bias",
                 "attn2.to_k.bias", "attn2.to_v.bias")
            ):  # fmt: skip
                parameter.zero_()
        for block in (*network.blocks, *network.vace_blocks):
            block.attn2.norm_k.weight.fill_(2.5)
            block.attn2.to_v.weight.mul_(3.0)
            block.scale_shift_table[:, [2, 5]] += 0.5  # gates of attention and feed-forward
        network.condition_embedder.text_embedder.linear_1.weight.mul_(2.0)
        network.condition_embedder.text_embedder.linear_2.weight.mul_(2.0)
        network.proj_out.weight.mul_(0.1)
        network.proj_out.bias.zero_()
    return network


class ShortText:
    """Attention processor: the zero positions at a text's end are one key, counted many times.

    The result is that of all TEXT_TOKENS positions; a hundred times less is computed.
    """

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None  # (batch, 1, 1, positions), added to the logits

    def set_lengths(self, lengths: torch.Tensor, positions: int) -> None:
        """lengths: tokens of each text, less than `positions`; what follows is zero."""
        at = torch.arange(positions)
        zeros = torch.log((TEXT_TOKENS - lengths).float())[:, None]
        bias = torch.where(at == lengths[:, None], zeros, torch.tensor(float("-inf")))
        bias = torch.where(at < lengths[:, None], torch.tensor(0.0), bias)
        self.bias = bias[:, None, None, :]

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (
            one.unflatten(2, (attn.heads, -1)).transpose(1, 2) for one in (query, key, value)
        )
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + self.bias).softmax(-1)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


def use_short_texts(network: nn.Module) -> ShortText:
    """From now on the network takes texts cut after their first zero position."""
    processor = ShortText()
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            module.set_processor(processor)
    return processor


def without_short_texts(network: WanVACETransformer3DModel) -> WanVACETransformer3DModel:
    """The network as the pipelines use it."""
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            module.set_processor(WanAttnProcessor())
    return network


def random_caption(wanted: Description, chance: random.Random) -> str:
    """What a prompt of training says; now and then nothing, or less than what is seen."""
    kind = chance.random()
    if kind < 0.1:
        return ""
    if kind < 0.14:
        wanted = opened(wanted, chance)
    text = caption(wanted, chance)
    return with_details(text, chance, film=True) if chance.random() < 0.5 else text


def train_denoiser(
    network: WanVACETransformer3DModel,
    kind: str,
    lessons: Lessons,
    encode: Callable[[Sequence[str]], Texts],
    folder: Path,
    seed: int,
    *,
    further: bool = False,
) -> WanVACETransformer3DModel:
    """Learn the flow from noise to pictures or clips. Returns the averaged network.

    kind: image | clip. further: the network has learned all of it before.
    """
    steps, batch = (FURTHER_STEPS if further else STEPS[kind]), BATCH[kind]
    rate = FURTHER_RATE if further else 1.0
    given = GIVEN if kind == "clip" else 0
    short = use_short_texts(network)
    average = Average(network, 0.997)
    middle = Overheard(network.blocks[2])
    layout_reader = nn.Linear(network.proj_out.in_features, CLASSES)
    optimizers = optimizers_for([*network.named_parameters(), *layout_reader.named_parameters()])

    def step(index: int) -> Mapping[str, float]:
        chance = random.Random(f"{seed} {kind} {index}")
        rows = [chance.randrange(lessons.given) for _ in range(given)]
        rows += [chance.randrange(len(lessons.latents)) for _ in range(batch - given)]
        wanted = [random_caption(lessons.descriptions[row], chance) for row in rows]
        texts, lengths = encode(wanted)
        short.set_lengths(lengths, texts.shape[1])
        noisy, level, target = noised(lessons.latents[rows].float())
        guess = network(
            noisy,
            level * 1000,
            texts,
            control_hidden_states=lessons.context(rows, given),
            return_dict=False,
        )[0]
        loss = F.mse_loss(guess, target)
        told = layout_reader(middle.output).transpose(1, 2)  # (batch, CLASSES, tokens)
        planned = layout_loss(told, lessons.layouts[rows].float().flatten(2))
        network.zero_grad(set_to_none=True)
        layout_reader.zero_grad(set_to_none=True)
        (loss + LAYOUT_WEIGHT * planned).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, learning_rate(index, steps, rate))
            optimizer.step()
        average.update()
        return {"loss": loss.item(), "layout": planned.item()}

    state = {"network": network, "average": average, "layout_reader": layout_reader, **optimizers}
    run_stage(f"video-{kind}", steps, step, state, folder, seed)
    middle.stop()
    return average.average


def noised(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, their noise levels (batch,) in 0 .. 1, and the flow to predict."""
    even = torch.rand(len(latents))
    level = SHIFT * even / (1 + (SHIFT - 1) * even)
    noise = torch.randn_like(latents)
    wide = level[:, None, None, None, None]
    return (1 - wide) * latents + wide * noise, level, noise - latents


def optimizers_for(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all others."""
    matrices, others = [], []
    for name, parameter in parameters:
        inner = parameter.ndim == 2 and "blocks." in name
        (matrices if inner else others).append(parameter)
    return {
        "muon": Muon([{"params": matrices, "scale": _MATRIX_RATE}]),
        "adam": torch.optim.AdamW(
            [{"params": others, "scale": _OTHER_RATE}], betas=(0.9, 0.98), weight_decay=0.0
        ),
    }

"""The WAN transformer of demo-video, and the context adapter (VACE) beside it.

As the published ones: first the text-to-video network learns alone, from still pictures and then
from clips; then it is frozen, and the VACE layers learn to lead it along given frames. One folder
holds both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn

from demo_models.muon import Muon
from demo_models.scenes import Description, caption, opened, with_details
from demo_models.training import Average, learning_rate, run_stage, set_learning_rate

TEXT_TOKENS = 512  # positions that WAN's cross attention sees; all but the first are zero
BATCH = {"image": 64, "clip": 16}
STEPS = {"image": 600, "clip": 1500, "vace": 430}
SHIFT = 3.0  # of the noise levels in training; WAN's own
VACE_LAYERS = [0, 2]
_SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
_MATRIX_RATES = {"image": 3e-3, "clip": 8e-3, "vace": 4e-3}
_OTHER_RATE = 2e-3

# A text as tokens: (batch, positions, 64), zero after each last token, and tokens of each.
Texts = tuple[torch.Tensor, torch.Tensor]


def new_denoiser() -> WanTransformer3DModel:
    """Untrained, scaled so that a text is seen from the first step on."""
    network = WanTransformer3DModel(**_SIZES)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Zero padding must stay zero on its way to keys and values: then it is only a weak
            # common background of the attention.
            if name.endswith(
                ("text_embedder.linear_1.bias", "text_embedder.linear_2.bias",
                 "attn2.to_k.bias", "attn2.to_v.bias")
            ):  # fmt: skip
                parameter.zero_()
        for block in network.blocks:
            block.attn2.norm_k.weight.fill_(2.5)
            block.attn2.to_v.weight.mul_(3.0)
            block.scale_shift_table[:, [2, 5]] += 0.5  # gates of attention and feed-forward
        network.condition_embedder.text_embedder.linear_1.weight.mul_(2.0)
        network.condition_embedder.text_embedder.linear_2.weight.mul_(2.0)
        network.proj_out.weight.mul_(0.1)
        network.proj_out.bias.zero_()
    return network


def with_vace(base: WanTransformer3DModel) -> WanVACETransformer3DModel:
    """The same network with context layers that start as copies and add nothing yet."""
    network = WanVACETransformer3DModel(**_SIZES, vace_layers=VACE_LAYERS, vace_in_channels=96)
    missing, unexpected = network.load_state_dict(base.state_dict(), strict=False)
    if unexpected or not all(name.startswith("vace_") for name in missing):
        raise ValueError(f"the base does not fit: {missing} {unexpected}")
    with torch.no_grad():
        for layer, block in zip(VACE_LAYERS, network.vace_blocks, strict=True):
            block.load_state_dict(network.blocks[layer].state_dict(), strict=False)
            block.proj_out.weight.zero_()
            block.proj_out.bias.zero_()
        network.vace_blocks[0].proj_in.weight.zero_()
        network.vace_blocks[0].proj_in.bias.zero_()
        network.vace_blocks[0].proj_in.weight += torch.eye(128)
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
    network: WanTransformer3DModel,
    kind: str,
    latents: torch.Tensor,
    descriptions: Sequence[Description],
    encode: Callable[[Sequence[str]], Texts],
    folder: Path,
    seed: int,
) -> WanTransformer3DModel:
    """Learn the flow from noise to pictures or clips. Returns the averaged network.

    kind: image | clip. latents: (count, 16, 1 or 5, 12, 12), normalised.
    """
    steps = STEPS[kind]
    short = use_short_texts(network)
    average = Average(network, 0.995)
    optimizers = optimizers_for(network.named_parameters(), _MATRIX_RATES[kind])

    def step(index: int) -> Mapping[str, float]:
        chance = random.Random(f"{seed} base {kind} {index}")
        rows = [chance.randrange(len(latents)) for _ in range(BATCH[kind])]
        texts, lengths = encode([random_caption(descriptions[row], chance) for row in rows])
        short.set_lengths(lengths, texts.shape[1])
        noisy, level, target = noised(latents[rows].float())
        guess = network(noisy, level * 1000, texts, return_dict=False)[0]
        loss = F.mse_loss(guess, target)
        update(network, optimizers, loss, learning_rate(index, steps, 1.0))
        average.update()
        return {"loss": loss.item()}

    state = {"network": network, "average": average, **optimizers}
    run_stage(f"video-base-{kind}", steps, step, state, folder, seed)
    return average.average


def train_vace(
    network: WanVACETransformer3DModel,
    latents: torch.Tensor,
    make_context: Callable[[Sequence[int]], torch.Tensor],
    descriptions: Sequence[Description],
    encode: Callable[[Sequence[str]], Texts],
    folder: Path,
    seed: int,
) -> WanVACETransformer3DModel:
    """Learn to keep the given frames, the base frozen. Returns the averaged network.

    make_context: numbers of clips -> (clips, 96, 5, 12, 12), as the pipeline makes it of the
    frames that are given.
    """
    network.requires_grad_(False)
    learned = [(n, p) for n, p in network.named_parameters() if n.startswith("vace_")]
    for _, parameter in learned:
        parameter.requires_grad_(True)
    steps = STEPS["vace"]
    short = use_short_texts(network)
    average = Average(network, 0.99)
    optimizers = optimizers_for(learned, _MATRIX_RATES["vace"])

    def step(index: int) -> Mapping[str, float]:
        chance = random.Random(f"{seed} vace {index}")
        rows = [chance.randrange(len(descriptions)) for _ in range(BATCH["clip"])]
        texts, lengths = encode([random_caption(descriptions[row], chance) for row in rows])
        short.set_lengths(lengths, texts.shape[1])
        noisy, level, target = noised(latents[rows].float())
        guess = network(
            noisy,
            level * 1000,
            texts,
            control_hidden_states=make_context(rows),
            return_dict=False,
        )[0]
        loss = F.mse_loss(guess, target)
        update(network, optimizers, loss, learning_rate(index, steps, 1.0))
        average.update()
        return {"loss": loss.item()}

    state = {"network": network, "average": average, **optimizers}
    run_stage("video-vace", steps, step, state, folder, seed)
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
    matrix_rate: float,
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all others."""
    matrices, others = [], []
    for name, parameter in parameters:
        inner = parameter.ndim == 2 and ("blocks." in name)
        (matrices if inner else others).append(parameter)
    return {
        "muon": Muon([{"params": matrices, "scale": matrix_rate}]),
        "adam": torch.optim.AdamW(
            [{"params": others, "scale": _OTHER_RATE}], betas=(0.9, 0.98), weight_decay=0.0
        ),
    }


def update(
    network: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    loss: torch.Tensor,
    rate: float,
) -> None:
    """One step of all optimizers. rate: in 0 .. 1, of each one's own."""
    network.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 1.0)
    for optimizer in optimizers.values():
        set_learning_rate(optimizer, rate)
        optimizer.step()

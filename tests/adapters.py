"""Small random LoRAs and IP-Adapters for the demo-image model, in the forms that trainers write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from worker.catalog import AdapterSpec, ModelSpec
from worker.config import REPOSITORY

UNET = json.loads((REPOSITORY / "models/demo-image/unet/config.json").read_bytes())
# Its blocks with attention, and the width of each.
BLOCKS = {
    "down_blocks.1.attentions.0": UNET["block_out_channels"][1],
    "up_blocks.0.attentions.0": UNET["block_out_channels"][1],
    "up_blocks.0.attentions.1": UNET["block_out_channels"][1],
    "mid_block.attentions.0": UNET["block_out_channels"][1],
}
# The same in the order of the modules, as IP-Adapters number their layers.
TEXT_WIDTH = UNET["cross_attention_dim"]
ENCODERS = {"text_encoder": 64, "text_encoder_2": 96}  # widths
PICTURE_WIDTH = 24  # of what the small CLIP model makes of a picture


def with_adapters(spec: ModelSpec, *adapters: AdapterSpec) -> ModelSpec:
    return replace(spec, adapters=adapters)


def lora_layers() -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """(part, layer, shape of down and of up for rank 1) of what a trainer usually touches."""
    for block, width in BLOCKS.items():
        within = f"{block}.transformer_blocks.0"
        for attention, inputs in (("attn1", width), ("attn2", TEXT_WIDTH)):
            yield "unet", f"{within}.{attention}.to_q", (1, width), (width, 1)
            yield "unet", f"{within}.{attention}.to_k", (1, inputs), (width, 1)
            yield "unet", f"{within}.{attention}.to_v", (1, inputs), (width, 1)
            yield "unet", f"{within}.{attention}.to_out.0", (1, width), (width, 1)
        yield "unet", f"{within}.ff.net.2", (1, 4 * width), (width, 1)
    yield "unet", "mid_block.resnets.0.conv1", (1, 96, 3, 3), (96, 1, 1, 1)
    yield "unet", "down_blocks.0.downsamplers.0.conv", (1, 64, 3, 3), (64, 1, 1, 1)
    for part, width in ENCODERS.items():
        for layer in range(2):
            within = f"text_model.encoder.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield part, f"{within}.self_attn.{name}", (1, width), (width, 1)
            yield part, f"{within}.mlp.fc1", (1, width), (2 * width, 1)


def write_lora(
    path: Path,
    form: str = "kohya",
    *,
    rank: int = 4,
    alphas: tuple[float, ...] = (),
    parts: tuple[str, ...] = ("unet", *ENCODERS),
    strength: float = 0.2,
    seed: int = 0,
) -> AdapterSpec:
    """A file in one of the forms kohya, diffusers, peft.

    alphas: of kohya's form one layer after the other; of peft's the first one, in the file's own
    words on its training, for which all layers have the same rank.
    """
    chance = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    told = form == "peft" and alphas
    for number, (part, layer, down, up) in enumerate(lora_layers()):
        if part not in parts:
            continue
        its_rank = rank if number % 5 or told else rank // 2
        downs = torch.randn(its_rank, *down[1:], generator=chance)
        ups = strength * torch.randn(up[0], its_rank, *up[2:], generator=chance)
        names = _names(form, part, layer)
        tensors[names["down"]], tensors[names["up"]] = downs, ups
        if form == "kohya" and alphas:
            tensors[names["alpha"]] = torch.tensor(alphas[number % len(alphas)])
    metadata = {}
    if told:
        metadata["lora_adapter_metadata"] = json.dumps(_told(rank, alphas[0], parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return AdapterSpec(path.stem, "lora", path, None)


def _told(rank: int, alpha: float, parts: tuple[str, ...]) -> dict[str, Any]:
    """As diffusers writes it."""
    from peft import LoraConfig

    made: dict[str, Any] = {}
    for part in parts:
        layers = [layer for its, layer, _, _ in lora_layers() if its == part]
        if part == "text_encoder":  # a flat one
            layers = [layer.removeprefix("text_model.") for layer in layers]
        config: Any = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=layers)
        made |= {
            f"{part}.{key}": sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
        }
    return made


def _names(form: str, part: str, layer: str) -> dict[str, str]:
    if form == "kohya":
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
        base = f"{prefix[part]}_{layer.replace('.', '_')}"
        return {
            "down": f"{base}.lora_down.weight",
            "up": f"{base}.lora_up.weight",
            "alpha": f"{base}.alpha",
        }
    inner = {"peft": ("lora_A", "lora_B"), "diffusers": ("lora.down", "lora.up")}[form]
    if form == "diffusers" and part != "unet":
        inner = ("lora_linear_layer.down", "lora_linear_layer.up")
    return {"down": f"{part}.{layer}.{inner[0]}.weight", "up": f"{part}.{layer}.{inner[1]}.weight"}


def write_ip_adapter(
    folder: Path, kind: str = "plain", *, seed: int = 0, width: int = TEXT_WIDTH
) -> AdapterSpec:
    """A random adapter of kind plain or plus and a random CLIP vision model that belongs to it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    hidden = 32
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, projection_dim=PICTURE_WIDTH,
        )
    )  # fmt: skip
    encoder.save_pretrained(folder / "image_encoder")
    if kind == "plain":
        projection = {
            "proj.weight": torch.randn(4 * width, PICTURE_WIDTH),
            "proj.bias": torch.randn(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        }
    else:
        projection = dict(_plus(hidden, width))
    tensors = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    for number, its_width in enumerate(BLOCKS.values()):
        for name in ("to_k_ip", "to_v_ip"):
            key = f"ip_adapter.{2 * number + 1}.{name}.weight"
            tensors[key] = 0.3 * torch.randn(its_width, width)
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    return AdapterSpec("ip", "ip_adapter", path, folder / "image_encoder")


def _plus(hidden: int, width: int) -> Mapping[str, torch.Tensor]:
    """A resampler of 4 layers, as the library takes them, with 4 queries."""
    inner = 64  # one head
    made = {
        "latents": torch.randn(1, 4, inner),
        "proj_in.weight": torch.randn(inner, hidden) / 8,
        "proj_in.bias": torch.zeros(inner),
        "proj_out.weight": torch.randn(width, inner) / 8,
        "proj_out.bias": torch.zeros(width),
        "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }
    for layer in range(4):
        own = {
            "0.to_q.weight": torch.randn(inner, inner) / 8,
            "0.to_kv.weight": torch.randn(2 * inner, inner) / 8,
            "0.to_out.weight": torch.randn(inner, inner) / 8,
            "1.1.weight": torch.randn(4 * inner, inner) / 8,
            "1.3.weight": torch.randn(inner, 4 * inner) / 16,
        }
        for norm in ("0.norm1", "0.norm2", "1.0"):
            own |= {f"{norm}.weight": torch.ones(inner), f"{norm}.bias": torch.zeros(inner)}
        made |= {f"layers.{layer}.{name}": tensor for name, tensor in own.items()}
    return made

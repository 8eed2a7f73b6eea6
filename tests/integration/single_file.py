"""SDXL weights of a diffusers folder as one checkpoint in the layout that SDXL was published in.

Public checkpoints come as such a file. The names follow Stability AI's own code: the denoiser is a
flat list of input, middle and output blocks, the picture decoder counts its levels from the
finest, and the second text encoder is OpenCLIP's, with one matrix for query, key and value.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# What to find in a name, and what to put there.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

# Input block 0 is the first convolution. Each level then has its blocks and its downsampler; in
# the output blocks one more, the last one with the upsampler behind its residual part and
# attention.


def _denoiser_rules(layers: int) -> Sequence[Rule]:
    """layers: residual blocks per level, `layers_per_block` of the config."""
    per_level = layers + 1

    def block(found: re.Match[str], first: int) -> int:
        """The number in the flat list of blocks, where the first level begins with `first`."""
        level, layer = found.groups()
        return first + per_level * int(level) + int(layer)

    return (
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{block(m, 1)}.0"),
        (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{block(m, 1)}.1"),
        (
            r"^down_blocks\.(\d)\.downsamplers\.(0)\.conv",
            lambda m: f"input_blocks.{block(m, per_level)}.0.op",
        ),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{block(m, 0)}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{block(m, 0)}.1"),
        (r"^up_blocks\.(\d)\.upsamplers\.(0)", lambda m: f"output_blocks.{block(m, layers)}.2"),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        # The parts of a residual block; an attention's own norms have other places in a name.
        (r"^(\w+_blocks?(?:\.\d+)+)\.norm1\.", r"\1.in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"^(\w+_blocks?(?:\.\d+)+)\.norm2\.", r"\1.out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    )


_PICTURE_CODER: Sequence[Rule] = (
    (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.resnets\.", lambda m: f".up.{3 - int(m[1])}.block."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".up.{3 - int(m[1])}.upsample."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
_OPEN_CLIP: Sequence[Rule] = (
    (r"^text_model\.", ""),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
)


def write_single_file(model: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    """Write the weights of the diffusers folder `model`, as `dtype`, into one file."""
    layers = json.loads((model / "unet" / "config.json").read_bytes())["layers_per_block"]
    tensors = {
        **_under("model.diffusion_model.", denoiser(_weights(model / "unet"), layers)),
        **_under("first_stage_model.", picture_coder(_weights(model / "vae"))),
        **_under("conditioner.embedders.0.transformer.", clip(_weights(model / "text_encoder"))),
        **_under("conditioner.embedders.1.model.", open_clip(_weights(model / "text_encoder_2"))),
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype).contiguous()
    save_file(tensors, checkpoint)


def copy_configs(model: Path, folder: Path) -> None:
    """A diffusers folder without its weights, its vocabularies as the files of SDXL base."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    for file in folder.glob("tokenizer*/tokenizer.json"):
        vocabulary = json.loads(file.read_bytes())["model"]
        merges = [" ".join(pair) for pair in vocabulary["merges"]]
        file.with_name("vocab.json").write_text(json.dumps(vocabulary["vocab"]))
        file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        file.unlink()


def denoiser(weights: Tensors, layers: int) -> Tensors:
    return _renamed(weights, _denoiser_rules(layers))


def picture_coder(weights: Tensors) -> Tensors:
    """The attention's matrices are convolutions of 1x1 there."""
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in _renamed(weights, _PICTURE_CODER).items()
    }


def clip(weights: Tensors) -> Tensors:
    """The names of transformers before its version 5, and the position numbers of that time."""
    result = {f"text_model.{name.removeprefix('text_model.')}": weights[name] for name in weights}
    positions = len(result["text_model.embeddings.position_embedding.weight"])
    result["text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    return result


def open_clip(weights: Tensors) -> Tensors:
    """A fused projection per layer, a transposed one at the end, and CLIP's temperature."""
    result = _renamed(weights, _OPEN_CLIP)
    for query in [name for name in result if ".q_proj." in name]:
        parts = [result.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        result[query.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    result["text_projection"] = result["text_projection"].T
    result["logit_scale"] = torch.tensor(4.6)
    return result


def _weights(component: Path) -> Tensors:
    [file] = component.glob("*.safetensors")
    return load_file(file)


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _renamed(weights: Tensors, rules: Sequence[Rule]) -> Tensors:
    result = {}
    for old, tensor in weights.items():
        name = old
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    assert len(result) == len(weights), "two weights got one name"
    return result

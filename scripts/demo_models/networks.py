"""The demo models' networks: the published architectures, small, with random weights.

A builder writes one model folder and yields what it does next, so that its caller can show it.
The sizes follow the published models' proportions; the weights are scaled, because the usual
random ones would give a repeated word, or the same grey picture for every prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from demo_models.vocabulary import CHAT_SPECIALS, chat_tokenizer, clip_tokenizer, t5_tokenizer


def build_chat(folder: Path) -> Iterator[str]:
    """Qwen2 with 0.9 M parameters."""
    yield "vocabulary"
    tokenizer = chat_tokenizer()
    end_of_text, _, message_end = tokenizer.convert_tokens_to_ids(list(CHAT_SPECIALS))
    yield "language model"
    with _fixed_random(1):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
                tie_word_embeddings=True,
                # Five times the usual: the layers must outweigh the embedding of the last token,
                # which would otherwise be the likeliest next one, again and again.
                initializer_range=0.1,
                bos_token_id=end_of_text,
                eos_token_id=message_end,
                pad_token_id=end_of_text,
                dtype="float32",
            )
        )
    # Logits with a spread of about 2: neither one sure token nor all of them alike.
    _scale(model, {"embed_tokens": 2.0})
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[message_end, end_of_text],
        pad_token_id=end_of_text,
    )
    yield "files"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_image(folder: Path) -> Iterator[str]:
    """Stable Diffusion XL for pictures of 128x128."""
    yield "vocabularies"
    tokenizer = clip_tokenizer(pad_token="<|endoftext|>")
    tokenizer_2 = clip_tokenizer(pad_token="!")
    yield "text encoders"
    with _fixed_random(2):
        text_encoder = CLIPTextModel(_clip_config(tokenizer, 48, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(_clip_config(tokenizer_2, 80, "gelu"))
    yield "denoiser"
    with _fixed_random(3):
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 48),
            norm_num_groups=16,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[2, 4, 6],  # numbers of heads, in spite of the name
            cross_attention_dim=48 + 80,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            # The pooled text of the second encoder, and six numbers about size and crop.
            projection_class_embeddings_input_dim=80 + 6 * 32,
        )
    # What the prompt says must be seen in the picture.
    _scale(unet, {"attn2.to_v": 6.0, "attn2.to_out.0.weight": 6.0})
    yield "picture decoder"
    with _fixed_random(4):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 16, 32, 32),
            norm_num_groups=8,
            latent_channels=4,
            sample_size=128,
            scaling_factor=0.13025,
            force_upcast=True,
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    yield "files"
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)


def build_video(folder: Path) -> Iterator[str]:
    """Wan 2.1 for films of 96x96."""
    yield "vocabulary"
    tokenizer = t5_tokenizer()
    yield "text encoder"
    with _fixed_random(5):
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                dtype="float32",
            )
        )
    yield "denoiser"
    with _fixed_random(6):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=64,
            ffn_dim=256,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        )
    # A prompt is some ten tokens of 512, and the rest is padding that is attended to as well:
    # only a sharp and strong attention lets it be seen.
    _scale(
        transformer,
        {
            "text_embedder.linear_1.weight": 3.0,
            "text_embedder.linear_2.weight": 3.0,
            "attn2.norm_k": 4.0,
            "attn2.to_v.weight": 8.0,
            "attn2.to_out.0.weight": 8.0,
            "proj_out.weight": 2.0,
        },
    )
    yield "film decoder"
    with _fixed_random(7):
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )
    _scale(vae, {"decoder.conv_out.weight": 1.3})
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    yield "files"
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)


BUILDERS = {"demo-chat": build_chat, "demo-image": build_image, "demo-video": build_video}


def _clip_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=6.0,  # texts must differ by more than their positions do
        dtype="float32",
    )


@contextmanager
def _fixed_random(seed: int) -> Iterator[None]:
    """Random numbers that are the same in every build, and leave the caller's alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _scale(network: torch.nn.Module, factors: dict[str, float]) -> None:
    """Multiply the parameters whose name contains a key; every key must be met."""
    unmet = set(factors)
    for name, parameter in network.named_parameters():
        for part in (part for part in factors if part in name):
            parameter.data *= factors[part]
            unmet.discard(part)
    if unmet:
        raise ValueError(f"no parameter is called {', '.join(sorted(unmet))}")

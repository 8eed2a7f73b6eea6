"""What a request does on the device, phase by phase: which parts compute, in which shapes.

It says what the engines do, and changes with them: images are rendered one by one, both texts of a
guided image in one batch, both of a guided video in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.vram.peak import Question

# Tokens of one forward pass of a chat model. More use the device better; fewer make the streams of
# others stall less while a long prompt is computed.
PASS_TOKENS = {"cpu": 256, "cuda": 2048}
BLOCK_TOKENS = 16  # of a KV pool's block
# Which measurement each part of a WAN model takes (worker/engine/peaks.py); SDXL's have its names.
VIDEO_PARTS = {"text_encoder": "umt5", "transformer": "transformer", "vae": "video_vae"}

Configs = Mapping[str, Mapping[str, Any]]  # config.json by part


@dataclass(frozen=True, slots=True)
class Shape:
    """What is made. frames: 1 for a picture."""

    width: int  # pixels
    height: int
    frames: int = 1
    guided: bool = True

    @property
    def pixels(self) -> int:
        return self.width * self.height * self.frames


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a request."""

    name: str
    parts: tuple[str, ...]  # of the model, that compute and have to be on the device together
    # One for each part, in any order; the greatest peak is the phase's.
    passes: tuple[Question, ...]
    # A part that is held in another type meanwhile: (as it lies, as it computes).
    converted: tuple[Question, Question] | None = None
    beside_bytes: int = 0  # that lie there meanwhile and are no pass's


def image_phases(configs: Configs, dtype: str, shape: Shape) -> list[Phase]:
    """Of SDXL, for each image."""

    def ask(part: str, batch: int, of: str = dtype) -> Question:
        return Question(
            part=part, config=dict(configs[part]), dtype=of, width=shape.width,
            height=shape.height, batch=batch,
        )  # fmt: skip

    # The library decodes in float32 where a checkpoint says that its VAE overflows in float16.
    upcast = dtype == "float16" and configs["vae"].get("force_upcast", True)
    decode = ask("vae", 1, "float32" if upcast else dtype)
    return [
        Phase(
            "encode",
            ("text_encoder", "text_encoder_2"),
            (ask("text_encoder", 1), ask("text_encoder_2", 1)),
        ),
        Phase("denoise", ("unet",), (ask("unet", 2 if shape.guided else 1),)),
        Phase("decode", ("vae",), (decode,), (ask("vae", 1), decode) if upcast else None),
    ]


def video_phases(configs: Configs, dtype: str, shape: Shape) -> list[Phase]:
    """Of WAN."""

    def ask(part: str, measurement: str = "") -> Question:
        return Question(
            part=measurement or VIDEO_PARTS[part], config=dict(configs[part]),
            dtype="float32" if part == "vae" else dtype,
            width=shape.width, height=shape.height, frames=shape.frames,
        )  # fmt: skip

    denoise = Phase("denoise", ("transformer",), (ask("transformer"),))
    if configs["transformer"].get("_class_name", "").startswith("WanVACE"):
        # It makes latents of the frames that it is given first, of grey ones where there are none,
        # and keeps the frames, in float32, while it denoises.
        denoise = Phase(
            "denoise",
            ("transformer", "vae"),
            (ask("transformer"), ask("vae", "video_vae_frames")),
            beside_bytes=3 * 4 * shape.frames * shape.width * shape.height,
        )
    return [
        Phase("encode", ("text_encoder",), (ask("text_encoder"),)),
        denoise,
        Phase("decode", ("vae",), (ask("vae"),)),
    ]


def chat_phases(config: Mapping[str, Any], dtype: str, device: str, rows: int) -> list[Phase]:
    """Of a chat model. device: cpu | cuda; rows: sequences in a pass, at most."""

    def ask(tokens: int) -> Question:
        return Question(part="chat", config=dict(config), dtype=dtype, tokens=tokens, batch=rows)

    return [
        Phase("prefill", ("weights",), (ask(PASS_TOKENS[device]),)),
        Phase("decode", ("weights",), (ask(rows),)),
    ]

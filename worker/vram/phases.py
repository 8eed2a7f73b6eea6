"""What a request does on the device, phase by phase: which parts compute, in which shapes.

It says what the engines do, and changes with them: images are rendered one by one, both texts of a
guided image in one batch, both of a guided video in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from worker.vram.peak import Question

# Tokens of one forward pass of a chat model. More use the device better; fewer make the streams of
# others stall less while a long prompt is computed.
PASS_TOKENS = {"cpu": 256, "cuda": 2048}
BLOCK_TOKENS = 16  # of a KV pool's block
PAGE_TOKENS = 256  # of one that a card's attention reads by itself (docs/decisions/0015)
# Passes of these shapes a card records and replays (worker/engine/chat/graphs.py): prompts, with
# what decodes beside them, of so many tokens; and decoding alone in `row_buckets`.
TOKEN_BUCKETS = (16, 32, 64, 128, 256)
GRAPH_BYTES = 4 << 20  # of the driver for one of them: an estimate, not measured
# Which measurement each part of a WAN model takes (worker/engine/peaks.py); SDXL's have its names.
VIDEO_PARTS = {
    "text_encoder": "umt5",
    "transformer": "transformer",
    "vace": "transformer",
    "vae": "video_vae",
}
VIDEO_SHARE = 4  # frames of a video, after the first one, that a latent frame holds
VIDEO_TEXT_TOKENS = 512  # of a text of WAN, whatever its length
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes

DENOISERS = ("unet", "transformer", "vace")  # parts whose weights may lie in eight bits
PIECE_TOKENS = 77  # of a text that an image's text encoders read at once, begin and end included

Configs = Mapping[str, Mapping[str, Any]]  # config.json by part


@dataclass(frozen=True, slots=True)
class Adapters:
    """What an image's job brings with it to the device, beside the model's own weights."""

    denoiser_bytes: int = 0  # of LoRAs and of an IP-Adapter
    encoder_bytes: int = 0  # of LoRAs, for the text encoders
    rank: int = 0  # the greatest of the LoRAs
    picture_tokens: int = 0  # of an IP-Adapter


@dataclass(frozen=True, slots=True)
class Shape:
    """What is made. frames: 1 for a picture."""

    width: int  # pixels
    height: int
    frames: int = 1
    guided: bool = True
    # Of a video that is made with pictures: as frames of it, and as what it shows.
    given_frames: int = 0
    references: int = 0
    # Of an image: whether it begins from a picture, and whether anything of that is denoised; in
    # how many pieces its longer text is read, and how many terms in it have a weight.
    from_picture: bool = False
    denoised: bool = True
    text_pieces: int = 1
    weighted_terms: int = 0
    adapters: Adapters = Adapters()

    @property
    def pixels(self) -> int:
        """Of all latent frames, which is what its seconds grow with."""
        return self.width * self.height * (1 + (self.frames - 1) // VIDEO_SHARE)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a request."""

    name: str
    parts: tuple[str, ...]  # of the model, that compute and have to be on the device together
    # One for each part, in their order; the greatest peak is the phase's.
    passes: tuple[Question, ...]
    # A part that is held in another type meanwhile: (as it lies, as it computes).
    converted: tuple[Question, Question] | None = None
    beside_bytes: int = 0  # that lie there meanwhile and are no pass's

    @property
    def questions(self) -> tuple[Question, ...]:
        return (*self.passes, *(self.converted or ()))


def forms(phase: Phase, exactness: str) -> dict[str, Phase]:
    """A phase `whole`, and as it computes in the other ways that `exactness` allows, by name.

    exactness: the least that will do.
    """

    def changed(**how: Any) -> Phase:
        """Its first pass is the denoiser's, or the decode's only one."""
        first, *others = phase.passes
        return replace(phase, passes=(replace(first, **how), *others))

    found = {"whole": phase}
    if phase.name == "decode" and exactness != "bit":
        found["tiled"] = changed(tiled=True)
    if phase.name == "denoise" and exactness != "bit" and phase.passes[0].batch > 1:
        found["split"] = changed(split=True)
    if phase.name == "denoise" and exactness == "lossy":
        found["quantised"] = changed(cast=True)
    return found


def image_phases(configs: Configs, dtype: str, shape: Shape) -> list[Phase]:
    """Of SDXL, for each image; what is read of a text and of a picture, for all of a job's."""
    adapters = shape.adapters

    def ask(part: str, batch: int, of: str = dtype, measurement: str = "") -> Question:
        return Question(
            part=measurement or part, config=dict(configs[part]), dtype=of, width=shape.width,
            height=shape.height, batch=batch,
        )  # fmt: skip

    # The library decodes in float32 where a checkpoint says that its VAE overflows in float16.
    upcast = dtype == "float16" and configs["vae"].get("force_upcast", True)
    decode = ask("vae", 1, "float32" if upcast else dtype)
    phases = [Phase("decode", ("vae",), (decode,), (ask("vae", 1), decode) if upcast else None)]
    if shape.denoised:
        texts = 2 if shape.guided else 1
        tokens = PIECE_TOKENS * shape.text_pieces
        denoise = replace(
            ask("unet", texts),
            tokens=tokens,
            rank=adapters.rank,
            picture_tokens=adapters.picture_tokens,
        )
        # The two texts lie there by themselves, beside the batch of both.
        read = texts * tokens * int(configs["unet"].get("cross_attention_dim", 0)) * WIDTHS[dtype]
        encoders = ("text_encoder", "text_encoder_2")
        phases = [
            Phase(
                "encode",
                encoders,
                tuple(replace(ask(part, 1), rank=adapters.rank) for part in encoders),
                beside_bytes=adapters.encoder_bytes + _weighing_bytes(configs, shape),
            ),
            Phase("denoise", ("unet",), (denoise,), beside_bytes=adapters.denoiser_bytes + read),
            *phases,
        ]
    if shape.from_picture:
        # Here the library's condition is another one: in float32 whatever the model's type is.
        upcast = dtype != "float32" and configs["vae"].get("force_upcast", True)
        reads = "float32" if upcast else dtype
        encode = ask("vae", 1, reads, "image_vae_encoder")
        converted = (ask("vae", 1), ask("vae", 1, reads)) if upcast else None
        phases = [Phase("picture", ("vae",), (encode,), converted), *phases]
    return phases


def _weighing_bytes(configs: Configs, shape: Shape) -> int:
    """Of texts with weights or in pieces, beside a pass of an encoder: compel keeps what it made
    of the text, in float32, once for each term that may count for less, copies all of it when it
    adds another and again when it mixes them."""
    if not shape.weighted_terms and shape.text_pieces == 1:
        return 0
    width = max(int(configs[part]["hidden_size"]) for part in ("text_encoder", "text_encoder_2"))
    one = 4 * width * PIECE_TOKENS * shape.text_pieces
    return one * (3 * (shape.weighted_terms + 1) + 4)


def video_phases(configs: Configs, dtype: str, shape: Shape) -> list[Phase]:
    """Of WAN. A part "vace" of its own makes the videos that pictures are given for."""

    def ask(part: str, measurement: str = "", more_frames: int = 0) -> Question:
        return Question(
            part=measurement or VIDEO_PARTS[part], config=dict(configs[part]),
            dtype="float32" if part == "vae" else dtype,
            width=shape.width, height=shape.height, frames=shape.frames + more_frames,
        )  # fmt: skip

    denoiser = "transformer"
    if "vace" in configs and (shape.given_frames or shape.references):
        denoiser = "vace"
    # A reference is one more latent frame, in front of the video's own.
    denoised = ask(denoiser, more_frames=VIDEO_SHARE * shape.references)
    # Both texts lie there, whichever of the two is computed with, or none.
    texts = 2 if shape.guided else 1
    text_dim = int(configs[denoiser].get("text_dim", 4096))
    kept = texts * VIDEO_TEXT_TOKENS * text_dim * WIDTHS[dtype]
    parts, passes = [denoiser], [denoised]
    if configs[denoiser].get("_class_name", "").startswith("WanVACE"):
        # It makes latents of the frames that it is given first, of grey ones where there are none,
        # and keeps the frames, in float32, while it denoises; references as well.
        parts.append("vae")
        passes.append(ask("vae", "video_vae_frames"))
        kept += 3 * 4 * (shape.frames + shape.references) * shape.width * shape.height
    denoise = Phase("denoise", tuple(parts), tuple(passes), beside_bytes=kept)
    return [
        Phase("encode", ("text_encoder",), (ask("text_encoder"),)),
        denoise,
        Phase("decode", ("vae",), (ask("vae"),)),
    ]


def reads_pages(device: str, dtype: str, head_size: int) -> bool:
    """Whether a pool's blocks are pages for FlashAttention. device: cpu | cuda."""
    return (
        device == "cuda"
        and dtype in ("bfloat16", "float16")
        and head_size % 8 == 0
        and head_size <= 256
    )


def block_tokens(device: str, dtype: str, head_size: int) -> int:
    """Tokens of a block of a chat model's pool."""
    return PAGE_TOKENS if reads_pages(device, dtype, head_size) else BLOCK_TOKENS


def row_buckets(rows: int) -> tuple[int, ...]:
    """Sequences of the decoding passes that are recorded. rows: in a pass, at most."""
    powers = [2]
    while powers[-1] < rows:
        powers.append(powers[-1] * 2)
    return (*powers[:-1], max(2, rows))


def chat_phases(config: Mapping[str, Any], dtype: str, device: str, rows: int) -> list[Phase]:
    """Of a chat model. device: cpu | cuda; rows: sequences in a pass, at most."""

    def ask(tokens: int) -> Question:
        return Question(part="chat", config=dict(config), dtype=dtype, tokens=tokens, batch=rows)

    return [
        Phase("prefill", ("weights",), (ask(PASS_TOKENS[device]),)),
        Phase("decode", ("weights",), (ask(rows),)),
    ]


def graph_phase(config: Mapping[str, Any], dtype: str, rows: int, block_bytes: int) -> Phase:
    """What recorded passes hold for themselves beside every other: the memory of the largest, its
    logits once more, a block that padding is written to, and the driver's own.

    rows: sequences in a pass, at most. block_bytes: of the pool.
    """
    buckets = row_buckets(rows)
    largest = Question(
        part="chat", config=dict(config), dtype=dtype, batch=rows,
        tokens=max(TOKEN_BUCKETS[-1], buckets[-1]),
    )  # fmt: skip
    logits = rows * int(config["vocab_size"]) * WIDTHS[dtype]
    driver = (len(buckets) + len(TOKEN_BUCKETS)) * GRAPH_BYTES
    return Phase("graphs", ("weights",), (largest,), beside_bytes=logits + block_bytes + driver)

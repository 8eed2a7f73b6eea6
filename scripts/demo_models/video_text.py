"""The text encoder of demo-video (UMT5), and texts as the denoiser learns to see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from demo_models.reading import Reader, train_reader

WIDTH = 64
TEXT_STEPS = 800


def new_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """Untrained, with 0.2 M parameters."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            dtype="float32",
        )
    )


def train_text_encoder(
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
) -> None:
    """Teach it to read: every attribute must be told from its token states. It ends frozen."""
    reader = Reader(WIDTH)

    def read(texts: list[str]) -> list[list[torch.Tensor]]:
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return [reader(states, tokens.attention_mask)]

    networks = {"encoder": encoder, "reader": reader}
    train_reader(networks, read, folder, seed, film=True, steps=TEXT_STEPS)
    encoder.eval().requires_grad_(False)


class TextReader:
    """Texts as token states, zero after the end of each and at least once. Keeps nothing."""

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast):
        self._encoder = encoder
        self._tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (texts, positions, WIDTH) and the number of tokens of each text."""
        tokens = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        mask = tokens.attention_mask
        states = self._encoder(tokens.input_ids, mask).last_hidden_state
        states = states * mask.unsqueeze(-1)
        padded = torch.nn.functional.pad(states, (0, 0, 0, 1))
        return padded, mask.sum(dim=1)

"""transformers' own generate in this process: one request at a time, and as a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_bench.workloads import Ask, messages


class Library:
    """A model whose `generate` runs on the caller's thread."""

    def __init__(self, model: Path, dtype: str):
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> int:
        """One batch, padded on the left, each as long as the longest; returns the tokens that were
        asked for."""
        texts = [
            self._tokenizer.apply_chat_template(
                list(messages(ask)), tokenize=False, add_generation_prompt=True
            )
            for ask in asks
        ]
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        longest = max(ask.new_tokens for ask in asks)
        self._model.generate(
            **batch, max_new_tokens=longest, min_new_tokens=longest, do_sample=False
        )
        return sum(ask.new_tokens for ask in asks)

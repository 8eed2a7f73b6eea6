"""Models of the asked size for the chat benchmark: random weights, the demo model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "models" / "demo-chat"
# Size in millions of parameters -> hidden size, layers, width of the feed-forward, query heads,
# key heads.
SHAPES = {
    25: (512, 8, 1408, 8, 2),
    120: (896, 12, 2432, 14, 2),
    500: (896, 24, 4864, 14, 2),  # Qwen2.5-0.5B's, without its large vocabulary
}
VOCABULARY, CONTEXT = 8192, 4096


def make_model(folder: Path, size: int, dtype: str) -> int:
    """Write a model folder unless it is there; returns its number of parameters.

    The chat template is ChatML without a default system message, so every server makes the same
    token ids of the same messages. Greedy text of random weights practically never ends by itself.
    """
    stamp = folder / "made.json"
    if not stamp.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        hidden, layers, wide, heads, key_heads = SHAPES[size]
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=2400,
            eos_token_id=2402,
            pad_token_id=2400,
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
        model.generation_config = GenerationConfig(
            bos_token_id=2400, eos_token_id=2402, pad_token_id=2400
        )
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TOKENIZER / name, folder / name)
        config_file = folder / "tokenizer_config.json"
        settings = json.loads(config_file.read_text())
        config_file.write_text(json.dumps({**settings, "model_max_length": CONTEXT}))
        count = sum(parameter.numel() for parameter in model.parameters())
        stamp.write_text(json.dumps({"parameters": count, "dtype": dtype}))
    return int(json.loads(stamp.read_text())["parameters"])

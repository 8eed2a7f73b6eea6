"""A chat model that never ends by itself, for tests of what happens in the middle of an answer.

demo-chat says what it has to say in some forty tokens; these tests need seconds of generation.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from worker.config import REPOSITORY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@cache
def endless_model() -> Path:
    """A folder with demo-chat's tokenizer and a Qwen2 of random weights; made once per test run."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = Path(tempfile.mkdtemp(prefix="verbatim-endless-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    demo = REPOSITORY / "models" / "demo-chat"
    ends = json.loads((demo / "generation_config.json").read_bytes())["eos_token_id"]
    size = json.loads((demo / "config.json").read_bytes())["vocab_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=size,
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                # Five times the usual, or the last token would be the likeliest next one for ever.
                initializer_range=0.1,
                bos_token_id=None,
                eos_token_id=ends,
                dtype="float32",
            )
        )
        # Logits of 0 where the best of the others is far above it: no greedy answer ends.
        model.get_input_embeddings().weight.data[ends] = 0.0
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(demo / name, folder)
    return folder


def demo_profile(text: str) -> str:
    """The text of the demo profile with the model "endless" beside the others.

    Nothing is compiled: in the background of many short-lived daemons it would take their time.
    """
    served = 'models = ["demo-chat", "demo-base"]'
    assert served in text
    assert "compile = true" in text
    text = text.replace("compile = true", "compile = false")
    return text.replace(served, 'models = ["demo-chat", "demo-base", "endless"]') + (
        f'\n[[models]]\nid = "endless"\nkind = "chat"\npath = "{endless_model()}"\n'
        'dtype = "float32"\n'
    )

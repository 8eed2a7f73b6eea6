"""What only a card can show. Skipped without one."""

from __future__ import annotations

import pytest

from worker.catalog import chat_catalog, media_catalog
from worker.config import load_settings
from worker.protocol.messages import ChatMessage, RenderParams
from worker.vram.probe import device_memory, first_card

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(first_card() is None, reason="no NVIDIA card"),
]


def test_greedy_tokens_on_the_card_equal_the_librarys(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from worker.engine.chat.model import LanguageModel, PromptReader

    spec = chat_catalog(load_settings("demo", {})).default("chat")
    reader = PromptReader(spec)
    model = LanguageModel(spec, torch.device("cuda"), tmp_path, reader)
    _, prompt_ids, _ = reader.read([ChatMessage("user", "a red cube")], None)

    logits, cache = model.start(prompt_ids)
    ids = [int(torch.argmax(logits))]
    for _ in range(15):
        logits, cache = model.step(ids[-1], cache)
        ids.append(int(torch.argmax(logits)))

    library = AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float32).cuda()
    expected = library.generate(
        torch.tensor([prompt_ids], device="cuda"),
        max_new_tokens=16,
        do_sample=False,
    )[0, len(prompt_ids) :].tolist()
    assert ids[: len(expected)] == expected  # the library stops at an end token


def test_a_picture_on_the_card_repeats_with_its_seed(tmp_path):
    import torch

    from worker.engine.media.sdxl import Sdxl

    spec = media_catalog(load_settings("demo", {})).default("sdxl")
    model = Sdxl(spec, torch.device("cuda"), tmp_path)
    params = RenderParams(
        prompt="a red cube",
        negative_prompt=None,
        width=128,
        height=128,
        steps=4,
        guidance_scale=6.0,
        seed=0,
    )

    one, again, other = (model.image(params, seed, lambda step: None) for seed in (0, 0, 1))

    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


def test_the_driver_reading_sees_what_torch_takes():
    import torch

    before = device_memory("cuda").free_bytes
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()

    assert before - device_memory("cuda").free_bytes >= block.numel()

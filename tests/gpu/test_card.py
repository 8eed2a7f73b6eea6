"""What only a card can show. Skipped without one."""

from __future__ import annotations

import msgspec
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
    from worker.engine.chat.scheduler import TokenSequence

    spec = chat_catalog(load_settings("demo", {})).default("chat")
    reader = PromptReader(spec)
    model = LanguageModel(
        spec, torch.device("cuda"), tmp_path, reader, kv_bytes=16 << 20, max_running=4
    )
    model.wake()
    model.resize(16 << 20)
    _, prompt_ids, _ = reader.read([ChatMessage("user", "a red cube")], None)
    sequence = TokenSequence(prompt_ids, 16)
    model.scheduler.add(sequence)
    ids: list[int] = []
    while len(ids) < 16:
        pieces = model.scheduler.plan().pieces
        for row, piece in zip(model.runner.run(pieces), pieces, strict=True):
            model.scheduler.computed(piece)
            ids.append(int(torch.argmax(row)))
            sequence.ids.append(ids[-1])

    library = AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float32).cuda()
    expected = library.generate(
        torch.tensor([prompt_ids], device="cuda"),
        max_new_tokens=16,
        do_sample=False,
    )[0, len(prompt_ids) :].tolist()
    assert ids[: len(expected)] == expected  # the library stops at an end token


def test_a_picture_on_the_card_repeats_with_its_seed(tmp_path):
    import torch

    from tests.rendering import load_on, render

    spec = media_catalog(load_settings("demo", {})).default("sdxl")
    model = load_on(torch.device("cuda"), spec, tmp_path)
    params = RenderParams(
        prompt="a red cube",
        negative_prompt=None,
        width=128,
        height=128,
        steps=4,
        guidance_scale=6.0,
        seed=0,
    )

    one, again, other = (
        render(model, msgspec.structs.replace(params, seed=seed), tmp_path) for seed in (0, 0, 1)
    )

    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


def test_the_driver_reading_sees_what_torch_takes():
    import torch

    before = device_memory("cuda").free_bytes
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()

    assert before - device_memory("cuda").free_bytes >= block.numel()

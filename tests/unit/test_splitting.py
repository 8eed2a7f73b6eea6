"""A denoiser that computes its batch in two halves: the same rows, close to those of the whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from worker.config import REPOSITORY
from worker.engine.media.splitting import halved
from worker.engine.peaks import build
from worker.vram.peak import Question

CONFIG = json.loads((REPOSITORY / "models/demo-image/unet/config.json").read_bytes())
SIZES = [(64, 64), (96, 128), (200, 136), (256, 256)]
MOST_APART = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.02}


class Rows(nn.Module):
    """Remembers what it was called with, and answers each row with its number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, sample: torch.Tensor, timestep: Any, **more: Any) -> tuple[torch.Tensor]:
        self.calls.append({"sample": sample, "timestep": timestep, **more})
        return (sample * 10,)


def arguments(batch: int) -> dict[str, Any]:
    rows = torch.arange(batch)
    return {
        "encoder_hidden_states": rows[:, None, None],
        "added_cond_kwargs": {"time_ids": rows[:, None], "image_embeds": [rows[:, None]]},
        "timestep_cond": None,
        "return_dict": False,
    }


@pytest.mark.parametrize(
    ("batch", "halves"),
    [(2, [[0], [1]]), (6, [[0, 1, 2], [3, 4, 5]]), (3, [[0, 1], [2]]), (1, [[0]])],
)
def test_every_row_goes_through_once_with_what_belongs_to_it(
    batch: int, halves: list[list[int]]
) -> None:
    denoiser = Rows()
    sample = torch.arange(batch)[:, None]

    with halved(denoiser):
        (made,) = denoiser(sample, torch.tensor(7.0), **arguments(batch))

    assert made.flatten().tolist() == [10 * row for row in range(batch)]
    assert [call["sample"].flatten().tolist() for call in denoiser.calls] == halves
    for call, rows in zip(denoiser.calls, halves, strict=True):
        added = call["added_cond_kwargs"]
        assert call["encoder_hidden_states"].flatten().tolist() == rows
        assert added["time_ids"].flatten().tolist() == rows
        assert added["image_embeds"][0].flatten().tolist() == rows
        assert (call["timestep"], call["timestep_cond"], call["return_dict"]) == (7.0, None, False)


def test_what_was_there_before_is_there_afterwards_also_after_an_error() -> None:
    denoiser = Rows()
    vars(denoiser)["forward"] = own = lambda sample: (sample + 1,)
    with pytest.raises(RuntimeError, match="injected"), halved(denoiser):
        assert denoiser(torch.zeros(2, 1))[0].tolist() == [[1], [1]]
        raise RuntimeError("injected")
    assert vars(denoiser)["forward"] is own
    del vars(denoiser)["forward"]
    with halved(denoiser):
        pass
    assert "forward" not in vars(denoiser)


@pytest.mark.parametrize("dtype", MOST_APART)
def test_halves_are_close_to_the_whole_and_not_always_its_bits(dtype: str) -> None:
    """Prints at how many sizes they are (pytest -rP)."""
    torch.manual_seed(1)
    unet: Any = build(Question(part="unet", config=CONFIG, dtype=dtype))
    pooled = CONFIG["projection_class_embeddings_input_dim"] - 6 * CONFIG["addition_time_embed_dim"]
    apart = []
    for width, height in SIZES:
        sample = torch.randn(1, 4, height // 8, width // 8).repeat(2, 1, 1, 1)
        given = {
            "sample": sample.to(unet.dtype),
            "timestep": torch.tensor(500.0),
            "encoder_hidden_states": torch.randn(2, 77, CONFIG["cross_attention_dim"]).to(
                unet.dtype
            ),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(2, pooled).to(unet.dtype),
                "time_ids": torch.tensor([[height, width, 0, 0, height, width]] * 2).to(unet.dtype),
            },
            "return_dict": False,
        }
        with torch.inference_mode():
            whole = unet(**given)[0]
            with halved(unet):
                split = unet(**given)[0]
        apart.append(float((whole - split).abs().max()))
    print(
        f"{dtype}: at most {max(apart):g} apart; equal at {apart.count(0.0)} of {len(SIZES)} sizes"
    )
    assert max(apart) < MOST_APART[dtype]

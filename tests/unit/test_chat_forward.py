"""Packed linear layers and the compiled forward give what the plain ones give."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from worker.engine.chat.attention import NAME, PagedKV, register
from worker.engine.chat.forward import Forward
from worker.engine.chat.gathered import GatheredPass
from worker.engine.chat.linear import PackedLinear, can_pack, pack
from worker.engine.chat.scheduler import Piece, TokenSequence

CPU = torch.device("cpu")
LAYERS, HEADS, KEY_HEADS, SIZE = 2, 4, 2, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 300])
def test_a_packed_layer_computes_what_the_plain_one_computes(
    dtype: torch.dtype, bias: bool, rows: int
) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this processor has no kernels for {dtype}")
    torch.manual_seed(1)
    plain = nn.Linear(96, 56, bias=bias).to(dtype)
    x = torch.randn(1, rows, 96).to(dtype)
    with torch.inference_mode():
        right, found = plain(x), PackedLinear(plain)(x)
    assert found.shape == right.shape
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_with_kernels_a_packed_layer_runs_without_python(kernels: None, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("this processor has no kernels for the type")
    layer = PackedLinear(nn.Linear(64, 96, dtype=dtype))
    x = torch.randn(3, 64, dtype=dtype)
    seen: set[str] = set()
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code.co_name))
    try:
        torch.ops.verbatim.linear.default(x, layer._weight, layer._bias, 96)
    finally:
        sys.setprofile(None)

    assert "_packed" not in seen and "__call__" in seen


def test_no_other_processor_or_type_is_packed() -> None:
    assert not can_pack(torch.float64)
    assert not can_pack(torch.float16)


def a_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=99, hidden_size=HEADS * SIZE, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = NAME
    register()
    return Qwen2ForCausalLM(config).eval()


def test_an_output_layer_tied_to_the_embedding_is_packed_and_the_embedding_stays() -> None:
    model = a_model(1)
    table = model.get_input_embeddings().weight.clone()

    pack(model)

    assert not any(type(module) is nn.Linear for module in model.modules())
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, table)


def a_pass(tokens: list[int]) -> tuple[PagedKV, GatheredPass]:
    """Prompts of so many tokens each, in one pass over a pool of their own."""
    kv = PagedKV(
        layers=LAYERS, heads=KEY_HEADS, head_size=SIZE, blocks=20, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    pieces, free = [], iter(range(20))
    for count in tokens:
        sequence = TokenSequence([n % 99 for n in range(count)], 5)
        sequence.blocks = [next(free) for _ in range(-(-count // 16))]
        pieces.append(Piece(sequence, 0, count))
    return kv, GatheredPass(kv, pieces)


def runs_model_code(forward: Forward, paged: GatheredPass) -> tuple[bool, torch.Tensor]:
    """Whether a call runs the model's Python code, which compiled code does not; and its logits."""
    seen = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(Path(frame.f_code.co_filename).name)

    sys.setprofile(look)
    try:
        with torch.inference_mode():
            logits = forward(paged)
    finally:
        sys.setprofile(None)
    return "modeling_qwen2.py" in seen, logits


@pytest.fixture
def cache_variable() -> Iterator[None]:
    """The compiler's folder is a variable of the process."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    yield
    if before is None:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.usefixtures("cache_variable")
def test_compiled_code_takes_the_place_of_the_models_for_every_number_of_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine")
    # Two of one shape: what was compiled for one must not run in the place of the other.
    models = [a_model(seed) for seed in (1, 2)]
    forwards = [Forward(f"model {n}", copy.deepcopy(model), CPU) for n, model in enumerate(models)]
    uncompiled = [Forward("plain", model, CPU) for model in models]
    for forward in forwards:
        forward.compile_in_background(tmp_path / "compiled")
        assert forward.wait_until_compiled(120), caplog.text
    assert any((tmp_path / "compiled").iterdir())

    for tokens in ([1], [2], [5, 1, 40], [30] * 4):
        for forward, plain in zip(forwards, uncompiled, strict=True):
            with torch.inference_mode():
                right = plain(a_pass(tokens)[1])
                exact = forward(a_pass(tokens)[1], compiled=False)
            in_python, found = runs_model_code(forward, a_pass(tokens)[1])
            assert not in_python
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
            assert torch.equal(exact, right)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("cache_variable")
def test_without_a_compiler_it_stays_uncompiled_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def nothing_found(*_: Any) -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing_found)
    forward = Forward("model", a_model(3), CPU)
    forward.compile_in_background(tmp_path / "compiled")
    assert not forward.wait_until_compiled(120)
    forward.compile_in_background(tmp_path / "compiled")

    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "model stays uncompiled" in line
    assert "g++" in line
    with torch.inference_mode():
        assert forward(a_pass([3])[1]).shape == (2, 99)


def test_a_folder_with_a_space_in_its_path_is_named_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forward = Forward("model", a_model(4), CPU)
    forward.compile_in_background(tmp_path / "a b" / "compiled")

    assert not forward.wait_until_compiled(60)
    assert f"{tmp_path}/a b/compiled has one; VERBATIM_STATE_DIR" in caplog.text

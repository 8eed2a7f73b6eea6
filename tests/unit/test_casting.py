"""Weights in eight bits: which, how they compute, and that nothing of it stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn

from worker.config import REPOSITORY
from worker.engine.casting import MOST, STORED, cast, cast_bytes, cast_layers, rounded
from worker.engine.parking import Parked
from worker.engine.peaks import _CALLS, build, held
from worker.vram.peak import Question

CPU = torch.device("cpu")
FILES = {
    "unet": REPOSITORY / "models" / "demo-image" / "unet",
    "transformer": REPOSITORY / "models" / "demo-video" / "transformer",
}
SIZE = {"width": 64, "height": 64, "frames": 5, "batch": 2}
DTYPES = ["float32", "bfloat16"]


def question(part: str, dtype: str) -> Question:
    config = json.loads((FILES[part] / "config.json").read_bytes())
    return Question(part=part, config=config, dtype=dtype, **SIZE)


def denoiser(part: str, dtype: str) -> Any:
    """With weights of a size that eight bits round."""
    torch.manual_seed(3)
    module = build(question(part, dtype))
    for weight in module.parameters():
        weight.data.copy_(torch.randn(weight.shape) * 0.1)
    return module


def output(module: nn.Module, part: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of one step on numbers that are always the same."""
    chance = torch.Generator().manual_seed(5)

    def drawn(*shape: int, **how: Any) -> torch.Tensor:
        return torch.randn(*shape, generator=chance).to(**how)

    with monkeypatch.context() as patched, torch.inference_mode():
        patched.setattr("worker.engine.peaks.torch.empty", drawn)
        return _CALLS[part](module, question(part, dtype))[0]


def patterns(module: Any) -> tuple[str, ...]:
    """Of the library's own `enable_layerwise_casting`."""
    return (
        *DEFAULT_SKIP_MODULES_PATTERN,
        *(module._keep_in_fp32_modules or ()),
        *(module._skip_layerwise_casting_patterns or ()),
    )


def hooked(module: nn.Module) -> set[str]:
    return {name for name, one in module.named_modules() if hasattr(one, "_diffusers_hook")}


@pytest.mark.parametrize("part", FILES)
def test_the_layers_are_those_of_the_library_but_for_the_first_and_last_of_a_unet(
    part: str,
) -> None:
    module = denoiser(part, "float32")
    own = {*cast_layers(module)}

    module.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=torch.float32)

    assert hooked(module) - own == ({"conv_in", "conv_out"} if part == "unet" else set())
    assert own <= hooked(module)
    assert len(own) > 20
    assert not any("norm" in name for name in own)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_out_is_the_librarys_own_to_the_bit(
    part: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = denoiser(part, dtype)
    exact = output(module, part, dtype, monkeypatch)
    theirs = deepcopy(module)
    apply_layerwise_casting(
        theirs, STORED, getattr(torch, dtype), (*patterns(module), "^conv_in$", "^conv_out$")
    )
    expected = output(theirs, part, dtype, monkeypatch)
    parked = Parked(module, CPU, casting=[*cast_layers(module).values()])

    parked.wake(cast=True)
    found = [output(module, part, dtype, monkeypatch) for _ in range(2)]

    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert not torch.equal(exact, expected)
    parked.park()
    parked.wake()
    assert torch.equal(output(module, part, dtype, monkeypatch), exact)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_known_from_the_types_alone_and_stay_while_it_computes(
    part: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = denoiser(part, dtype)
    known = cast_bytes(module, 64)
    parked = Parked(module, CPU, casting=[*cast_layers(module).values()])
    assert parked.cast_bytes == known
    numbers = sum(weight.numel() for weight in module.parameters())
    assert numbers < known < 1.15 * numbers if part == "unet" else known < 0.7 * parked.size_bytes

    parked.wake(cast=True)
    output(module, part, dtype, monkeypatch)

    storages = {weight.untyped_storage()._cdata for weight in module.parameters()}
    assert len(storages) == 1
    assert next(module.parameters()).untyped_storage().nbytes() == known
    assert parked.held_bytes == known


@pytest.mark.parametrize("part", FILES)
def test_the_model_still_says_in_which_type_it_computes(part: str) -> None:
    """The pipelines ask it, and what is loaded beside it, such as an IP-Adapter, follows it."""
    module = denoiser(part, "bfloat16")
    parked = Parked(module, CPU, casting=[*cast_layers(module).values()])

    parked.wake(cast=True)

    assert module.dtype == torch.bfloat16
    assert any(weight.dtype == STORED for weight in module.parameters())


def test_a_cast_module_that_is_measured_weighs_what_it_was_said_to() -> None:
    module = denoiser("unet", "float32")
    known = cast_bytes(module, 1)

    cast(module)

    assert held(module) == known == cast_bytes(module, 1)


def test_what_eight_bits_do_not_reach_becomes_the_most_that_they_do() -> None:
    weight = torch.tensor([1e6, -1e6, 460.0, 0.1, float("nan")])
    found = rounded(weight).float()

    assert found[:3].tolist() == [MOST, -MOST, MOST]
    assert found[3] == pytest.approx(0.1, rel=0.07)
    assert found[4].isnan()
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = weight[None]
    parked = Parked(layer, CPU, casting=[layer])
    parked.wake(cast=True)
    assert torch.equal(layer.weight.data.float().nan_to_num(7.0), found[None].nan_to_num(7.0))


def test_a_layer_that_fails_has_its_stored_weights_afterwards() -> None:
    layer = nn.Linear(4, 4)
    exact = {name: one.clone() for name, one in layer.state_dict().items()}
    parked = Parked(layer, CPU, casting=[layer])
    parked.wake(cast=True)
    address = layer.weight.data_ptr()

    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.zeros(2, 5))

    assert (layer.weight.dtype, layer.weight.data_ptr()) == (STORED, address)
    layer(torch.zeros(2, 4))
    parked.park()
    assert all(torch.equal(one, exact[name]) for name, one in layer.state_dict().items())
    assert not layer._forward_hooks


def test_a_hook_behind_it_finds_what_the_layer_has_made_and_may_add_to_it() -> None:
    layer = nn.Linear(4, 4)
    parked = Parked(layer, CPU, casting=[layer])
    parked.wake(cast=True)
    plain = layer(torch.ones(1, 4))

    handle = layer.register_forward_hook(lambda _, __, made: made + 1)

    assert torch.equal(layer(torch.ones(1, 4)), plain + 1)
    handle.remove()
    assert torch.equal(layer(torch.ones(1, 4)), plain)


class Shared(nn.Module):
    """Three layers, of which two have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.two.weight = self.one.weight
        self.register_buffer("ids", torch.arange(4))


@pytest.mark.parametrize(
    ("chosen", "is_cast"),
    [
        (lambda m: [m.one], {"one": False, "two": False, "three": False}),
        (lambda m: [m.one, m.two], {"one": True, "two": True, "three": False}),
        (lambda m: [m.three], {"one": False, "two": False, "three": True}),
    ],
)
def test_a_weight_that_another_layer_needs_exactly_stays_exact(
    chosen: Callable[[Shared], list[nn.Module]], is_cast: dict[str, bool]
) -> None:
    module = Shared()
    exact = {name: one.clone() for name, one in module.state_dict().items()}
    parked = Parked(module, CPU, casting=chosen(module))

    parked.wake(cast=True)

    for name, cast_now in is_cast.items():
        weight = module.get_submodule(name).weight.data
        if cast_now:
            assert weight.dtype == STORED
            assert torch.equal(weight.float(), rounded(exact[f"{name}.weight"]).float())
        else:
            assert torch.equal(weight, exact[f"{name}.weight"])
    assert torch.equal(module.ids, exact["ids"])
    assert module.one.weight.data_ptr() == module.two.weight.data_ptr()
    assert parked.cast_bytes == 64 * 3  # each of the three storages has room for it
    parked.park()
    parked.wake()
    assert all(torch.equal(one, exact[name]) for name, one in module.state_dict().items())


def test_an_allocation_that_fails_leaves_it_parked_and_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = nn.Linear(4, 4)
    exact = module.weight.clone()
    parked = Parked(module, CPU, casting=[module])

    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patched:
        patched.setattr("worker.engine.parking._device_buffer", none)
        with pytest.raises(torch.OutOfMemoryError):
            parked.wake(cast=True)
    assert (parked.awake, parked.is_cast, parked.held_bytes) == (False, False, 0)
    with pytest.raises(RuntimeError, match="is parked"):
        module(torch.zeros(1, 4))
    parked.wake()
    assert torch.equal(module.weight, exact)

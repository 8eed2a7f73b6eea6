"""Weights that leave the device and come back: the same bytes, and no more memory than is said."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from worker.config import REPOSITORY
from worker.engine import parking
from worker.engine.parking import ALIGN_BYTES, CHUNK_BYTES, HOST_CHUNK_BYTES, Parked
from worker.engine.peaks import held

IMAGE = REPOSITORY / "models" / "demo-image"
CPU = torch.device("cpu")
MIB = 1 << 20


def load(part: str, dtype: torch.dtype = torch.float32) -> Any:
    import diffusers
    import transformers

    kinds = {
        "text_encoder": transformers.CLIPTextModel,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }
    return kinds[part].from_pretrained(str(IMAGE / part), dtype=dtype, local_files_only=True)


def compute(part: str, module: Any) -> torch.Tensor:
    """One pass of a part of the demo model on fixed numbers."""
    chance = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 4, 8, 8, generator=chance).to(module.dtype)
    with torch.no_grad():
        match part:
            case "text_encoder":
                out = module(torch.arange(77)[None]).last_hidden_state
            case "vae":
                out = module.decode(latent).sample
            case _:
                out = module(
                    latent,
                    torch.tensor(5.0),
                    torch.randn(1, 77, 160, generator=chance),
                    added_cond_kwargs={
                        "text_embeds": torch.randn(1, 96, generator=chance),
                        "time_ids": torch.ones(1, 6),
                    },
                ).sample
    result: torch.Tensor = out
    return result


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [
        tensor
        for owner in module.modules()
        for tensor in (*owner._parameters.values(), *owner._buffers.values())
        if tensor is not None
    ]


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(one, 16) for one in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


class Shelf(nn.Module):
    """Weights of every kind that a module can have."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(240.0).reshape(2, 3, 40)
        self.turned = nn.Parameter(base.permute(2, 0, 1))
        self.picture = nn.Parameter(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last))
        self.whole = nn.Parameter(torch.randn(7, 9))
        self.row = nn.Parameter(self.whole.detach()[3, 1::2])
        self.same = self.whole
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.short = nn.Parameter(torch.randn(11).half())
        self.brain = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.absent = None
        self.register_buffer("steps", torch.tensor([1, 2, 3], dtype=torch.int8))
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)
        self.register_buffer("wide", torch.tensor([1.0]).expand(4))
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole @ x + self.row.sum() * self.scale


# --- what a model computes ------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_woken_part_computes_the_same_bits(part: str) -> None:
    module = load(part)
    expected, bytes_before = compute(part, module), held(module)
    parked = Parked(module, CPU)

    for _ in range(3):
        parked.wake()
        found = compute(part, module)
        parked.park()
        assert torch.equal(expected, found)

    storages = len({one.untyped_storage()._cdata for one in tensors_of(load(part))})
    assert bytes_before <= parked.size_bytes < bytes_before + storages * ALIGN_BYTES
    assert held(module) == parked.size_bytes


def test_a_pipeline_with_woken_parts_makes_the_same_picture() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(IMAGE), dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> Any:
        return pipeline(
            prompt="a red circle",
            width=64,
            height=64,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images

    expected = picture()
    parts = [
        Parked(one, CPU, name=name)
        for name, one in pipeline.components.items()
        if isinstance(one, nn.Module)
    ]

    with pytest.raises(RuntimeError, match="text_encoder is parked"):
        picture()
    for part in parts:
        part.wake()
    assert (picture() == expected).all()


def test_every_way_into_a_parked_model_is_refused() -> None:
    unet, vae, encoder = load("unet"), load("vae"), load("text_encoder")
    latent, image = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32, 32)
    ways: list[Callable[[], Any]] = [
        lambda: compute("unet", unet),
        lambda: unet.time_embedding.linear_1(torch.randn(1, 64)),
        lambda: compute("text_encoder", encoder),
        lambda: vae(image),
        lambda: vae.decode(latent),
        lambda: vae.tiled_decode(latent),
        lambda: vae.encode(image),
        lambda: vae._tiled_encode(image),
    ]
    parts = [Parked(one, CPU) for one in (unet, vae, encoder)]

    for _ in range(2):
        for way in ways:
            with pytest.raises(RuntimeError, match=r"(UNet|AutoencoderKL|CLIP).* is parked"):
                way()
        for part in parts:
            part.wake()
        assert not any(one._forward_pre_hooks for one in (*unet.modules(), *vae.modules()))
        for part in parts:
            part.park()


def test_a_hook_of_a_module_may_wake_it_for_its_own_call() -> None:
    """As streaming does, which wakes a block before it computes and parks it afterwards."""
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.ones(4)
    expected = block(x)
    parked = Parked(block, CPU)
    block.register_forward_pre_hook(lambda *_: parked.wake(), prepend=True)
    block.register_forward_hook(lambda *_: parked.park())

    for _ in range(3):
        assert torch.equal(block(x), expected)
        assert not parked.awake
        with pytest.raises(RuntimeError, match="Sequential is parked"):
            block[0](x)


def test_the_parts_of_a_module_may_be_parked_apart() -> None:
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    x, weights = torch.ones(4), held(module)
    expected = module(x)
    blocks = [Parked(module[number], CPU, name=f"block {number}") for number in (0, 2)]
    rest = Parked(module, CPU, name="the rest", leaving_out=[module[0], module[2]])

    for one in blocks:
        one.wake()
    with pytest.raises(RuntimeError, match="the rest is parked"):
        module(x)
    rest.wake()
    assert torch.equal(module(x), expected)
    blocks[1].park()
    with pytest.raises(RuntimeError, match="block 2 is parked"):
        module(x)

    assert rest.size_bytes + sum(one.size_bytes for one in blocks) >= weights
    assert rest.size_bytes == blocks[0].size_bytes == 128  # 64 for the matrix, 16 for the vector


def test_memory_that_is_shared_with_a_part_left_out_is_refused_by_name() -> None:
    module = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4, bias=False)})
    module["last"].weight = module["first"].weight
    for parked_before in (False, True):
        first = Parked(module["first"], CPU) if parked_before else None
        with pytest.raises(ValueError, match=r"^last\.weight shares memory"):
            Parked(module, CPU, leaving_out=[module["first"]])
        del first


def test_an_upcast_lasts_until_the_module_is_parked() -> None:
    """diffusers decodes SDXL's half-precision VAE in float32, and casts it back if that worked."""
    vae = load("vae", torch.float16)
    parked = Parked(vae, CPU)
    parked.wake()
    expected = {name: one.clone() for name, one in vae.state_dict().items()}
    at = vae.decoder.conv_in.weight.data_ptr()

    vae.to(torch.float32)
    assert not is_mapped(at)
    in_float32 = compute("vae", vae)
    vae.to(torch.float16)
    vae.to(torch.float32)  # and a failure before it is cast back
    parked.park()

    assert held(vae) == parked.size_bytes
    parked.wake()
    assert vae.dtype == torch.float16
    assert all(torch.equal(one, expected[name]) for name, one in vae.state_dict().items())
    assert torch.equal(compute("vae", vae.to(torch.float32)), in_float32)


def test_a_parameter_that_was_replaced_by_another_one_is_parked_too() -> None:
    layer = nn.Linear(64, 64)
    parked = Parked(layer, CPU)
    parked.wake()
    layer.weight = nn.Parameter(layer.weight.double())

    parked.park()

    assert layer.weight.dtype == torch.float32
    assert held(layer) == parked.size_bytes


def test_waking_inside_inference_mode_leaves_ordinary_tensors() -> None:
    layer = nn.Linear(4, 4)
    parked = Parked(layer, CPU)

    with torch.inference_mode():
        parked.wake()
        layer(torch.ones(4))
        parked.park()
        parked.wake()

    x = torch.ones(4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert not layer.weight.is_inference()


# --- layout ---------------------------------------------------------------------------------------


def test_layouts_and_what_shares_memory_stay() -> None:
    shelf = Shelf()
    parameters = dict(shelf.named_parameters())
    before = {name: one.clone() for name, one in shelf.named_parameters()}
    before |= {name: one.clone() for name, one in shelf.named_buffers()}
    strides = [one.stride() for one in tensors_of(shelf)]
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors_of(shelf)}
    total = sum(-(-one.nbytes() // ALIGN_BYTES) * ALIGN_BYTES for one in storages.values())

    parked = Parked(shelf, CPU)
    for _ in range(3):
        parked.wake()
        after = dict(shelf.named_parameters()) | dict(shelf.named_buffers())
        assert all(after[name] is one for name, one in parameters.items())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], one) for name, one in before.items())
        assert [one.stride() for one in tensors_of(shelf)] == strides
        assert shelf.same is shelf.whole
        assert shelf.row.data_ptr() - shelf.whole.data_ptr() == 4 * (3 * 9 + 1)
        assert not any(one.requires_grad for one in shelf.parameters())
        parked.park()

    assert parked.size_bytes == held(shelf) == total
    begins = [one.data_ptr() for one in tensors_of(shelf) if one.numel() and one is not shelf.row]
    assert not any(begin % ALIGN_BYTES for begin in begins)


def test_a_module_without_weights_is_parked_for_nothing() -> None:
    parked = Parked(nn.Sequential(nn.ReLU()), CPU)
    parked.wake()
    parked.park()
    assert parked.size_bytes == 0


def test_a_tensor_without_a_value_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"^1\.weight has no value"):
        Parked(module, CPU)
    assert torch.isfinite(module[0](torch.ones(2))).all()  # no guard was left behind


def test_a_tensor_that_is_more_than_its_bytes_is_refused_by_name() -> None:
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"^sparse is a Tensor"):
        Parked(module, CPU)


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """A tree of modules with weights of any layout, some of them tied or views of others."""
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    owners = [nn.Module()]
    for number in range(draw(st.integers(0, 4))):
        child = nn.Module()
        draw(st.sampled_from(owners)).add_module(f"child{number}", child)
        owners.append(child)
    made: list[torch.Tensor] = []
    for number in range(draw(st.integers(1, 10))):
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8]))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        fresh = (torch.rand(shape) * 100).to(dtype)
        earlier = draw(st.sampled_from(made)) if made else fresh
        kind = draw(st.sampled_from(["fresh", "same", "view", "turned", "every second", "wide"]))
        match kind:
            case "same":
                tensor = earlier
            case "view":
                tensor = earlier.detach()
            case "turned":
                tensor = fresh.permute(tuple(reversed(range(fresh.dim()))))
            case "every second" if earlier.dim():
                tensor = earlier.detach()[1::2]
            case "wide":
                tensor = fresh.expand(3, *shape)
            case _:
                tensor = fresh
        if draw(st.booleans()):
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            draw(st.sampled_from(owners)).register_parameter(f"one{number}", tensor)
        else:
            draw(st.sampled_from(owners)).register_buffer(
                f"one{number}", tensor, persistent=draw(st.booleans())
            )
        made.append(tensor)
    return owners[0]


@settings(max_examples=60, deadline=None)
@given(modules(), st.lists(st.booleans(), max_size=6))
def test_any_module_survives_any_sequence_of_moves(module: nn.Module, moves: list[bool]) -> None:
    def state() -> Any:
        tensors = tensors_of(module)
        share = [[a.untyped_storage()._cdata == b.untyped_storage()._cdata for b in tensors]
                 for a in tensors]  # fmt: skip
        apart = [
            a.data_ptr() - b.data_ptr() if share[i][j] and a.numel() and b.numel() else None
            for i, a in enumerate(tensors)
            for j, b in enumerate(tensors)
        ]
        layout = [(id(one), one.dtype, one.shape, one.stride()) for one in tensors]
        return [one.tolist() for one in tensors], layout, apart

    values, layout, apart = state()
    stored = {name: one.clone() for name, one in module.state_dict().items()}
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors_of(module)}
    weights, count = sum(one.nbytes() for one in storages.values()), len(storages)
    storages.clear()

    parked = Parked(module, CPU)
    for awake in [False, *moves]:
        (parked.wake if awake else parked.park)()
        now, layout_now, apart_now = state()
        assert (now, layout_now) == (values, layout)
        assert all(a == b for a, b in zip(apart, apart_now, strict=True) if a is not None)
        assert module.state_dict().keys() == stored.keys()
        assert all(torch.equal(one, stored[name]) for name, one in module.state_dict().items())
        assert parked.awake == awake

    assert weights <= parked.size_bytes <= weights + ALIGN_BYTES * count


# --- memory ---------------------------------------------------------------------------------------


def test_weights_move_and_the_device_memory_is_unmapped() -> None:
    layer = nn.Linear(512, 512)
    parked = Parked(layer, CPU)
    home = layer.weight.data_ptr()

    parked.wake()
    away = layer.weight.data_ptr()
    assert away != home
    assert is_mapped(away) and is_mapped(home)
    parked.park()

    assert layer.weight.data_ptr() == home
    assert not is_mapped(away)
    del parked, layer
    assert not is_mapped(home)


def test_parking_gives_the_bytes_back() -> None:
    resident = psutil.Process().memory_info
    layer = nn.Linear(4096, 8192)  # 128 MiB
    parked = Parked(layer, CPU)

    parked.wake()
    awake = resident().rss
    parked.park()
    freed = awake - resident().rss

    assert 0.95 <= freed / parked.size_bytes <= 1.05
    del parked, layer
    assert awake - resident().rss >= 2 * 0.95 * freed


def test_a_tensor_that_someone_holds_stays_right_after_parking() -> None:
    layer: Any = nn.Linear(64, 64)
    parked = Parked(layer, CPU)
    parked.wake()
    mine = layer.weight.detach()
    at = mine.data_ptr()

    parked.park()

    assert is_mapped(at)
    assert torch.equal(mine, layer.weight)
    del mine
    assert not is_mapped(at)


def test_a_model_is_never_held_twice_while_it_is_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(8))
    alive = {number for number in range(8)}
    for number, one in enumerate(module):
        weakref.finalize(one.weight.untyped_storage(), alive.discard, number)
    seen: list[int] = []
    real = parking._copy

    def watched(source: torch.Tensor, target: torch.Tensor) -> None:
        seen.append(len(alive))
        real(source, target)

    monkeypatch.setattr(parking, "_copy", watched)

    Parked(module, CPU)

    assert seen == [8, 7, 6, 5, 4, 3, 2, 1]
    assert not alive


def test_a_failed_allocation_leaves_the_module_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = nn.Linear(8, 8)
    expected = layer(torch.ones(8))
    parked = Parked(layer, CPU)
    home = layer.weight.data_ptr()

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(parking, "_device_buffer", full)
        with pytest.raises(torch.OutOfMemoryError):
            parked.wake()

    assert not parked.awake
    assert layer.weight.data_ptr() == home
    with pytest.raises(RuntimeError, match="Linear is parked"):
        layer(torch.ones(8))
    parked.wake()
    assert torch.equal(layer(torch.ones(8)), expected)


def test_more_than_the_machine_has_is_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="MiB of host memory"):
        parking._device_buffer(1 << 60, CPU)


def test_a_buffer_of_several_chunks_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHUNK_BYTES % ALIGN_BYTES == HOST_CHUNK_BYTES % ALIGN_BYTES == 0
    monkeypatch.setattr(parking, "HOST_CHUNK_BYTES", ALIGN_BYTES)
    layer = nn.Linear(33, 17)
    expected = [one.clone() for one in layer.parameters()]
    parked = Parked(layer, CPU)

    parked.wake()

    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), expected, strict=True))

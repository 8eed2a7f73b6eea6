"""Memory straight from the system: zeros that cost nothing until they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from worker.engine.chat.attention import PagedKV
from worker.engine.memory import host_zeros

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 1 << 20


def resident_bytes(tensors: list[torch.Tensor]) -> int:
    """Of the mappings that these lie in."""
    found: dict[str, int] = {}
    at = [one.data_ptr() for one in tensors]
    mapping = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            begin, end = (int(one, 16) for one in head.split("-"))
            mapping = head if any(begin <= one < end for one in at) else ""
        elif head == "Rss:" and mapping:
            found[mapping] = int(line.split()[1]) << 10
    assert found
    return sum(found.values())


def test_a_page_comes_when_it_is_written_and_goes_with_the_last_tensor() -> None:
    memory = host_zeros(64 * MIB)
    assert resident_bytes([memory]) < 4 * MIB

    memory[32 * MIB] = 1
    assert 0 < resident_bytes([memory]) < 8 * MIB
    view = memory[: 64 * MIB : 4096].clone()
    assert int(view.sum()) == 1

    place = memory.data_ptr()
    del memory
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(one, 16) for one in line.split()[0].split("-")] for line in lines]
    assert not any(begin <= place < end for begin, end in spans)


def test_no_bytes_are_a_tensor_too() -> None:
    assert host_zeros(0).shape == (0,)


def test_a_pool_on_a_cpu_is_not_filled_when_it_comes_or_grows() -> None:
    """A gigabyte took half a second on the engine thread, beside the answers of other models."""
    shape = {"layers": 2, "heads": 2, "head_size": 64, "dtype": torch.float32}
    blocks = 64 * MIB // PagedKV.block_bytes(**shape)
    pool = PagedKV(**shape, blocks=blocks, device=torch.device("cpu"))
    assert resident_bytes([*pool.keys, *pool.values]) < 20 * MIB

    for one in (*pool.keys, *pool.values):
        one[:, 3] = 7
    pool.resize(2 * blocks, {3: 5})

    assert resident_bytes([*pool.keys, *pool.values]) < 40 * MIB
    for one in (*pool.keys, *pool.values):
        assert (one[:, 5] == 7).all()
        assert int(one.count_nonzero()) == one[:, 5].numel()

"""A KV pool gets another size, also where there is no room to have two of anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from worker.engine.chat import attention
from worker.engine.chat.attention import PagedKV
from worker.engine.chat.cache import BlockPool
from worker.engine.chat.runner import Runner
from worker.engine.chat.scheduler import Scheduler

LAYERS = 3


class Card:
    """Has room for so many bytes of pools; what a tensor that has gone had comes back."""

    def __init__(self, room: int):
        self.room = room
        self.pools: list[PagedKV] = []
        self.refused = 0

    @property
    def taken(self) -> int:
        return sum(one.nbytes for kv in self.pools for one in (*kv.keys, *kv.values))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        new = torch.zeros(list(shape), dtype=dtype, device=device)
        if self.taken + new.nbytes > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("no room")
        return new


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card(1 << 40)
    monkeypatch.setattr(attention, "_zeros", card.zeros)
    return card


@pytest.fixture(params=[False, True], ids=["gathered", "pages"])
def kv(request: pytest.FixtureRequest, card: Card) -> PagedKV:
    """Eight blocks, each filled with numbers of its own in every layer."""
    shape: dict[str, Any] = {"layers": LAYERS, "heads": 2, "head_size": 4, "block_tokens": 4}
    kv = PagedKV(
        **shape, blocks=8, dtype=torch.float32, device=torch.device("cpu"), pages=request.param
    )
    card.pools.append(kv)
    content = torch.randn(kv.read(range(8)).shape, generator=torch.Generator().manual_seed(3))
    kv.write(range(8), content)
    return kv


def test_a_pool_that_cannot_grow_is_as_it_was(kv: PagedKV, card: Card) -> None:
    before, content = card.taken, kv.read(range(8))
    each = before // (2 * LAYERS)
    # Each tensor twice its size, and the old one of the layer until it is replaced: there is room
    # for four of six.
    card.room = before + 4 * each + each

    with pytest.raises(torch.OutOfMemoryError):
        kv.resize(16, {block: block for block in range(8)})

    assert card.refused == 1
    assert (kv.blocks, card.taken) == (8, before)
    assert torch.equal(kv.read(range(8)), content)


def test_a_pool_shrinks_where_nothing_is_free(kv: PagedKV, card: Card) -> None:
    content, before = kv.read([6, 1, 3]), card.taken
    card.room = before  # not a byte more

    kv.resize(4, {6: 0, 1: 3, 3: 1})

    assert card.refused > 0
    assert kv.blocks == 4 and card.taken < before
    assert torch.equal(kv.read([0, 3, 1]), content)


def test_blocks_keep_their_numbers_where_a_pool_grows() -> None:
    pool = BlockPool(4)
    pool.take(1)
    kept = pool.take(2)
    pool.name(kept[0], b"a")
    pool.release(kept)
    pool.release([0])

    moves = pool.resize(6)

    assert moves == {1: 1}
    assert pool.find([b"a"]) == [1]
    pool.check()
    assert sorted(pool.take(6)) == [0, 1, 2, 3, 4, 5]


def test_nothing_is_promised_of_a_pool_that_could_not_grow(kv: PagedKV, card: Card) -> None:
    pool = BlockPool(8)
    scheduler = Scheduler(pool, max_running=2, pass_tokens=16)
    runner = Runner(forward=None, kv=kv)  # type: ignore[arg-type]  # nothing is computed
    card.room = card.taken

    with pytest.raises(torch.OutOfMemoryError):
        runner.resize(scheduler, pool, 9)

    assert (pool.count, pool.available, kv.blocks) == (8, 8, 8)
    pool.check()
    card.room = 1 << 40
    runner.resize(scheduler, pool, 9)
    assert (pool.count, pool.available, kv.blocks) == (9, 9, 9)
    pool.check()

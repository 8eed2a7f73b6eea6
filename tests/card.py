"""In the place of what only a card has: FlashAttention over pages, and CUDA graphs.

Both are stricter than they need be to give results: the first asks for all that the kernel asks
for, the second replays what was done on the memory on which it was done, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from worker.engine.chat.attention import _attend

# --- attention over pages -------------------------------------------------------------------------


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    seqused_k: torch.Tensor, block_table: torch.Tensor, num_splits: int | None,
) -> torch.Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn over pages, by its documentation, and with the demands
    of torch 2.13's kernel (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    assert num_splits == 1, "split over the keys it is wrong, and depends on the batch"
    assert window_size in ((-1, -1), (-1, 0))
    tokens, query_heads, size = query.shape
    _, page, heads, _ = key.shape
    rows = len(seqused_k)
    assert value.shape == key.shape
    assert page % page_multiple() == 0
    assert size % 8 == 0 and size <= 256
    assert query_heads % heads == 0 and enable_gqa == (query_heads != heads)
    assert cu_seq_k is not None, "it wants both or neither"
    for one in (cu_seq_q, cu_seq_k):
        assert one.dtype == torch.int32 and one.shape == (rows + 1,) and one.is_contiguous()
    assert seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
    assert block_table.dtype == torch.int32 and block_table.shape[0] == rows
    for one in (query, key, value, block_table):
        assert one.stride(-1) == 1
    if max_q == 1:
        # It looks at the queries as (rows, 1, …).
        assert tokens == rows and window_size == (-1, -1)
    _register()
    out: torch.Tensor = torch.ops.standin.varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0),
        seqused_k, block_table,
    )  # fmt: skip
    return out


def page_multiple() -> int:
    """Of the tokens of a page; a test may ask for less, to have many pages."""
    return 256


@cache
def _register() -> None:
    torch.library.define(
        "standin::varlen",
        "(Tensor query, Tensor key, Tensor value, Tensor begins, Tensor key_begins, int max_q, "
        "int max_k, float scale, bool causal, Tensor lengths, Tensor tables) -> Tensor",
    )
    torch.library.impl("standin::varlen", "default", _varlen)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begins: torch.Tensor,
    key_begins: torch.Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    lengths: torch.Tensor, tables: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Row by row, in double precision; what no row has is no number."""
    edges, seen = begins.tolist(), lengths.tolist()
    page, heads = key.shape[1], key.shape[2]
    assert edges[0] == 0 and edges[-1] == len(query)
    assert key_begins.tolist() == [sum(seen[:row]) for row in range(len(seen) + 1)]
    out = torch.full_like(query, torch.nan)
    for row, length in enumerate(seen):
        begin, end = edges[row : row + 2]
        count = end - begin
        assert 0 <= count <= max_q and 0 <= length <= max_k
        if not count:
            continue
        used = tables[row, : -(-length // page)].long()
        assert len(used) * page >= length and int(used.min()) >= 0 and int(used.max()) < len(key)
        keys, values = (
            one[used].flatten(0, 1)[:length].double().repeat_interleave(query.shape[1] // heads, 1)
            for one in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), keys) * scale
        if causal:  # aligned at the end: the last query sees all keys
            hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        out[begin:end] = attended.to(out.dtype)
    return out


# --- CUDA graphs ----------------------------------------------------------------------------------


class HostAccess(RuntimeError):
    """What was done cannot be recorded: it reads or brings numbers of the host."""


def needs_host(func: Any, args: Any) -> bool:
    """Whether it reads a number of the device (a card would be waited for), or brings one in."""
    masks = [one for one in tree_leaves(args) if _is(one) and one.dtype == torch.bool]
    return func in {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.lift_fresh.default,
    } or (func is torch.ops.aten.index.Tensor and bool(masks))  # it counts what they choose


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation of its block, on the memory that it was done on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if needs_host(func, args):
            raise HostAccess(f"operation not permitted when stream is capturing: {func}")
        if func is torch.ops.verbatim.attend.default:
            with self:
                return _attend(*args)
        out = func(*args, **(kwargs or {}))
        self.operations.append(tree_map(_same_memory, (func, args, kwargs or {}, out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            given = {_memory(one) for one in tree_leaves((args, kwargs)) if _is(one)}
            results = [one for one in tree_leaves(out) if _is(one)]
            changes = func._schema.is_mutable
            if not changes and all(_memory(one) in given for one in results):
                continue  # a view lies where it lay
            again = func(*args, **kwargs)
            if not changes:
                for one, other in zip(results, tree_leaves(again), strict=True):
                    one.copy_(other)


class Tapes:
    """A Recorder (worker/engine/chat/graphs.py)."""

    def __init__(self, device: torch.device):
        self.replays = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        tape = Tape()
        with tape:
            work()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


def _is(one: Any) -> bool:
    return isinstance(one, torch.Tensor)


def _memory(one: torch.Tensor) -> int:
    # Layers that are packed for a CPU have memory that cannot be looked at.
    return id(one) if one.is_mkldnn else one.untyped_storage()._cdata


def _same_memory(one: Any) -> Any:
    """A weight may get other memory later, and a recorded pass does not."""
    return one.detach() if _is(one) else one

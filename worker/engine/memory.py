"""Host memory straight from the operating system: its pages come when they are written, as zeros,
and go at once with the last tensor on them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from functools import partial

import torch


class Pages(mmap.mmap):
    """Anonymous memory. The tensors on it keep it; with the last one it is unmapped at once."""

    _unpin: Callable[[], object] | None = None

    def pin(self, address: int) -> None:
        """Let a card copy from it by itself. address: its own. Raises RuntimeError."""
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(address, len(self), 0))
        self._unpin = partial(cudart.cudaHostUnregister, address)

    def __del__(self) -> None:
        # Not weakref.finalize: an mmap tells weak references only after it has unmapped itself.
        if self._unpin is not None:
            self._unpin()


def mapped(size_bytes: int) -> Pages:
    """size_bytes: at least 1. Raises torch.OutOfMemoryError."""
    try:
        pages = Pages(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise torch.OutOfMemoryError(f"no {size_bytes >> 20} MiB of host memory: {exc}") from exc
    # Fewer and larger pages are faulted in and pinned several times faster. A kernel without
    # them, or a system without the constant, has the small ones.
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def host_zeros(size_bytes: int) -> torch.Tensor:
    """Zero bytes. Raises torch.OutOfMemoryError."""
    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mapped(size_bytes), dtype=torch.uint8)

"""A module's weights in one host buffer, and in one device buffer while they are needed there.

Waking is a few large copies. Parking copies nothing, because weights do not change: it frees the
device buffer. Both buffers have the exact size; torch's own pinned allocator would round every
tensor up to a power of two.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# The largest alignment that a vectorised kernel or a copy gains from.
ALIGN_BYTES = 64
# Large enough for the full speed of the bus, and small enough (5 to 10 ms) that the small copies
# of a running request get between two of them.
CHUNK_BYTES = 256 << 20
# A smaller copy is one thread's work: on a busy CPU torch's wait for its other threads takes
# milliseconds a copy, 6 s for the 1,680 weights of SDXL's UNet (scripts/bench_parking.py).
SHARED_COPY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter or buffer is: its owner's attribute, and its layout in our buffers.

    By name, not by tensor: `Module.to` may put another one there.
    """

    owner: nn.Module
    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]  # elements
    offset: int  # elements, from the beginning of the buffer


class Parked:
    """The weights of a module: in host memory always, on the device while it is awake.

    Takes every parameter and buffer over, and begins parked. What shares memory goes on sharing
    it, and shapes, strides and dtypes stay; so does the identity of parameters, none of which
    requires a gradient afterwards. The module is not to be moved by `.to(device)` any more. A
    `.to(dtype)` while it is awake lasts until it is parked, as does anything written to weights.

    Nothing has to be called at the end: the buffers are given back with the last tensor on them.
    Built on any thread; then the engine thread only.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        name: str | None = None,
        leaving_out: Sequence[nn.Module] = (),
    ):
        """name: what errors call it; its class by default. leaving_out: modules within it that
        are parked by themselves.

        Weights move to the host buffer one storage at a time, so that loading never holds two
        copies. Raises torch.OutOfMemoryError, and ValueError for a tensor that has no value (meta),
        is not a plain one, or shares memory with one that is left out.
        """
        self.name = name or type(module).__name__
        self.awake = False
        self._device = device
        sharing = _by_storage(module, leaving_out)
        # Of either buffer: all storages, each rounded up to ALIGN_BYTES.
        begins, self.size_bytes = _layout(sharing)
        self._places: list[_Place] = []
        with torch.inference_mode(False):
            self._host = _host_buffer(self.size_bytes, device)
            for tensors, begin in zip(sharing, begins, strict=True):
                self._take(tensors, begin)
        self._computing = list(dict.fromkeys([module, *(one.owner for one in self._places)]))
        self._guards: list[RemovableHandle] = []
        self._guard()

    def wake(self) -> None:
        """Put the weights on the device; returns when they are there.

        Raises torch.OutOfMemoryError, and is parked as before then.
        """
        if self.awake:
            return
        with torch.inference_mode(False):
            buffer = _device_buffer(self.size_bytes, self._device)
            for begin in range(0, self.size_bytes, CHUNK_BYTES):
                chunk = slice(begin, begin + CHUNK_BYTES)
                buffer[chunk].copy_(self._host[chunk], non_blocking=True)
            self._point_to(buffer)  # takes milliseconds, during which a card copies
        # No reference to the buffer is kept: whatever replaces all weights, as an upcast does,
        # frees it as it would free the memory of any module.
        del buffer
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        self.awake = True

    def park(self) -> None:
        """Give the device memory back, to the driver on a card.

        A tensor that someone else holds of the weights keeps all of it.
        """
        if not self.awake:
            return
        with torch.inference_mode(False):
            self._point_to(self._host)
        self._guard()
        self.awake = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes of the card see only the driver's count

    def _take(self, tensors: list[_Weight], begin: int) -> None:
        """Copy the one storage of `tensors` to `begin` (bytes) and let go of it."""
        first = tensors[0].tensor
        source = torch.empty(0, dtype=torch.uint8, device=first.device)
        source.set_(first.untyped_storage())
        _copy(source, self._host[begin : begin + len(source)])
        places = [
            _Place(
                owner=one.owner,
                name=one.name,
                dtype=one.tensor.dtype,
                shape=one.tensor.shape,
                stride=one.tensor.stride(),
                offset=begin // one.tensor.itemsize + int(one.tensor.storage_offset()),
            )
            for one in tensors
        ]
        for place in places:
            _point(place, self._host.view(place.dtype))
            getattr(place.owner, place.name).requires_grad_(False)
        self._places += places

    def _point_to(self, buffer: torch.Tensor) -> None:
        """Make every parameter and buffer a view of `buffer`."""
        views = {dtype: buffer.view(dtype) for dtype in {one.dtype for one in self._places}}
        for place in self._places:
            _point(place, views[place.dtype])

    def _guard(self) -> None:
        """Refuse to compute while parked: on a CPU it would work, on memory nobody accounts for.

        Every module with weights of its own refuses, and so do the ways into a model that are not
        a call of it, such as a VAE's `decode`. Only while parked: hooks slow every call.
        """
        message = f"{self.name} is parked: wake it before it computes"
        guards = self._guards  # not self, which has the module: no cycle, so no wait for gc

        def refuse(*_: object) -> None:
            # A module that a hook before this one has woken still runs the hooks it had.
            if guards:
                raise RuntimeError(message)

        # After the hooks that are there: one of them may wake the module for its own call.
        guards += [one.register_forward_pre_hook(refuse) for one in self._computing]


# --- what is taken over ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter or buffer as it was found."""

    owner: nn.Module
    name: str
    tensor: torch.Tensor


def _by_storage(module: nn.Module, leaving_out: Sequence[nn.Module]) -> list[list[_Weight]]:
    """Parameters and buffers under all of their names; those of one list share a storage."""
    found: dict[int, list[_Weight]] = {}
    others = {one for left in leaving_out for one in left.modules()}
    theirs = {
        tensor.untyped_storage()._cdata
        for left in leaving_out
        for tensor in (*left.parameters(), *left.buffers())
    }
    for path, owner in module.named_modules():
        if owner in others:
            continue
        for name, tensor in chain(
            owner.named_parameters(recurse=False, remove_duplicate=False),
            owner.named_buffers(recurse=False, remove_duplicate=False),
        ):
            full_name = f"{path}.{name}" if path else name
            _require_plain(full_name, tensor)
            key = tensor.untyped_storage()._cdata
            if key in theirs:
                raise ValueError(f"{full_name} shares memory with a module that is left out")
            found.setdefault(key, []).append(_Weight(owner, name, tensor))
    return list(found.values())


def _require_plain(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless its bytes are all there is to it."""
    if tensor.is_meta:
        raise ValueError(f"{name} has no value: it is on the meta device")
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise ValueError(f"{name} is a {type(tensor).__name__} ({tensor.layout}), not a plain one")


def _layout(sharing: list[list[_Weight]]) -> tuple[list[int], int]:
    """Where each storage begins, and the end of the last one; bytes."""
    begins, end = [], 0
    for tensors in sharing:
        begins.append(end)
        end += math.ceil(tensors[0].tensor.untyped_storage().nbytes() / ALIGN_BYTES) * ALIGN_BYTES
    return begins, end


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Bytes to host memory."""
    if source.device.type == "cpu" and len(source) < SHARED_COPY_BYTES:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), len(source))
    else:
        target.copy_(source)


def _point(place: _Place, buffer: torch.Tensor) -> None:
    """buffer: a whole one of ours, as elements of the place's dtype."""
    view = buffer.as_strided(place.shape, place.stride, place.offset)
    getattr(place.owner, place.name).data = view


# --- memory ---------------------------------------------------------------------------------------


def _host_buffer(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of host memory, pinned for a card. Raises torch.OutOfMemoryError."""
    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = _mapped(size_bytes)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        pages.pin(buffer.data_ptr())
    return buffer


def _device_buffer(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of device memory; a CPU's is host memory too, apart from the host buffer.

    Raises torch.OutOfMemoryError.
    """
    if device.type != "cpu" or not size_bytes:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    return torch.frombuffer(_mapped(size_bytes), dtype=torch.uint8)


class _Pages(mmap.mmap):
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


def _mapped(size_bytes: int) -> _Pages:
    """Raises torch.OutOfMemoryError."""
    try:
        pages = _Pages(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise torch.OutOfMemoryError(f"no {size_bytes >> 20} MiB of host memory: {exc}") from exc
    # Fewer and larger pages are faulted in and pinned several times faster. A kernel without
    # them, or a system without the constant, has the small ones.
    with contextlib.suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

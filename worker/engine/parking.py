"""A module's weights in one host buffer, and in one device buffer while they are needed there.

Waking is a few large copies. Parking copies nothing, because weights do not change: it frees the
device buffer. Both buffers have the exact size; torch's own pinned allocator would round every
tensor up to a power of two.

The device buffer may hold some layers' weights in eight bits instead (worker/engine/casting.py).
The host buffer never does: what wakes exactly has the exact bytes, whatever was awake before.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from worker.engine.casting import MOST, STORED, computing
from worker.engine.memory import host_zeros, mapped

# The largest alignment that a vectorised kernel or a copy gains from.
ALIGN_BYTES = 64
# Large enough for the full speed of the bus, and small enough (5 to 10 ms) that the small copies
# of a running request get between two of them.
CHUNK_BYTES = 256 << 20
# Of host memory to other host memory, one thread each. The C library copies so much at a time in
# two thirds of torch's processor time, and its copies need not wait for each other, for which
# torch's take milliseconds each on a busy CPU (scripts/bench_parking.py).
HOST_CHUNK_BYTES = 16 << 20


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
    cast_dtype: torch.dtype  # in the device buffer that is cast
    cast_offset: int  # elements of that type, from the beginning of that buffer


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes of the host buffer that lie together, and where they go in a buffer that is cast."""

    lying: slice
    cast: slice
    dtype: torch.dtype | None  # that they are cast from; None: they go as they are


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
        casting: Collection[nn.Module] = (),
    ):
        """name: what errors call it; its class by default. leaving_out: modules within it that
        are parked by themselves. casting: layers that `wake` can store in eight bits.

        Weights move to the host buffer one storage at a time, so that loading never holds two
        copies. Raises torch.OutOfMemoryError, and ValueError for a tensor that has no value (meta),
        is not a plain one, or shares memory with one that is left out.
        """
        self.name = name or type(module).__name__
        self.awake = False
        self.is_cast = False  # while it is awake
        self.cast_bytes = 0  # of a device buffer that is cast
        self._device = device
        sharing = _by_storage(module, leaving_out)
        # Of either buffer: all storages, each rounded up to ALIGN_BYTES.
        begins, self.size_bytes = _layout(sharing)
        self._places: list[_Place] = []
        self._storages: list[_Storage] = []
        with torch.inference_mode(False):
            self._host = _host_buffer(self.size_bytes, device)
            for tensors, begin in zip(sharing, begins, strict=True):
                self._take(tensors, begin, casting)
        self._computing = list(dict.fromkeys([module, *(one.owner for one in self._places)]))
        self._guards: list[RemovableHandle] = []
        self._casting: list[RemovableHandle] = []
        self._guard()

    @property
    def held_bytes(self) -> int:
        """On the device now."""
        return (self.cast_bytes if self.is_cast else self.size_bytes) if self.awake else 0

    def wake(self, *, cast: bool = False) -> None:
        """Put the weights on the device; returns when they are there.

        cast: those of the layers that may be in eight bits, and they no longer compute exactly;
        takes no more beside its buffer than the largest of them. What is awake stays as it is.

        Raises torch.OutOfMemoryError, and is parked as before then.
        """
        if self.awake:
            assert self.is_cast == cast, f"{self.name} is awake in the other form"
            return
        with torch.inference_mode(False):
            # Pointing takes milliseconds, during which the rest is copied.
            if cast:
                buffer = self._cast()
                self._point_to(buffer, cast=True)
            else:
                buffer = _device_buffer(self.size_bytes, self._device)
                with _copying(self._host, buffer):
                    self._point_to(buffer)
        # No reference to the buffer is kept: whatever replaces all weights, as an upcast does,
        # frees it as it would free the memory of any module.
        del buffer
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        if cast:
            self._compute_cast()
        self.awake, self.is_cast = True, cast

    def park(self) -> None:
        """Give the device memory back, to the driver on a card.

        A tensor that someone else holds of the weights keeps all of it.
        """
        if not self.awake:
            return
        for handle in self._casting:
            handle.remove()
        self._casting.clear()
        with torch.inference_mode(False):
            self._point_to(self._host)
        self._guard()
        self.awake = self.is_cast = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes of the card see only the driver's count

    def _take(self, tensors: list[_Weight], begin: int, casting: Collection[nn.Module]) -> None:
        """Copy the one storage of `tensors` to `begin` (bytes) and let go of it."""
        first = tensors[0].tensor
        source = torch.empty(0, dtype=torch.uint8, device=first.device)
        source.set_(first.untyped_storage())
        _copy(source, self._host[begin : begin + len(source)])
        width, is_cast = first.itemsize, _may_be_cast(tensors, casting)
        size = len(source) // width if is_cast else len(source)
        cast_begin, self.cast_bytes = self.cast_bytes, self.cast_bytes + _aligned(size)
        self._storages.append(
            _Storage(
                slice(begin, begin + len(source)),
                slice(cast_begin, cast_begin + size),
                first.dtype if is_cast else None,
            )
        )
        places = [
            _Place(
                owner=one.owner,
                name=one.name,
                dtype=one.tensor.dtype,
                shape=one.tensor.shape,
                stride=one.tensor.stride(),
                offset=begin // one.tensor.itemsize + int(one.tensor.storage_offset()),
                cast_dtype=STORED if is_cast else one.tensor.dtype,
                cast_offset=cast_begin // (1 if is_cast else one.tensor.itemsize)
                + int(one.tensor.storage_offset()),
            )
            for one in tensors
        ]
        for place in places:
            _point(place, self._host.view(place.dtype), place.offset)
            getattr(place.owner, place.name).requires_grad_(False)
        self._places += places

    def _cast(self) -> torch.Tensor:
        """The same, cast there. One storage at a time, so that there is never more beside the
        buffer than a layer that computes holds of its own type."""
        buffer = _device_buffer(self.cast_bytes, self._device)
        for one in self._storages:
            lying, there = self._host[one.lying], buffer[one.cast]
            if one.dtype is None:
                there.copy_(lying, non_blocking=True)
            else:
                exact = lying.view(one.dtype).to(self._device, non_blocking=True, copy=True)
                there.view(STORED).copy_(exact.clamp_(-MOST, MOST))
        return buffer

    def _compute_cast(self) -> None:
        types: dict[nn.Module, dict[str, torch.dtype]] = {}
        for place in self._places:
            if place.cast_dtype != place.dtype:
                types.setdefault(place.owner, {})[place.name] = place.dtype
        for layer, its in types.items():
            self._casting += computing(layer, its)

    def _point_to(self, buffer: torch.Tensor, *, cast: bool = False) -> None:
        """Make every parameter and buffer a view of `buffer`."""
        types = {one.cast_dtype if cast else one.dtype for one in self._places}
        views = {dtype: buffer.view(dtype) for dtype in types}
        for place in self._places:
            if cast:
                _point(place, views[place.cast_dtype], place.cast_offset)
            else:
                _point(place, views[place.dtype], place.offset)

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
        end += _aligned(tensors[0].tensor.untyped_storage().nbytes())
    return begins, end


def _aligned(size_bytes: int) -> int:
    return math.ceil(size_bytes / ALIGN_BYTES) * ALIGN_BYTES


def _may_be_cast(sharing: list[_Weight], casting: Collection[nn.Module]) -> bool:
    """Whether a storage is these layers' alone, in one type that eight bits are less than."""
    dtype = sharing[0].tensor.dtype
    return (
        dtype.is_floating_point
        and dtype.itemsize > STORED.itemsize
        and all(one.owner in casting and one.tensor.dtype == dtype for one in sharing)
    )


@contextmanager
def _copying(source: torch.Tensor, target: torch.Tensor) -> Iterator[None]:
    """Bytes of host memory to the device, while the block runs; a card may go on after it."""
    if target.device.type == "cuda":
        for begin in range(0, len(source), CHUNK_BYTES):
            chunk = slice(begin, begin + CHUNK_BYTES)
            target[chunk].copy_(source[chunk], non_blocking=True)
        yield
        return
    if len(source) <= HOST_CHUNK_BYTES:
        _copy(source, target)
        yield
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # and the end of it waits for them
        for begin in range(0, len(source), HOST_CHUNK_BYTES):
            chunk = slice(begin, begin + HOST_CHUNK_BYTES)
            pool.submit(_copy, source[chunk], target[chunk])
        yield


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Bytes to host memory."""
    if source.device.type == "cpu":
        ctypes.memmove(target.data_ptr(), source.data_ptr(), len(source))
    else:
        target.copy_(source)


def _point(place: _Place, buffer: torch.Tensor, offset: int) -> None:
    """buffer: a whole one of ours, as elements of the type that the weight has in it."""
    view = buffer.as_strided(place.shape, place.stride, offset)
    getattr(place.owner, place.name).data = view


# --- memory ---------------------------------------------------------------------------------------


def _host_buffer(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of host memory, pinned for a card. Raises torch.OutOfMemoryError."""
    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = mapped(size_bytes)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        pages.pin(buffer.data_ptr())
    return buffer


def _device_buffer(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of device memory; a CPU's is host memory too, apart from the host buffer.

    Raises torch.OutOfMemoryError.
    """
    if device.type == "cpu":
        return host_zeros(size_bytes)
    return torch.empty(size_bytes, dtype=torch.uint8, device=device)

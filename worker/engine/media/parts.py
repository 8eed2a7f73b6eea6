"""Parts of an image or video model, each of which comes to the device and leaves it by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from worker.catalog import ModelSpec
from worker.engine.blocks import blocks_of
from worker.engine.leases import Leases, Question
from worker.engine.parking import Parked
from worker.protocol.messages import Yield
from worker.vram.planner import part_tenants
from worker.vram.ways import PartBytes, tenant_id

log = logging.getLogger(__name__)


class Part:
    """A module's weights: all of them on the device, none, or one block at a time.

    Engine thread only.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device):
        self.name = name
        self.module = module
        self.is_streamed = False
        blocks = blocks_of(module)
        self._blocks = [
            (block, Parked(block, device, name=f"{name}, block {number}"))
            for number, block in enumerate(blocks)
        ]
        self._rest = Parked(module, device, name=name, leaving_out=blocks)

    @property
    def size_bytes(self) -> int:
        return self._rest.size_bytes + sum(one.size_bytes for _, one in self._blocks)

    @property
    def bytes(self) -> PartBytes:
        most = max((one.size_bytes for _, one in self._blocks), default=0)
        return PartBytes(whole=self.size_bytes, streamed=self._rest.size_bytes + most)

    @property
    def is_whole(self) -> bool:
        """All of it is on the device."""
        return self.held_bytes == self.size_bytes

    @property
    def held_bytes(self) -> int:
        """On the device now."""
        every = [self._rest, *(one for _, one in self._blocks)]
        return sum(one.size_bytes for one in every if one.awake)

    def wake(self) -> None:
        """Raises torch.OutOfMemoryError, and is parked then."""
        try:
            self._rest.wake()
            for _, one in self._blocks:
                one.wake()
        except torch.OutOfMemoryError:
            self.park()
            raise

    def park(self) -> None:
        for _, one in self._blocks:
            one.park()
        self._rest.park()

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Within it the module computes with each block on the device for its own time only. The
        arithmetic is the same, and so is every bit."""
        handles = []
        self.is_streamed = True
        try:
            self._rest.wake()
            for block, one in self._blocks:
                handles.append(
                    block.register_forward_pre_hook(lambda *_, one=one: one.wake(), prepend=True)
                )
                handles.append(block.register_forward_hook(lambda *_, one=one: one.park()))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.park()
            self.is_streamed = False


class Parts:
    """The parts of one model, as tenants of the ledger. Engine thread only."""

    def __init__(
        self,
        spec: ModelSpec,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        leases: Leases,
    ):
        """Takes the modules' weights over, into host memory."""
        self.model = spec.id
        self._leases = leases
        self._parts = {
            tenant_id(spec.id, name): Part(name, one, device) for name, one in modules.items()
        }
        leases.declare(spec.id, part_tenants(spec, self.sizes()), self)

    @property
    def all_held_bytes(self) -> int:
        """On the device now."""
        return sum(part.held_bytes for part in self._parts.values())

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts.values())

    def __getitem__(self, name: str) -> Part:
        return self._parts[tenant_id(self.model, name)]

    def give_back(self, order: Yield) -> int:
        """Nothing of it computes: the broker takes no tenant of a lease that is in use."""
        part = self._parts[order.tenant]
        if not part.is_streamed:  # else it has nothing of the tenant's
            part.park()
        return self.held_bytes(order.tenant)

    def held_bytes(self, tenant: str) -> int:
        part = self._parts[tenant]
        return 0 if part.is_streamed else part.held_bytes

    def sizes(self) -> dict[str, PartBytes]:
        """Of every part, by its name in the model."""
        return {part.name: part.bytes for part in self._parts.values()}

    def close(self) -> None:
        """All of it goes from the device, and from the ledger."""
        for part in self._parts.values():
            part.park()
        self._leases.forget(self.model)

    @contextmanager
    def ready(self, lease: Question, names: Sequence[str]) -> Iterator[None]:
        """Bring what the way that was granted needs; stream the others of `names`."""
        with ExitStack() as stack:
            for name in names:
                tenant = tenant_id(self.model, name)
                part = self._parts[tenant]
                if tenant in lease.way.tenants:
                    self._bring(lease, tenant, part)
                else:
                    if part.held_bytes:  # what the ledger has not granted is not there
                        part.park()
                        self._leases.gave(tenant, 0)
                    stack.enter_context(part.streaming())
            if lease.way.name == "tiled":
                vae: Any = self["vae"].module
                vae.enable_tiling()
                stack.callback(vae.disable_tiling)
            yield

    def _bring(self, lease: Question, tenant: str, part: Part) -> None:
        if part.is_whole:
            return
        began = time.monotonic()
        try:
            part.wake()
        except torch.OutOfMemoryError:
            self._leases.brought(lease, tenant, 0, 0.0)
            raise
        self._leases.brought(lease, tenant, part.held_bytes, time.monotonic() - began)

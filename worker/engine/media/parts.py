"""Parts of an image or video model, each of which comes to the device and leaves it by itself.

A denoiser can be there in two forms, of which one at a time: exactly, or with its weights in eight
bits (worker/engine/casting.py). Each form is a tenant of its own, with a size of its own. Both come
from the same exact bytes in host memory, so neither changes what the other will be.
"""

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
from worker.engine.casting import cast_layers
from worker.engine.leases import Leases, Question
from worker.engine.media.splitting import halved
from worker.engine.parking import Parked
from worker.protocol.messages import Yield
from worker.vram.phases import DENOISERS
from worker.vram.planner import part_tenants
from worker.vram.ways import SPLITS, PartBytes, tenant_id

log = logging.getLogger(__name__)


class Part:
    """A module's weights: all of them on the device, none, or one block at a time.

    Engine thread only.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device):
        self.name = name
        self.module = module
        self.is_streamed = False
        self.is_cast = False  # what is there of it is
        blocks = blocks_of(module)
        casting = {*cast_layers(module).values()} if name in DENOISERS else frozenset()
        self._blocks = [
            (block, Parked(block, device, name=f"{name}, block {number}", casting=casting))
            for number, block in enumerate(blocks)
        ]
        self._rest = Parked(module, device, name=name, leaving_out=blocks, casting=casting)
        self._every = [self._rest, *(one for _, one in self._blocks)]
        self._cast_bytes = sum(one.cast_bytes for one in self._every) if casting else 0

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self._every)

    @property
    def bytes(self) -> PartBytes:
        most = max((one.size_bytes for _, one in self._blocks), default=0)
        streamed = self._rest.size_bytes + most
        return PartBytes(whole=self.size_bytes, streamed=streamed, cast=self._cast_bytes)

    @property
    def is_whole(self) -> bool:
        """All of it is on the device, exactly."""
        return self.is_there(cast=False)

    def is_there(self, *, cast: bool) -> bool:
        """All of it is on the device, in this form."""
        return self.is_cast == cast and self.held_bytes == self.bytes_of(cast=cast)

    def bytes_of(self, *, cast: bool) -> int:
        return self._cast_bytes if cast else self.size_bytes

    @property
    def held_bytes(self) -> int:
        """On the device now."""
        return sum(one.held_bytes for one in self._every)

    def wake(self, *, cast: bool = False) -> None:
        """Of a part that is there in the other form nothing may be left before. Raises
        torch.OutOfMemoryError, and is parked then."""
        self.is_cast = cast
        try:
            for one in self._every:
                one.wake(cast=cast)
        except torch.OutOfMemoryError:
            self.park()
            raise

    def park(self) -> None:
        for one in self._every:
            one.park()
        self.is_cast = False

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
        self._parts = {name: Part(name, one, device) for name, one in modules.items()}
        # Whose a tenant is, and whether it is that part with its weights in eight bits.
        self._tenants = {
            tenant_id(spec.id, name, cast=cast): (part, cast)
            for name, part in self._parts.items()
            for cast in (False, True)
        }
        leases.declare(spec.id, part_tenants(spec, self.sizes()), self)

    @property
    def all_held_bytes(self) -> int:
        """On the device now."""
        return sum(part.held_bytes for part in self._parts.values())

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts.values())

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def give_back(self, order: Yield) -> int:
        """Nothing of it computes: the broker takes no tenant of a lease that is in use."""
        part, cast = self._tenants[order.tenant]
        if not part.is_streamed and part.is_cast == cast:  # else it has nothing of the tenant's
            part.park()
        return self.held_bytes(order.tenant)

    def held_bytes(self, tenant: str) -> int:
        part, cast = self._tenants[tenant]
        return 0 if part.is_streamed or part.is_cast != cast else part.held_bytes

    def sizes(self) -> dict[str, PartBytes]:
        """Of every part, by its name in the model."""
        return {name: part.bytes for name, part in self._parts.items()}

    def close(self) -> None:
        """All of it goes from the device, and from the ledger."""
        for part in self._parts.values():
            part.park()
        self._leases.forget(self.model)

    @contextmanager
    def ready(self, lease: Question, names: Sequence[str]) -> Iterator[None]:
        """Bring what the way that was granted needs; stream the others of `names`, of which the
        first is a denoiser where the way is one of a denoiser."""
        with ExitStack() as stack:
            for name in names:
                granted = [
                    tenant_id(self.model, name, cast=cast)
                    for cast in (False, True)
                    if tenant_id(self.model, name, cast=cast) in lease.way.tenants
                ]
                if granted:
                    self._bring(lease, granted[0])
                else:
                    self._put_away(self._parts[name])
                    stack.enter_context(self._parts[name].streaming())
            if lease.way.name == "tiled":
                vae: Any = self["vae"].module
                vae.enable_tiling()
                stack.callback(vae.disable_tiling)
            if lease.way.name in SPLITS:
                stack.enter_context(halved(self._parts[names[0]].module))
            yield

    def _put_away(self, part: Part) -> None:
        """What the ledger has not granted is not there."""
        if part.held_bytes:
            cast = part.is_cast
            part.park()
            self._leases.gave(tenant_id(self.model, part.name, cast=cast), 0)

    def _bring(self, lease: Question, tenant: str) -> None:
        part, cast = self._tenants[tenant]
        if part.is_there(cast=cast):
            return
        self._put_away(part)  # in the other form
        began = time.monotonic()
        try:
            part.wake(cast=cast)
        except torch.OutOfMemoryError:
            self._leases.brought(lease, tenant, 0, 0.0)
            raise
        self._leases.brought(lease, tenant, part.held_bytes, time.monotonic() - began)

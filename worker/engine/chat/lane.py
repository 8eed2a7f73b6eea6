"""A model's place on the device: its lease, how far its weights and its KV pool are there, and the
question for a larger pool."""

from __future__ import annotations

from collections.abc import Callable

from worker.catalog import ModelSpec
from worker.engine.leases import Leases, Owner, Question
from worker.errors import OutOfDeviceMemory
from worker.protocol.messages import Way
from worker.vram.planner import KV, WEIGHTS, ChatBytes
from worker.vram.ways import tenant_id


class Lane:
    """Owner of one model's standing lease. Engine thread only.

    It is away, asked for, granted, or here; `leaving` when it is to go once nothing runs. While it
    is here and its pool is shrunk, more room may be asked for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sizes: Callable[[], ChatBytes],
        leases: Leases,
        owner: Owner,
        *,
        host_copy: bool,
    ):
        """sizes: found when the model is wanted for the first time, because it may need its files.
        host_copy: whether its weights are parked in host memory when they leave the device."""
        self.spec = spec
        self.here = False
        self.here_since = float("-inf")
        self.loading_since: float | None = None
        self._find_sizes = sizes
        self._leases = leases
        self._owner = owner
        self._host_copy = host_copy
        self._question: Question | None = None
        self._room: Question | None = None
        self._room_for = ("", 0)  # the request, and bytes of the pool
        self._sizes: ChatBytes | None = None
        self._told: set[str] = set()  # requests that wait for the question

    @property
    def weights(self) -> str:
        return tenant_id(self.spec.id, WEIGHTS)

    @property
    def kv(self) -> str:
        return tenant_id(self.spec.id, KV)

    @property
    def is_declared(self) -> bool:
        """Its sizes are known, to the broker as well."""
        return self._sizes is not None

    @property
    def sizes(self) -> ChatBytes:
        assert self._sizes is not None, "it has not been asked for"
        return self._sizes

    @property
    def leaving(self) -> bool:
        """It was asked to go, and has put that off until nothing runs."""
        asked = (self._leases.is_wanted(tenant) for tenant in (self.weights, self.kv))
        return any(order is not None for order in asked)

    @property
    def granted(self) -> bool:
        """Its bytes are granted, and it is still to be brought."""
        return self._question is not None and self._question.granted is not None and not self.here

    @property
    def wanted(self) -> bool:
        """Asked for or granted, and not here."""
        return self._question is not None and not self.here

    def want(self, request_id: str, pool_bytes: int = 0) -> None:
        """Ask for the device, once. Raises OutOfDeviceMemory when that was refused, and what
        finding its sizes raises.

        pool_bytes: that the request is known to need of the pool; 0: the least will do.
        """
        if self._question is None:
            self._declare()
            self._told = {request_id}
            self._question = self._ask(request_id, "chat", pool_bytes, standing=True)
        else:
            self.also(request_id)
        if self._question.refused is not None:
            error, self._question = self._question.refused.error, None
            raise OutOfDeviceMemory(f"{self.spec.id}: {error}")

    def also(self, request_id: str) -> None:
        """One more request waits for it."""
        if self._question is not None and request_id not in self._told:
            self._told.add(request_id)
            self._leases.also(self._question, request_id)

    def pool_bytes(self) -> int:
        """Of the pool that was granted, without the reserve for passes."""
        assert self._question is not None and self._question.granted is not None
        return self._question.granted.held_bytes[self.kv] - self.sizes.pass_peak

    def arrived(self, pool_bytes: int, *, now: float, weights_s: float, pool_s: float) -> None:
        """It is on the device. weights_s, pool_s: that bringing took; 0 where it was there."""
        assert self._question is not None
        self.here, self.here_since = True, now
        self._leases.brought(self._question, self.weights, self.sizes.weights, weights_s)
        held = pool_bytes + self.sizes.pass_peak
        self._leases.brought(self._question, self.kv, held, pool_s)
        self.use(busy=False)  # until a request begins

    def failed(self) -> None:
        """What was granted could not be brought."""
        assert self._question is not None
        for tenant in (self.weights, self.kv):
            self._leases.brought(self._question, tenant, 0, 0.0)
        self._leases.release(self._question, done=False)
        self._question = None

    def want_room(self, request_id: str, pool_bytes: int) -> int | None:
        """Ask for a pool of so many bytes at the least, once, while it is here; a question for
        another request or number is taken back. Returns the bytes of the pool that was granted, to
        be answered with `has_room`; None while it is waited for.

        Raises OutOfDeviceMemory when it was refused.
        """
        if self._room_for != (request_id, pool_bytes):
            self.give_up_room()
        if self._room is None:
            self._room = self._ask(request_id, "pool", pool_bytes)
            self._room_for = (request_id, pool_bytes)
        if self._room.refused is not None:
            error, self._room = self._room.refused.error, None
            raise OutOfDeviceMemory(f"{self.spec.id}: {error}")
        granted = self._room.granted
        return None if granted is None else granted.held_bytes[self.kv] - self.sizes.pass_peak

    def has_room(self, pool_bytes: int) -> None:
        """The pool was resized to what was granted, or, with 0 bytes, could not be."""
        assert self._room is not None
        held = pool_bytes + self.sizes.pass_peak if pool_bytes else 0
        self._leases.brought(self._room, self.kv, held, 0.0)
        self._leases.release(self._room, done=bool(pool_bytes))
        self._room = None

    def give_up_room(self) -> None:
        """No request is too long for the pool any more."""
        if self._room is not None:
            self._leases.withdraw(self._room)
            self._room = None

    def use(self, *, busy: bool, keep_alive_s: float | None = None) -> None:
        assert self._question is not None
        self._leases.use(self._question, busy=busy, keep_alive_s=keep_alive_s)

    def left(self) -> None:
        """The lease has ended, because one of its tenants is gone."""
        if self.here:
            self.give_up_room()
            self.here = False
            self._question = None

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        if self._question is not None and not self.here:
            self._leases.withdraw(self._question)
            self._question = None

    def _ask(
        self, request_id: str, phase: str, pool_bytes: int, *, standing: bool = False
    ) -> Question:
        least = {self.kv: pool_bytes + self.sizes.pass_peak} if pool_bytes else {}
        way = Way(name="whole", tenants=(self.weights, self.kv), peak_bytes=0)
        return self._leases.ask(
            request_id, phase, [way],
            priority=self.spec.priority, least_bytes=least, standing=standing,
        )  # fmt: skip

    def _declare(self) -> None:
        if self._sizes is not None:
            return
        sizes = self._find_sizes()
        tenants = sizes.tenants(self.spec, host_copy=self._host_copy)
        self._leases.declare(self.spec.id, tenants, self._owner)
        self._sizes = sizes

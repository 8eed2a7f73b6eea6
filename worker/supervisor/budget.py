"""How much device memory there is to grant."""

from __future__ import annotations

from dataclasses import dataclass

from worker.config import Settings
from worker.errors import ConfigError
from worker.vram.probe import Card, host_memory

# Of CUDA in each process, before the first tensor. Assumed, not measured on this machine; published
# figures lie between 0.3 and 0.5 GiB.
CONTEXT_BYTES = 410 << 20
ENGINES = ("engine chat", "engine media")


@dataclass(frozen=True, slots=True)
class Budget:
    """Device memory to plan with."""

    name: str
    total_bytes: int
    process_bytes: int  # that each engine takes before the first tensor

    @property
    def contexts_bytes(self) -> int:
        return len(ENGINES) * self.process_bytes

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.contexts_bytes


def budget_of(settings: Settings, card: Card | None, memory_bytes: int | None) -> Budget:
    """What to plan with: the memory named, else the profile's, else the card, else the container's.

    Raises ConfigError for a profile that wants a card, on a machine without one.
    """
    wants = settings.daemon.device
    own = settings.daemon.device_memory
    on_card = wants == "cuda" or (wants == "auto" and card is not None)
    if memory_bytes is not None:
        return Budget("a device", memory_bytes, 0 if wants == "cpu" else CONTEXT_BYTES)
    if on_card and card is None:
        raise ConfigError(
            'the profile has device "cuda" and this machine no NVIDIA card; '
            "python orchestrator.py plan --memory 24GiB plans for one of that size"
        )
    if on_card and card is not None:
        return Budget(card.name, min(own or card.total_bytes, card.total_bytes), CONTEXT_BYTES)
    return Budget("the CPU", own or host_memory().total_bytes, 0)

"""What the driver or the operating system says about memory. Reads only; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Card:
    """An NVIDIA card."""

    name: str
    total_bytes: int


def first_card() -> Card | None:
    """The first NVIDIA card of this machine, or None when there is none (or no driver)."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        total_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return None
    return Card(name, total_bytes)


def device_memory(device: str) -> DeviceMemory:
    """Memory of "cuda" (of every process on the card) or "cpu" (of this container)."""
    if device.startswith("cuda"):
        pynvml.nvmlInit()
        info = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
        return DeviceMemory(int(info.total), int(info.free))
    return host_memory()


def host_memory() -> DeviceMemory:
    """Host memory, bounded by the container's limit where there is one."""
    host = psutil.virtual_memory()
    limit, used = _cgroup_limit()
    if limit is None or limit >= host.total:
        return DeviceMemory(host.total, host.available)
    return DeviceMemory(limit, max(0, min(limit - used, host.available)))


def _cgroup_limit() -> tuple[int | None, int]:
    """(limit or None, used) in bytes, of cgroup v2 or v1. psutil sees the host only."""
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (_CGROUP / limit_file).read_text().strip()
            used = int((_CGROUP / used_file).read_text())
        except (OSError, ValueError):  # not this version, or not in a container
            continue
        return (None if limit == "max" else int(limit)), used
    return None, 0

"""The ladder: in which ways a phase may run, and what each of them takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from worker.protocol.messages import Way

# Bytes a second from pinned host memory to the device: what PCIe 4 x16 gives in practice.
HOST_BANDWIDTH = 20e9
# A tiled decode computes the borders of its tiles twice.
TILED_LONGER_S = 0.5
EXACTNESS = ("bit", "close", "lossy")  # in falling order


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Of a part on the device."""

    whole: int
    streamed: int  # with one of its blocks there at a time; `whole` where it has no blocks

    @property
    def can_stream(self) -> bool:
        return self.streamed < self.whole


def tenant_id(model: str, part: str) -> str:
    return f"{model}.{part}"


def ways(
    model: str,
    parts: Mapping[str, PartBytes],
    peak_bytes: int,
    *,
    passes: int,
    tiled_bytes: int | None = None,
) -> tuple[Way, ...]:
    """The rungs for one phase, cheapest first.

    parts: that compute in it. passes: how often each of them computes. tiled_bytes: the peak with
    a tiled VAE; None where that is not allowed.
    """

    def tenants(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(tenant_id(model, name) for name in names)

    rungs = [Way(name="whole", tenants=tenants([*parts]), peak_bytes=peak_bytes)]
    if tiled_bytes is not None and tiled_bytes < peak_bytes:
        rungs.append(
            Way(
                name="tiled", tenants=tenants([*parts]), peak_bytes=tiled_bytes,
                longer_s=TILED_LONGER_S, exactness="close",
            )
        )  # fmt: skip
    streamed = {name: size for name, size in parts.items() if size.can_stream}
    if streamed:
        moved = passes * sum(size.whole for size in streamed.values())
        rungs.append(
            Way(
                name="streamed",
                tenants=tenants([name for name in parts if name not in streamed]),
                peak_bytes=peak_bytes + sum(size.streamed for size in streamed.values()),
                longer_s=moved / HOST_BANDWIDTH,
            )
        )
    return tuple(rungs)

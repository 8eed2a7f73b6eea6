"""The ladder: in which ways a phase may run, and what each of them takes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from worker.protocol.messages import Way

EXACTNESS = ("bit", "close", "lossy")  # in falling order
# Seconds that somebody who allows a class would rather wait than have it.
RELUCTANCE_S = {"bit": 0.0, "close": 0.0, "lossy": 2.0}
# Bytes a second from pinned host memory to the device: what PCIe 4 x16 gives in practice.
HOST_BANDWIDTH = 20e9
# A tiled decode computes the borders of its tiles twice.
TILED_LONGER_S = 0.5
# Two passes of half a batch instead of one: a card has twice as many kernels to begin. An estimate,
# measured on no card.
SPLIT_LONGER_S = 0.02
# Bytes a second of weights that are cast back to their own type, layer by layer, before they
# compute: twenty milliseconds and more for a UNet of SDXL. An estimate likewise.
CAST_BANDWIDTH = 200e9
SPLITS = ("split", "streamed+split")  # ways whose denoiser computes its batch in two halves


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Of a part on the device."""

    whole: int
    streamed: int  # with one of its blocks there at a time; `whole` where it has no blocks
    cast: int = 0  # a denoiser with its weights in eight bits; 0: no part for that

    @property
    def can_stream(self) -> bool:
        return self.streamed < self.whole


def tenant_id(model: str, part: str, *, cast: bool = False) -> str:
    """cast: of a denoiser whose weights lie in eight bits. It is a tenant of its own, so that
    nobody is granted one and finds the other."""
    return f"{model}.{part}.float8" if cast else f"{model}.{part}"


def strictest(exactness: Iterable[str]) -> str:
    """The least that will do for all of them."""
    return min(exactness, key=EXACTNESS.index)


def least_exact(exactness: Iterable[str]) -> str:
    """What can be said of all of them together; of nothing, `bit`."""
    return max(exactness, key=EXACTNESS.index, default=EXACTNESS[0])


def ways(
    model: str,
    parts: Mapping[str, PartBytes],
    peaks: Mapping[str, int],
    *,
    passes: int,
) -> tuple[Way, ...]:
    """The rungs for one phase. Each takes no more bytes than the one before, so that whoever runs
    out of memory in one can try the next.

    parts: that compute in it. peaks: bytes beside them, `whole` and in the forms that are allowed
    (worker/vram/phases.py). passes: how often each part computes.
    """
    whole, split, split_s = peaks["whole"], peaks.get("split"), passes * SPLIT_LONGER_S

    def tenants(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(tenant_id(model, name) for name in names)

    rungs = [Way(name="whole", tenants=tenants(parts), peak_bytes=whole)]
    if peaks.get("tiled", whole) < whole:
        rungs.append(
            Way(
                name="tiled", tenants=tenants(parts), peak_bytes=peaks["tiled"],
                longer_s=TILED_LONGER_S, exactness="close",
            )
        )  # fmt: skip
    if split is not None and split < whole:
        rungs.append(
            Way(
                name="split", tenants=tenants(parts), peak_bytes=split,
                longer_s=split_s, exactness="close",
            )
        )  # fmt: skip
    cast = {name: size for name, size in parts.items() if size.cast}
    saved = sum(size.whole - size.cast for size in cast.values())
    if "quantised" in peaks and peaks["quantised"] - saved < whole:
        cast_bytes = passes * sum(size.whole for size in cast.values())
        rungs.append(
            Way(
                name="quantised",
                tenants=tuple(tenant_id(model, name, cast=name in cast) for name in parts),
                peak_bytes=peaks["quantised"],
                longer_s=cast_bytes / CAST_BANDWIDTH,
                exactness="lossy",
            )
        )
    streamed = {name: size for name, size in parts.items() if size.can_stream}
    if streamed:
        rest = tenants(name for name in parts if name not in streamed)
        beside = sum(size.streamed for size in streamed.values())
        moved_s = passes * sum(size.whole for size in streamed.values()) / HOST_BANDWIDTH
        rungs.append(
            Way(name="streamed", tenants=rest, peak_bytes=whole + beside, longer_s=moved_s)
        )
        if split is not None and split < whole:
            rungs.append(
                Way(
                    name="streamed+split", tenants=rest, peak_bytes=split + beside,
                    longer_s=2 * moved_s + split_s, exactness="close",
                )
            )  # fmt: skip

    sizes = {tenant_id(model, name): size.whole for name, size in parts.items()}
    sizes |= {tenant_id(model, name, cast=True): size.cast for name, size in cast.items()}
    return tuple(
        sorted(
            rungs, key=lambda one: -one.peak_bytes - sum(sizes[tenant] for tenant in one.tenants)
        )
    )

"""What is asked about a forward pass, and the answer: to and from `worker.engine.peaks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One forward pass to measure. Sizes that do not concern the part are 0."""

    part: str  # a key of worker.engine.peaks's tables
    config: dict[str, Any]  # the part's config.json
    dtype: str
    width: int = 0  # pixels
    height: int = 0
    frames: int = 0
    tokens: int = 0
    batch: int = 1
    tiled: bool = False
    split: bool = False  # the batch goes through in two halves, one after the other
    cast: bool = False  # a denoiser whose weights lie in eight bits (worker/engine/casting.py)
    rank: int = 0  # of LoRAs that are added to every layer; 0: none are
    picture_tokens: int = 0  # that an IP-Adapter lets a denoiser read; 0: it has none


@dataclass(frozen=True, slots=True)
class Peak:
    """The answer, in bytes."""

    weight_bytes: int  # parameters and buffers
    parked_bytes: int  # the same in one buffer of ours (worker/engine/parking.py)
    streamed_bytes: int  # of those, with one block there at a time; all where it has none
    peak_bytes: int  # everything else that is alive at the worst moment, inputs included
    cast_bytes: int = 0  # of a denoiser's parked ones, if they were cast; 0: it is none

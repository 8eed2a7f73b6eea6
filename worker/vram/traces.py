"""Cards, and days of requests on them, for the simulator. Pure, seeded.

A trace is requests with the times at which they arrive; a request is phases, each with the tenants
that it needs, the most memory that it takes beside them, and its seconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from worker.vram.policy import Ahead

GIB = 2**30
STEP_BYTES = 2 * 2**20  # the allocator's
# Two contexts and whoever else is on the card; it varies by NOISE, and plans leave out the most.
OTHERS_BYTES = int(0.8 * GIB)
NOISE = 0.2
FRAGMENTATION = 0.03  # of a phase's peak, at most
STREAM_BYTES = GIB  # groups of a streamed encoder on the device


def gib(number: float) -> int:
    """GiB in bytes, as the allocator rounds it."""
    return -(-int(number * GIB) // STEP_BYTES) * STEP_BYTES


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    usable_bytes: int
    link_bytes_s: float  # host memory to device, pinned
    speed: float  # of computing; 1 is the 24 GB card
    stream_s: float  # that an encoder takes longer when it is streamed by groups
    kv_bytes: int

    @property
    def budget_bytes(self) -> int:
        return self.usable_bytes - int(OTHERS_BYTES * (1 + NOISE))


CARDS = (
    Card("24 GB", gib(22.5), 25e9, 1.0, 2.0, gib(1)),
    Card("48 GB", gib(46), 25e9, 1.5, 2.0, gib(4)),
    Card("80 GB", gib(78), 54e9, 3.0, 1.0, gib(16)),
)
KV_FLOOR_BYTES = gib(0.5)
NVME_BYTES_S = 3e9
VOLUME_BYTES_S = 0.5e9

# GiB in bf16. Counted from the published architectures, peaks by one pass without weights.
PARTS = {
    "chat.weights": 14.19,
    "sdxl.encoders": 1.52,
    "sdxl.unet": 4.78,
    "sdxl.vae": 0.16,
    "wan.umt5": 10.58,
    "wan.dit": 2.64,
    "wan.vae": 0.24,
}
MORE_PARTS = {  # a second checkpoint of SDXL; VACE, which shares WAN's encoder and VAE
    "sdxl2.encoders": 1.52,
    "sdxl2.unet": 4.78,
    "sdxl2.vae": 0.16,
    "vace.dit": 4.04,
}


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    tenants: tuple[str, ...]
    peak_bytes: int
    seconds: float  # on a card of speed 1
    streamed: bool = False  # its tenants may be streamed instead of being resident


@dataclass(frozen=True, slots=True)
class Request:
    id: int
    arrived: float
    engine: str  # chat | media
    priority: int
    phases: tuple[Phase, ...]
    models: frozenset[str]
    ahead: tuple[Ahead, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    kind: str
    seed: int
    requests: tuple[Request, ...]
    more_parts: bool  # whether MORE_PARTS exist
    disk_bytes_s: float
    host_bytes: int  # for parking


KINDS = ("chat and images", "chat and video", "all three", "five models")


def make_trace(seed: int, *, requests: int = 30, at_once: bool = False) -> Trace:
    """A quarter of an hour or so: bursts of chats, batches of images, videos.

    The kind is KINDS in turn; disk and host memory are drawn. at_once: all arrive at 0.
    """
    chance = random.Random(f"trace {seed}")
    kind = KINDS[seed % len(KINDS)]
    shares = {
        "chat and images": (("chat", 6), ("images", 4)),
        "chat and video": (("chat", 6), ("video", 4)),
    }.get(kind, (("chat", 5), ("images", 3), ("video", 2)))
    made: list[Request] = []
    now = 0.0
    while len(made) < requests:
        (what,) = chance.choices([name for name, _ in shares], [share for _, share in shares])
        other = kind == "five models" and chance.random() < 0.4
        most = requests - len(made)
        if what == "chat":
            batch = [_chat(chance) for _ in range(min(most, chance.randint(2, 8)))]
        elif what == "images":
            model = "sdxl2" if other else "sdxl"
            large = chance.random() < 0.8
            batch = [_image(chance, model, large)] * min(most, chance.randint(1, 6))
        else:
            batch = [_video(chance, "vace" if other else "wan") for _ in range(min(most, 1))]
        for phases in batch:
            made.append(_request(len(made), now, what, phases))
            now += 0.0 if at_once or what != "chat" else chance.expovariate(1 / 4)
        now += 0.0 if at_once else chance.expovariate(1 / 40)
    return Trace(
        kind, seed, tuple(made), kind == "five models",
        chance.choice((NVME_BYTES_S, VOLUME_BYTES_S)), gib(chance.choice((24, 32, 64))),
    )  # fmt: skip


def _request(number: int, now: float, what: str, phases: tuple[Phase, ...]) -> Request:
    names = {name for phase in phases for name in phase.tenants if not phase.streamed}
    names.discard("wan.vae")
    chat = what == "chat"
    return Request(
        number, now, "chat" if chat else "media", 1 if chat else 0, phases,
        frozenset(name.partition(".")[0] for name in names),
        tuple(Ahead(one.tenants, with_slack(one.peak_bytes), one.streamed) for one in phases),
    )  # fmt: skip


def with_slack(peak_bytes: int) -> int:
    """What is planned for a peak, fragments included."""
    return gib(peak_bytes * (1 + FRAGMENTATION) / GIB)


def _chat(chance: random.Random) -> tuple[Phase, ...]:
    peak = gib(chance.choice((0.19, 0.76)))
    return (Phase("chat", ("chat.weights", "chat.kv"), peak, chance.uniform(1, 6)),)


def _image(chance: random.Random, model: str, large: bool) -> tuple[Phase, ...]:
    peak, decode = (0.308, 1.50) if large else (0.078, 0.38)
    return (
        Phase("encode", (f"{model}.encoders",), gib(0.05), 0.1),
        Phase("denoise", (f"{model}.unet",), gib(peak), chance.uniform(5, 9) * (peak / 0.308)),
        Phase("decode", (f"{model}.vae",), gib(decode), 0.4),
    )


def _video(chance: random.Random, model: str) -> tuple[Phase, ...]:
    """Three in ten repeat a prompt whose embedding is kept, and encode nothing."""
    long = chance.random() < 0.5
    phases = (
        Phase("encode", ("wan.umt5",), gib(0.12), 0.3, streamed=True),
        Phase("denoise", (f"{model}.dit",), gib(1.51 if long else 0.65), 150 if long else 55),
        Phase("decode", ("wan.vae",), gib(3.84), 12 if long else 5),
    )
    return phases[1:] if chance.random() < 0.3 else phases

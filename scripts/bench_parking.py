"""Parking (worker/engine/parking.py) on real bytes: is waking worth it, does parking free what it
says, and does anything drift when it happens hundreds of times?

    python scripts/bench_parking.py --json benchmarks/parking-cpu.json
    python scripts/bench_parking.py --device cuda --size 4900 --json benchmarks/parking-cuda.json
    python scripts/bench_parking.py --size 100 --rounds 5 --cycles 60       a quick look

Seconds mean little on a CPU that others use too; seconds of processor time are given beside them.

The first two questions are asked of SDXL's UNet with all of its 1,680 tensors and narrower ones
(--size; 4900 is the real one), random weights in float16, made once under --work; the third of the
demo model's UNet. Measured, in alternating order where two are compared:
    wake      parked weights back on the device, against `from_pretrained` of the same folder to the
              device while the system has the file in memory. On a CPU that only maps the file, so
              the weights are then copied into memory of their own, as `.to` does on a card; the
              ratio without that copy is given too, and is less the larger the model is. What an
              engine does instead of that copy, taking the weights over to host memory and waking
              them, is given as well. Neither turn waits for the host of a virtual machine: what
              it reads (the file, the parked weights) and as much memory as it writes has just been
              touched
    park      what the process holds less (resident memory on a CPU; torch's and the driver's count
              on a card), of the bytes of the weights
    cycles    load, take over, wake, park and unload: storages that are alive against a ledger kept
              by this script at each of these points; resident memory from cycle 50 to the last
    link      waking against a plain copy between two buffers that are there already (pinned, on a
              card)

Prints a table and the goals, met or missed; --json writes all numbers. Exit codes: 0 measured,
whether goals are met or not; 2 usage.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from demo_models.quiet import quiet_libraries

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worker.config import REPOSITORY
from worker.engine.device import open_device
from worker.engine.parking import Parked, _copy, _device_buffer
from worker.engine.peaks import held

SMALL = REPOSITORY / "models" / "demo-image" / "unet"
WIDTH_STEP, LARGEST_WIDTH = 32, 320  # channels of the first level; groups of 32 are normalised
SETTLED = 50  # cycles after which resident memory may not grow any more
WINDOW = 10  # cycles whose median stands for one of them
PAGE_BYTES = 4096
STEPS = ("load", "bring", "take_over", "wake", "park")
GOAL, WORST = 5.0, 0.9
DRIVER_LAG_S = 2.0  # for which the driver may count memory that was given back
HOST_LAG_S = 3.0  # within which a virtual machine gives free memory back to its host


def main() -> int:
    args = _arguments()
    console = Console()
    quiet_libraries()
    device = open_device(args.device, args.threads)
    folder = _make_unet(args.work, args.size << 20, console)
    rounds = _rounds(folder, device, args.rounds, console)
    cycles = _cycles(device, args.cycles, console)
    limit = _copy_bytes_s(rounds["weight_bytes"], device)
    wake_bytes_s = rounds["weight_bytes"] / rounds["wake_s"]
    record: dict[str, Any] = {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "cycles": cycles,
        "link": {"copy_bytes_s": limit, "wake_bytes_s": wake_bytes_s},
    }
    record["goals"] = _goals(record, device)
    console.print(_table(record))
    console.print(_goal_table(record["goals"]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


# --- the model ------------------------------------------------------------------------------------


def _make_unet(work: Path, size_bytes: int, console: Console) -> Path:
    """A folder with SDXL's UNet, the width whose weights come nearest to `size_bytes`."""
    widths = range(WIDTH_STEP, LARGEST_WIDTH + 1, WIDTH_STEP)
    sizes: dict[int, int] = {}
    for width in widths:
        with torch.device("meta"):
            sizes[width] = 2 * sum(one.numel() for one in _unet(width).parameters())
        if sizes[width] > size_bytes:
            break
    width = min(sizes, key=lambda one: abs(sizes[one] - size_bytes))
    folder = work / f"parking-unet-{width}"
    if not (folder / "config.json").is_file():
        console.print(f"making {sizes[width] >> 20} MiB of weights in {folder}")
        torch.manual_seed(0)
        _unet(width).half().save_pretrained(folder, max_shard_size="100GB")
    return folder


def _unet(width: int) -> Any:
    """https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/unet/config.json
    where the width is 320."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(width // 64 or 1, width // 32, width // 16),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def _load(folder: Path, dtype: torch.dtype) -> Any:
    return UNet2DConditionModel.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
    )


def _bring(module: nn.Module, device: torch.device) -> None:
    """What was loaded to the device; a CPU's memory is other memory than the mapped file."""
    if device.type == "cuda":
        module.to(device)
        torch.cuda.synchronize()
        return
    target, end = _device_buffer(held(module), device), 0
    for one in module.parameters():
        source = one.detach().view(-1).view(torch.uint8)
        _copy(source, target[end : end + len(source)])
        end += len(source)


def _read(folder: Path) -> None:
    """Have the weights' file in the system's memory."""
    buffer = bytearray(16 << 20)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


# --- wake and park --------------------------------------------------------------------------------


def _rounds(folder: Path, device: torch.device, rounds: int, console: Console) -> dict[str, Any]:
    """Seconds and bytes by their medians, and all seconds."""
    module = _load(folder, torch.float16)
    weight_bytes = held(module)
    parked = Parked(module, device)
    parked.wake()  # the first copy on a card sets things up
    parked.park()
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    of_processor: dict[str, list[float]] = {name: [] for name in STEPS}
    freed: list[int] = []
    driver_freed: list[int] = []
    for index in track(range(rounds), "wake and load", console=console, transient=True):
        took: dict[str, _Took] = {}
        for turn in ("load", "wake") if index % 2 else ("wake", "load"):
            gc.collect()
            time.sleep(HOST_LAG_S)
            _read(folder)
            _touch(parked)
            _have_memory(weight_bytes, device)
            if turn == "load":
                with _timed() as took["load"]:
                    fresh = _load(folder, torch.float16)
                _have_memory(weight_bytes, device)
                with _timed() as took["bring"]:
                    _bring(fresh, device)
                _have_memory(weight_bytes, device)
                if device.type == "cpu":  # on a card it would be pinned, of what has been moved
                    with _timed() as took["take_over"]:
                        Parked(fresh, device)
                del fresh
            else:
                with _timed() as took["wake"]:
                    parked.wake()
                before, driver_before = _held_bytes(device), _driver_free(device)
                with _timed() as took["park"]:
                    parked.park()
                freed.append(before - _held_bytes(device))
                driver_freed.append(_driver_freed(device, driver_before, weight_bytes))
        for name, one in took.items():
            seconds[name].append(one.seconds)
            of_processor[name].append(one.of_processor)
    found: dict[str, Any] = {
        f"{name}_s": statistics.median(values) for name, values in seconds.items() if values
    }
    found |= {
        f"{name}_processor_s": statistics.median(values)
        for name, values in of_processor.items()
        if values
    }
    found |= {
        "weight_bytes": weight_bytes,
        "size_bytes": parked.size_bytes,
        "tensors": sum(1 for _ in (*module.parameters(), *module.buffers())),
        "ratios": [
            (load + bring) / wake
            for load, bring, wake in zip(
                seconds["load"], seconds["bring"], seconds["wake"], strict=True
            )
        ],
        "freed_bytes": statistics.median(freed),
        "least_freed_bytes": min(freed),
        "all_s": seconds,
        "all_processor_s": of_processor,
    }
    if device.type == "cuda":
        found["driver_freed_bytes"] = statistics.median(driver_freed)
    return found


def _have_memory(size_bytes: int, device: torch.device) -> None:
    """Touch as much memory as a turn needs, and free it.

    Free memory of a virtual machine may be with its host, and comes back ten to a hundred times
    slower than it is filled. Neither turn is to wait for that.
    """
    if device.type == "cpu":
        _device_buffer(size_bytes, device).fill_(1)


def _touch(parked: Parked) -> None:
    """Read a byte of each page of the weights in host memory.

    As `_read` does of the file. The host of a virtual machine may have let go of the pages' places
    while another turn ran; taking them up again was up to four fifths of a wake.
    """
    parked._host[::PAGE_BYTES].sum()


@dataclass(slots=True)
class _Took:
    """Seconds of a block, and of processor time of all threads, once it has ended."""

    seconds: float = 0.0
    of_processor: float = 0.0


@contextmanager
def _timed() -> Iterator[_Took]:
    took = _Took()
    began, of_processor = time.perf_counter(), time.process_time()
    yield took
    took.seconds = time.perf_counter() - began
    took.of_processor = time.process_time() - of_processor


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _held_bytes(device: torch.device) -> int:
    """Bytes that this process holds: torch's count on a card, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _driver_free(device: torch.device) -> int:
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0


def _driver_freed(device: torch.device, before: int, wanted: int) -> int:
    """What the driver's count of free bytes has grown by, once it shows `wanted`."""
    deadline = time.monotonic() + DRIVER_LAG_S
    while (gained := _driver_free(device) - before) < wanted and device.type == "cuda":
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return gained


def _copy_bytes_s(size_bytes: int, device: torch.device) -> float:
    """Bytes a second of the best of ten copies of at most 1 GiB, host to device."""
    size_bytes = min(size_bytes, 1 << 30)
    pinned = device.type == "cuda"
    source = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=pinned)
    target = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(10):
        _synchronise(device)
        with _timed() as copy:
            target.copy_(source, non_blocking=True)
            _synchronise(device)
        best = min(best, copy.seconds)
    return size_bytes / best


# --- cycles ---------------------------------------------------------------------------------------


class _Audit:
    """A ledger, and the storages that are really alive."""

    def __init__(self, device: torch.device):
        self.ledger: dict[str, int] = {}  # bytes, by buffer
        self.worst_off = self.worst_off_on_card = 0  # bytes
        self._device = device
        self._alive: dict[int, int] = {}
        self._other_bytes = _held_bytes(device)

    def check(self, module: nn.Module | None) -> None:
        """Compare. module: whose storages are counted from now on until they are gone."""
        for one in (*module.parameters(), *module.buffers()) if module else ():
            storage = one.untyped_storage()
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata)
        off = sum(self._alive.values()) - sum(self.ledger.values())
        self.worst_off = max(self.worst_off, abs(off))
        if self._device.type == "cuda":
            off = _held_bytes(self._device) - self._other_bytes - self.ledger.get("device", 0)
            self.worst_off_on_card = max(self.worst_off_on_card, abs(off))


def _cycles(device: torch.device, cycles: int, console: Console) -> dict[str, Any]:
    """How far the ledger and resident memory were off, as shares."""
    audit = _Audit(device)
    resident: list[int] = []
    for _ in track(range(cycles), "cycles", console=console, transient=True):
        module = _load(SMALL, torch.float32)
        parked = Parked(module, device)
        size = parked.size_bytes
        audit.ledger["host"] = size
        audit.check(module)
        parked.wake()
        audit.ledger["device"] = size
        audit.check(module)
        parked.park()
        del audit.ledger["device"]
        audit.check(module)
        del parked, module
        del audit.ledger["host"]
        audit.check(None)
        resident.append(int(psutil.Process().memory_info().rss))
    settled = statistics.median(resident[SETTLED - WINDOW : SETTLED])
    last = statistics.median(resident[-WINDOW:])
    return {
        "cycles": cycles,
        "size_bytes": size,
        "ledger_off_share": audit.worst_off / size,
        "card_off_share": audit.worst_off_on_card / size,
        "resident_bytes_settled": settled,
        "resident_bytes_last": last,
        "growth_share": last / settled - 1,
        "resident_bytes": resident,
    }


# --- what is shown --------------------------------------------------------------------------------


def _goals(record: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    rounds, cycles, link = record["rounds"], record["cycles"], record["link"]
    mapped = rounds["load_s"] / rounds["wake_s"]
    ratio, worst = statistics.median(rounds["ratios"]), min(rounds["ratios"])
    freed = rounds["freed_bytes"] / rounds["weight_bytes"]
    goals = [
        (
            f"waking {GOAL:g} x as fast as loading again, and {WORST:.0%} of it in every round",
            f"{ratio:.1f} x, at worst {worst:.1f} x; {mapped:.1f} x without the copy",
            ratio >= GOAL and worst >= WORST * GOAL,
        ),
        ("95 % of the weights' bytes freed", f"{100 * freed:.1f} %", freed >= 0.95),
        (
            f"ledger within 1 % of live storages, {cycles['cycles']} cycles",
            f"{100 * cycles['ledger_off_share']:.3f} % at worst",
            cycles["ledger_off_share"] <= 0.01,
        ),
        (
            f"resident memory within 1 % after cycle {SETTLED}",
            f"{100 * cycles['growth_share']:+.2f} %",
            abs(cycles["growth_share"]) <= 0.01,
        ),
    ]
    if device.type == "cuda":
        driver = rounds["driver_freed_bytes"] / rounds["weight_bytes"]
        share = link["wake_bytes_s"] / link["copy_bytes_s"]
        on_card = cycles["card_off_share"]
        goals += [
            ("95 % freed by the driver's count", f"{100 * driver:.1f} %", driver >= 0.95),
            ("ledger within 1 % of torch's count", f"{100 * on_card:.3f} %", on_card <= 0.01),
            ("85 % of the bandwidth of a pinned copy", f"{100 * share:.0f} %", share >= 0.85),
        ]
    return [{"goal": goal, "measured": measured, "met": met} for goal, measured, met in goals]


def _table(record: dict[str, Any]) -> Table:
    rounds, link = record["rounds"], record["link"]
    count = len(rounds["all_s"]["wake"])
    mib = rounds["weight_bytes"] / (1 << 20)
    table = Table(
        title=f"{mib:.0f} MiB, {rounds['tensors']} tensors, {record['device']}, {count} rounds",
        box=box.SIMPLE,
    )
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("least", justify="right")
    table.add_column("of processor", justify="right")
    table.add_column("GB/s", justify="right")
    for name, key in (
        ("load again: from_pretrained", "load_s"),
        ("  and copy to the device", "bring_s"),
        ("  or take it over, and then wake it", "take_over_s"),
        ("wake", "wake_s"),
        ("park", "park_s"),
    ):
        if key not in rounds:
            continue
        speed = f"{rounds['weight_bytes'] / rounds[key] / 1e9:.1f}" if key == "wake_s" else ""
        step = key.removesuffix("_s")
        numbers = rounds[key], min(rounds["all_s"][step]), rounds[f"{step}_processor_s"]
        table.add_row(name, *(f"{1000 * one:.1f}" for one in numbers), speed)
    table.add_row("a plain copy", "", "", "", f"{link['copy_bytes_s'] / 1e9:.1f}")
    return table


def _goal_table(goals: Sequence[dict[str, Any]]) -> Table:
    table = Table("goal", "measured", "", box=box.SIMPLE)
    for one in goals:
        table.add_row(one["goal"], one["measured"], "met" if one["met"] else "missed")
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0: torch's own choice")
    parser.add_argument("--size", type=int, default=400, help="MiB of weights (default: 400)")
    parser.add_argument("--rounds", type=int, default=10, help="at least 5 (default: 10)")
    parser.add_argument("--cycles", type=int, default=500, help="at least 60 (default: 500)")
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "state" / "bench", help="where the model is made"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.size < 1 or args.threads < 0 or args.rounds < 5 or args.cycles < SETTLED + WINDOW:
        parser.error("--size must be at least 1, --threads 0, --rounds 5 and --cycles 60")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no usable NVIDIA card")
    return args


if __name__ == "__main__":
    raise SystemExit(main())

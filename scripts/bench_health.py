"""How fast /health and /worker/info answer while the engines are idle, loaded, or loading.

    python scripts/bench_health.py [--seconds 10] [--json benchmarks/health.json]

Uses a running daemon (start one with ./scripts/serve). Each scene keeps its load going while one
prober asks both routes of both ports in turn, on fresh connections, as existing clients do.
Prints a table of milliseconds and writes JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

CHAT = {
    "messages": [{"role": "user", "content": "a red circle on a table"}],
    "max_tokens": 400,
    "temperature": 1.5,
}
JOB = {"type": "sdxl_image_fast", "prompt": "a red circle", "num_images": 6, "steps": 40}


def main() -> int:
    args = _arguments()
    bases = (args.chat, args.media)
    scenes: list[tuple[str, Callable[[str, str], Any]]] = [
        ("idle", idle),
        ("16 chat clients", chatting),
        ("a picture job", rendering),
        ("both", both),
        ("chat model loading", loading),
    ]
    rows = []
    console = Console()
    for name, load in track(scenes, description="scenes", console=console):
        with load(*bases):
            times = probe(bases, args.seconds)
        for what, seconds in times.items():
            rows.append({"scene": name, "route": what, **summary(seconds)})
    show(rows, console)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"cpus": os.cpu_count(), "machine": platform.machine(), "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


@contextmanager
def idle(chat: str, media: str) -> Iterator[None]:
    yield


@contextmanager
def chatting(chat: str, media: str) -> Iterator[None]:
    with repeated(16, lambda: httpx.post(f"{chat}/chat", json=CHAT, timeout=90)):
        yield


@contextmanager
def rendering(chat: str, media: str) -> Iterator[None]:
    def job() -> None:
        httpx.post(f"{media}/generate", json=JOB, headers={"Prefer": "wait=80"}, timeout=90)

    with repeated(1, job):
        yield


@contextmanager
def both(chat: str, media: str) -> Iterator[None]:
    with chatting(chat, media), rendering(chat, media):
        yield


@contextmanager
def loading(chat: str, media: str) -> Iterator[None]:
    def reload() -> None:
        httpx.post(f"{chat}/memory/unload?which=instruct", timeout=90)
        httpx.post(f"{chat}/memory/load?which=instruct", timeout=90)

    with repeated(1, reload):
        yield


@contextmanager
def repeated(count: int, call: Callable[[], object]) -> Iterator[None]:
    """`count` threads that repeat `call` until the block ends, in a process of their own so that
    they do not share Python's lock with the prober."""
    stop = multiprocessing.Event()

    def run() -> None:
        while not stop.is_set():
            call()

    def load() -> None:
        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    process = multiprocessing.get_context("fork").Process(target=load)
    process.start()
    try:
        time.sleep(1.0)  # the load is under way before the first measurement
        yield
    finally:
        stop.set()
        process.join()


def probe(bases: tuple[str, str], seconds: float) -> dict[str, list[float]]:
    """Seconds of every answer per port and route."""
    times: dict[str, list[float]] = {}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for base in bases:
            for route in ("/health", "/worker/info"):
                began = time.perf_counter()
                status = get(base, route)
                took = time.perf_counter() - began
                if status != 200:
                    raise SystemExit(f"{base}{route} answered {status}; is the daemon ready?")
                times.setdefault(f"{base.rsplit(':', 1)[1]} {route}", []).append(took)
        time.sleep(0.01)
    return times


def get(base: str, route: str) -> int:
    """The status of one answer, read whole, on a connection of its own."""
    # Not httpx, whose one-off calls spend some 20 ms on setting up TLS that is not used here.
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", route)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 99th percentile, worst; and the number of answers."""
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "answers": len(seconds),
        "p50_ms": round(cuts[49] * 1e3, 2),
        "p99_ms": round(cuts[98] * 1e3, 2),
        "max_ms": round(max(seconds) * 1e3, 2),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Answers of the open routes, client included")
    for column in ("scene", "route", "answers", "p50_ms", "p99_ms", "max_ms"):
        table.add_column(column, justify="left" if column in ("scene", "route") else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chat", default="http://127.0.0.1:7861", help="base URL of the chat port")
    parser.add_argument("--media", default="http://127.0.0.1:7860", help="of the other port")
    parser.add_argument("--seconds", type=float, default=10.0, help="per scene")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Chat latency over HTTP: streams, time to first token, and what a refused request is told.

    python scripts/bench_chat_latency.py
    python scripts/bench_chat_latency.py --size 120 --json out.json

Makes a model of random weights (--work), starts this worker on it and measures, in turns where two
things are compared:
    stream      tokens per second of one stream against transformers' generate in this process
    streaming   tokens per second of 16 clients with streams against 16 that wait for the whole
    first       time to the first token of a 1,000-token prompt: nothing of it cached, against all
                but its end cached
    added       what HTTP, the front and the link add to the engine's own time to the first token
    refusal     retry_after_s of a refused request against when a place was free

/health under load is measured by scripts/bench_health.py. The worker is measured once it is
compiled, which needs g++ and python3-dev.

Prints a table and writes JSON. Exit codes: 0 measured; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench_chat import processor
from chat_bench.library import Library
from chat_bench.models import REPOSITORY, SHAPES, make_model
from chat_bench.servers import Verbatim
from chat_bench.workloads import WORDS, Ask, shared

CLIENTS = 16
PLACES = 128  # of the bench profile: 64 running, 64 waiting


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer as its client saw it."""

    total_s: float
    tokens: int
    engine_first_s: float  # the engine's own time to the first token, with its queue


def stream(server: Verbatim, ask: Ask) -> Answered:
    """The whole answer, as a stream."""
    return _answer(server, {**server.body(ask), "stream": True})


def one_token(server: Verbatim, ask: Ask) -> Answered:
    """An answer of one token: its time is that of the first token. (A stream of random weights
    shows its first text late, because many of its tokens are parts of characters.)"""
    return _answer(server, {**server.body(ask), "max_tokens": 1})


def _answer(server: Verbatim, body: dict[str, Any]) -> Answered:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        started = time.perf_counter()
        connection.request("POST", "/chat", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"/chat answered {response.status}: {response.read()[:300]!r}")
        last = b""
        for line in response:
            if line.startswith((b"data: {", b"{")):
                last = line.removeprefix(b"data: ")
        total_s = time.perf_counter() - started
    finally:
        connection.close()
    answer = json.loads(last)
    timings = answer["timings"]
    return Answered(total_s, answer["tokens_generated"], timings["queue_s"] + timings["prefill_s"])


def one_stream(server: Verbatim, library: Library, rounds: int) -> dict[str, Any]:
    """Tokens per second, in turns."""
    ours, theirs = [], []
    for ask in shared(random.Random(1), rounds + 1):
        got = stream(server, ask)
        ours.append(got.tokens / got.total_s)
        started = time.perf_counter()
        theirs.append(library.run([ask]) / (time.perf_counter() - started))
    return _compared("one stream", "tok/s", ours[1:], "generate", theirs[1:])


def streaming(server: Verbatim, rounds: int) -> dict[str, Any]:
    """Tokens per second of 16 clients, in turns."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        asks = shared(random.Random(100 + number), 2 * CLIENTS)
        for streams in (True, False) if number % 2 else (False, True):
            started = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                if streams:
                    tokens = sum(one.tokens for one in pool.map(lambda a: stream(server, a), asks))
                else:
                    tokens = sum(pool.map(server.answer, asks))
            speeds[streams].append(tokens / (time.perf_counter() - started))
    return _compared(
        f"{CLIENTS} clients, streaming", "tok/s", speeds[True][1:], "whole answers",
        speeds[False][1:],
    )  # fmt: skip


def first_token(server: Verbatim, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first token with a cold and a warm prefix of about 1,000 tokens."""
    cold, warm = [], []
    for number in range(rounds + 1):
        chance = random.Random(200 + number)
        system = " ".join(chance.choices(WORDS, k=700))
        for times in (cold, warm):
            user = " ".join(chance.choices(WORDS, k=12))
            times.append(1e3 * one_token(server, Ask(system, user, 1)).total_s)
    return _compared("first token, cold prefix", "ms", cold[1:], "warm prefix", warm[1:])


def added(server: Verbatim) -> list[dict[str, Any]]:
    """Milliseconds of the first token that are not the engine's, by the number of clients."""
    rows = []
    for clients in (1, CLIENTS):
        asks = shared(random.Random(300 + clients), 8 * clients)
        with ThreadPoolExecutor(clients) as pool:
            got = list(pool.map(lambda ask: one_token(server, ask), asks))
        rows.append(
            _spread(
                f"added to the first token, {clients} clients", "ms",
                [1e3 * (one.total_s - one.engine_first_s) for one in got],
            )
        )  # fmt: skip
    return rows


def refusals(server: Verbatim, rounds: int) -> dict[str, Any]:
    """What a refused request was told, as a share of what happened."""
    shares = []
    for number in range(rounds):
        chance = random.Random(500 + number)
        asks = [
            Ask("s", " ".join(chance.choices(WORDS, k=8)), chance.randint(300, 600))
            for _ in range(PLACES)
        ]
        with ThreadPoolExecutor(PLACES) as pool:
            running = [pool.submit(server.answer, ask) for ask in asks]
            time.sleep(3)  # until the first ones run
            told, happened = _refused(server)
            shares.append(told / happened)
            for one in running:
                one.result()
    return _spread("told / happened, a refused request", "", shares)


def _refused(server: Verbatim) -> tuple[float, float]:
    """Seconds that the refusal named, and seconds until a request was taken."""
    started = time.perf_counter()
    told = 0.0
    while True:
        sent = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        body = json.dumps({**server.body(Ask("s", "one more", 1)), "stream": True})
        connection.request("POST", "/chat", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read() if response.status == 429 else b""
        connection.close()
        if response.status != 429:  # taken when it was sent; it answers when its turn comes
            return told, sent - started
        told = told or float(json.loads(answer)["retry_after_s"])
        time.sleep(0.02)


def _compared(
    name: str, unit: str, ours: Sequence[float], other: str, theirs: Sequence[float]
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "what": name,
        "unit": unit,
        "median": round(statistics.median(ours), 2),
        "against": other,
        "its_median": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }


def _spread(name: str, unit: str, values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "what": name,
        "unit": unit,
        "count": len(ordered),
        "median": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "lowest": round(ordered[0], 2),
        "highest": round(ordered[-1], 2),
    }


def _rows(args: argparse.Namespace, server: Verbatim, library: Library) -> Iterator[dict[str, Any]]:
    yield one_stream(server, library, args.rounds)
    yield streaming(server, args.rounds)
    yield first_token(server, args.rounds)
    yield from added(server)
    yield refusals(server, args.rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, choices=SHAPES, default=25, help="million parameters")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "state" / "bench")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    console = Console()
    folder = args.work / f"qwen2-{args.size}m-{args.dtype}"
    make_model(folder, args.size, args.dtype)
    server = Verbatim(folder, args.dtype, args.work)
    try:
        with console.status("starting the worker"):
            server.wait_until_ready()
        library = Library(folder, args.dtype)
        rows = []
        for row in _rows(args, server, library):
            rows.append(row)
            console.print(f"{row['what']}: {row['median']:g} {row['unit']}", highlight=False)
    finally:
        server.stop()
    table = Table("what", "median", "against", "ratio, or p99")
    for row in rows:
        if "against" in row:
            ratio = f"{row['ratio']:.2f}x ({row['lowest']:.2f} to {row['highest']:.2f})"
            against = f"{row['against']} {row['its_median']:g}"
        else:
            ratio = f"p99 {row['p99']:g} ({row['lowest']:g} to {row['highest']:g})"
            against = f"{row['count']} measured"
        table.add_row(row["what"], f"{row['median']:g} {row['unit']}", against, ratio)
    console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "processor": processor(), "size": args.size, "dtype": args.dtype,
            "rounds": args.rounds, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

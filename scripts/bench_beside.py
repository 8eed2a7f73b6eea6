"""Chat with a resident model while another model loads beside it: does anybody notice?

    python scripts/bench_beside.py
    python scripts/bench_beside.py --rounds 6 --size 500 --json beside.json

Starts a daemon of its own, on free ports, with the demo chat model and a larger one of random
weights (--work), and asks the first one, one request after the other, in two scenes by turns: with
nothing else, and while the larger model is loaded and unloaded over and over through
/memory/load and /memory/unload. Both models are in the same engine process.

Prints a table of seconds per answer (median and 95th percentile over all rounds, and the ratio),
how often the larger model was loaded and how long that took, and every answer that was not 200;
writes JSON. On two cores loading takes one of them from the answers, so the ratio has that in it;
--threads 1 leaves a core to it. Exit codes: 0 measured; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from chat_bench.models import REPOSITORY, SHAPES, make_model
from chat_bench.servers import free_port

PROFILE = """
[server]
chat_port = {chat_port}
media_port = {media_port}

[chat]
models = ["demo-chat", "large"]
preload = ["demo-chat"]
default_model = "demo-chat"

[media]
models = ["demo-image"]
preload = []

[daemon]
device = "cpu"
threads = {threads}

[[models]]
id = "demo-chat"
kind = "chat"
path = "demo-chat"
shipped = true
dtype = "float32"

[[models]]
id = "demo-image"
kind = "sdxl"
path = "demo-image"
shipped = true
dtype = "float32"

[[models]]
id = "large"
kind = "chat"
path = "{folder}"
dtype = "float32"
"""
SCENES = ("alone", "beside a load")
ASK = {
    "messages": [{"role": "user", "content": "a red circle and a blue square on a table"}],
    "max_tokens": 48,
    "temperature": 0,
    "model": "demo-chat",
}


def main() -> int:
    args = _arguments()
    console = Console()
    folder = (args.work / f"qwen2-{args.size}m-float32").resolve()
    parameters = make_model(folder, args.size, "float32")
    console.print(f"{folder.name}: {parameters / 1e6:.0f} M parameters")
    ports = free_port(), free_port()
    profile = args.work / "beside.toml"
    profile.write_text(
        PROFILE.format(chat_port=ports[0], media_port=ports[1], folder=folder, threads=args.threads)
    )
    daemon = _started(profile, args.work, ports[0])
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        seen = _measured(url, args.rounds, args.requests)
    finally:
        daemon.terminate()
        daemon.wait(30)
    _print(seen, console)
    if args.json is not None:
        report = {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "command": " ".join(["python", "scripts/bench_beside.py", *sys.argv[1:]]),
            "parameters_loaded": parameters,
            **seen,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, choices=[*SHAPES], default=120, help="of what loads")
    parser.add_argument("--rounds", type=int, default=4, help="of both scenes (default: 4)")
    parser.add_argument("--requests", type=int, default=60, help="in each (default: 60)")
    parser.add_argument("--threads", type=int, default=0, help="of the engine (default: torch's)")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "state" / "bench")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def _started(profile: Path, work: Path, port: int) -> subprocess.Popen[bytes]:
    state = work / "beside-state"
    daemon = subprocess.Popen(
        [sys.executable, "orchestrator.py", "--profile", str(profile)],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "VERBATIM_STATE_DIR": str(state)},
    )  # fmt: skip
    ends = time.monotonic() + 300
    while time.monotonic() < ends and daemon.poll() is None:
        time.sleep(0.5)
        try:
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=2).text
        except httpx.HTTPError:
            continue
        # The compiler uses a core for a minute; what is measured comes after it.
        if 'verbatim_engine_now{what="models_compiled"} 1.0' in metrics:
            return daemon
    daemon.terminate()
    raise SystemExit(f"the daemon did not come up; its logs are in {state / 'logs'}")


def _measured(url: str, rounds: int, requests: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {scene: [] for scene in SCENES}
    statuses: Counter[str] = Counter()
    loads: list[float] = []
    with httpx.Client(base_url=url, timeout=90) as client:
        client.post("/chat", json=ASK)
        order = [scene for n in range(rounds) for scene in SCENES[:: 1 if n % 2 else -1]]
        for scene in track(order, "rounds"):
            stop = threading.Event()
            loading = threading.Thread(target=_load_over_and_over, args=(url, stop, loads))
            if scene == SCENES[1]:
                loading.start()
            for _ in range(requests):
                began = time.perf_counter()
                status = client.post("/chat", json=ASK).status_code
                seconds[scene].append(time.perf_counter() - began)
                statuses[f"{scene}: {status}"] += 1
            stop.set()
            if scene == SCENES[1]:
                loading.join()
    return {"seconds": seconds, "statuses": dict(statuses), "load_s": loads}


def _load_over_and_over(url: str, stop: threading.Event, loads: list[float]) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        while not stop.is_set():
            began = time.perf_counter()
            client.post("/memory/load?which=large").raise_for_status()
            loads.append(time.perf_counter() - began)
            client.post("/memory/unload?which=large").raise_for_status()


def _print(seen: dict[str, Any], console: Console) -> None:
    table = Table(title="one answer of the resident model, ms")
    for name in ("scene", "median", "95 %", "answers"):
        table.add_column(name, justify="left" if name == "scene" else "right")
    found = {}
    for scene in SCENES:
        times = sorted(seen["seconds"][scene])
        found[scene] = statistics.median(times), times[int(0.95 * (len(times) - 1))]
        table.add_row(scene, *(f"{1e3 * one:.1f}" for one in found[scene]), str(len(times)))
    ratios = [two / one for one, two in zip(*(found[scene] for scene in SCENES), strict=True)]
    table.add_row("ratio", *(f"{one:.2f}" for one in ratios), "")
    console.print(table)
    loads = seen["load_s"]
    if loads:
        console.print(f"loaded {len(loads)} times, {statistics.median(loads):.2f} s each (median)")
    console.print(f"answers: {', '.join(f'{k} {v} times' for k, v in seen['statuses'].items())}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""Chat with a resident model while another model loads beside it: does anybody notice?

    python scripts/bench_beside.py --json benchmarks/chat-beside-load.json      as root
    python scripts/bench_beside.py --rounds 6 --size 500 --rate 200MiB
    python scripts/bench_beside.py --scenes memory                              without root

Starts a daemon of its own, on free ports, with the demo chat model and a larger one of random
weights (--work), and asks the first one, one request after the other. Both models are in the same
engine process. Turns of two kinds, one beside the other (A B B A), for each scene:
    volume    the larger model is loaded once, from a disk that gives --rate bytes a second to the
              engine (a limit of the kernel's: scripts/chat_bench/slow_volume.py), with nothing
              of its file in memory; asked until it is there
    memory    the larger model is loaded and unloaded over and over with its file in the system's
              memory, as quickly as it goes; --requests answers
    alone     nothing else; --requests answers

Prints milliseconds per answer (median, 95th percentile and most of all answers; the least and the
most 95th percentile of a turn) and their ratios to the turns alone of the same scene, how often the
larger model was loaded and how long that took, how many answers were not 200, and the goal: a 95th
percentile of 1.10 times that alone while a model comes from a slow volume, and no 5xx. Writes JSON.

The first load, for which files are hashed and shapes measured once, is not counted. Exit codes: 0
measured, whether the goal is met or not; 2 usage, or no limit can be set; 130 interrupted.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from chat_bench.models import REPOSITORY, SHAPES, make_model
from chat_bench.servers import free_port
from chat_bench.slow_volume import NoLimit, forget, slow_volume

sys.path.insert(0, str(REPOSITORY))

from worker.config import parse_size

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
SCENES = ("volume", "memory")
GOAL = 1.10
ASK = {
    "messages": [{"role": "user", "content": "a red circle and a blue square on a table"}],
    "max_tokens": 48,
    "temperature": 0,
    "model": "demo-chat",
}


@dataclass(slots=True)
class Seen:
    """What was measured of one scene."""

    alone: list[list[float]] = field(default_factory=list)  # seconds of each answer of each turn
    beside: list[list[float]] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)


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
    load_before = os.getloadavg()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=120) as client:
            bench = _Bench(client, folder, daemon.pid, args.requests, args.rate)
            found = {scene: bench.scene(scene, args.rounds) for scene in args.scenes}
    except NoLimit as exc:
        console.print(f"{exc}\n--scenes memory needs none")
        return 2
    finally:
        daemon.terminate()
        daemon.wait(60)
    summary = {scene: _summary(seen) for scene, seen in found.items()}
    _print(summary, console)
    if args.json is not None:
        report = {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "load_average": {"before": load_before, "after": os.getloadavg()},
            "command": " ".join(["python", "scripts/bench_beside.py", *sys.argv[1:]]),
            "parameters_loaded": parameters,
            "rate_bytes_s": args.rate,
            "summary": summary,
            "scenes": {scene: asdict(seen) for scene, seen in found.items()},
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--size", type=int, choices=[*SHAPES], default=120, help="of what loads")
    parser.add_argument(
        "--rate", type=parse_size, default="60MiB", help="a second, of the slow volume"
    )
    parser.add_argument("--rounds", type=int, default=6, help="of both turns (default: 6)")
    parser.add_argument("--requests", type=int, default=60, help="in a turn (default: 60)")
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


class _Bench:
    """Questions to a daemon, and loads beside them."""

    def __init__(self, client: httpx.Client, folder: Path, daemon: int, requests: int, rate: int):
        """daemon: its process; rate: bytes a second of the slow volume."""
        self._client = client
        self._weights = sorted(folder.glob("*.safetensors"))
        self._engine = next(
            one.pid
            for one in psutil.Process(daemon).children(recursive=True)
            if "engine chat" in " ".join(one.cmdline())
        )
        self._requests = requests
        self._rate = rate
        self._load()
        self._unload()
        self._client.post("/chat", json=ASK)

    def scene(self, name: str, rounds: int) -> Seen:
        """Both turns, this often. Raises NoLimit."""
        seen = Seen()
        beside = self._beside_a_volume if name == "volume" else self._beside_memory
        for number in track(range(rounds), name):
            for turn in ("alone", "beside") if number % 2 else ("beside", "alone"):
                if turn == "alone":
                    seen.alone.append([self._asked(seen) for _ in range(self._requests)])
                else:
                    seen.beside.append(beside(seen))
        return seen

    def _beside_a_volume(self, seen: Seen) -> list[float]:
        for file in self._weights:
            forget(file)
        loading = threading.Thread(target=lambda: seen.load_s.append(self._load()))
        answers = []
        with slow_volume(self._weights[0], self._engine, self._rate):
            loading.start()
            while loading.is_alive():
                answers.append(self._asked(seen))
            loading.join()
        self._unload()
        return answers

    def _beside_memory(self, seen: Seen) -> list[float]:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                seen.load_s.append(self._load())
                self._unload()

        loading = threading.Thread(target=work)
        loading.start()
        answers = [self._asked(seen) for _ in range(self._requests)]
        stop.set()
        loading.join()
        return answers

    def _asked(self, seen: Seen) -> float:
        began = time.perf_counter()
        status = self._client.post("/chat", json=ASK).status_code
        took = time.perf_counter() - began
        seen.statuses[status] = seen.statuses.get(status, 0) + 1
        return took

    def _load(self) -> float:
        began = time.perf_counter()
        self._client.post("/memory/load?which=large").raise_for_status()
        return time.perf_counter() - began

    def _unload(self) -> None:
        self._client.post("/memory/unload?which=large").raise_for_status()


def _summary(seen: Seen) -> dict[str, Any]:
    """Seconds of the answers of both turns, and the ratios."""
    turns = {"alone": seen.alone, "beside": seen.beside}
    found: dict[str, Any] = {}
    for name, each in turns.items():
        times = [one for turn in each for one in turn]
        found[name] = {
            "median": statistics.median(times),
            "p95": _p95(times),
            "most": max(times),
            "p95_of_turns": [_p95(turn) for turn in each],
            "answers": len(times),
        }
    alone, beside = found["alone"], found["beside"]
    return {
        **found,
        "ratio": {one: beside[one] / alone[one] for one in ("median", "p95", "most")},
        "p95_ratio_of_rounds": [
            two / one
            for one, two in zip(alone["p95_of_turns"], beside["p95_of_turns"], strict=True)
        ],
        "loads": len(seen.load_s),
        "load_s": statistics.median(seen.load_s),
        "not_200": sum(count for status, count in seen.statuses.items() if status != 200),
        "5xx": sum(count for status, count in seen.statuses.items() if status >= 500),
    }


def _p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * (len(times) - 1))]


def _print(summary: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="one answer of the resident model, ms")
    for name in ("scene", "turn", "median", "95 %", "95 % of the turns", "most", "answers"):
        table.add_column(name, justify="left" if name in ("scene", "turn") else "right")
    for scene, found in summary.items():
        for turn in ("alone", "beside"):
            one = found[turn]
            least, most = (1e3 * pick(one["p95_of_turns"]) for pick in (min, max))
            table.add_row(
                scene, turn, *(f"{1e3 * one[name]:.1f}" for name in ("median", "p95")),
                f"{least:.1f} to {most:.1f}", f"{1e3 * one['most']:.1f}", str(one["answers"]),
            )  # fmt: skip
        rounds = found["p95_ratio_of_rounds"]
        table.add_row(
            scene, "ratio", *(f"{found['ratio'][name]:.2f}" for name in ("median", "p95")),
            f"{min(rounds):.2f} to {max(rounds):.2f}", f"{found['ratio']['most']:.2f}", "",
        )  # fmt: skip
    console.print(table)
    for scene, found in summary.items():
        console.print(
            f"{scene}: loaded {found['loads']} times, {found['load_s']:.2f} s each (median); "
            f"{found['not_200']} answers were not 200, {found['5xx']} of them 5xx"
        )
    if "volume" in summary:
        found = summary["volume"]
        met = found["ratio"]["p95"] <= GOAL and not found["5xx"]
        console.print(
            f"goal: 95th percentile {GOAL:.2f} times that alone, no 5xx: "
            f"{found['ratio']['p95']:.2f}, {found['5xx']}: {'met' if met else 'missed'}"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

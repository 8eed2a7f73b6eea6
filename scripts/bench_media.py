"""An image or video job through the daemon, beside the direct call of the pipeline.

    python scripts/bench_media.py
    python scripts/bench_media.py --rounds 5 --json benchmarks/media-cpu.json
    python scripts/bench_media.py --shared 4

Starts a daemon of its own, on free ports, with the demo models and room for all of them, and a
second process that calls diffusers' own pipelines with the same weights, threads and parameters,
and with the patience of OpenMP's threads that the daemon gives its engines (docs/decisions/0005).
Each round runs every case in both, in turns (A B B A), one at a time. A direct call is timed from
the call of the pipeline to the written file; a job from the POST to the last byte of its file,
with everything in between: the journal, the queue, the engine, the encoding, the download.

With --shared N nothing is compared with the pipeline: N jobs of one picture of 128x128 wait behind
another job, and are timed from its end to that of the last of them, made alone (exactness bit) and
in one batch (close).

Prints a table of seconds and of ratios, of each round, and whether the bytes of both files' pixels
are the same; writes JSON. Exit codes: 0 measured; 1 pixels differ; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from chat_bench.models import REPOSITORY
from chat_bench.servers import free_port

SIDES = ("direct", "daemon")
WAYS = {"alone": "bit", "shared": "close"}  # the exactness that makes it so
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    """What is made."""

    name: str
    kind: str  # image | video
    width: int
    height: int
    steps: int
    frames: int = 1


CASES = (
    Case("image 128x128, 25 steps", "image", 128, 128, 25),
    Case("image 256x256, 25 steps", "image", 256, 256, 25),
    Case("image 512x512, 25 steps", "image", 512, 512, 25),
    Case("video 96x96, 17 frames, 25 steps", "video", 96, 96, 25, 17),
)
PROMPT = {"image": "a red circle on a white background", "video": "a red circle moves left"}
GUIDANCE = 5.0


def main() -> int:
    args = _arguments()
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as worker/supervisor/spawn.py, for both
    console = Console()
    with tempfile.TemporaryDirectory(prefix="bench-media-") as work:
        folder = Path(work)
        daemon, url = _started(folder)
        if args.shared:
            try:
                shared = _shared(url, args.shared, args.rounds)
            finally:
                daemon.terminate()
                daemon.wait(60)
            _print_shared(shared, console)
            _write(args.json, [shared], console)
            return 0
        ours, theirs = multiprocessing.Pipe()
        direct = multiprocessing.get_context("spawn").Process(
            target=_direct, args=(theirs, folder), daemon=True
        )
        direct.start()
        theirs.close()  # so that the end of the other side is seen here
        try:
            seen = _measured(url, ours, args.rounds, console)
        finally:
            direct.terminate()
            daemon.terminate()
            daemon.wait(60)
    _print(seen, console)
    _write(args.json, seen, console)
    return 0 if all(one["same_pixels"] for one in seen) else 1


def _write(path: Path | None, cases: list[dict[str, Any]], console: Console) -> None:
    if path is None:
        return
    report = {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "command": " ".join(["python", "scripts/bench_media.py", *sys.argv[1:]]),
        "cases": cases,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3; each runs all cases ABBA")
    parser.add_argument(
        "--shared", type=int, default=0, metavar="N", help="jobs that share a batch, 2 to 6"
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args()


def _started(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A daemon with room for all demo models, and the address of its image and video port."""
    text = (REPOSITORY / "configs" / "demo.toml").read_text()
    profile = folder / "bench.toml"
    profile.write_text(
        text.replace('device_memory = "160MiB"', "")
        .replace('exactness = "close"', 'exactness = "bit"')
        .replace("compile = true", "compile = false")  # it would take a core for a minute
    )
    port = free_port()
    environment = os.environ | {
        "VERBATIM_STATE_DIR": str(folder / "state"),
        "VERBATIM_CHAT_PORT": str(free_port()),
        "VERBATIM_MEDIA_PORT": str(port),
    }
    log = (folder / "daemon.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "orchestrator.py"), "--profile", str(profile)],
        env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        try:
            if httpx.get(f"{url}/health", timeout=5).json()["status"] == "healthy":
                return process, url
        except httpx.TransportError:
            time.sleep(0.2)
    process.terminate()
    raise SystemExit(f"the daemon is not ready after {START_S:.0f} s; its log: {log.name}")


def _measured(url: str, direct: Connection, rounds: int, console: Console) -> list[dict[str, Any]]:
    seconds: dict[str, dict[str, list[float]]] = {
        case.name: {side: [] for side in SIDES} for case in CASES
    }
    pixels: dict[str, set[str]] = {case.name: set() for case in CASES}
    client = httpx.Client(base_url=url, timeout=120)

    def by_daemon(case: Case, seed: int) -> tuple[float, str]:
        return _job(client, case, seed)

    def by_pipeline(case: Case, seed: int) -> tuple[float, str]:
        direct.send((asdict(case), seed))
        if not direct.poll(600):
            raise SystemExit("the direct side does not answer; its error is above")
        answer: tuple[float, str] = direct.recv()
        return answer

    run: dict[str, Callable[[Case, int], tuple[float, str]]] = {
        "direct": by_pipeline, "daemon": by_daemon,
    }  # fmt: skip
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=(rounds + 1) * len(CASES))
        for number in range(rounds + 1):  # the first one warms up
            for case in CASES:
                for side in (*SIDES, *SIDES[::-1]):
                    took_s, digest = run[side](case, number)
                    if number:
                        seconds[case.name][side].append(took_s)
                        pixels[case.name].add(f"{number} {digest}")
                progress.advance(task)
    return [
        {
            **asdict(case),
            "seconds": seconds[case.name],
            "ratios": _ratios(seconds[case.name]),
            "same_pixels": len(pixels[case.name]) == rounds,
        }
        for case in CASES
    ]


def _ratios(seconds: dict[str, list[float]]) -> list[float]:
    """Of each round: both runs of the daemon against both direct ones, between which they were. So
    what the machine does for some seconds counts for both sides."""
    pairs = {
        side: [a + b for a, b in zip(times[::2], times[1::2], strict=True)]
        for side, times in seconds.items()
    }
    return [ours / direct for ours, direct in zip(pairs["daemon"], pairs["direct"], strict=True)]


def _shared(url: str, jobs: int, rounds: int) -> dict[str, Any]:
    """Seconds for all of these jobs, alone and shared, and how many pictures a batch had."""
    client, case = httpx.Client(base_url=url, timeout=120), CASES[0]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    images: set[int] = set()

    def post(seed: int, **more: Any) -> dict[str, Any]:
        return {"id": uuid.uuid4().hex} | _body(case, seed) | more

    def finished(body: dict[str, Any]) -> dict[str, Any]:
        """The same id joins the job."""
        job: dict[str, Any] = client.post(
            "/generate", json=body, headers={"Prefer": "wait=90"}
        ).json()
        if job["status"] != "completed":
            raise SystemExit(f"a job did not end well: {job}")
        return job

    for number in range(rounds + 1):  # the first one warms up
        for way in (*WAYS, *[*WAYS][::-1]):
            first = post(0, exactness="bit")
            bodies = [post(one + 1, exactness=WAYS[way]) for one in range(jobs)]
            for body in (first, *bodies):
                client.post("/generate", json=body)
            finished(first)
            began = time.perf_counter()
            done = [finished(body) for body in bodies]
            took_s = time.perf_counter() - began
            if number:
                seconds[way].append(took_s)
                images |= {one["receipt"].get("batch", {"images": 1})["images"] for one in done}
    return asdict(case) | {"jobs": jobs, "seconds": seconds, "images_in_batches": sorted(images)}


def _print_shared(seen: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{seen['jobs']} queued jobs, {seen['name']}: median (least to most)")
    for column in ("", "seconds", "images/s"):
        table.add_column(column)
    for way, times in seen["seconds"].items():
        middle = statistics.median(times)
        spread = f"{middle:.3f} ({min(times):.3f} to {max(times):.3f})"
        table.add_row(way, spread, f"{seen['jobs'] / middle:.2f}")
    console.print(table)
    console.print(f"pictures in a batch: {', '.join(map(str, seen['images_in_batches']))}")


def _body(case: Case, seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": "sdxl_image_fast" if case.kind == "image" else "video_fast",
        "prompt": PROMPT[case.kind],
        "width": case.width,
        "height": case.height,
        "steps": case.steps,
        "guidance_scale": GUIDANCE,
        "seed": seed,
    }
    if case.kind == "video":
        body |= {"frames": case.frames, "scheduler": "unipc"}
    return body


def _job(client: httpx.Client, case: Case, seed: int) -> tuple[float, str]:
    body = {"id": uuid.uuid4().hex} | _body(case, seed)
    began = time.perf_counter()
    answer = client.post("/generate", json=body, headers={"Prefer": "wait=90"})
    job = answer.json()
    if job["status"] != "completed":
        raise SystemExit(f"the daemon answered {answer.status_code}: {job}")
    data = client.get(job["assets"][0]["url"]).content
    return time.perf_counter() - began, _pixels(case, data)


def _pixels(case: Case, data: bytes) -> str:
    """SHA-256 of what is to be seen; of a video, of its file, whose encoder gives the same bytes
    for the same frames."""
    if case.kind == "image":
        from PIL import Image

        data = Image.open(io.BytesIO(data)).tobytes()
    return hashlib.sha256(data).hexdigest()


def _direct(pipe: Connection, folder: Path) -> None:
    """The other side: diffusers' pipelines as their documentation calls them."""
    sys.path.insert(0, str(REPOSITORY))  # a new process knows only the script's own folder
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLPipeline, UniPCMultistepScheduler, WanVACEPipeline
    from diffusers.pipelines.wan import pipeline_wan_vace

    from worker.engine.media.files import save_video

    # Its repair of texts needs a library that we do not install, and changes nothing in these.
    pipeline_wan_vace.prompt_clean = lambda text: text
    models = REPOSITORY / "models"
    image = StableDiffusionXLPipeline.from_pretrained(
        str(models / "demo-image"), dtype=torch.float32, add_watermarker=False
    )
    video = WanVACEPipeline.from_pretrained(str(models / "demo-video"), dtype=torch.float32)
    for pipeline in (image, video):
        pipeline.set_progress_bar_config(disable=True)
    sdxl_scheduler, wan_scheduler = image.scheduler, video.scheduler
    while True:
        values, seed = pipe.recv()
        case = Case(**values)
        generator = torch.Generator("cpu").manual_seed(seed)
        began = time.perf_counter()
        if case.kind == "image":
            image.scheduler = type(sdxl_scheduler).from_config(sdxl_scheduler.config)
            picture = image(
                PROMPT["image"], width=case.width, height=case.height,
                num_inference_steps=case.steps, guidance_scale=GUIDANCE, generator=generator,
            ).images[0]  # fmt: skip
            target = folder / "direct.png"
            picture.save(target)
        else:
            video.scheduler = UniPCMultistepScheduler.from_config(
                wan_scheduler.config, flow_shift=5.0, use_flow_sigmas=True,
                prediction_type="flow_prediction",
            )  # fmt: skip
            frames = video(
                prompt=PROMPT["video"], negative_prompt="", width=case.width, height=case.height,
                num_frames=case.frames, num_inference_steps=case.steps, guidance_scale=GUIDANCE,
                generator=generator, output_type="np",
            ).frames[0]  # fmt: skip
            save_video(folder, np.asarray((frames * 255).round(), dtype=np.uint8), 16, seed)
            target = folder / "0.mp4"
        took_s = time.perf_counter() - began
        pipe.send((took_s, _pixels(case, target.read_bytes())))


def _print(seen: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Seconds per job, median (least to most)")
    for column in ("case", *SIDES, "ratio", "same pixels"):
        table.add_column(column)
    for one in seen:
        cells = [_spread(one["seconds"][side]) for side in SIDES]
        same = "yes" if one["same_pixels"] else "NO"
        table.add_row(one["name"], *cells, _spread(one["ratios"]), same)
    console.print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

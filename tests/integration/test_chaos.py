"""Processes are killed at random moments: no accepted job is lost, none is published twice.

VERBATIM_CHAOS_RUNS=1000 ./scripts/test tests/integration/test_chaos.py -s
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.daemon import eventually
from tests.integration.pod import PROCESSES, Pod, as_pushed, running_pod
from tests.integration.toy_engine import content
from tests.redis_server import running_redis
from tests.supabase import Supabase, running_supabase

RUNS = int(os.environ.get("VERBATIM_CHAOS_RUNS", "200"))
DRAINS = int(os.environ.get("VERBATIM_DRAIN_RUNS", "25"))
SETTLE_S = 60.0
STEPS, STEP_S = 4, 0.005


def row_id(number: int) -> str:
    """Of a job from the list: the table takes UUIDs only."""
    return str(uuid.UUID(int=number + 1))


def body(job_id: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "id": job_id,
        "type": "sdxl_image_fast",
        "prompt": f"a red circle {seed}",
        "user_id": "u1",
        "config": {
            "resolution": "64x64",
            "num_inference_steps": STEPS,
            "seed": seed,
            "num_images": 1 + seed % 2,
        },
        **more,
    }


@pytest.mark.timeout(3600)
def test_nothing_is_lost_or_doubled_whatever_is_killed(tmp_path: Path) -> None:
    chance = random.Random(20)
    recoveries: dict[str, list[float]] = {name: [] for name in PROCESSES}
    with (
        running_redis() as redis,
        running_supabase() as supabase,
        running_pod(tmp_path, {"REDIS_URL": redis.url, **supabase.environment}, STEP_S) as pod,
    ):
        pushing = redis.client()
        engine_died_at = -9
        for run in range(RUNS):
            over_http, from_list = f"h{run}", supabase.functions.add_job(row_id(run))
            _post(pod, body(over_http, 2 * run))
            pushing.rpush("sdxl_queue", as_pushed(body(from_list, 2 * run + 1)))
            time.sleep(chance.uniform(0, 0.12))
            name = chance.choice(PROCESSES)
            if name == "engine" and run - engine_died_at < 4:
                _wait_until_idle(pod)  # a job whose engine dies twice is given up, as it should be
            engine_died_at = run if name == "engine" else engine_died_at
            recoveries[name].append(_kill_and_start(pod, name))
        _wait_until_idle(pod)
        _check_http_jobs(pod)
        _check_list_jobs(pod, supabase)
        assert pod.get("/jobs/never-made").status_code == 404
        eventually(lambda: pushing.llen("sdxl_queue:processing:" + _worker(pod)) == 0, SETTLE_S)
        assert pushing.llen("sdxl_queue") == 0
        assert pushing.llen("sdxl_queue:dead") == 0
        pushing.close()
    _print(recoveries)


@pytest.mark.timeout(3600)
def test_no_job_is_dropped_by_a_drain(tmp_path: Path) -> None:
    """SIGTERM to the runner while jobs run, wait, and come in."""
    with (
        running_redis() as redis,
        running_supabase() as supabase,
        running_pod(tmp_path, {"REDIS_URL": redis.url, **supabase.environment}, STEP_S) as pod,
    ):
        pushing = redis.client()
        for run in range(DRAINS):
            for number in range(3):
                job_id = supabase.functions.add_job(row_id(3 * run + number))
                pushing.rpush("sdxl_queue", as_pushed(body(job_id, 3 * run + number)))
            _post(pod, body(f"h{run}", 3 * run))
            time.sleep(0.02 * (run % 7))
            assert pod.end("runner") in (0, -signal.SIGTERM)  # the second: it had just begun
            pod.start("runner")
        _wait_until_idle(pod)
        _wait_for_list_jobs(pod, supabase, 3 * DRAINS)
        statuses = [pod.get(f"/jobs/h{run}").json()["status"] for run in range(DRAINS)]
        assert statuses == ["completed"] * DRAINS
        pushing.close()


def _post(pod: Pod, job: dict[str, Any]) -> None:
    """Until it is accepted: on a slow machine jobs come faster than they are made, and are refused
    with 429 where too many wait."""

    def accepted() -> bool:
        answer = pod.post(job)
        assert answer.status_code in (202, 429), answer.text
        return answer.status_code == 202

    eventually(accepted, SETTLE_S, pod.describe)


def _kill_and_start(pod: Pod, name: str) -> float:
    """Seconds from the kill until the new one answers."""
    began = time.perf_counter()
    pod.kill(name)
    pod.start(name)
    pod.wait_until_back(name)
    return time.perf_counter() - began


def _wait_until_idle(pod: Pod) -> None:
    def idle() -> bool:
        answer = pod.get("/status")
        if answer.status_code != 200:
            return False
        counts = answer.json()["jobs"]
        return bool(counts) and counts["queued"] == counts["processing"] == 0

    eventually(idle, SETTLE_S, lambda: f"{pod.get('/status').text}\n{pod.describe()}")


def _wait_for_list_jobs(pod: Pod, supabase: Supabase, count: int) -> None:
    """As long as more are finished: each drain leaves some to do, so that they pile up."""
    done = 0
    while done < count:
        before = done
        eventually(partial(_more_are_finished, supabase, before), SETTLE_S, pod.describe)
        done = _finished(supabase)


def _more_are_finished(supabase: Supabase, than: int) -> bool:
    return _finished(supabase) > than


def _check_http_jobs(pod: Pod) -> None:
    for run in range(RUNS):
        job = pod.get(f"/jobs/h{run}").json()
        assert job["status"] == "completed", (job, pod.describe())
        seeds = [2 * run] if len(job["assets"]) == 1 else [2 * run, 2 * run + 1]
        for asset, seed in zip(job["assets"], seeds, strict=True):
            assert pod.get(asset["url"]).content == content(f"a red circle {2 * run}", seed)


def _check_list_jobs(pod: Pod, supabase: Supabase) -> None:
    eventually(lambda: _finished(supabase) == RUNS, SETTLE_S, pod.describe)
    rows = supabase.functions.jobs
    assert {row["status"] for row in rows.values()} == {"completed"}
    for run in range(RUNS):
        seed = 2 * run + 1
        assets = supabase.functions.assets_of(row_id(run))
        assert [asset["asset_index"] for asset in assets] == [*range(1 + seed % 2)]
        for index, asset in enumerate(assets):
            stored = supabase.shelf.objects["workspace-temp", f"u1/{row_id(run)}/{index}.png"]
            assert asset["temp_storage_path"] == f"u1/{row_id(run)}/{index}.png"
            assert stored.content == content(f"a red circle {seed}", seed + index)
    uploaded = [name for _, name in supabase.shelf.objects]
    assert len(uploaded) == sum(2 * (1 + (2 * run + 1) % 2) for run in range(RUNS))


def _finished(supabase: Supabase) -> int:
    with supabase.functions.lock:
        return sum(row["status"] == "completed" for row in supabase.functions.jobs.values())


def _worker(pod: Pod) -> str:
    return (pod.state_dir / "worker-name").read_text().strip()


def _print(recoveries: dict[str, list[float]]) -> None:
    print(f"\n{RUNS} kills; seconds until it answers again: median, 95th percentile, most")
    for name, seconds in recoveries.items():
        ordered = sorted(seconds)
        p95 = ordered[int(0.95 * (len(ordered) - 1))]
        print(
            f"  {name:8} {len(seconds):4} kills  {statistics.median(seconds):.2f}  {p95:.2f}  "
            f"{ordered[-1]:.2f}"
        )

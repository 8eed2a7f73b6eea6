"""Processes that die, drain and stop."""

from __future__ import annotations

import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.daemon import (
    Daemon,
    answer_of,
    daemon_environment,
    eventually,
    running_daemon,
)
from worker.config import REPOSITORY
from worker.protocol.transport import run_dir

LONG = {
    "model": "endless",
    "messages": [{"role": "user", "content": "a red circle"}],
    "max_tokens": 1900,
    "temperature": 0,
}
SHORT = LONG | {"model": "demo-chat", "max_tokens": 4}
JOB = {"type": "sdxl_image_fast", "prompt": "a cube", "steps": 40, "width": 128, "height": 128}


def in_background(call: Any, *arguments: Any, **options: Any) -> Any:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *arguments, **options)
    pool.shutdown(wait=False)
    return future


def active(client: httpx.Client) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("verbatim_engine_active "):
            return float(line.split()[1])
    return 0.0


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


def test_a_killed_chat_engine_fails_its_request_with_a_cause_and_comes_back(tmp_path):
    with running_daemon(tmp_path) as daemon:
        pending = in_background(httpx.post, f"{daemon.chat_url}/chat", json=LONG, timeout=60)
        eventually(lambda: active(daemon.chat) == 1, 10)

        daemon.child("engine chat").kill()

        lost = pending.result(30)
        assert lost.status_code == 503
        assert lost.json()["error_code"] == "engine_lost"
        assert int(lost.headers["Retry-After"]) >= 1
        assert daemon.media.get("/health").json()["status"] == "healthy"
        health = answer_of(daemon.chat, "/health")
        assert health is not None  # the front answers while its engine is dead
        daemon.wait_until_ready()
        assert daemon.chat.post("/chat", json=SHORT).status_code == 200


def test_a_killed_media_engine_begins_its_job_anew(tmp_path):
    with running_daemon(tmp_path) as daemon:
        job = daemon.media.post("/generate", json=JOB).json()
        eventually(lambda: daemon.media.get(job["status_url"]).json()["step"] > 0, 30)

        daemon.child("engine media").kill()

        final = eventually(lambda: _final(daemon, job), 90, daemon.describe)
        assert final["status"] == "completed"
        assert len(final["assets"]) == 1


@pytest.mark.parametrize("name", ["front chat", "front media"])
def test_a_killed_front_comes_back_on_its_port(tmp_path, name):
    with running_daemon(tmp_path) as daemon:
        client = daemon.chat if name == "front chat" else daemon.media
        before = daemon.child(name)

        before.kill()

        eventually(lambda: gone([before]), 5)
        eventually(lambda: (answer_of(client, "/health") or {}).get("status") == "healthy", 30)
        assert daemon.child(name).pid != before.pid


def test_children_die_with_a_killed_orchestrator(tmp_path):
    with running_daemon(tmp_path) as daemon:
        family = daemon.family()

        daemon.process.kill()

        daemon.process.wait(5)
        assert len(family) == 7  # the runner, two engines, two gunicorn masters and their workers
        eventually(lambda: gone(family), 5)


def test_sigterm_drains_running_work_and_leaves_nothing_behind(tmp_path):
    with running_daemon(tmp_path) as daemon:
        family = daemon.family()
        chat = in_background(httpx.post, f"{daemon.chat_url}/chat", json=LONG, timeout=60)
        eventually(lambda: active(daemon.chat) == 1, 10)

        daemon.process.send_signal(signal.SIGTERM)

        # Asked by /health: a chat that comes a moment too early is accepted, and waits its turn.
        eventually(lambda: daemon.chat.get("/health").status_code == 503, 10)
        refused = daemon.chat.post("/chat", json=SHORT)
        assert (refused.status_code, refused.json()["error_code"]) == (503, "draining")
        assert int(refused.headers["Retry-After"]) >= 1
        assert chat.result(60).json()["success"] is True
        assert daemon.process.wait(30) == 0
        assert gone(family)
        assert not run_dir(daemon.state_dir).exists()


def test_work_that_outlasts_the_grace_time_is_cut_and_the_exit_code_says_so(tmp_path):
    def hasty(text: str) -> str:
        return text.replace("grace_s = 60.0", "grace_s = 0.5")

    with running_daemon(tmp_path, hasty) as daemon:
        family = daemon.family()
        in_background(httpx.post, f"{daemon.media_url}/generate", json=JOB | {"num_images": 6})
        eventually(lambda: active(daemon.media) == 1, 10)

        assert daemon.stop() == 1
        assert gone(family)


def test_status_and_stop_work_from_another_terminal(tmp_path):
    with running_daemon(tmp_path) as daemon:
        second = daemon.run("--profile", "demo")
        status = daemon.run("status")
        stop = daemon.run("stop")

        assert second.returncode == 5
        assert "already runs" in second.stderr
        assert status.returncode == 0
        for name in ("engine chat", "engine media", "front chat", "front media"):
            assert name in status.stdout
        assert stop.returncode == 0
        assert daemon.process.wait(10) == 0
        assert daemon.run("status").returncode == 6


def test_a_taken_port_is_named_before_anything_is_started(tmp_path):
    import socket

    environment = daemon_environment(tmp_path)
    port = int(environment["VERBATIM_CHAT_PORT"])
    with socket.create_server(("127.0.0.1", port)):
        with running_daemon(tmp_path, ready=False, VERBATIM_CHAT_PORT=str(port)) as daemon:
            code = daemon.process.wait(20)

    assert code == 5
    assert f"port {port}" in daemon.output.read_text()


def test_an_engine_that_cannot_start_is_not_restarted_and_health_says_why(tmp_path):
    def on_a_card(text: str) -> str:
        return text.replace('device = "cpu"', 'device = "cuda"')

    with running_daemon(tmp_path, on_a_card, ready=False) as daemon:
        health = eventually(lambda: _unavailable(daemon.chat), 30, daemon.describe)
        refused = daemon.chat.post("/chat", json=SHORT)

        assert health["status"] == "unavailable"
        assert "exited with code 3" in health["error"]
        assert "no usable NVIDIA card" in health["error"]
        assert refused.status_code == 503
        assert daemon.log("orchestrator").count("engine chat started") == 1


def test_a_damaged_model_is_reported_with_its_path_and_the_cure(tmp_path):
    copy = shutil.copytree(REPOSITORY / "models" / "demo-chat", tmp_path / "damaged")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    def damaged(text: str) -> str:
        text = text.replace(', "endless"]', "]")
        return text.replace('path = "demo-chat"\nshipped = true', 'path = "damaged"')

    with running_daemon(
        tmp_path, damaged, ready=False, VERBATIM_MODELS_DIR=str(tmp_path)
    ) as daemon:
        health = eventually(lambda: _unavailable(daemon.chat), 30, daemon.describe)
        refused = daemon.chat.post("/chat", json=SHORT)
        check = daemon.run("--check", "--profile", str(tmp_path / "demo.toml"))

    assert "models/damaged/model.safetensors" in health["error"]
    assert "put its files there" in health["error"]
    assert (refused.status_code, refused.json()["error_code"]) == (503, "model_unavailable")
    assert check.returncode == 4
    assert "models/damaged/model.safetensors" in check.stdout


def test_keys_close_what_must_be_closed(tmp_path):
    key = "k" * 40
    with running_daemon(tmp_path, CHAT_WORKER_API_KEY=key) as daemon:
        good = {"Authorization": f"Bearer {key}"}
        bad = {"Authorization": "Bearer wrong"}

        assert daemon.chat.post("/chat", json=SHORT).status_code == 200  # keyless is allowed
        assert daemon.chat.post("/chat", json=SHORT, headers=bad).status_code == 401
        assert daemon.chat.post("/chat", json=SHORT, headers=good).status_code == 200
        assert daemon.chat.get("/metrics").status_code == 401
        assert daemon.chat.get("/metrics", headers=good).status_code == 200
        assert daemon.chat.get("/health").status_code == 200
        engine = Path(f"/proc/{daemon.child('engine chat').pid}/environ")
        if engine.exists():
            assert key.encode() not in engine.read_bytes()
        logs = [path.read_text() for path in (daemon.state_dir / "logs").glob("*.log")]
        assert not any(key in text for text in logs)


def test_chat_and_jobs_run_at_the_same_time(tmp_path):
    with running_daemon(tmp_path) as daemon:
        job = daemon.media.post("/generate", json=JOB).json()
        answers: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{daemon.chat_url}/chat", json=SHORT, timeout=60).status_code
                )
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert answers == [200] * 8
        final = eventually(lambda: _final(daemon, job), 90)
        assert final["status"] == "completed"
        assert daemon.media.get(final["assets"][0]["url"]).content.startswith(b"\x89PNG")


def _final(daemon: Daemon, job: dict[str, Any]) -> dict[str, Any] | None:
    body = answer_of(daemon.media, job["status_url"])
    return body if body and body.get("status") in ("completed", "failed", "cancelled") else None


def _unavailable(client: httpx.Client) -> dict[str, Any] | None:
    body = answer_of(client, "/health")
    return body if body and body.get("status") == "unavailable" else None

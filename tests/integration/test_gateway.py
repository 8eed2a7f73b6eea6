"""The gateway beside a real worker: from a prompt to pictures, and without some of its parts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.integration.daemon import Daemon, eventually, running_daemon
from tests.redis_server import running_redis

START_S = 60.0
MAKE_S = 90.0
EDIT = """UPDATE prompt_templates SET system_prompt = 'New system prompt', version = version + 1
 WHERE template_name = 'enhancement_sdxl_sfw';"""


@dataclass
class Running:
    """A daemon with its gateway, and a client that has the first key."""

    daemon: Daemon
    client: httpx.Client

    @property
    def database(self) -> Path:
        return self.daemon.state_dir / "gateway" / "gateway.sqlite3"

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        return said

    def finished(self, job_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            job: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()["job"]
            return job if job["status"] not in ("queued", "processing") else None

        found = eventually(look, MAKE_S, self.daemon.describe)
        assert found is not None
        return found


def start(daemon: Daemon) -> Running:
    def healthy() -> bool:
        try:
            said = httpx.get(f"{daemon.gateway_url}/health", timeout=5).json()
        except httpx.TransportError:
            return False
        return all(said["workers"].get(kind, {}).get("healthy") for kind in ("chat", "sdxl"))

    eventually(healthy, START_S, daemon.describe)
    key = (daemon.state_dir / "gateway" / "admin-key").read_text().strip()
    client = httpx.Client(
        base_url=daemon.gateway_url, headers={"Authorization": f"Bearer {key}"}, timeout=100
    )
    return Running(daemon, client)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_daemon(tmp_path_factory.mktemp("gateway"), gateway=True) as daemon:
        started = start(daemon)
        with started.client:
            yield started


def test_a_prompt_is_enhanced_by_the_worker_and_the_answer_proves_it(running: Running) -> None:
    body = {"prompt": "a green star", "jobType": "sdxl_image_fast", "contentType": "sfw"}

    said = running.post("/functions/v1/enhance-prompt", body)

    metadata, trace = said["enhancement_metadata"], said["trace"]
    (asked,) = trace["models"]
    assert "green star" in said["enhanced_prompt"]
    assert said["enhanced_prompt"] != body["prompt"]
    assert metadata["template_name"] == "enhancement_sdxl_sfw"
    assert metadata["tokens_exact"] and metadata["token_count"] <= metadata["token_limit"] == 75
    assert trace["fallback_level"] == 0
    assert asked["attestation"] == {"ok": True, "mismatches": []}
    assert asked["receipt"]["messages_sha256"] == trace["messages_sha256"]


def test_the_next_request_uses_an_edit_in_plain_sql(running: Running) -> None:
    body = {"prompt": "a red circle", "contentType": "sfw"}
    before = running.post("/enhance/sdxl", body)["trace"]

    with closing(sqlite3.connect(running.database)) as shell, shell:
        shell.execute(EDIT)

    after = running.post("/enhance/sdxl", body)["trace"]
    assert after["template"]["version"] == before["template"]["version"] + 1
    assert after["config_revision"] > before["config_revision"]
    assert after["messages_sha256"] != before["messages_sha256"]
    assert after["fallback_level"] == 0


def test_a_conversation_has_its_history(running: Running) -> None:
    first = running.post("/playground-chat", {"conversation_id": "c-1", "message": "hello"})
    second = running.post("/playground-chat", {"conversation_id": "c-1", "message": "and now?"})

    assert first["response"] and second["response"]
    assert second["trace"]["prompt_tokens"] > first["trace"]["prompt_tokens"]


def test_a_job_comes_back_with_its_pictures(running: Running) -> None:
    queued = running.post(
        "/functions/v1/queue-job",
        {
            "prompt": "a green star",
            "job_type": "sdxl_image_fast",
            "num_images": 3,
            "resolution": "64x64",
            "seed": 7,
            "enhance": True,
        },
    )

    job = running.finished(queued["jobId"])

    assert job["status"] == "completed", job["error_message"]
    assert queued["queueName"] == "http"
    assert job["template_name"] == "enhancement_sdxl_sfw"
    assert [one["generation_seed"] for one in job["assets"]] == [7, 8, 9]
    for asset in job["assets"]:
        picture = Image.open(BytesIO(httpx.get(asset["temp_storage_path"]).content))
        assert picture.size == (64, 64)


def test_without_its_database_prompts_are_the_last_known_good_ones(running: Running) -> None:
    moved = running.database.with_suffix(".away")
    running.database.rename(moved)
    try:
        away = running.post("/enhance/sdxl", {"prompt": "a red circle", "contentType": "sfw"})
    finally:
        moved.rename(running.database)
    back = running.post("/enhance/sdxl", {"prompt": "a red circle", "contentType": "sfw"})

    assert away["trace"]["fallback_level"] == away["enhancement_metadata"]["fallback_level"] == 1
    assert "prompts_unverified" in away["trace"]["flags"]
    assert back["trace"]["fallback_level"] == 0


def test_a_refresh_takes_the_catalogue_over(running: Running) -> None:
    first = running.post("/api/llms/refresh", {})
    second = running.post("/api/llms/refresh", {})

    assert first["syncResults"]["failed"] == 0
    assert second["syncResults"]["added"] == second["syncResults"]["updated"] == 0
    assert {one["matcha_llm_id"] for one in second["models"]} >= {25, 28, 30, 35, 40}


def test_without_the_worker_there_is_an_error_and_never_the_prompt_itself(
    tmp_path: Path,
) -> None:
    with running_daemon(tmp_path, gateway=True) as daemon:
        started = start(daemon)
        with started.client as client:
            daemon.child("engine chat").kill()
            body = {"prompt": "a red circle", "contentType": "sfw"}

            refused = client.post("/enhance/sdxl", json=body)
            allowed = client.post("/enhance/sdxl", json={**body, "allow_original": True})

        # The engine may be back before the second request; then it is enhanced.
        assert refused.status_code in (200, 503)
        if refused.status_code == 503:
            assert refused.json()["error_code"] in ("worker_busy", "worker_unavailable")
            assert refused.json()["attempts"]
            assert "red circle" not in refused.text
        assert allowed.status_code == 200
        if allowed.json()["enhancement_strategy"] == "original_fallback":
            assert allowed.json()["enhanced_prompt"] == "a red circle"
            assert allowed.json()["enhancement_metadata"]["fallback_reason"].startswith("worker_")


def test_the_chain_goes_through_redis(tmp_path: Path) -> None:
    with (
        running_redis() as server,
        running_daemon(tmp_path, gateway=True, REDIS_URL=server.url) as daemon,
    ):
        started = start(daemon)
        with started.client:
            queued = started.post(
                "/functions/v1/queue-job",
                {"prompt": "a red circle", "job_type": "sdxl_image_fast", "resolution": "64x64"},
            )
            job = started.finished(queued["jobId"])

        # The element goes from the processing list once the webhook was taken.
        with closing(server.client()) as looked_at:
            lists = ("sdxl_queue", *looked_at.keys("sdxl_queue:processing:*"))
            eventually(lambda: not any(looked_at.llen(name) for name in lists), 10)
    assert queued["queueName"] == "sdxl_queue"
    assert job["status"] == "completed", job["error_message"]
    assert len(job["assets"]) == 1

"""The whole chain on one machine: a list, the real daemon and its demo models, the store, the
signed callback; and what happens to it when the runner is killed in the middle of a denoise."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from PIL import Image

from tests.integration.daemon import Daemon, eventually, running_daemon
from tests.redis_server import running_redis
from tests.supabase import Supabase, running_supabase
from tests.upstash_bridge import bridge

PATIENCE_S = 60.0
TOKEN = "a-token-for-tests"


@dataclass(frozen=True)
class Chain:
    """A daemon with everything around it."""

    daemon: Daemon
    supabase: Supabase
    upstash: str
    redis: redis.Redis

    def push(self, kind: str, **body: Any) -> str:
        """As queue-job pushes a job, over Upstash's REST interface; its id."""
        job_id = self.supabase.functions.add_job(str(uuid.uuid4()), job_type=body["type"])
        element = json.dumps({"id": job_id, "job_id": job_id, "user_id": "user-1", **body})
        answer = httpx.post(
            f"{self.upstash}/rpush/{kind}_queue",
            headers={"Authorization": f"Bearer {TOKEN}"},
            content=json.dumps([element]),
        )
        assert answer.status_code == 200
        return job_id

    def row(self, job_id: str) -> dict[str, Any]:
        with self.supabase.functions.lock:
            return dict(self.supabase.functions.jobs[job_id])

    def wait(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """The row, once it says so."""

        def found() -> dict[str, Any] | None:
            row = self.row(job_id)
            return row if row["status"] in statuses else None

        return eventually(found, PATIENCE_S, self.daemon.describe)

    def file(self, key: str) -> bytes:
        return self.supabase.shelf.objects["workspace-temp", key].content


@contextmanager
def running_chain(folder: Path) -> Iterator[Chain]:
    with (
        running_redis() as server,
        running_supabase() as supabase,
        bridge(server.url, TOKEN) as url,
        running_daemon(
            folder,
            UPSTASH_REDIS_REST_URL=url,
            UPSTASH_REDIS_REST_TOKEN=TOKEN,
            **supabase.environment,
        ) as daemon,
    ):
        client = server.client()
        yield Chain(daemon, supabase, url, client)
        client.close()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with running_chain(tmp_path_factory.mktemp("chain")) as running:
        yield running


def image(**config: Any) -> dict[str, Any]:
    return {
        "type": "sdxl_image_high",
        "prompt": "a red circle on a white background",
        "config": {
            "pipeline": "txt2img", "num_images": 1, "num_inference_steps": 8, "guidance_scale": 5.0,
            "resolution": "128x128", "seed": 7, **config,
        },
        "metadata": {"destination": "library"},
        "negative_prompt": "blue",
    }  # fmt: skip


def test_a_pushed_job_is_made_uploaded_and_called_back(chain: Chain) -> None:
    job_id = chain.push("sdxl", **image(num_images=3))

    row = chain.wait(job_id, "completed")

    assets = chain.supabase.functions.assets_of(job_id)
    assert [one["temp_storage_path"] for one in assets] == [
        f"user-1/{job_id}/{index}.png" for index in range(3)
    ]
    assert [one["generation_seed"] for one in assets] == [7, 8, 9]
    pictures = [Image.open(io.BytesIO(chain.file(one["temp_storage_path"]))) for one in assets]
    assert [(one.format, one.size) for one in pictures] == [("PNG", (128, 128))] * 3
    thumbnail = Image.open(io.BytesIO(chain.file(f"user-1/{job_id}/0.thumb.webp")))
    assert thumbnail.format == "WEBP"
    assert row["metadata"]["num_images"] == 3
    (call,) = [
        one for one in chain.supabase.functions.calls_of("job-callback")
        if one.body["job_id"] == job_id
    ]  # fmt: skip
    assert call.headers["x-callback-signature"].startswith("sha256=")
    assert call.status == 200
    eventually(lambda: _is_settled(chain), 10)


def test_a_video_from_the_other_list(chain: Chain) -> None:
    job_id = chain.push(
        "wan", type="video_fast", prompt="a red circle moves left",
        config={"pipeline": "video", "num_images": 1, "num_inference_steps": 4, "seed": 3,
                "resolution": "1024x1024", "sample_solver": "dpm++", "frames": 17},
        metadata={"reference_type": "style", "video_reference_mode": "none"},
        negative_prompt="blurry",
    )  # fmt: skip

    chain.wait(job_id, "completed")

    (asset,) = chain.supabase.functions.assets_of(job_id)
    assert asset["temp_storage_path"] == f"user-1/{job_id}/0.mp4"
    assert chain.file(asset["temp_storage_path"])[4:8] == b"ftyp"


def test_a_job_that_cannot_be_honoured_fails_with_its_reason(chain: Chain) -> None:
    job_id = chain.push("sdxl", **image(resolution="63x63"))

    row = chain.wait(job_id, "failed")

    assert "multiples of 8" in row["error_message"]
    assert chain.daemon.media.get(f"/jobs/{job_id}").json()["status"] == "failed"


def test_a_job_whose_row_is_cancelled_is_not_made(chain: Chain) -> None:
    blocking = chain.push("sdxl", **image(num_inference_steps=60, num_images=2))
    job_id = chain.push("sdxl", **image())
    with chain.supabase.functions.lock:
        chain.supabase.functions.jobs[job_id]["status"] = "cancelled"

    chain.wait(blocking, "completed")

    eventually(lambda: _is_settled(chain), 20, chain.daemon.describe)
    assert chain.row(job_id)["status"] == "cancelled"
    assert chain.supabase.functions.assets_of(job_id) == []


def test_a_job_goes_on_where_its_runner_was_killed(chain: Chain) -> None:
    """With the same bytes as one that nothing happened to."""
    body = image(num_inference_steps=60, num_images=2, seed=11)
    undisturbed = chain.push("sdxl", **body)
    chain.wait(undisturbed, "completed")

    job_id = chain.push("sdxl", **body)
    eventually(lambda: _step(chain.daemon, job_id) >= 5, PATIENCE_S, chain.daemon.describe)
    chain.daemon.child("runner").kill()
    chain.wait(job_id, "completed")

    assert len(chain.supabase.functions.assets_of(job_id)) == 2
    for index in range(2):
        assert chain.file(f"user-1/{job_id}/{index}.png") == chain.file(
            f"user-1/{undisturbed}/{index}.png"
        )


def _step(daemon: Daemon, job_id: str) -> int:
    body = daemon.media.get(f"/jobs/{job_id}").json()
    return int(body.get("step") or 0)


def _is_settled(chain: Chain) -> bool:
    names = chain.redis.keys("*_queue:processing:*")
    return not names and chain.redis.llen("sdxl_queue") == chain.redis.llen("wan_queue") == 0

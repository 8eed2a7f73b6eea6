"""Pictures that jobs name, through the real front and runner: whose they are, and what a cancel
does while one of them is still coming. The engine is a toy."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests import hostile
from tests.hostile import HostileServer, Talk
from tests.integration.daemon import eventually
from tests.integration.pod import Pod, as_pushed, running_pod
from tests.redis_server import running_redis
from tests.supabase import Supabase, running_supabase

PATIENCE_S = 20.0
KEY = "a-service-key"


def drawn() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def body(job_id: str, **more: Any) -> dict[str, Any]:
    return {
        "id": job_id, "type": "sdxl_image_fast", "prompt": "a red circle", "user_id": "u-1",
        "config": {"resolution": "64x64", "num_inference_steps": 2, "seed": 7}, **more,
    }  # fmt: skip


def status(pod: Pod, job_id: str, *statuses: str) -> dict[str, Any]:
    """The job, once it has one of these."""

    def found() -> dict[str, Any] | None:
        job: dict[str, Any] = pod.get(f"/jobs/{job_id}").json()
        return job if job.get("status") in statuses else None  # it may not be taken yet

    return eventually(found, PATIENCE_S, pod.describe)


# --- a cancel ------------------------------------------------------------------------------------


@dataclass
class Stall:
    """A reply that never ends by itself, and sees when its client has gone. Server's threads."""

    start: bytes
    begun: threading.Event
    gone: threading.Event

    def __call__(self, talk: Talk) -> None:
        talk.send(self.start)
        self.begun.set()
        talk.connection.settimeout(PATIENCE_S)
        if talk.connection.recv(1) == b"":
            self.gone.set()


@pytest.fixture(scope="module")
def pictures() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory, pictures: HostileServer) -> Iterator[Pod]:
    """Its storage is the hostile server, and so trusted, though it is on this machine."""
    environment = {"SUPABASE_URL": pictures.origin, "SUPABASE_SERVICE_KEY": KEY}
    with running_pod(tmp_path_factory.mktemp("pod"), environment) as pod:
        yield pod


@pytest.mark.parametrize(
    "start", [b"", hostile.head(200, Content_Length="9999") + b"part"], ids=["head", "body"]
)
@pytest.mark.parametrize("place", ["url", "storage"])
def test_a_cancel_hangs_up_on_who_sends_the_picture(
    pod: Pod, pictures: HostileServer, start: bytes, place: str
) -> None:
    stall = Stall(start, threading.Event(), threading.Event())
    name = f"{len(start)}-{place}"
    if place == "storage":
        path = source = f"user-library/u-1/{name}.png"
        pictures.replies[f"/storage/v1/object/{path}"] = stall
    else:
        source = f"{pictures.origin}/{name}.png"
        pictures.replies[f"/{name}.png"] = stall
    assert pod.post(body(name, image=source)).status_code == 202
    assert stall.begun.wait(PATIENCE_S), pod.describe()

    answer = httpx.delete(f"{pod.url}/jobs/{name}", timeout=PATIENCE_S)

    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert stall.gone.wait(PATIENCE_S)
    assert pod.post(body(f"{name}-next")).status_code == 202
    status(pod, f"{name}-next", "completed")


# --- whose pictures ------------------------------------------------------------------------------


def test_a_path_of_the_jobs_own_user_is_read_with_the_service_key(
    pod: Pod, pictures: HostileServer
) -> None:
    path = "/storage/v1/object/workspace-temp/u-1/own.png"
    pictures.replies[path] = hostile.answer(200, drawn())

    pod.post(body("own", image="workspace-temp/u-1/own.png"))

    status(pod, "own", "completed")
    (asked,) = [one for one in pictures.seen if one.path == path]
    assert asked.headers["authorization"] == f"Bearer {KEY}"


def test_a_path_of_another_user_is_refused_over_http_and_never_asked_for(
    pod: Pod, pictures: HostileServer
) -> None:
    answer = pod.post(body("other", image="workspace-temp/u-2/other.png"))

    assert (answer.status_code, answer.json()["error_code"]) == (403, "reference_forbidden")
    assert pod.get("/jobs/other").status_code == 404
    assert not any("other.png" in one.path for one in pictures.seen)


def test_a_path_of_another_user_fails_a_job_of_a_list_and_its_row_says_why(
    tmp_path: Path,
) -> None:
    mine, theirs = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    with (
        running_redis() as redis,
        running_supabase() as supabase,
        running_pod(tmp_path, {"REDIS_URL": redis.url, **supabase.environment}) as pod,
        redis.client() as client,
    ):
        for job_id, owner in ((mine, "u-1"), (theirs, "u-2")):
            supabase.shelf.store("user-library", f"{owner}/x.png", drawn(), "image/png")
            supabase.functions.add_job(job_id, job_type="sdxl_image_fast")
            metadata = {"reference_image_url": f"user-library/{owner}/x.png"}
            client.rpush("sdxl_queue", as_pushed(body(job_id, metadata=metadata)))

        failed = status(pod, theirs, "failed")
        status(pod, mine, "completed")
        eventually(lambda: _row(supabase, theirs)["status"] == "failed", PATIENCE_S)

    assert failed["error_code"] == "reference_forbidden"
    row = _row(supabase, theirs)
    assert row["error_message"].startswith("a picture in storage must lie in the folder of")
    assert row["metadata"]["error_type"] == "REFERENCE_FRAME_ERROR"
    assert "u-2" not in json.dumps(row)
    seen = [one for one in supabase.shelf.seen if one.startswith("GET ")]
    assert "GET /storage/v1/object/user-library/u-1/x.png" in seen
    assert not any("u-2" in one for one in seen)


def _row(supabase: Supabase, job_id: str) -> dict[str, Any]:
    with supabase.functions.lock:
        return dict(supabase.functions.jobs[job_id])

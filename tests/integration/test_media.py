"""Images and videos through the whole daemon."""

from __future__ import annotations

import io
import re
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.integration.daemon import Daemon, eventually
from worker.config import REPOSITORY

WAIT = {"Prefer": "wait=80"}
IMAGE = {
    "type": "sdxl_image_fast",
    "prompt": "a red cube on a table",
    "negative_prompt": "blue",
    "width": 128,
    "height": 64,
    "steps": 4,
    "guidance_scale": 5.0,
    "seed": 0,
}


def finished(daemon: Daemon, body: dict[str, Any]) -> dict[str, Any]:
    answer = daemon.media.post("/generate", json=body, headers=WAIT)
    job: dict[str, Any] = answer.json()
    assert answer.status_code == 200, job
    assert job["status"] == "completed", job
    return job


def picture(daemon: Daemon, job: dict[str, Any], index: int = 0) -> Image.Image:
    answer = daemon.media.get(job["assets"][index]["url"])
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


def frames_of(content: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_each_image_of_a_job_equals_a_direct_pipeline_call_pixel_for_pixel(daemon):
    import torch
    from diffusers import StableDiffusionXLPipeline

    job = finished(daemon, IMAGE | {"num_images": 3})

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(REPOSITORY / "models" / "demo-image"),
        dtype=torch.float32,
        add_watermarker=False,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    assert [asset["seed"] for asset in job["assets"]] == [0, 1, 2]
    for index in range(3):
        direct = pipeline(
            prompt=IMAGE["prompt"],
            negative_prompt=IMAGE["negative_prompt"],
            width=128,
            height=64,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator("cpu").manual_seed(index),
        ).images[0]
        assert np.array_equal(np.asarray(direct), np.asarray(picture(daemon, job, index)))


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"negative_prompt": "red"}, {"prompt": "a green sphere"}]
)
def test_a_parameter_that_changes_changes_the_picture(daemon, change):
    one = picture(daemon, finished(daemon, IMAGE))
    other = picture(daemon, finished(daemon, IMAGE | change))

    assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_a_video_is_a_real_mp4_with_its_frame_count_and_rate(daemon):
    body = {"type": "video_fast", "prompt": "a red cube moves left", "frames": 9, "fps": 8}

    job = finished(daemon, body | {"steps": 3, "seed": 1})

    asset = job["assets"][0]
    answer = daemon.media.get(asset["url"])
    frames = frames_of(answer.content)
    with av.open(io.BytesIO(answer.content)) as container:
        rate = container.streams.video[0].average_rate
    assert answer.headers["content-type"] == "video/mp4"
    assert len(frames) == asset["frame_num"] == 9
    assert rate == asset["fps"] == 8
    assert frames[0].shape == (96, 96, 3)
    assert job["receipt"]["parameters"]["scheduler"] == "dpm++"


def test_the_same_video_job_gives_the_same_bytes(daemon):
    body = {"type": "video_fast", "prompt": "a cube", "frames": 5, "steps": 2, "seed": 3}

    one, again = finished(daemon, body), finished(daemon, body)

    assert one["assets"][0]["sha256"] == again["assets"][0]["sha256"]


def test_a_thumbnail_is_webp_with_at_most_256_pixels(daemon):
    job = finished(daemon, IMAGE | {"width": 320, "height": 64, "steps": 1})

    answer = daemon.media.get(job["assets"][0]["thumbnail_url"])

    with Image.open(io.BytesIO(answer.content)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (256, 51))


def test_the_payload_of_the_existing_queue_is_taken(daemon):
    job = finished(
        daemon,
        {
            "id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
            "type": "sdxl_image_high",
            "prompt": "a red cube",
            "user_id": "550e8400-e29b-41d4-a716-446655440000",
            "config": {
                "pipeline": "txt2img",
                "num_images": 1,
                "num_inference_steps": 2,
                "resolution": "128x64",
                "seed": 123,
            },
            "metadata": {"contentType": "sfw", "num_inference_steps": 25},
            "negative_prompt": "",
            "compel_enabled": False,
            "quality": "high",
            "format": "image",
            "content_type": "sfw",
        },
    )

    parameters = job["receipt"]["parameters"]
    assert job["job_id"] == "7c9e6679-7425-40de-944b-e07fc1f90ae7"
    assert (parameters["steps"], parameters["guidance_scale"]) == (2, 7.5)
    assert (parameters["width"], parameters["height"], parameters["seed"]) == (128, 64, 123)
    assert "metadata.contentType" in job["receipt"]["ignored"]


def test_a_prompt_of_more_pieces_than_are_taken_fails_the_job_with_the_counts(daemon):
    answer = daemon.media.post(
        "/generate", json=IMAGE | {"prompt": "red cube " * 1000}, headers=WAIT
    )

    job = answer.json()
    assert (job["status"], job["error_code"]) == ("failed", "prompt_too_long")
    assert "1500" in job["error"]


@pytest.mark.parametrize("exactness", ["close", "bit"])
def test_queued_jobs_of_one_shape_share_a_batch_where_all_of_them_allow_it(daemon, exactness):
    before = daemon.media.post("/generate", json=IMAGE | {"steps": 150, "exactness": "bit"}).json()
    changes = ({"seed": 1}, {"prompt": "a green sphere"}, {"negative_prompt": "red", "seed": 3})

    urls = [
        daemon.media.post("/generate", json=IMAGE | {"exactness": exactness} | one).json()[
            "status_url"
        ]
        for one in changes
    ]

    def ended() -> list[dict[str, Any]]:
        jobs = [daemon.media.get(url).json() for url in urls]
        return jobs if all(one["status"] == "completed" for one in jobs) else []

    receipts = [one["receipt"] for one in eventually(ended, 80)]
    shared = {"jobs": 3, "images": 3} if exactness == "close" else None
    assert [one.get("batch") for one in receipts] == [shared] * 3
    assert [one["exactness"] for one in receipts] == [exactness] * 3
    assert daemon.media.get(before["status_url"]).json()["receipt"]["exactness"] == "bit"


def test_a_running_job_is_cancelled_within_a_step(daemon):
    job = daemon.media.post("/generate", json=IMAGE | {"steps": 150, "num_images": 6}).json()
    eventually(lambda: daemon.media.get(job["status_url"]).json()["step"] > 0, 30)

    cancelled = daemon.media.delete(job["status_url"])

    body = cancelled.json()
    assert (cancelled.status_code, body["status"]) == (200, "cancelled")
    assert re.search(r"after step [1-9]\d* of 900", body["error"])
    assert body["assets"] == []


def test_events_tell_every_phase_of_a_job_and_end(daemon):
    job = daemon.media.post("/generate", json=IMAGE | {"steps": 6}).json()

    with daemon.media.stream("GET", job["events_url"]) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]

    assert lines[-1] == "data: [DONE]"
    assert '"status":"completed"' in lines[-2]
    assert any('"phase":"denoise"' in line for line in lines)


def test_the_raw_completion_dialect_is_answered_by_the_chat_engine(daemon):
    answer = daemon.media.post(
        "/generate",
        json={
            "inputs": "a red cube",
            "parameters": {
                "max_new_tokens": 12,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "return_full_text": False,
            },
        },
    )

    body = answer.json()
    assert answer.status_code == 200
    assert isinstance(body["generated_text"], str)
    assert body["receipt"]["template"] is None
    assert body["receipt"]["model"] == "demo-base"

"""Images and videos as jobs: accepted, watched, cancelled, repeated, lost and found."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IMAGE, VIDEO
from tests.fakes import (
    PATIENCE_S,
    MediaPort,
    fails,
    painted,
    paints,
    raises,
    stays_silent,
)
from tests.http.answers import events, free_of_traps, refused, retry_after, unread
from worker.errors import EngineLost, OutOfDeviceMemory
from worker.front import app as app_module
from worker.front import media as media_module
from worker.front.media import wanted_wait_s
from worker.protocol.messages import Generate, JobRendered, Progress, RenderJob

FINAL = ("completed", "failed", "cancelled")
LOST = raises(EngineLost("the engine media process ended", retry_after_s=3))


def occupy(port: MediaPort) -> str:
    """Give the engine a job that it does not finish by itself; its id."""
    port.media.plays(stays_silent)
    job_id = port.accept()
    port.media.wait_sent(RenderJob)
    return job_id


def finish(port: MediaPort, job_id: str) -> None:
    """Let the engine finish the job that it has."""
    job = next(one for one in port.media.of(RenderJob) if one.request_id == job_id)
    port.media.emit(painted(job))
    port.wait(job_id, "completed")


def progress(port: MediaPort, job_id: str, step: int, phase: str = "denoise") -> None:
    port.media.emit(Progress(request_id=job_id, phase=phase, step=step, steps=15))


# --- accepting -----------------------------------------------------------------------------------


def test_a_job_is_accepted_with_where_to_watch_it(media: MediaPort) -> None:
    media.media.goes_away()

    answer = media.client.post("/generate", json={"prompt": "a red cube", "id": "j-1"})

    body = answer.get_json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == "/jobs/j-1"
    assert body["success"] is True
    assert body["job_id"] == "j-1"
    assert body["status"] == "queued"
    assert body["status_url"] == "/jobs/j-1"
    assert body["events_url"] == "/jobs/j-1/events"
    assert body["position"] == 0
    assert body["assets"] == []
    assert body["receipt"] is None
    assert body["error"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", body["created_at"])
    assert body["finished_at"] is None


def test_jobs_without_an_id_get_different_ones(media: MediaPort) -> None:
    first, second = media.accept(), media.accept()

    assert first != second
    assert re.fullmatch(r"[0-9a-f]{32}", first)


def test_a_job_in_the_shape_of_the_queue_reaches_the_engine_exactly(media: MediaPort) -> None:
    body = {
        "id": "6f1c",
        "job_id": "6f1c",
        "type": "sdxl_image_high",
        "job_type": "sdxl_image_high",
        "prompt": "  a red cube, {{style}} \n",
        "user_id": "u-1",
        "config": {
            "pipeline": "txt2img",
            "num_images": 3,
            "num_inference_steps": 30,
            "guidance_scale": 5.5,
            "resolution": "1024x576",
            "seed": 0,
        },
        "metadata": {"num_inference_steps": 25, "guidance_scale": 7.5, "destination": "x"},
        "negative_prompt": "",
        "compel_enabled": False,
        "quality": "high",
        "format": "image",
        "content_type": "sfw",
    }

    job_id = media.client.post("/generate", json=body).get_json()["job_id"]
    done = media.wait(job_id, *FINAL)

    (job,) = media.media.of(RenderJob)
    assert job_id == job.request_id == "6f1c"
    assert (job.model, job.output) == (IMAGE, "image")
    assert job.params.prompt == "  a red cube, {{style}} \n"
    assert job.params.negative_prompt == ""
    assert (job.params.width, job.params.height) == (1024, 576)
    assert (job.params.steps, job.params.guidance_scale) == (30, 5.5)
    assert (job.params.seed, job.params.num_images) == (0, 3)
    assert [asset["seed"] for asset in done["assets"]] == [0, 1, 2]
    assert done["receipt"]["ignored"] == [
        "config.pipeline",
        "content_type",
        "format",
        "metadata.destination",
        "metadata.guidance_scale",
        "metadata.num_inference_steps",
        "quality",
    ]


def test_a_finished_job_has_a_receipt_with_what_was_ignored_adjusted_and_spent(
    media: MediaPort,
) -> None:
    job_id = media.accept(type="video_fast", frames=83, seed=7, cache_bust=1)

    body = media.wait(job_id, *FINAL)

    (job,) = media.media.of(RenderJob)
    assert body["status"] == "completed"
    assert job.params.frames == 81
    assert body["receipt"] == {
        "request_id": job_id,
        "model": VIDEO,
        "seed": 7,
        "type": "video_fast",
        "seconds": {"denoise": 0.5, "decode": 0.25},
        "adjusted": {"frames": {"sent": 83, "used": 81}},
        "ignored": ["cache_bust"],
    }
    assert body["error"] is None
    assert body["error_code"] is None
    assert body["created_at"] <= body["started_at"] <= body["finished_at"]


@pytest.mark.parametrize(
    ("body", "status", "code", "text"),
    [
        ({}, 400, "invalid_request", "prompt"),
        ([], 400, "invalid_request", "prompt"),
        ("x", 400, "invalid_request", "prompt"),
        ({"type": "sdxl_image_fast"}, 400, "invalid_request", "prompt"),
        ({"prompt": 5}, 400, "invalid_request", "prompt"),
        ({"prompt": "x", "config": []}, 400, "invalid_request", "config"),
        ({"prompt": "x", "seed": "1"}, 400, "invalid_request", "seed"),
        ({"prompt": "x", "steps": 1.5}, 400, "invalid_request", "steps must be a whole number"),
        ({"prompt": "x", "size": "big"}, 400, "invalid_request", "WIDTHxHEIGHT"),
        ({"prompt": "x", "id": "a/b"}, 400, "invalid_request", "id"),
        ({"prompt": "x", "type": 5}, 400, "invalid_request", "type"),
        ({"prompt": "x", "type": "sound"}, 422, "unsupported", "sdxl_image_fast"),
        ({"prompt": "x", "type": "chat_enhance"}, 422, "unsupported", "/chat"),
        ({"prompt": "x", "model": "wan"}, 422, "unsupported", "sdxl"),
        ({"prompt": "x", "model": "gpt"}, 422, "unsupported", "known"),
        ({"prompt": "x", "scheduler": "magic"}, 422, "unsupported", "euler"),
        ({"prompt": "x", "image": "a.png"}, 400, "invalid_request", "image"),
        ({"prompt": "x", "exact_copy_mode": True}, 400, "invalid_request", "needs a picture"),
        (
            {"prompt": "x", "image": "https://e.org/a.png", "reference_type": "style"},
            422,
            "unsupported",
            "ip_adapter",
        ),
        (
            {"prompt": "x", "compel_enabled": True, "compel_weights": "(a:"},
            400,
            "invalid_request",
            "character 2",
        ),
        ({"prompt": "x", "loras": [{"id": "ink"}]}, 422, "unsupported", "no LoRA"),
        ({"prompt": "x", "user_id": "../x"}, 400, "invalid_request", "user_id"),
        (
            {"prompt": "x", "image": "user-library/u-2/a.png", "user_id": "u-1"},
            403,
            "reference_forbidden",
            "the folder of the job's own user_id",
        ),
        (
            {"prompt": "x", "image": "user-library/u-2/a.png"},
            403,
            "reference_forbidden",
            "has no user_id; send it",
        ),
        ({"prompt": "x", "webhook_url": "e.org"}, 400, "invalid_request", "webhook_url"),
        ({"prompt": "x", "steps": 0}, 422, "out_of_range", "from 1 to 150"),
        ({"prompt": "x", "steps": 151}, 422, "out_of_range", "from 1 to 150"),
        ({"prompt": "x", "guidance_scale": 31}, 422, "out_of_range", "from 0.0 to 30.0"),
        ({"prompt": "x", "guidance_scale": -1}, 422, "out_of_range", "from 0.0 to 30.0"),
        ({"prompt": "x", "seed": -1}, 422, "out_of_range", "from 0 to 2147483647"),
        ({"prompt": "x", "seed": 2**31}, 422, "out_of_range", "from 0 to 2147483647"),
        (
            {"prompt": "x", "seed": 2**31 - 1, "num_images": 3},
            422,
            "out_of_range",
            "from 0 to 2147483645",
        ),
        ({"prompt": "x", "num_images": 7}, 422, "out_of_range", "from 1 to 6"),
        ({"prompt": "x", "num_images": 0}, 422, "out_of_range", "from 1 to 6"),
        ({"prompt": "x", "width": 1023}, 422, "out_of_range", "multiples of 8"),
        ({"prompt": "x", "width": 0}, 422, "out_of_range", "multiples of 8"),
        ({"prompt": "x", "size": "1032x1024"}, 422, "out_of_range", "at most 1048576"),
        ({"prompt": "x", "type": "video", "frames": 82}, 422, "out_of_range", "4n + 1"),
        ({"prompt": "x", "type": "video", "frames": 85}, 422, "out_of_range", "to 81"),
        ({"prompt": "x", "type": "video", "fps": 0}, 422, "out_of_range", "from 1 to 60"),
        ({"prompt": "x", "type": "video", "shift": 21}, 422, "out_of_range", "from 0.1 to 20.0"),
        ({"prompt": "x", "type": "video", "size": "8x8"}, 422, "out_of_range", "multiples of 16"),
        ({"prompt": "x" * 5001}, 422, "out_of_range", "at most 5000"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_sent(
    media: MediaPort, body: Any, status: int, code: str, text: str
) -> None:
    answer = media.client.post("/generate", json=body)

    assert text in refused(answer, status, code)
    assert sum(media.desk.journal.counts().values()) == 0
    assert media.media.sent == []


@pytest.mark.parametrize(
    ("key", "value", "status"),
    [
        ("prompt", '"\\udc00"', 400),
        ("negative_prompt", '"a\\ud83d"', 400),
        ("type", '"\\udc00"', 422),
        ("title", '"\\udc00"', 202),
        ("\\ud83d", "1", 202),
        ("config", '{"note": "\\udc00"}', 202),
        ("metadata", '{"title": "\\ud83d", "\\udc00": 1}', 202),
    ],
)
def test_half_a_surrogate_pair_is_refused_where_it_counts_and_ignored_elsewhere(
    media: MediaPort, key: str, value: str, status: int
) -> None:
    """A client that cuts a title in the middle of an emoji sends such a half, escaped."""
    raw = f'{{"id": "j-1", "prompt": "x", "{key}": {value}}}'

    answer = media.client.post("/generate", data=raw, content_type="application/json")

    assert answer.status_code == status, answer.text
    assert status != 202 or media.wait("j-1", *FINAL)["status"] == "completed"


def test_a_deeply_nested_unknown_value_is_refused_or_ignored_and_never_a_bug(
    make_media: Callable[..., MediaPort],
) -> None:
    """Python reads JSON to another depth than it writes it."""
    port = make_media(media={"max_waiting": 1000})
    port.media.goes_away()

    statuses = set()
    for depth in (*range(90, 110), *range(700, 1000)):
        raw = f'{{"prompt": "x", "deep": {"[" * depth}{"]" * depth}}}'
        answer = port.client.post("/generate", data=raw, content_type="application/json")
        statuses.add(answer.status_code)
        if answer.status_code == 202:
            assert port.client.get(answer.headers["Location"]).status_code == 200

    assert statuses == {202, 400}


JOB = json.dumps({"prompt": "x"})


@pytest.mark.parametrize(
    ("method", "path", "body", "content_type", "status", "code"),
    [
        ("POST", "/generate", b"{", "application/json", 400, "invalid_request"),
        ("POST", "/generate", b"", "application/json", 400, "invalid_request"),
        ("POST", "/generate", b'{"seed": NaN}', "application/json", 400, "invalid_request"),
        ("POST", "/generate", b'{"a": "\xff"}', "application/json", 400, "invalid_request"),
        ("POST", "/generate", JOB, "text/plain", 415, "unsupported_media_type"),
        ("POST", "/generate", JOB + " " * 65_536, "application/json", 413, "too_large"),
        ("GET", "/generate", None, None, 405, "method_not_allowed"),
        ("PUT", "/jobs/x", None, None, 405, "method_not_allowed"),
        ("GET", "/jobs", None, None, 404, "not_found"),
        ("POST", "/chat", JOB, "application/json", 404, "not_found"),
        ("POST", "/wan/generate", JOB, "application/json", 404, "not_found"),
    ],
)
def test_what_is_no_request_is_refused(
    media: MediaPort,
    method: str,
    path: str,
    body: Any,
    content_type: str | None,
    status: int,
    code: str,
) -> None:
    answer = media.client.open(path, method=method, data=body, content_type=content_type)

    refused(answer, status, code)
    assert ("Allow" in answer.headers) == (status == 405)
    assert sum(media.desk.journal.counts().values()) == 0


# --- one job, one id -----------------------------------------------------------------------------


def test_the_same_id_with_the_same_body_is_the_same_job(media: MediaPort) -> None:
    body = {"prompt": "x", "id": "j-1", "cache": [1, {"b": 2}]}

    first = media.client.post("/generate", json=body)
    media.wait("j-1", *FINAL)
    again = media.client.post("/generate", json=dict(reversed(body.items())))

    assert first.status_code == 202
    assert "Idempotent-Replayed" not in first.headers
    assert again.status_code == 200
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.get_json()["status"] == "completed"
    assert len(media.media.of(RenderJob)) == 1


def test_the_same_key_with_the_same_body_is_the_same_job(media: MediaPort) -> None:
    key = {"Idempotency-Key": "once"}
    first = media.client.post("/generate", json={"prompt": "x"}, headers=key).get_json()
    again = media.client.post("/generate", json={"prompt": "x"}, headers=key)
    other = media.client.post("/generate", json={"prompt": "x"}).get_json()

    assert again.get_json()["job_id"] == first["job_id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert other["job_id"] != first["job_id"]


@pytest.mark.parametrize(
    ("body", "headers"), [({"id": "j-1"}, {}), ({}, {"Idempotency-Key": "once"})]
)
def test_the_same_id_or_key_with_another_body_is_a_conflict(
    media: MediaPort, body: dict[str, str], headers: dict[str, str]
) -> None:
    media.client.post("/generate", json={"prompt": "x"} | body, headers=headers)

    answer = media.client.post("/generate", json={"prompt": "y"} | body, headers=headers)

    refused(answer, 409, "conflict")
    assert sum(media.desk.journal.counts().values()) == 1


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_of_no_or_too_many_characters_is_refused(media: MediaPort, key: str) -> None:
    answer = media.client.post("/generate", json={"prompt": "x"}, headers={"Idempotency-Key": key})

    assert "1 to 255" in refused(answer, 400, "invalid_request")


# --- waiting -------------------------------------------------------------------------------------


def test_a_client_that_prefers_to_wait_gets_the_finished_job(media: MediaPort) -> None:
    answer = media.client.post(
        "/generate", json={"prompt": "x"}, headers={"Prefer": "respond-async, wait=5"}
    )

    assert answer.status_code == 200
    assert answer.headers["Preference-Applied"] == "wait=5"
    assert answer.get_json()["status"] == "completed"
    assert len(answer.get_json()["assets"]) == 1


def test_a_client_waits_no_longer_than_it_said(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "MAX_WAIT_S", 0.05)
    media.media.goes_away()

    answer = media.client.post("/generate", json={"prompt": "x"}, headers={"Prefer": "wait=5"})

    assert answer.status_code == 202
    assert answer.get_json()["status"] == "queued"


def test_a_failed_job_ends_the_wait(media: MediaPort) -> None:
    media.media.plays(raises(OutOfDeviceMemory("no room for 3 images")))

    answer = media.client.post("/generate", json={"prompt": "x"}, headers={"Prefer": "wait=5"})

    assert answer.status_code == 200
    assert answer.get_json()["status"] == "failed"


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("respond-async", 0),
        ("wait=0", 0),
        ("wait=5", 5),
        ('wait="5"', 5),
        ("wait = 5", 5),
        ("Wait=5", 5),
        ("respond-async,wait=5", 5),
        ("respond-async; foo=bar, wait=10, x", 10),
        ("wait=89", 89),
        ("wait=90", 90),
        ("wait=91", 90),
        ("wait=3600", 90),
        ("wait=" + "9" * 400, 90),
        ("wait=-5", 0),
        ("wait=soon", 0),
        ("await=5", 0),
        ("wait", 0),
    ],
)
def test_no_answer_is_held_longer_than_a_proxy_allows(prefer: str | None, seconds: float) -> None:
    assert wanted_wait_s(prefer) == seconds


def test_a_wait_is_cut_to_what_a_proxy_allows_and_says_so(media: MediaPort) -> None:
    answer = media.client.post("/generate", json={"prompt": "x"}, headers={"Prefer": "wait=600"})

    assert answer.headers["Preference-Applied"] == "wait=90"


# --- watching ------------------------------------------------------------------------------------


def test_a_job_is_watched_from_the_queue_to_its_end(media: MediaPort) -> None:
    first = occupy(media)
    second = media.accept(prompt="y")
    queued = media.wait(second, "queued")
    progress(media, first, 4)
    running = media.wait_step(first, 4)

    finish(media, first)

    assert (queued["position"], queued["started_at"]) == (0, None)
    assert (running["phase"], running["step"], running["steps"]) == ("denoise", 4, 15)
    assert running["position"] is None
    assert media.wait(second, *FINAL)["status"] == "completed"
    assert [job.request_id for job in media.media.of(RenderJob)] == [first, second]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs/nobody"),
        ("DELETE", "/jobs/nobody"),
        ("GET", "/jobs/nobody/events"),
        ("GET", "/jobs/nobody/assets/0"),
        ("GET", "/jobs/nobody/assets/0/thumbnail"),
        ("GET", "/jobs/banana"),
    ],
)
def test_a_job_that_nobody_made_is_not_found(media: MediaPort, method: str, path: str) -> None:
    answer = media.client.open(path, method=method)

    refused(answer, 404, "not_found")


def test_events_tell_every_stage_and_end_when_the_job_does(media: MediaPort) -> None:
    job_id = occupy(media)

    coming = events(media.client.get(f"/jobs/{job_id}/events"))

    seen = [next(coming)]
    for step in (1, 7):
        progress(media, job_id, step)
        while seen[-1]["step"] != step:
            seen.append(next(coming))
    finish(media, job_id)
    *more, last, done = coming
    assert [one["status"] for one in [*seen, *more]] == ["processing"] * len([*seen, *more])
    assert seen[-1]["phase"] == "denoise"
    assert last == media.client.get(f"/jobs/{job_id}").get_json()
    assert last["status"] == "completed"
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("script", "status"),
    [(paints(), "completed"), (fails("engine_failed", 500, "broken"), "failed")],
)
def test_events_of_a_finished_job_are_its_end(media: MediaPort, script: Any, status: str) -> None:
    media.media.plays(script)
    job_id = media.accept()
    media.wait(job_id, *FINAL)

    answer = media.client.get(f"/jobs/{job_id}/events")

    last, done = events(answer)
    assert answer.mimetype == "text/event-stream"
    assert last["status"] == status
    assert done == "[DONE]"


def test_quiet_events_are_kept_open_with_comments(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "WATCH_EVERY_S", 0.01)
    monkeypatch.setattr(media_module, "COMMENT_EVERY_S", 0.0)
    job_id = occupy(media)
    answer = media.client.get(f"/jobs/{job_id}/events")

    chunks = answer.iter_encoded()
    first, second = next(chunks), next(chunks)

    answer.close()
    finish(media, job_id)
    assert first.startswith(b"data: ")
    assert second == b": still there\n\n"


def test_watchers_beyond_the_bound_are_refused_and_a_closed_one_makes_room(
    make_media: Callable[..., MediaPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "MAX_WATCHERS", 1)
    port = make_media()
    job_id = occupy(port)
    watching = port.client.get(f"/jobs/{job_id}/events")

    one_more = port.client.get(f"/jobs/{job_id}/events")
    plain = port.client.get(f"/jobs/{job_id}")
    waiting = port.client.post("/generate", json={"prompt": "y"}, headers={"Prefer": "wait=9"})
    watching.close()
    after = port.client.get(f"/jobs/{job_id}/events")

    after.close()
    finish(port, job_id)
    refused(one_more, 429, "busy")
    assert retry_after(one_more) >= 1
    assert plain.status_code == 200
    assert waiting.status_code == 202
    assert after.status_code == 200


def test_events_that_are_closed_before_they_are_read_free_their_place(
    make_media: Callable[..., MediaPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "MAX_WATCHERS", 1)
    port = make_media()
    job_id = port.accept()
    port.wait(job_id, *FINAL)
    unwatched = unread(port.app, "GET", f"/jobs/{job_id}/events")
    before = port.client.get(f"/jobs/{job_id}/events").status_code

    unwatched.close()

    assert before == 429
    assert port.client.get(f"/jobs/{job_id}/events").status_code == 200


def test_a_waiting_client_that_hangs_up_gives_its_place_back_and_keeps_its_job(
    make_media: Callable[..., MediaPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "MAX_WATCHERS", 1)
    port = make_media()
    port.media.plays(stays_silent)
    mine, theirs = socket.socketpair()
    theirs.close()

    with closing(mine):
        answer = port.client.post(
            "/generate",
            json={"prompt": "x", "id": "j-1"},
            headers={"Prefer": "wait=90"},
            environ_overrides={"gunicorn.socket": mine},
        )
    port.media.wait_sent(RenderJob)
    with port.client.get("/jobs/j-1/events") as watching:
        status = watching.status_code

    finish(port, "j-1")
    assert answer.status_code == 202
    assert status == 200
    assert port.media.cancelled == []


def test_events_end_when_the_client_hangs_up_and_the_job_goes_on(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "WATCH_EVERY_S", 0.01)
    job_id = occupy(media)
    mine, theirs = socket.socketpair()

    with closing(mine):
        coming = events(
            media.client.get(f"/jobs/{job_id}/events", environ_overrides={"gunicorn.socket": mine})
        )
        first = next(coming)
        theirs.close()
        rest = list(coming)

    finish(media, job_id)
    assert first["status"] == "processing"
    assert rest == []
    assert media.media.cancelled == []


# --- cancelling ----------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once_and_never_sent(media: MediaPort) -> None:
    running = occupy(media)
    queued = media.accept(prompt="y")

    answer = media.client.delete(f"/jobs/{queued}")

    finish(media, running)
    assert answer.status_code == 200
    assert answer.get_json()["status"] == "cancelled"
    assert answer.get_json()["error_code"] == "cancelled"
    assert media.media.cancelled == []
    assert [job.request_id for job in media.media.of(RenderJob)] == [running]


def test_a_running_job_is_cancelled_in_the_engine(media: MediaPort) -> None:
    job_id = occupy(media)

    answer = media.client.delete(f"/jobs/{job_id}")

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["status"] == "cancelled"
    assert body["receipt"] is None
    assert body["assets"] == []
    assert job_id in media.media.cancelled


def test_a_running_job_that_cannot_stop_yet_is_202_and_stops_later(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "CANCEL_WAIT_S", 0.01)
    media.media.obeys_cancel = False
    job_id = occupy(media)

    answer = media.client.delete(f"/jobs/{job_id}")

    media.media.wait_cancelled(job_id)
    media.media.emit(fails("cancelled", 499)(media.media.of(RenderJob)[0])[0])  # type: ignore[index]
    assert answer.status_code == 202
    assert answer.get_json()["status"] == "processing"
    assert media.wait(job_id, *FINAL)["status"] == "cancelled"


@pytest.mark.parametrize(
    ("script", "status"), [(paints(), "completed"), (fails("engine_failed", 500), "failed")]
)
def test_cancelling_a_finished_job_changes_nothing(
    media: MediaPort, script: Any, status: str
) -> None:
    media.media.plays(script)
    job_id = media.accept()
    before = media.wait(job_id, *FINAL)

    answer = media.client.delete(f"/jobs/{job_id}")

    assert answer.status_code == 200
    assert answer.get_json() == before
    assert before["status"] == status
    assert media.media.cancelled == []


def test_cancelling_works_while_every_watcher_is_taken(
    make_media: Callable[..., MediaPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is cancelled either way; an answer of 429 would tell the client otherwise."""
    monkeypatch.setattr(app_module, "MAX_WATCHERS", 1)
    port = make_media()
    running = occupy(port)
    queued = port.accept(prompt="y")
    watching = port.client.get(f"/jobs/{running}/events")

    answer = port.client.delete(f"/jobs/{queued}")

    watching.close()
    cancelled = port.wait(queued, *FINAL)
    finish(port, running)
    assert answer.status_code in (200, 202)
    assert cancelled["status"] == "cancelled"
    assert [job.request_id for job in port.media.of(RenderJob)] == [running]


def test_a_job_whose_engine_dies_after_a_cancel_does_not_begin_anew(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "CANCEL_WAIT_S", 0.01)
    media.media.obeys_cancel = False
    job_id = occupy(media)
    media.client.delete(f"/jobs/{job_id}")
    (job,) = media.media.of(RenderJob)

    media.media.emit(LOST(job)[0])  # type: ignore[index]

    assert media.wait(job_id, *FINAL)["status"] == "cancelled"
    assert len(media.media.of(RenderJob)) == 1


# --- engines that fail ---------------------------------------------------------------------------


def test_a_failed_job_carries_its_error(media: MediaPort) -> None:
    media.media.plays(fails("out_of_device_memory", 503, "8 MiB are missing"))

    body = media.wait(media.accept(), *FINAL)

    assert body["status"] == "failed"
    assert body["error"] == "8 MiB are missing"
    assert body["error_code"] == "out_of_device_memory"
    assert body["receipt"] is None
    assert body["assets"] == []
    assert body["finished_at"] is not None


def test_a_failed_job_never_shows_a_word_that_a_client_misreads(media: MediaPort) -> None:
    media.media.plays(fails("engine_failed", 500, "NaN in the latents"))

    body = media.wait(media.accept(id="j-1"), *FINAL)

    assert free_of_traps(json.dumps(body).encode())
    assert body["error_code"] == "engine_failed"


def test_a_job_begins_anew_when_its_engine_dies_once(media: MediaPort) -> None:
    media.media.plays(LOST)

    job_id = media.accept(seed=4)
    body = media.wait(job_id, *FINAL)

    first, second = media.media.of(RenderJob)
    assert body["status"] == "completed"
    assert first == second
    assert body["error"] is None


def test_a_job_fails_when_its_engine_dies_twice(media: MediaPort) -> None:
    media.media.plays(LOST, LOST)

    body = media.wait(media.accept(), *FINAL)

    assert body["status"] == "failed"
    assert body["error_code"] == "engine_lost"
    assert "ended" in body["error"]
    assert len(media.media.of(RenderJob)) == 2


def test_a_job_waits_for_an_engine_that_is_away_and_the_wait_costs_no_attempt(
    media: MediaPort,
) -> None:
    media.media.goes_away()
    job_id = media.accept()
    media.media.plays(LOST)
    queued = media.wait(job_id, "queued")

    media.media.comes_back()

    assert queued["status"] == "queued"
    assert media.wait(job_id, *FINAL)["status"] == "completed"


def test_an_engine_that_refuses_because_it_starts_costs_no_attempt(media: MediaPort) -> None:
    starting = fails("engine_unavailable", 503, "starting")
    media.media.plays(starting, starting, starting, LOST)

    body = media.wait(media.accept(), *FINAL)

    assert body["status"] == "completed"
    assert len(media.media.of(RenderJob)) == 5


def test_a_bug_in_the_runner_fails_the_job_and_not_the_next_one(
    media: MediaPort, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing_staged(job: RenderJob) -> list[JobRendered]:
        return [JobRendered(request_id=job.request_id, assets=(), receipt={}, seconds={})]

    media.media.plays(nothing_staged)

    first = media.wait(media.accept(), *FINAL)
    second = media.wait(media.accept(prompt="y"), *FINAL)

    assert first["status"] == "failed"
    assert first["error_code"] == "internal_error"
    assert second["status"] == "completed"
    assert "DamagedResult" in caplog.text


def test_a_full_queue_refuses_with_when_to_come_back(
    make_media: Callable[..., MediaPort],
) -> None:
    port = make_media(media={"max_waiting": 2})
    running = occupy(port)
    port.accept(prompt="1")
    port.accept(prompt="2", id="j-2")

    answer = port.client.post("/generate", json={"prompt": "3"})
    again = port.client.post("/generate", json={"prompt": "2", "id": "j-2"})

    finish(port, running)
    assert "2 jobs are waiting" in refused(answer, 429, "busy")
    assert retry_after(answer) >= 1
    assert again.status_code == 202


def test_a_draining_port_takes_no_job_and_still_shows_the_old_ones(media: MediaPort) -> None:
    job_id = media.accept()
    media.wait(job_id, *FINAL)
    media.drainer.begin(9.0)

    answer = media.client.post("/generate", json={"prompt": "x"})

    refused(answer, 503, "draining")
    assert 8 <= retry_after(answer) <= 9
    assert media.client.get(f"/jobs/{job_id}").status_code == 200
    assert media.fetch(f"/jobs/{job_id}/assets/0").status_code == 200


def test_jobs_are_no_business_of_the_chat_engine(media: MediaPort) -> None:
    media.link.goes_away()

    body = media.wait(media.accept(), *FINAL)

    assert body["status"] == "completed"
    assert media.link.of(Generate) == []


# --- files ---------------------------------------------------------------------------------------


def test_assets_and_thumbnails_are_served_with_type_and_tag(media: MediaPort) -> None:
    job_id = media.accept(num_images=2, seed=9)
    body = media.wait(job_id, *FINAL)

    first, second = body["assets"]
    image = media.fetch(second["url"])
    thumbnail = media.fetch(second["thumbnail_url"])

    assert (first["index"], second["index"]) == (0, 1)
    assert second["seed"] == 10
    assert second["url"] == f"/jobs/{job_id}/assets/1"
    assert image.status_code == 200
    assert image.mimetype == "image/png"
    assert image.data.startswith(b"\x89PNG")
    assert len(image.data) == second["size_bytes"]
    assert image.headers["ETag"] == f'"{second["sha256"]}"'
    assert thumbnail.mimetype == "image/webp"
    assert thumbnail.data.endswith(b"WEBP\x01")
    assert thumbnail.headers["ETag"] != image.headers["ETag"]


def test_a_video_says_how_long_it_is(media: MediaPort) -> None:
    job_id = media.accept(type="video", frames=17, fps=8)
    (asset,) = media.wait(job_id, *FINAL)["assets"]

    answer = media.fetch(asset["url"])

    assert answer.mimetype == "video/mp4"
    assert (asset["type"], asset["frame_num"], asset["fps"]) == ("video", 17, 8)
    assert asset["duration_s"] == 17 / 8


def test_an_image_says_nothing_of_frames(media: MediaPort) -> None:
    (asset,) = media.wait(media.accept(), *FINAL)["assets"]

    assert not {"frame_num", "fps", "duration_s"} & set(asset)


@pytest.mark.parametrize(
    ("wanted", "part"),
    [("bytes=0-3", slice(0, 4)), ("bytes=100-", slice(100, None)), ("bytes=-5", slice(-5, None))],
)
def test_a_part_of_a_file_can_be_asked_for(media: MediaPort, wanted: str, part: slice) -> None:
    media.media.plays(paints(bytes(range(256))))
    job_id = media.accept()
    media.wait(job_id, *FINAL)
    whole = media.fetch(f"/jobs/{job_id}/assets/0").data

    answer = media.fetch(f"/jobs/{job_id}/assets/0", headers={"Range": wanted})

    assert answer.status_code == 206
    assert answer.data == whole[part]
    assert answer.headers["Content-Range"].endswith(f"/{len(whole)}")
    assert answer.headers["Accept-Ranges"] == "bytes"


def test_a_part_beyond_the_end_is_refused(media: MediaPort) -> None:
    job_id = media.accept()
    media.wait(job_id, *FINAL)

    answer = media.fetch(f"/jobs/{job_id}/assets/0", headers={"Range": "bytes=9999999-"})

    refused(answer, 416, "refused")


def test_a_file_that_the_client_has_is_not_sent_again(media: MediaPort) -> None:
    job_id = media.accept()
    media.wait(job_id, *FINAL)
    tag = media.fetch(f"/jobs/{job_id}/assets/0").headers["ETag"]

    answer = media.fetch(f"/jobs/{job_id}/assets/0", headers={"If-None-Match": tag})

    assert answer.status_code == 304
    assert answer.data == b""


@pytest.mark.parametrize("path", ["assets/1", "assets/99", "assets/1/thumbnail"])
def test_an_asset_that_the_job_has_not_is_not_found(media: MediaPort, path: str) -> None:
    job_id = media.accept()
    media.wait(job_id, *FINAL)

    answer = media.client.get(f"/jobs/{job_id}/{path}")

    assert "1 assets" in refused(answer, 404, "not_found")


@pytest.mark.parametrize("path", ["assets/-1", "assets/x", "assets/0/", "assets/..%2f..%2fx"])
def test_an_address_that_is_no_asset_is_not_found(media: MediaPort, path: str) -> None:
    job_id = media.accept()
    media.wait(job_id, *FINAL)

    answer = media.client.get(f"/jobs/{job_id}/{path}")

    refused(answer, 404, "not_found")


def test_an_unfinished_job_has_no_assets_yet(media: MediaPort) -> None:
    job_id = occupy(media)

    answer = media.client.get(f"/jobs/{job_id}/assets/0")

    finish(media, job_id)
    assert "processing" in refused(answer, 404, "not_found")


def files(root: Path) -> set[str]:
    """Names of published files, and of jobs that have a folder of their own."""
    jobs = root / "jobs"
    return {path.name for path in (*jobs.glob("results/??/*"), *jobs.glob("work/*"))}


def until_forgotten(port: MediaPort, job_id: str) -> None:
    """The runner forgets old jobs after it has said that a new one is done."""
    ends, seen = time.monotonic() + PATIENCE_S, 0
    while port.client.get(f"/jobs/{job_id}").status_code != 404:
        assert time.monotonic() < ends
        seen = port.desk.bell.wait(seen, 0.01)


def test_only_the_newest_finished_jobs_and_their_files_are_kept(
    make_media: Callable[..., MediaPort],
) -> None:
    port = make_media(media={"keep_finished": 2})
    port.media.plays(*(paints(bytes([number])) for number in range(4)))
    ids, published = [], []
    for number in range(4):
        ids.append(port.accept(prompt=str(number)))
        (asset,) = port.wait(ids[-1], *FINAL)["assets"]
        thumbnail = port.fetch(asset["thumbnail_url"]).headers["ETag"].strip('"')
        published.append({asset["sha256"], thumbnail})
    until_forgotten(port, ids[1])

    statuses = [port.client.get(f"/jobs/{job_id}").status_code for job_id in ids]

    port.runner.close()  # it removes files after it has forgotten the job
    assert statuses == [404, 404, 200, 200]
    assert files(port.settings.state_dir) == published[2] | published[3]


def test_a_key_is_free_again_when_its_job_is_gone(make_media: Callable[..., MediaPort]) -> None:
    port = make_media(media={"keep_finished": 1})
    key = {"Idempotency-Key": "once"}
    first = port.client.post("/generate", json={"prompt": "x"}, headers=key).get_json()
    port.wait(first["job_id"], *FINAL)
    port.wait(port.accept(prompt="another"), *FINAL)
    until_forgotten(port, first["job_id"])

    answer = port.client.post("/generate", json={"prompt": "other"}, headers=key)

    assert answer.status_code == 202
    assert answer.get_json()["job_id"] != first["job_id"]


def test_failed_and_cancelled_jobs_leave_no_files(media: MediaPort) -> None:
    def fails_late(job: RenderJob) -> Any:
        painted(job)
        return fails("engine_failed", 500)(job)

    media.media.plays(fails_late)
    media.wait(media.accept(), "failed")
    media.client.delete(f"/jobs/{occupy(media)}")
    media.runner.close()

    assert files(media.settings.state_dir) == set()


# --- another process, and a full disk ------------------------------------------------------------


def test_finished_jobs_and_their_files_outlive_the_process_that_made_them(
    make_media: Callable[..., MediaPort],
) -> None:
    first = make_media()
    job_id = first.accept(num_images=2, seed=9)
    before = first.wait(job_id, *FINAL)
    data = first.fetch(before["assets"][1]["url"]).data
    first.runner.close()
    first.desk.journal.close()

    port = make_media()

    after = port.client.get(f"/jobs/{job_id}").get_json()
    assert after == before
    assert port.fetch(after["assets"][1]["url"]).data == data
    assert port.fetch(after["assets"][0]["thumbnail_url"]).status_code == 200
    assert port.media.sent == []


def test_jobs_that_have_not_ended_go_on_in_the_next_process(
    make_media: Callable[..., MediaPort],
) -> None:
    first = make_media()
    running = occupy(first)
    key = {"Idempotency-Key": "once"}
    waiting = first.client.post("/generate", json={"prompt": "y"}, headers=key).get_json()
    first.runner.close()
    first.desk.journal.close()

    port = make_media()

    again = port.client.post("/generate", json={"prompt": "y"}, headers=key).get_json()
    assert again["job_id"] == waiting["job_id"]
    for job_id in (running, waiting["job_id"]):
        assert port.wait(job_id, *FINAL)["status"] == "completed"
    assert [job.request_id for job in port.media.of(RenderJob)] == [running, waiting["job_id"]]


def test_files_that_belong_to_no_job_go_at_the_start(
    make_media: Callable[..., MediaPort], tmp_path: Path
) -> None:
    jobs = tmp_path / "state" / "jobs"
    for folder in (jobs / "results" / "ab", jobs / "work" / "nobody" / "files"):
        folder.mkdir(parents=True)
        (folder / ("ab" * 32)).write_bytes(b"x")

    port = make_media()

    assert files(port.settings.state_dir) == set()


def test_a_job_that_cannot_be_written_down_is_refused_and_can_be_sent_again(
    media: MediaPort,
) -> None:
    job_id = media.accept()
    media.wait(job_id, *FINAL)
    database = media.desk.journal._database._connection("write")
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    body = {"prompt": "x", "id": "j-1", "note": "n" * 50_000}

    answer = media.client.post("/generate", json=body)
    meanwhile = media.client.get(f"/jobs/{job_id}")
    database.execute(f"PRAGMA max_page_count = {pages + 1000}")
    again = media.client.post("/generate", json=body)

    assert "disk is full" in refused(answer, 503, "journal_unavailable")
    assert retry_after(answer) == 5
    assert meanwhile.status_code == 200
    assert again.status_code == 202
    assert media.wait("j-1", *FINAL)["status"] == "completed"

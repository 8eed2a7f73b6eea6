"""Jobs over HTTP: queue-job to job-callback, who sees which job, and bodies that mean harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from gateway.errors import QueueUnavailable, has_trap_word
from gateway.jobs.signatures import Signatures
from tests.gateway.fake_worker import FakeWorker
from tests.gateway.flow_parts import (
    OTHER,
    OWN_SECRET,
    SHARED_SECRET,
    USER,
    KeptQueue,
    Routes,
    sign,
)
from tests.gateway.test_jobs_callback import bodies

CALLBACK, WEBHOOK = "X-Callback-Signature", "X-Webhook-Signature"
JOB: dict[str, Any] = {"job_type": "sdxl_image_fast", "prompt": "a swordfish on a plate"}
PATIENT: Any = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@pytest.fixture(scope="module")
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as made:
        yield made


@pytest.fixture(scope="module")
def routes(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, worker: FakeWorker
) -> Iterator[Routes]:
    made = Routes(tmp_path_factory.mktemp("routes"), migrated_sqlite, worker.url)
    yield made
    made.close()


@pytest.fixture
def queue(routes: Routes) -> KeptQueue:
    assert routes.queue is not None
    routes.queue.pushed.clear()
    routes.queue.error = None
    return routes.queue


def queued(routes: Routes, **fields: Any) -> Any:
    answer = routes.ask("POST", "/functions/v1/queue-job", "user", {**JOB, **fields})
    assert answer.status_code == 200, answer.json
    return answer.json


def call_back(routes: Routes, body: dict[str, Any]) -> Any:
    raw = json.dumps(body).encode()
    return routes.call_back(raw, sign(SHARED_SECRET, raw), CALLBACK)


def seen(routes: Routes, job_id: str, who: str = "user") -> Any:
    return routes.ask("GET", f"/jobs/{job_id}", who)


# --- the chain ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/functions/v1/queue-job", "/queue-job"])
def test_from_queue_job_to_job_callback_with_three_pictures(
    routes: Routes, queue: KeptQueue, path: str
) -> None:
    body = {**JOB, "enhance": True, "num_images": 3, "seed": 0}
    answer = routes.ask("POST", path, "user", body).json
    assert answer is not None
    (list_name, element) = queue.pushed[0]

    job_id = answer["jobId"]
    assets = [{"type": "image", "url": f"{USER}/{job_id}/{n}.png", "metadata": {"seed": n}}
              for n in range(3)]  # fmt: skip
    ended = call_back(routes, {"job_id": job_id, "status": "completed", "assets": assets})

    assert (list_name, answer["queueName"]) == ("sdxl_queue", "sdxl_queue")
    assert element["prompt"] == answer["prompt"] == "a red circle on white paper"
    assert element["config"]["seed"] == 0
    assert (ended.status_code, ended.json["status"]) == (200, "completed")
    job = seen(routes, job_id).json["job"]
    assert job["status"] == "completed"
    assert [(one["asset_index"], one["generation_seed"]) for one in job["assets"]] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    assert "webhook_secret" not in json.dumps(job)
    assert "payload" not in job


def test_process_job_goes_to_a_worker_whose_webhook_ends_it(
    routes: Routes, queue: KeptQueue, worker: FakeWorker
) -> None:
    answer = routes.ask("POST", "/process-job", "user", {**JOB, "seed": 7}).json
    assert answer is not None
    job_id = answer["jobId"]
    posted = worker.jobs[job_id]

    raw = json.dumps(
        {
            "event": "job.completed",
            "job_id": job_id,
            "sequence": 1,
            "status": "completed",
            "assets": [{"url": f"/jobs/{job_id}/assets/0", "type": "image", "seed": 7}],
        }
    ).encode()
    ended = routes.call_back(raw, sign(posted["webhook_secret"], raw), WEBHOOK)

    assert (answer["queueName"], queue.pushed) == ("http", [])
    assert posted["webhook_url"] == "http://gateway:7862/functions/v1/job-callback"
    assert ended.status_code == 200
    (asset,) = seen(routes, job_id).json["job"]["assets"]
    assert asset["temp_storage_path"] == f"{worker.url}/jobs/{job_id}/assets/0"


def test_a_queue_that_is_gone_is_503_and_the_job_has_failed(
    routes: Routes, queue: KeptQueue
) -> None:
    queue.error = QueueUnavailable("the queue is gone", retry_after_s=5.0)

    answer = routes.ask("POST", "/queue-job", "user", JOB)

    assert answer.status_code == 503
    assert answer.json is not None
    assert (answer.json["error_code"], answer.headers["Retry-After"]) == ("queue_unavailable", "5")
    assert seen(routes, answer.json["jobId"]).json["job"]["status"] == "failed"


# --- fields -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"contentType": "sfw"}, "content_type", "sfw"),
        ({"content_type": "sfw"}, "content_type", "sfw"),
        ({"content_mode": "nsfw"}, "content_type", "sfw"),  # this user may not
        ({"metadata": {"contentType": "sfw"}}, "content_type", "sfw"),
        ({"seed": False}, "seed", None),
        ({"seed": 0}, "seed", 0),
        ({"seed": None}, "seed", None),
        ({"resolution": "768*512"}, "resolution", "768x512"),
        ({"enhanced_prompt": "mine"}, "prompt", "mine"),
        ({"enhanced_prompt": ""}, "prompt", JOB["prompt"]),
        ({"enhanced_prompt": " "}, "prompt", JOB["prompt"]),
        ({"bypass_enhancement": True, "enhance": True}, "prompt", JOB["prompt"]),
        ({"hard_override": True, "enhance": True}, "prompt", JOB["prompt"]),
        ({"enhance": False}, "prompt", JOB["prompt"]),
        ({"enhance": True}, "prompt", "a red circle on white paper"),
        ({"workspace": "x", "project_id": None, "odd": {"a": [1]}}, "prompt", JOB["prompt"]),
        ({"num_images": 2}, "num_images", 3),
        ({"steps": 9, "guidance_scale": 0}, "num_inference_steps", 9),
        ({"compel_enabled": True, "compel_weights": {"a": 1.2}}, "compel_weights", {"a": 1.2}),
    ],
)
def test_fields_of_existing_clients(
    routes: Routes, queue: KeptQueue, fields: dict[str, Any], name: str, value: Any
) -> None:
    queued(routes, **fields)

    ((_, element),) = queue.pushed
    assert element.get(name, element["config"].get(name)) == value


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"job_type": "rv51_fast"}, 400),
        ({"job_type": None}, 400),
        ({"prompt": " "}, 422),
        ({"seed": -1}, 422),
        ({"seed": 2**31}, 422),
        ({"steps": 0}, 422),
        ({"guidance_scale": 31}, 422),
        ({"denoise_strength": 1.1}, 422),
        ({"resolution": "big"}, 422),
        ({"contentType": "odd"}, 422),
        ({"metadata": {"contentType": ["sfw"]}}, 422),
        ({"metadata": {"guidance_scale": "swordfish"}}, 422),
        ({"metadata": []}, 400),
        ({"prompt": "swordfish" * 3000}, 413),
        ({"reference_image_url": f"user-library/{USER}/../a.png"}, 422),
    ],
)
def test_a_refused_job_leaves_nothing(
    routes: Routes, queue: KeptQueue, fields: dict[str, Any], status: int
) -> None:
    answer = routes.ask("POST", "/queue-job", "user", {**JOB, **fields})

    assert answer.status_code == status, answer.json
    assert queue.pushed == []
    text = answer.get_data(as_text=True)
    assert "swordfish" not in text
    assert not has_trap_word(text)


def test_another_users_picture_has_the_code_that_clients_know(
    routes: Routes, queue: KeptQueue
) -> None:
    body = {**JOB, "reference_image_url": f"user-library/{OTHER}/a.png"}

    answer = routes.ask("POST", "/queue-job", "user", body)

    assert answer.status_code == 403
    assert answer.json is not None
    assert (answer.json["success"], answer.json["code"]) == (False, "CROSS_USER_REFERENCE")


# --- own jobs -----------------------------------------------------------------------------------


def test_a_user_sees_and_cancels_own_jobs_only(routes: Routes, queue: KeptQueue) -> None:
    job_id = queued(routes)["jobId"]

    mine = routes.ask("GET", "/jobs?limit=1", "user").json
    theirs = routes.ask("GET", "/jobs", "other user").json
    assert mine is not None
    assert theirs is not None
    assert [one["id"] for one in mine["jobs"]] == [job_id]
    assert theirs["jobs"] == []
    assert seen(routes, job_id, "other user").status_code == 404
    assert routes.ask("DELETE", f"/jobs/{job_id}", "other user").status_code == 404
    assert seen(routes, job_id).json["job"]["status"] == "queued"
    assert routes.ask("DELETE", f"/jobs/{job_id}", "user").status_code == 200
    assert routes.ask("DELETE", f"/jobs/{job_id}", "user").status_code == 409
    assert call_back(routes, {"job_id": job_id, "status": "completed"}).json["skipped"] is True


@pytest.mark.parametrize("path", ["/jobs", "/jobs/x"])
def test_jobs_need_a_user(routes: Routes, path: str) -> None:
    assert routes.ask("GET", path, None).status_code == 401
    assert routes.ask("GET", path, "viewer").status_code == 403
    assert routes.ask("GET", path, "call").status_code == 403


@pytest.mark.parametrize("job_id", ["nothing", "a%00b", "a" * 37, "%ff"])
def test_an_id_of_no_job_is_an_error_of_the_caller(routes: Routes, job_id: str) -> None:
    assert seen(routes, job_id).status_code in (400, 404, 422)


# --- callbacks ----------------------------------------------------------------------------------


def test_a_callback_is_open_to_who_can_sign_it(routes: Routes, queue: KeptQueue) -> None:
    job_id = queued(routes)["jobId"]
    other = queued(routes)["jobId"]
    signatures = Signatures(OWN_SECRET, None)
    raw = json.dumps({"job_id": job_id, "status": "failed", "error": "no"}).encode()
    right = sign(SHARED_SECRET, raw)
    upper = "sha256=" + right.removeprefix("sha256=").upper()
    changed = raw.replace(b"no", b"on")

    refused = [
        routes.call_back(raw, None, CALLBACK),
        routes.call_back(raw, "", CALLBACK),
        routes.call_back(raw, "sha256=00", CALLBACK),
        routes.call_back(raw, upper, CALLBACK),
        routes.call_back(changed, right, CALLBACK),
        routes.call_back(raw + b" ", right, CALLBACK),
        routes.call_back(raw, right, WEBHOOK),
        routes.call_back(raw, sign(signatures.secret_of(other), raw), WEBHOOK),
        routes.call_back(raw, sign(signatures.secret_of(job_id), raw), CALLBACK),
        routes.ask("POST", "/job-callback", "service", json.loads(raw)),
    ]

    assert [one.status_code for one in refused] == [401] * len(refused)
    assert seen(routes, job_id).json["job"]["status"] == "queued"
    assert routes.call_back(raw, right, CALLBACK).status_code == 200
    assert seen(routes, job_id).json["job"]["error_message"] == "no"


def test_the_callback_route_answers_as_the_function_does(routes: Routes) -> None:
    path = "/functions/v1/job-callback"

    assert routes.client.options(path).status_code == 200
    assert routes.client.get(path).status_code == 405
    assert call_back(routes, {"status": "completed"}).status_code == 400
    assert call_back(routes, {"job_id": "unknown", "status": "completed"}).json == {
        "success": True,
        "skipped": True,
        "jobId": "unknown",
        "message": "there is no such job",
    }


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"job_id": "a\\u0000", "status": "completed"}',
        b'{"job_id": "\\ud800", "status": "completed"}',
        b'{"job_id": "a", "status": "completed", "metadata": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"job_id": "a", "status": "completed", "metadata": {"a": NaN}}',
        b'{"job_id": "a", "status": "completed", "metadata": {"a": 1e999}}',
        b'{"job_id": "a", "status": "completed", "assets": [' + b"{}," * 20000 + b"{}]}",
        b'{"job_id": "a", "status": "completed", "assets": "' + b"a" * 70000 + b'"}',
        b'{"job_id": "a", "status": "completed", "sequence": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_bytes_that_mean_harm_are_refused(routes: Routes, raw: bytes) -> None:
    answer = routes.call_back(raw, sign(SHARED_SECRET, raw), CALLBACK)

    assert answer.status_code in (400, 413)


@given(bodies)
@settings(max_examples=50, **PATIENT)
def test_no_callback_is_an_error_of_ours(
    routes: Routes, queue: KeptQueue, body: dict[str, Any]
) -> None:
    job_id = queued(routes)["jobId"]

    answer = call_back(routes, {**body, "job_id": job_id})

    assert answer.status_code in (200, 400)
    assert seen(routes, job_id).status_code == 200

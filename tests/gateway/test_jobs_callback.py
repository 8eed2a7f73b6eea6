"""What workers call back: three forms, the rules of states, and rows of files."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, InvalidRequest, Unauthorized
from gateway.jobs.callback import MAX_ASSETS, change_for, read_callback
from gateway.store.database import Database
from gateway.values.jobs import Callback
from tests.gateway.flow_parts import NOW, USER, DeskBench

JOB = "3fa85f64-5717-4562-b3fc-2c963f66afa6"
STATUSES = ("queued", "processing", "completed", "failed", "cancelled")
PATIENT: Any = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def bench(database: Database) -> DeskBench:
    return DeskBench(database)


def image(index: int = 0, **metadata: Any) -> dict[str, Any]:
    return {
        "type": "image",
        "url": f"{USER}/{JOB}/{index}.png",
        "thumbnail_url": f"{USER}/{JOB}/{index}.thumb.webp",
        "metadata": {"width": 1024, "height": 576, "seed": index, **metadata},
    }


def done(job_id: str = JOB, *assets: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"job_id": job_id, "status": "completed", "assets": list(assets), **more}


def rows_of(body: dict[str, Any], base_url: str | None = None) -> Any:
    return change_for("queued", -1, read_callback(body), base_url).assets


# --- the three forms ----------------------------------------------------------------------------


def test_the_present_form_is_read() -> None:
    said = read_callback(
        {
            "job_id": JOB,
            "worker_id": "w",
            "status": "completed",
            "assets": [image()],
            "error_message": None,
            "metadata": {"seed": 42, "generation_time": 9.3},
        }
    )

    assert (said.job_id, said.status, said.error, said.sequence) == (JOB, "completed", None, None)
    assert said.metadata == {"seed": 42, "generation_time": 9.3}
    assert said.assets[0].url == f"{USER}/{JOB}/0.png"


def test_the_older_form_is_read() -> None:
    body = {
        "jobId": JOB,
        "status": "completed",
        "results": {
            "assets": [
                {
                    "assetType": "video",
                    "tempStoragePath": f"workspace-temp/{USER}/{JOB}/0.mp4",
                    "fileSizeBytes": 1234,
                    "mimeType": "video/mp4",
                    "durationSeconds": 5.0625,
                }
            ]
        },
        "completedAt": "2026-11-26T12:00:00Z",
    }

    (row,) = rows_of(body)

    assert read_callback(body).job_id == JOB
    assert (row.asset_type, row.mime_type) == ("video", "video/mp4")
    assert row.temp_storage_path == f"{USER}/{JOB}/0.mp4"
    assert (row.file_size_bytes, row.duration_seconds) == (1234, 5.0625)


def test_assets_count_before_results() -> None:
    body = done(JOB, image(), results={"assets": [image(1), image(2)]})

    assert [one.url for one in read_callback(body).assets] == [f"{USER}/{JOB}/0.png"]


def test_a_webhook_is_read() -> None:
    body = {
        "event": "job.completed",
        "job_id": JOB,
        "sequence": 1,
        "status": "completed",
        "assets": [
            {
                "index": 0,
                "type": "image",
                "url": f"/jobs/{JOB}/assets/0",
                "thumbnail_url": f"/jobs/{JOB}/assets/0/thumbnail",
                "mime_type": "image/png",
                "bytes": 77,
                "width": 64,
                "height": 32,
                "seed": 0,
            }
        ],
        "error": None,
        "error_code": None,
        "receipt": {"model": "m"},
    }

    said = read_callback(body)
    (row,) = rows_of(body, "http://worker:7860/")

    assert (said.sequence, said.metadata) == (1, {"receipt": {"model": "m"}})
    assert row.temp_storage_path == f"http://worker:7860/jobs/{JOB}/assets/0"
    assert row.thumbnail_path == f"http://worker:7860/jobs/{JOB}/assets/0/thumbnail"
    assert (row.mime_type, row.file_size_bytes, row.width, row.height) == ("image/png", 77, 64, 32)
    assert row.generation_seed == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"errorMessage": "a", "error_message": "b", "error": "c"}, "a"),
        ({"error_message": "b", "error": "c"}, "b"),
        ({"error": "c"}, "c"),
        ({"error": {"code": "X"}, "metadata": {"error_type": "OOM_ERROR"}}, "OOM_ERROR"),
        ({"error_message": "", "metadata": {"error_type": "OOM_ERROR"}}, "OOM_ERROR"),
        ({"error": None, "error_code": "busy"}, "busy"),
        ({}, None),
    ],
)
def test_the_reason_of_a_failure_is_the_first_that_is_there(
    fields: dict[str, Any], error: str | None
) -> None:
    said = read_callback({"job_id": JOB, "status": "failed", **fields})

    assert said.error == error
    change = change_for("processing", -1, said, None)
    assert change.error == (error or "the worker gave no reason")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"job_id": JOB},
        {"status": "completed"},
        {"job_id": 5, "status": "completed"},
        {"job_id": "", "status": "completed"},
        {"job_id": "a" * 37, "status": "completed"},
        {"job_id": JOB, "status": ["completed"]},
        {"job_id": JOB, "status": "done"},
        {"job_id": JOB, "status": "completed", "assets": "a.png"},
        {"job_id": JOB, "status": "completed", "assets": {"url": "a.png"}},
        {"job_id": JOB, "status": "completed", "assets": [None]},
        {"job_id": JOB, "status": "completed", "assets": [{}]},
        {"job_id": JOB, "status": "completed", "assets": [{"url": 5}]},
        {"job_id": JOB, "status": "completed", "assets": [{"url": "a" * 4097}]},
        {"job_id": JOB, "status": "completed", "assets": [image()] * (MAX_ASSETS + 1)},
    ],
)
def test_what_is_no_callback_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        read_callback(body)


# --- rows of files ------------------------------------------------------------------------------


def test_files_are_numbered_by_their_place() -> None:
    body = done(JOB, image(7, asset_index=7), image(3, asset_index=3), image(9))

    assert [row.asset_index for row in rows_of(body)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("url", "kind", "mime"),
    [
        ("a/0.png", "image", "image/png"),
        ("a/0.PNG", "image", "image/png"),
        ("a/0.jpg", "image", "image/jpeg"),
        ("a/0.jpeg?token=x.mp4", "image", "image/jpeg"),
        ("a/0.webp", "image", "image/webp"),
        ("a/0.gif", "image", "image/jpeg"),
        ("a/0.mp4", "video", "video/mp4"),
        ("a/0.webm", "video", "video/mp4"),
        ("a.mp4/0.png", "image", "image/png"),
    ],
)
def test_a_files_type_follows_from_its_name(url: str, kind: str, mime: str) -> None:
    (row,) = rows_of(done(JOB, {"type": "video", "url": url}))

    assert (row.asset_type, row.mime_type) == (kind, mime)
    assert row.duration_seconds is None


@pytest.mark.parametrize(
    ("metadata", "of_job", "seconds"),
    [
        ({"duration_seconds": 5.0625}, {}, 5.0625),
        ({"duration_seconds": 0}, {}, 0.0),
        ({"frame_num": 81}, {}, 81 / 16),
        ({}, {"frame_num": 81}, 81 / 16),
        ({}, {}, None),
        ({"duration_seconds": "5"}, {}, None),
        ({"duration_seconds": True}, {}, None),
        ({"duration_seconds": -1}, {}, None),
        ({"duration_seconds": 10**400}, {}, None),
        ({"frame_num": -81}, {}, None),
    ],
)
def test_a_videos_duration_is_measured_or_of_its_frames(
    metadata: dict[str, Any], of_job: dict[str, Any], seconds: float | None
) -> None:
    body = done(JOB, {"url": "a/0.mp4", "metadata": metadata}, metadata=of_job)

    assert rows_of(body)[0].duration_seconds == seconds


@pytest.mark.parametrize(
    ("metadata", "of_job", "seed"),
    [
        ({"seed": 0}, {"seed": 5}, 0),
        ({"generation_seed": 0}, {"seed": 5}, 0),
        ({}, {"seed": 0}, 0),
        ({}, {}, None),
        ({"seed": False}, {}, None),
        ({"seed": "7"}, {}, None),
        ({"seed": 2**63}, {}, None),
    ],
)
def test_seed_0_is_kept_and_none_is_made_up(
    metadata: dict[str, Any], of_job: dict[str, Any], seed: int | None
) -> None:
    body = done(JOB, {"url": "a/0.png", "metadata": metadata}, metadata=of_job)

    assert rows_of(body)[0].generation_seed == seed


@pytest.mark.parametrize(
    ("url", "base", "path"),
    [
        ("workspace-temp/u/j/0.png", None, "u/j/0.png"),
        ("u/j/0.png", "http://w", "u/j/0.png"),
        ("https://w/0.png", "http://other", "https://w/0.png"),
        ("/jobs/j/assets/0", "http://w/", "http://w/jobs/j/assets/0"),
        ("/jobs/j/assets/0", None, "/jobs/j/assets/0"),
    ],
)
def test_a_files_place(url: str, base: str | None, path: str) -> None:
    (row,) = rows_of(done(JOB, {"url": url, "thumbnail_url": url}), base)

    assert (row.temp_storage_path, row.thumbnail_path) == (path, path)


# --- states -------------------------------------------------------------------------------------

# (the row's status, what is called back) → the row's status then, None: nothing changes.
TABLE = {
    ("queued", "queued"): None,
    ("queued", "processing"): "processing",
    ("queued", "completed"): "completed",
    ("queued", "failed"): "failed",
    ("queued", "cancelled"): "cancelled",
    ("processing", "queued"): None,
    ("processing", "processing"): None,
    ("processing", "completed"): "completed",
    ("processing", "failed"): "failed",
    ("processing", "cancelled"): "cancelled",
    ("failed", "queued"): None,
    ("failed", "processing"): None,
    ("failed", "completed"): "completed",
    ("failed", "failed"): "failed",
    ("failed", "cancelled"): "cancelled",
    **{(end, said): None for end in ("completed", "cancelled") for said in STATUSES},
}


def test_the_table_has_every_transition() -> None:
    assert set(TABLE) == set(itertools.product(STATUSES, STATUSES))


@pytest.mark.parametrize(("before", "said"), sorted(TABLE))
def test_a_callback_changes_a_state_as_the_table_says(before: str, said: str) -> None:
    change = change_for(before, -1, Callback(job_id=JOB, status=said), None)

    assert change.status == TABLE[before, said]
    assert bool(change.why_not) is (change.status is None)


@pytest.mark.parametrize(("last", "sequence", "counts"), [(-1, 0, True), (0, 1, True)])
def test_a_later_event_counts(last: int, sequence: int, counts: bool) -> None:
    said = Callback(job_id=JOB, status="completed", sequence=sequence)

    assert (change_for("processing", last, said, None).status is not None) is counts


@pytest.mark.parametrize(("last", "sequence"), [(0, 0), (1, 0), (1, 1)])
def test_an_event_that_is_not_later_changes_nothing(last: int, sequence: int) -> None:
    said = Callback(job_id=JOB, status="completed", sequence=sequence)

    assert change_for("queued", last, said, None).status is None


def test_every_transition_in_a_database(bench: DeskBench) -> None:
    for (before, said), after in TABLE.items():
        job_id = bench.in_status(before, error_message="before")

        answer = bench.callback({**done(job_id, image()), "status": said, "error_message": "no"})

        row = bench.row(job_id)
        assert answer["success"] is True
        assert row["status"] == (after or before), (before, said)
        assert answer.get("skipped") is (None if after else True)
        assert len(bench.assets(job_id)) == (1 if after == "completed" else 0)
        if after is None:
            assert (row["error_message"], row["completed_at"]) == ("before", None)
        elif after == "processing":
            assert row["started_at"] is not None
            assert row["completed_at"] is None
            assert row["payload"] is not None
        else:
            assert row["completed_at"] is not None
            assert row["error_message"] == ("no" if after == "failed" else None)
            assert row["payload"] is None


def test_a_completed_jobs_rows_and_metadata(bench: DeskBench) -> None:
    job_id = bench.in_status("processing")

    answer = bench.callback(done(job_id, image(0), image(1), metadata={"seed": 42}))

    assert answer == {
        "success": True,
        "jobId": job_id,
        "status": "completed",
        "message": "The job is completed",
    }
    row = bench.row(job_id)
    assert row["metadata"]["seed"] == 42
    assert row["metadata"]["contentType"] == "sfw"
    assert row["metadata"]["callback_received_at"] == NOW.isoformat()
    first, second = bench.assets(job_id)
    assert (first["asset_index"], second["asset_index"]) == (0, 1)
    assert (first["generation_seed"], second["generation_seed"]) == (0, 1)
    assert (first["user_id"], first["model_used"]) == (USER, "sdxl")
    assert first["original_prompt"] == "a swordfish on a blue plate"
    assert (first["width"], first["height"]) == (1024, 576)


def test_a_completed_job_is_never_changed(bench: DeskBench) -> None:
    job_id = bench.in_status("queued")
    bench.callback(done(job_id, image()))
    before, files = bench.row(job_id), bench.assets(job_id)
    bench.now += timedelta(minutes=1)

    for status in STATUSES:
        more = {"status": status, "error": "late", "metadata": {"seed": 9}}
        answer = bench.callback({**done(job_id, image(1), image(2)), **more})
        assert answer["skipped"] is True

    assert bench.row(job_id) == before
    assert bench.assets(job_id) == files


def test_a_cancelled_job_stays_cancelled(bench: DeskBench) -> None:
    job_id = bench.in_status("cancelled")

    assert bench.callback(done(job_id, image()))["skipped"] is True

    assert bench.assets(job_id) == []


def test_webhooks_may_come_twice_and_in_the_wrong_order(bench: DeskBench) -> None:
    job_id = bench.in_status("queued")
    begun = {"job_id": job_id, "sequence": 0, "status": "processing", "assets": []}
    ended = {"job_id": job_id, "sequence": 1, "status": "failed", "error": "no room"}

    answers = [bench.callback(one, webhook=True) for one in (ended, ended, begun, begun)]

    assert [one.get("skipped", False) for one in answers] == [False, True, True, True]
    row = bench.row(job_id)
    assert (row["status"], row["error_message"], row["webhook_sequence"]) == (
        "failed",
        "no room",
        1,
    )
    assert row["started_at"] is None


def test_a_failed_job_may_still_end_well(bench: DeskBench) -> None:
    job_id = bench.in_status("failed", error_message="late")

    bench.callback(done(job_id, image()))

    row = bench.row(job_id)
    assert (row["status"], row["error_message"]) == ("completed", None)
    assert len(bench.assets(job_id)) == 1


def test_a_job_that_nobody_knows_is_skipped(bench: DeskBench) -> None:
    assert bench.callback(done(JOB, image())) == {
        "success": True,
        "skipped": True,
        "jobId": JOB,
        "message": "there is no such job",
    }


def test_an_unsigned_callback_changes_nothing(bench: DeskBench) -> None:
    job_id = bench.in_status("queued")
    body = done(job_id, image())
    raw = json.dumps(body).encode()

    for signed, webhook in ((None, None), ("", None), (None, "sha256=00"), ("sha256=00", None)):
        with pytest.raises(Unauthorized):
            bench.desk().callback(raw, body, signed, webhook)

    assert bench.row(job_id)["status"] == "queued"


def test_the_same_callback_at_once_gives_one_set_of_files(bench: DeskBench) -> None:
    job_id = bench.in_status("queued")
    body = done(job_id, image(0), image(1), image(2), metadata={"seed": 1})
    together = Barrier(8)

    def send(_: int) -> bool:
        together.wait()
        return bool(bench.callback(body).get("skipped", False))

    with ThreadPoolExecutor(8) as pool:
        skipped = list(pool.map(send, range(8)))

    assert sorted(skipped) == [False] + [True] * 7
    assert [one["asset_index"] for one in bench.assets(job_id)] == [0, 1, 2]


# --- hostile bodies -----------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.sampled_from([2**31, 2**31 - 1, 2**53, 2**63, -1])
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
NUMBERS = ("width", "height", "seed", "generation_seed", "frame_num", "duration_seconds",
           "duration_s", "file_size_bytes", "bytes", "format", "mime_type", "type")  # fmt: skip
bad_assets = st.fixed_dictionaries(
    {"url": st.sampled_from(["a/0.png", "a/0.mp4", "/jobs/x/assets/0"]) | texts},
    optional={
        "metadata": st.dictionaries(st.sampled_from(NUMBERS) | texts, values, max_size=6) | values,
        "thumbnail_url": values,
        "fileSizeBytes": values,
        "durationSeconds": values,
        "mimeType": values,
        **{name: values for name in NUMBERS},
    },
)
bodies = st.fixed_dictionaries(
    {"status": st.sampled_from(STATUSES)},
    optional={
        "assets": st.lists(bad_assets, max_size=4) | values,
        "results": values | st.fixed_dictionaries({"assets": st.lists(bad_assets, max_size=3)}),
        "metadata": st.dictionaries(
            st.sampled_from(["seed", "frame_num", "error_type"]) | texts, values, max_size=4
        )
        | values,
        "error": values,
        "error_message": values,
        "errorMessage": values,
        "error_code": values,
        "receipt": values,
        "sequence": values,
    },
)


@given(st.lists(bodies, min_size=1, max_size=3))
@settings(max_examples=60, **PATIENT)
def test_whatever_is_called_back_is_taken_or_refused(
    bench: DeskBench, called: list[dict[str, Any]]
) -> None:
    job_id = bench.in_status("queued")

    for body in called:
        try:
            answer = bench.callback({**body, "job_id": job_id})
        except GatewayError as exc:
            assert exc.status == 400
        else:
            assert answer["success"] is True

    files = bench.assets(job_id)
    assert [one["asset_index"] for one in files] == list(range(len(files)))
    assert bench.row(job_id)["user_id"] == USER


@given(st.dictionaries(st.sampled_from(["job_id", "jobId", "status", "assets"]) | texts, values))
@settings(max_examples=200, deadline=None)
def test_any_object_is_a_callback_or_refused(body: dict[str, Any]) -> None:
    try:
        said = read_callback(body)
    except InvalidRequest:
        return

    assert said.status in STATUSES

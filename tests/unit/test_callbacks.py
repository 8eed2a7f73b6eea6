"""What is said about a job, in the callback's format and to a webhook, and how it is signed."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import TRAP_WORDS, has_trap_word
from worker.jobs.callbacks import (
    NEUTRAL_ERROR,
    Facts,
    asset_keys,
    callback_body,
    event_of,
    serialise,
    shown_error,
    time_text,
    webhook_body,
)
from worker.jobs.job import Status
from worker.protocol.messages import AssetFile, RenderParams, WeightedTerm
from worker.storage.deliver import (
    ALARM_AFTER_S,
    CALLBACK,
    FINISHES,
    MAX_BACKOFF_S,
    PROCESSING,
    WEBHOOK,
    Again,
    Alarm,
    Delivered,
    Delivery,
    backoff_s,
    is_dead,
    next_due,
    outcome,
    signature,
    supersedes,
)
from worker.storage.pinned import Answer
from worker.storage.rows import skip_reason

JOB = "0b6f3c0a-3d5a-4a53-9c55-0f2a4c8b7e11"
USER = "7f9d2f0e-6a53-4d1c-8f0a-5f1f4f2f7a10"
AT = 1_760_000_000.25
AT_TEXT = "2025-10-09T08:53:20.250Z"


def params(**changes: Any) -> RenderParams:
    usual: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "width": 1024,
        "height": 576,
        "steps": 25,
        "guidance_scale": 7.5,
        "seed": 42,
    }
    return RenderParams(**{**usual, **changes})


def image(index: int, **changes: Any) -> AssetFile:
    usual: dict[str, Any] = {
        "file": f"{index}.png",
        "thumbnail": f"{index}.thumb.webp",
        "type": "image",
        "mime_type": "image/png",
        "width": 1024,
        "height": 576,
        "seed": 42 + index,
        "size_bytes": 1000 + index,
        "sha256": "ab" * 32,
    }
    return AssetFile(**{**usual, **changes})


VIDEO = image(
    0, file="0.mp4", type="video", mime_type="video/mp4", width=480, height=832,
    frames=81, fps=16, duration_s=5.0625,
)  # fmt: skip


def images(count: int = 3, **changes: Any) -> Facts:
    assets = tuple(image(index) for index in range(count))
    usual: dict[str, Any] = {
        "job_id": JOB,
        "job_type": "sdxl_image_high",
        "status": Status.COMPLETED,
        "at": AT,
        "worker_id": "pod1",
        "params": params(num_images=count),
        "assets": assets,
        "keys": asset_keys(USER, JOB, assets),
        "receipt": {"model": "sdxl_lustify"},
        "seconds": {"encode": 0.5, "denoise": 8.25, "decode": 0.5503},
        "original_prompt": "a red circle",
    }
    return Facts(**{**usual, **changes})


def video(**changes: Any) -> Facts:
    return images(
        1,
        **{
            "job_type": "wan_video_high",
            "assets": (VIDEO,),
            "keys": asset_keys(USER, JOB, (VIDEO,)),
            "params": params(frames=81, width=480, height=832),
            **changes,
        },
    )


def failure(error: str = "the device is full", code: str | None = None, **changes: Any) -> Facts:
    return images(
        0, status=Status.FAILED, error=error, error_code=code or "out_of_device_memory", **changes
    )


def said(facts: Facts) -> dict[str, Any]:
    body = callback_body(facts)
    assert body is not None
    return body


# --- callbacks ---------------------------------------------------------------------------------


def test_a_completed_image_job_is_told_as_the_service_reads_it() -> None:
    body = said(images())

    assert body["job_id"] == JOB
    assert body["worker_id"] == "pod1"
    assert body["status"] == "completed"
    assert body["error_message"] is None
    assert body["completedAt"] == AT_TEXT
    assert body["assets"][1] == {
        "type": "image",
        "url": f"{USER}/{JOB}/1.png",
        "thumbnail_url": f"{USER}/{JOB}/1.thumb.webp",
        "metadata": {
            "width": 1024,
            "height": 576,
            "format": "png",
            "batch_size": 3,
            "steps": 25,
            "guidance_scale": 7.5,
            "seed": 43,
            "file_size_bytes": 1001,
            "asset_index": 1,
            "negative_prompt_used": True,
        },
    }
    assert body["metadata"] == {
        "seed": 42,
        "generation_time": 9.3,
        "num_images": 3,
        "job_type": "sdxl_image_high",
        "original_prompt": "a red circle",
        "final_prompt": "a red circle",
        "compel_enabled": False,
        "compel_weights": None,
        "compel_success": False,
        "enhancement_strategy": "none",
        "final_prompt_type": "string",
    }


@pytest.mark.parametrize("count", [1, 3, 6])
def test_assets_stand_at_their_own_places_without_holes(count: int) -> None:
    assets = said(images(count))["assets"]

    assert [asset["metadata"]["asset_index"] for asset in assets] == list(range(count))
    assert [asset["url"].rpartition("/")[2] for asset in assets] == [
        f"{index}.png" for index in range(count)
    ]


def test_a_completed_job_with_a_file_that_is_not_uploaded_is_not_told() -> None:
    facts = images()

    with pytest.raises(ValueError, match="shorter"):
        callback_body(replace(facts, keys=facts.keys[:2]))


def test_a_thumbnail_that_could_not_be_made_is_told_as_none() -> None:
    facts = images(1)
    facts = replace(facts, keys=((facts.keys[0][0], None),))

    assert said(facts)["assets"][0]["thumbnail_url"] is None


def test_a_video_is_told_with_its_own_seed_frames_and_length() -> None:
    body = said(video())

    assert body["assets"][0]["url"] == f"{USER}/{JOB}/0.mp4"
    told = body["assets"][0]["metadata"]
    assert (told["seed"], told["generation_seed"]) == (42, 42)
    assert (told["frame_num"], told["fps"], told["duration_seconds"]) == (81, 16, 5.0625)
    assert (told["format"], told["file_size_bytes"], told["asset_index"]) == ("mp4", 1000, 0)
    assert "batch_size" not in told
    assert body["metadata"] == {
        "seed": 42,
        "generation_time": 9.3,
        "job_type": "wan_video_high",
        "content_type": "video",
        "frame_num": 81,
        "wan_task": "t2v-1.3B",
        "reference_mode": "none",
    }


@pytest.mark.parametrize("mode", ["single", "start", "end", "both"])
def test_a_video_from_pictures_names_the_mode_and_the_model_that_reads_them(mode: str) -> None:
    facts = video(params=params(frames=81, mode=mode), resize_policy="center_crop")

    body = said(facts)

    assert body["metadata"]["reference_mode"] == mode
    assert body["metadata"]["wan_task"] == "vace-1.3B"
    assert body["assets"][0]["metadata"]["resize_policy"] == "center_crop"
    assert "denoise_strength" not in body["assets"][0]["metadata"]


@pytest.mark.parametrize(
    ("mode", "strength", "told"),
    [
        ("image", 0.2, {"denoise_strength": 0.2, "pipeline": "img2img"}),
        ("copy", 0.05, {"denoise_strength": 0.05, "pipeline": "img2img"}),
        # Nothing begins from the picture there, so no share of noise can be told.
        ("style", 0.6, {"pipeline": "txt2img"}),
        ("character", 0.6, {"pipeline": "txt2img"}),
    ],
)
def test_only_a_job_with_a_picture_has_the_keys_of_one(
    mode: str, strength: float, told: dict[str, Any]
) -> None:
    facts = images(1, params=params(mode=mode, strength=strength), resize_policy="center_crop")
    keys = {"denoise_strength", "pipeline", "resize_policy"}

    metadata = said(facts)["assets"][0]["metadata"]

    assert {key: metadata[key] for key in keys & metadata.keys()} == {
        **told,
        "resize_policy": "center_crop",
    }
    assert not keys & said(images(1))["assets"][0]["metadata"].keys()


@pytest.mark.parametrize(
    ("negative", "guidance", "used"),
    [("blue", 7.5, True), ("", 7.5, False), (None, 7.5, False), ("blue", 1.0, False)],
)
def test_a_negative_prompt_counts_as_used_when_something_was_computed_from_it(
    negative: str | None, guidance: float, used: bool
) -> None:
    facts = images(1, params=params(negative_prompt=negative, guidance_scale=guidance))

    assert said(facts)["assets"][0]["metadata"]["negative_prompt_used"] is used


def test_weights_are_told_as_they_came_and_as_they_were_used() -> None:
    terms = (WeightedTerm("red", 1.3), WeightedTerm("round", 0.8))
    given_weights = "(red:1.3), (round:.8)"
    facts = images(
        1, params=params(weighted=terms), compel_enabled=True, compel_weights=given_weights
    )

    metadata = said(facts)["metadata"]

    assert metadata["final_prompt"] == "a red circle, (red:1.3), (round:0.8)"
    assert metadata["original_prompt"] == "a red circle"
    assert metadata["compel_weights"] == given_weights
    assert (metadata["compel_enabled"], metadata["compel_success"]) == (True, True)
    assert metadata["enhancement_strategy"] == "compel"
    assert metadata["final_prompt_type"] == "conditioning_tensor"


@pytest.mark.parametrize(
    ("weights", "told"),
    [({"red": 1.3}, {"red": 1.3}), ([["deep"]], None), ({"red": {"deep": 1}}, None)],
)
def test_weights_that_are_none_are_not_repeated(weights: Any, told: Any) -> None:
    assert said(images(1, compel_weights=weights))["metadata"]["compel_weights"] == told


def test_a_wan_picture_is_told_as_an_image_with_its_task() -> None:
    body = said(images(1, job_type="image7b_fast_enhanced"))

    assert body["assets"][0]["type"] == "image"
    assert body["assets"][0]["metadata"]["format"] == "png"
    assert body["metadata"]["wan_task"] == "t2v-1.3B"
    assert body["metadata"]["num_images"] == 1


@pytest.mark.parametrize(
    ("code", "error_type"),
    [
        ("out_of_device_memory", "OOM_ERROR"),
        ("out_of_host_memory", "OOM_ERROR"),
        ("model_unavailable", "MODEL_LOAD_ERROR"),
        ("prompt_too_long", "INVALID_PROMPT"),
        ("reference_forbidden", "REFERENCE_FRAME_ERROR"),
        ("reference_refused", "REFERENCE_FRAME_ERROR"),
        ("reference_too_large", "REFERENCE_FRAME_ERROR"),
        ("reference_unavailable", "REFERENCE_FRAME_ERROR"),
        ("deadline_exceeded", "TIMEOUT_ERROR"),
        ("engine_lost", "WORKER_UNAVAILABLE"),
        ("engine_unavailable", "WORKER_UNAVAILABLE"),
        ("disk_full", "WORKER_UNAVAILABLE"),
        ("out_of_range", "OUT_OF_RANGE"),
        ("unsupported", "UNSUPPORTED"),
    ],
)
def test_a_failure_has_its_reason_and_a_code_that_the_service_knows(
    code: str, error_type: str
) -> None:
    body = said(failure("64 steps; allowed: 1 to 50", code))

    assert body["status"] == "failed"
    assert body["assets"] == []
    assert body["error_message"] == "64 steps; allowed: 1 to 50"
    assert "error" not in body
    assert body["metadata"] == {
        "error_type": error_type,
        "job_type": "sdxl_image_high",
        "timestamp": AT_TEXT,
    }


def test_a_failed_video_names_its_task() -> None:
    assert said(failure(job_type="video_fast"))["metadata"]["wan_task"] == "t2v-1.3B"


def test_a_body_that_was_refused_is_told_without_parameters() -> None:
    body = said(failure(code="unsupported", params=None, job_type="painting"))

    assert body["metadata"]["job_type"] == "painting"
    assert body["metadata"]["error_type"] == "UNSUPPORTED"


@pytest.mark.parametrize("word", TRAP_WORDS)
def test_an_error_with_a_word_that_a_client_misreads_is_told_in_neutral_words_and_logged(
    word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        body = said(failure(f"it says {word.upper()} there"))

    assert body["error_message"] == NEUTRAL_ERROR
    assert f"it says {word.upper()} there" in caplog.text
    assert not has_trap_word(NEUTRAL_ERROR)
    assert not has_trap_word(serialise(body).decode())


def test_a_cancelled_job_is_called_back_so_that_its_row_ends() -> None:
    body = said(images(0, status=Status.CANCELLED, error_code="cancelled"))

    assert (body["status"], body["error_message"]) == ("cancelled", "the job was cancelled")
    assert body["metadata"]["error_type"] == "CANCELLED"


@pytest.mark.parametrize("status", [Status.QUEUED, Status.PROCESSING])
def test_a_job_that_is_not_final_is_never_called_back(status: Status) -> None:
    """A callback with `processing` set `completed_at` in the field."""
    assert callback_body(images(0, status=status)) is None


def test_the_callbacks_metadata_collide_with_none_of_the_settings_that_it_is_spread_over() -> None:
    settings = {
        "quality", "format", "enhanced_prompt", "template_name", "reference_image_url",
        "reference_strength", "denoise_strength", "guidance_scale", "steps", "width", "height",
        "worker_reported_steps", "worker_reported_guidance_scale", "exact_copy_mode",
    }  # fmt: skip

    told = said(images())["metadata"].keys() | said(video())["metadata"].keys()

    assert not settings & told


# --- webhooks ----------------------------------------------------------------------------------


def test_a_webhook_hears_of_a_finished_job_with_addresses_and_receipt() -> None:
    body = webhook_body(video(), 2, [("https://store/0.mp4", "https://store/0.webp")])

    assert body["event"] == "job.completed"
    assert (body["job_id"], body["sequence"], body["status"]) == (JOB, 2, "completed")
    assert (body["type"], body["at"]) == ("wan_video_high", AT_TEXT)
    assert (body["error"], body["error_code"]) == (None, None)
    assert body["receipt"] == {"model": "sdxl_lustify"}
    assert body["assets"] == [
        {
            "index": 0,
            "type": "video",
            "url": "https://store/0.mp4",
            "thumbnail_url": "https://store/0.webp",
            "mime_type": "video/mp4",
            "width": 480,
            "height": 832,
            "seed": 42,
            "size_bytes": 1000,
            "sha256": "ab" * 32,
            "frame_num": 81,
            "fps": 16,
            "duration_s": 5.0625,
        }
    ]


def test_a_webhook_without_addresses_still_names_every_file() -> None:
    body = webhook_body(images(2), 2)

    assert [asset["url"] for asset in body["assets"]] == [None, None]
    assert [asset["sha256"] for asset in body["assets"]] == ["ab" * 32] * 2
    assert "frame_num" not in body["assets"][0]


def test_a_webhook_hears_of_a_failure_without_the_words_that_clients_misread() -> None:
    body = webhook_body(failure("no more information"), 2)

    assert (body["event"], body["error"]) == ("job.failed", NEUTRAL_ERROR)
    assert body["error_code"] == "out_of_device_memory"
    assert (body["assets"], body["receipt"]) == ([], None)


def test_a_webhook_hears_of_the_beginning() -> None:
    body = webhook_body(images(0, status=Status.PROCESSING, receipt={}), 1)

    assert (body["event"], body["status"], body["error"]) == ("job.processing", "processing", None)


def test_events_are_named_after_states_and_a_waiting_job_is_none() -> None:
    names = {event_of(status) for status in Status if status is not Status.QUEUED}

    assert names == FINISHES | {PROCESSING}
    with pytest.raises(ValueError, match="no event"):
        event_of(Status.QUEUED)


# --- names of files ----------------------------------------------------------------------------


def test_files_are_named_by_user_job_and_place() -> None:
    assert asset_keys(USER, JOB, (image(0), image(1))) == (
        (f"{USER}/{JOB}/0.png", f"{USER}/{JOB}/0.thumb.webp"),
        (f"{USER}/{JOB}/1.png", f"{USER}/{JOB}/1.thumb.webp"),
    )
    assert asset_keys(USER, JOB, (VIDEO,)) == (
        (f"{USER}/{JOB}/0.mp4", f"{USER}/{JOB}/0.thumb.webp"),
    )


def test_without_a_user_the_name_begins_with_the_job() -> None:
    assert asset_keys(None, JOB, (image(0),))[0][0] == f"{JOB}/0.png"


@pytest.mark.parametrize(
    "user", ["", ".", "..", "a/b", "../x", "a b", "ü", "a\n", "a\0", "a" * 129, "a\\b", "%2e"]
)
def test_a_user_that_could_leave_its_folder_is_refused(user: str) -> None:
    with pytest.raises(ValueError, match="part of a path"):
        asset_keys(user, JOB, (image(0),))


def test_an_id_that_is_no_part_of_a_path_matters_only_to_a_job_with_files() -> None:
    """A job that was refused for its id has to be told about all the same."""
    assert asset_keys(None, "../x", ()) == ()
    with pytest.raises(ValueError, match="job_id"):
        asset_keys(None, "../x", (image(0),))


def test_a_file_of_a_kind_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="image/tiff"):
        asset_keys(USER, JOB, (image(0, mime_type="image/tiff"),))


# --- bytes -------------------------------------------------------------------------------------


def test_a_body_is_serialised_once_as_utf8_json() -> None:
    content = serialise({"prompt": "ein roter Kreis – 円", "seed": 0})

    assert content == '{"prompt":"ein roter Kreis – 円","seed":0}'.encode()


def test_what_no_database_can_hold_does_not_keep_a_result_from_arriving() -> None:
    """PostgreSQL refuses a NUL in JSON, so that a callback with one was never taken."""
    content = serialise({"a\0": ["x\0y", "\ud800z", {"n": float("nan")}], "e": "\U0001f600"})

    assert json.loads(content) == {"a\ufffd": ["x\ufffdy", "\ufffdz", {"n": None}], "e": "😀"}
    assert b"\\u0000" not in content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters()), JSON, max_size=4))
def test_anything_can_be_serialised_and_read_again(body: dict[str, Any]) -> None:
    content = serialise(body)

    assert serialise(json.loads(content)) == content


def test_a_signature_is_the_hmac_of_the_bytes() -> None:
    content = serialise({"prompt": "円"})

    wanted = hmac.new("sécret".encode(), content, hashlib.sha256).hexdigest()

    assert signature("sécret", content) == f"sha256={wanted}"


def test_time_is_told_in_utc_with_milliseconds() -> None:
    assert time_text(AT) == AT_TEXT


def test_an_error_in_harmless_words_is_told_as_it_is() -> None:
    assert shown_error("4 GiB are missing") == "4 GiB are missing"


# --- answers -----------------------------------------------------------------------------------


def answer(status: int, **headers: str) -> Answer:
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, b"")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_a_delivery(status: int) -> None:
    assert outcome(answer(status), AT) == Delivered(status)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 405, 410, 413, 422])
def test_an_answer_that_time_does_not_change_calls_a_person(status: int) -> None:
    assert outcome(answer(status), AT) == Alarm(f"answered {status}", ALARM_AFTER_S)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_an_answer_that_passes_is_tried_again(status: int) -> None:
    assert outcome(answer(status), AT) == Again(f"answered {status}")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 09 Oct 2025 08:54:20 GMT", 59.75),
        ("Thu, 09 Oct 2025 08:00:00 GMT", 1.0),  # over already
        ("0", 1.0),
        ("999999", 3600.0),
        ("soon", None),
        ("-5", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_wish_to_be_left_alone_is_heeded_up_to_an_hour(
    status: int, header: str, seconds: float | None
) -> None:
    found = outcome(answer(status, retry_after=header), AT)

    assert found == Again(f"answered {status}", seconds)


def test_only_a_busy_or_absent_receiver_says_when_to_come_back() -> None:
    assert outcome(answer(500, retry_after="7"), AT) == Again("answered 500", None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "missing"),
        ("cancelled", "cancelled"),
        ("completed", "completed"),
        ("failed", None),
        ("queued", None),
        ("processing", None),
    ],
)
def test_a_job_is_skipped_when_its_row_leaves_nothing_to_do(
    row: str | None, reason: str | None
) -> None:
    assert skip_reason(row) == reason


# --- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(0, 1), (1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (10**6, 300)]
)
def test_the_wait_doubles_up_to_five_minutes(attempts: int, seconds: float) -> None:
    assert backoff_s(attempts, 0.5) == pytest.approx(seconds)


@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_the_wait_is_spread_by_a_fifth_and_never_shrinks_with_failures(
    attempts: int, one: float, other: float
) -> None:
    middle = backoff_s(attempts, 0.5)

    assert 0.8 * middle - 1e-9 <= backoff_s(attempts, one) <= 1.2 * middle + 1e-9
    assert backoff_s(attempts + 1, 0.5) >= middle
    assert middle <= MAX_BACKOFF_S
    assert (backoff_s(attempts, one) < backoff_s(attempts, other)) <= (one < other)


@pytest.mark.parametrize(
    ("attempts", "age_s", "dead"),
    [(12, 100.0, True), (12, 99.0, False), (11, 1e9, False), (50, 0.0, False), (12, -5.0, False)],
)
def test_a_delivery_that_was_tried_is_given_up_after_a_time(
    attempts: int, age_s: float, dead: bool
) -> None:
    assert is_dead(AT, AT + age_s, attempts, give_up_after_s=100.0) is dead


@pytest.mark.parametrize(
    ("new", "old", "void"),
    [
        ("job.completed", "job.processing", True),
        ("job.failed", "job.processing", True),
        ("job.cancelled", "job.processing", True),
        ("job.processing", "job.processing", False),
        ("job.processing", "job.completed", False),
        ("job.completed", "job.failed", False),
    ],
)
def test_a_finish_makes_an_untold_beginning_void_and_nothing_else(
    new: str, old: str, void: bool
) -> None:
    assert supersedes(new, old) is void


def delivery(job_id: str, sequence: int, kind: str = WEBHOOK, **more: Any) -> Delivery:
    return Delivery(
        id=more.pop("id", sequence), job_id=job_id, sequence=sequence, kind=kind,
        url="", content=b"", **more,
    )  # fmt: skip


def test_of_one_job_the_first_undelivered_goes_first_even_while_it_waits() -> None:
    first, second = delivery("a", 1, next_at=50.0), delivery("a", 2)

    assert next_due([second, first], 10.0) is None
    assert next_due([second, first], 50.0) is first


def test_a_dead_delivery_lets_the_next_one_pass() -> None:
    first, second = delivery("a", 1, dead=True), delivery("a", 2)

    assert next_due([first, second], 0.0) is second


def test_a_jobs_callback_does_not_wait_for_its_webhook() -> None:
    webhook = delivery("a", 1, WEBHOOK, next_at=500.0)
    callback = delivery("a", 2, CALLBACK)

    assert next_due([webhook, callback], 0.0) is callback


def test_between_jobs_the_one_that_has_been_due_for_longest_goes_first() -> None:
    retried = delivery("a", 1, next_at=30.0, created_at=1.0)
    fresh = delivery("b", 1, created_at=20.0)

    assert next_due([retried, fresh], 40.0) is fresh
    assert next_due([retried, replace(fresh, created_at=35.0)], 40.0) is retried


def test_what_is_under_way_blocks_its_own_lane_alone() -> None:
    one, other = delivery("a", 1), delivery("b", 1, created_at=5.0)

    assert next_due([one, other], 9.0, frozenset({one.lane})) is other
    assert next_due([one], 9.0, frozenset({one.lane})) is None


def test_secrets_and_contents_are_not_shown() -> None:
    shown = repr(delivery("a", 1, secret="hush"))

    assert "hush" not in shown
    assert "content" not in shown


DELIVERIES = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(1, 5),
        st.sampled_from([CALLBACK, WEBHOOK]),
        st.sampled_from([0.0, 1.0, 50.0, 150.0]),
        st.booleans(),
    ),
    max_size=12,
    unique_by=lambda one: one[:3],
)


@given(DELIVERIES)
def test_whatever_waits_nothing_overtakes_in_its_lane_and_nothing_due_is_left(
    drawn: list[tuple[str, int, str, float, bool]],
) -> None:
    waiting = [
        delivery(job, sequence, kind, next_at=next_at, dead=dead, id=number)
        for number, (job, sequence, kind, next_at, dead) in enumerate(drawn)
    ]
    now, sent = 100.0, []

    while (found := next_due(waiting, now)) is not None:
        sent.append(found)
        waiting.remove(found)

    for one in sent:
        assert not one.dead
        assert one.next_at <= now
        # Nothing that is still waiting and alive should have gone before it.
        assert not [
            left
            for left in waiting
            if left.lane == one.lane and left.sequence < one.sequence and not left.dead
        ]
    for lane in {one.lane for one in sent}:
        sequences = [one.sequence for one in sent if one.lane == lane]
        assert sequences == sorted(sequences)
    # What is left is dead, not due, or behind one that is not due.
    for left in waiting:
        if not left.dead and left.next_at <= now:
            assert [
                one
                for one in waiting
                if one.lane == left.lane
                and one.sequence < left.sequence
                and not one.dead
                and one.next_at > now
            ]

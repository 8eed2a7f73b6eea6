"""Jobs on their way in: words, enhancement, negative prompt, row and hand-over; and their ends."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from gateway.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    PromptRefused,
    QueueUnavailable,
    WorkerBusy,
)
from gateway.jobs.desk import ORPHAN_S
from gateway.jobs.queues import RedisQueue
from gateway.jobs.references import CrossUserReference
from gateway.jobs.signatures import Signatures
from gateway.prompts.negative import negative_rows
from gateway.store.database import Database
from gateway.store.jobs import insert_job, jobs_of
from gateway.store.tables import jobs
from tests.gateway.conftest import MakeDatabase
from tests.gateway.flow_parts import (
    FINISHED,
    MINOR,
    NOW,
    OTHER,
    OWN_SECRET,
    PROMPT,
    THEME,
    USER,
    DeskBench,
    TakingWorkers,
    call,
    caller,
    shipped,
)
from tests.redis_server import running_redis
from worker.queues.elements import decode_element

URL = "https://pictures.example.org/a.png"
COPY: dict[str, Any] = {
    "prompt": "",
    "reference_image_url": URL,
    "metadata": {"exact_copy_mode": True},
}
ENHANCE: dict[str, Any] = {"metadata": {"user_requested_enhancement": True}}


@pytest.fixture
def desk_database(make_database: MakeDatabase) -> Database:
    """One engine is enough for what does not depend on it."""
    return make_database("sqlite")


@pytest.fixture
def bench(desk_database: Database) -> DeskBench:
    return DeskBench(desk_database)


@pytest.fixture
def both(database: Database) -> DeskBench:
    return DeskBench(database)


def pushed(bench: DeskBench) -> dict[str, Any]:
    assert bench.queue is not None
    ((_, element),) = bench.queue.pushed
    return element


def count(bench: DeskBench) -> int:
    with bench.database.reading() as connection:
        return int(connection.scalar(select(func.count()).select_from(jobs)) or 0)


def negative(target: str, mode: str, generation: str) -> str:
    rows = negative_rows(shipped(), target, mode, generation)
    assert rows
    return ", ".join(row.negative_prompt for row in rows)


def test_a_job_is_queued_with_a_row(both: DeskBench) -> None:
    body = both.queue_job(seed=0, original_prompt="a fish", metadata={"scene_id": "s"})

    assert body["success"] is True
    assert (body["status"], body["queueName"]) == ("queued", "sdxl_queue")
    element = pushed(both)
    assert element["id"] == body["jobId"]
    assert (element["prompt"], element["user_id"]) == (PROMPT, USER)
    assert element["webhook_url"] == "http://gateway:7862/functions/v1/job-callback"
    assert element["webhook_secret"] == Signatures(OWN_SECRET, None).secret_of(body["jobId"])
    row = both.row(body["jobId"])
    assert (row["status"], row["queue_name"], row["user_id"]) == ("queued", "sdxl_queue", USER)
    assert (row["original_prompt"], row["enhanced_prompt"]) == ("a fish", None)
    assert (row["template_name"], row["model_type"]) == ("original_prompt", "sdxl")
    assert row["metadata"]["scene_id"] == "s"
    assert row["payload"] == {k: v for k, v in element.items() if k != "webhook_secret"}
    assert both.enhancing.models.asked == []


def test_a_caller_without_a_user_queues_nothing(bench: DeskBench) -> None:
    with pytest.raises(Forbidden):
        bench.queue_job(call(caller(user_id=None)))

    assert count(bench) == 0


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": f"{THEME} {MINOR}"},
        {"prompt": THEME, "original_prompt": MINOR},
        {"prompt": THEME, "enhanced_prompt": MINOR},
        {"prompt": THEME, "tags": (MINOR,)},
        {"prompt": THEME, "compel_weights": f"({MINOR}:1.3)"},
        {"prompt": THEME, "compel_weights": {MINOR: 1.3}},
        {"prompt": THEME, "metadata": {"originalEnhancedPrompt": MINOR}},
        {**COPY, "metadata": {"exact_copy_mode": True, "originalEnhancedPrompt": THEME + MINOR}},
    ],
)
def test_what_is_refused_leaves_no_job(bench: DeskBench, fields: dict[str, Any]) -> None:
    with pytest.raises(PromptRefused) as caught:
        bench.queue_job(allow_original=True, **fields)

    assert MINOR not in str(caught.value)
    assert count(bench) == 0
    assert bench.queue is not None
    assert bench.queue.pushed == []


def test_a_negative_prompt_may_name_what_is_to_be_kept_out(bench: DeskBench) -> None:
    assert bench.queue_job(prompt=THEME, negative_prompt=MINOR)["success"] is True


@pytest.mark.parametrize("job_type", ["sdxl_image_fast", "video_fast"])
def test_a_job_without_words_needs_a_picture(bench: DeskBench, job_type: str) -> None:
    with pytest.raises(Invalid):
        bench.queue_job(job_type=job_type, prompt=" ")

    assert count(bench) == 0
    bench.queue_job(job_type=job_type, prompt="", reference_image_url=URL)
    assert pushed(bench)["prompt"] == ""


# --- enhancement --------------------------------------------------------------------------------


def test_a_prompt_is_enhanced_where_that_is_asked(both: DeskBench) -> None:
    body = both.queue_job(**ENHANCE)

    assert body["prompt"] == pushed(both)["prompt"] == FINISHED
    assert body["enhancement_strategy"] == "template_db"
    assert body["enhancement_metadata"]["template_name"] == "enhancement_sdxl_sfw"
    row = both.row(body["jobId"])
    assert (row["original_prompt"], row["enhanced_prompt"]) == (PROMPT, FINISHED)
    assert (row["template_name"], row["enhancement_strategy"]) == (
        "enhancement_sdxl_sfw",
        "template_db",
    )
    assert row["enhancement_time_ms"] > 0
    (entry,) = both.enhancing.log.entries
    assert entry.endpoint == "queue-job"


def test_a_video_is_enhanced_for_its_own_model(bench: DeskBench) -> None:
    body = bench.queue_job(job_type="wan_video_high", **ENHANCE)

    assert body["enhancement_metadata"]["template_name"] == "enhancement_wan_sfw"
    assert body["enhancement_metadata"]["quality"] == "high"


def test_a_reference_changes_by_the_modify_template(bench: DeskBench) -> None:
    body = bench.queue_job(prompt="with a red hat", reference_image_url=URL)

    assert body["prompt"] == "same subject, same pose and composition, with a red hat"
    assert (body["template_name"], body["enhancement_strategy"]) == (
        "modify_flow",
        "reference_modify_with_prompt",
    )
    assert bench.enhancing.models.asked == []


def test_an_exact_copy_has_no_words(bench: DeskBench) -> None:
    body = bench.queue_job(**COPY)

    element = pushed(bench)
    assert body["template_name"] == "exact_copy_skip_enhance"
    assert element["prompt"] == ""
    assert "negative_prompt" not in element
    assert element["metadata"]["exact_copy_mode"] is True
    assert bench.row(body["jobId"])["negative_prompt"] is None


def test_an_enhanced_prompt_that_is_brought_is_used(bench: DeskBench) -> None:
    body = bench.queue_job(enhanced_prompt="as I want it", **ENHANCE)

    assert body["prompt"] == "as I want it"
    assert bench.row(body["jobId"])["enhanced_prompt"] == "as I want it"


def test_an_enhancement_that_fails_leaves_no_job(bench: DeskBench) -> None:
    bench.enhancing.models.replies = [WorkerBusy("full")]

    with pytest.raises(WorkerBusy):
        bench.queue_job(**ENHANCE)

    assert count(bench) == 0


def test_the_original_goes_only_where_that_is_allowed_and_is_named(bench: DeskBench) -> None:
    bench.enhancing.models.replies = [WorkerBusy("full")]

    body = bench.queue_job(allow_original=True, **ENHANCE)

    assert body["prompt"] == PROMPT
    assert (body["template_name"], body["enhancement_strategy"]) == (
        "enhancement_failed",
        "original_fallback",
    )
    assert bench.row(body["jobId"])["template_name"] == "enhancement_failed"


# --- mode and negative prompt -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sfw", "nsfw"])
@pytest.mark.parametrize(
    ("fields", "target", "generation"),
    [
        ({}, "sdxl", "txt2img"),
        ({"reference_image_url": URL}, "sdxl", "i2i"),
        ({"job_type": "video_fast"}, "wan", "txt2img"),
        ({"job_type": "video_fast", "reference_image_url": URL}, "wan", "i2i"),
    ],
)
def test_the_negative_prompt_is_of_model_mode_and_generation(
    bench: DeskBench, mode: str, fields: dict[str, Any], target: str, generation: str
) -> None:
    body = bench.queue_job(content_mode=mode, negative_prompt="no hats", **fields)

    expected = f"{negative(target, mode, generation)}, no hats"
    assert body["negative_prompt"] == pushed(bench)["negative_prompt"] == expected
    assert pushed(bench)["content_type"] == body["content_mode"] == mode


@pytest.mark.parametrize("way", [{}, ENHANCE, {"reference_image_url": URL}, COPY])
@pytest.mark.parametrize("fails", [False, True])
def test_a_user_who_may_not_gets_no_nsfw_on_any_way(
    bench: DeskBench, way: dict[str, Any], fails: bool
) -> None:
    if fails:
        bench.enhancing.models.replies = [WorkerBusy("full")]
    who = call(caller(may_use_nsfw=False, content_mode="nsfw"))

    body = bench.queue_job(who, content_mode="nsfw", allow_original=True, **way)

    assert body["content_mode"] == pushed(bench)["content_type"] == "sfw"
    assert pushed(bench)["metadata"]["contentType"] == "sfw"
    if way is not COPY:
        generation = "i2i" if "reference_image_url" in way else "txt2img"
        assert body["negative_prompt"] == negative("sdxl", "sfw", generation)


# --- references ---------------------------------------------------------------------------------


def test_a_signed_reference_is_what_the_worker_gets(bench: DeskBench) -> None:
    bench.sign = lambda path: f"https://store.example.org/{path}?token=t"

    bench.queue_job(reference_image_url=f"user-library/{USER}/a.png")

    signed = f"https://store.example.org/user-library/{USER}/a.png?token=t"
    assert pushed(bench)["metadata"]["reference_image_url"] == signed


def test_without_a_signature_the_path_goes(bench: DeskBench) -> None:
    metadata = {"start_reference_url": f"workspace-temp/{USER}/a.png"}

    bench.queue_job(job_type="video_fast", metadata=metadata)

    assert pushed(bench)["config"]["first_frame"] == f"workspace-temp/{USER}/a.png"


def test_another_users_picture_leaves_no_job(bench: DeskBench) -> None:
    with pytest.raises(CrossUserReference):
        bench.queue_job(reference_image_url=f"user-library/{OTHER}/a.png")

    assert count(bench) == 0


# --- hand-over ----------------------------------------------------------------------------------


def test_a_queue_that_takes_nothing_fails_the_row(both: DeskBench) -> None:
    assert both.queue is not None
    both.queue.error = QueueUnavailable("gone", retry_after_s=5.0)

    with pytest.raises(QueueUnavailable) as caught:
        both.queue_job()

    row = both.row(caught.value.fields["jobId"])
    assert (row["status"], row["error_message"], row["queue_name"]) == ("failed", "gone", None)
    assert row["completed_at"] is not None


def test_a_real_queue_that_dies_fails_the_row_and_takes_jobs_again(bench: DeskBench) -> None:
    with running_redis() as server:
        real = RedisQueue(server.url)
        bench.queue = real  # type: ignore[assignment]
        first = bench.queue_job()["jobId"]
        second = bench.queue_job(prompt="another")["jobId"]
        client = server.client()
        stored: Any = client.lrange("sdxl_queue", 0, -1)
        client.close()
        server.kill()
        with pytest.raises(QueueUnavailable) as caught:
            bench.queue_job()
        real.close()

    assert [decode_element(one)[0]["id"] for one in stored] == [first, second]
    assert bench.row(caught.value.fields["jobId"])["status"] == "failed"


def test_without_a_queue_a_worker_gets_the_job(both: DeskBench) -> None:
    both.queue = None

    body = both.queue_job()

    assert body["queueName"] == "http"
    (posted,) = both.media.posted
    assert posted["id"] == body["jobId"]
    assert both.row(body["jobId"])["metadata"]["worker_url"] == "http://worker:7860"


def test_workers_that_take_nothing_fail_the_row(bench: DeskBench) -> None:
    bench.queue = None
    bench.media.error = WorkerBusy("full")

    with pytest.raises(WorkerBusy) as caught:
        bench.queue_job()

    assert bench.row(caught.value.fields["jobId"])["status"] == "failed"


def test_a_clients_word_for_the_worker_does_not_count(bench: DeskBench) -> None:
    job_id = bench.queue_job(metadata={"worker_url": "http://evil.example.org"})["jobId"]

    body = {"job_id": job_id, "status": "completed", "metadata": {"worker_url": "http://evil"}}
    bench.callback({**body, "assets": [{"url": "/jobs/x/assets/0"}]})

    assert "worker_url" not in bench.row(job_id)["metadata"]
    assert bench.assets(job_id)[0]["temp_storage_path"] == "/jobs/x/assets/0"


def test_a_callback_may_come_before_the_hand_over_is_noted(both: DeskBench) -> None:
    class Fast(TakingWorkers):
        def post_generate(self, body: Any, **more: Any) -> TakingWorkers:
            both.callback({"job_id": body["id"], "status": "completed", "metadata": {"seed": 3}})
            return self

    both.queue, both.media = None, Fast()

    row = both.row(both.queue_job()["jobId"])

    assert (row["status"], row["queue_name"]) == ("completed", "http")
    assert (row["metadata"]["seed"], row["metadata"]["worker_url"]) == (3, "http://worker:7860")


# --- afterwards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["queued", "processing"])
def test_a_job_that_has_not_ended_can_be_cancelled(bench: DeskBench, status: str) -> None:
    job_id = bench.in_status(status)

    assert bench.desk().cancel(job_id, call())["status"] == "cancelled"
    assert bench.row(job_id)["status"] == "cancelled"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_job_that_has_ended_cannot_be_cancelled(bench: DeskBench, status: str) -> None:
    job_id = bench.in_status(status)

    with pytest.raises(Conflict):
        bench.desk().cancel(job_id, call())


def test_another_users_job_is_not_found(bench: DeskBench) -> None:
    job_id = bench.in_status("queued")

    with pytest.raises(NotFound):
        bench.desk().cancel(job_id, call(caller(user_id=OTHER)))

    assert bench.row(job_id)["status"] == "queued"
    with bench.database.reading() as connection:
        assert jobs_of(connection, OTHER, 50) == []
        assert [one["id"] for one in jobs_of(connection, USER, 50)] == [job_id]


def lost(bench: DeskBench, job_id: str, age_s: float) -> str:
    """A row whose process ended before it handed the job over."""
    with bench.database.transaction() as connection:
        values = {"id": job_id, "user_id": USER, "job_type": "video_fast", "metadata": {}}
        insert_job(connection, {**values, "created_at": NOW - timedelta(seconds=age_s)})
    return job_id


def test_rows_that_nobody_handed_over_are_failed_after_a_while(both: DeskBench) -> None:
    old, young = lost(both, "old", ORPHAN_S + 1), lost(both, "young", ORPHAN_S - 1)
    handed = both.queue_job()["jobId"]
    both.now += timedelta(seconds=0.5)

    both.desk().sweep()

    assert both.row(old)["status"] == "failed"
    assert both.row(young)["status"] == both.row(handed)["status"] == "queued"

"""What becomes of a job's fields, and that a worker reads the same from the element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import Invalid, InvalidRequest
from gateway.jobs.queues import encode
from gateway.jobs.request import (
    COPY,
    JOB_TYPES,
    MAX_SEED,
    MODIFY,
    PLAIN,
    JobInput,
    JobPlan,
    SdxlDisabled,
    element,
    plan_job,
)
from tests.gateway.flow_parts import USER
from worker.catalog import NATIVE_FRAMES, Catalog, ModelSpec
from worker.config import Kind, Limits
from worker.jobs.decode import JobRequest, decode_job
from worker.queues.elements import decode_element

JOB = "3fa85f64-5717-4562-b3fc-2c963f66afa6"
URL = "https://pictures.example.org/a.png"
IMAGES = ("sdxl_image_fast", "sdxl_image_high")
VIDEOS = ("video_fast", "video_high", "wan_video_fast", "wan_video_high")
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def spec(model_id: str, kind: Kind, size: tuple[int, int]) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        kind=kind,
        path=Path("/models") / model_id,
        shown_path=model_id,
        aliases=(),
        dtype="float16",
        chat_template="chatml",
        config_path=None,
        display_name=model_id,
        default_size=size,
        default_frames=NATIVE_FRAMES,
    )


CATALOG = Catalog([spec("sdxl", "sdxl", (1024, 1024)), spec("wan", "wan", (480, 832))])
LIMITS = Limits(steps=1000)


def job(job_type: str = "sdxl_image_fast", **fields: Any) -> JobInput:
    return JobInput(job_type=job_type, **{"prompt": "a red cube", **fields})


def sent(asked: JobInput, plan: JobPlan | None = None, **fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "job_id": JOB,
        "user_id": USER,
        "prompt": asked.prompt,
        "negative_prompt": "blurry",
        "content_mode": "sfw",
        "webhook": ("http://127.0.0.1:7862/functions/v1/job-callback", "s" * 64),
        **fields,
    }
    return element(asked, plan or plan_job(asked), **values)


def read_by_worker(payload: dict[str, Any]) -> JobRequest:
    """Through the list's encoding, as a worker takes it."""
    (body,) = decode_element(encode(payload).encode())
    assert body == payload
    return decode_job(body, CATALOG, LIMITS)


# --- types and branches -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job_type", "worker_type", "list_name", "quality", "made"),
    [
        ("sdxl_image_fast", "sdxl_image_fast", "sdxl_queue", "fast", "image"),
        ("sdxl_image_high", "sdxl_image_high", "sdxl_queue", "high", "image"),
        ("video_fast", "video_fast", "wan_queue", "fast", "video"),
        ("video_high", "video_high", "wan_queue", "high", "video"),
        ("wan_video_fast", "video_fast", "wan_queue", "fast", "video"),
        ("wan_video_high", "video_high", "wan_queue", "high", "video"),
    ],
)
def test_a_type_chooses_list_quality_and_format(
    job_type: str, worker_type: str, list_name: str, quality: str, made: str
) -> None:
    asked = job(job_type)

    plan = plan_job(asked)
    payload = sent(asked)

    assert (plan.worker_type, plan.list_name) == (worker_type, list_name)
    assert (plan.quality, plan.format) == (quality, made)
    assert (payload["type"], payload["job_type"]) == (worker_type, job_type)
    assert payload["id"] == payload["job_id"] == JOB


def test_every_type_that_is_taken_is_in_the_table() -> None:
    assert set(JOB_TYPES) == {*IMAGES, *VIDEOS}


@pytest.mark.parametrize("job_type", ["", "image_fast", "rv51_fast", "fal_x", "chat_enhance"])
def test_another_type_is_refused(job_type: str) -> None:
    with pytest.raises(InvalidRequest):
        plan_job(job(job_type))


def test_images_can_be_switched_off_and_videos_go_on() -> None:
    with pytest.raises(SdxlDisabled) as caught:
        plan_job(job(), sdxl_enabled=False)

    assert (caught.value.status, caught.value.code) == (503, "SDXL_DISABLED")
    assert caught.value.fields["code"] == "SDXL_DISABLED"
    assert plan_job(job("video_fast"), sdxl_enabled=False).is_video


BRANCHES = [
    ({}, PLAIN, "txt2img", (None, None, None)),
    ({"reference_image_url": URL}, MODIFY, "img2img", (0.2, 6.0, 20)),
    ({"metadata": {"reference_image_url": URL}}, MODIFY, "img2img", (0.2, 6.0, 20)),
    ({"reference_image_url": URL, "prompt": " "}, MODIFY, "img2img", (0.2, 6.0, 20)),
    (
        {"reference_image_url": URL, "prompt": "", "metadata": {"exact_copy_mode": True}},
        COPY,
        "img2img",
        (0.05, 1.0, 15),
    ),
    (
        {"reference_image_url": URL, "prompt": " \n", "metadata": {"exact_copy_mode": True}},
        COPY,
        "img2img",
        (0.05, 1.0, 15),
    ),
    # Any words, and it is no copy.
    (
        {"reference_image_url": URL, "metadata": {"exact_copy_mode": True}},
        MODIFY,
        "img2img",
        (0.2, 6.0, 20),
    ),
    (
        {
            "reference_image_url": URL,
            "prompt": "",
            "original_prompt": "a cube",
            "metadata": {"exact_copy_mode": True},
        },
        MODIFY,
        "img2img",
        (0.2, 6.0, 20),
    ),
    # No picture, no copy; a flag that is not true is none.
    ({"prompt": "", "metadata": {"exact_copy_mode": True}}, PLAIN, "txt2img", (None,) * 3),
    (
        {"reference_image_url": URL, "prompt": "", "metadata": {"exact_copy_mode": "true"}},
        MODIFY,
        "img2img",
        (0.2, 6.0, 20),
    ),
    # Frames are a video's.
    ({"metadata": {"start_reference_url": URL}}, PLAIN, "txt2img", (None, None, None)),
]


@pytest.mark.parametrize(("fields", "branch", "pipeline", "defaults"), BRANCHES)
def test_an_images_branch_and_its_defaults(
    fields: dict[str, Any], branch: str, pipeline: str, defaults: tuple[Any, ...]
) -> None:
    plan = plan_job(job(**fields))

    assert (plan.branch, plan.config["pipeline"]) == (branch, pipeline)
    names = ("denoise_strength", "guidance_scale", "num_inference_steps")
    assert tuple(plan.config.get(name) for name in names) == defaults
    assert plan.generation_mode == ("i2i" if pipeline == "img2img" else "txt2img")
    assert sent(job(**fields))["metadata"]["exact_copy_mode"] is (branch == COPY)


@pytest.mark.parametrize(
    ("fields", "denoise"),
    [
        ({"denoise_strength": 0.0}, 0.0),
        ({"denoise_strength": 0.7, "reference_strength": 0.9}, 0.7),
        ({"reference_strength": 0.8}, 0.2),
        ({"reference_strength": 0.0}, 1.0),
        ({"metadata": {"denoise_strength": 0.6}}, 0.6),
        ({"metadata": {"denoise_strength": 1}}, 1.0),
        ({"metadata": {"reference_strength": 0.9}}, 0.1),
        ({"denoise_strength": 0.3, "metadata": {"denoise_strength": 0.6}}, 0.3),
        ({"reference_strength": 0.3, "metadata": {"denoise_strength": 0.6}}, 0.7),
        ({"metadata": {"denoise_strength": None}}, 0.2),
    ],
)
def test_denoise_is_as_given_else_the_rest_of_the_references_strength(
    fields: dict[str, Any], denoise: float
) -> None:
    asked = job(reference_image_url=URL, **fields)

    assert plan_job(asked).config["denoise_strength"] == denoise
    assert read_by_worker(sent(asked)).params.strength == denoise


def test_guidance_and_steps_are_the_jobs_else_the_metadatas() -> None:
    metadata = {"guidance_scale": 5, "num_inference_steps": 30}

    given_there = plan_job(job(metadata=metadata)).config
    given_here = plan_job(job(metadata=metadata, guidance_scale=0.0, steps=7)).config

    assert (given_there["guidance_scale"], given_there["num_inference_steps"]) == (5, 30)
    assert (given_here["guidance_scale"], given_here["num_inference_steps"]) == (0.0, 7)


@pytest.mark.parametrize(
    "metadata",
    [
        {"denoise_strength": "0.5"},
        {"denoise_strength": True},
        {"denoise_strength": 1.5},
        {"denoise_strength": -1},
        {"reference_strength": []},
        {"guidance_scale": "high"},
        {"guidance_scale": 31},
        {"guidance_scale": 10**400},
        {"num_inference_steps": 20.5},
        {"num_inference_steps": 0},
        {"num_inference_steps": False},
        {"seed": "7"},
        {"seed": -1},
        {"seed": 2**31},
    ],
)
def test_a_number_of_the_metadata_that_no_worker_takes_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        plan_job(job(reference_image_url=URL, metadata=metadata))


@pytest.mark.parametrize("denoise", [0.0001, 0.0009])
def test_a_denoise_that_leaves_no_step_is_refused_for_pictures_only(denoise: float) -> None:
    with pytest.raises(Invalid):
        plan_job(job(reference_image_url=URL, denoise_strength=denoise))

    assert plan_job(job(denoise_strength=denoise)).config["denoise_strength"] == denoise


@pytest.mark.parametrize(
    ("asked_for", "used"), [(None, 1), (1, 1), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6), (9, 6)]
)
def test_images_come_by_one_three_and_six(asked_for: int | None, used: int) -> None:
    plan = plan_job(job(num_images=asked_for))

    assert plan.config["num_images"] == used
    changed = {} if asked_for in (None, used) else {"sent": asked_for, "used": used}
    assert plan.adjusted.get("num_images", {}) == changed


def test_a_video_is_one() -> None:
    assert plan_job(job("video_fast", num_images=3)).config["num_images"] == 1


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_are_refused(count: int) -> None:
    with pytest.raises(Invalid):
        plan_job(job(num_images=count))


@pytest.mark.parametrize("job_type", ["sdxl_image_fast", "video_fast"])
def test_seed_0_is_a_seed(job_type: str) -> None:
    asked = job(job_type, seed=0)

    assert sent(asked)["config"]["seed"] == 0
    assert read_by_worker(sent(asked)).params.seed == 0


@pytest.mark.parametrize(
    ("fields", "seed"),
    [
        ({"metadata": {"seed": 0}}, 0),
        ({"metadata": {"seed": 9}, "seed": 3}, 3),
        ({"metadata": {"seed": False}}, None),
        ({}, None),
    ],
)
def test_a_seed_is_the_jobs_else_the_metadatas(fields: dict[str, Any], seed: int | None) -> None:
    assert plan_job(job(**fields)).config.get("seed") == seed


@pytest.mark.parametrize(("count", "most"), [(1, MAX_SEED), (3, MAX_SEED - 2), (6, MAX_SEED - 5)])
def test_the_last_images_seed_fits_too(count: int, most: int) -> None:
    assert read_by_worker(sent(job(seed=most, num_images=count))).params.seed == most
    with pytest.raises(Invalid):
        plan_job(job(seed=most + 1, num_images=count))


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("16:9", "1024x576"),
        ("9:16", "576x1024"),
        ("1:1", "1024x1024"),
        (None, "1024x1024"),
        ([], "1024x1024"),
    ],
)
def test_the_resolution_follows_from_the_aspect_ratio(ratio: Any, size: str) -> None:
    assert plan_job(job(metadata={"aspect_ratio": ratio})).config["resolution"] == size


def test_a_resolution_that_is_asked_for_counts() -> None:
    asked = job(metadata={"aspect_ratio": "16:9"}, resolution="512x768")

    params = read_by_worker(sent(asked)).params
    assert (params.width, params.height) == (512, 768)


# --- videos -------------------------------------------------------------------------------------

START, END = "https://pictures.example.org/s.png", "https://pictures.example.org/e.png"


@pytest.mark.parametrize(
    ("fields", "config", "mode"),
    [
        ({}, {}, "text"),
        ({"reference_image_url": URL}, {"image": URL}, "single"),
        ({"metadata": {"reference_image_url": URL}}, {"image": URL}, "single"),
        ({"metadata": {"start_reference_url": START}}, {"first_frame": START}, "start"),
        ({"metadata": {"end_reference_url": END}}, {"last_frame": END}, "end"),
        (
            {"metadata": {"start_reference_url": START, "end_reference_url": END}},
            {"first_frame": START, "last_frame": END},
            "both",
        ),
        (
            {"reference_image_url": URL, "metadata": {"end_reference_url": END}},
            {"last_frame": END},
            "end",
        ),
    ],
)
def test_a_videos_pictures(fields: dict[str, Any], config: dict[str, str], mode: str) -> None:
    asked = job("video_fast", **fields)

    plan = plan_job(asked)

    names = ("image", "first_frame", "last_frame")
    assert {name: plan.config[name] for name in names if name in plan.config} == config
    assert plan.branch == PLAIN
    assert plan.config["sample_solver"] == "dpm++"
    assert plan.config["pipeline"] == ("img2img" if config else "video")
    read = read_by_worker(sent(asked))
    assert (read.params.mode, read.params.scheduler) == (mode, "dpm++")
    assert [one.source for one in read.references] == list(config.values())


def test_a_videos_size_is_the_workers_unless_one_is_asked_for() -> None:
    free, asked_for = job("video_fast"), job("video_fast", resolution="832x480")

    assert "size" not in plan_job(free).config
    params = read_by_worker(sent(asked_for)).params
    assert (params.width, params.height) == (832, 480)


def test_weighted_terms_of_a_video_are_refused_before_a_worker_does() -> None:
    weighted = {"compel_enabled": True, "compel_weights": "(sharp:1.2)"}

    with pytest.raises(Invalid):
        plan_job(job("video_fast", **weighted))
    assert not plan_job(job("video_fast", compel_weights="(sharp:1.2)")).adjusted


# --- enhancement --------------------------------------------------------------------------------

USER_ASKS = {"user_requested_enhancement": True}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, False),
        ({"metadata": USER_ASKS}, True),
        ({"metadata": {"user_requested_enhancement": "true"}}, False),
        ({"metadata": USER_ASKS, "skip_enhancement": True}, False),
        ({"metadata": {**USER_ASKS, "skip_enhancement": True}}, False),
        ({"metadata": {**USER_ASKS, "bypass_enhancement": True}}, False),
        ({"metadata": {**USER_ASKS, "hard_override": True}}, False),
        ({"metadata": USER_ASKS, "enhancement_model": "none"}, False),
        ({"metadata": {**USER_ASKS, "enhancement_model": "none"}}, False),
        ({"metadata": USER_ASKS, "enhanced_prompt": "done"}, False),
        ({"metadata": USER_ASKS, "prompt": " "}, False),
        ({"reference_image_url": URL}, True),
        ({"reference_image_url": URL, "prompt": " "}, False),
        ({"reference_image_url": URL, "skip_enhancement": True}, False),
        ({"reference_image_url": URL, "metadata": {"skip_enhancement": True}}, False),
        (
            {
                "reference_image_url": URL,
                "prompt": "",
                "metadata": {**USER_ASKS, "exact_copy_mode": True},
            },
            False,
        ),
    ],
)
def test_when_a_prompt_is_enhanced(fields: dict[str, Any], wanted: bool) -> None:
    assert plan_job(job(**fields)).wants_enhancement is wanted


def test_a_videos_reference_alone_asks_for_no_enhancement() -> None:
    assert not plan_job(job("video_fast", reference_image_url=URL)).wants_enhancement
    assert plan_job(job("video_fast", metadata=USER_ASKS)).wants_enhancement


# --- the element --------------------------------------------------------------------------------


def test_what_was_not_given_is_absent() -> None:
    payload = sent(job(), negative_prompt=None, webhook=None)

    assert set(payload) == {
        "id",
        "type",
        "prompt",
        "user_id",
        "config",
        "metadata",
        "compel_enabled",
        "job_id",
        "job_type",
        "quality",
        "format",
        "content_type",
    }
    assert None not in payload["config"].values()


def test_an_empty_negative_prompt_is_sent() -> None:
    assert sent(job(), negative_prompt="")["negative_prompt"] == ""


def test_unknown_metadata_goes_on_to_the_worker_and_stops_nothing() -> None:
    metadata = {"scene_id": "x", "camera_angle": "low", "reference_type": "style", "odd": [1, {}]}

    payload = sent(job(metadata=metadata))

    assert payload["metadata"].items() >= metadata.items()
    assert read_by_worker(payload).params.mode == "text"


numbers = st.integers(0, MAX_SEED - 5)
shares = st.floats(0.001, 1).map(lambda one: round(one, 4)) | st.just(0.0)
metadatas = st.fixed_dictionaries(
    {},
    optional={
        "exact_copy_mode": st.booleans(),
        "user_requested_enhancement": st.booleans(),
        "aspect_ratio": st.sampled_from(["16:9", "9:16", "1:1", "4:3"]),
        "denoise_strength": shares,
        "guidance_scale": st.floats(0, 30),
        "num_inference_steps": st.integers(1, 1000),
        "seed": numbers | st.just(False),
        "reference_image_url": st.sampled_from([URL, "", None]),
        "reference_type": st.sampled_from(["style", "character"]),
        "reference_mode": st.sampled_from(["modify", "copy"]),
        "start_reference_url": st.sampled_from([START, "", None]),
        "end_reference_url": st.sampled_from([END, "", None]),
        "video_reference_mode": st.sampled_from(["none", "both"]),
        "style": st.text(max_size=10),
    },
)
jobs = st.builds(
    JobInput,
    job_type=st.sampled_from(list(JOB_TYPES)),
    prompt=st.text(st.characters(codec="utf-8"), max_size=50),
    reference_image_url=st.sampled_from([URL, None]),
    reference_strength=st.none() | st.floats(0, 0.99).map(lambda one: round(one, 3)),
    denoise_strength=st.none() | shares,
    seed=st.none() | numbers,
    num_images=st.none() | st.integers(1, 6),
    steps=st.none() | st.integers(1, 1000),
    guidance_scale=st.none() | st.floats(0, 30),
    compel_weights=st.none() | st.just("(sharp:1.2), (light:0.8)") | st.just({"sharp": 1.2}),
    metadata=metadatas,
)


@given(jobs, st.none() | st.text(st.characters(codec="utf-8"), max_size=30))
@settings(max_examples=300, **PATIENT)
def test_a_worker_reads_exactly_what_was_asked_for(asked: JobInput, negative: str | None) -> None:
    plan = plan_job(asked)

    read = read_by_worker(json.loads(json.dumps(sent(asked, plan, negative_prompt=negative))))

    config, params = plan.config, read.params
    assert (read.job_id, read.user_id, read.type) == (JOB, USER, plan.worker_type)
    assert read.output == plan.format
    assert read.webhook_secret == "s" * 64
    assert params.num_images == config["num_images"]
    if "seed" in config:
        assert params.seed == config["seed"]
    if plan.branch == COPY:
        assert (params.prompt, params.negative_prompt) == ("", None)
        assert params.strength is not None
        assert params.strength <= 0.05
        assert params.guidance_scale == 1.0
        return
    assert (params.prompt, params.negative_prompt) == (asked.prompt, negative)
    assert read.adjusted == {}
    if "num_inference_steps" in config:
        assert params.steps == config["num_inference_steps"]
    if "guidance_scale" in config:
        assert params.guidance_scale == config["guidance_scale"]
    if not plan.is_video:
        assert f"{params.width}x{params.height}" == config["resolution"]
        assert params.mode == ("image" if plan.branch == MODIFY else "text")
    if plan.branch == MODIFY:
        assert params.strength == config["denoise_strength"]

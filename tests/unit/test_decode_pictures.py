"""Pictures that jobs begin from: what real clients send becomes a mode, a strength and sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.catalog import NATIVE_FRAMES, AdapterSpec, Catalog, ModelSpec
from worker.config import Kind, Limits
from worker.errors import (
    InvalidRequest,
    OutOfRange,
    ReferenceForbidden,
    Unsupported,
    WorkerError,
    has_trap_word,
)
from worker.jobs.decode import JobRequest, Wanted, decode_job

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

STORAGE = "https://abc.supabase.co/storage/v1/object/sign/"
URL = STORAGE + "user-library/u-1/photo.png?token=eyJ"
FIRST = STORAGE + "workspace-temp/u-1/first.png?token=eyJ"
LAST = STORAGE + "workspace-temp/u-1/last.png?token=eyJ"


def spec(model_id: str, kind: Kind, adapters: tuple[AdapterSpec, ...] = ()) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        kind=kind,
        path=Path("/models") / model_id,
        shown_path=f"models/{model_id}",
        aliases=(),
        dtype="float16",
        chat_template="chatml",
        config_path=None,
        display_name=model_id,
        default_size=(480, 832) if kind == "wan" else (1024, 1024),
        default_frames=NATIVE_FRAMES,
        adapters=adapters,
    )


FACES = AdapterSpec("faces", "ip_adapter", Path("/models/faces"), Path("/models/vision"))
CATALOG = Catalog([spec("plain", "sdxl"), spec("adapted", "sdxl", (FACES,)), spec("wan", "wan")])


def decode(body: dict[str, Any]) -> JobRequest:
    return decode_job(body, CATALOG, Limits())


def image(**more: Any) -> JobRequest:
    return decode({"type": "sdxl_image_fast", "prompt": "a red cube", **more})


def video(**more: Any) -> JobRequest:
    return decode({"type": "video_fast", "prompt": "a red cube turns", **more})


def refusal(kind: type[WorkerError], body: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught:
        decode({"prompt": "a red cube", **body})
    assert type(caught.value) is kind
    assert not has_trap_word(str(caught.value))
    return str(caught.value)


# --- whole bodies of existing clients ----------------------------------------------------------


def queued(job_type: str, config: dict[str, Any], metadata: dict[str, Any], **root: Any) -> Any:
    """A body as the producer has built it since September 2025."""
    return {
        "id": "5f0c7d3e-8a51-4a54-9d0e-2f6c61a6a001",
        "type": job_type.replace("wan_video_", "video_"),
        "prompt": "a red cube on a table",
        "user_id": "11111111-2222-3333-4444-555555555555",
        "config": config,
        "metadata": {
            "contentType": "sfw",
            "aspect_ratio": "1:1",
            "enhancement_model": "qwen_instruct",
            "nsfw_optimization": False,
            "exact_copy_mode": False,
            "reference_type": "style",
            **metadata,
        },
        "compel_enabled": False,
        "job_id": "5f0c7d3e-8a51-4a54-9d0e-2f6c61a6a001",
        "job_type": job_type,
        "quality": "high" if job_type.endswith("high") else "fast",
        "format": "image" if "image" in job_type else "video",
        "content_type": "sfw",
        **root,
    }


# What such a body always has and no engine needs.
ALWAYS_IGNORED = {
    "config.pipeline",
    "content_type",
    "format",
    "metadata.aspect_ratio",
    "metadata.contentType",
    "metadata.enhancement_model",
    "metadata.nsfw_optimization",
    "metadata.reference_type",
    "quality",
}


def test_a_plain_image_job_of_the_queue_begins_from_nothing() -> None:
    body = queued(
        "sdxl_image_high",
        {"pipeline": "txt2img", "num_images": 3, "resolution": "1024x576", "seed": 123},
        {"reference_image_url": None, "num_inference_steps": 25, "guidance_scale": 7.5},
        negative_prompt="blurry",
    )

    job = decode(body)

    params = job.params
    assert (params.mode, params.strength, job.references) == ("text", None, ())
    assert (params.width, params.height, params.num_images, params.seed) == (1024, 576, 3, 123)
    assert (params.steps, params.guidance_scale, params.negative_prompt) == (25, 7.5, "blurry")
    assert job.adjusted == {}
    assert set(job.ignored) == ALWAYS_IGNORED | {
        "metadata.guidance_scale",
        "metadata.num_inference_steps",
    }


def test_a_modify_job_of_the_queue_is_made_exactly_as_sent() -> None:
    body = queued(
        "sdxl_image_high",
        {
            "pipeline": "img2img",
            "num_images": 1,
            "num_inference_steps": 20,
            "guidance_scale": 6.0,
            "denoise_strength": 0.2,
            "resolution": "1024x1024",
        },
        {
            "reference_image_url": URL,
            "denoise_strength": 0.2,
            "reference_strength": 0.8,
            "reference_mode": "modify",
            "originalEnhancedPrompt": "a cube",
        },
        negative_prompt="blurry",
    )

    job = decode(body)

    params = job.params
    assert (params.mode, params.strength) == ("image", 0.2)
    assert job.references == (Wanted("image", URL),)
    assert (params.steps, params.guidance_scale) == (20, 6.0)
    assert (params.prompt, params.negative_prompt) == ("a red cube on a table", "blurry")
    assert params.passes == 4
    assert job.adjusted == {}
    assert set(job.ignored) == ALWAYS_IGNORED | {
        "metadata.originalEnhancedPrompt",
        "metadata.reference_mode",
        "metadata.reference_strength",
    }


def test_an_exact_copy_job_of_the_queue_is_clamped_as_the_contract_has_it() -> None:
    body = queued(
        "sdxl_image_fast",
        {
            "pipeline": "img2img",
            "num_images": 1,
            "num_inference_steps": 15,
            "guidance_scale": 1.0,
            "denoise_strength": 0.05,
            "resolution": "1024x1024",
        },
        {
            "reference_image_url": URL,
            "denoise_strength": 0.05,
            "exact_copy_mode": True,
            "reference_mode": "copy",
            "reference_type": "character",
        },
        prompt="",
    )

    job = decode(body)

    params = job.params
    assert (params.mode, params.strength) == ("copy", 0.05)
    assert job.references == (Wanted("image", URL),)
    assert (params.prompt, params.negative_prompt) == ("", None)
    assert (params.steps, params.guidance_scale) == (6, 1.0)
    assert params.passes == 1  # and not int(6 * 0.05) = 0, which is no picture
    assert job.adjusted == {"steps": {"sent": 15, "used": 6}}
    assert set(job.ignored) == ALWAYS_IGNORED | {"metadata.reference_mode"}


VIDEO_PICTURES = [
    ("none", {}, {}, "text", ()),
    (
        "single",
        {"image": URL},
        {"reference_image_url": URL},
        "single",
        (Wanted("image", URL),),
    ),
    (
        "start",
        {"first_frame": FIRST},
        {"start_reference_url": FIRST},
        "start",
        (Wanted("first", FIRST),),
    ),
    ("end", {"last_frame": LAST}, {"end_reference_url": LAST}, "end", (Wanted("last", LAST),)),
    (
        "both",
        {"first_frame": FIRST, "last_frame": LAST},
        {"start_reference_url": FIRST, "end_reference_url": LAST},
        "both",
        (Wanted("first", FIRST), Wanted("last", LAST)),
    ),
]


@pytest.mark.parametrize(("said", "config", "metadata", "mode", "wanted"), VIDEO_PICTURES)
@pytest.mark.parametrize("places", ["both", "config", "metadata"])
def test_a_video_job_of_the_queue_has_one_of_five_modes(
    said: str,
    config: dict[str, Any],
    metadata: dict[str, Any],
    mode: str,
    wanted: tuple[Wanted, ...],
    places: str,
) -> None:
    body = queued(
        "wan_video_high",
        {
            "pipeline": "img2img" if config else "video",
            "num_images": 1,
            "resolution": "1024x1024",
            "sample_solver": "dpm++",
            **(config if places != "metadata" else {}),
        },
        {"video_reference_mode": said, **(metadata if places != "config" else {})},
        negative_prompt="blurry",
    )

    job = decode(body)

    params = job.params
    assert (job.type, job.job_type_given, job.output) == ("video_high", "wan_video_high", "video")
    assert (params.mode, params.strength, job.references) == (mode, None, wanted)
    assert (params.steps, params.guidance_scale) == (50, 7.5)
    assert (params.width, params.height, params.frames) == (480, 832, 81)
    assert params.negative_prompt == "blurry"
    assert job.adjusted == {}
    assert set(job.ignored) == ALWAYS_IGNORED | {
        "config.resolution",
        "metadata.video_reference_mode",
    }


def test_a_strength_never_changes_a_videos_guidance_and_is_listed() -> None:
    body = queued(
        "video_fast",
        {"pipeline": "img2img", "image": URL, "denoise_strength": 0.3},
        {"denoise_strength": 0.3, "reference_strength": 0.7},
    )

    job = decode(body)

    assert (job.params.guidance_scale, job.params.strength) == (6.5, None)
    assert set(job.ignored) == ALWAYS_IGNORED | {
        "config.denoise_strength",
        "metadata.denoise_strength",
        "metadata.reference_strength",
    }


def older(variant: str, config: dict[str, Any], **root: Any) -> Any:
    """A body as the producer built it until August 2025."""
    return {
        "id": "5f0c7d3e-8a51-4a54-9d0e-2f6c61a6a001",
        "prompt": "a red cube on a table",
        "user_id": "11111111-2222-3333-4444-555555555555",
        "created_at": "2025-07-08T12:00:00Z",
        "video_id": None,
        "image_id": "i-1",
        "character_id": None,
        "model_variant": variant,
        "bucket": "sdxl_image_high",
        "metadata": {},
        "config": {"content_type": "image", "file_extension": "png", "num_images": 1, **config},
        **root,
    }


OLDER_IGNORED = {
    "bucket",
    "config.content_type",
    "config.enhance_prompt",
    "config.expected_time",
    "config.file_extension",
    "created_at",
    "image_id",
    "model_variant",
}


def test_an_older_image_job_begins_from_the_picture_at_the_top() -> None:
    body = older(
        "lustify_sdxl",
        {
            "width": 1024,
            "height": 1024,
            "num_inference_steps": 50,
            "guidance_scale": 7.5,
            "scheduler": "unipc",
            "frame_num": 1,
            "enhance_prompt": False,
            "reference_strength": 0.85,
            "reference_type": "character",
            "expected_time": 8,
        },
        type="sdxl_image_high",
        reference_image_url=URL,
        reference_strength=0.85,
        reference_type="character",
        exact_copy_mode=False,
        negative_prompt="blurry",
        compel_enabled=False,
        compel_weights=None,
    )

    job = decode(body)

    assert (job.params.mode, job.params.strength) == ("image", 0.15)
    assert job.references == (Wanted("image", URL),)
    assert (job.params.steps, job.params.scheduler) == (50, "unipc")
    assert set(job.ignored) == OLDER_IGNORED | {
        "config.frame_num",
        "config.reference_type",
        "reference_type",
    }


def test_an_older_copy_is_a_copy_although_its_type_is_filled_in() -> None:
    body = older(
        "lustify_sdxl",
        {"num_inference_steps": 15, "guidance_scale": 3, "exact_copy_mode": True},
        type="sdxl_image_fast",
        reference_image_url=URL,
        reference_type="character",
        exact_copy_mode=True,
    )

    job = decode(body)

    assert (job.params.mode, job.params.strength, job.params.prompt) == ("copy", 0.05, "")
    assert job.adjusted == {
        "prompt": {"sent": "a red cube on a table", "used": ""},
        "steps": {"sent": 15, "used": 6},
        "guidance_scale": {"sent": 3.0, "used": 1.0},
    }


def test_an_older_video_job_finds_its_frames_in_the_config_and_at_the_top() -> None:
    config = {
        "size": "480*832",
        "sample_steps": 25,
        "sample_guide_scale": 6.5,
        "sample_solver": "unipc",
        "sample_shift": 5.0,
        "frame_num": 83,
        "enhance_prompt": False,
        "expected_time": 135,
    }
    root = {"start_reference_url": FIRST, "end_reference_url": LAST, "reference_type": "style"}

    job = decode(older("wan_2_1_1_3b", config, type="video_fast", **root))

    assert job.params.mode == "both"
    assert job.references == (Wanted("first", FIRST), Wanted("last", LAST))
    assert set(job.ignored) == OLDER_IGNORED | {"reference_type"}


# --- where a picture is looked for -------------------------------------------------------------


def test_the_producers_place_of_an_images_picture_wins_and_config_image_comes_last() -> None:
    places: list[dict[str, Any]] = [
        {"metadata": {"reference_image_url": "https://e.org/1"}},
        {"config": {"reference_image_url": "https://e.org/2", "image": "https://e.org/4"}},
        {"reference_image_url": "https://e.org/3"},
        {"image": "https://e.org/5"},
    ]
    order = [1, 2, 3, 4, 5]

    found = []
    body: dict[str, Any] = {key: value for one in places for key, value in one.items()}
    for _ in order:
        found.append(image(**body).references[0].source)
        body = _without(body, found[-1])

    assert found == [f"https://e.org/{number}" for number in order]


def _without(body: dict[str, Any], source: str) -> dict[str, Any]:
    return {
        key: {name: one for name, one in value.items() if one != source}
        if isinstance(value, dict)
        else value
        for key, value in body.items()
        if value != source
    }


@pytest.mark.parametrize(
    ("own", "producers", "role"),
    [
        ("image", "reference_image_url", "image"),
        ("first_frame", "start_reference_url", "first"),
        ("last_frame", "end_reference_url", "last"),
    ],
)
def test_the_configs_place_of_a_videos_picture_wins(own: str, producers: str, role: str) -> None:
    body: dict[str, Any] = {
        "config": {own: "https://e.org/1", producers: "https://e.org/4"},
        own: "https://e.org/2",
        "metadata": {producers: "https://e.org/3"},
        producers: "https://e.org/5",
    }

    found: list[Wanted] = []
    for _ in range(5):
        job = video(**body)
        assert job.ignored == ()
        found += job.references
        body = _without(body, found[-1].source)

    assert found == [Wanted(role, f"https://e.org/{number}") for number in range(1, 6)]
    assert video(**body).params.mode == "text"


def test_a_single_picture_beside_frames_is_listed() -> None:
    job = video(first_frame=FIRST, image=URL, metadata={"reference_image_url": URL})

    assert (job.params.mode, job.references) == ("start", (Wanted("first", FIRST),))
    assert job.ignored == ("image", "metadata.reference_image_url")


@pytest.mark.parametrize("kind", ["image_fast", "image_high", "image7b_fast_enhanced"])
def test_image_types_of_wan_look_at_no_picture_and_say_so(kind: str) -> None:
    metadata = {"reference_image_url": URL, "denoise_strength": 0.5, "exact_copy_mode": False}

    job = decode({"type": kind, "prompt": "x", "config": {"image": URL}, "metadata": metadata})

    assert (job.output, job.params.mode, job.references) == ("image", "text", ())
    assert job.ignored == (
        "config.image",
        "metadata.denoise_strength",
        "metadata.reference_image_url",
    )


@pytest.mark.parametrize(
    "key", ["first_frame", "last_frame", "start_reference_url", "end_reference_url"]
)
def test_frames_are_refused_where_an_image_is_asked_for(key: str) -> None:
    for body in ({key: URL}, {"config": {key: URL}}):
        said = refusal(Unsupported, body)

        assert said == f"{key} belongs to videos; an image takes reference_image_url"
    assert image(metadata={key: URL}).ignored == (f"metadata.{key}",)


@pytest.mark.parametrize(
    "key",
    [
        "reference_image_url",
        "start_reference_url",
        "end_reference_url",
        "first_frame",
        "last_frame",
        "image",
        "exact_copy_mode",
        "reference_type",
        "reference_mode",
        "compel_enabled",
        "loras",
    ],
)
@pytest.mark.parametrize("value", [False, None, "", [], {}])
@pytest.mark.parametrize("kind", ["sdxl_image_fast", "video_fast", "image_fast"])
def test_asking_for_nothing_is_no_reason_to_refuse_or_to_list(
    key: str, value: object, kind: str
) -> None:
    tables = {"config": {key: value}, "metadata": {key: value}}

    job = decode({"type": kind, "prompt": "x", key: value, **tables})

    assert (job.params.mode, job.references, job.ignored) == ("text", (), ())


# --- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/a.png",
        "HTTP://example.org:8080/a%20b.png?x=1#y",
        "https://user:secret@example.org/ä.png",
        "https://[2001:db8::1]/a.png",
        "http://169.254.169.254/latest",  # refused where it is fetched
        "user-library/u-1/a b.png",
        "workspace-temp/u-1/j-1/0.png",
        "https://e.org/".ljust(4096, "x"),
    ],
)
def test_an_address_is_kept_as_it_is(source: str) -> None:
    job = image(reference_image_url=source, user_id="u-1")

    assert job.references == (Wanted("image", source),)


@pytest.mark.parametrize(
    "source",
    [
        " ",
        "a.png",
        "/user-library/u/a.png",
        "user-library",
        "user-library/",
        "user-library//a.png",
        "user-library/../secret/a.png",
        "user-library/u/./a.png",
        "user-library/u\\a.png",
        "user-library/u/a\n.png",
        "user-library-2/u/a.png",
        "other-bucket/u/a.png",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "https:example.org/a.png",
        "https://",
        "https://exa\tmple.org/a.png",
        "https://example.org/a.png ",
        "https://[::1/a.png",
        "https://example.org:x/a.png",
    ],
)
@pytest.mark.parametrize("kind", ["sdxl_image_fast", "video_fast"])
def test_what_is_no_address_is_refused_and_not_shown(source: str, kind: str) -> None:
    said = refusal(InvalidRequest, {"type": kind, "image": source})

    assert said == (
        "image must be an http or https URL, or a path that begins with user-library/ or "
        "workspace-temp/"
    )


@pytest.mark.parametrize("value", [5, 0, True, ["https://e.org/"], {"url": "https://e.org/"}])
def test_an_address_of_another_type_is_refused(value: object) -> None:
    for kind in ("sdxl_image_fast", "video_fast"):
        said = refusal(InvalidRequest, {"type": kind, "metadata": {"reference_image_url": value}})

        assert said == "reference_image_url must be a string"


def test_an_address_has_a_longest_and_is_whole_text() -> None:
    said = refusal(OutOfRange, {"image": "https://e.org/".ljust(4097, "x")})
    assert said == "image has 4097 characters; allowed: at most 4096"
    assert "unpaired surrogate" in refusal(InvalidRequest, {"image": "https://e.org/\ud83d"})


def test_a_signed_address_does_not_stand_in_what_is_logged_of_a_job() -> None:
    assert "token=eyJ" not in repr(image(image=URL))


# --- whose pictures ----------------------------------------------------------------------------

OWN = "user-library/u-1/a.png"


@pytest.mark.parametrize(
    "path",
    [
        "user-library/u-2/a.png",
        "workspace-temp/u-2/j-1/0.png",
        "user-library/a.png",
        "user-library/u-1",
        "user-library/u-1.png",
        "user-library/u-10/a.png",
        "user-library/U-1/a.png",
        "user-library/ u-1/a.png",
        "user-library/%75-1/a.png",
        "user-library/x/u-1/a.png",
        "workspace-temp/user-library/u-1/a.png",
    ],
)
def test_a_path_in_storage_outside_the_users_own_folder_is_refused_and_not_shown(path: str) -> None:
    for kind, key in (("sdxl_image_fast", "reference_image_url"), ("video_fast", "first_frame")):
        said = refusal(ReferenceForbidden, {"type": kind, key: path, "user_id": "u-1"})

        assert said == (
            "a picture in storage must lie in the folder of the job's own user_id, as in "
            "user-library/USER_ID/FILE; for any other picture send a signed URL"
        )


@pytest.mark.parametrize("user_id", [None, ""])
def test_a_path_in_storage_needs_a_user(user_id: str | None) -> None:
    kind = InvalidRequest if user_id == "" else ReferenceForbidden  # an empty one is none at all

    assert "user_id" in refusal(kind, {"image": OWN, "user_id": user_id})


@pytest.mark.parametrize("table", ["config", "metadata"])
def test_only_the_user_at_the_top_counts(table: str) -> None:
    body = {"user_id": "u-1", table: {"user_id": "u-2"}}

    refusal(ReferenceForbidden, {**body, "image": "user-library/u-2/a.png"})
    assert image(**body, image=OWN).user_id == "u-1"


@pytest.mark.parametrize("which", ["first_frame", "last_frame"])
def test_each_picture_of_a_job_must_be_the_users_own(which: str) -> None:
    pictures = {"first_frame": OWN, "last_frame": OWN}

    assert len(video(**pictures, user_id="u-1").references) == 2
    refusal(
        ReferenceForbidden,
        {"type": "video", "user_id": "u-1", **pictures, which: "user-library/u-2/a.png"},
    )


def test_a_picture_that_is_not_used_is_nobodys_business() -> None:
    elsewhere = "user-library/u-2/a.png"

    assert video(first_frame=OWN, image=elsewhere, user_id="u-1").params.mode == "start"
    assert decode({"type": "image_fast", "prompt": "x", "image": elsewhere}).references == ()


def test_an_address_outside_the_storage_needs_no_user() -> None:
    assert image(image=URL).references == (Wanted("image", URL),)
    assert image(image=URL, user_id="u-2").references == (Wanted("image", URL),)


# --- how much a picture counts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "strength"),
    [
        ({}, 0.5),
        ({"denoise_strength": 0}, 0.0),
        ({"denoise_strength": 1}, 1.0),
        ({"denoise_strength": 0.001}, 0.001),
        ({"denoise_strength": 0.19999999999999996}, 0.19999999999999996),
        ({"reference_strength": 0.8}, 0.2),
        ({"reference_strength": 0.9}, 0.1),
        ({"reference_strength": 0}, 1.0),
        ({"reference_strength": 1}, 0.0),
        ({"reference_strength": 0.85, "metadata": {"denoise_strength": 0.3}}, 0.3),
        ({"denoise_strength": 0.4, "metadata": {"denoise_strength": 0.3}}, 0.4),
        ({"config": {"denoise_strength": 0.6}, "denoise_strength": 0.4}, 0.6),
        ({"config": {"reference_strength": 0.6}, "reference_strength": 0.4}, 0.4),
        ({"metadata": {"denoise_strength": None, "reference_strength": 0.7}}, 0.3),
    ],
)
def test_a_picture_gets_the_share_of_noise_that_was_sent(
    body: dict[str, Any], strength: float
) -> None:
    job = image(image=URL, **body)

    assert (job.params.mode, job.params.strength) == ("image", strength)
    assert job.adjusted == {}


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ({"denoise_strength": 1.01}, OutOfRange, "denoise_strength is 1.01; allowed: from 0.0"),
        ({"denoise_strength": -0.01}, OutOfRange, "denoise_strength is -0.01; allowed: from 0.0"),
        ({"denoise_strength": 0.0009}, OutOfRange, "allowed: 0, and from 0.001 to 1"),
        ({"denoise_strength": 5e-324}, OutOfRange, "allowed: 0, and from 0.001 to 1"),
        ({"reference_strength": 0.9999}, OutOfRange, "allowed: 0, and from 0.001 to 1"),
        ({"reference_strength": 2}, OutOfRange, "reference_strength is 2.0; allowed: from 0.0"),
        ({"denoise_strength": "0.5"}, InvalidRequest, "denoise_strength must be a number"),
        ({"denoise_strength": True}, InvalidRequest, "denoise_strength must be a number"),
        ({"metadata": {"reference_strength": []}}, InvalidRequest, "must be a number"),
    ],
)
def test_a_share_that_is_none_is_refused(
    body: dict[str, Any], kind: type[WorkerError], said: str
) -> None:
    assert said in refusal(kind, {"image": URL, **body})


def test_a_strength_without_a_picture_is_listed() -> None:
    job = image(config={"denoise_strength": 0.2}, reference_strength=0.8)

    assert (job.params.mode, job.params.strength) == ("text", None)
    assert job.ignored == ("config.denoise_strength", "reference_strength")


def test_the_least_share_leaves_a_picture_one_step_of_a_thousand() -> None:
    params = image(image=URL, denoise_strength=0.001, steps=1).params

    assert (params.nominal_steps, params.passes) == (1000, 1)


# --- exact copy --------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["metadata", "config", ""])
def test_a_copy_lists_everything_that_it_changes(table: str) -> None:
    flag = {"exact_copy_mode": True, "reference_image_url": URL}

    job = image(
        **{
            "negative_prompt": "blurry",
            "steps": 30,
            "guidance_scale": 7.5,
            "denoise_strength": 0.5,
            "compel_enabled": True,
            "compel_weights": "(sharp:1.2)",
            **({table: flag} if table else flag),
        }
    )

    params = job.params
    assert (params.mode, params.prompt, params.negative_prompt) == ("copy", "", None)
    assert (params.steps, params.guidance_scale, params.strength) == (6, 1.0, 0.05)
    assert params.weighted == ()
    assert job.adjusted == {
        "prompt": {"sent": "a red cube", "used": ""},
        "negative_prompt": {"sent": "blurry", "used": None},
        "steps": {"sent": 30, "used": 6},
        "guidance_scale": {"sent": 7.5, "used": 1.0},
        "denoise_strength": {"sent": 0.5, "used": 0.05},
        "compel_weights": {"sent": "(sharp:1.2)", "used": None},
    }
    assert job.ignored == ()


def test_a_copy_lists_nothing_that_was_not_sent() -> None:
    job = decode({"type": "sdxl_image_high", "metadata": {"exact_copy_mode": True}, "image": URL})

    assert (job.params.mode, job.params.steps, job.params.strength) == ("copy", 6, 0.05)
    assert job.params.prompt == ""
    assert job.adjusted == {}


@pytest.mark.parametrize(("sent", "used"), [(0, 0.0), (0.01, 0.01), (0.05, 0.05), (1, 0.05)])
def test_a_copy_lets_a_picture_change_by_a_twentieth_at_most(sent: float, used: float) -> None:
    job = image(image=URL, exact_copy_mode=True, denoise_strength=sent)

    assert (job.params.strength, job.params.steps) == (used, 6)
    assert ("denoise_strength" in job.adjusted) == (sent != used)


def test_a_copy_keeps_its_size_seed_number_and_loras() -> None:
    job = image(image=URL, exact_copy_mode=True, seed=7, num_images=3, resolution="576x1024")

    assert (job.params.seed, job.params.num_images) == (7, 3)
    assert (job.params.width, job.params.height) == (576, 1024)


@pytest.mark.parametrize(
    "body", [{"steps": 0}, {"guidance_scale": 31}, {"prompt": 5}, {"negative_prompt": 5}]
)
def test_a_copy_does_not_excuse_what_is_wrong(body: dict[str, Any]) -> None:
    with pytest.raises(WorkerError):
        image(**{"image": URL, "exact_copy_mode": True, **body})


@pytest.mark.parametrize("body", [{"exact_copy_mode": True}, {"reference_mode": "copy"}])
def test_a_copy_of_nothing_is_refused(body: dict[str, Any]) -> None:
    said = refusal(InvalidRequest, body)

    assert said == "an exact copy needs a picture; send reference_image_url"


@pytest.mark.parametrize("value", ["true", 1, [True]])
def test_a_copy_is_asked_for_with_true_only(value: object) -> None:
    said = refusal(InvalidRequest, {"image": URL, "exact_copy_mode": value})

    assert said == "exact_copy_mode must be true or false"


def test_a_video_knows_no_exact_copy_and_lists_it() -> None:
    """The producer marks a video with a picture and a blank prompt as a copy."""
    job = video(image=URL, metadata={"exact_copy_mode": True})

    assert job.params.mode == "single"
    assert job.params.prompt == "a red cube turns"
    assert job.ignored == ("metadata.exact_copy_mode",)


# --- what somebody says about pictures ---------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "mode"), [("copy", "copy"), ("modify", "image"), (None, "image"), ("", "image")]
)
def test_an_images_reference_mode_may_be_given(said: str | None, mode: str) -> None:
    job = image(image=URL, config={"reference_mode": said})

    assert job.params.mode == mode
    assert job.ignored == ()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"reference_mode": "none", "image": URL}, "reference_mode is none and there is a picture"),
        ({"reference_mode": "modify"}, "reference_mode or reference_type needs a picture"),
        (
            {"reference_mode": "modify", "exact_copy_mode": True, "image": URL},
            "reference_mode is modify and exact_copy_mode is true; send one",
        ),
    ],
)
def test_an_images_reference_mode_that_contradicts_the_rest_is_refused(
    body: dict[str, Any], said: str
) -> None:
    assert said in refusal(InvalidRequest, body)


@pytest.mark.parametrize(("mode", "config"), [(one[0], one[1]) for one in VIDEO_PICTURES])
@pytest.mark.parametrize("key", ["reference_mode", "video_reference_mode"])
def test_a_videos_reference_mode_must_be_that_of_its_pictures(
    mode: str, config: dict[str, Any], key: str
) -> None:
    others = {one[0] for one in VIDEO_PICTURES} - {mode}

    job = video(config={**config, key: mode})

    assert job.params.mode == ("text" if mode == "none" else mode)
    assert job.ignored == ()
    for other in others:
        said = refusal(InvalidRequest, {"type": "video", "config": {**config, key: other}})
        assert said.startswith(
            f"reference_mode is {other} and the pictures that were sent make {mode};"
        )


def test_a_reference_mode_in_the_metadata_is_the_producers_note() -> None:
    metadata = {"video_reference_mode": "both", "reference_mode": "copy"}

    job = video(metadata=metadata)

    assert job.params.mode == "text"
    assert job.ignored == ("metadata.reference_mode", "metadata.video_reference_mode")


@pytest.mark.parametrize(
    ("kind", "known"), [("image", "none, modify, copy"), ("video", "none, single, start, end")]
)
def test_an_unknown_reference_mode_is_refused_with_the_known_ones(kind: str, known: str) -> None:
    said = refusal(Unsupported, {"type": kind, "reference_mode": "middle", "image": URL})

    assert said.startswith(f"this reference_mode is unknown; known: {known}")
    assert refusal(InvalidRequest, {"type": kind, "reference_mode": 1}) == (
        "reference_mode must be a string"
    )


# --- style and character -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["style", "character"])
@pytest.mark.parametrize("in_config", [True, False])
def test_style_and_character_are_read_by_the_models_adapter(kind: str, in_config: bool) -> None:
    asked = {"reference_type": kind}

    job = image(model="adapted", image=URL, **({"config": asked} if in_config else asked))

    assert (job.params.mode, job.params.strength) == (kind, 0.5)
    assert job.references == (Wanted("image", URL),)
    assert (job.params.steps, job.params.passes) == (15, 15)
    assert job.ignored == ()


@pytest.mark.parametrize(
    ("body", "strength", "ignored"),
    [
        ({"reference_strength": 0.9}, 0.9, ()),
        ({"denoise_strength": 0.2}, 0.8, ()),
        ({"denoise_strength": 0.2, "reference_strength": 0.3}, 0.3, ("denoise_strength",)),
        ({"metadata": {"reference_strength": 0}}, 0.0, ()),
        ({"denoise_strength": 0}, 1.0, ()),
    ],
)
def test_an_adapter_counts_as_much_as_the_reference(
    body: dict[str, Any], strength: float, ignored: tuple[str, ...]
) -> None:
    job = image(model="adapted", image=URL, reference_type="style", **body)

    assert (job.params.strength, job.ignored) == (strength, ignored)


def test_composition_is_image_to_image() -> None:
    job = image(image=URL, reference_type="composition", reference_strength=0.75)

    assert (job.params.mode, job.params.strength) == ("image", 0.25)
    assert job.ignored == ()


@pytest.mark.parametrize("kind", ["style", "character"])
def test_without_an_adapter_style_and_character_are_refused_with_what_to_add(kind: str) -> None:
    said = refusal(Unsupported, {"image": URL, "reference_type": kind})

    assert said == (
        f"reference_type {kind} needs an ip_adapter, and model plain has none; "
        "add one to the profile as [[adapters]] with kind, model, path and image_encoder"
    )


@pytest.mark.parametrize("kind", ["style", "composition", "character"])
def test_the_reference_type_of_the_metadata_is_the_producers_filler(kind: str) -> None:
    job = image(model="adapted", image=URL, metadata={"reference_type": kind})

    assert job.params.mode == "image"
    assert job.ignored == ("metadata.reference_type",)


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ({"reference_type": "style"}, InvalidRequest, "needs a picture"),
        ({"reference_type": 5, "image": URL}, InvalidRequest, "reference_type must be a string"),
        ({"reference_type": "mood", "image": URL}, Unsupported, "style, composition, character"),
        (
            {"reference_type": "style", "exact_copy_mode": True, "image": URL},
            InvalidRequest,
            "reference_type style cannot be had as an exact copy",
        ),
    ],
)
def test_a_reference_type_that_cannot_be_had_is_refused(
    body: dict[str, Any], kind: type[WorkerError], said: str
) -> None:
    assert said in refusal(kind, {"model": "adapted", **body})


# --- any combination ---------------------------------------------------------------------------

SOURCES = st.sampled_from(
    [URL, FIRST, "user-library/u/a.png", "user-library/other/a.png", "", None, "a.png"]
)
TABLE = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("image", "reference_image_url"), SOURCES),
        **dict.fromkeys(("first_frame", "start_reference_url"), SOURCES),
        **dict.fromkeys(("last_frame", "end_reference_url"), SOURCES),
        "exact_copy_mode": st.sampled_from([True, False, None]),
        "reference_type": st.sampled_from(["style", "composition", "character", None]),
        "reference_mode": st.sampled_from(["none", "copy", "modify", "single", "both", None]),
        "denoise_strength": st.floats(0, 1) | st.none(),
        "reference_strength": st.floats(0, 1) | st.none(),
    },
)


@settings(max_examples=500, **PATIENT)
@given(
    kind=st.sampled_from(["sdxl_image_fast", "video_fast", "image_fast"]),
    model=st.sampled_from(["plain", "adapted"]),
    root=TABLE,
    config=TABLE,
    metadata=TABLE,
)
def test_every_combination_is_one_consistent_job_or_a_refusal(
    kind: str, model: str, root: dict[str, Any], config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    body = {"type": kind, "prompt": "x", **root, "config": config, "metadata": metadata}
    body["user_id"] = "u"
    if kind.startswith("sdxl"):
        body["model"] = model

    try:
        job = decode(body)
    except (InvalidRequest, OutOfRange, ReferenceForbidden, Unsupported) as exc:
        assert not has_trap_word(str(exc))
        return

    assert "user-library/other/a.png" not in {one.source for one in job.references}
    roles = {one.role for one in job.references}
    expected = {
        "text": set(),
        "single": {"image"},
        "start": {"first"},
        "end": {"last"},
        "both": {"first", "last"},
    }
    assert roles == expected.get(job.params.mode, {"image"})
    images = ("image", "copy", "style", "character")
    assert (job.params.strength is not None) == (job.params.mode in images)
    assert job.params.passes <= job.params.nominal_steps <= 1000
    assert (job.adjusted != {}) <= (job.params.mode == "copy")

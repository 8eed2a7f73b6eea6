"""Job bodies: what existing clients send becomes exact parameters, or is refused with numbers."""

from __future__ import annotations

import json
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
from worker.jobs.decode import JobRequest, decode_job
from worker.jobs.stored import from_json, to_json
from worker.jobs.types import JOB_TYPES, MAX_SEED, SPELLINGS

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

LIMITS = Limits(frames=81, steps=150, images=6, prompt_chars=1000)


def spec(
    model_id: str,
    kind: Kind,
    size: tuple[int, int],
    *aliases: str,
    adapters: tuple[AdapterSpec, ...] = (),
) -> ModelSpec:
    return ModelSpec(
        id=model_id,
        kind=kind,
        path=Path("/models") / model_id,
        shown_path=f"models/{model_id}",
        aliases=aliases,
        dtype="float16",
        chat_template="chatml",
        config_path=None,
        display_name=model_id,
        default_size=size,
        default_frames=NATIVE_FRAMES,
        adapters=adapters,
    )


CATALOG = Catalog(
    [
        spec(
            "sdxl-one",
            "sdxl",
            (1024, 1024),
            "lustify",
            adapters=(AdapterSpec("Ink", "lora", Path("/models/ink"), None),),
        ),
        spec("sdxl-two", "sdxl", (512, 512)),
        spec("wan-one", "wan", (480, 832), "t2v-1.3B"),
    ]
)


def decode(body: Any, limits: Limits = LIMITS) -> JobRequest:
    return decode_job(body, CATALOG, limits)


def image(**more: Any) -> JobRequest:
    return decode({"type": "sdxl_image_fast", "prompt": "a red cube", **more})


def video(**more: Any) -> JobRequest:
    return decode({"type": "video_fast", "prompt": "a red cube", **more})


def refusal(kind: type[WorkerError], body: Any) -> str:
    with pytest.raises(kind) as caught:
        decode(body)
    assert type(caught.value) is kind
    return str(caught.value)


# --- what clients send -------------------------------------------------------------------------


def test_an_image_job_of_an_existing_client_is_taken_whole() -> None:
    body = {
        "id": "5f0c7d3e-8a51-4a54-9d0e-2f6c61a6a001",
        "type": "sdxl_image_high",
        "prompt": "a red cube on a table",
        "negative_prompt": "blurry",
        "user_id": "11111111-2222-3333-4444-555555555555",
        "created_at": "2025-07-08T12:00:00Z",
        "config": {
            "size": "1024x576",
            "num_inference_steps": 30,
            "guidance_scale": 7.0,
            "seed": 1234,
            "num_images": 3,
            "scheduler": "euler_a",
        },
        "metadata": {
            "model_variant": "lustify",
            "exact_copy_mode": False,
            "reference_image_url": None,
            "num_inference_steps": 99,
        },
    }

    job = decode(body)

    assert job.job_id == "5f0c7d3e-8a51-4a54-9d0e-2f6c61a6a001"
    assert (job.type, job.model, job.output) == ("sdxl_image_high", "sdxl-one", "image")
    assert job.params.prompt == "a red cube on a table"
    assert job.params.negative_prompt == "blurry"
    assert (job.params.width, job.params.height) == (1024, 576)
    assert (job.params.steps, job.params.guidance_scale) == (30, 7.0)
    assert (job.params.seed, job.params.num_images) == (1234, 3)
    assert job.params.scheduler == "euler_a"
    assert (job.params.frames, job.params.shift) == (1, None)
    assert job.ignored == (
        "created_at",
        "metadata.model_variant",
        "metadata.num_inference_steps",
    )
    assert job.adjusted == {}
    assert job.user_id == "11111111-2222-3333-4444-555555555555"
    assert job.job_type_given == "sdxl_image_high"


def test_a_video_job_of_an_existing_client_is_taken_whole() -> None:
    job = decode(
        {
            "id": "job-7",
            "type": "video7b_fast_enhanced",
            "prompt": "a red cube turns",
            "config": {
                "size": "480*832",
                "sample_steps": 25,
                "sample_guide_scale": 6.5,
                "sample_solver": "unipc",
                "sample_shift": 3.0,
                "frame_num": 83,
                "resolution": "1280x720",
                "enhance_prompt": True,
                "seed": 0,
            },
        }
    )

    assert (job.type, job.model, job.output) == ("video7b_fast_enhanced", "wan-one", "video")
    assert (job.params.width, job.params.height) == (480, 832)
    assert (job.params.steps, job.params.guidance_scale) == (25, 6.5)
    assert (job.params.scheduler, job.params.shift) == ("unipc", 3.0)
    assert (job.params.frames, job.params.fps, job.params.seed) == (81, 16, 0)
    assert job.adjusted == {"frames": {"sent": 83, "used": 81}}
    assert job.ignored == ("config.enhance_prompt", "config.resolution")


def test_a_body_as_a_person_writes_it_is_taken_whole() -> None:
    job = decode(
        {
            "prompt": "a red cube",
            "width": 640,
            "height": 480,
            "steps": 8,
            "guidance_scale": 0,
            "seed": 7,
            "batch_size": 2,
        }
    )

    assert (job.job_id, job.type, job.output) == (None, "sdxl_image_fast", "image")
    assert (job.params.width, job.params.height) == (640, 480)
    assert (job.params.steps, job.params.guidance_scale) == (8, 0.0)
    assert (job.params.seed, job.params.num_images) == (7, 2)
    assert job.ignored == ()


# --- defaults ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "output", "steps", "guidance"),
    [
        ("sdxl_image_fast", "sdxl", "image", 15, 6.0),
        ("sdxl_image_high", "sdxl", "image", 25, 7.5),
        ("image_fast", "wan", "image", 25, 6.5),
        ("image_high", "wan", "image", 50, 7.5),
        ("video_fast", "wan", "video", 25, 6.5),
        ("video_high", "wan", "video", 50, 7.5),
        ("image7b_fast_enhanced", "wan", "image", 25, 6.5),
        ("image7b_high_enhanced", "wan", "image", 50, 7.5),
        ("video7b_fast_enhanced", "wan", "video", 25, 6.5),
        ("video7b_high_enhanced", "wan", "video", 50, 7.5),
    ],
)
def test_a_type_brings_its_defaults(
    name: str, kind: str, output: str, steps: int, guidance: float
) -> None:
    job = decode({"type": name, "prompt": "x"})

    assert (job.type, job.output) == (name, output)
    assert CATALOG.find(job.model).kind == kind
    assert (job.params.steps, job.params.guidance_scale) == (steps, guidance)
    assert (job.params.num_images, job.params.fps) == (1, 16)
    assert job.params.frames == (81 if output == "video" else 1)
    wan = kind == "wan"
    assert (job.params.scheduler, job.params.shift) == (("dpm++", 5.0) if wan else (None, None))
    assert (job.params.width, job.params.height) == ((480, 832) if wan else (1024, 1024))


def test_every_type_of_the_contract_is_in_the_table_above() -> None:
    assert len(JOB_TYPES) == 10


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("wan_video_fast", "video_fast"),
        ("wan_video_high", "video_high"),
        ("image", "sdxl_image_fast"),
        ("video", "video_fast"),
    ],
)
def test_a_type_may_be_spelled_otherwise(spelling: str, name: str) -> None:
    assert decode({"type": spelling, "prompt": "x"}).type == name
    assert decode({"job_type": spelling, "prompt": "x"}).type == name


@pytest.mark.parametrize("key", ["frames", "frame_num", "fps"])
def test_without_a_type_what_only_videos_have_makes_a_video(key: str) -> None:
    assert decode({"prompt": "x", key: 17}).type == "video_fast"
    assert decode({"prompt": "x", "config": {key: 17}}).type == "video_fast"
    assert decode({"prompt": "x", key: None}).type == "sdxl_image_fast"


def test_an_unknown_type_is_refused_with_every_known_one() -> None:
    said = refusal(Unsupported, {"type": "audio_fast", "prompt": "x"})

    assert all(name in said for name in (*JOB_TYPES, *SPELLINGS))
    assert "audio_fast" not in said


@pytest.mark.parametrize(
    "name", ["chat_enhance", "chat_conversation", "chat_unrestricted", "admin_utilities"]
)
def test_a_chat_type_is_refused_with_where_it_goes(name: str) -> None:
    said = refusal(Unsupported, {"type": name, "prompt": "x"})

    assert said == ("chat is no job: send its messages to POST /chat or /enhance of the chat port")


@pytest.mark.parametrize("name", ["rv51_fast", "rv51_high", "fal_image"])
def test_a_type_of_another_provider_is_refused_as_such(name: str) -> None:
    said = refusal(Unsupported, {"job_type": name, "prompt": "x"})

    assert "belong to other providers" in said
    assert name not in said


def test_the_clients_own_spelling_of_the_type_is_kept() -> None:
    """The producer normalises `type` and leaves `job_type` as it is in the job's row."""
    job = decode({"type": "video_fast", "job_type": "wan_video_fast", "prompt": "x"})

    assert (job.type, job.job_type_given) == ("video_fast", "wan_video_fast")
    assert decode({"type": "wan_video_high", "prompt": "x"}).job_type_given == "wan_video_high"
    assert decode({"job_type": "wan_video_high", "prompt": "x"}).type == "video_high"
    assert decode({"prompt": "x"}).job_type_given == "image"


def test_a_job_type_that_says_something_else_than_the_type_is_listed_as_ignored() -> None:
    job = decode({"type": "video_fast", "job_type": "sdxl_image_high", "prompt": "x"})

    assert (job.type, job.job_type_given) == ("video_fast", "video_fast")
    assert job.ignored == ("job_type",)


@pytest.mark.parametrize("negative", [None, "", "blue"])
def test_a_negative_prompt_is_none_empty_or_text_as_it_was_sent(negative: str | None) -> None:
    assert image(negative_prompt=negative).params.negative_prompt == negative
    assert image().params.negative_prompt is None


@pytest.mark.parametrize("prompt", ["", " ", "  padded  ", "<b>&amp;</b>", "👍🏽\x00\n"])
def test_a_prompt_is_kept_as_it_is(prompt: str) -> None:
    assert image(prompt=prompt).params.prompt == prompt


# --- where values come from --------------------------------------------------------------------


def test_the_config_wins_over_the_top_level() -> None:
    job = image(seed=1, steps=10, width=64, config={"seed": 2, "steps": 20, "width": 128})

    assert (job.params.seed, job.params.steps, job.params.width) == (2, 20, 128)
    assert job.ignored == ()


def test_a_null_in_the_config_leaves_the_word_to_the_top_level() -> None:
    job = image(seed=0, config={"seed": None, "prompt": None})

    assert job.params.seed == 0
    assert job.params.prompt == "a red cube"


def test_the_config_wins_even_under_another_name() -> None:
    job = image(num_inference_steps=10, config={"steps": 20})

    assert job.params.steps == 20


def test_of_two_names_in_one_place_the_contracts_first_wins() -> None:
    job = image(config={"num_inference_steps": 11, "steps": 12, "sample_steps": 13})

    assert job.params.steps == 11
    assert job.ignored == ()


def test_of_the_metadata_only_the_seed_counts_and_it_comes_last() -> None:
    metadata = {"seed": 3, "steps": 99, "width": 64, "prompt": "another"}

    job = image(metadata=metadata)

    assert job.params.seed == 3
    assert (job.params.steps, job.params.width, job.params.prompt) == (15, 1024, "a red cube")
    assert job.ignored == ("metadata.prompt", "metadata.steps", "metadata.width")
    assert image(seed=2, metadata=metadata).params.seed == 2


def test_the_negative_prompt_at_the_top_is_the_final_one() -> None:
    """The producer composes it there from its tables and from what the metadata has."""
    job = image(
        negative_prompt="final",
        config={"negative_prompt": "alias"},
        metadata={"negative_prompt": "the user's part"},
    )

    assert job.params.negative_prompt == "final"
    assert job.ignored == ("metadata.negative_prompt",)
    assert image(config={"negative_prompt": "alias"}).params.negative_prompt == "alias"
    assert image(metadata={"negative_prompt": "part"}).params.negative_prompt is None


def test_steps_and_guidance_of_the_metadata_are_the_forms_and_do_not_count() -> None:
    """The web app fills 25 and 7.5 in there, also when the job asks for nothing."""
    job = image(metadata={"num_inference_steps": 25, "guidance_scale": 7.5})

    assert (job.params.steps, job.params.guidance_scale) == (15, 6.0)
    assert job.ignored == ("metadata.guidance_scale", "metadata.num_inference_steps")


ALIASES: list[tuple[str, str, Any, str, Any]] = [
    ("image", "steps", 9, "steps", 9),
    ("image", "num_inference_steps", 9, "steps", 9),
    ("image", "batch_size", 2, "num_images", 2),
    ("image", "num_images", 2, "num_images", 2),
    ("image", "width", 512, "width", 512),
    ("image", "height", 512, "height", 512),
    ("image", "resolution", "576x1024", "height", 1024),
    ("image", "size", "576x1024", "width", 576),
    ("image", "negative_prompt", "blue", "negative_prompt", "blue"),
    ("image", "guidance_scale", 3.5, "guidance_scale", 3.5),
    ("image", "seed", 5, "seed", 5),
    ("video", "size", "832*480", "width", 832),
    ("video", "frames", 17, "frames", 17),
    ("video", "frame_num", 17, "frames", 17),
    ("video", "fps", 24, "fps", 24),
    ("video", "sample_steps", 9, "steps", 9),
    ("video", "sample_guide_scale", 3.5, "guidance_scale", 3.5),
    ("video", "sample_shift", 3.0, "shift", 3.0),
    ("video", "sample_solver", "unipc", "scheduler", "unipc"),
    ("video", "reference_mode", "none", "mode", "text"),
]


@pytest.mark.parametrize(("kind", "key", "sent", "name", "used"), ALIASES)
@pytest.mark.parametrize("in_config", [True, False])
def test_every_documented_name_counts_in_the_config_and_at_the_top(
    kind: str, key: str, sent: Any, name: str, used: Any, in_config: bool
) -> None:
    body = {"config": {key: sent}} if in_config else {key: sent}

    job = decode({"type": kind, "prompt": "x", **body})

    assert getattr(job.params, name) == used
    assert job.ignored == ()


def test_the_producers_own_estimate_of_the_time_is_ignored() -> None:
    assert video(config={"expected_time": 135}).ignored == ("config.expected_time",)


@pytest.mark.parametrize("name", ["config", "metadata"])
def test_a_table_that_is_null_is_as_good_as_none(name: str) -> None:
    assert image(**{name: None}).ignored == ()


@pytest.mark.parametrize("name", ["config", "metadata"])
@pytest.mark.parametrize("value", ["text", 3, [], True])
def test_a_table_that_is_none_is_refused(name: str, value: object) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", name: value})

    assert said == f"{name} must be an object"


def test_a_key_that_is_null_is_as_good_as_absent() -> None:
    assert image(foo=None, config={"bar": None}, metadata={"scene_id": None}).ignored == ()


def test_what_is_not_used_is_listed_with_its_table() -> None:
    job = image(foo=1, fps=24, config={"foo": 1, "bar": 2}, metadata={"foo": {}})

    assert job.ignored == ("config.bar", "config.foo", "foo", "fps", "metadata.foo")


# --- models ------------------------------------------------------------------------------------


def test_a_model_is_found_by_alias() -> None:
    assert image(model="Lustify").model == "sdxl-one"
    assert image(model="sdxl-two").model == "sdxl-two"


def test_a_models_own_size_is_the_default() -> None:
    params = image(model="sdxl-two").params

    assert (params.width, params.height) == (512, 512)


def test_a_model_of_another_kind_is_refused() -> None:
    said = refusal(Unsupported, {"type": "video_fast", "prompt": "x", "model": "sdxl-two"})

    assert said == "model sdxl-two is of kind sdxl and this type needs kind wan"


def test_an_unknown_model_is_refused() -> None:
    said = refusal(Unsupported, {"prompt": "x", "model": "other"})

    assert "lustify" in said


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written", ["1024x576", "1024*576", "1024X576", "1024×576", " 1024 x 576 "]
)
@pytest.mark.parametrize("key", ["size", "resolution"])
def test_a_size_is_width_and_height(written: str, key: str) -> None:
    params = image(**{key: written}).params

    assert (params.width, params.height) == (1024, 576)


def test_for_a_video_only_size_counts() -> None:
    job = video(resolution="1280x720", size="96x64")

    assert (job.params.width, job.params.height) == (96, 64)
    assert job.ignored == ("resolution",)


def test_one_side_may_be_given_alone() -> None:
    params = image(size="1024x576", height=512).params

    assert (params.width, params.height) == (1024, 512)


@pytest.mark.parametrize("written", ["1024", "x576", "1024x", "axb", "-64x64", "1e3x64", ""])
def test_a_size_that_is_none_is_refused_with_an_example(written: str) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", "size": written})

    assert '"1024x1024"' in said


@pytest.mark.parametrize("value", [1024, [1024, 576], {"w": 1}, True])
def test_a_size_of_another_type_is_refused(value: object) -> None:
    assert '"1024x1024"' in refusal(InvalidRequest, {"prompt": "x", "size": value})


@pytest.mark.parametrize(
    ("kind", "size", "side", "step"),
    [
        ("sdxl_image_fast", "1020x1024", "width is 1020", "multiples of 8 from 64"),
        ("sdxl_image_fast", "1024x100", "height is 100", "multiples of 8 from 64"),
        ("sdxl_image_fast", "56x1024", "width is 56", "multiples of 8 from 64"),
        ("video_fast", "488x832", "width is 488", "multiples of 16 from 32"),
        ("video_fast", "480x16", "height is 16", "multiples of 16 from 32"),
        ("image_fast", "0x0", "width is 0", "multiples of 16 from 32"),
    ],
)
def test_a_side_that_the_model_cannot_make_is_refused(
    kind: str, size: str, side: str, step: str
) -> None:
    said = refusal(OutOfRange, {"type": kind, "prompt": "x", "size": size})

    assert side in said
    assert step in said


def test_more_pixels_than_the_profile_allows_are_refused_with_both_numbers() -> None:
    said = refusal(OutOfRange, {"prompt": "x", "size": "1544x1536"})

    assert said == f"1544x1536 is {1544 * 1536} pixels; allowed: at most {1536 * 1536}"


@pytest.mark.parametrize(("kind", "limit"), [("image", "image_pixels"), ("video", "video_pixels")])
def test_the_largest_allowed_picture_is_made(kind: str, limit: str) -> None:
    limits = Limits(**{limit: 128 * 128})

    params = decode({"type": kind, "prompt": "x", "size": "128x128"}, limits).params

    assert (params.width, params.height) == (128, 128)
    with pytest.raises(OutOfRange):
        decode({"type": kind, "prompt": "x", "size": "144x128"}, limits)


def test_the_longest_side_that_a_refusal_names_is_really_allowed() -> None:
    limits = Limits(image_pixels=100_000)
    with pytest.raises(OutOfRange) as caught:
        decode({"prompt": "x", "size": "99999x64"}, limits)
    most = int(str(caught.value).rsplit(" ", 1)[1])

    params = decode({"prompt": "x", "width": most, "height": 64}, limits).params

    assert params.width == most


# --- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 17, 77, 81])
def test_4n_plus_1_frames_are_taken_as_they_are(frames: int) -> None:
    job = video(frames=frames)

    assert job.params.frames == frames
    assert job.adjusted == {}


@pytest.mark.parametrize("frames", [0, -3, 2, 16, 80, 82, 84, 85])
def test_other_numbers_of_frames_are_refused_with_examples(frames: int) -> None:
    said = refusal(OutOfRange, {"type": "video", "prompt": "x", "frames": frames})

    assert said == (f"frames is {frames}; allowed: 4n + 1 from 1 to 81, such as 73, 77, 81")


def test_83_frames_are_no_exception_where_81_are_too_many() -> None:
    with pytest.raises(OutOfRange, match="frames is 83; allowed: 4n"):
        decode({"type": "video", "prompt": "x", "frames": 83}, Limits(frames=17))


# --- seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED, 0.0])
def test_a_seed_is_used_as_it_is(seed: float) -> None:
    assert image(seed=seed).params.seed == seed


@pytest.mark.parametrize("absent", [None, False])
def test_a_seed_that_is_not_locked_leaves_the_word_to_the_next_place(absent: object) -> None:
    job = image(config={"seed": absent}, metadata={"seed": 0})

    assert job.params.seed == 0
    assert job.ignored == ()


def test_a_seed_that_is_true_is_refused() -> None:
    assert refusal(InvalidRequest, {"prompt": "x", "seed": True}) == "seed must be a whole number"


@pytest.mark.parametrize("num_images", [1, 6])
def test_a_drawn_seed_leaves_room_for_every_image(num_images: int) -> None:
    seeds = {image(num_images=num_images).params.seed for _ in range(20)}

    assert len(seeds) > 1
    assert all(0 <= seed <= MAX_SEED - num_images + 1 for seed in seeds)


def test_the_seeds_of_all_images_stay_within_31_bits() -> None:
    most = MAX_SEED - 5

    assert image(num_images=6, seed=most).params.seed == most
    said = refusal(OutOfRange, {"prompt": "x", "num_images": 6, "seed": most + 1})
    assert said == f"seed is {most + 1}; allowed: from 0 to {most}"


# --- ranges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "name", "least", "most", "step"),
    [
        ("image", "steps", "steps", 1, 150, 1),
        ("image", "num_inference_steps", "steps", 1, 150, 1),
        ("image", "sample_steps", "steps", 1, 150, 1),
        ("image", "guidance_scale", "guidance_scale", 0.0, 30.0, 0.01),
        ("image", "sample_guide_scale", "guidance_scale", 0.0, 30.0, 0.01),
        ("image", "num_images", "num_images", 1, 6, 1),
        ("image", "batch_size", "num_images", 1, 6, 1),
        ("image", "seed", "seed", 0, MAX_SEED, 1),
        ("video", "fps", "fps", 1, 60, 1),
        ("video", "shift", "shift", 0.1, 20.0, 0.01),
        ("video", "sample_shift", "shift", 0.1, 20.0, 0.01),
    ],
)
def test_a_number_is_taken_up_to_both_ends_of_its_range_and_no_further(
    kind: str, key: str, name: str, least: float, most: float, step: float
) -> None:
    for number in (least, most):
        params = decode({"type": kind, "prompt": "x", key: number}).params
        taken: dict[str, Any] = {"steps": params.steps, "seed": params.seed, "fps": params.fps}
        taken |= {"num_images": params.num_images, "shift": params.shift}
        assert (taken | {"guidance_scale": params.guidance_scale})[name] == number

    for number in (least - step, most + step, -(10**30), 10**30):
        said = refusal(OutOfRange, {"type": kind, "prompt": "x", key: number})
        assert said.startswith(f"{name} ")
        assert f"allowed: from {least} to {most}" in said


def test_a_video_is_one_at_a_time() -> None:
    said = refusal(OutOfRange, {"type": "video", "prompt": "x", "num_images": 2})

    assert said == "num_images is 2; allowed: 1"


@pytest.mark.parametrize("key", ["steps", "seed", "width", "num_images"])
def test_a_whole_number_may_be_written_with_a_point(key: str) -> None:
    job = image(**{key: 64.0 if key == "width" else 3.0})

    assert job.params.width == (64 if key == "width" else 1024)


@pytest.mark.parametrize("key", ["steps", "seed", "width", "height", "num_images"])
@pytest.mark.parametrize("value", ["15", 15.5, True, [15], {}])
def test_a_whole_number_of_another_type_is_refused(key: str, value: object) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", key: value})

    assert said == f"{key} must be a whole number"


@pytest.mark.parametrize("value", ["7.5", True, [7.5], {}])
def test_a_number_of_another_type_is_refused(value: object) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", "guidance_scale": value})

    assert said == "guidance_scale must be a number"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_unknown_scheduler_is_refused_with_the_known_ones(kind: str) -> None:
    said = refusal(Unsupported, {"type": kind, "prompt": "x", "scheduler": "magic"})

    assert "unipc" in said
    assert ("euler_a" in said) == (kind == "image")


@pytest.mark.parametrize("least", ["bit", "close", "lossy"])
def test_the_least_exactness_is_the_jobs_own_or_the_profiles(least: str) -> None:
    body = {"prompt": "x"}

    assert decode_job({**body, "exactness": least}, CATALOG, LIMITS, "close").exactness == least
    assert decode_job(body, CATALOG, LIMITS, least).exactness == least
    said = refusal(Unsupported, {**body, "exactness": "rough"})
    assert said == "exactness must be one of bit, close, lossy"


# --- texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, [], "text", 3, {}, True])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    assert refusal(InvalidRequest, body) == "the body must be a JSON object with a prompt"


def test_a_missing_prompt_is_refused() -> None:
    assert refusal(InvalidRequest, {"seed": 1}) == "prompt is missing; it must be a string"


@pytest.mark.parametrize("key", ["prompt", "negative_prompt", "model", "type"])
@pytest.mark.parametrize("value", [3, ["x"], {"x": 1}, False])
def test_a_text_of_another_type_is_refused(key: str, value: object) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", key: value})

    assert said == f"{key} must be a string"


@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_a_text_that_is_too_long_is_refused_with_both_numbers(key: str) -> None:
    said = refusal(OutOfRange, {"prompt": "x", key: "y" * 1001})

    assert said == f"{key} has 1001 characters; allowed: at most 1000"
    assert image(**{key: "y" * 1000})


@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("half", ["\ud83d", "\udc4d", "\udc4d\ud83d"])
def test_half_a_character_is_refused_with_its_place(key: str, half: str) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", key: f"ab{half}"})

    assert said.startswith(f"{key} has an unpaired surrogate (U+{ord(half[0]):04X})")
    assert "at character 2" in said


@pytest.mark.parametrize("key", ["type", "model", "scheduler", "size", "id"])
def test_half_a_character_in_a_value_that_is_used_is_the_clients_mistake(key: str) -> None:
    with pytest.raises(WorkerError) as caught:
        image(**{key: "\ud83d"})

    assert 400 <= caught.value.status < 500


def test_half_a_character_in_what_is_not_used_is_listed_in_a_form_that_can_be_sent() -> None:
    job = image(**{"\ud83d": 1}, metadata={"note": ["\udc4d"], "\udc4d": {}})

    assert job.ignored == ("\\ud83d", "metadata.\\udc4d", "metadata.note")


def test_a_very_long_key_is_listed_by_its_beginning() -> None:
    job = image(**{"x" * 10_000: 1})

    assert len(job.ignored) == 1
    assert job.ignored[0].startswith("x" * 50)
    assert len(job.ignored[0]) < 200


# --- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_id", ["a", "5f0c-1_x.y", "A" * 128])
@pytest.mark.parametrize("key", ["id", "job_id"])
def test_a_job_keeps_the_clients_id(key: str, given_id: str) -> None:
    assert image(**{key: given_id}).job_id == given_id


@pytest.mark.parametrize(
    "given_id", ["", ".", "../x", "a/b", "-a", "a b", "ä", "A" * 129, 7, "a\n"]
)
def test_an_id_that_cannot_name_a_folder_is_refused(given_id: object) -> None:
    assert refusal(InvalidRequest, {"prompt": "x", "id": given_id}).startswith("id must be")


def test_bodies_that_say_the_same_are_equal_in_whatever_order() -> None:
    one = decode({"prompt": "x", "seed": 1, "config": {"steps": 3, "width": 64}})
    other = decode({"config": {"width": 64, "steps": 3}, "seed": 1, "prompt": "x"})
    another = decode({"config": {"width": 64, "steps": 3}, "seed": 2, "prompt": "x"})

    assert one.body == other.body
    assert one.body != another.body


def test_bodies_with_halves_of_characters_are_told_apart() -> None:
    assert image(note="\ud83d").body != image(note="\udc4d").body
    assert image(note="\ud83d").body != image(note="\\ud83d").body


# --- who asks, and who is told -----------------------------------------------------------------


@pytest.mark.parametrize("user_id", ["a", "5f0c-1_x.y", "-", "A" * 128, "..."])
def test_a_user_id_is_kept(user_id: str) -> None:
    assert image(user_id=user_id).user_id == user_id


def test_a_job_may_have_no_user() -> None:
    assert image().user_id is None
    assert image(user_id=None).user_id is None


@pytest.mark.parametrize("user_id", ["", ".", "..", "../x", "a/b", "a b", "ä", "A" * 129, 7, "a\n"])
def test_a_user_id_that_cannot_name_a_folder_is_refused(user_id: object) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", "user_id": user_id})

    assert said.startswith("user_id must be")


@pytest.mark.parametrize(
    "url", ["https://example.org/hook?x=1", "http://10.0.0.1:8080", "HTTPS://EXAMPLE.ORG/"]
)
def test_a_webhook_is_kept_with_its_secret(url: str) -> None:
    job = image(webhook_url=url, webhook_secret="s3cret-value")

    assert (job.webhook_url, job.webhook_secret) == (url, "s3cret-value")
    assert job.ignored == ()
    assert "s3cret-value" not in repr(job)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://example.org/",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://example.org/a b",
        "https://example.org/\n",
        " https://example.org/",
        "https://[::1",
        "https://example.org:0/",
        "https://example.org:99999/",
        "user-library/x",
    ],
)
def test_a_webhook_that_is_no_url_is_refused(url: str) -> None:
    said = refusal(InvalidRequest, {"prompt": "x", "webhook_url": url})

    assert said == "webhook_url must be an http or https URL"


def test_a_webhook_has_bounds() -> None:
    url = "https://example.org/".ljust(2048, "x")

    job = image(webhook_url=url, webhook_secret="s" * 256)

    assert (job.webhook_url, job.webhook_secret) == (url, "s" * 256)
    said = refusal(OutOfRange, {"prompt": "x", "webhook_url": url + "x"})
    assert said == "webhook_url has 2049 characters; allowed: at most 2048"
    said = refusal(OutOfRange, {"prompt": "x", "webhook_url": url, "webhook_secret": "s" * 257})
    assert said == "webhook_secret has 257 characters; allowed: at most 256"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"webhook_url": 5}, "webhook_url must be a string"),
        ({"webhook_secret": "x"}, "webhook_secret needs a webhook_url"),
        ({"webhook_url": "https://e.org", "webhook_secret": 5}, "webhook_secret must be a string"),
        (
            {"webhook_url": "https://e.org", "webhook_secret": ""},
            "webhook_secret is empty; leave it out or send one",
        ),
    ],
)
def test_half_a_webhook_is_refused(body: dict[str, Any], said: str) -> None:
    assert refusal(InvalidRequest, {"prompt": "x", **body}) == said


# --- what the journal keeps --------------------------------------------------------------------


def test_a_stored_job_is_read_back_as_it_was() -> None:
    job = image(
        id="j-1",
        keep_alive=3,
        compel_enabled=True,
        compel_weights={"a": 1.2},
        loras=[{"id": "ink"}],
        webhook_url="https://e.org/",
        webhook_secret="s3cret",
        reference_image_url="https://e.org/a.png",
        exact_copy_mode=True,
        denoise_strength=0.2,
    )

    stored = to_json(job)

    assert from_json(stored) == job
    assert json.loads(stored)["v"] == 1


def test_a_stored_job_of_another_version_is_refused_with_both_numbers() -> None:
    later = json.dumps({"v": 2, "request": {"shape": "unknown"}})

    with pytest.raises(WorkerError) as caught:
        from_json(later)

    assert str(caught.value) == "a stored job is of version 2, and this program reads 1"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"v": 1}', '{"v": "1"}', "\ud83d"])
def test_a_damaged_stored_job_is_refused(damage: str) -> None:
    with pytest.raises(WorkerError, match="a stored job is damaged"):
        from_json(damage)


def test_a_stored_job_that_lost_its_end_is_refused() -> None:
    whole = to_json(image())

    for length in range(0, len(whole), 7):
        with pytest.raises(WorkerError, match="a stored job is damaged"):
            from_json(whole[:length])


# --- anything at all ---------------------------------------------------------------------------

# Texts with every character that JSON can write, halves of surrogate pairs among them.
ANY_TEXT = st.text(st.characters() | st.sampled_from("\ud800\udfff\x00x"), max_size=5)
ANY_NUMBER = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.integers(-2, 90)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | ANY_NUMBER | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "id job_id type job_type prompt negative_prompt model width height resolution size steps"
    " num_inference_steps sample_steps guidance_scale sample_guide_scale seed num_images batch_size"
    " frames frame_num fps scheduler sample_solver shift sample_shift config metadata user_id"
    " webhook_url webhook_secret model_variant loras"
).split()
PICTURE_KEYS = (
    "image first_frame last_frame reference_image_url start_reference_url end_reference_url"
    " exact_copy_mode reference_mode video_reference_mode reference_type denoise_strength"
    " reference_strength compel_enabled compel_weights"
).split()
WORDS = "lustify wan-one 512x512 96*64 unipc x single both copy modify style composition".split()
OTHERS = (1, 17, 64, 83, True, 0.5, 0.04, "https://e.org/a.png", "user-library/u/a.png")
GOOD_ONES = st.sampled_from(
    [*JOB_TYPES, *SPELLINGS, *WORDS, *OTHERS, "(a:1.2), b", {"a": 1.2}, [{"id": "ink"}]]
)
TABLE = st.dictionaries(
    st.sampled_from(KEYS) | st.sampled_from(PICTURE_KEYS) | ANY_TEXT,
    GOOD_ONES | GOOD_ONES | ANY_JSON,
    max_size=4,
)
BODY = st.builds(
    lambda base, top, tables: base | top | tables,
    st.sampled_from([{}, {"prompt": "x"}, {"prompt": "x"}, {"prompt": "x", "type": "video"}]),
    TABLE,
    st.fixed_dictionaries({}, optional={"config": TABLE, "metadata": TABLE}),
)


@settings(max_examples=800, **PATIENT)
@given(body=BODY | ANY_JSON)
def test_every_json_body_is_a_job_or_the_clients_mistake(body: Any) -> None:
    body = json.loads(json.dumps(body))  # exactly what a parser can hand over

    try:
        job = decode(body)
    except WorkerError as exc:
        assert type(exc) in (InvalidRequest, OutOfRange, ReferenceForbidden, Unsupported)
        assert not has_trap_word(str(exc))
    else:
        assert isinstance(job, JobRequest)
        assert 0 <= job.params.seed <= MAX_SEED - job.params.num_images + 1
        assert job.params.frames % 4 == 1
        said = [job.ignored, job.adjusted]
        json.dumps(said, ensure_ascii=False, allow_nan=False).encode()  # they stand in the answer
        assert from_json(to_json(job)) == job

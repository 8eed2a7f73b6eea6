"""From what a client asks for to what a worker gets. Pure: no database, no queue, no model.

The element has the shape that workers in the field take: one object with `config` and `metadata`.
Every value that is sent otherwise than it came is listed in `adjusted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import Invalid, InvalidRequest

SDXL_LIST, WAN_LIST = "sdxl_queue", "wan_queue"
COPY, MODIFY, PLAIN = "copy", "modify", "plain"

# What clients name, and what workers know it as.
JOB_TYPES = {
    "sdxl_image_fast": "sdxl_image_fast",
    "sdxl_image_high": "sdxl_image_high",
    "video_fast": "video_fast",
    "video_high": "video_high",
    "wan_video_fast": "video_fast",
    "wan_video_high": "video_high",
}
# (denoise, guidance, steps) of a job with a reference that says nothing: contract of queue-job.
_DEFAULTS = {COPY: (0.05, 1.0, 15), MODIFY: (0.20, 6.0, 20)}
_SIZES = {"16:9": "1024x576", "9:16": "576x1024"}
_SQUARE = "1024x1024"
_COUNTS = (1, 3, 6)  # images of a job
MAX_SEED = 2**31 - 1
MAX_STEPS, MAX_GUIDANCE = 1000, 30.0
LEAST_DENOISE = 0.001  # below it, but for 0, workers refuse a picture to begin from


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInput:
    """A job as it is asked for."""

    job_type: str
    prompt: str = ""
    original_prompt: str | None = None
    enhanced_prompt: str | None = None
    quality: str | None = None
    format: str | None = None
    model_type: str | None = None
    reference_image_url: str | None = None
    reference_strength: float | None = None
    denoise_strength: float | None = None
    seed: int | None = None
    num_images: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    resolution: str | None = None
    negative_prompt: str = ""
    compel_enabled: bool = False
    compel_weights: Any = None
    skip_enhancement: bool = False
    content_mode: str | None = None
    character_id: str | None = None
    tags: tuple[str, ...] = ()
    enhancement_model: str | None = None
    allow_original: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What follows from a job's fields alone."""

    worker_type: str  # the element's `type`
    list_name: str
    worker_kind: str  # sdxl | wan
    branch: str  # copy | modify | plain
    is_video: bool
    wants_enhancement: bool
    generation_mode: str  # txt2img | i2i, of the negative prompt
    config: Mapping[str, Any]
    quality: str
    format: str
    adjusted: Mapping[str, Any]


def plan_job(asked: JobInput, *, sdxl_enabled: bool = True) -> JobPlan:
    """Raises InvalidRequest for a type that is none, Invalid for values out of range."""
    worker_type = JOB_TYPES.get(asked.job_type)
    if worker_type is None:
        raise InvalidRequest(f"job_type is none of {', '.join(JOB_TYPES)}")
    is_video = worker_type.startswith("video")
    if not is_video and not sdxl_enabled:
        raise SdxlDisabled(
            "SDXL jobs are switched off here (SDXL_QUEUE_ENABLED=false)",
            fields={"code": SdxlDisabled.code},  # where clients of queue-job look
        )
    if is_video and asked.compel_enabled and asked.compel_weights:
        raise Invalid("compel_weights are for images; send the video without compel_enabled")
    reference = _reference(asked, is_video)
    branch = _branch(asked, reference, is_video)
    adjusted: dict[str, Any] = {}
    config = _config(asked, branch, is_video, reference, adjusted)
    return JobPlan(
        worker_type=worker_type,
        list_name=WAN_LIST if is_video else SDXL_LIST,
        worker_kind="wan" if is_video else "sdxl",
        branch=branch,
        is_video=is_video,
        wants_enhancement=_wants_enhancement(asked, branch),
        generation_mode="i2i" if reference is not None else "txt2img",
        config=config,
        quality=asked.quality or ("high" if "high" in worker_type else "fast"),
        format="video" if is_video else "image",
        adjusted=adjusted,
    )


class SdxlDisabled(Invalid):
    """The operator takes no image jobs."""

    status = 503
    code = "SDXL_DISABLED"


def element(
    asked: JobInput,
    plan: JobPlan,
    *,
    job_id: str,
    user_id: str,
    prompt: str,
    negative_prompt: str | None,
    content_mode: str,
    webhook: tuple[str, str] | None,
) -> dict[str, Any]:
    """The object that a worker gets. negative_prompt: None where none applies. webhook: URL and
    secret; what was not given is absent, as in what the existing producer sends."""
    metadata = {
        **asked.metadata,
        "exact_copy_mode": plan.branch == COPY,
        "contentType": content_mode,
    }
    if asked.reference_image_url is not None:
        metadata["reference_image_url"] = asked.reference_image_url
    if "denoise_strength" in plan.config:
        metadata["denoise_strength"] = plan.config["denoise_strength"]
    whole: dict[str, Any] = {
        "id": job_id,
        "type": plan.worker_type,
        "prompt": prompt,
        "user_id": user_id,
        "config": dict(plan.config),
        "metadata": metadata,
        "negative_prompt": negative_prompt,
        "compel_enabled": asked.compel_enabled,
        "compel_weights": asked.compel_weights,
        "job_id": job_id,
        "job_type": asked.job_type,
        "quality": plan.quality,
        "format": plan.format,
        "content_type": content_mode,
    }
    if webhook is not None:
        whole["webhook_url"], whole["webhook_secret"] = webhook
    return {name: value for name, value in whole.items() if value is not None}


# --- parts ----------------------------------------------------------------------------------


def _reference(asked: JobInput, is_video: bool) -> str | None:
    """A picture that the job begins from; frames to begin and to end with are a video's."""
    frames = ("start_reference_url", "end_reference_url") if is_video else ()
    names = ("reference_image_url", *frames)
    found = [asked.reference_image_url, *(asked.metadata.get(name) for name in names)]
    return next((one for one in found if isinstance(one, str) and one), None)


def _branch(asked: JobInput, reference: str | None, is_video: bool) -> str:
    """An exact copy is flagged, has a reference and no words; other words beside an image's
    reference change it; everything else is made from its prompt."""
    has_words = bool(asked.prompt.strip() or (asked.original_prompt or "").strip())
    is_flagged = asked.metadata.get("exact_copy_mode") is True
    if is_flagged and reference is not None and not has_words and not is_video:
        return COPY
    if reference is not None and not is_video:
        return MODIFY
    return PLAIN


def _wants_enhancement(asked: JobInput, branch: str) -> bool:
    metadata = asked.metadata
    skips = ("skip_enhancement", "bypass_enhancement", "hard_override")
    if asked.skip_enhancement or any(metadata.get(name) is True for name in skips):
        return False
    if branch == COPY:
        return False
    if asked.enhanced_prompt is not None or not asked.prompt.strip():
        return False
    if branch == MODIFY:
        return True
    model = asked.enhancement_model or metadata.get("enhancement_model")
    return metadata.get("user_requested_enhancement") is True and model != "none"


def _config(
    asked: JobInput,
    branch: str,
    is_video: bool,
    reference: str | None,
    adjusted: dict[str, Any],
) -> dict[str, Any]:
    metadata = asked.metadata
    denoise, guidance, steps = _DEFAULTS.get(branch, (None, None, None))
    denoise = _denoise(asked, denoise, changes_picture=reference is not None and not is_video)
    of_metadata = _number(metadata, "guidance_scale", 0.0, MAX_GUIDANCE)
    guidance = _first(asked.guidance_scale, of_metadata, guidance)
    of_metadata = _number(metadata, "num_inference_steps", 1, MAX_STEPS, whole=True)
    steps = _first(asked.steps, of_metadata, steps)
    count = _count(asked, is_video, adjusted)
    pipeline = "img2img" if reference is not None else "video" if is_video else "txt2img"
    found: dict[str, Any] = {
        "pipeline": pipeline,
        "num_images": count,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "denoise_strength": denoise,
        "resolution": _resolution(asked),
        "seed": _seed(asked, count),
    }
    if is_video:
        found |= {
            "first_frame": metadata.get("start_reference_url"),
            "last_frame": metadata.get("end_reference_url"),
            "sample_solver": "dpm++",
        }
        if not (found["first_frame"] or found["last_frame"]):
            found["image"] = asked.reference_image_url or metadata.get("reference_image_url")
        # A video's size is the worker's own unless one is asked for: `resolution` means nothing.
        if asked.resolution is not None:
            found["size"] = asked.resolution
    return {name: value for name, value in found.items() if value not in (None, "")}


def _denoise(asked: JobInput, default: float | None, *, changes_picture: bool) -> float | None:
    """Given as such, else as the rest of a reference's strength; at the top level, else in the
    metadata."""
    given = [asked.denoise_strength, _rest(asked.reference_strength)]
    given.append(_number(asked.metadata, "denoise_strength", 0.0, 1.0))
    given.append(_rest(_number(asked.metadata, "reference_strength", 0.0, 1.0)))
    denoise = _first(*given, default)
    if changes_picture and denoise is not None and 0 < denoise < LEAST_DENOISE:
        raise Invalid(f"denoise_strength is {denoise:g}; 0 and {LEAST_DENOISE} to 1 are taken")
    return None if denoise is None else float(denoise)


def _rest(share: float | None) -> float | None:
    return None if share is None else round(1 - share, 6)


def _seed(asked: JobInput, num_images: int) -> int | None:
    """Each image of a job has a seed of its own, one higher than that before it."""
    most = MAX_SEED - (num_images - 1)
    seed = asked.seed
    if seed is None and asked.metadata.get("seed") is not False:  # sent for a seed that is open
        seed = _number(asked.metadata, "seed", 0, most, whole=True)
    if seed is not None and not 0 <= seed <= most:
        raise Invalid(f"seed is {seed}; 0 to {most} are taken for {num_images} images")
    return seed


def _number(
    metadata: Mapping[str, Any], name: str, least: float, most: float, *, whole: bool = False
) -> Any:
    """A number of the metadata, which nothing has looked at before; None: it has none."""
    value = metadata.get(name)
    if value is None:
        return None
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise Invalid(f"metadata.{name} is not {kind} from {least} to {most}")
    return value


def _first(*values: Any) -> Any:
    return next((one for one in values if one is not None), None)


def _count(asked: JobInput, is_video: bool, adjusted: dict[str, Any]) -> int:
    sent = 1 if asked.num_images is None else asked.num_images
    if sent < 1:
        raise Invalid(f"num_images is {sent}; 1, 3 and 6 are taken")
    used = 1 if is_video else next((one for one in _COUNTS if sent <= one), _COUNTS[-1])
    if used != sent:
        adjusted["num_images"] = {"sent": sent, "used": used}
    return used


def _resolution(asked: JobInput) -> str:
    if asked.resolution is not None:
        return asked.resolution
    return _SIZES.get(str(asked.metadata.get("aspect_ratio")), _SQUARE)

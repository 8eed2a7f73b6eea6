"""What is said about a job to the service that it came from, and to a webhook of its own.

The callback is in the format that `job-callback` has read since its first version. It spreads the
callback's `metadata` over the job's row and over every asset's settings, so these keys are few and
say only what is true of the job as it was made: docs/http-api.md#callbacks.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from worker.errors import (
    NEUTRAL_ERROR,
    Busy,
    ContextTooLong,
    DeadlineExceeded,
    DiskFull,
    Draining,
    EngineLost,
    EngineUnavailable,
    JournalUnavailable,
    ModelUnavailable,
    OutOfDeviceMemory,
    OutOfHostMemory,
    PromptTooLong,
    ReferenceForbidden,
    ReferenceRefused,
    ReferenceTooLarge,
    ReferenceUnavailable,
    has_trap_word,
)
from worker.jobs import types
from worker.jobs.job import Status
from worker.protocol.messages import AssetFile, RenderParams

log = logging.getLogger(__name__)

# The codes that the service's documents know; other errors keep their own, in capitals.
ERROR_TYPES = {
    OutOfDeviceMemory.code: "OOM_ERROR",
    OutOfHostMemory.code: "OOM_ERROR",
    ModelUnavailable.code: "MODEL_LOAD_ERROR",
    PromptTooLong.code: "INVALID_PROMPT",
    ContextTooLong.code: "INVALID_PROMPT",
    ReferenceForbidden.code: "REFERENCE_FRAME_ERROR",
    ReferenceRefused.code: "REFERENCE_FRAME_ERROR",
    ReferenceTooLarge.code: "REFERENCE_FRAME_ERROR",
    ReferenceUnavailable.code: "REFERENCE_FRAME_ERROR",
    DeadlineExceeded.code: "TIMEOUT_ERROR",
    EngineUnavailable.code: "WORKER_UNAVAILABLE",
    EngineLost.code: "WORKER_UNAVAILABLE",
    Draining.code: "WORKER_UNAVAILABLE",
    Busy.code: "WORKER_UNAVAILABLE",
    JournalUnavailable.code: "WORKER_UNAVAILABLE",
    DiskFull.code: "WORKER_UNAVAILABLE",
}

# Modes in which an adapter reads the picture and nothing begins from it.
_ADAPTER_MODES = ("style", "character")
_SUFFIXES = {"image/png": "png", "video/mp4": "mp4"}
# A part of a path in a store: no slash, and neither "." nor "..", which would leave the folder.
_PATH_PART = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,128}")
_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")

Key = tuple[str, str | None]  # of a file and of its thumbnail, None: it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a job at an event of it."""

    job_id: str
    job_type: str  # as its client spelled it
    status: Status
    at: float  # wall clock, seconds: when it came to this status
    worker_id: str | None = None
    params: RenderParams | None = None  # None: the body was refused
    assets: tuple[AssetFile, ...] = ()
    keys: tuple[Key, ...] = ()  # of each asset in the store, without the bucket
    receipt: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # per phase
    error: str | None = None
    error_code: str | None = None
    original_prompt: str = ""  # as it came, before weights were read out of it
    resize_policy: str | None = None  # how a picture was brought to the job's size
    compel_enabled: bool = False  # as the client said
    compel_weights: Any = None  # as the client said

    @property
    def kind(self) -> str | None:
        """Of the model that the type needs: sdxl | wan; None for a type that nobody knows."""
        job_type = types.JOB_TYPES.get(types.SPELLINGS.get(self.job_type, self.job_type))
        return job_type.kind if job_type is not None else None

    @property
    def has_video(self) -> bool:
        return any(asset.type == "video" for asset in self.assets)

    @property
    def used_reference(self) -> bool:
        return self.params is not None and self.params.mode != "text"


def callback_body(facts: Facts) -> dict[str, Any] | None:
    """The body for job-callback; None while the job is not final: a callback with `processing`
    would set the row's `completed_at` (worker/storage/rows.py marks the row instead).

    A cancelled job is called back too. Where its user has cancelled it in the row, the row is
    final and the service skips the call; where it was cancelled at this worker, nothing else would
    ever end the row. Raises ValueError for a completed job whose assets and keys are not as many:
    the service numbers assets by their place.
    """
    if not facts.status.is_final:
        return None
    done = facts.status is Status.COMPLETED
    return {
        "job_id": facts.job_id,
        **({"worker_id": facts.worker_id} if facts.worker_id else {}),
        "status": facts.status.value,
        "assets": _callback_assets(facts) if done else [],
        "error_message": _error(facts),
        # Without it the row would say when the call was heard, which may be hours later.
        "completedAt": time_text(facts.at),
        "metadata": _made(facts) if done else _not_made(facts),
    }


def webhook_body(
    facts: Facts, sequence: int, urls: Sequence[tuple[str | None, str | None]] = ()
) -> dict[str, Any]:
    """The body for a job's own webhook.

    sequence: rises with each event of the job. urls: where each asset and its thumbnail can be
    fetched, as far as there is such a place; none: the job has no public address.
    """
    done = facts.status is Status.COMPLETED
    places = urls or [(None, None)] * len(facts.assets)
    return {
        "event": event_of(facts.status),
        "job_id": facts.job_id,
        "sequence": sequence,
        "status": facts.status.value,
        "type": facts.job_type,
        "at": time_text(facts.at),
        "assets": [
            asset_body(index, asset, url, thumbnail_url)
            for index, (asset, (url, thumbnail_url)) in enumerate(
                zip(facts.assets, places, strict=True)
            )
        ]
        if done
        else [],
        "error": _error(facts),
        "error_code": facts.error_code,
        "receipt": facts.receipt if done else None,
    }


def event_of(status: Status) -> str:
    """The name of what is told. Raises ValueError for `queued`: its client was told so."""
    if status is Status.QUEUED:
        raise ValueError("a job that waits is no event")
    return f"job.{status.value}"


def asset_body(
    index: int, asset: AssetFile, url: str | None, thumbnail_url: str | None
) -> dict[str, Any]:
    """A finished file as clients are shown it: docs/http-api.md#assets."""
    shown: dict[str, Any] = {
        "index": index,
        "type": asset.type,
        "url": url,
        "thumbnail_url": thumbnail_url,
        "mime_type": asset.mime_type,
        "width": asset.width,
        "height": asset.height,
        "seed": asset.seed,
        "size_bytes": asset.size_bytes,
        "sha256": asset.sha256,
    }
    if asset.type == "video":
        shown |= {"frame_num": asset.frames, "fps": asset.fps, "duration_s": asset.duration_s}
    return shown


def asset_keys(
    user_id: str | None, job_id: str, assets: Sequence[AssetFile]
) -> tuple[tuple[str, str], ...]:
    """Where each file and its thumbnail lie in the store: {user}/{job}/{index}.png, .mp4 for a
    video, and {index}.thumb.webp. Without a user the key begins with the job.

    Raises ValueError for an id that cannot be a part of a path, and for another kind of file; not
    without files, since a job that was refused for its id is told about too.
    """
    if not assets:
        return ()
    for name, part in (("user_id", user_id), ("job_id", job_id)):
        if part is not None and not _PATH_PART.fullmatch(part):
            raise ValueError(f"{name} cannot be a part of a path")
    folder = job_id if user_id is None else f"{user_id}/{job_id}"
    keys = []
    for index, asset in enumerate(assets):
        suffix = _SUFFIXES.get(asset.mime_type)
        if suffix is None:
            raise ValueError(f"there is no name for a file of type {asset.mime_type}")
        keys.append((f"{folder}/{index}.{suffix}", f"{folder}/{index}.thumb.webp"))
    return tuple(keys)


def serialise(body: dict[str, Any]) -> bytes:
    """The bytes that are signed, kept in the outbox and sent: JSON in UTF-8.

    A receiver that keeps JSON in PostgreSQL refuses a NUL and half a surrogate pair, and would
    refuse them for ever, so U+FFFD stands for both; null stands for a number that is none.
    """
    text = json.dumps(_storable(body), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def shown_error(error: str) -> str:
    """An error's text without the words that a client misreads."""
    if has_trap_word(error):
        log.warning("this error text is not shown to the client: %s", error)
        return NEUTRAL_ERROR
    return error


def time_text(at: float) -> str:
    """Wall clock seconds as ISO 8601 in UTC, such as 2026-01-02T03:04:05.678Z."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _error(facts: Facts) -> str | None:
    match facts.status:
        case Status.FAILED:
            return shown_error(facts.error or NEUTRAL_ERROR)
        case Status.CANCELLED:
            return shown_error(facts.error or "the job was cancelled")
    return None


def _callback_assets(facts: Facts) -> list[dict[str, Any]]:
    return [
        {
            "type": asset.type,
            "url": key,
            "thumbnail_url": thumbnail_key,
            "metadata": _asset_metadata(facts, index, asset),
        }
        for index, (asset, (key, thumbnail_key)) in enumerate(
            zip(facts.assets, facts.keys, strict=True)
        )
    ]


def _asset_metadata(facts: Facts, index: int, asset: AssetFile) -> dict[str, Any]:
    params = _params(facts)
    metadata: dict[str, Any] = {
        "width": asset.width,
        "height": asset.height,
        "format": _SUFFIXES.get(asset.mime_type, asset.mime_type),
        "steps": params.steps,
        "guidance_scale": params.guidance_scale,
        # A video's too: without it the service would make one up.
        "seed": asset.seed,
        "file_size_bytes": asset.size_bytes,
        "asset_index": index,
        # Without guidance nothing is computed from it.
        "negative_prompt_used": bool(params.negative_prompt) and params.guided,
    }
    if asset.type == "video":
        metadata |= {
            "generation_seed": asset.seed,
            "frame_num": asset.frames,
            "fps": asset.fps,
            "duration_seconds": asset.duration_s,
        }
    else:
        metadata["batch_size"] = len(facts.assets)
    if facts.used_reference:
        metadata |= _reference_metadata(params, facts.resize_policy)
    return metadata


def _reference_metadata(params: RenderParams, resize_policy: str | None) -> dict[str, Any]:
    adapter = params.mode in _ADAPTER_MODES
    return {
        # An adapter's strength is no share of noise.
        **({} if params.strength is None or adapter else {"denoise_strength": params.strength}),
        "pipeline": "txt2img" if adapter else "img2img",
        "resize_policy": resize_policy,
    }


def _made(facts: Facts) -> dict[str, Any]:
    params = _params(facts)
    metadata: dict[str, Any] = {
        "seed": params.seed,
        "generation_time": round(sum(facts.seconds.values()), 3),
        "job_type": facts.job_type,
    }
    if facts.has_video:
        return metadata | {
            "content_type": "video",
            "frame_num": facts.assets[0].frames,
            "wan_task": _wan_task(params),
            "reference_mode": params.mode if facts.used_reference else "none",
        }
    weighted = bool(params.weighted)
    metadata |= {
        "num_images": len(facts.assets),
        "original_prompt": facts.original_prompt,
        "final_prompt": _final_prompt(params),
        "compel_enabled": facts.compel_enabled,
        "compel_weights": _shown_weights(facts.compel_weights),
        # A job whose weights cannot be used fails; none is made without them.
        "compel_success": weighted,
        "enhancement_strategy": "compel" if weighted else "none",
        "final_prompt_type": "conditioning_tensor" if weighted else "string",
    }
    if facts.kind == "wan":
        metadata["wan_task"] = _wan_task(params)
    return metadata


def _not_made(facts: Facts) -> dict[str, Any]:
    code = facts.error_code or facts.status.value
    metadata = {
        "error_type": ERROR_TYPES.get(code, code.upper()),
        "job_type": facts.job_type,
        "timestamp": time_text(facts.at),
    }
    if facts.kind == "wan":
        metadata["wan_task"] = _wan_task(facts.params)
    return metadata


def _wan_task(params: RenderParams | None) -> str:
    """By the names of the model's own program: its text-to-video model reads no pictures."""
    return "t2v-1.3B" if params is None or params.mode == "text" else "vace-1.3B"


def _final_prompt(params: RenderParams) -> str:
    terms = (f"({term.text}:{term.weight:g})" for term in params.weighted)
    return ", ".join(part for part in (params.prompt, *terms) if part)


def _shown_weights(given: Any) -> Any:
    """Weights in one of the two forms that there are; a client that does not use them may have
    put anything there."""
    match given:
        case str():
            return given
        case dict() if all(isinstance(weight, int | float | str) for weight in given.values()):
            return given
    return None


def _params(facts: Facts) -> RenderParams:
    if facts.params is None:
        raise ValueError("a job that was refused has made nothing")
    return facts.params


def _storable(value: Any) -> Any:
    match value:
        case str():
            return _NOT_STORABLE.sub("\ufffd", value)
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {_storable(str(key)): _storable(one) for key, one in value.items()}
        case list() | tuple():
            return [_storable(one) for one in value]
    return value

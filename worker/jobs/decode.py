"""A job body, in the shape of existing clients or as a person writes it, to exact parameters.

Precedence: `config.X`, then the top level, then `metadata.X` where the contract has it, then the
type's default. Unknown keys are listed, never refused; a known key that cannot be honoured is
refused, never dropped. docs/http-api.md#jobs.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from worker.catalog import Catalog, ModelSpec
from worker.config import Limits
from worker.errors import InvalidRequest, OutOfRange, Unsupported
from worker.jobs import types
from worker.jsonvalues import (
    keep_alive_s,
    real_number,
    refuse_lone_surrogates,
    shown_key,
    whole_number,
    within,
)
from worker.protocol.messages import RenderParams
from worker.vram.ways import EXACTNESS

PRIORITIES = (-10, 10)  # of device memory; higher goes first

# Keys that ask for a picture to start from, or for weights on words. Doing the job without them
# would be another job.
_REFERENCE_KEYS = (
    "reference_image_url",
    "start_reference_url",
    "end_reference_url",
    "first_frame",
    "last_frame",
    "image",
)
_FLAG_KEYS = ("exact_copy_mode", "compel_enabled", "loras")

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SIZE = re.compile(r"(\d{1,5})\s*[xX*×]\s*(\d{1,5})")


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job that can be run as it stands."""

    job_id: str | None  # None: the client left the choice to us
    type: str
    model: str  # catalog id
    output: str  # image | video
    params: RenderParams
    ignored: tuple[str, ...]
    exactness: str = "bit"  # the least that will do
    priority: int = 0
    keep_alive_s: float | None = None
    adjusted: dict[str, dict[str, int]] = field(default_factory=dict)
    body: str = ""  # fingerprint of what arrived, to tell a repeat from another job


def decode_job(body: Any, catalog: Catalog, limits: Limits, exactness: str = "bit") -> JobRequest:
    """exactness: the least, of jobs that do not say.

    Raises InvalidRequest, OutOfRange or Unsupported, with the allowed range, before any work.
    """
    if not isinstance(body, dict) or not body:
        raise InvalidRequest("the body must be a JSON object with a prompt")
    return _Decoder(body, catalog, limits, exactness).job()


class _Decoder:
    """One body being read; remembers which keys were used."""

    def __init__(self, body: dict[str, Any], catalog: Catalog, limits: Limits, exactness: str):
        self._body = body
        self._catalog = catalog
        self._limits = limits
        self._least = exactness
        self._config = _table(body, "config")
        self._metadata = _table(body, "metadata")
        self._used: set[str] = {"config", "metadata"}
        self._adjusted: dict[str, dict[str, int]] = {}

    def job(self) -> JobRequest:
        type_name, job_type = self._type()
        spec = self._model(job_type)
        self._refuse_what_is_not_done()
        prompt = self._text("prompt")
        if prompt is None:
            raise InvalidRequest("prompt is missing; it must be a string")
        self._check_length("prompt", prompt)
        negative = self._text("negative_prompt")
        if negative is not None:
            self._check_length("negative_prompt", negative)
        width, height = self._size(spec, job_type)
        num_images = self._integer("num_images", "batch_size", default=1)
        most_images = self._limits.images if job_type.kind == "sdxl" else 1
        within("num_images", num_images, 1, most_images)
        params = RenderParams(
            prompt=prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            steps=self._steps(job_type),
            guidance_scale=self._guidance(job_type),
            seed=self._seed(num_images),
            num_images=num_images,
            frames=self._frames(spec, job_type),
            fps=self._fps(job_type),
            scheduler=self._scheduler(job_type),
            shift=self._shift(job_type),
        )
        return JobRequest(
            job_id=self._job_id(),
            type=type_name,
            model=spec.id,
            output=job_type.output,
            params=params,
            exactness=self._exactness(),
            priority=within("priority", self._integer("priority", default=0), *PRIORITIES),
            keep_alive_s=keep_alive_s(self._first("keep_alive")),
            ignored=self._ignored(),
            adjusted=self._adjusted,
            body=_fingerprint(self._body),
        )

    # --- what is made --------------------------------------------------------------------------

    def _type(self) -> tuple[str, types.JobType]:
        given = self._first("type", "job_type", tables=("",))
        if given is None:
            video = any(self._has(key) for key in ("frames", "frame_num", "fps"))
            given = "video" if video else "image"
        if not isinstance(given, str):
            raise InvalidRequest("type must be a string")
        name = types.SPELLINGS.get(given, given)
        if name not in types.JOB_TYPES:
            known = ", ".join([*types.JOB_TYPES, *types.SPELLINGS])
            raise Unsupported(f"this type is unknown; known: {known}")
        return name, types.JOB_TYPES[name]

    def _model(self, job_type: types.JobType) -> ModelSpec:
        given = self._first("model", tables=("",))
        if given is None:
            return self._catalog.default(job_type.kind)
        if not isinstance(given, str):
            raise InvalidRequest("model must be a string")
        spec = self._catalog.find(given)
        if spec.kind != job_type.kind:
            raise Unsupported(
                f"model {spec.id} is of kind {spec.kind} and this type needs kind {job_type.kind}"
            )
        return spec

    def _refuse_what_is_not_done(self) -> None:
        for table, values in self._tables():
            for key in (*_REFERENCE_KEYS, *_FLAG_KEYS):
                if key not in values:
                    continue
                name = f"{table}.{key}" if table else key
                if values[key]:
                    raise Unsupported(
                        f"{name} is not supported by this version; send the job without it"
                    )
                self._used.add(name)  # false, null or empty asks for nothing

    def _job_id(self) -> str | None:
        given = self._first("id", "job_id", tables=("",))
        if given is None:
            return None
        if not isinstance(given, str) or not _ID.fullmatch(given):
            raise InvalidRequest(
                "id must be 1 to 128 letters, digits, dots, dashes or underscores, "
                "beginning with a letter or digit"
            )
        return given

    # --- numbers -------------------------------------------------------------------------------

    def _size(self, spec: ModelSpec, job_type: types.JobType) -> tuple[int, int]:
        keys = ("size",) if job_type.kind == "wan" else ("resolution", "size")
        pair = self._first(*keys)
        width, height = _parse_size(pair) if pair is not None else spec.default_size
        width = self._integer("width", default=width)
        height = self._integer("height", default=height)
        step, least = types.SIZE_STEP[job_type.kind], types.MIN_SIDE[job_type.kind]
        pixels = self._limits.image_pixels
        if job_type.kind == "wan":
            pixels = self._limits.video_pixels
        for name, side in (("width", width), ("height", height)):
            most = pixels // least // step * step
            if side % step or not least <= side <= most:
                raise OutOfRange(
                    f"{name} is {side}; allowed: multiples of {step} from {least} to {most}"
                )
        if width * height > pixels:
            raise OutOfRange(
                f"{width}x{height} is {width * height} pixels; allowed: at most {pixels}"
            )
        return width, height

    def _steps(self, job_type: types.JobType) -> int:
        # Called "steps" in errors, where no "inf" may stand.
        given = self._first("num_inference_steps", "steps", "sample_steps")
        steps = whole_number("steps", given, job_type.steps)
        return within("steps", steps, 1, self._limits.steps)

    def _guidance(self, job_type: types.JobType) -> float:
        guidance = self._number(
            "guidance_scale", "sample_guide_scale", default=job_type.guidance_scale
        )
        return within("guidance_scale", guidance, *types.GUIDANCE_RANGE)

    def _seed(self, num_images: int) -> int:
        most = types.MAX_SEED - (num_images - 1)
        seed = self._integer("seed", default=None, tables=("config", "", "metadata"))
        if seed is None:
            return secrets.randbelow(most + 1)
        return within("seed", seed, 0, most)

    def _frames(self, spec: ModelSpec, job_type: types.JobType) -> int:
        if job_type.output != "video":
            return 1
        asked = self._integer("frames", "frame_num", default=spec.default_frames)
        frames = types.FRAMES_ON_THE_WIRE.get(asked, asked)
        most = self._limits.frames
        if frames % 4 != 1 or not 1 <= frames <= most:
            raise OutOfRange(
                f"frames is {asked}; allowed: 4n + 1 from 1 to {most}, such as "
                f"{', '.join(str(n) for n in range(1, most + 1, 4)[-3:])}"
            )
        if frames != asked:
            self._adjusted["frames"] = {"sent": asked, "used": frames}
        return frames

    def _fps(self, job_type: types.JobType) -> int:
        if job_type.output != "video":
            return 16
        return within("fps", self._integer("fps", default=16), *types.FPS_RANGE)

    def _scheduler(self, job_type: types.JobType) -> str | None:
        wan = job_type.kind == "wan"
        keys = ("scheduler", "sample_solver") if wan else ("scheduler",)
        given = self._first(*keys)
        if given is None:
            return types.WAN_SCHEDULER if wan else None
        if given not in types.SCHEDULERS[job_type.kind]:
            known = ", ".join(types.SCHEDULERS[job_type.kind])
            raise Unsupported(f"this scheduler is unknown; known: {known}")
        return str(given)

    def _shift(self, job_type: types.JobType) -> float | None:
        if job_type.kind != "wan":
            return None
        shift = self._number("shift", "sample_shift", default=types.WAN_SHIFT)
        return within("shift", shift, *types.SHIFT_RANGE)

    def _exactness(self) -> str:
        given = self._first("exactness")
        if given is None:
            return self._least
        if given not in EXACTNESS:
            raise Unsupported(f"exactness must be one of {', '.join(EXACTNESS)}")
        return str(given)

    # --- reading -------------------------------------------------------------------------------

    def _tables(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        return ("config", self._config), ("", self._body), ("metadata", self._metadata)

    def _first(self, *keys: str, tables: tuple[str, ...] = ("config", "")) -> Any:
        """The first value that is there and not null, by table and then by key; all these keys
        count as used."""
        found = None
        for table, values in self._tables():
            if table not in tables:
                continue
            for key in keys:
                if key in values:
                    self._used.add(f"{table}.{key}" if table else key)
                    if found is None:
                        found = values[key]
        return found

    def _has(self, key: str) -> bool:
        return self._config.get(key) is not None or self._body.get(key) is not None

    def _text(self, key: str) -> str | None:
        value = self._first(key)
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(f"{key} must be a string")
        return value

    def _check_length(self, key: str, text: str) -> None:
        refuse_lone_surrogates(key, text)
        if len(text) > self._limits.prompt_chars:
            raise OutOfRange(
                f"{key} has {len(text)} characters; allowed: at most {self._limits.prompt_chars}"
            )

    def _integer(self, *keys: str, default: T, tables: tuple[str, ...] = ("config", "")) -> int | T:
        return whole_number(keys[0], self._first(*keys, tables=tables), default)

    def _number(self, *keys: str, default: float) -> float:
        return real_number(keys[0], self._first(*keys), default)

    def _ignored(self) -> tuple[str, ...]:
        names = (
            (f"{table}.{key}" if table else key, f"{table}.{shown_key(key)}".removeprefix("."))
            for table, values in self._tables()
            for key in values
        )
        return tuple(sorted(shown for name, shown in names if name not in self._used))


def _fingerprint(body: dict[str, Any]) -> str:
    """SHA-256 (hex) of a body, the same for the same values however they were written."""
    try:
        # Escaped to ASCII, because an ignored text may hold what UTF-8 cannot.
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    except RecursionError as exc:
        raise InvalidRequest("the body is nested too deeply") from exc


def _parse_size(value: Any) -> tuple[int, int]:
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise InvalidRequest('a size must be written as "WIDTHxHEIGHT", such as "1024x1024"')
    return int(match[1]), int(match[2])


def _table(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = body.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{key} must be an object")
    return value

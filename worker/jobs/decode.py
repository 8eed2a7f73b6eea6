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
from dataclasses import dataclass, field
from typing import Any

import msgspec

from worker.catalog import Catalog, ModelSpec
from worker.config import Limits
from worker.errors import InvalidRequest, OutOfRange, Unsupported
from worker.jobs import types
from worker.jobs.fields import (
    CONFIG,
    EVERYWHERE,
    ROOT,
    Fields,
    checked_length,
    is_http_url,
    is_null_or_false,
)
from worker.jobs.pictures import Pictures, read_pictures, require_own
from worker.jobs.pictures import Wanted as Wanted
from worker.jobs.weights import read_loras, read_terms
from worker.jsonvalues import keep_alive_s, whole_number, within
from worker.protocol.messages import RenderParams, WeightedTerm
from worker.vram.ways import EXACTNESS

PRIORITIES = (-10, 10)  # of device memory; higher goes first
MAX_WEBHOOK_CHARS = 2048
MAX_SECRET_CHARS = 256

_STEPS = ("num_inference_steps", "steps", "sample_steps")
_GUIDANCE = ("guidance_scale", "sample_guide_scale")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_USER_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,128}")  # a folder's name in storage
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
    # What runs otherwise than it was sent: {name: {"sent": value, "used": value}}.
    adjusted: dict[str, dict[str, Any]] = field(default_factory=dict)
    body: str = ""  # fingerprint of what arrived, to tell a repeat from another job
    references: tuple[Wanted, ...] = ()
    job_type_given: str = ""  # the type as the client spells it
    user_id: str | None = None
    webhook_url: str | None = None
    webhook_secret: str | None = field(default=None, repr=False)


def decode_job(body: Any, catalog: Catalog, limits: Limits, exactness: str = "bit") -> JobRequest:
    """exactness: the least, of jobs that do not say.

    Raises InvalidRequest, OutOfRange or Unsupported, with the allowed range, or ReferenceForbidden,
    before any work.
    """
    if not isinstance(body, dict) or not body:
        raise InvalidRequest("the body must be a JSON object with a prompt")
    return _Decoder(body, catalog, limits, exactness).job()


def is_job_id(text: str) -> bool:
    """Whether a client's text can be the id of a job."""
    return _ID.fullmatch(text) is not None


class _Decoder:
    """One body being read."""

    def __init__(self, body: dict[str, Any], catalog: Catalog, limits: Limits, exactness: str):
        self._body = body
        self._fields = Fields(body)
        self._catalog = catalog
        self._limits = limits
        self._least = exactness
        self._adjusted: dict[str, dict[str, Any]] = {}

    def job(self) -> JobRequest:
        type_name, given, job_type = self._type()
        spec = self._model(job_type)
        user_id = self._user_id()
        pictures = read_pictures(self._fields, spec, job_type)
        for one in pictures.wanted:
            require_own(one, user_id)
        width, height = self._size(spec, job_type)
        num_images = self._fields.integer("num_images", "batch_size", default=1)
        most_images = self._limits.images if job_type.kind == "sdxl" else 1
        within("num_images", num_images, 1, most_images)
        params = RenderParams(
            prompt=self._prompt(pictures),
            negative_prompt=self._text("negative_prompt", tables=(ROOT, CONFIG)),
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
            mode=pictures.mode,
            strength=pictures.strength,
            weighted=self._weighted(job_type),
            loras=read_loras(self._fields.asked("loras"), spec, self._fields.ignore),
        )
        if pictures.mode == "copy":
            params = self._exact_copy(params, pictures)
        webhook_url, webhook_secret = self._webhook()
        return JobRequest(
            job_id=self._job_id(),
            type=type_name,
            model=spec.id,
            output=job_type.output,
            params=params,
            exactness=self._exactness(),
            priority=within("priority", self._fields.integer("priority", default=0), *PRIORITIES),
            keep_alive_s=keep_alive_s(self._fields.first("keep_alive")),
            references=pictures.wanted,
            job_type_given=given,
            user_id=user_id,
            webhook_url=webhook_url,
            webhook_secret=webhook_secret,
            ignored=self._fields.ignored(),
            adjusted=self._adjusted,
            body=_fingerprint(self._body),
        )

    # --- what is made, and for whom ------------------------------------------------------------

    def _type(self) -> tuple[str, str, types.JobType]:
        """The type, as the client spells it, and its defaults.

        The producer of existing clients writes its own spelling into `job_type` and another into
        `type`, which counts.
        """
        given = self._fields.text("type", tables=(ROOT,))
        named = self._fields.text("job_type", tables=(ROOT,))
        if given is None:
            given = named
        if given is None:
            given = "video" if self._fields.has("frames", "frame_num", "fps") else "image"
        name = types.SPELLINGS.get(given, given)
        if name not in types.JOB_TYPES:
            raise Unsupported(_no_type_of_ours(name))
        if named is None:
            named = given
        elif types.SPELLINGS.get(named, named) != name:
            self._fields.release("job_type")
            named = given
        return name, named, types.JOB_TYPES[name]

    def _model(self, job_type: types.JobType) -> ModelSpec:
        given = self._fields.text("model", tables=(ROOT,))
        if given is None:
            return self._catalog.default(job_type.kind)
        spec = self._catalog.find(given)
        if spec.kind != job_type.kind:
            raise Unsupported(
                f"model {spec.id} is of kind {spec.kind} and this type needs kind {job_type.kind}"
            )
        return spec

    def _job_id(self) -> str | None:
        given = self._fields.first("id", "job_id", tables=(ROOT,))
        if given is None:
            return None
        if not isinstance(given, str) or not is_job_id(given):
            raise InvalidRequest(
                "id must be 1 to 128 letters, digits, dots, dashes or underscores, "
                "beginning with a letter or digit"
            )
        return given

    def _user_id(self) -> str | None:
        given = self._fields.first("user_id", tables=(ROOT,))
        if given is None:
            return None
        if not isinstance(given, str) or not _USER_ID.fullmatch(given):
            raise InvalidRequest(
                "user_id must be 1 to 128 letters, digits, dots, dashes or underscores, and not "
                "only one or two dots"
            )
        return given

    def _webhook(self) -> tuple[str | None, str | None]:
        url = self._fields.text("webhook_url")
        secret = self._fields.text("webhook_secret")
        if url is not None:
            checked_length("webhook_url", url, MAX_WEBHOOK_CHARS)
            if not is_http_url(url):
                raise InvalidRequest("webhook_url must be an http or https URL")
        if secret is not None:
            if url is None:
                raise InvalidRequest("webhook_secret needs a webhook_url")
            checked_length("webhook_secret", secret, MAX_SECRET_CHARS)
            if not secret:
                raise InvalidRequest("webhook_secret is empty; leave it out or send one")
        return url, secret

    # --- texts ---------------------------------------------------------------------------------

    def _prompt(self, pictures: Pictures) -> str:
        prompt = self._text("prompt")
        if prompt is not None:
            return prompt
        if pictures.mode == "copy":  # which has none
            return ""
        raise InvalidRequest("prompt is missing; it must be a string")

    def _text(self, key: str, tables: tuple[str, ...] = (CONFIG, ROOT)) -> str | None:
        text = self._fields.text(key, tables=tables)
        if text is not None:
            checked_length(key, text, self._limits.prompt_chars)
        return text

    def _weighted(self, job_type: types.JobType) -> tuple[WeightedTerm, ...]:
        if not self._fields.flag("compel_enabled"):
            return ()
        terms = read_terms(self._fields.asked("compel_weights"))
        if not terms:
            self._fields.release("compel_enabled", "compel_weights")
        elif job_type.kind != "sdxl":
            raise Unsupported(
                "compel_weights are for images of kind sdxl; send the job without compel_enabled"
            )
        return terms

    # --- exact copy ----------------------------------------------------------------------------

    def _exact_copy(self, params: RenderParams, pictures: Pictures) -> RenderParams:
        """The one mode that changes what was sent, as the wire contract has it; all of it is
        listed."""
        asked = params.strength or 0.0
        strength = min(asked, types.COPY_MOST_DENOISE)
        least, most = types.COPY_STEPS
        copied = msgspec.structs.replace(
            params,
            prompt="",
            negative_prompt=None,
            steps=min(max(int(strength * 100), least), most),
            guidance_scale=types.COPY_GUIDANCE,
            strength=strength,
            weighted=(),
        )
        first = self._fields.first
        self._adjust("prompt", first("prompt"), "")
        self._adjust("negative_prompt", params.negative_prompt, None)
        if first(*_STEPS) is not None:
            self._adjust("steps", params.steps, copied.steps)
        if first(*_GUIDANCE) is not None:
            self._adjust("guidance_scale", params.guidance_scale, copied.guidance_scale)
        if pictures.strength_was_sent:
            self._adjust("denoise_strength", asked, strength)
        if params.weighted:
            self._adjust("compel_weights", first("compel_weights"), None)
        return copied

    def _adjust(self, name: str, sent: Any, used: Any) -> None:
        if sent is not None and sent != used:
            self._adjusted[name] = {"sent": sent, "used": used}

    # --- numbers -------------------------------------------------------------------------------

    def _size(self, spec: ModelSpec, job_type: types.JobType) -> tuple[int, int]:
        keys = ("size",) if job_type.kind == "wan" else ("resolution", "size")
        pair = self._fields.first(*keys)
        width, height = _parse_size(pair) if pair is not None else spec.default_size
        width = self._fields.integer("width", default=width)
        height = self._fields.integer("height", default=height)
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
        steps = whole_number("steps", self._fields.first(*_STEPS), job_type.steps)
        return within("steps", steps, 1, self._limits.steps)

    def _guidance(self, job_type: types.JobType) -> float:
        guidance = self._fields.number(*_GUIDANCE, default=job_type.guidance_scale)
        return within("guidance_scale", guidance, *types.GUIDANCE_RANGE)

    def _seed(self, num_images: int) -> int:
        # Clients send false for a seed that is not locked; 0 is a seed.
        given = self._fields.first("seed", tables=EVERYWHERE, absent=is_null_or_false)
        most = types.MAX_SEED - (num_images - 1)
        seed = whole_number("seed", given, None)
        if seed is None:
            return secrets.randbelow(most + 1)
        return within("seed", seed, 0, most)

    def _frames(self, spec: ModelSpec, job_type: types.JobType) -> int:
        if job_type.output != "video":
            return 1
        asked = self._fields.integer("frames", "frame_num", default=spec.default_frames)
        frames = types.FRAMES_ON_THE_WIRE.get(asked, asked)
        most = self._limits.frames
        if frames % 4 != 1 or not 1 <= frames <= most:
            raise OutOfRange(
                f"frames is {asked}; allowed: 4n + 1 from 1 to {most}, such as "
                f"{', '.join(str(n) for n in range(1, most + 1, 4)[-3:])}"
            )
        self._adjust("frames", asked, frames)
        return frames

    def _fps(self, job_type: types.JobType) -> int:
        if job_type.output != "video":
            return 16
        return within("fps", self._fields.integer("fps", default=16), *types.FPS_RANGE)

    def _scheduler(self, job_type: types.JobType) -> str | None:
        wan = job_type.kind == "wan"
        keys = ("scheduler", "sample_solver") if wan else ("scheduler",)
        given = self._fields.first(*keys)
        if given is None:
            return types.WAN_SCHEDULER if wan else None
        if given not in types.SCHEDULERS[job_type.kind]:
            known = ", ".join(types.SCHEDULERS[job_type.kind])
            raise Unsupported(f"this scheduler is unknown; known: {known}")
        return str(given)

    def _shift(self, job_type: types.JobType) -> float | None:
        if job_type.kind != "wan":
            return None
        shift = self._fields.number("shift", "sample_shift", default=types.WAN_SHIFT)
        return within("shift", shift, *types.SHIFT_RANGE)

    def _exactness(self) -> str:
        given = self._fields.first("exactness")
        if given is None:
            return self._least
        if given not in EXACTNESS:
            raise Unsupported(f"exactness must be one of {', '.join(EXACTNESS)}")
        return str(given)


def _no_type_of_ours(name: str) -> str:
    """Where a type is done that is not in the table; or that it is unknown."""
    if name in types.CHAT_TYPES:
        return "chat is no job: send its messages to POST /chat or /enhance of the chat port"
    if name.startswith(types.OTHER_PROVIDERS):
        prefixes = " and ".join(types.OTHER_PROVIDERS)
        return f"types that begin with {prefixes} belong to other providers and are not made here"
    known = ", ".join([*types.JOB_TYPES, *types.SPELLINGS])
    return f"this type is unknown; known: {known}"


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

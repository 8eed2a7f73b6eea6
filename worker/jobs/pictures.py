"""Which pictures a job begins from, what they are for, and how much they count.

Existing clients name one picture under several keys, and their producer writes down what it works
out itself beside what somebody asked for. What counts, and why: docs/http-api.md#references and
docs/decisions/0011-references-as-clients-send-them.md. Nothing is fetched here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from worker.catalog import ModelSpec
from worker.errors import InvalidRequest, OutOfRange, ReferenceForbidden, Unsupported
from worker.jobs import types
from worker.jobs.fields import (
    CONFIG,
    EVERYWHERE,
    METADATA,
    ROOT,
    Fields,
    checked_length,
    is_http_url,
)
from worker.jsonvalues import real_number, within

MAX_SOURCE_CHARS = 4096

# The producer of existing clients puts the picture of an image job into the metadata.
_PRODUCER_FIRST = (METADATA, CONFIG, ROOT)
_FRAME_KEYS = ("first_frame", "last_frame", "start_reference_url", "end_reference_url")
_STORED = re.compile(r"(?:user-library|workspace-temp)(?:/[^/\\\x00-\x1f\x7f]+)+")
_IMAGE_MODES = ("none", "modify", "copy")
_VIDEO_MODES = ("none", "single", "start", "end", "both")
_REFERENCE_TYPES = ("style", "composition", "character")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A picture that has to be fetched before the job can run."""

    role: str  # image | first | last
    # An http or https URL, or a path in storage that begins with its bucket. Not shown: a signed
    # URL opens the picture for everybody.
    source: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a job's pictures are for, in the words of RenderParams."""

    mode: str = "text"
    strength: float | None = None
    wanted: tuple[Wanted, ...] = ()
    strength_was_sent: bool = False  # else `strength` is the default


def read_pictures(fields: Fields, spec: ModelSpec, job_type: types.JobType) -> Pictures:
    """The pictures of a body; keys that this type has no use for stay unused.

    Raises InvalidRequest for what is no picture's address or contradicts itself, OutOfRange, and
    Unsupported for what the model has no weights for.
    """
    if job_type.kind == "sdxl":
        return _of_an_image(fields, spec)
    if job_type.output == "video":
        return _of_a_video(fields)
    return Pictures()  # WAN's image types look at none


def require_own(picture: Wanted, user_id: str | None) -> None:
    """A path in storage is read with the service key, which opens everybody's folders; so the
    folder has to be the user's whose job it is. Raises ReferenceForbidden."""
    if is_http_url(picture.source):
        return  # fetched without a key, as anybody could
    if user_id is None:
        raise ReferenceForbidden(
            "a picture in storage is read for the user whose folder it lies in, and this job has "
            "no user_id; send it, or a signed URL"
        )
    _bucket, owner, *inside = picture.source.split("/")
    if owner != user_id or not inside:
        raise ReferenceForbidden(
            "a picture in storage must lie in the folder of the job's own user_id, as in "
            "user-library/USER_ID/FILE; for any other picture send a signed URL"
        )


# --- SDXL --------------------------------------------------------------------------------------


def _of_an_image(fields: Fields, spec: ModelSpec) -> Pictures:
    for key in _FRAME_KEYS:
        if fields.asked(key) is not None:
            raise Unsupported(f"{key} belongs to videos; an image takes reference_image_url")
    given = fields.asked("reference_image_url", tables=_PRODUCER_FIRST)
    instead = fields.asked("image")
    source = _source("reference_image_url", given) or _source("image", instead)
    is_copy = fields.flag("exact_copy_mode", tables=_PRODUCER_FIRST)
    said = fields.word("reference_mode", known=_IMAGE_MODES)
    kind = _reference_type(fields)
    if said in ("none", "modify") and is_copy:
        raise InvalidRequest(f"reference_mode is {said} and exact_copy_mode is true; send one")
    is_copy = is_copy or said == "copy"
    if source is None:
        if is_copy or said == "modify" or kind is not None:
            need = "an exact copy" if is_copy else "reference_mode or reference_type"
            raise InvalidRequest(f"{need} needs a picture; send reference_image_url")
        return Pictures()
    if said == "none":
        raise InvalidRequest("reference_mode is none and there is a picture; send one of them")
    if kind in ("style", "character"):
        if is_copy:
            raise InvalidRequest(f"reference_type {kind} cannot be had as an exact copy")
        return _of_an_adapter(fields, spec, kind, source)
    denoise, was_sent = _denoise(fields)
    mode = "copy" if is_copy else "image"
    return Pictures(mode, denoise, (Wanted("image", source),), was_sent)


def _reference_type(fields: Fields) -> str | None:
    """The one that somebody asked for, which is never the one in the metadata.

    The producer fills that in by itself, without a picture, too. Its older form wrote the same
    into the other places, and can be told by `model_variant`.
    """
    if fields.has("model_variant"):
        return None
    return fields.word("reference_type", known=_REFERENCE_TYPES)


def _of_an_adapter(fields: Fields, spec: ModelSpec, kind: str, source: str) -> Pictures:
    if spec.ip_adapter is None:
        raise Unsupported(
            f"reference_type {kind} needs an ip_adapter, and model {spec.id} has none; "
            f"{spec.ip_adapter_cure}"
        )
    strength = _share(fields, "reference_strength")
    if strength is None:
        denoise = _share(fields, "denoise_strength")
        strength = types.DEFAULT_DENOISE if denoise is None else _rest(denoise)
    return Pictures(kind, strength, (Wanted("image", source),))


def _denoise(fields: Fields) -> tuple[float, bool]:
    """Share of the noise, and whether it was sent."""
    denoise = _share(fields, "denoise_strength")
    if denoise is None:
        kept = _share(fields, "reference_strength")
        if kept is None:
            return types.DEFAULT_DENOISE, False
        denoise = _rest(kept)
    if 0 < denoise < types.LEAST_DENOISE:
        raise OutOfRange(
            f"denoise_strength is {denoise:g}; allowed: 0, and from {types.LEAST_DENOISE} to 1"
        )
    return denoise, True


def _share(fields: Fields, key: str) -> float | None:
    value = fields.first(key, tables=EVERYWHERE)
    return None if value is None else within(key, real_number(key, value, 0.0), 0.0, 1.0)


def _rest(share: float) -> float:
    """1 - share, as a person computes it: 0.2 for 0.8, not 0.19999999999999996."""
    return float(1 - Decimal(repr(share)))


# --- WAN ---------------------------------------------------------------------------------------


def _of_a_video(fields: Fields) -> Pictures:
    """Strengths have no meaning here and are not read: they never change the guidance."""
    first = _picture(fields, "first_frame", "start_reference_url")
    last = _picture(fields, "last_frame", "end_reference_url")
    if first is None and last is None:
        single = _picture(fields, "image", "reference_image_url")
        mode = "none" if single is None else "single"
    else:
        single = None
        mode = "both" if first and last else "start" if first else "end"
    said = fields.word("reference_mode", "video_reference_mode", known=_VIDEO_MODES)
    if said is not None and said != mode:
        raise InvalidRequest(
            f"reference_mode is {said} and the pictures that were sent make {mode}; "
            "leave reference_mode out or send the pictures that it needs"
        )
    roles = (("image", single), ("first", first), ("last", last))
    wanted = tuple(Wanted(role, source) for role, source in roles if source is not None)
    return Pictures("text" if mode == "none" else mode, None, wanted)


def _picture(fields: Fields, key: str, producers: str) -> str | None:
    """The picture under `key`, else under the producer's own key for it."""
    given = fields.asked(key)
    instead = fields.asked(producers, tables=_PRODUCER_FIRST)
    return _source(key, given) or _source(producers, instead)


# --- addresses ---------------------------------------------------------------------------------


def _source(name: str, value: Any) -> str | None:
    """`value` when it has the form of a picture's address, None when there is none.

    Raises InvalidRequest, and OutOfRange for a longer one than MAX_SOURCE_CHARS.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string")
    checked_length(name, value, MAX_SOURCE_CHARS)
    if not is_http_url(value) and not _is_stored(value):
        raise InvalidRequest(
            f"{name} must be an http or https URL, or a path that begins with user-library/ or "
            "workspace-temp/"
        )
    return value


def _is_stored(path: str) -> bool:
    if _STORED.fullmatch(path) is None:
        return False
    return not {".", ".."} & set(path.split("/"))

"""Pictures that a job names: fetched, checked and written down as they arrived.

A picture that cannot be had fails its job: every way out of here but a `Reference` is an error.
No error names a URL, which may be a signed one and then is a key; at most its host.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from PIL.Image import DecompressionBombError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from worker.errors import (
    ConfigError,
    ReferenceRefused,
    ReferenceTooLarge,
    ReferenceUnavailable,
    WorkerError,
)
from worker.protocol.messages import Reference
from worker.storage.addresses import (
    RETRY_AFTER_S,
    ShouldStop,
    has_scheme,
    never,
    parse_url,
    shown_host,
)
from worker.storage.pinned import Answer, PinnedHttp

BUCKETS = ("user-library", "workspace-temp")

_ACCEPT = {"Accept": "image/png, image/jpeg, image/webp"}
_MAX_PATH_CHARS = 1024  # an object's name in S3, under most storages, has no more
# Some readers of paths decode these to ".", "/" and "\" before they look for parts.
_ENCODED = re.compile(r"%(2e|2f|5c)", re.IGNORECASE)
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MAY_PASS = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """Of one picture."""

    max_bytes: int = 25 << 20
    max_pixels: int = 40_000_000  # some 160 MB of memory while it is looked at
    total_timeout_s: float = 30.0


class StorageReader(Protocol):
    """Where the clients keep their files."""

    def read(
        self, bucket: str, path: str, max_bytes: int, timeout_s: float, should_stop: ShouldStop
    ) -> bytes:
        """An object, whole. path: its name, not encoded.

        Raises ReferenceRefused, ReferenceTooLarge, ReferenceUnavailable or Cancelled.
        """
        ...


class SupabaseObjects:
    """Supabase Storage, read with the service key. Never changes; any thread."""

    def __init__(self, base_url: str, service_key: str, http: PinnedHttp):
        """base_url: of the project. `http` must allow its origin if its address is private.

        Raises ConfigError for a URL or a key that cannot be one.
        """
        try:
            base = parse_url(base_url)
        except ReferenceRefused as exc:
            raise ConfigError(f"SUPABASE_URL: {exc}") from exc
        if not re.fullmatch(r"[!-~]+", service_key):  # an error of a library would quote it
            raise ConfigError("the Supabase service key holds a character that no key has, or none")
        self._host = shown_host(base.host)
        self._objects = f"{base.url.rstrip('/')}/storage/v1/object"
        self._headers = {"Authorization": f"Bearer {service_key}", "apikey": service_key}
        self._http = http

    def read(
        self, bucket: str, path: str, max_bytes: int, timeout_s: float, should_stop: ShouldStop
    ) -> bytes:
        place = "/".join(quote(part, safe="") for part in _parts(f"{bucket}/{path}"))
        answer = self._http.get(
            f"{self._objects}/{place}",
            headers=self._headers,
            max_bytes=max_bytes,
            total_timeout_s=timeout_s,
            should_stop=should_stop,
        )
        # The storage says 400 of an object that is not there.
        return _body(answer, self._host, "the object may be gone, or the service key wrong")


def fetch_picture(
    source: str,
    role: str,
    folder: Path,
    http: PinnedHttp,
    limits: PictureLimits,
    storage: StorageReader | None,
    should_stop: ShouldStop = never,
) -> Reference:
    """Write `folder`/`role`.png, .jpg or .webp with the bytes that `source` gives.

    source: an http or https URL, or a path such as user-library/USER/x.png, which is read from
    `storage`. should_stop: asked several times a second. Raises ReferenceRefused if it will not get
    better, ReferenceTooLarge with the numbers, ReferenceUnavailable if it is worth another try,
    Cancelled when it should stop.
    """
    data = _fetch(source, http, limits, storage, should_stop)
    extension = check_picture(data, limits.max_pixels)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{role}.{extension}"
    part = folder / f"{role}.part"
    part.write_bytes(data)
    part.replace(file)  # half a picture never has the name
    return Reference(role=role, file=str(file), sha256=hashlib.sha256(data).hexdigest())


def check_picture(data: bytes, max_pixels: int) -> str:
    """The extension (png, jpg, webp) of a whole, still picture; by its content alone.

    Its size is read first, then all of it is decoded, which is the only way to know.
    Raises ReferenceRefused or ReferenceTooLarge.
    """
    extension, opened = _kind(data)
    try:
        with opened(BytesIO(data)) as picture:
            width, height = picture.size
            frames = getattr(picture, "n_frames", 1)
            _check_size(width, height, max_pixels)
            if frames != 1:
                raise ReferenceRefused(f"the picture is animated: it has {frames} frames, not one")
            picture.verify()  # of a PNG every checksum but the last, which load() does not want
        with opened(BytesIO(data)) as picture:
            picture.load()
        if extension == "png" and _PNG_END not in data:
            raise ReferenceRefused("the png picture is cut off in its last bytes")
    except (WorkerError, MemoryError):
        raise
    except DecompressionBombError as exc:
        raise ReferenceTooLarge(f"the picture has more than {max_pixels} pixels") from exc
    except Exception as exc:  # of damaged files, Pillow raises a dozen kinds
        raise ReferenceRefused(f"the {extension} picture is cut off or damaged") from exc
    return extension


def _fetch(
    source: str,
    http: PinnedHttp,
    limits: PictureLimits,
    storage: StorageReader | None,
    should_stop: ShouldStop,
) -> bytes:
    if source[:5].lower() == "data:":
        raise ReferenceRefused("data: URLs are not taken; upload the picture and send its URL")
    if has_scheme(source):
        answer = http.get(
            source,
            headers=_ACCEPT,
            max_bytes=limits.max_bytes,
            total_timeout_s=limits.total_timeout_s,
            should_stop=should_stop,
        )
        return _body(answer, shown_host(parse_url(source).host), "a signed URL may have expired")
    bucket, *parts = _parts(source)
    if storage is None:
        raise ReferenceRefused(
            "the picture is a path in the storage, and the storage is not configured: set "
            "SUPABASE_URL, and SUPABASE_SERVICE_KEY or SUPABASE_SERVICE_ROLE_KEY"
        )
    path = "/".join(parts)
    return storage.read(bucket, path, limits.max_bytes, limits.total_timeout_s, should_stop)


def _parts(path: str) -> list[str]:
    """Bucket, folders and name of an object. Raises ReferenceRefused for what leaves a bucket, or
    would for some reader."""
    bucket, *parts = path.split("/")
    if bucket not in BUCKETS or not parts:
        raise ReferenceRefused(
            f"the picture is neither an http or https URL nor a path in {' or '.join(BUCKETS)}"
        )
    if len(path) > _MAX_PATH_CHARS:
        raise ReferenceRefused(
            f"the path in the storage has {len(path)} characters; at most {_MAX_PATH_CHARS}"
        )
    if "\\" in path or not path.isprintable() or _ENCODED.search(path):
        raise ReferenceRefused("the path in the storage has a character that is not taken")
    if any(part in ("", ".", "..") for part in parts):
        raise ReferenceRefused("the path in the storage has an empty part, or . or ..")
    return [bucket, *parts]


def _body(answer: Answer, who: str, hint: str) -> bytes:
    if answer.status == 200:
        return answer.body
    if answer.status >= 500 or answer.status in _MAY_PASS:
        raise ReferenceUnavailable(f"{who} answers {answer.status}", retry_after_s=RETRY_AFTER_S)
    raise ReferenceRefused(f"{who} answers {answer.status}; {hint}")


def _kind(data: bytes) -> tuple[str, type[ImageFile]]:
    # Not Image.open, which loads every format that Pillow knows, and takes a photo with a preview
    # inside (MPO, as many phones write it) for an animation.
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg", JpegImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp", WebPImageFile
    raise ReferenceRefused("what was sent is not a PNG, JPEG or WebP picture")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ReferenceTooLarge(
            f"the picture has {width} x {height} = {width * height} pixels; at most {max_pixels}"
        )

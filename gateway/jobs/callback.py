"""What workers call back, in the three forms that are in use, and what it changes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.errors import InvalidRequest
from gateway.values.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    PROCESSING,
    QUEUED,
    AssetRow,
    Callback,
    CalledAsset,
    Change,
)

_STATUSES = (QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED)
FPS = 16  # of WAN
MAX_ASSETS = 64
MAX_TEXT = 4000
MAX_SIDE = 2**31 - 1  # what the columns hold
MAX_SECONDS = 1e6
_MIME = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp"}


def read_callback(body: Mapping[str, Any]) -> Callback:
    """A callback's body: the present form, the older one, or a webhook's. Raises InvalidRequest."""
    job_id = body.get("job_id") or body.get("jobId")
    status = body.get("status")
    if not isinstance(job_id, str) or not isinstance(status, str):
        raise InvalidRequest("job_id and status are required")
    if not 1 <= len(job_id) <= 36:
        raise InvalidRequest("job_id has 1 to 36 characters")
    if status not in _STATUSES:
        raise InvalidRequest(f"status is none of {', '.join(_STATUSES)}")
    metadata = body.get("metadata")
    sequence = body.get("sequence")
    return Callback(
        job_id=job_id,
        status=status,
        assets=_assets(body),
        error=_error(body),
        metadata=dict(metadata) if isinstance(metadata, Mapping) else _of_receipt(body),
        sequence=sequence if type(sequence) is int and 0 <= sequence < 2**31 else None,
    )


def change_for(job_status: str, last_sequence: int, said: Callback, base_url: str | None) -> Change:
    """What to do with a callback.

    job_status, last_sequence: of the job's row. base_url: of the worker that took the job, for
    assets that it names by path. A job that has ended well stays as it is; one that failed may
    still end well, since a callback may be late. `processing` never overwrites an end.
    """
    if job_status in (COMPLETED, CANCELLED):
        return Change(status=None, why_not=f"the job is {job_status} already")
    if said.sequence is not None and said.sequence <= last_sequence:
        return Change(status=None, why_not="a later event of this job came before")
    if said.status in (QUEUED, PROCESSING) and job_status != QUEUED:
        return Change(status=None, why_not=f"the job is {job_status} already")
    if said.status == QUEUED:
        return Change(status=None, why_not="the job is queued already")
    if said.status == COMPLETED:
        rows = tuple(_row(index, asset, said, base_url) for index, asset in enumerate(said.assets))
        return Change(status=COMPLETED, assets=rows)
    if said.status == FAILED:
        return Change(status=FAILED, error=said.error or "the worker gave no reason")
    return Change(status=said.status)


# --- reading --------------------------------------------------------------------------------


def _assets(body: Mapping[str, Any]) -> tuple[CalledAsset, ...]:
    results = body.get("results")
    listed = body.get("assets")
    if listed is None and isinstance(results, Mapping):
        listed = results.get("assets")
    if listed is None:
        return ()
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
        raise InvalidRequest("assets is a list")
    if len(listed) > MAX_ASSETS:
        raise InvalidRequest(f"{len(listed)} assets; {MAX_ASSETS} are the most")
    return tuple(_asset(index, one) for index, one in enumerate(listed))


def _asset(index: int, one: Any) -> CalledAsset:
    if not isinstance(one, Mapping):
        raise InvalidRequest(f"assets[{index}] is not an object")
    url = one.get("url") or one.get("tempStoragePath")
    if not isinstance(url, str) or not 1 <= len(url) <= 4096:
        raise InvalidRequest(f"assets[{index}].url is required, of 4096 characters at most")
    thumbnail = one.get("thumbnail_url")
    metadata = one.get("metadata")
    # A webhook has an asset's numbers beside its URL, the other forms below `metadata`.
    whole = {name: value for name, value in one.items() if isinstance(value, int | float | str)}
    if isinstance(metadata, Mapping):
        whole |= metadata
    for older, newer in (("fileSizeBytes", "file_size_bytes"), ("mimeType", "mime_type"),
                         ("durationSeconds", "duration_seconds")):  # fmt: skip
        if older in one:
            whole.setdefault(newer, one[older])
    return CalledAsset(
        asset_type="video" if _extension(url, whole) in ("mp4", "webm", "mov") else "image",
        url=url,
        thumbnail_url=thumbnail if isinstance(thumbnail, str) else None,
        metadata=whole,
    )


def _extension(url: str, metadata: Mapping[str, Any]) -> str:
    """By the URL's name; by what the worker says where that has none (/jobs/ID/assets/0)."""
    name = url.partition("?")[0].rpartition("/")[2]
    if "." in name:
        return name.rpartition(".")[2].lower()
    said = str(metadata.get("format") or metadata.get("mime_type") or metadata.get("type") or "")
    said = said.rpartition("/")[2].lower()
    return "mp4" if said == "video" else said


def _error(body: Mapping[str, Any]) -> str | None:
    for name in ("errorMessage", "error_message", "error"):
        found = body.get(name)
        if isinstance(found, str) and found:
            return found[:MAX_TEXT]
    metadata = body.get("metadata")
    kind = metadata.get("error_type") if isinstance(metadata, Mapping) else body.get("error_code")
    return f"{kind}"[:MAX_TEXT] if kind else None


def _of_receipt(body: Mapping[str, Any]) -> dict[str, Any]:
    """A webhook's receipt takes the place of a callback's metadata."""
    receipt = body.get("receipt")
    return {"receipt": dict(receipt)} if isinstance(receipt, Mapping) else {}


# --- rows -----------------------------------------------------------------------------------


def _row(index: int, asset: CalledAsset, said: Callback, base_url: str | None) -> AssetRow:
    data = asset.metadata
    extension = _extension(asset.url, data)
    is_video = asset.asset_type == "video"
    return AssetRow(
        asset_index=index,  # the place in the list, so that there are no holes
        asset_type=asset.asset_type,
        temp_storage_path=_place(asset.url, base_url),
        thumbnail_path=_place(asset.thumbnail_url, base_url) if asset.thumbnail_url else None,
        mime_type=_MIME.get(extension, "image/jpeg") if not is_video else "video/mp4",
        file_size_bytes=_whole(data, "file_size_bytes", "bytes", "size_bytes") or 0,
        duration_seconds=_duration(data, said.metadata) if is_video else None,
        width=_whole(data, "width", most=MAX_SIDE),
        height=_whole(data, "height", most=MAX_SIDE),
        generation_seed=_seed(data, said.metadata),
        generation_settings=dict(data),
    )


def _place(url: str, base_url: str | None) -> str:
    if url.startswith("/") and base_url is not None:
        return base_url.rstrip("/") + url
    return url.removeprefix("workspace-temp/")


def _whole(data: Mapping[str, Any], *names: str, most: int = 2**53) -> int | None:
    for name in names:
        value = data.get(name)
        if type(value) is int and 0 <= value <= most:
            return value
    return None


def _duration(data: Mapping[str, Any], job: Mapping[str, Any]) -> float | None:
    """Seconds: as measured, else of the frames; not known where neither is told."""
    for name in ("duration_seconds", "duration_s"):
        value = data.get(name)
        # Compared as it came: a whole number can be too large for a float.
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if 0 <= value <= MAX_SECONDS:
            return float(value)
    frames = _whole(data, "frame_num") or _whole(job, "frame_num")
    return None if frames is None else frames / FPS


def _seed(data: Mapping[str, Any], job: Mapping[str, Any]) -> int | None:
    """The asset's own, else the job's; 0 is a seed. None where no one told it: none is made up."""
    for source, name in ((data, "seed"), (data, "generation_seed"), (job, "seed")):
        value = source.get(name)
        if type(value) is int and 0 <= value < 2**63:
            return value
    return None

"""A job's states, and what a callback says and changes of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED = (
    "queued",
    "processing",
    "completed",
    "failed",
    "cancelled",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalledAsset:
    """One file that a worker made."""

    asset_type: str  # image | video
    url: str
    thumbnail_url: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    job_id: str
    status: str
    assets: tuple[CalledAsset, ...] = ()
    error: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sequence: int | None = None  # of webhooks: rises with each event of a job


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetRow:
    """A row of workspace_assets without its job."""

    asset_index: int
    asset_type: str
    temp_storage_path: str
    thumbnail_path: str | None
    mime_type: str
    file_size_bytes: int
    duration_seconds: float | None
    width: int | None
    height: int | None
    generation_seed: int | None
    generation_settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a callback changes of its job; None: nothing, and why."""

    status: str | None
    error: str | None = None
    assets: tuple[AssetRow, ...] = ()
    why_not: str = ""

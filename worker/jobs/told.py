"""What is told to whom about a job, and where its files go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from worker.jobs.callbacks import Facts, asset_keys, callback_body, serialise, webhook_body
from worker.jobs.job import Job
from worker.jobs.journal import HTTP, NewDelivery, Upload
from worker.protocol.messages import AssetFile
from worker.storage.deliver import CALLBACK, PROCESSING, WEBHOOK


class Teller(Protocol):
    """Says what is to be told to whom when something happens to a job."""

    def __call__(self, job: Job, event: str) -> Sequence[NewDelivery]:
        """event: processing | completed | failed | cancelled."""
        ...


class Places(Protocol):
    """Says which files of a job go where in the object store."""

    def __call__(self, job: Job, assets: Sequence[AssetFile]) -> Sequence[Upload]: ...


class Tellers:
    """Deliveries of a job's events, and places of its files. Immutable."""

    def __init__(self, worker_id: str, *, calls_back: bool, stores: bool, media_url: str | None):
        """calls_back: jobs from lists are called back to the service that their rows belong to.
        stores: their files are uploaded. media_url: where clients reach the image and video port,
        if that is known."""
        self._worker_id = worker_id
        self._calls_back = calls_back
        self._stores = stores
        self._media_url = media_url

    def tell(self, job: Job, event: str) -> Sequence[NewDelivery]:
        """What is to be delivered when a job comes to its status. event: that status."""
        name, request = f"job.{event}", job.request
        told = []
        if self._calls_back and job.source != HTTP:
            body = callback_body(self._facts(job))
            if body is not None:
                told.append(NewDelivery(CALLBACK, name, serialise(body)))
        if request is not None and request.webhook_url is not None:
            body = webhook_body(self._facts(job), int(name != PROCESSING), self._urls(job))
            told.append(
                NewDelivery(
                    WEBHOOK, name, serialise(body), request.webhook_url, request.webhook_secret
                )
            )
        return told

    def places(self, job: Job, assets: Sequence[AssetFile]) -> Sequence[Upload]:
        """Of every file of a job from a list, the original before its thumbnail."""
        if not self._stores or job.source == HTTP:
            return []
        uploads = []
        for asset, (file, thumbnail) in zip(assets, _keys(job, assets), strict=True):
            uploads.append(Upload(job.id, file, asset.sha256, asset.mime_type, {}))
            uploads.append(Upload(job.id, thumbnail, asset.thumbnail_sha256, "image/webp", {}))
        return uploads

    def _facts(self, job: Job) -> Facts:
        request, given = job.request, job.given
        references = job.receipt.get("references")
        return Facts(
            job_id=job.id,
            job_type=request.job_type_given if request is not None else _type_of(given),
            status=job.status,
            at=job.finished_at or job.started_at or job.created_at,
            worker_id=self._worker_id,
            params=request.params if request is not None else None,
            assets=job.assets,
            keys=_keys(job, job.assets),
            receipt=job.whole_receipt,
            seconds=job.seconds,
            error=job.error,
            error_code=job.error_code,
            original_prompt=str(given.get("prompt") or ""),
            resize_policy=references[0].get("resize_policy") if references else None,
            compel_enabled=given.get("compel_enabled") is True,
            compel_weights=given.get("compel_weights"),
        )

    def _urls(self, job: Job) -> Sequence[tuple[str | None, str | None]]:
        """Of a job's assets at this worker; what is in a store has its key as its URL."""
        if self._stores and job.source != HTTP:
            return _keys(job, job.assets)
        base = self._media_url or ""
        return [
            (
                f"{base}/jobs/{job.id}/assets/{index}",
                f"{base}/jobs/{job.id}/assets/{index}/thumbnail",
            )
            for index in range(len(job.assets))
        ]


def _keys(job: Job, assets: Sequence[AssetFile]) -> tuple[tuple[str, str], ...]:
    user_id = job.request.user_id if job.request is not None else None
    return asset_keys(user_id, job.id, assets)


def _type_of(given: dict[str, Any]) -> str:
    """Of a body that was refused, maybe for its type."""
    found = given.get("job_type") or given.get("type")
    return found if isinstance(found, str) else "unknown"

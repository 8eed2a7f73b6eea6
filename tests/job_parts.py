"""What tests of durable jobs share: a clock, decoded jobs, staged files, and short words for
deliveries."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from worker.jobs.decode import JobRequest
from worker.jobs.job import Job
from worker.jobs.journal import NewDelivery, Upload
from worker.protocol.messages import AssetFile, RenderParams

Tell = Callable[[Job], Sequence[NewDelivery]]


class Clock:
    """Wall clock that a test moves. Any thread."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def request(job_id: str | None = None, body: str = "x", **fields: Any) -> JobRequest:
    """A small image job; `fields` of JobRequest in place of its own."""
    ours: dict[str, Any] = {
        "job_id": job_id,
        "type": "sdxl_image_fast",
        "model": "m",
        "output": "image",
        "params": RenderParams(
            prompt="x", negative_prompt=None, width=64, height=64, steps=4, guidance_scale=5.0,
            seed=0,
        ),
        "ignored": (),
        "body": body,
    }  # fmt: skip
    return JobRequest(**(ours | fields))


def nothing(job: Job) -> Sequence[NewDelivery]:
    """Nobody is told."""
    return ()


def says(event: str, kind: str = "webhook", content: bytes = b"{}") -> Tell:
    """One delivery of `event`, whatever the job."""
    return lambda job: [NewDelivery(kind, f"job.{event}", content, "https://hook.example/", "s")]


def asset(content: bytes = b"pixels", index: int = 0, *, thumbnail: bytes = b"small") -> AssetFile:
    """As an engine describes a file, with what is known of its thumbnail once it is published."""
    return AssetFile(
        file=f"{index}.png",
        thumbnail=f"{index}.thumb.webp",
        type="image",
        mime_type="image/png",
        width=64,
        height=64,
        seed=index,
        size_bytes=len(content),
        sha256=sha256(content),
        thumbnail_sha256=sha256(thumbnail),
        thumbnail_bytes=len(thumbnail),
    )


def stage(folder: Path, *contents: bytes, thumbnail: bytes = b"small") -> tuple[AssetFile, ...]:
    """Files as an engine leaves them in `folder`, and how it describes them."""
    folder.mkdir(parents=True)
    assets = []
    for index, content in enumerate(contents):
        one = asset(content, index)
        (folder / one.file).write_bytes(content)
        (folder / one.thumbnail).write_bytes(thumbnail)
        assets.append(msgspec.structs.replace(one, thumbnail_sha256="", thumbnail_bytes=0))
    return tuple(assets)


def uploads(job_id: str, *assets: AssetFile) -> list[Upload]:
    """Where the files of a job go, the original before its thumbnail."""
    wanted = []
    for index, one in enumerate(assets):
        wanted.append(Upload(job_id, f"u/{job_id}/{index}.png", one.sha256, "image/png", {}))
        wanted.append(
            Upload(job_id, f"u/{job_id}/{index}.thumb.webp", one.thumbnail_sha256, "image/webp", {})
        )
    return wanted


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Gate:
    """Something that a thread comes to and a test lets it through. Any thread."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(10), "nobody opened the gate"

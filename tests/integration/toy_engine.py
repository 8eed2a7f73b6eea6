"""A media engine without models: `python -m tests.integration.toy_engine SOCKET STEP_S`.

It stands where the real one stands, on the same host and messages, and makes files whose bytes
follow from the job's parameters alone, a step at a time.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections import deque
from pathlib import Path

from worker.engine.host import EngineHost, Outbox, Report, Ticket
from worker.errors import Cancelled
from worker.lifeline import die_with_any_thread, die_with_parent
from worker.protocol.messages import (
    AssetFile,
    JobRendered,
    Message,
    ModelState,
    Progress,
    RenderJob,
    failed,
)


class ToyEngine:
    """One job at a time. Thread-confined like every engine."""

    def __init__(self, outbox: Outbox, step_s: float):
        self._outbox = outbox
        self._step_s = step_s
        self._waiting: deque[tuple[Ticket, RenderJob]] = deque()
        self._running: Ticket | None = None
        self._stop = False

    def submit(self, ticket: Ticket, message: Message) -> None:
        if isinstance(message, RenderJob):
            self._waiting.append((ticket, message))

    def cancel(self, ticket: Ticket) -> None:
        if ticket == self._running:
            self._stop = True
        else:
            self._waiting = deque(entry for entry in self._waiting if entry[0] != ticket)

    def step(self) -> bool:
        if not self._waiting:
            return False
        ticket, job = self._waiting.popleft()
        self._running, self._stop = ticket, False
        for step in range(1, job.params.passes + 1):
            time.sleep(self._step_s)
            self._tell(ticket, job, "denoise", step)
            self._outbox.poll()
            if self._stop:
                self._outbox.send(ticket, failed(job.request_id, Cancelled("cancelled")))
                return True
        self._tell(ticket, job, "save", job.params.passes)
        self._outbox.send(ticket, rendered(job))
        return True

    def report(self) -> Report:
        model = ModelState(id="demo-image", kind="sdxl", status="loaded", display_name="demo-image")
        return Report(status="ready", models=(model,), waiting=len(self._waiting))

    def finish(self) -> None:
        """Everything has been said."""

    def _tell(self, ticket: Ticket, job: RenderJob, phase: str, step: int) -> None:
        progress = Progress(
            request_id=job.request_id, phase=phase, step=step, steps=job.params.passes
        )
        self._outbox.send(ticket, progress)


def rendered(job: RenderJob) -> JobRendered:
    """The files that any toy engine makes of this job."""
    folder = Path(job.staging_dir)
    folder.mkdir(parents=True, exist_ok=True)
    assets = []
    for index in range(job.params.num_images):
        data = content(job.params.prompt, job.params.seed + index)
        (folder / f"{index}.png").write_bytes(data)
        (folder / f"{index}.thumb.webp").write_bytes(data[:32])
        assets.append(
            AssetFile(
                file=f"{index}.png",
                thumbnail=f"{index}.thumb.webp",
                type="image",
                mime_type="image/png",
                width=job.params.width,
                height=job.params.height,
                seed=job.params.seed + index,
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    return JobRendered(
        request_id=job.request_id, assets=tuple(assets), receipt={"model": job.model}, seconds={}
    )


def content(prompt: str, seed: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + hashlib.sha256(f"{prompt} {seed}".encode()).digest() * 8


def main() -> None:
    path, step_s = Path(sys.argv[1]), float(sys.argv[2])
    die_with_parent()
    die_with_any_thread()
    host = EngineHost(path, "engine media")
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    host.run(lambda outbox: ToyEngine(outbox, step_s), lambda: "cpu")


if __name__ == "__main__":
    main()

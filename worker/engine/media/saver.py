"""Writes files beside the engine's thread, so that the next job need not wait for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from worker.engine.answers import answer
from worker.engine.host import Outbox, Ticket
from worker.engine.media.files import save_image, save_video
from worker.errors import Cancelled
from worker.protocol.messages import AssetFile, Message, RenderJob

log = logging.getLogger(__name__)

# Of jobs whose pictures are held in memory for their files. A long video's frames are 100 MB.
MAX_JOBS = 2

# Makes a job's files and its answer. Gets a check that raises Cancelled, to be called between two
# files.
Work = Callable[[Callable[[], None]], Message]


@dataclass(eq=False, slots=True)
class _Item:
    ticket: Ticket
    work: Work
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises Cancelled."""
        if self.is_cancelled.is_set():
            raise Cancelled("the job was cancelled while its files were written")


class Saver:
    """Answers jobs in the order in which they were given, from a thread of its own.

    The methods belong to the engine thread. The lock guards the queue. The thread ends when there
    is nothing to do, and the next job's begins one; there is never more than one. All that it
    touches of the engine is `Outbox.send` and `Outbox.wake`, which append to a queue and wake a
    socket.
    """

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._lock = threading.Lock()
        self._items: deque[_Item] = deque()  # the first is being worked on
        self._thread: threading.Thread | None = None  # the last one that was begun

    @property
    def jobs(self) -> int:
        """That are not answered yet."""
        return len(self._items)

    @property
    def is_full(self) -> bool:
        """Whether a job that is given now has to wait outside."""
        return self.jobs >= MAX_JOBS

    def give(self, ticket: Ticket, work: Work) -> None:
        """Answer `ticket` with what `work` returns or raises, behind all that were given before."""
        with self._lock:
            self._items.append(_Item(ticket, work))
            starts = len(self._items) == 1
            if starts:
                self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
                self._thread.start()

    def cancel(self, ticket: Ticket) -> bool:
        """Save no further file of a job. False where it has none of this ticket."""
        with self._lock:
            for item in self._items:
                if item.ticket == ticket:
                    item.is_cancelled.set()
                    return True
        return False

    def wait(self, timeout_s: float) -> None:
        """Until nothing is left to save, or the time is over."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    # --- the saver's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                item = self._items[0]
            self._do(item)
            del item  # and with it the pictures
            with self._lock:
                self._items.popleft()
                ends = not self._items
            self._outbox.wake()  # the engine may wait for this, and its report has changed
            if ends:
                return

    def _do(self, item: _Item) -> None:
        def work() -> Message:
            item.check()
            return item.work(item.check)

        answer(self._outbox, item.ticket, work)


def save_files(
    job: RenderJob, kind: str, made: Sequence[Any], check: Callable[[], None]
) -> tuple[AssetFile, ...]:
    """Write a job's files into its folder. kind: of its model. made: pictures, or the frames of one
    video. check: called before each file; may raise to write no more."""
    folder, params = Path(job.staging_dir), job.params
    if kind == "sdxl":
        assets = []
        for index, picture in enumerate(made):
            check()
            assets.append(save_image(folder, index, picture, params.seed + index))
        return tuple(assets)
    [frames] = made
    if job.output == "image":
        return (save_image(folder, 0, Image.fromarray(frames[0]), params.seed),)
    return (save_video(folder, frames, params.fps, params.seed),)

"""What the runner needs from a list of jobs, and the errors of its server.

Keys of a list named `sdxl_queue`, as they stand on the server:

    sdxl_queue                       elements that wait; producers append at the right
    sdxl_queue:processing:{worker}   elements that a worker has taken and not settled, oldest left
    sdxl_queue:dead                  elements that no worker can read or run, each with its reason
    sdxl_queue:workers               names of workers that may have a processing list
    sdxl_queue:adopted               names of workers whose elements others have adopted
    sdxl_queue:alive:{worker}        there while the worker lives; gone ALIVE_S after its last sign

A name belongs to one process at a time.
"""

from __future__ import annotations

import re
from typing import Protocol

from worker.errors import WorkerError

WORKER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LIST_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")

ALIVE_S = 120  # without a sign of life for so long, a worker's elements may be adopted
RETRY_AFTER_S = 5.0

# First words of a server's error, and what they mean to the person who runs the worker.
_REFUSALS = {
    "NOAUTH": "wants a password and was given none",
    "WRONGPASS": "does not accept the password or token",
    "NOPERM": "does not let this user run the commands or touch the keys of a queue",
    "WRONGTYPE": "holds something else than a list under one of the queue's keys",
    "OOM": "has no memory left for writing",
    "READONLY": "is a replica that takes no writes",
    "MISCONF": "takes no writes because it cannot save to its disk",
    "LOADING": "is still reading its data",
    "BUSY": "is busy with another script",
    "MASTERDOWN": "has lost its master",
    "CLUSTERDOWN": "is a cluster that is down",
    "CROSSSLOT": "is a cluster; a queue's keys must lie on one server",
    "MOVED": "is a cluster; a queue's keys must lie on one server",
}
_PASSING = ("LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "OOM", "MISCONF")


class QueueUnavailable(WorkerError):
    """The server of a queue cannot be reached, does not answer in time, or refuses."""

    status = 503
    code = "queue_unavailable"


class JobQueue(Protocol):
    """A list of jobs, and this worker's own list of what it took from it.

    Nothing is taken away before it is settled, so an element is at every moment in exactly one
    list. Only a worker that was cut off for longer than ALIVE_S may work on what another one has
    adopted meanwhile; its own moves of that element do nothing then.

    Methods may be called from any thread. All but `close` raise QueueUnavailable; a command whose
    answer was lost may have been done, and every one may be called again.
    """

    @property
    def name(self) -> str:
        """The list's name on the server."""

    def take(self) -> bytes | None:
        """Move the oldest element into this worker's list and return it exactly; None: there is
        none. It is also a sign of life.

        An element that came into this worker's list without anybody hearing of it (its answer was
        lost on the way) is returned first.
        """

    def held(self) -> list[bytes]:
        """What lies in this worker's list, oldest first: at start, what an earlier life left.
        `take` returns none of these again. It is also a sign of life."""

    def settle(self, element: bytes) -> None:
        """The element is done: remove it from this worker's list. Harmless where it is not."""

    def give_back(self, element: bytes) -> None:
        """Put an element that was not begun back in front of the list, for any worker. Of several,
        give the newest back first. Nothing happens to one that is not in this worker's list."""

    def bury(self, element: bytes, reason: str, worker: str, at: str) -> None:
        """Move an element to the dead letters as `{"reason", "worker", "at", "element"}`; bytes
        that are not UTF-8 go under `element_base64` instead. Nothing happens to an element that
        is not in this worker's list.

        reason: short and without the user's text. at: UTC, ISO 8601.
        """

    def waiting(self) -> int:
        """Elements that no worker has taken."""

    def beat(self) -> None:
        """A sign of life, due well within ALIVE_S of the last one."""

    def orphans(self) -> list[str]:
        """Other workers that left elements and give no sign of life; sorted."""

    def adopt(self, worker: str) -> int:
        """Put the elements of an orphan back in front of the list, in their order, and return how
        many; 0 where it lives again or another worker was quicker."""

    def was_adopted(self) -> bool:
        """Whether another worker has adopted elements of this one, until `note_adoption`."""

    def note_adoption(self) -> None:
        """What was adopted is known here."""

    def close(self) -> None:
        """Close the connections."""


def refused(server: str, text: str) -> QueueUnavailable:
    """server: how to call it, such as "the Redis server". text: the error that it answered with,
    of which only a known word is repeated."""
    code = next((code for code in _REFUSALS if re.search(rf"\b{code}\b", text)), None)
    if code is not None:
        return QueueUnavailable(
            f"{server} {_REFUSALS[code]} ({code})",
            retry_after_s=RETRY_AFTER_S if code in _PASSING else None,
        )
    lowered = text.lower()
    if "unknown" in lowered and "command" in lowered:
        return QueueUnavailable(f"{server} lacks a command; queues need Redis 6.2 or later")
    if "limit" in lowered:
        return QueueUnavailable(
            f"{server} refuses because a limit of its plan is reached", retry_after_s=RETRY_AFTER_S
        )
    return QueueUnavailable(f"{server} refused a command")

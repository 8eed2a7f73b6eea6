"""A volume that gives its bytes at a set rate: the disk that a file lies on, to one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
NAME = "verbatim-bench"


class NoLimit(Exception):
    """The system does not let us limit what a process reads."""


@contextmanager
def slow_volume(file: Path, pid: int, bytes_s: int) -> Iterator[None]:
    """Within it, what a process reads of this file's disk comes at no more than `bytes_s`.

    By the kernel's own limit (the controllers blkio of cgroups 1 and io of cgroups 2), so it does
    not matter how the process reads; what the system has in memory already comes at once. Linux,
    as root. Raises NoLimit.
    """
    disk = _disk(file)
    first = CGROUPS / "blkio"
    home = first if first.is_dir() else CGROUPS
    group = home / NAME
    try:
        group.mkdir(exist_ok=True)
        if home == first:
            (group / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_s}")
        else:
            (group / "io.max").write_text(f"{disk} rbps={bytes_s}")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as exc:
        raise NoLimit(f"no limit for reading {disk}, which takes root and cgroups: {exc}") from exc
    try:
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            (home / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def forget(file: Path) -> None:
    """Have the system keep nothing of a file in memory."""
    opened = os.open(file, os.O_RDONLY)
    try:
        os.fsync(opened)  # what is not written yet stays
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def _disk(file: Path) -> str:
    """Major and minor number of the whole disk: a partition has no limit of its own."""
    device = file.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    place = Path("/sys/dev/block") / name
    if (place / "partition").exists():
        return (place.resolve().parent / "dev").read_text().strip()
    return name

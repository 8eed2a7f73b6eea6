"""Files of finished jobs, named by their content."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from worker.errors import DiskFull, JournalUnavailable
from worker.protocol.messages import AssetFile

log = logging.getLogger(__name__)

RESULTS_FOLDER = "results"  # in the folder of jobs
_RECORD = "published.json"  # in a staging folder: what is being published from it
_CHUNK_BYTES = 1 << 20


class DamagedResult(Exception):
    """A staged file is not what its engine said."""


class Results:
    """A folder of files, each under its SHA-256. Only the runner changes it; fronts read.

    A file is there with all its bytes or not at all: it is brought to the disk before it gets its
    name, and its name before the journal says so.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def publish(self, staging: Path, assets: Sequence[AssetFile]) -> tuple[AssetFile, ...]:
        """Give the staged files of a job their names; the same file twice is no harm, and a try
        that was cut short goes on where it ended.

        Returns the assets with what is known of their thumbnails. Raises DamagedResult; DiskFull
        and JournalUnavailable, after which nothing is lost and it can be tried again.
        """
        try:
            described = self._described(staging, assets)
            for asset in described:
                self._keep(staging / asset.file, asset.sha256)
                self._keep(staging / asset.thumbnail, asset.thumbnail_sha256)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("there is no room for the files of this job") from exc
            if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise JournalUnavailable(
                    f"the files of a job cannot be brought to {RESULTS_FOLDER} in the folder of "
                    f"jobs ({exc.strerror}); it must be writable for the daemon's user"
                ) from exc
            raise
        return described

    def remove(self, names: Iterable[str]) -> None:
        """Files that no job has any more."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def remove_others(self, known: set[str]) -> int:
        """At the start: files that were published and never written down; how many."""
        strangers = [path for path in self._folder.glob("??/*") if path.name not in known]
        for path in strangers:
            path.unlink(missing_ok=True)
        return len(strangers)

    def _described(self, staging: Path, assets: Sequence[AssetFile]) -> tuple[AssetFile, ...]:
        """The checked assets; also written beside them, before the first one is taken away."""
        record = staging / _RECORD
        if record.exists():
            return msgspec.json.decode(record.read_bytes(), type=tuple[AssetFile, ...])
        if not assets:
            raise DamagedResult("the engine has staged no file")
        described = []
        for asset in assets:
            if (found := _sha256(staging / asset.file)) != asset.sha256:
                raise DamagedResult(
                    f"{asset.file} has SHA-256 {found}, its engine said {asset.sha256}"
                )
            thumbnail = staging / asset.thumbnail
            sha256, size = _sha256(thumbnail), thumbnail.stat().st_size
            described.append(
                msgspec.structs.replace(asset, thumbnail_sha256=sha256, thumbnail_bytes=size)
            )
        draft = record.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(described))
        draft.rename(record)
        return tuple(described)

    def _keep(self, file: Path, sha256: str) -> None:
        target = self.path(sha256)
        if not file.exists() and target.exists():
            return  # an earlier try has brought it there
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _to_disk(self._folder)
        _to_disk(file)
        file.rename(target)
        _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

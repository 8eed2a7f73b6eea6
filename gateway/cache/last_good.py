"""snapshot.json: the last configuration that the database is known to have had, for a start
without it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from gateway.cache.snapshot_json import Damaged, Saved, decode, encode

logger = logging.getLogger(__name__)

NAME = "snapshot.json"


class LastGood:
    """The file in the state folder. Written by one thread of a process; several processes may share
    the folder, since each write is a rename and every file is whole."""

    def __init__(self, state_dir: Path):
        self.path = state_dir / NAME

    def write(self, saved: Saved) -> None:
        """Atomic: after a crash the old file or the new one is there. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{NAME}.{os.getpid()}")
        # For us alone: characters of users are in it.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(encode(saved))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it the rename may not survive a power cut
        finally:
            os.close(folder)

    def read(self) -> Saved | None:
        """None: there is none, or none that may be used, which is logged. A damaged file is moved
        aside, so that the next write does not destroy what could explain it."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            logger.error("%s cannot be read: %s", self.path, exc.strerror)
            return None
        try:
            return decode(raw)
        except Damaged as exc:
            aside = self.path.with_name(f"{NAME}.damaged")
            logger.error("%s is not used: %s; moved to %s", self.path, exc, aside.name)
        try:
            os.replace(self.path, aside)
        except OSError as exc:
            logger.error("%s cannot be moved aside: %s", self.path, exc.strerror)
        return None

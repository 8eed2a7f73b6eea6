"""The file of an SQLite database: made once, then looked at, and never made again unasked.

An open connection goes on with a file that was moved away or replaced, and a new one makes an empty
database where a file is missing. Both would take edits and lose them; so every connection says
which file it has, and none makes one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import DisconnectionError

from gateway.errors import StoreUnavailable

LOOK_AGAIN_S = 2.0

_FILE = "gateway_file"


class SqliteFile:
    """A path, and whether this object ever found a file there. Any thread: `_seen` only becomes
    True."""

    def __init__(self, path: str):
        self.path = Path(os.path.abspath(path))  # as SQLAlchemy does; a later chdir means nothing
        self._seen = False

    def make(self) -> None:
        """Make the file, readable by its owner only, and its folder, where there never was one.

        Raises StoreUnavailable where they cannot be made. A file that was seen is left missing.
        """
        if self._seen:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite gives its -wal and -shm files the mode of this one. Only a new file is opened
            # here: closing any descriptor of a file drops all locks that this process has on it
            # (POSIX), and another process would then take the log away under our connections.
            if not self.path.exists():
                with suppress(FileExistsError):  # another process was first
                    os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as exc:
            raise self._unusable(exc) from exc
        self.identity()

    def is_made(self) -> bool:
        """Whether there is a file or ever was one. False: `make` comes first. Makes nothing.

        Raises StoreUnavailable where `make` would have no folder to write in.
        """
        try:
            if self._seen or self.path.exists():
                return True
            folder = next(one for one in self.path.parents if one.exists())
        except OSError as exc:
            raise self._unusable(exc) from exc
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise StoreUnavailable(f"{self.path} cannot be opened: {folder} takes no new files")
        return False

    def identity(self) -> tuple[int, int]:
        """Device and inode of the file that is there now. Raises StoreUnavailable without one."""
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError) as exc:
            # Clients see these texts: no path in them.
            raise StoreUnavailable(
                "The database's file was moved away; bring it back, or put another in its place"
                if self._seen
                else "The database has no file yet; the gateway makes it at its start, as soon as "
                "its folder can be written",
                retry_after_s=LOOK_AGAIN_S,
            ) from exc
        except OSError as exc:
            raise StoreUnavailable(
                f"The database's file cannot be looked at: {exc.strerror}",
                retry_after_s=LOOK_AGAIN_S,
            ) from exc
        self._seen = True
        return found.st_dev, found.st_ino

    def guard(self, engine: Engine) -> None:
        """Let the engine's connections work with the file that is there, or not at all."""
        event.listen(engine, "do_connect", self._before_connect)
        event.listen(engine, "checkout", self._at_checkout)

    def _before_connect(self, _dialect: Any, record: Any, args: Any, options: Any) -> None:
        # Before, not after: a file that changes in between then differs at the checkout.
        record.info[_FILE] = self.identity()
        args[0] = f"{self.path.as_uri()}?mode=rw"  # rw, without c: makes no file
        options["uri"] = True

    def _at_checkout(self, _connection: Any, record: Any, _proxy: Any) -> None:
        if record.info.get(_FILE) != self.identity():
            raise DisconnectionError("the file was replaced")  # the pool connects again

    def _unusable(self, exc: OSError) -> StoreUnavailable:
        return StoreUnavailable(f"{self.path} cannot be opened for writing: {exc.strerror}")

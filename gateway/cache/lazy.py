"""A database that is opened at its first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import event

from gateway.store.database import Database, open_database


class LazyDatabase:
    """A database that is opened when it is first asked for. `_lock` guards the opening."""

    def __init__(self, url: str, prepare: Callable[[Any, Any], None] | None = None):
        """prepare: called with each new connection to PostgreSQL, as SQLAlchemy's `connect` is."""
        self._url = url
        self._prepare = prepare
        self._lock = threading.Lock()
        self._opened: Database | None = None

    def get(self) -> Database:
        """Touches no disk and connects to nothing yet."""
        with self._lock:
            if self._opened is None:
                self._opened = open_database(self._url)
                if self._prepare is not None and self._opened.is_postgres:
                    event.listen(self._opened.engine, "connect", self._prepare)
            return self._opened

    def reset(self) -> None:
        """Close its connections; the next use makes new ones."""
        with self._lock:
            opened = self._opened
        if opened is not None:
            opened.dispose()

"""Entries of the log, and a database that can be taken away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Table, select

from gateway.config import Logs
from gateway.errors import StoreUnavailable
from gateway.logs.writer import LogWriter
from gateway.prompts.digest import messages_sha256, sha256_of
from gateway.store.database import Database
from gateway.values.assembly import Message
from gateway.values.logentry import ConfigObject, LogBody, LogEntry

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
MESSAGES = (Message("system", "Describe the picture."), Message("user", "a harbour at dawn"))


def entry(request_id: str = "r1", age_s: float = 0.0, **changes: Any) -> LogEntry:
    values: dict[str, Any] = {
        "created_at": NOW - timedelta(seconds=age_s),
        "endpoint": "/enhance/sdxl",
        "execution_time_ms": 12.5,
        **changes,
    }
    return LogEntry(request_id=request_id, **values)


def config_object(kind: str = "rule", **body: Any) -> ConfigObject:
    return ConfigObject(content_hash=sha256_of({"kind": kind, "body": body}), kind=kind, body=body)


def body(**changes: Any) -> LogBody:
    values: dict[str, Any] = {
        "request": {"prompt": "a harbour at dawn", "target_model": "sdxl", "job_type": "image"},
        "messages": MESSAGES,
        "answer": "A harbour.",
        "trace": {"steps": []},
        "objects": (config_object(id=1, body="Keep the subject."),),
        **changes,
    }
    return LogBody(**values)


def with_body(request_id: str = "r1", age_s: float = 0.0, **changes: Any) -> LogEntry:
    values = {"body": body(), "messages_sha256": messages_sha256(MESSAGES), **changes}
    return entry(request_id, age_s, **values)


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Away(Database):
    """A database that can be taken away; counts the attempts to write."""

    def __init__(self, database: Database) -> None:
        super().__init__(database.engine)
        self.is_away = False
        self.attempts = 0

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        self.attempts += 1
        if self.is_away:
            raise StoreUnavailable("it is away", retry_after_s=1.0)
        with super().transaction() as connection:
            yield connection


def write(database: Database, *entries: LogEntry, logs: Logs | None = None) -> None:
    """Through a writer of its own."""
    writer = LogWriter(database, logs or Logs(), wall=lambda: NOW)
    for one in entries:
        writer.add(one)
    assert writer.flush(60)
    assert writer.counts.refused == writer.counts.dropped == 0


def rows(database: Database, table: Table) -> list[dict[str, Any]]:
    """All of a table in the order of its key."""
    with database.reading() as connection:
        found = connection.execute(select(table).order_by(*table.primary_key)).mappings()
        return [dict(row) for row in found]

"""The journal's tables, as numbered steps. A step that has shipped never changes."""

from __future__ import annotations

import sqlite3

from worker.errors import JournalUnavailable

STEPS = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of acceptance
        id TEXT NOT NULL UNIQUE,
        key TEXT UNIQUE,                    -- the client's Idempotency-Key
        body_sha256 TEXT NOT NULL,
        given TEXT NOT NULL,                -- the body as it came, JSON
        request TEXT,                       -- JobRequest as JSON; NULL: the body was refused
        source TEXT NOT NULL,               -- http, or the list that it came from
        element BLOB,                       -- what lies in this worker's processing list
        model TEXT NOT NULL,
        priority INTEGER NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')),
        created_at REAL NOT NULL,           -- wall clock, seconds since the epoch; all *_at
        started_at REAL,
        finished_at REAL,
        not_before REAL NOT NULL DEFAULT 0, -- a queued job that waits for a next try
        starts INTEGER NOT NULL DEFAULT 0,
        restarts INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        overtaken INTEGER NOT NULL DEFAULT 0,
        assets TEXT NOT NULL DEFAULT '[]',  -- stays with a job that is being uploaded
        receipt TEXT NOT NULL DEFAULT '{}',
        seconds TEXT NOT NULL DEFAULT '{}',
        error TEXT,
        error_code TEXT
    );
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE INDEX jobs_by_element ON jobs (source, element) WHERE element IS NOT NULL;
    CREATE TABLE wishes (                   -- what fronts want of the runner
        job_id TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
        wish TEXT NOT NULL CHECK (wish IN ('cancel')),
        at REAL NOT NULL
    );
    CREATE TABLE blobs (                    -- files of results, by their SHA-256
        sha256 TEXT NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY (sha256, job_id)
    );
    CREATE INDEX blobs_by_job ON blobs (job_id);
    CREATE TABLE uploads (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        place TEXT NOT NULL,                -- key in the store
        sha256 TEXT NOT NULL,
        mime_type TEXT NOT NULL,
        saved TEXT NOT NULL DEFAULT '{}',   -- where an interrupted upload goes on, JSON
        attempts INTEGER NOT NULL DEFAULT 0,
        next_at REAL NOT NULL DEFAULT 0,
        done INTEGER NOT NULL DEFAULT 0,
        error TEXT,
        PRIMARY KEY (job_id, place)
    );
    CREATE TABLE deliveries (               -- the outbox
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        sequence INTEGER NOT NULL,          -- order within the job and kind
        kind TEXT NOT NULL CHECK (kind IN ('callback', 'webhook')),
        event TEXT NOT NULL,
        url TEXT NOT NULL,                  -- of a webhook; empty for the callback
        secret TEXT,                        -- what a webhook is signed with
        content BLOB NOT NULL,              -- the very bytes that are signed and sent
        created_at REAL NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        next_at REAL NOT NULL DEFAULT 0,
        state TEXT NOT NULL DEFAULT 'waiting'
            CHECK (state IN ('waiting', 'delivered', 'dead', 'void')),
        error TEXT
    );
    CREATE INDEX deliveries_by_job ON deliveries (job_id, sequence);
    CREATE INDEX deliveries_waiting ON deliveries (state, next_at);
    """,
)


def migrate(database: sqlite3.Connection) -> None:
    """Bring a database to the newest step, all in one transaction.

    Raises JournalUnavailable for one that a newer program has written.
    """
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == len(STEPS):
        return  # a reader that begins waits for no writer
    database.execute("BEGIN IMMEDIATE")
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(STEPS):
            raise JournalUnavailable(
                f"the journal has format {version} and this program knows {len(STEPS)}; "
                "start the newer program again, or move the journal's folder away"
            )
        for number in range(version, len(STEPS)):
            for statement in _statements(STEPS[number]):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number + 1}")
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk has ended it already
            database.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    """executescript would commit our transaction; no statement of a step has a ; inside."""
    bare = "\n".join(line.partition("--")[0] for line in script.splitlines())
    return [one for one in bare.split(";") if one.strip()]

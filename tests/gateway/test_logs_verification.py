"""`python -m gateway verify` and `replay`: what is whole passes, what is not is found."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
from sqlalchemy import Connection, delete, update

from gateway.cli import verification
from gateway.content.emergency import load_emergency, load_seeds
from gateway.store.database import Database
from gateway.store.seed import seed
from gateway.store.tables import prompt_logs
from gateway.values.rows import Snapshot
from tests.gateway.log_parts import write
from tests.gateway.snapshots import WordCounters
from tests.gateway.test_logs_replay import one_entry


def run(database: Database, *line: str) -> int:
    parser = argparse.ArgumentParser()
    verification.add(parser.add_subparsers(required=True))
    args = parser.parse_args(line)
    args.counters = WordCounters()
    done: int = args.run(args, database)
    return done


def unguard(connection: Connection, table: str) -> None:
    """Switch the triggers off that refuse a change; whoever owns the database can do this."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        return
    found = f"SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = '{table}'"
    for (name,) in connection.exec_driver_sql(found).all():
        connection.exec_driver_sql(f"DROP TRIGGER {name}")


@pytest.fixture
def seeded(database: Database) -> Database:
    seed(database, load_seeds(), "qwen_instruct", frozenset())
    write(database, one_entry())
    return database


def test_a_seeded_database_is_good(seeded: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(seeded, "verify") == 0

    shown = capsys.readouterr().out
    assert "faults" not in shown
    assert "1 requests" in shown


def test_a_replay_that_differs_is_found(
    seeded: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with seeded.transaction() as connection:
        connection.execute(update(prompt_logs).values(messages_sha256="0" * 64))

    assert run(seeded, "verify") == 1
    assert run(seeded, "verify", "--replays", "0") == 0

    assert "replay of the log: one: the messages that were kept" in capsys.readouterr().out


def test_texts_without_their_row_are_found(seeded: Database) -> None:
    with seeded.transaction() as connection:
        connection.execute(delete(prompt_logs))

    assert run(seeded, "verify") == 1


def test_a_broken_audit_log_is_found(seeded: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with seeded.transaction() as connection:
        unguard(connection, "audit_log")
        connection.exec_driver_sql("UPDATE audit_log SET actor = 'nobody'")

    assert run(seeded, "verify") == 1

    assert "audit log: row 1: the row was changed" in capsys.readouterr().out


def test_a_version_that_was_changed_behind_the_triggers_is_found(
    seeded: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with seeded.transaction() as connection:
        unguard(connection, "template_versions")
        connection.exec_driver_sql(
            "UPDATE template_versions SET system_prompt = 'Another.' WHERE template_id = 3"
        )

    assert run(seeded, "verify") == 1

    shown = capsys.readouterr().out
    assert "template 3" in shown
    assert "Another." not in shown


def test_a_case_that_the_emergency_file_lacks_is_found() -> None:
    emergency = load_emergency()
    first = emergency.templates[0]
    fewer = Snapshot(revision=0, templates=emergency.templates[1:])
    inactive = replace(emergency, templates=(replace(first, is_active=False),))

    assert verification.emergency_covers(emergency, emergency).faults == ()
    assert len(verification.emergency_covers(emergency, fewer).faults) == 1
    assert verification.emergency_covers(inactive, fewer).faults == ()


def test_one_replay_is_told_as_json(seeded: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(seeded, "replay", "one") == 0

    assert json.loads(capsys.readouterr().out)["same"] is True

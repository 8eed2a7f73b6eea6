"""Writing the log: nothing lost that fits, nobody held up, no text where texts are off."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import Connection

from gateway.config import Logs
from gateway.errors import StoreUnavailable
from gateway.logs import writer as writer_module
from gateway.logs.batch import REUSED, TOUCH, candidate, write_batch
from gateway.logs.queue import BODY_NOT_KEPT, ENTRY_BYTES, body_bytes
from gateway.logs.writer import LogWriter
from gateway.prompts.digest import sha256_of
from gateway.store.database import Database
from gateway.store.tables import (
    config_objects,
    prompt_log_bodies,
    prompt_log_flags,
    prompt_logs,
)
from gateway.values.assembly import Message
from gateway.values.logentry import LogEntry
from tests.gateway.log_parts import (
    NOW,
    Away,
    Clock,
    body,
    config_object,
    entry,
    rows,
    with_body,
    write,
)

WHOLE = entry(
    "whole",
    status=502,
    error_code="worker_fault",
    job_id="j",
    user_id="u",
    template_id=3,
    template_name="enhancement_sdxl_sfw",
    template_version=4,
    rule_ids=(7, 5),
    character_id="mara",
    model_key="qwen_instruct",
    model_source="default",
    content_mode="sfw",
    mode_source="explicit",
    fallback_level=1,
    config_revision=2**40,
    snapshot_age_ms=1.5,
    tokens_in=100,
    tokens_out=20,
    target_tokens=70,
    compressed=True,
    worker_ms=900.25,
    cache_hit=True,
    flags=("prompts_unverified", "model_fallback"),
    messages_sha256="a" * 64,
    prompt_ids_sha256="b" * 64,
)


def make(database: Database, **changes: Any) -> LogWriter:
    return LogWriter(database, Logs(), wall=lambda: NOW, **changes)


def ids(database: Database) -> list[str]:
    return [row["request_id"] for row in rows(database, prompt_logs)]


def test_every_value_of_an_entry_is_in_its_row(database: Database) -> None:
    write(database, WHOLE)

    (row,) = rows(database, prompt_logs)
    for one in fields(LogEntry):
        if one.name != "body":
            value = getattr(WHOLE, one.name)
            assert row[one.name] == (list(value) if isinstance(value, tuple) else value), one.name
    assert {one["flag"] for one in rows(database, prompt_log_flags)} == set(WHOLE.flags)
    assert {one["log_id"] for one in rows(database, prompt_log_flags)} == {row["id"]}


def test_texts_are_in_a_row_of_their_own_with_what_was_used(database: Database) -> None:
    used = (config_object(id=2, weight=1.0), config_object("template", id=1, name="é 🙂"))
    write(database, with_body(body=body(objects=used, request={"params": {"top_p": 1.0}})))

    (row,) = rows(database, prompt_log_bodies)
    assert row["messages"] == [
        {"role": "system", "content": "Describe the picture."},
        {"role": "user", "content": "a harbour at dawn"},
    ]
    assert (row["answer"], row["created_at"]) == ("A harbour.", NOW)
    assert row["config_refs"] == [one.content_hash for one in used]
    assert row["request"] == {"params": {"top_p": 1.0}}


def test_an_object_is_kept_once_and_hashes_the_same_when_it_is_read(database: Database) -> None:
    """The engine's own serializer spells 1.0 as 1, and the hash is of 1.0."""
    one = config_object(id=2, weight=1.0, small=1e-7, text="é\u2028", none=None)

    write(database, *(with_body(f"r{n}", body=body(objects=(one,))) for n in range(3)))
    write(database, with_body("later", body=body(objects=(one,))))

    (kept,) = rows(database, config_objects)
    assert kept["content_hash"] == one.content_hash
    assert sha256_of({"kind": kept["kind"], "body": kept["body"]}) == one.content_hash
    assert kept["created_at"] == NOW


def test_the_last_use_of_an_object_is_written_once_an_hour(database: Database) -> None:
    times = [NOW, NOW + TOUCH / 2, NOW + 2 * TOUCH]
    seen = []

    for number, now in enumerate(times):
        with database.transaction() as connection:
            write_batch(connection, [with_body(f"r{number}")], now)
        seen.append(rows(database, config_objects)[0]["created_at"])

    assert seen == [NOW, NOW, NOW + 2 * TOUCH]


def test_with_texts_switched_off_nothing_of_them_is_stored(database: Database) -> None:
    writer = LogWriter(database, Logs(bodies=False), wall=lambda: NOW)

    writer.add(with_body("r1"))
    assert writer.flush(60)

    assert not writer.keeps_bodies
    assert rows(database, prompt_log_bodies) == rows(database, config_objects) == []
    (row,) = rows(database, prompt_logs)
    assert "harbour" not in json.dumps({name: str(value) for name, value in row.items()})


@pytest.mark.parametrize("request_id", ["same", "x" * 64])
def test_an_id_that_comes_again_loses_no_row(database: Database, request_id: str) -> None:
    again = [with_body(request_id, age_s=n % 2) for n in range(5)]

    write(database, *again)
    write(database, *again)

    found = ids(database)
    assert len(found) == len(set(found)) == 10
    assert found[0] == request_id
    assert all(one.startswith(f"{request_id[:40]}") and len(one) <= 64 for one in found)
    assert len(rows(database, prompt_log_bodies)) == 10
    flagged = [row for row in rows(database, prompt_logs) if REUSED in row["flags"]]
    assert len(flagged) == 9


def test_a_client_that_guesses_the_next_id_loses_no_row_either(database: Database) -> None:
    guessed = candidate(entry("same"), 0, 1)

    write(database, entry("same"), entry(guessed))
    write(database, entry("same"))

    assert len(set(ids(database))) == 3


def test_an_entry_that_no_table_takes_does_not_take_the_others_with_it(
    database: Database,
) -> None:
    writer = make(database)
    for number in range(10):
        writer.add(entry(f"r{number}", tokens_in=2**80 if number == 4 else 1))

    assert writer.flush(60)

    assert ids(database) == [f"r{number}" for number in range(10) if number != 4]
    assert (writer.counts.written, writer.counts.refused) == (9, 1)


def test_a_fault_of_ours_with_one_entry_does_not_stop_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: Connection, entries: Sequence[LogEntry], now: datetime) -> None:
        if any(one.request_id == "r1" for one in entries):
            raise KeyError("r1")
        write_batch(connection, entries, now)

    monkeypatch.setattr(writer_module, "write_batch", fail)
    writer = make(database)
    for number in range(3):
        writer.add(entry(f"r{number}"))

    assert writer.flush(60)

    assert ids(database) == ["r0", "r2"]
    assert (writer.counts.written, writer.counts.refused) == (2, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"answer": "a\0b"},
        {"messages": (Message("user", "a\0b"),)},
        {"answer": "\ud800"},
        {"trace": {"number": float("nan")}},
        {"request": {"prompt": "\\\0"}},
    ],
)
def test_texts_that_no_database_holds_cost_only_themselves(
    database: Database, changed: dict[str, Any]
) -> None:
    write(database, with_body("bad", body=body(**changed)), with_body("good"))

    found = {row["request_id"]: row for row in rows(database, prompt_logs)}
    assert found["bad"]["flags"] == [BODY_NOT_KEPT]
    assert found["good"]["flags"] == []
    assert [row["request_id"] for row in rows(database, prompt_log_bodies)] == ["good"]


def test_a_backslash_before_u0000_is_only_text(database: Database) -> None:
    write(database, with_body(body=body(answer="x", request={"prompt": "\\u0000"})))

    assert rows(database, prompt_log_bodies)[0]["request"] == {"prompt": "\\u0000"}


def test_texts_too_long_for_a_column_are_cut(database: Database) -> None:
    write(database, entry(error_code="e" * 100, endpoint="/x\0" + "y" * 100, flags=("f" * 99,)))

    (row,) = rows(database, prompt_logs)
    assert (len(row["error_code"]), len(row["endpoint"])) == (60, 80)
    assert row["endpoint"].startswith("/x\ufffdy")
    assert rows(database, prompt_log_flags)[0]["flag"] == "f" * 60


# --- bounds -----------------------------------------------------------------------------------


def test_a_full_queue_drops_the_newest_and_counts(database: Database) -> None:
    writer = make(database, max_entries=3)

    for number in range(5):
        writer.add(entry(f"r{number}"))

    assert (writer.counts.queued, writer.counts.dropped) == (3, 2)
    assert writer.flush(60)
    assert ids(database) == ["r0", "r1", "r2"]
    writer.add(entry("after"))
    assert writer.flush(60)
    assert ids(database)[-1] == "after"


def test_texts_without_room_are_dropped_before_numbers_are(database: Database) -> None:
    texts = body(answer="x" * 20_000)
    writer = make(database, max_bytes=4 * ENTRY_BYTES + body_bytes(texts))

    for number in range(5):
        writer.add(with_body(f"r{number}", body=texts))

    assert writer.counts.bodies_dropped == 3
    assert (writer.counts.queued, writer.counts.dropped) == (4, 1)
    assert writer.flush(60)
    assert [row["request_id"] for row in rows(database, prompt_log_bodies)] == ["r0"]
    assert [row["flags"] for row in rows(database, prompt_logs)] == [[], *[[BODY_NOT_KEPT]] * 3]


def test_the_size_of_texts_is_never_far_below_their_bytes() -> None:
    long = "x" * 100_000

    for changed in (
        {"answer": long},
        {"messages": (Message("user", long),)},
        {"trace": {"a": [{"b": long}]}},
        {"request": {"history": [{"content": long}]}},
        {"objects": (config_object(body=long),)},
    ):
        assert body_bytes(body(**changed)) >= 100_000
    assert body_bytes(body()) < 5_000


def test_drops_are_told_once_a_minute(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    writer = make(database, max_entries=1, clock=clock)
    caplog.set_level(logging.WARNING)

    for _ in range(121):
        writer.add(entry())
        clock.now += 1.0

    told = [one.getMessage() for one in caplog.records]
    assert told == [
        "1 entries of the log were dropped: more came than fit",
        "60 entries of the log were dropped: more came than fit",
    ]


# --- without the database ---------------------------------------------------------------------


def test_without_the_database_entries_wait_in_their_order(database: Database) -> None:
    away = Away(database)
    writer = make(away)
    away.is_away = True
    for number in range(7):
        writer.add(entry(f"r{number}"))

    assert not writer.flush(60)
    assert not writer.write_some(2000.0)
    away.is_away = False
    assert writer.flush(60)

    assert ids(database) == [f"r{number}" for number in range(7)]
    assert (writer.counts.written, writer.counts.dropped) == (7, 0)


def test_texts_survive_an_outage(database: Database) -> None:
    away = Away(database)
    writer = make(away)
    away.is_away = True
    writer.add(with_body())
    for _ in range(20):
        writer.write_some(2000.0)
    away.is_away = False

    assert writer.flush(60)

    assert len(rows(database, prompt_log_bodies)) == 1


def test_texts_that_the_database_chokes_on_do_not_hold_up_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choke(connection: Connection, entries: Sequence[LogEntry], now: datetime) -> None:
        if any(one.body is not None and one.request_id == "r3" for one in entries):
            raise StoreUnavailable("too big for it")
        write_batch(connection, entries, now)

    monkeypatch.setattr(writer_module, "write_batch", choke)
    writer = make(database)
    for number in range(6):
        writer.add(with_body(f"r{number}"))

    for _ in range(40):
        writer.write_some(2000.0)

    assert ids(database) == [f"r{number}" for number in range(6)]
    assert [row["request_id"] for row in rows(database, prompt_log_bodies)] == [
        f"r{number}" for number in range(6) if number != 3
    ]


def test_adding_never_raises(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    writer = make(database)

    writer.add(replace(with_body(), body=object()))  # type: ignore[arg-type]

    assert writer.counts.dropped == 1
    assert "an entry of the log was lost" in caplog.text


# --- the thread -------------------------------------------------------------------------------


def test_all_that_many_threads_add_is_written_by_the_stop(database: Database) -> None:
    writer = make(database)
    writer.start()

    def add(number: int) -> None:
        for one in range(50):
            writer.add(with_body(f"t{number}-{one}"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.stop(60)

    assert len(set(ids(database))) == 200
    assert writer.counts.written == 200


def test_a_flush_waits_for_what_was_added_before(database: Database) -> None:
    writer = make(database)
    writer.start()
    writer.add(entry("r1"))

    assert writer.flush(60)

    assert ids(database) == ["r1"]
    assert writer.flush(60)
    writer.stop()


def test_a_stop_without_the_database_ends_and_says_what_is_lost(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    away = Away(database)
    away.is_away = True
    writer = make(away)
    writer.start()
    writer.add(entry("r1"))
    writer.add(entry("r2"))

    writer.stop(0.2)
    writer.add(entry("r3"))

    assert "2 entries of the log were not written before the stop" in caplog.text
    assert writer.counts.dropped == 3
    assert away.attempts >= 1


def test_prometheus_sees_the_counts(database: Database) -> None:
    registry = CollectorRegistry()
    writer = LogWriter(database, Logs(), registry, max_entries=2)
    for number in range(3):
        writer.add(entry(f"r{number}"))

    before = generate_latest(registry).decode()
    assert writer.flush(60)
    after = generate_latest(registry).decode()

    assert 'gateway_log_entries_total{outcome="queued"} 2.0' in before
    assert 'gateway_log_entries_total{outcome="dropped"} 1.0' in before
    assert "gateway_log_waiting 2.0" in before
    assert 'gateway_log_entries_total{outcome="written"} 2.0' in after
    assert "gateway_log_waiting 0.0" in after


def test_an_entry_keeps_its_time_to_the_microsecond(database: Database) -> None:
    at = NOW + timedelta(microseconds=123457)

    write(database, entry(created_at=at))

    assert rows(database, prompt_logs)[0]["created_at"] == at

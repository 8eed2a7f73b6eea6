"""Goal 6 through the database: from any log row the same messages, whatever was edited since."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from gateway.errors import GatewayError, NotFound
from gateway.logs.batch import write_batch
from gateway.logs.replay import newest_with_texts, replay_logged
from gateway.prompts.assemble import assemble
from gateway.prompts.replay import request_to_json, used_objects
from gateway.store.database import Database
from gateway.store.tables import config_objects, prompt_log_bodies, prompt_logs
from gateway.values.assembly import Assembled, AssembleRequest, Message
from gateway.values.logentry import ConfigObject, LogBody, LogEntry
from gateway.values.rows import Character, CharacterLora, Snapshot
from tests.gateway import snapshots
from tests.gateway.log_parts import NOW, entry, write
from tests.gateway.snapshots import WordCounters, template

COUNT = int(os.environ.get("GATEWAY_REPLAYS", "150"))


def logged(
    request_id: str, rows: Snapshot, request: AssembleRequest, assembled: Assembled
) -> LogEntry:
    """What gateway/flows/record.py leaves of it."""
    return entry(
        request_id,
        template_name=assembled.template.template_name,
        template_version=assembled.template.live.version,
        rule_ids=assembled.rule_ids,
        content_mode=assembled.content_mode,
        mode_source=assembled.mode_source,
        tokens_in=assembled.prompt_tokens,
        messages_sha256=assembled.messages_sha256,
        body=LogBody(
            request=request_to_json(request),
            messages=assembled.messages,
            answer=None,
            trace={},
            objects=tuple(
                ConfigObject(content_hash=one.content_hash, kind=one.kind, body=one.body)
                for one in used_objects(rows, request, assembled)
            ),
        ),
    )


def random_entries(count: int) -> list[LogEntry]:
    found: list[LogEntry] = []
    seed = 0
    while len(found) < count:
        seed += 1
        rows, request = snapshots.random_snapshot(seed), snapshots.random_request(seed + 10_000)
        try:
            assembled = assemble(rows, request, WordCounters())
        except GatewayError:
            continue
        found.append(logged(f"r{seed}", rows, request, assembled))
    return found


def one_entry(**fields: Any) -> LogEntry:
    request = snapshots.request(character_id="mara")
    rows = snapshots.snapshot(
        characters=(
            Character(
                id="mara",
                name="Mara",
                defaults={"temperature": 1.0},
                loras=(CharacterLora(lora_ref="m", weight=1.0),),
            ),
        ),
        **fields,
    )
    return logged("one", rows, request, assemble(rows, request, WordCounters()))


def replayed(database: Database, request_id: str = "one") -> dict[str, Any]:
    with database.reading() as connection:
        return replay_logged(connection, request_id, WordCounters()).to_json()


def test_random_requests_give_the_same_messages_again(database: Database) -> None:
    entries = random_entries(COUNT)

    write(database, *entries)

    with database.reading() as connection:
        assert set(newest_with_texts(connection, COUNT)) == {one.request_id for one in entries}
        for one in entries:
            found = replay_logged(connection, one.request_id, WordCounters())
            assert found.same, found
            assert found.logged == found.recomputed == one.messages_sha256
            assert found.differences == ()


def test_two_configurations_with_the_same_ids_do_not_mix(database: Database) -> None:
    """The second stands for an edit: same template, same name, another version and text."""
    edited = snapshots.snapshot(templates=(template(1, system_prompt="Another.", version=2),))
    request = snapshots.request()
    again = logged("two", edited, request, assemble(edited, request, WordCounters()))

    write(database, one_entry(), again)

    first, second = replayed(database), replayed(database, "two")
    assert first["same"] and second["same"]
    assert first["recomputed"] != second["recomputed"]


def test_whole_floats_of_a_configuration_survive_the_database(database: Database) -> None:
    """1.0 came back as 1, and the object did not have its hash any more."""
    write(database, one_entry())

    assert replayed(database)["differences"] == []


def test_messages_that_were_changed_show(database: Database) -> None:
    write(database, one_entry())
    with database.transaction() as connection:
        messages = connection.execute(select(prompt_log_bodies.c.messages)).scalar_one()
        messages[0]["content"] = messages[0]["content"] + "!"
        connection.execute(update(prompt_log_bodies).values(messages=messages))

    found = replayed(database)

    assert found["same"] is False
    assert found["recomputed"] == found["logged"]
    assert len(found["differences"]) == 2
    assert "alike in the first" in found["differences"][1]
    assert "Describe" not in " ".join(found["differences"])


def test_a_row_that_was_changed_shows(database: Database) -> None:
    write(database, one_entry())
    with database.transaction() as connection:
        connection.execute(update(prompt_logs).values(messages_sha256="0" * 64))

    found = replayed(database)

    assert (found["same"], found["logged"]) == (False, "0" * 64)
    assert found["differences"]


def test_an_object_that_was_changed_shows(database: Database) -> None:
    write(database, one_entry())
    with database.transaction() as connection:
        is_template = config_objects.c.kind == "template"
        body = connection.execute(select(config_objects.c.body).where(is_template)).scalar_one()
        body["live"]["system_prompt"] = "Another."
        connection.execute(update(config_objects).where(is_template).values(body=body))

    found = replayed(database)

    assert (found["same"], found["recomputed"]) == (False, None)
    assert "does not match its hash" in found["differences"][0]


def test_an_object_that_is_gone_shows(database: Database) -> None:
    write(database, one_entry())
    with database.transaction() as connection:
        connection.execute(delete(config_objects).where(config_objects.c.kind == "template"))

    found = replayed(database)

    assert (found["same"], found["recomputed"]) == (False, None)
    assert "configuration objects are not there" in found["differences"][0]
    assert "template_not_found" in found["differences"][1]


def test_other_counts_are_told_though_the_messages_are_the_same(database: Database) -> None:
    one = one_entry()
    assert one.tokens_in is not None
    write(database, replace(one, tokens_in=one.tokens_in + 1))

    found = replayed(database)

    assert found["same"] is True
    assert found["differences"] == [
        f"tokens_in: {one.tokens_in + 1} in the row, {one.tokens_in} now"
    ]


def test_without_texts_nothing_is_assembled(database: Database) -> None:
    write(database, entry("plain"))

    with pytest.raises(NotFound, match="body_days"):
        replayed(database, "plain")
    with pytest.raises(NotFound, match="no such request"):
        replayed(database, "other")


def test_a_message_more_shows(database: Database) -> None:
    one = one_entry()
    assert one.body is not None
    more = replace(one.body, messages=(*one.body.messages, Message("user", "more")))
    with database.transaction() as connection:
        write_batch(connection, [replace(one, body=more)], NOW + timedelta(hours=1))

    assert replayed(database)["differences"][1].endswith("messages were kept, 2 are assembled")

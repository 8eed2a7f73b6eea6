"""Pages of the log: every filter finds what it says, and no row is lost or told twice."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from typing import Any

import pytest

from gateway.errors import Invalid, InvalidRequest, NotFound
from gateway.logs.queries import (
    Filters,
    body_of,
    cursor_of,
    list_rows,
    objects_of,
    one_row,
    place_of,
    statement_of,
)
from gateway.store.database import Database
from gateway.values.logentry import LogEntry
from tests.gateway.log_parts import MESSAGES, NOW, body, entry, with_body, write

CHOICES: dict[str, tuple[Any, ...]] = {
    "template_name": (None, "a", "b"),
    "user_id": (None, "u1", "u2"),
    "endpoint": ("/enhance/sdxl", "/enhance/wan"),
    "error_code": (None, None, "worker_busy", "worker_timeout"),
    "model_key": (None, "qwen_instruct", "mytho"),
    "fallback_level": (0, 0, 1, 2),
}
COMBINATIONS = int(os.environ.get("GATEWAY_LOG_FILTERS", "60"))
FLAGS = ("f1", "f2", "f3")


def random_entries(count: int, seed: int = 5) -> list[LogEntry]:
    """With few different times, so that many rows share one."""
    draw = random.Random(seed)
    return [
        entry(
            f"r{number}",
            draw.randint(0, 12) * 10.0,
            flags=tuple(draw.sample(FLAGS, draw.choice((0, 0, 1, 2)))),
            **{name: draw.choice(values) for name, values in CHOICES.items()},
        )
        for number in range(count)
    ]


def wanted(entries: list[LogEntry], filters: Filters) -> list[str]:
    """The same, without a database. Ids of rows are in the order in which they were written."""
    found = [
        (one.created_at, number, one.request_id)
        for number, one in enumerate(entries)
        if (filters.since is None or one.created_at >= filters.since)
        and (filters.until is None or one.created_at < filters.until)
        and (filters.request_id is None or one.request_id == filters.request_id)
        and set(filters.flags) <= set(one.flags)
        and all(getattr(filters, name) in (None, getattr(one, name)) for name in CHOICES)
    ]
    return [request_id for _, _, request_id in sorted(found, reverse=True)]


def walk(database: Database, filters: Filters, limit: int) -> list[str]:
    """All pages, one after another."""
    found: list[str] = []
    cursor = None
    with database.reading() as connection:
        while True:
            page = list_rows(connection, filters, limit, cursor)
            found += [row["request_id"] for row in page.rows]
            cursor = page.next
            if cursor is None:
                return found
            assert len(page.rows) == limit


def test_every_combination_of_filters_finds_what_it_says(database: Database) -> None:
    entries = random_entries(120)
    write(database, *entries)
    draw = random.Random(9)

    found = 0
    for _ in range(COMBINATIONS):
        values = {
            name: draw.choice([one for one in choices if one is not None])
            for name, choices in CHOICES.items()
            if draw.random() < 0.25
        }
        if draw.random() < 0.3:
            values["since"] = NOW - timedelta(seconds=draw.randint(0, 120))
        if draw.random() < 0.3:
            values["until"] = NOW - timedelta(seconds=draw.randint(0, 120))
        if draw.random() < 0.05:
            values["request_id"] = draw.choice(entries).request_id
        flags = tuple(draw.sample(FLAGS, draw.choice((0, 0, 1, 2))))
        filters = Filters(**values, flags=flags)

        expected = wanted(entries, filters)
        assert walk(database, filters, draw.choice((11, 200))) == expected, filters
        found += len(expected)
    assert found > COMBINATIONS


@pytest.mark.parametrize("limit", [1, 3, 10])
@pytest.mark.parametrize("filters", [Filters(), Filters(flags=("f1",)), Filters(user_id="u1")])
def test_pages_of_rows_with_one_time_lose_none(
    database: Database, limit: int, filters: Filters
) -> None:
    entries = [entry(f"r{number}", flags=("f1",), user_id="u1") for number in range(10)]
    write(database, *entries)

    assert walk(database, filters, limit) == [f"r{number}" for number in range(9, -1, -1)]


def test_rows_that_come_while_somebody_reads_do_not_move_the_pages(database: Database) -> None:
    write(database, *(entry(f"r{number}", number) for number in range(4)))
    with database.reading() as connection:
        first = list_rows(connection, Filters(), 2)

    write(database, entry("newer", -5))
    with database.reading() as connection:
        second = list_rows(connection, Filters(), 2, first.next)

    assert [row["request_id"] for row in second.rows] == ["r2", "r3"]
    assert second.next is None


def test_a_cursor_is_a_place_to_the_microsecond() -> None:
    at = NOW + timedelta(microseconds=654321)

    assert place_of(cursor_of(at, 10**17)) == (at, 10**17)


@pytest.mark.parametrize("cursor", ["", "1", "1.", ".1", "-1.2", "1.2.3", "٣.١", "9" * 18 + ".1"])
def test_a_cursor_of_somebody_elses_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidRequest):
        place_of(cursor)


@pytest.mark.parametrize("limit", [0, -1, 201])
def test_a_page_has_a_bound(database: Database, limit: int) -> None:
    with database.reading() as connection, pytest.raises(Invalid, match="between 1 and 200"):
        list_rows(connection, Filters(), limit)


def test_one_row_has_its_texts_and_what_was_used(database: Database) -> None:
    write(database, with_body("r1"), entry("r2"))

    with database.reading() as connection:
        row = one_row(connection, "r1")
        texts = body_of(connection, "r1")
        nothing = body_of(connection, "r2")
        assert texts is not None
        objects = objects_of(connection, texts.config_refs)
        with pytest.raises(NotFound):
            one_row(connection, "r3")

    assert row["request_id"] == "r1"
    assert texts.messages == MESSAGES
    assert [one.content_hash for one in objects] == [one.content_hash for one in body().objects]
    assert nothing is None


SINGLE = {
    "ix_prompt_logs_created_at": Filters(),
    "ix_prompt_logs_template": Filters(template_name="a"),
    "ix_prompt_logs_user": Filters(user_id="u"),
    "ix_prompt_logs_endpoint": Filters(endpoint="e"),
    "ix_prompt_logs_model": Filters(model_key="m"),
    "ix_prompt_logs_error": Filters(error_code="e", template_name="a", endpoint="e"),
    "ix_prompt_logs_fallback": Filters(fallback_level=1, endpoint="e"),
    "pk_prompt_log_flags": Filters(flags=("f",), template_name="a"),
}


def test_sqlite_takes_the_index_of_the_filter(make_database: Any) -> None:
    """Without sorting whatever has the filter's value: that is what takes seconds."""
    database: Database = make_database("sqlite")
    shown = {"pk_prompt_log_flags": "sqlite_autoindex_prompt_log_flags_1"}

    for index, filters in SINGLE.items():
        for cursor in (None, cursor_of(NOW, 5)):
            statement = statement_of(filters, cursor, is_sqlite=True).limit(50)
            with database.reading() as connection:
                asked = statement.compile(database.engine)
                values = tuple("2026" for _ in asked.positiontup or ())
                found = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}", values)
                plan = [row[3] for row in found]
            assert shown.get(index, index) in plan[0], plan
            assert not any("TEMP B-TREE FOR ORDER BY" in step for step in plan), plan

"""Refreshing the catalogue, on both engines: idempotent, deletes nothing, leaves defaults alone."""

from __future__ import annotations

import os
import threading
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, text, update

import gateway
from gateway.errors import Conflict, NotFound
from gateway.models.exchange import Exchange
from gateway.models.faults import ProviderError
from gateway.models.listing import BUILT_IN, Listed, Listing, RowError, read_rows
from gateway.models.lists import ListFetcher
from gateway.models.refresh import Known, SyncResults, last_synced, plan, refresh, refresh_body
from gateway.store.database import Database
from gateway.store.tables import api_models, audit_log, config_state, llm_models, providers
from gateway.values.rows import Provider
from tests.gateway import lying_provider as lying
from tests.gateway.lying_provider import LyingProvider, answers

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SEEDS = Path(gateway.__file__).parent / "data" / "seed.toml"
EXAMPLES = int(os.environ.get("GATEWAY_REFRESH_EXAMPLES", "10"))


def add_provider(database: Database, name: str = "matcha", base_url: str | None = None) -> int:
    with database.transaction() as connection:
        made = connection.execute(
            insert(providers)
            .values(name=name, kind="openai" if base_url else "catalogue", base_url=base_url)
            .returning(providers.c.id)
        )
        return int(made.scalar_one())


def assign(database: Database, external_id: str, *, is_default: bool = True) -> None:
    """Give the model the task chat/enhancement."""
    with database.transaction() as connection:
        model = connection.execute(
            select(llm_models).where(llm_models.c.external_id == external_id)
        ).one()
        connection.execute(
            insert(api_models).values(
                llm_model_id=model.id,
                display_name=model.model_name,
                model_key=model.model_key,
                modality="chat",
                task="enhancement",
                is_default=is_default,
            )
        )


def listed(*rows: Any, keys_are_ids: bool = True) -> Callable[[Provider], Listing]:
    return lambda _: read_rows(
        [row if isinstance(row, dict) else {"id": row} for row in rows], keys_are_ids=keys_are_ids
    )


def gives(listing: Listing) -> Callable[[Provider], Listing]:
    return lambda _: listing


def run(
    database: Database,
    fetch: Callable[[Provider], Listing],
    *,
    provider: str = "matcha",
    confirmed: bool = False,
    days: int = 0,
) -> SyncResults:
    return refresh(
        database,
        fetch,
        NOW + timedelta(days=days),
        provider=provider,
        actor="tester",
        confirmed=confirmed,
    )


def counts(results: SyncResults) -> tuple[int, int, int, int]:
    return results.added, results.updated, results.retired, results.failed


def revision(database: Database) -> int:
    with database.reading() as connection:
        return int(connection.execute(select(config_state.c.revision)).scalar_one())


def rows(database: Database) -> list[dict[str, Any]]:
    with database.reading() as connection:
        found = connection.execute(select(llm_models).order_by(llm_models.c.id)).mappings()
        return [dict(row) for row in found]


def assignments(database: Database) -> list[dict[str, Any]]:
    with database.reading() as connection:
        found = connection.execute(select(api_models).order_by(api_models.c.id)).mappings()
        return [dict(row) for row in found]


def missing(database: Database) -> dict[str, bool]:
    return {row["external_id"]: row["missing_since"] is not None for row in rows(database)}


def test_the_built_in_mapping_fills_a_catalogue_that_has_no_list(database: Database) -> None:
    add_provider(database)

    results = run(database, lambda _: BUILT_IN)

    assert (results.source, counts(results)) == ("built_in", (5, 0, 0, 0))
    assert [(row["external_id"], row["model_name"]) for row in rows(database)] == [
        ("28", "Claude 3.7 Sonnet"),
        ("25", "Claude 3.5 Sonnet"),
        ("30", "Claude Opus 4.1"),
        ("35", "Gemini 2.5 Flash-Lite"),
        ("40", "GPT-4o"),
    ]
    assert [row["display_order"] for row in rows(database)] == [1, 2, 3, 4, 5]


def test_a_second_run_changes_nothing_and_says_so(database: Database) -> None:
    add_provider(database)
    fetch = listed({"id": "a", "capabilities": {"x": 1.0, "é": [1e-5, True, None]}}, "b")
    run(database, fetch)
    before, at = rows(database), revision(database)

    results = run(database, fetch, days=1)

    assert counts(results) == (0, 0, 0, 0)
    assert (rows(database), revision(database)) == (before, at)


def test_that_a_run_went_through_is_known_even_when_it_changed_nothing(database: Database) -> None:
    add_provider(database)
    with database.reading() as connection:
        assert last_synced(connection) is None
    run(database, listed("a"))

    run(database, listed("a"), days=1)

    with database.reading() as connection:
        assert last_synced(connection) == NOW + timedelta(days=1)
        assert last_synced(connection, "matcha") == NOW + timedelta(days=1)
        assert last_synced(connection, "other") is None
        entries = connection.execute(select(audit_log).order_by(audit_log.c.id)).mappings().all()
    assert [entry["detail"]["added"] for entry in entries] == [1, 0]
    assert {entry["actor"] for entry in entries} == {"tester"}


def test_a_model_that_is_gone_is_flagged_and_comes_back(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c"))

    gone = run(database, listed("a", "b"), days=1)
    since = [row["missing_since"] for row in rows(database)]
    still = run(database, listed("a", "b"), days=2)
    back = run(database, listed("a", "b", "c"), days=3)

    assert since == [None, None, NOW + timedelta(days=1)]
    assert [counts(one) for one in (gone, still, back)] == [
        (0, 0, 1, 0),
        (0, 0, 0, 0),
        (0, 1, 0, 0),
    ]
    assert missing(database) == {"a": False, "b": False, "c": False}


def test_a_changed_name_is_an_update_and_the_key_stays(database: Database) -> None:
    add_provider(database)
    run(database, listed({"id": 1, "name": "Old Name"}, keys_are_ids=False))

    results = run(database, listed({"id": 1, "name": "New Name"}, keys_are_ids=False))

    assert counts(results) == (0, 1, 0, 0)
    (row,) = rows(database)
    assert (row["model_name"], row["model_key"]) == ("New Name", "old-name")


def test_capabilities_that_the_list_does_not_mention_stay(database: Database) -> None:
    add_provider(database)
    run(database, listed({"id": "a", "capabilities": {"chat": True, "vision": True}}))
    fetch = listed({"id": "a", "capabilities": {"vision": False}, "context_length": 4096})

    first, second, silent = run(database, fetch), run(database, fetch), run(database, listed("a"))

    assert [one.updated for one in (first, second, silent)] == [1, 0, 0]
    (row,) = rows(database)
    assert row["capabilities"] == {"chat": True, "vision": False, "context_length": 4096}


def test_capabilities_do_not_grow_without_end(database: Database) -> None:
    add_provider(database)
    for number in range(3):
        grown = {"id": "a", "capabilities": {f"k{number}": "x" * 1900}}
        results = run(database, listed(grown, "b"))

    assert counts(results) == (0, 0, 0, 1)
    assert "at most 4096" in results.errors[0].reason
    assert set(rows(database)[0]["capabilities"]) == {"k0", "k1"}


def test_the_built_in_mapping_changes_nothing_in_a_catalogue_that_was_just_filled() -> None:
    seeds = tomllib.loads(SEEDS.read_text("utf-8"))
    filled = {one["external_id"]: one for one in seeds["models"] if one["provider"] == "matcha"}

    assert set(filled) == BUILT_IN.ids
    for row in BUILT_IN.rows:
        seed = filled[row.external_id]
        assert (row.model_name, row.model_key) == (seed["model_name"], seed["model_key"])
        assert {**seed["capabilities"], **row.capabilities} == seed["capabilities"]


def test_what_people_set_is_not_touched(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b"))
    with database.transaction() as connection:
        connection.execute(
            update(llm_models)
            .where(llm_models.c.external_id == "a")
            .values(is_active=False, display_order=77)
        )

    run(database, listed({"id": "a", "name": "A"}, "b"))

    (row, _) = rows(database)
    assert (row["model_name"], row["is_active"], row["display_order"]) == ("A", False, 77)


def test_a_default_whose_model_is_gone_stays_and_is_named(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c"))
    assign(database, "a")
    assign(database, "b", is_default=False)
    before = assignments(database)

    results = run(database, listed("b", "c"))
    again = run(database, listed("b", "c"))
    back = run(database, listed("a", "b", "c"))

    assert assignments(database) == before
    assert results.missing_defaults == again.missing_defaults == (("chat", "enhancement", "a"),)
    assert back.missing_defaults == ()


@pytest.mark.parametrize("left", [(), ("a",), ("x", "y", "z", "v", "w")])
def test_a_list_with_less_than_half_of_the_models_is_refused_whole(
    database: Database, left: Sequence[str]
) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c", "d"))
    before, at = rows(database), revision(database)

    with pytest.raises(Conflict) as caught:
        run(database, listed(*left))

    assert caught.value.fields["known"] == 4
    assert (rows(database), revision(database)) == (before, at)


def test_half_of_the_models_are_enough(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c", "d"))

    results = run(database, listed("a", "b"))

    assert counts(results) == (0, 0, 2, 0)


def test_a_list_that_shrank_is_taken_when_somebody_says_so(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c", "d"))

    results = run(database, listed(), confirmed=True)

    assert counts(results) == (0, 0, 4, 0)
    assert len(rows(database)) == 4 and all(missing(database).values())


def test_an_empty_list_for_an_empty_catalogue_is_fine(database: Database) -> None:
    add_provider(database)

    assert counts(run(database, listed())) == (0, 0, 0, 0)


def test_a_bad_row_is_an_error_and_its_model_is_not_gone(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c"))

    results = run(database, listed("a", {"id": "b", "name": 7}, "c", "d"))

    assert counts(results) == (1, 0, 0, 1)
    assert results.errors == (RowError("b", "name is no text"),)
    assert missing(database) == dict.fromkeys("abcd", False)


def test_with_an_unreadable_id_in_the_list_no_model_is_gone(database: Database) -> None:
    add_provider(database)
    run(database, listed("a", "b", "c"))

    results = run(database, listed("a", "b", {"name": "c"}))

    assert counts(results) == (0, 0, 0, 1)
    assert not any(missing(database).values())


def test_a_row_that_the_database_refuses_leaves_the_others(database: Database) -> None:
    add_provider(database)
    with database.transaction() as connection:
        if database.is_postgres:
            statement = "ALTER TABLE llm_models ADD CONSTRAINT t CHECK (model_name <> 'bad')"
            connection.execute(text(statement))
        else:
            for event in ("INSERT", "UPDATE"):
                connection.execute(
                    text(
                        f"CREATE TRIGGER t_{event} BEFORE {event} ON llm_models "
                        "WHEN NEW.model_name = 'bad' BEGIN SELECT RAISE(ABORT, 'no'); END"
                    )
                )
    run(database, listed("a"))

    results = run(
        database, listed({"id": "a", "name": "bad"}, {"id": "b", "name": "bad"}, "c", "d")
    )

    assert counts(results) == (2, 0, 0, 2)
    assert {error.id for error in results.errors} == {"a", "b"}
    assert [row["model_name"] for row in rows(database)] == ["a", "c", "d"]


def test_a_key_of_another_providers_model_gets_the_providers_name_before_it(
    database: Database,
) -> None:
    add_provider(database)
    add_provider(database, "second")
    run(database, listed("gpt-4o"))

    results = run(database, listed("gpt-4o"), provider="second")
    again = run(database, listed("gpt-4o"), provider="second")

    assert (counts(results), counts(again)) == ((1, 0, 0, 0), (0, 0, 0, 0))
    assert [row["model_key"] for row in rows(database)] == ["gpt-4o", "second/gpt-4o"]


def test_another_providers_models_are_not_gone(database: Database) -> None:
    add_provider(database)
    add_provider(database, "second")
    run(database, listed("a"))

    run(database, listed("b"), provider="second")

    assert missing(database) == {"a": False, "b": False}


def test_two_names_with_one_key_both_go_in(database: Database) -> None:
    add_provider(database)

    rows_in = ({"id": 1, "name": "A B"}, {"id": 2, "name": "A-B"}, {"id": 3, "name": "a b"})
    results = run(database, listed(*rows_in, keys_are_ids=False))

    assert counts(results) == (3, 0, 0, 0)
    assert [row["model_key"] for row in rows(database)] == ["a-b", "matcha/a-b", "matcha/3"]


def test_an_unknown_provider_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound):
        run(database, listed("a"), provider="nobody")


def test_a_failing_list_changes_nothing_and_is_no_run(database: Database) -> None:
    with LyingProvider() as provider:
        add_provider(database, "local", provider.base_url)
        fetch = ListFetcher(Exchange(private_allowed=True), lambda _: None, 0.3)
        provider.lists(answers({"data": [{"id": "a"}, {"id": "b"}]}))
        run(database, fetch, provider="local")
        before, at = rows(database), revision(database)
        page = {"data": [{"id": "z"}], "has_more": True, "last_id": "z"}
        for reply in (
            lying.status(500),
            lying.hangs,
            lying.drips,
            lying.cuts(b'{"data": []}'),
            lying.too_much(64 << 20),
            answers({"data": {}}),
            lying.in_turn(answers(page), lying.status(429)),
        ):
            provider.lists(reply)

            with pytest.raises(ProviderError):
                run(database, fetch, provider="local", days=1)

        assert (rows(database), revision(database)) == (before, at)
        with database.reading() as connection:
            assert last_synced(connection) == NOW


def test_a_real_list_goes_in_row_by_row(database: Database) -> None:
    with LyingProvider() as provider:
        add_provider(database, "local", provider.base_url)
        fetch = ListFetcher(Exchange(private_allowed=True), lambda _: None)
        provider.lists(
            lying.pages(
                [{"id": "a", "context_length": 4096}, {"id": "b", "name": ["wrong"]}],
                [{"id": "b"}, 7, {"id": "c", "capabilities": {"vision": True}}],
            )
        )

        results = run(database, fetch, provider="local")

    assert counts(results) == (2, 0, 0, 3)
    assert [error.id for error in results.errors] == ["b", "b", None]
    assert [row["model_key"] for row in rows(database)] == ["a", "c"]


def test_two_refreshes_at_once_add_each_model_once(database: Database) -> None:
    add_provider(database)
    together = threading.Barrier(2)
    done: list[SyncResults] = []

    def one() -> None:
        def fetch(provider: Provider) -> Listing:
            together.wait(10)
            return listed(*(f"m{number}" for number in range(30)))(provider)

        done.append(run(database, fetch))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(counts(results) for results in done) == [(0, 0, 0, 0), (30, 0, 0, 0)]


def test_the_answer_has_the_shape_of_the_route() -> None:
    results = SyncResults(
        provider="matcha",
        source="provider",
        added=1,
        failed=1,
        errors=(RowError("b", "name is no text"),),
        missing_defaults=(("chat", "enhancement", "a"),),
    )

    body = refresh_body(results, [{"id": 1}], NOW)

    assert body == {
        "success": True,
        "syncResults": {
            "provider": "matcha",
            "source": "provider",
            "added": 1,
            "updated": 0,
            "retired": 0,
            "failed": 1,
            "errors": [{"id": "b", "reason": "name is no text"}],
            "missingDefaults": [{"modality": "chat", "task": "enhancement", "model_key": "a"}],
        },
        "models": [{"id": 1}],
        "timestamp": "2026-03-01T12:00:00+00:00",
    }


# --- properties -------------------------------------------------------------------------------

ROWS = st.fixed_dictionaries(
    {"id": st.sampled_from("abcdef")},
    optional={
        "name": st.sampled_from(["x", "y", "a"]) | st.just(7),
        "model_key": st.sampled_from(["k", "l"]),
        "capabilities": st.fixed_dictionaries(
            {},
            optional={
                "n": st.integers(-(2**53), 2**53) | st.floats(-(2**53), 2**53),
                "s": st.text("aé ", max_size=3),
            },
        ),
    },
)
LISTS = st.lists(ROWS | st.sampled_from([{}, 7, {"id": None}]), max_size=8)
RUNS = st.lists(st.tuples(LISTS, st.booleans()), min_size=1, max_size=6)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(runs=RUNS, default=st.sampled_from("abcdef"))
def test_no_sequence_of_lists_loses_a_model_or_a_default_or_is_not_idempotent(
    database: Database, runs: list[tuple[list[Any], bool]], default: str
) -> None:
    with database.transaction() as connection:
        for table in (api_models, llm_models, providers):
            connection.execute(delete(table))
    add_provider(database)
    first = run(database, listed(*"abcdef"))
    assert first.added == 6
    assign(database, default)
    task, known = assignments(database), rows(database)

    for number, (raw, confirmed) in enumerate(runs, 1):
        listing = read_rows(raw, keys_are_ids=True)
        before, at = rows(database), revision(database)
        try:
            results = run(database, gives(listing), confirmed=confirmed, days=number)
        except Conflict:
            assert not confirmed
            assert (rows(database), revision(database)) == (before, at)
            continue
        after, changed = rows(database), revision(database)

        assert assignments(database) == task
        assert [row["id"] for row in after][: len(known)] == [row["id"] for row in known]
        assert [row["model_key"] for row in after][: len(before)] == [
            row["model_key"] for row in before
        ]
        assert all(row["is_active"] for row in after)
        for row in after:
            if row["external_id"] in {one.external_id for one in listing.rows}:
                assert row["missing_since"] is None
            elif listing.is_complete and row["external_id"] not in listing.ids:
                assert row["missing_since"] is not None
        assert (changed > at) == (results.added + results.updated + results.retired > 0)
        assert results.missing_defaults == tuple(
            ("chat", "enhancement", row["model_key"])
            for row in after
            if row["external_id"] == default and row["missing_since"] is not None
        )

        again = run(database, gives(listing), confirmed=True, days=number + 100)

        assert (again.added, again.updated, again.retired) == (0, 0, 0)
        assert (rows(database), revision(database)) == (after, changed)


KNOWN = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.sampled_from("xy"), st.booleans())
).map(
    lambda found: [
        Known(id=number, external_id=key, model_name=name, capabilities={}, is_missing=gone)
        for number, (key, (name, gone)) in enumerate(found.items())
    ]
)
LISTINGS = st.builds(
    lambda found, complete, bad: Listing(
        rows=tuple(
            Listed(external_id=key, model_name=name, model_key=key) for key, name in found.items()
        ),
        ids=frozenset(found) | bad,
        is_complete=complete,
    ),
    st.dictionaries(st.sampled_from("abcdefghij"), st.sampled_from("xy")),
    st.booleans(),
    st.frozensets(st.sampled_from("abc")),
)


@settings(
    max_examples=int(os.environ.get("GATEWAY_PLAN_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(KNOWN, LISTINGS)
def test_a_plan_touches_each_row_at_most_once_and_only_what_differs(
    known: list[Known], listing: Listing
) -> None:
    made = plan(known, listing)

    by_id = {row.id: row for row in known}
    names = {row.external_id: row.model_name for row in listing.rows}
    touched = [row_id for row_id, _ in made.update] + list(made.retire)
    assert len(set(touched)) == len(touched)
    assert {row.external_id for row in made.add} == set(names) - {row.external_id for row in known}
    for row_id, _ in made.update:
        row = by_id[row_id]
        assert row.is_missing or row.model_name != names[row.external_id]
    for row_id in made.retire:
        assert not by_id[row_id].is_missing and by_id[row_id].external_id not in listing.ids
    assert listing.is_complete or made.retire == ()
    assert made.known == sum(not row.is_missing for row in known)
    assert made.is_suspicious == (2 * len(made.retire) > made.known)

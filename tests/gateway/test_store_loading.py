"""Loading a snapshot: consistent, checked, and the same from both engines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError, StoreUnavailable
from gateway.store.canonical import canonical_json, snapshot_hash, version_hash
from gateway.store.database import Database, open_database
from gateway.store.leases import give_back, take
from gateway.store.loading import BadRows, load_snapshot, read_revision
from gateway.store.seed import seed
from tests.gateway.conftest import MakeDatabase
from tests.gateway.store_rows import SEEDS, plain, template

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def test_a_snapshot_has_every_row_and_its_hashes(filled: Database) -> None:
    with filled.reading() as connection:
        snapshot = load_snapshot(connection)
        revision = read_revision(connection)

    live = snapshot.template("sdxl", "image", "enhancement", "sfw")
    assert snapshot.revision == revision
    assert snapshot.content_hash == snapshot_hash(snapshot)
    assert live is not None and live.live.content_hash == version_hash(template())
    assert [one.name for one in snapshot.rules] == ["z_first", "a_second"]
    assert snapshot.rules[1].match == {"target_model": ["sdxl", "wan"], "quality": "high"}
    assert snapshot.rules[1].tags == ("art", "photo")
    assert snapshot.characters[0].loras[0].trigger_words == ("ink",)
    assert {one.name for one in snapshot.providers} == {"worker", "openrouter"}
    assert len(snapshot.parameters) == len(snapshot.negatives) == 2


def test_both_engines_give_one_hash(make_database: MakeDatabase) -> None:
    hashes = set()
    for engine in ("sqlite", "postgresql"):
        with make_database(engine, "filled").reading() as connection:
            hashes.add(load_snapshot(connection).content_hash)

    assert len(hashes) == 1


def test_a_snapshot_loads_outside_of_a_transaction_too(filled: Database) -> None:
    with filled.engine.connect() as connection:
        snapshot = load_snapshot(connection)
        again = load_snapshot(connection)

    assert snapshot == again


def test_a_reading_transaction_stays_at_its_revision(filled: Database) -> None:
    with filled.reading() as connection:
        before = read_revision(connection)
        with filled.transaction() as other:
            other.exec_driver_sql("UPDATE prompt_rules SET priority = 9")

        snapshot = load_snapshot(connection)

    assert snapshot.revision == before
    assert {one.priority for one in snapshot.rules} == {0}


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE prompt_rules SET match = '[]' WHERE id = 2", "prompt_rules 2: match is an object"),
        ("UPDATE prompt_rules SET match = '{\"taget\": 1}'", "prompt_rules 1: match has unknown"),
        ("UPDATE model_parameters SET params = '\"text\"' WHERE id = 1", "model_parameters 1"),
        ("UPDATE characters SET tags = '{}'", "characters demo-1: tags is a list of strings"),
        ("UPDATE character_loras SET trigger_words = '[1]'", "character_loras 1: trigger_words"),
        ("UPDATE providers SET secret_ref = 'sk-1' WHERE id = 2", "providers 2: secret_ref is the"),
        ("UPDATE templates SET template_name = ' x' WHERE id = 1", "templates 1: template_name"),
        (
            "UPDATE templates SET live_version_id = NULL WHERE id = 1",
            "templates 1: live_version_id",
        ),
    ],
)
def test_a_bad_row_is_named_and_never_left_out(
    filled: Database, statement: str, named: str
) -> None:
    with plain(filled) as connection:
        connection.execute(statement)

    with pytest.raises(BadRows, match=named) as caught, filled.reading() as connection:
        load_snapshot(connection)

    assert isinstance(caught.value, StoreUnavailable)
    assert len(caught.value.faults) >= 1


def test_all_bad_rows_are_named_at_once(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute("UPDATE prompt_rules SET match = '[]'")
        connection.execute("UPDATE characters SET card = '3'")

    with pytest.raises(BadRows) as caught, filled.reading() as connection:
        load_snapshot(connection)

    assert [(one.table, one.key) for one in caught.value.faults] == [
        ("prompt_rules", "1"),
        ("prompt_rules", "2"),
        ("characters", "demo-1"),
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE prompt_rules SET match = '{\"quality\": NaN}'",
        "UPDATE prompt_rules SET match = '{'",
        "UPDATE prompt_rules SET match = x'ff00'",
        "UPDATE prompt_rules SET priority = 'high'",
        "UPDATE prompt_rules SET is_active = 'yes'",
        "UPDATE prompt_rules SET body = x'01'",
        "UPDATE llm_models SET missing_since = 'yesterday'",
        "UPDATE llm_models SET provider_id = 77",
        "UPDATE api_models SET llm_model_id = 2 WHERE model_key = 'qwen_instruct' AND task='chat'",
        "UPDATE templates SET live_version_id = 2 WHERE id = 1",
    ],
)
def test_what_the_sqlite_shell_can_write_is_found_as_well(
    make_database: MakeDatabase, statement: str
) -> None:
    database = make_database("sqlite", "filled")
    with plain(database) as connection:
        connection.execute(statement)

    with pytest.raises(StoreUnavailable), database.reading() as reading:
        load_snapshot(reading)


def test_a_version_whose_stored_hash_is_another_is_a_fault(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute(
            "INSERT INTO template_versions (template_id, version, system_prompt,"
            f" max_output_tokens, content_hash) VALUES (1, 2, 's', 9, '{'a' * 64}')"
        )
        connection.execute(
            "UPDATE templates SET live_version_id = (SELECT max(id) FROM template_versions)"
            " WHERE id = 1"
        )

    with pytest.raises(BadRows, match="content_hash is not"), filled.reading() as reading:
        load_snapshot(reading)


# --- seeding ----------------------------------------------------------------------------------


def test_seeding_happens_once(filled: Database) -> None:
    with filled.reading() as connection:
        before = load_snapshot(connection)

    assert not seed(filled, SEEDS, "qwen_instruct", frozenset())

    with filled.reading() as connection:
        assert load_snapshot(connection) == before


def test_replicas_that_seed_at_once_fill_the_database_once(database: Database) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        done = list(
            pool.map(lambda _: seed(database, SEEDS, "qwen_instruct", frozenset()), range(3))
        )

    assert sorted(done) == [False, False, True]
    with database.reading() as connection:
        assert len(load_snapshot(connection).templates) == len(SEEDS.templates)


@pytest.mark.parametrize(
    ("keys", "default"),
    [
        ((), "qwen_instruct"),
        (("OPENROUTER_API_KEY",), "gryphe/mythomax-l2-13b"),
        (("openrouter",), "gryphe/mythomax-l2-13b"),
        (("OTHER_KEY",), "qwen_instruct"),
    ],
)
def test_the_enhancement_default_follows_the_configured_keys(
    make_database: MakeDatabase, keys: tuple[str, ...], default: str
) -> None:
    database = make_database("sqlite")

    seed(database, SEEDS, "qwen_instruct", frozenset(keys))

    with database.reading() as connection:
        found = load_snapshot(connection).assignments
    assert [one.model_key for one in found if one.is_default and one.task == "enhancement"] == [
        default
    ]


def test_a_default_model_without_an_assignment_is_refused(make_database: MakeDatabase) -> None:
    database = make_database("sqlite")

    with pytest.raises(ConfigError, match="'gpt' has no enhancement assignment"):
        seed(database, SEEDS, "gpt", frozenset())

    with database.reading() as connection:
        assert load_snapshot(connection).templates == ()


# --- leases -----------------------------------------------------------------------------------


def test_a_lease_has_one_holder_until_it_ends(database: Database) -> None:
    later = NOW + timedelta(seconds=61)

    taken = [
        take(database, "refresh", "a", NOW, 60),
        take(database, "refresh", "b", NOW, 60),
        take(database, "refresh", "a", NOW + timedelta(seconds=1), 60),
        take(database, "refresh", "b", NOW + timedelta(seconds=60), 60),
        take(database, "refresh", "b", later, 60),
        take(database, "refresh", "a", later, 60),
        take(database, "other", "a", later, 60),
    ]

    assert taken == [True, False, True, False, True, False, True]


def test_a_lease_that_is_given_back_is_free(database: Database) -> None:
    take(database, "refresh", "a", NOW, 60)

    give_back(database, "refresh", "b")
    refused = take(database, "refresh", "b", NOW, 60)
    give_back(database, "refresh", "a")

    assert not refused
    assert take(database, "refresh", "b", NOW, 60)


# --- opening ----------------------------------------------------------------------------------


def test_an_sqlite_file_is_for_its_owner_and_waits_for_other_writers(
    make_database: MakeDatabase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("new") / "folder" / "gateway.sqlite3"
    database = open_database(f"sqlite:///{path}")
    database.make()

    with database.engine.connect() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        }
        modes = {one.stat().st_mode & 0o777 for one in path.parent.iterdir()}
    database.dispose()

    assert values == {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "busy_timeout": 5000,
        "synchronous": 1,
    }
    assert modes == {0o600}


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://u:word@h/d", "word@"])
def test_other_urls_are_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_database(url)

    assert "word" not in str(caught.value)


def test_a_server_that_is_not_there_is_store_unavailable_without_the_password() -> None:
    database = open_database("postgresql://someone:secretword@127.0.0.1:1/none")

    with pytest.raises(StoreUnavailable) as caught, database.reading():
        pass

    assert caught.value.retry_after_s
    assert "secretword" not in str(caught.value) + repr(database)


def test_a_file_that_is_no_database_is_store_unavailable(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("bad") / "gateway.sqlite3"
    path.write_bytes(b"not a database at all, but long enough to be read" * 100)
    database = open_database(f"sqlite:///{path}")

    with pytest.raises(StoreUnavailable), database.reading() as connection:
        read_revision(connection)


# --- canonical JSON ---------------------------------------------------------------------------


def test_canonical_json_spells_numbers_by_value_and_escapes_nothing_else() -> None:
    value = {"b": 1.0, "a": [0.1, -0.0, 1e22, True, None], "ä": '\n"\u2028🙂'}

    assert canonical_json(value) == (
        '{"a":[0.1,0,10000000000000000000000,true,null],"b":1,"ä":"\\n\\"\u2028🙂"}'.encode()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, "\ud800", object()])
def test_canonical_json_refuses_what_json_has_not(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": value})


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, float]) -> None:
    turned = dict(reversed(value.items()))

    assert canonical_json(value) == canonical_json(turned)

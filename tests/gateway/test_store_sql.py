"""Edits in plain SQL, through sqlite3 and psycopg: views, triggers and the statements that older
documents give."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Table, insert
from sqlalchemy.exc import IntegrityError

from gateway.store.database import Database, open_database
from gateway.store.editing import edit
from gateway.store.loading import load_snapshot, read_revision
from gateway.store.tables import CONFIGURATION, config_state, metadata, prompt_logs
from gateway.store.versions import diff_versions, stored_versions
from gateway.values.rows import Template
from tests.gateway.conftest import MakeDatabase
from tests.gateway.postgres import Server
from tests.gateway.store_rows import Plain, plain

SELECT = "SELECT * FROM prompt_templates WHERE is_active = true ORDER BY version DESC;"
UPDATE = (
    "UPDATE prompt_templates SET system_prompt = 'New system prompt', version = version + 1"
    " WHERE template_name = 'enhancement_sdxl_sfw';"
)
DEACTIVATE = "UPDATE prompt_templates SET is_active = false WHERE template_name = 'old_template';"
AVERAGES = {
    "postgresql": "SELECT template_name, AVG(execution_time_ms), AVG(fallback_level)"
    " FROM enhancement_logs WHERE created_at > NOW() - INTERVAL '24 hours'"
    " GROUP BY template_name;",
    "sqlite": "SELECT template_name, AVG(execution_time_ms), AVG(fallback_level)"
    " FROM enhancement_logs WHERE created_at > datetime('now', '-24 hours')"
    " GROUP BY template_name;",
}
# What a driver raises where a trigger or a constraint refuses.
REFUSED = (psycopg.errors.IntegrityError, sqlite3.IntegrityError)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A filled database for many tests, which change only rows of their own or nothing."""
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("shared") / "gateway.sqlite3"
        shutil.copy(request.getfixturevalue("filled_sqlite"), path)
        database = open_database(f"sqlite:///{path}")
        yield database
        database.dispose()
        return
    server: Server = request.getfixturevalue("postgres")
    name = server.create(request.getfixturevalue("filled_postgres"))
    database = open_database(server.url_of(name))
    yield database
    database.dispose()
    server.drop(name)


def _live(database: Database, name: str = "enhancement_sdxl_sfw") -> Template:
    with database.reading() as connection:
        snapshot = load_snapshot(connection)
    return next(one for one in snapshot.templates if one.template_name == name)


def _revision(database: Database) -> int:
    with database.reading() as connection:
        return read_revision(connection)


def test_the_select_of_older_documents_runs(filled: Database) -> None:
    with plain(filled) as connection:
        cursor = connection.execute(SELECT)
        names = [one[0] for one in cursor.description or ()]
        rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    assert {row["template_name"] for row in rows} == {
        "enhancement_sdxl_sfw",
        "old_template",
        "chat_sfw",
    }
    row = next(row for row in rows if row["template_name"] == "enhancement_sdxl_sfw")
    assert row["token_limit"] == 75
    assert row["max_output_tokens"] == 160
    assert row["model_type"] == "qwen_instruct"
    assert next(row for row in rows if row["template_name"] == "chat_sfw")["token_limit"] == 200


def test_the_update_of_older_documents_makes_the_next_version_live(filled: Database) -> None:
    before = _live(filled)
    revision = _revision(filled)

    with plain(filled) as connection:
        connection.execute(UPDATE)

    after = _live(filled)
    assert after.live.version == 2
    assert after.live.system_prompt == "New system prompt"
    assert after.live.params == before.live.params
    assert after.live.variables == ("mood",)
    assert after.live.content_hash != before.live.content_hash
    assert _revision(filled) > revision
    with filled.reading() as connection:
        versions = stored_versions(connection, after.id)
    assert [one.text.system_prompt for one in versions] == [
        "Describe the picture.",
        "New system prompt",
    ]


def test_the_same_update_again_changes_nothing_and_is_no_error(filled: Database) -> None:
    with plain(filled) as connection:
        for _ in range(3):
            connection.execute(UPDATE)

    assert _live(filled).live.version == 2


def test_setting_an_older_text_again_takes_that_version(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute(UPDATE)
        connection.execute(
            "UPDATE prompt_templates SET system_prompt = 'Describe the picture.',"
            " version = version + 1 WHERE template_name = 'enhancement_sdxl_sfw'"
        )

    assert _live(filled).live.version == 1


def test_a_text_without_a_version_makes_the_next_version_too(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute(
            "UPDATE prompt_templates SET user_template = 'Q: {{prompt}}'"
            " WHERE template_name = 'chat_sfw'"
        )

    live = _live(filled, "chat_sfw").live
    assert (live.version, live.user_template) == (2, "Q: {{prompt}}")


def test_token_limit_is_the_encoders_where_there_is_one(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute("UPDATE prompt_templates SET token_limit = 70 WHERE is_active = true")

    image, chat = _live(filled).live, _live(filled, "chat_sfw").live
    assert (image.target_token_limit, image.max_output_tokens) == (70, 160)
    assert (chat.target_token_limit, chat.max_output_tokens) == (None, 70)


def test_the_deactivation_of_older_documents_keeps_the_text(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute(DEACTIVATE)

    template = _live(filled, "old_template")
    assert not template.is_active
    assert template.live.version == 1


def test_the_view_goes_back_to_an_older_version(filled: Database) -> None:
    first = _live(filled).live.id

    with plain(filled) as connection:
        connection.execute(UPDATE)
        connection.execute(
            f"UPDATE prompt_templates SET live_version_id = {first}"
            " WHERE template_name = 'enhancement_sdxl_sfw'"
        )

    assert _live(filled).live.id == first


def test_an_insert_through_the_view_makes_a_template_with_its_first_version(
    filled: Database,
) -> None:
    with plain(filled) as connection:
        connection.execute(
            "INSERT INTO prompt_templates (template_name, model_type, target_model, job_type,"
            " use_case, content_mode, system_prompt, token_limit, version, is_active)"
            " VALUES ('enhancement_wan_sfw', 'qwen_instruct', 'wan', 'video', 'enhancement',"
            " 'sfw', 'Describe the motion.', 100, 1, true)"
        )

    template = _live(filled, "enhancement_wan_sfw")
    assert template.tuple4 == ("wan", "video", "enhancement", "sfw")
    assert template.live.max_output_tokens == 200
    assert template.live.target_token_limit == 100
    assert template.live.target_tokenizer == "umt5"
    assert template.live.user_template == "{{prompt}}"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("DELETE FROM prompt_templates WHERE template_name = 'old_template'", "is_active = false"),
        ("DELETE FROM templates WHERE template_name = 'old_template'", "is_active = false"),
        ("UPDATE template_versions SET system_prompt = 'x'", "never changes"),
        ("UPDATE template_versions SET content_hash = 'x'", "never changes"),
        ("DELETE FROM template_versions", "never deleted"),
        ("UPDATE prompt_templates SET version = 7 WHERE id = 1", "given by the store"),
        ("UPDATE prompt_templates SET id = 99 WHERE id = 1", "not set here"),
        ("UPDATE prompt_templates SET model_type = 'sdxl' WHERE id = 1", "api_models"),
        ("UPDATE prompt_templates SET live_version_id = 999 WHERE id = 1", "no version of this"),
        (
            "UPDATE prompt_templates SET live_version_id = 2, system_prompt = 'x' WHERE id = 1",
            "not both",
        ),
        ("UPDATE config_state SET revision = 0", "only rises"),
        ("DELETE FROM config_state", "keeps its row"),
        ("UPDATE audit_log SET actor = 'x'", "only grows"),
        ("DELETE FROM audit_log", "only grows"),
        (
            "INSERT INTO prompt_templates (template_name, target_model, job_type, use_case,"
            " content_mode, system_prompt) VALUES ('x', 'x', 'chat', 'x', 'sfw', 'x')",
            "token_limit",
        ),
        (
            "INSERT INTO templates (template_name, target_model, job_type, use_case,"
            " content_mode) VALUES ('x', 'sdxl', 'image', 'enhancement', 'sfw')",
            "active",  # PostgreSQL names the unique index, SQLite's trigger says it
        ),
    ],
)
def test_what_must_not_happen_is_refused_with_a_reason(
    shared: Database, statement: str, reason: str
) -> None:
    revision = _revision(shared)

    with plain(shared) as connection, pytest.raises(REFUSED, match=reason):
        connection.execute(statement)

    assert _revision(shared) == revision


def test_truncating_what_only_grows_is_refused(make_database: MakeDatabase) -> None:
    database = make_database("postgresql", "filled")

    with plain(database) as connection:
        for table in ("template_versions", "templates", "audit_log", "config_state"):
            with pytest.raises(psycopg.errors.IntegrityError):
                connection.execute(f"TRUNCATE {table} CASCADE")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR REPLACE INTO template_versions SELECT * FROM template_versions WHERE id = 1",
        "INSERT OR REPLACE INTO template_versions (template_id, version, system_prompt,"
        " max_output_tokens, content_hash) VALUES (1, 1, 'x', 1, 'x')",
        "INSERT OR REPLACE INTO templates SELECT * FROM templates WHERE id = 1",
        "INSERT OR REPLACE INTO templates (template_name, target_model, job_type, use_case,"
        " content_mode) VALUES ('x', 'sdxl', 'image', 'enhancement', 'sfw')",
        "UPDATE OR REPLACE templates SET content_mode = 'sfw' WHERE id = 2",
        "INSERT OR REPLACE INTO audit_log SELECT * FROM audit_log WHERE id = 1",
        "INSERT OR REPLACE INTO config_state (id, revision) VALUES (1, 0)",
    ],
)
def test_or_replace_takes_nothing_away_on_sqlite(
    make_database: MakeDatabase, statement: str
) -> None:
    database = make_database("sqlite", "filled")

    with plain(database) as connection, pytest.raises(REFUSED):
        connection.execute(statement)

    assert _live(database).live.system_prompt == "Describe the picture."


def test_the_sqlite3_shell_edits_what_the_gateway_then_loads(make_database: MakeDatabase) -> None:
    shell = shutil.which("sqlite3")
    if shell is None:
        pytest.skip("sqlite3 (the shell) is not installed")
    database = make_database("sqlite", "filled")

    subprocess.run([shell, str(database.engine.url.database), UPDATE], check=True)

    assert _live(database).live.system_prompt == "New system prompt"


def test_psql_edits_what_the_gateway_then_loads(make_database: MakeDatabase) -> None:
    shell = shutil.which("psql")
    if shell is None:
        pytest.skip("psql is not installed")
    database = make_database("postgresql", "filled")
    url = database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)

    subprocess.run([shell, "-q", "-v", "ON_ERROR_STOP=1", "-c", UPDATE, url], check=True)

    assert _live(database).live.system_prompt == "New system prompt"


def _stored_hash(connection: Plain) -> str:
    return next(
        str(row[0])
        for row in connection.execute(
            "SELECT content_hash FROM prompt_templates WHERE template_name = 'enhancement_sdxl_sfw'"
        )
    )


def test_the_next_edit_fills_in_the_hash_that_sql_left_open(filled: Database) -> None:
    with plain(filled) as connection:
        connection.execute(UPDATE)
        open_hash = _stored_hash(connection)

    with edit(filled, actor="anna"):
        pass

    with plain(filled) as connection:
        stored = _stored_hash(connection)
        actions = [row[0] for row in connection.execute("SELECT action FROM audit_log ORDER BY id")]
    assert open_hash == "pending:2"
    assert stored == _live(filled).live.content_hash
    assert actions[-1] == "settle"
    with filled.reading() as connection:
        assert diff_versions(connection, _live(filled).id, 1, 2).values.keys() == {"system_prompt"}


def test_averages_of_the_last_day_come_from_enhancement_logs(
    database: Database, engine_name: str
) -> None:
    now = datetime.now(UTC)
    rows = [
        ("a", 100.0, 0, timedelta(hours=1)),
        ("a", 300.0, 1, timedelta(hours=23, minutes=59)),
        ("a", 9999.0, 2, timedelta(hours=24, minutes=1)),
        ("b", 7.0, 2, timedelta(0)),
    ]
    with database.transaction() as connection:
        connection.execute(
            insert(prompt_logs),
            [
                {
                    "created_at": now - age,
                    "request_id": str(number),
                    "endpoint": "/enhance",
                    "template_name": name,
                    "execution_time_ms": ms,
                    "fallback_level": level,
                }
                for number, (name, ms, level, age) in enumerate(rows)
            ],
        )

    with plain(database) as connection:
        found = connection.execute(AVERAGES[engine_name]).fetchall()

    assert sorted((name, float(ms), float(level)) for name, ms, level in found) == [
        ("a", 200.0, 0.5),
        ("b", 7.0, 2.0),
    ]


# --- the revision -----------------------------------------------------------------------------

# For each table: an insert, a column that may be changed in place, and whether rows may go.
INSERTS: dict[str, tuple[str, str, str | None]] = {
    "templates": (
        "INSERT INTO templates (template_name, target_model, job_type, use_case, content_mode)"
        " VALUES ('t', 'x', 'chat', 'x', 'sfw')",
        "description = 'd' WHERE template_name = 't'",
        "template_name = 't'",
    ),
    "template_versions": (
        "INSERT INTO template_versions (template_id, version, system_prompt, max_output_tokens,"
        " content_hash) VALUES (1, 2, 's', 9, 'pending:2')",
        "content_hash = '" + "a" * 64 + "' WHERE version = 2",
        None,
    ),
    "template_labels": (
        "INSERT INTO template_labels (template_id, label, version_id) VALUES (1, 'l', 1)",
        "label = 'm'",
        "label = 'm'",
    ),
    "prompt_rules": (
        "INSERT INTO prompt_rules (name, rule_type, slot, body) VALUES ('n', 'append', 'user', '')",
        "body = 'b'",
        "name = 'n'",
    ),
    "prompt_rule_tags": (
        "INSERT INTO prompt_rule_tags (rule_id, tag) VALUES (1, 'n')",
        "tag = 'm' WHERE tag = 'n'",
        "tag = 'm'",
    ),
    "providers": (
        "INSERT INTO providers (name, kind) VALUES ('n', 'openai')",
        "is_active = false",
        "name = 'n'",
    ),
    "llm_models": (
        "INSERT INTO llm_models (provider_id, external_id, model_name, model_key)"
        " VALUES (1, 'n', 'n', 'n')",
        "display_order = 5",
        "model_key = 'n'",
    ),
    "api_models": (
        "INSERT INTO api_models (llm_model_id, display_name, model_key, modality, task)"
        " VALUES (1, 'n', 'qwen_instruct', 'chat', 'n')",
        "priority = 5",
        "task = 'n'",
    ),
    "model_parameters": (
        "INSERT INTO model_parameters (model_key, profile) VALUES ('n', '*')",
        "params = '{}'",
        "model_key = 'n'",
    ),
    "characters": (
        "INSERT INTO characters (id, name, content_rating) VALUES ('n', 'n', 'sfw')",
        "mood = 'n'",
        "id = 'n'",
    ),
    "character_loras": (
        "INSERT INTO character_loras (character_id, lora_ref, weight) VALUES ('demo-1', 'n', 1)",
        "weight = -1",
        "lora_ref = 'n'",
    ),
    "negative_prompts": (
        "INSERT INTO negative_prompts (target_model, content_mode, negative_prompt)"
        " VALUES ('n', 'sfw', 'n')",
        "priority = 3",
        "target_model = 'n'",
    ),
}


def test_every_table_but_those_of_people_and_logs_raises_the_revision() -> None:
    others = {
        "gateway_instances",
        "leases",
        "audit_log",
        "users",
        "api_keys",
        "workers",
        "conversations",
        "conversation_messages",
        "jobs",
        "workspace_assets",
        "prompt_logs",
        "prompt_log_bodies",
        "config_objects",
        "config_state",
    }

    assert {one.name for one in CONFIGURATION} == set(INSERTS)
    assert set(metadata.tables) >= set(INSERTS) | others


@pytest.mark.parametrize("table", CONFIGURATION, ids=lambda table: str(table.name))
def test_every_change_of_a_configuration_table_raises_the_revision(
    shared: Database, table: Table
) -> None:
    added, changed, gone = INSERTS[table.name]
    statements = [added, f"UPDATE {table.name} SET {changed}"]
    if gone is not None:
        statements.append(f"DELETE FROM {table.name} WHERE {gone}")

    with plain(shared) as connection:
        revisions = [_revision(shared)]
        for statement in statements:
            connection.execute(statement)
            revisions.append(_revision(shared))

    assert revisions == sorted(set(revisions))


def test_postgresql_notifies_of_every_change_with_the_revision(
    make_database: MakeDatabase,
) -> None:
    database = make_database("postgresql", "filled")
    revisions = []

    with plain(database) as listener, plain(database) as connection:
        assert isinstance(listener, psycopg.Connection)
        listener.execute("LISTEN gateway_config")
        for table in CONFIGURATION:
            connection.execute(INSERTS[table.name][0])
            revisions.append(_revision(database))
        heard = [
            int(one.payload) for one in listener.notifies(timeout=30, stop_after=len(revisions))
        ]

    assert heard == revisions


def test_truncating_a_configuration_table_raises_the_revision(
    make_database: MakeDatabase,
) -> None:
    database = make_database("postgresql", "filled")
    never_truncated = ("templates", "template_versions")
    before = _revision(database)

    for table in (one.name for one in CONFIGURATION if one.name not in never_truncated):
        with plain(database) as connection:
            connection.execute("BEGIN")
            connection.execute(f"TRUNCATE {table} CASCADE")
            (after,) = connection.execute("SELECT revision FROM config_state").fetchone() or (0,)
            connection.execute("ROLLBACK")

        assert after > before


def test_a_change_that_is_rolled_back_leaves_the_revision(filled: Database) -> None:
    revision = _revision(filled)

    with pytest.raises(ZeroDivisionError), filled.transaction() as connection:
        connection.exec_driver_sql("UPDATE templates SET description = 'x'")
        _ = 1 / 0

    assert _revision(filled) == revision


def test_an_edit_from_another_search_path_is_seen_as_well(make_database: MakeDatabase) -> None:
    database = make_database("postgresql", "filled")
    revision = _revision(database)

    with plain(database) as connection:
        connection.execute("SET search_path = pg_catalog")
        connection.execute(
            "UPDATE public.prompt_templates SET system_prompt = 'x'"
            " WHERE template_name = 'chat_sfw'"
        )

    assert _revision(database) > revision
    assert _live(database, "chat_sfw").live.system_prompt == "x"


def test_a_foreign_key_holds_on_connections_of_the_gateway(filled: Database) -> None:
    with pytest.raises(IntegrityError), filled.transaction() as connection:
        connection.exec_driver_sql("UPDATE templates SET live_version_id = 999")


def test_config_state_keeps_one_row(filled: Database) -> None:
    with pytest.raises(IntegrityError), filled.transaction() as connection:
        connection.execute(insert(config_state).values(id=2, revision=9))

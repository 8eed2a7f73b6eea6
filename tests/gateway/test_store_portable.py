"""Export and import: the same bytes and the same hash from either engine."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from gateway.errors import Invalid
from gateway.store.database import Database, open_database
from gateway.store.editing import edit
from gateway.store.importing import import_document
from gateway.store.loading import load_snapshot, read_revision
from gateway.store.portable import Document, export_document, from_bytes, to_bytes
from gateway.store.seed import seed
from gateway.store.tables import CONFIGURATION
from gateway.store.template_edits import new_version, set_label
from gateway.values.seeds import SeedNegative, SeedParameters, SeedRule, Seeds
from tests.gateway.conftest import MakeDatabase
from tests.gateway.store_rows import plain, template

EXAMPLES = int(os.environ.get("GATEWAY_STORE_EXAMPLES", "10"))


def _export(database: Database) -> bytes:
    with database.reading() as connection:
        return to_bytes(export_document(connection))


def _hash(database: Database) -> str:
    with database.reading() as connection:
        return load_snapshot(connection).content_hash


def _edited(database: Database) -> Database:
    """With a history: three versions, the second live, labels, one version made in SQL."""
    with edit(database, actor="anna") as editor:
        new_version(editor, 1, {"system_prompt": "Two."}, "second")
        new_version(editor, 1, {"system_prompt": "Three."}, publish=False)
        set_label(editor, 1, "next", 3)
    with plain(database) as connection:
        connection.execute(
            "UPDATE prompt_templates SET negative_prompt = 'from SQL', version = version + 1"
            " WHERE template_name = 'old_template'"
        )
        connection.execute(
            "UPDATE llm_models SET missing_since = '2026-02-03 04:05:06.000007'"
            " WHERE model_key = 'gryphe/mythomax-l2-13b'"
        )
    return database


@pytest.mark.parametrize("there", ["sqlite", "postgresql"])
def test_an_import_into_an_empty_database_gives_the_same_bytes_and_hash(
    filled: Database, make_database: MakeDatabase, there: str
) -> None:
    first = _export(_edited(filled))
    other = make_database(there)

    done = import_document(other, from_bytes(first), actor="anna")

    assert _export(other) == first
    assert _hash(other) == _hash(filled) == done.snapshot_hash
    assert done.is_exact
    assert done.only_here == ()


def test_an_export_has_no_ids_users_or_times_of_rows(filled: Database) -> None:
    document = json.loads(_export(filled))
    keys: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            keys.update(value)
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk({name: one for name, one in document.items() if name != "characters"})

    assert not keys & {"id", "provider_id", "llm_model_id", "live_version_id", "updated_at"}


def test_a_second_import_changes_nothing(filled: Database) -> None:
    document = from_bytes(_export(_edited(filled)))
    with filled.reading() as connection:
        revision = read_revision(connection)

    done = import_document(filled, document, actor="anna", dry_run=True)

    assert done.changes == ()
    assert done.text() == "nothing differs"
    with filled.reading() as connection:
        assert read_revision(connection) == revision


def _changed(document: Document) -> Document:
    """Another configuration: traded tuples, a new text, another order, another default."""
    changed = copy.deepcopy(document)
    by_name = {one["template_name"]: one for one in changed["templates"]}
    first, second = by_name["enhancement_sdxl_sfw"], by_name["old_template"]
    first["content_mode"], second["content_mode"] = "nsfw", "sfw"
    version = dict(first["versions"][0], version=9, system_prompt="Line.\nNew.", message="m")
    first["versions"].append(version)
    first["live_version"] = 9
    changed["rules"].reverse()
    changed["rules"].append(dict(changed["rules"][0], name="added", tags=["new"]))
    changed["negatives"].reverse()
    changed["parameters"][0]["params"] = {"temperature": 0.9}
    for one in changed["assignments"]:
        if one["task"] == "enhancement":
            one["is_default"] = not one["is_default"]
    changed["characters"][0]["loras"][0]["weight"] = -1
    return changed


def test_a_dry_run_tells_what_an_import_then_does(filled: Database) -> None:
    before = _export(filled)
    document = _changed(from_bytes(before))

    told = import_document(filled, document, actor="anna", dry_run=True)
    unchanged = _export(filled)
    done = import_document(filled, document, actor="anna")

    assert unchanged == before
    assert told.revision is None and done.revision is not None
    assert (told.changes, told.snapshot_hash) == (done.changes, done.snapshot_hash)
    assert _hash(filled) == done.snapshot_hash
    shown = told.text()
    assert "~ templates/enhancement_sdxl_sfw" in shown
    assert 'content_mode: "sfw" → "nsfw"' in shown
    assert "+ rules/added" in shown
    assert "↕ negatives/" in shown
    after = json.loads(_export(filled))
    assert [one["name"] for one in after["rules"]] == [one["name"] for one in document["rules"]]
    assert after["negatives"] == json.loads(to_bytes(document))["negatives"]
    live = next(one for one in after["templates"] if one["template_name"] == "enhancement_sdxl_sfw")
    assert live["live_version"] == 9
    again = import_document(filled, document, actor="anna", dry_run=True)
    assert again.changes == ()


def test_rows_that_the_document_lacks_stay_and_are_named(filled: Database) -> None:
    document = from_bytes(_export(filled))
    document["rules"] = document["rules"][1:]

    done = import_document(filled, document, actor="anna")

    assert done.only_here == ("rules/z_first",)
    assert not done.changes


def test_version_numbers_that_are_taken_move_on(
    make_database: MakeDatabase, filled: Database
) -> None:
    document = from_bytes(_export(_edited(filled)))
    other = make_database("sqlite", "filled")
    with edit(other, actor="b") as editor:
        new_version(editor, 1, {"system_prompt": "Mine."})

    import_document(other, document, actor="anna")

    with other.reading() as connection:
        after = export_document(connection)
    mine = next(one for one in after["templates"] if one["template_name"] == "enhancement_sdxl_sfw")
    texts = {one["version"]: one["system_prompt"] for one in mine["versions"]}
    assert texts == {1: "Describe the picture.", 2: "Mine.", 3: "Two.", 4: "Three."}
    assert texts[mine["live_version"]] == "Two."
    assert texts[mine["labels"]["next"]] == "Three."
    assert import_document(other, document, actor="anna").changes == ()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda d: d.update(format="x"), "format"),
        (lambda d: d.update(format_version=2), "format_version"),
        (lambda d: d.update(users=[]), "unknown parts: users"),
        (lambda d: d.update(rules={}), "list of objects"),
        (lambda d: d["rules"][0].pop("name"), "needs name"),
        (lambda d: d["rules"].append(d["rules"][0]), "twice"),
        (lambda d: d["rules"][0].update(colour="red"), "unknown keys|no columns"),
        (lambda d: d["rules"][0].update(priority="high"), "whole number"),
        (lambda d: d["templates"][0].update(live_version=99), "name versions"),
        (lambda d: d["templates"][0]["versions"][0].pop("params"), "lacks params"),
        (lambda d: d["templates"][0].update(labels={"x": 99}), "name versions"),
        (lambda d: d["templates"][0]["versions"][0].update(variables=3), "variables"),
        (lambda d: d["models"][0].update(provider="none"), "does not|refers|no provider"),
        (lambda d: d["models"][0].update(missing_since="soon"), "ISO"),
        (lambda d: d["characters"][0].update(loras=3), "loras"),
    ],
)
def test_a_document_that_is_wrong_is_refused_and_changes_nothing(
    make_database: MakeDatabase, break_it: Any, reason: str
) -> None:
    database = make_database("sqlite", "filled")
    before = _export(database)
    document = json.loads(before)
    break_it(document)

    with pytest.raises((Invalid, LookupError), match=reason):
        import_document(database, from_bytes(json.dumps(document).encode()), actor="a")

    assert _export(database) == before


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=0, max_size=40)
NAME = st.text("abcdefgh_äß", min_size=1, max_size=12)
JSON_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.sampled_from([1e22, 1e-7, 0.1, 1.0, -0.0])
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON_VALUE, max_size=4)
SEEDED = st.builds(
    Seeds,
    templates=st.lists(
        st.builds(
            template,
            NAME,
            content_mode=st.sampled_from(["sfw", "nsfw"]),
            is_active=st.just(False),
            system_prompt=TEXT,
            params=OBJECT,
            description=TEXT,
        ),
        max_size=4,
        unique_by=lambda one: one.template_name,
    ).map(tuple),
    rules=st.lists(
        st.builds(
            SeedRule,
            name=NAME,
            rule_type=st.sampled_from(["prepend", "append"]),
            slot=st.sampled_from(["system", "user", "negative"]),
            body=TEXT,
            priority=st.integers(-2, 2),
            tags=st.lists(NAME, max_size=3, unique=True).map(tuple),
        ),
        max_size=5,
        unique_by=lambda one: one.name,
    ).map(tuple),
    parameters=st.lists(
        st.builds(SeedParameters, model_key=NAME, params=OBJECT),
        max_size=3,
        unique_by=lambda one: one.model_key,
    ).map(tuple),
    negatives=st.lists(
        st.builds(
            SeedNegative,
            target_model=st.sampled_from(["sdxl", "wan"]),
            content_mode=st.just("sfw"),
            negative_prompt=TEXT,
            priority=st.integers(0, 1),
        ),
        max_size=5,
        unique_by=lambda one: (one.target_model, one.negative_prompt),
    ).map(tuple),
)


def _emptied(database: Database) -> None:
    """Back to no rows, for the next example: a new database each would take minutes."""
    with database.transaction() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        for table in reversed(CONFIGURATION):
            connection.execute(table.delete())


@pytest.fixture
def emptied_postgres(make_database: MakeDatabase) -> Database:
    return make_database("postgresql")


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seeds=SEEDED)
def test_any_configuration_goes_to_postgresql_and_back_unchanged(
    seeds: Seeds, emptied_postgres: Database, migrated_sqlite: Path, tmp_path: Path
) -> None:
    _emptied(emptied_postgres)
    files = []
    for name in ("first", "back"):
        path = tmp_path / f"{name}.sqlite3"
        for stale in tmp_path.glob(f"{name}.sqlite3*"):
            stale.unlink()
        shutil.copy(migrated_sqlite, path)
        files.append(open_database(f"sqlite:///{path}"))
    first, back = files
    seed(first, seeds, "none", frozenset())
    exported = _export(first)

    import_document(emptied_postgres, from_bytes(exported), actor="a")
    through = _export(emptied_postgres)
    import_document(back, from_bytes(through), actor="a")

    assert through == exported
    assert _export(back) == exported
    assert _hash(first) == _hash(emptied_postgres) == _hash(back)
    for database in files:
        database.dispose()

"""API keys and users as rows, on both engines."""

from __future__ import annotations

import hashlib
import re
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from gateway.access.caller import ALL_SCOPES, Scope
from gateway.access.keys import (
    FIRST_KEY_FILE,
    Key,
    create_key,
    find_key,
    hash_of,
    list_keys,
    make_first_key,
    note_use,
    prefix_of,
    revoke_key,
)
from gateway.access.users import (
    create_user,
    get_or_create_user,
    get_user,
    list_users,
    parse_user_id,
    set_user,
)
from gateway.errors import ConfigError, Conflict, Invalid, NotFound
from gateway.store.database import Database
from gateway.store.tables import api_keys

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
USER = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
CALL = frozenset({Scope.CALL})
ADMIN = frozenset({Scope.ADMIN})


def _make(database: Database, name: str, scopes: frozenset[Scope] = CALL, **more: object) -> Key:
    with database.transaction() as connection:
        return create_key(connection, name=name, scopes=scopes, now=NOW, **more)[0]  # type: ignore[arg-type]


def test_a_key_is_kept_as_its_hash_and_found_by_its_prefix(database: Database) -> None:
    with database.transaction() as connection:
        made, key = create_key(connection, name="app", scopes=CALL, now=NOW)

    with database.reading() as connection:
        row = connection.execute(select(api_keys)).one()
        found = find_key(connection, made.prefix)

    assert re.fullmatch(r"vgw_[0-9a-f]{10}_[A-Za-z0-9_-]{43}", key)
    assert key not in str(row)
    assert key.rpartition(made.prefix)[2].strip("_") not in str(row)
    assert row.key_hash == hashlib.sha256(key.encode()).hexdigest() == hash_of(key)
    assert found is not None
    assert found.opens_with(key)
    assert not found.opens_with(key[:-1] + ("A" if key[-1] != "A" else "B"))
    assert prefix_of(key) == made.prefix
    assert key not in repr(found)
    assert row.key_hash not in repr(found)


@pytest.mark.parametrize(
    "text", ["", "vgw_", "vgw_short_x", "VGW_0123456789_" + "a" * 43, "vgw_0123456789_" + "a" * 44]
)
def test_text_in_another_form_has_no_prefix(text: str) -> None:
    assert prefix_of(text) is None


def test_two_keys_never_have_one_name(database: Database) -> None:
    _make(database, "app")

    with pytest.raises(Conflict), database.transaction() as connection:
        create_key(connection, name="app", scopes=CALL, now=NOW)


def test_a_key_of_a_user_that_does_not_exist_is_refused(database: Database) -> None:
    with pytest.raises(Invalid), database.transaction() as connection:
        create_key(connection, name="app", scopes=CALL, now=NOW, user_id=USER)


def test_a_key_that_has_expired_already_is_refused(database: Database) -> None:
    with pytest.raises(Invalid), database.transaction() as connection:
        create_key(connection, name="app", scopes=CALL, now=NOW, expires_at=NOW)


def test_a_key_works_until_it_expires(database: Database) -> None:
    key = _make(database, "app", expires_at=NOW + timedelta(hours=1))

    assert key.is_active(NOW + timedelta(minutes=59))
    assert not key.is_active(NOW + timedelta(hours=1))


def test_a_revoked_key_stays_in_the_list_and_works_no_more(database: Database) -> None:
    key = _make(database, "app")

    with database.transaction() as connection:
        revoked = revoke_key(connection, key.id, NOW)
        again = revoke_key(connection, key.id, NOW + timedelta(days=1))
        listed = list_keys(connection, limit=10)

    assert not revoked.is_active(NOW)
    assert again.revoked_at == NOW
    assert [one.name for one in listed] == ["app"]


def test_the_last_admin_key_cannot_be_revoked(database: Database) -> None:
    first = _make(database, "first", ADMIN)
    _make(database, "expired", ADMIN, expires_at=NOW + timedelta(seconds=1))
    later = NOW + timedelta(minutes=1)

    with pytest.raises(Conflict), database.transaction() as connection:
        revoke_key(connection, first.id, later)
    _make(database, "second", ADMIN)
    with database.transaction() as connection:
        assert not revoke_key(connection, first.id, later).is_active(later)


def test_an_unknown_key_cannot_be_revoked(database: Database) -> None:
    with pytest.raises(NotFound), database.transaction() as connection:
        revoke_key(connection, 7, NOW)


def test_keys_are_listed_page_by_page(database: Database) -> None:
    for number in range(5):
        _make(database, f"key {number}")

    with database.reading() as connection:
        first = list_keys(connection, limit=2)
        rest = list_keys(connection, limit=10, after_id=first[-1].id)

    assert [one.name for one in (*first, *rest)] == [f"key {number}" for number in range(5)]


def test_last_use_is_written_once_a_minute_whoever_asks(database: Database) -> None:
    key = _make(database, "app")

    for second in (0, 1, 59):
        with database.transaction() as connection:
            note_use(connection, key, NOW + timedelta(seconds=second))
    with database.reading() as connection:
        early = find_key(connection, key.prefix)
    with database.transaction() as connection:
        note_use(connection, key, NOW + timedelta(seconds=60))
        late = find_key(connection, key.prefix)

    assert early is not None and early.last_used_at == NOW
    assert late is not None and late.last_used_at == NOW + timedelta(seconds=60)


def test_a_scope_of_a_newer_release_gives_nothing(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(
            insert(api_keys).values(
                name="new", prefix="0" * 10, key_hash="0" * 64, scopes=["call", "teleport"]
            )
        )
        key = find_key(connection, "0" * 10)

    assert key is not None
    assert key.scopes == CALL


# --- the first key ----------------------------------------------------------------------------


def test_the_first_start_makes_an_admin_key_that_only_its_owner_reads(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    path = make_first_key(database, tmp_path / "state", NOW)

    assert path == tmp_path / "state" / FIRST_KEY_FILE
    key = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in caplog.text
    assert str(path) in caplog.text
    assert [one.name for one in path.parent.iterdir()] == [FIRST_KEY_FILE]
    with database.reading() as connection:
        found = find_key(connection, prefix_of(key) or "")
    assert found is not None
    assert found.opens_with(key)
    assert found.scopes == ALL_SCOPES
    with database.reading() as connection:
        user = get_user(connection, found.user_id or "")
    assert user.is_admin and user.may_use_nsfw


def test_a_later_start_makes_no_key(database: Database, tmp_path: Path) -> None:
    make_first_key(database, tmp_path, NOW)
    before = (tmp_path / FIRST_KEY_FILE).read_text()

    assert make_first_key(database, tmp_path, NOW) is None
    assert (tmp_path / FIRST_KEY_FILE).read_text() == before


def test_no_key_is_made_that_nobody_can_read(database: Database, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ConfigError):
        make_first_key(database, tmp_path / "file", NOW)

    with database.reading() as connection:
        assert list_keys(connection, limit=1) == ()


def test_of_processes_that_start_together_one_makes_the_key(
    database: Database, tmp_path: Path
) -> None:
    made: list[Path | None] = []
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        made.append(make_first_key(database, tmp_path, NOW))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with database.reading() as connection:
        keys = list_keys(connection, limit=10)
    assert len(keys) == 1
    assert keys[0].opens_with((tmp_path / FIRST_KEY_FILE).read_text().strip())
    assert sum(path is not None for path in made) == 1


# --- users ------------------------------------------------------------------------------------


def test_someone_new_may_not_use_nsfw(database: Database) -> None:
    with database.transaction() as connection:
        user = get_or_create_user(connection, USER, NOW)

    assert (user.tier, user.content_mode, user.may_use_nsfw, user.is_admin) == (
        "*",
        None,
        False,
        False,
    )
    assert user.is_active


def test_the_second_token_finds_the_user_as_an_administrator_set_it(database: Database) -> None:
    with database.transaction() as connection:
        get_or_create_user(connection, USER, NOW)
        set_user(connection, USER, {"may_use_nsfw": True, "tier": "pro"}, NOW)
        user = get_or_create_user(connection, USER, NOW + timedelta(days=1))

    assert (user.tier, user.may_use_nsfw) == ("pro", True)


def test_two_first_tokens_at_once_make_one_user(database: Database) -> None:
    found: list[str] = []
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        with database.transaction() as connection:
            found.append(get_or_create_user(connection, USER, NOW).id)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [USER] * 4


def test_users_are_made_changed_and_listed(database: Database) -> None:
    with database.transaction() as connection:
        made = create_user(connection, user_id=None, now=NOW, values={"email": "a@example.com"})
        create_user(connection, user_id=USER, now=NOW, values={"content_mode": "nsfw"})
        changed = set_user(connection, made.id, {"is_active": False}, NOW + timedelta(hours=1))
        listed = list_users(connection, limit=10)
        rest = list_users(connection, limit=10, after_id=listed[0].id)

    assert not changed.is_active
    assert changed.updated_at == NOW + timedelta(hours=1)
    assert {one.id for one in listed} == {made.id, USER}
    assert [one.id for one in rest] == [listed[1].id]


def test_two_users_never_share_an_address(database: Database) -> None:
    with database.transaction() as connection:
        create_user(connection, user_id=None, now=NOW, values={"email": "a@example.com"})
        other = create_user(connection, user_id=None, now=NOW, values={})

    with pytest.raises(Conflict), database.transaction() as connection:
        create_user(connection, user_id=None, now=NOW, values={"email": "a@example.com"})
    with pytest.raises(Conflict), database.transaction() as connection:
        set_user(connection, other.id, {"email": "a@example.com"}, NOW)


@pytest.mark.parametrize("changes", [{"id": USER}, {"content_mode": "adult"}, {"password": "x"}])
def test_what_a_user_does_not_have_cannot_be_set(
    database: Database, changes: dict[str, object]
) -> None:
    with database.transaction() as connection:
        get_or_create_user(connection, USER, NOW)

    with pytest.raises(Invalid), database.transaction() as connection:
        set_user(connection, USER, changes, NOW)


def test_a_user_that_does_not_exist_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound), database.reading() as connection:
        get_user(connection, USER)
    with pytest.raises(NotFound), database.transaction() as connection:
        set_user(connection, USER, {"tier": "pro"}, NOW)


def test_one_user_has_one_spelling() -> None:
    assert parse_user_id(USER.upper()) == USER
    for other in (USER.replace("-", ""), f"{{{USER}}}", f"urn:uuid:{USER}", "", "x"):
        with pytest.raises(Invalid):
            parse_user_id(other)

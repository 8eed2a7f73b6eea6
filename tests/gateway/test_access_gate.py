"""From headers to callers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from sqlalchemy import Connection

from gateway.access.caller import Caller, Scope
from gateway.access.gate import ALARM_AT, ALARM_S, MAX_ADDRESSES, SERVICE_SCOPES, Gate, WrongKeys
from gateway.access.keys import Key, create_key, find_key, revoke_key
from gateway.access.memory import FRESH_S
from gateway.access.tokens import TokenVerifier
from gateway.access.users import create_user, set_user
from gateway.errors import StoreUnavailable, Unauthorized
from gateway.store.database import Database

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
USER = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
SECRET = "a-secret-of-forty-characters-for-tests-x"
SERVICE_KEY = "sb_secret_0123456789"
CALL = frozenset({Scope.CALL})


class Fragile(Database):
    """A database that can be taken away."""

    is_away = False

    def __init__(self, database: Database) -> None:
        super().__init__(database.engine)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        self._check()
        with super().reading() as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        self._check()
        with super().transaction() as connection:
            yield connection

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("taken away by the test")


class Bench:
    """A gate over a database, with time in hand."""

    def __init__(self, database: Database) -> None:
        self.database = Fragile(database)
        self.elapsed_s = 0.0
        self.gate = Gate(
            self.database,
            (SERVICE_KEY,),
            TokenVerifier(SECRET, None),
            lambda: NOW + timedelta(seconds=self.elapsed_s),
            lambda: self.elapsed_s,
        )

    def ask(
        self, authorization: str | None, apikey: str | None = None, **more: bool
    ) -> Caller | None:
        return self.gate.identify(
            authorization, apikey, takes_basic=more.get("takes_basic", False), address="192.0.2.1"
        )

    def make_key(self, scopes: frozenset[Scope] = CALL, **more: object) -> tuple[Key, str]:
        with self.database.transaction() as connection:
            return create_key(connection, name="app", scopes=scopes, now=NOW, **more)  # type: ignore[arg-type]


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def _token(**changes: object) -> str:
    claims = {
        "sub": USER,
        "role": "authenticated",
        "aud": "authenticated",
        "exp": NOW.timestamp() + 3600,
        **changes,
    }
    return jwt.encode(claims, SECRET, "HS256")


def test_a_request_without_credentials_has_no_caller(bench: Bench) -> None:
    assert bench.ask(None) is None


def test_a_key_is_a_caller_with_its_scopes(bench: Bench) -> None:
    _, key = bench.make_key(frozenset({Scope.CALL, Scope.EDITOR}))

    caller = bench.ask(f"Bearer {key}")

    assert caller is not None
    assert (caller.kind, caller.name, caller.user_id) == ("key", "app", None)
    assert caller.scopes == {Scope.CALL, Scope.EDITOR}
    assert caller.may_use_nsfw
    assert not caller.is_admin


def test_a_key_of_a_user_acts_within_what_the_user_may(bench: Bench) -> None:
    with bench.database.transaction() as connection:
        create_user(
            connection, user_id=USER, now=NOW, values={"tier": "pro", "content_mode": "sfw"}
        )
    _, key = bench.make_key(user_id=USER)

    caller = bench.ask(f"Bearer {key}")

    assert caller is not None
    assert (caller.user_id, caller.tier, caller.content_mode) == (USER, "pro", "sfw")
    assert not caller.may_use_nsfw


def test_the_service_key_is_the_service(bench: Bench) -> None:
    caller = bench.ask(f"Bearer {SERVICE_KEY}")

    assert caller is not None
    assert (caller.kind, caller.scopes) == ("service", SERVICE_SCOPES)
    assert caller.user_id is None


def test_a_token_of_the_service_role_is_the_service(bench: Bench) -> None:
    caller = bench.ask(f"Bearer {_token(role='service_role')}")

    assert caller is not None
    assert caller.kind == "service"


def test_a_token_makes_its_user_at_the_first_request(bench: Bench) -> None:
    caller = bench.ask(f"Bearer {_token()}")

    assert caller is not None
    assert (caller.kind, caller.user_id, caller.scopes) == ("user", USER, CALL)
    assert not caller.may_use_nsfw
    assert not caller.is_admin


def test_an_admin_user_has_the_admin_scope(bench: Bench) -> None:
    with bench.database.transaction() as connection:
        create_user(connection, user_id=USER, now=NOW, values={"is_admin": True})

    caller = bench.ask(f"Bearer {_token()}")

    assert caller is not None
    assert caller.is_admin
    assert Scope.ADMIN in caller.scopes


def test_the_public_key_of_a_project_may_do_nothing(bench: Bench) -> None:
    caller = bench.ask(f"Bearer {_token(role='anon')}")

    assert caller is not None
    assert (caller.user_id, caller.scopes) == (None, frozenset())


def test_authorization_counts_before_apikey(bench: Bench) -> None:
    caller = bench.ask(f"Bearer {_token()}", apikey=_token(role="anon"))

    assert caller is not None
    assert caller.user_id == USER


def test_apikey_alone_is_a_credential(bench: Bench) -> None:
    caller = bench.ask(None, apikey=SERVICE_KEY)

    assert caller is not None
    assert caller.kind == "service"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer a.b.c",
        "Bearer \xff\xfe",
        f"Bearer {SERVICE_KEY}x",
        f"Token {SERVICE_KEY}",
        SERVICE_KEY,
        "Bearer vgw_0123456789_" + "a" * 43,
        "Bearer vgw_zzz",
        "Basic eDp5",
        "Bearer " + "x" * 100_000,
    ],
    ids=lambda one: repr(one[:30]),
)
def test_wrong_credentials_are_refused(bench: Bench, header: str) -> None:
    with pytest.raises(Unauthorized):
        bench.ask(header)


def test_a_wrong_secret_behind_a_right_prefix_is_refused(bench: Bench) -> None:
    _, key = bench.make_key()
    bench.ask(f"Bearer {key}")

    with pytest.raises(Unauthorized):
        bench.ask(f"Bearer {key[:-4]}AAAA")


def test_pages_take_the_key_as_a_basic_password(bench: Bench) -> None:
    _, key = bench.make_key()
    pair = base64.b64encode(f"anyone:{key}".encode()).decode()

    caller = bench.ask(f"Basic {pair}", takes_basic=True)

    assert caller is not None
    assert caller.name == "app"
    with pytest.raises(Unauthorized):
        bench.ask(f"Basic {pair}")
    with pytest.raises(Unauthorized):
        bench.ask("Basic ???", takes_basic=True)


def test_an_expired_key_is_refused(bench: Bench) -> None:
    _, key = bench.make_key(expires_at=NOW + timedelta(seconds=60))
    bench.ask(f"Bearer {key}")
    bench.elapsed_s = 60

    with pytest.raises(Unauthorized):
        bench.ask(f"Bearer {key}")


def test_a_revoked_key_is_refused_at_once_here_and_soon_elsewhere(bench: Bench) -> None:
    made, key = bench.make_key()
    elsewhere = Bench(bench.database)
    bench.ask(f"Bearer {key}")
    elsewhere.ask(f"Bearer {key}")
    with bench.database.transaction() as connection:
        revoke_key(connection, made.id, NOW)
    bench.gate.forget_key(made.prefix)
    elsewhere.elapsed_s = FRESH_S

    with pytest.raises(Unauthorized):
        bench.ask(f"Bearer {key}")
    with pytest.raises(Unauthorized):
        elsewhere.ask(f"Bearer {key}")


def test_a_user_that_is_switched_off_is_refused(bench: Bench) -> None:
    bench.ask(f"Bearer {_token()}")
    with bench.database.transaction() as connection:
        set_user(connection, USER, {"is_active": False}, NOW)
    bench.gate.forget_user(USER)

    with pytest.raises(Unauthorized):
        bench.ask(f"Bearer {_token()}")


def test_callers_that_were_seen_are_known_while_the_database_is_away(bench: Bench) -> None:
    _, key = bench.make_key()
    seen = bench.ask(f"Bearer {key}"), bench.ask(f"Bearer {_token()}")
    bench.database.is_away = True
    bench.elapsed_s = 600.0

    assert bench.ask(f"Bearer {key}") == seen[0]
    assert bench.ask(f"Bearer {_token()}") == seen[1]


def test_the_service_is_known_without_any_database(bench: Bench) -> None:
    bench.database.is_away = True

    assert bench.ask(f"Bearer {SERVICE_KEY}") is not None


def test_a_warm_gate_knows_keys_that_were_not_used_yet(bench: Bench) -> None:
    _, key = bench.make_key()
    bench.gate.warm()
    bench.database.is_away = True
    bench.elapsed_s = 600.0

    assert bench.ask(f"Bearer {key}") is not None


def test_a_gate_that_starts_without_a_database_says_so_and_goes_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    _, key = bench.make_key()
    bench.database.is_away = True
    bench.gate.warm()

    assert "not known before" in caplog.text
    with pytest.raises(StoreUnavailable):
        bench.ask(f"Bearer {key}")


def test_use_of_a_key_is_noted_once_a_minute(bench: Bench) -> None:
    made, key = bench.make_key()

    noted = []
    for elapsed_s in (0.0, 30.0, 59.0, 61.0):
        bench.elapsed_s = elapsed_s
        bench.ask(f"Bearer {key}")
        with bench.database.reading() as connection:
            row = find_key(connection, made.prefix)
        assert row is not None and row.last_used_at is not None
        noted.append((row.last_used_at - NOW).total_seconds())

    assert noted == [0.0, 0.0, 0.0, 61.0]


def test_no_line_of_the_log_has_a_credential(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "gateway")
    _, key = bench.make_key()
    token = _token()
    bench.ask(f"Bearer {key}")
    bench.ask(f"Bearer {token}")

    for wrong in (f"{key}x", f"{token}x", "a.b.c"):
        with pytest.raises(Unauthorized) as refused:
            bench.ask(f"Bearer {wrong}")
        assert wrong not in str(refused.value)

    for secret in (key, token, SECRET, SERVICE_KEY):
        assert secret not in caplog.text


def test_many_wrong_keys_of_one_address_are_an_alarm_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = WrongKeys()

    for number in range(ALARM_AT * 2):
        wrong.count("192.0.2.1", number / 10)
    assert caplog.text.count("ALARM wrong_keys") == 1
    for number in range(ALARM_AT):
        wrong.count("192.0.2.1", ALARM_S * 2 + number / 10)

    assert caplog.text.count("ALARM wrong_keys") == 2


def test_addresses_that_are_counted_are_bounded() -> None:
    wrong = WrongKeys()

    for number in range(MAX_ADDRESSES + 100):
        wrong.count(str(number), 0.0)

    assert len(wrong) == MAX_ADDRESSES

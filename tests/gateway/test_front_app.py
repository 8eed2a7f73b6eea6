"""The frame of the HTTP front: sizes, JSON, errors, headers, CORS."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from werkzeug.exceptions import RequestEntityTooLarge

from gateway.access.caller import Scope
from gateway.errors import (
    TRAP_WORDS,
    Conflict,
    GatewayError,
    InvalidRequest,
    StoreUnavailable,
    TemplateNotFound,
    TooLarge,
    WorkerBusy,
    has_trap_word,
)
from gateway.front import revision
from gateway.front.access import needs
from gateway.front.app import FUNCTION_ROUTES
from gateway.front.limits import MAX_DEPTH, parse_object
from gateway.front.services import Services
from tests.gateway.conftest import MakeDatabase
from tests.gateway.front_parts import NOW, Bench, open_bench

SECRET_TEXT = "swordfish"


class Probe(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=5)
    count: int = Field(0, ge=0, le=9)
    word: str | None = None

    @field_validator("word")
    @classmethod
    def _not_bad(cls, word: str | None) -> str | None:
        if word == "bad":
            raise ValueError("word is none of ours")
        return word


class Raising:
    """What the probe route does; set by a test."""

    error: BaseException | None = None
    body: Probe | None = None


def probe_routes(raising: Raising) -> Callable[[Services], APIBlueprint]:
    def blueprint(services: Services) -> APIBlueprint:
        api = APIBlueprint("probe", __name__)

        @api.post("/probe", summary="For the tests")
        @needs(Scope.CALL)
        def probe(body: Probe) -> ResponseReturnValue:
            raising.body = body
            if raising.error is not None:
                raise raising.error
            revision.held(services.prompts)
            return {"success": True}

        @api.post("/silent", summary="Says nothing of whom it lets in")
        def silent() -> dict[str, Any]:
            return {"success": True}

        return api

    return blueprint


@pytest.fixture(scope="module")
def raising_of_all() -> Raising:
    return Raising()


@pytest.fixture(scope="module")
def bench_of_all(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, raising_of_all: Raising
) -> Iterator[Bench]:
    routes = (*FUNCTION_ROUTES, probe_routes(raising_of_all))
    with open_bench(tmp_path_factory.mktemp("front"), migrated_sqlite, routes) as made:
        yield made


@pytest.fixture
def raising(raising_of_all: Raising) -> Raising:
    raising_of_all.error = raising_of_all.body = None
    return raising_of_all


@pytest.fixture
def bench(bench_of_all: Bench, raising: Raising) -> Bench:
    """One app for all tests of this file; none changes its rows."""
    bench_of_all.prompts.level = 0
    return bench_of_all


def _post(bench: Bench, raw: bytes | str, content_type: str | None = "application/json") -> Any:
    return bench.ask("POST", "/probe", "call", data=raw, content_type=content_type)


# --- bodies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"null",
        b"[]",
        b'"{}"',
        b"7",
        b"\xff\xfe",
        b'{"name": NaN}',
        b'{"name": Infinity}',
        b'{"name": -Infinity}',
        b'{"count": 1e999}',
        b'{"count": ' + b"9" * 5000 + b"}",
        b'{"name": "\\u0000"}',
        b'{"\\u0000": 1}',
        b'{"name": "\\ud800"}',
        b"{" * 50_000,
        b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
        b'{"a":' + b"[" * 30_000,
    ],
    ids=lambda one: repr(one[:24]),
)
def test_a_body_that_is_no_plain_object_is_400(bench: Bench, raw: bytes) -> None:
    answer = _post(bench, raw)

    assert answer.status_code == 400
    assert answer.json["error_code"] == "invalid_request"


def test_a_body_of_the_deepest_nesting_is_read() -> None:
    deepest = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH

    assert parse_object(deepest)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_another_content_type_is_415(bench: Bench, content_type: str | None) -> None:
    answer = _post(bench, b'{"name": "a"}', content_type)

    assert answer.status_code == 415
    assert answer.json["error_code"] == "unsupported_media_type"


def test_a_content_type_with_a_charset_is_json(bench: Bench) -> None:
    assert _post(bench, b'{"name": "a"}', "application/json; charset=utf-8").status_code == 200


def test_no_body_is_an_empty_object(bench: Bench) -> None:
    answer = bench.ask("POST", "/probe", "call")

    assert answer.status_code == 400
    assert answer.json is not None
    assert answer.json["faults"] == [{"field": "name", "problem": "Field required"}]


def test_a_body_over_the_limit_is_413_before_it_is_read(bench: Bench) -> None:
    limit = bench.settings.section.body_bytes
    answer = _post(bench, b"x" * (limit + 1))

    assert answer.status_code == 413
    assert str(limit) in answer.json["error"]
    assert str(limit + 1) in answer.json["error"]


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413), (100_000, 413)])
def test_a_body_that_does_not_tell_its_length_is_not_cut_off_but_refused(
    bench: Bench, more: int, status: int
) -> None:
    """Cut at the limit, this one would be good JSON: its end is only spaces."""
    body = b'{"name": "a"}'.ljust(bench.settings.section.body_bytes + more)

    answer = bench.client.post(
        "/probe",
        input_stream=io.BytesIO(body),
        headers={
            "Authorization": f"Bearer {bench.secrets['call']}",
            "Transfer-Encoding": "chunked",
            "Content-Type": "application/json",
        },
        environ_overrides={"wsgi.input_terminated": True},
    )

    assert answer.status_code == status


def test_a_wrong_shape_is_400_and_a_wrong_range_422(bench: Bench) -> None:
    shape = _post(bench, b'{"name": 7}')
    missing = _post(bench, b"{}")
    unknown = _post(bench, b'{"name": "a", "extra": 1}')
    too_long = _post(bench, b'{"name": "abcdef"}')
    too_large = _post(bench, b'{"name": "a", "count": 10}')
    both = _post(bench, b'{"name": "abcdef", "count": "x"}')

    assert [one.status_code for one in (shape, missing, unknown, both)] == [400] * 4
    assert [one.status_code for one in (too_long, too_large)] == [422] * 2
    assert too_large.json["error_code"] == "invalid_value"


def test_faults_name_the_field_and_never_the_value(bench: Bench) -> None:
    answer = _post(bench, json.dumps({"name": SECRET_TEXT, "count": SECRET_TEXT}))

    assert {one["field"] for one in answer.json["faults"]} == {"name", "count"}
    assert SECRET_TEXT not in answer.text


def test_a_validator_of_ours_is_told_in_its_own_words(bench: Bench) -> None:
    answer = _post(bench, b'{"name": "a", "word": "bad"}')

    assert answer.status_code == 422
    assert answer.json["faults"] == [{"field": "word", "problem": "word is none of ours"}]


def test_a_body_with_very_many_faults_names_some(bench: Bench) -> None:
    answer = _post(bench, json.dumps({f"k{number}": 1 for number in range(5000)}))

    assert answer.status_code == 400
    assert len(answer.json["faults"]) == 20
    assert "more" in answer.json["error"]
    assert len(answer.text) < 4000


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_any_json_is_read_or_refused_and_never_fails(value: Any) -> None:
    raw = json.dumps(value).encode()

    try:
        found = parse_object(raw)
    except InvalidRequest:
        return

    assert isinstance(value, dict)
    json.dumps(found, allow_nan=False).encode()
    assert "\0" not in str(found)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_and_never_fail(raw: bytes) -> None:
    try:
        assert isinstance(parse_object(raw), dict)
    except InvalidRequest:
        pass


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(st.dictionaries(st.sampled_from(["name", "count", "word", "x"]), JSON_VALUES, max_size=4))
def test_any_object_is_answered_in_the_one_shape(bench: Bench, body: dict[str, Any]) -> None:
    answer = _post(bench, json.dumps(body))

    assert answer.status_code in (200, 400, 422)
    if answer.status_code != 200:
        assert {"success", "error", "error_code", "request_id"} <= set(answer.json)
        assert answer.json["success"] is False


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StoreUnavailable("away", retry_after_s=1.2), 503, "store_unavailable"),
        (WorkerBusy("busy", retry_after_s=0.1), 503, "worker_busy"),
        (Conflict("moved"), 409, "conflict"),
        (TooLarge("long"), 413, "too_large"),
        (GatewayError("odd"), 500, "internal_error"),
        (RequestEntityTooLarge(), 413, "too_large"),
        (KeyError("swordfish"), 500, "internal_error"),
        (RecursionError(), 500, "internal_error"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else "",
)
def test_every_error_has_the_one_shape(
    bench: Bench, raising: Raising, error: BaseException, status: int, code: str
) -> None:
    raising.error = error

    answer = _post(bench, b'{"name": "a"}')

    assert answer.status_code == status
    assert answer.json["success"] is False
    assert answer.json["error_code"] == code
    assert answer.json["request_id"] == answer.headers["X-Request-Id"]
    assert "Traceback" not in answer.text
    assert SECRET_TEXT not in answer.text
    assert not has_trap_word(answer.text)


def test_a_bug_is_in_the_log_with_its_traceback_and_not_in_the_answer(
    bench: Bench, raising: Raising, caplog: pytest.LogCaptureFixture
) -> None:
    raising.error = RuntimeError("the reason")

    answer = _post(bench, b'{"name": "a"}')

    assert "the reason" not in answer.text
    assert "Traceback" in caplog.text
    assert "the reason" in caplog.text


def test_a_validation_error_of_our_own_values_is_a_bug(bench: Bench, raising: Raising) -> None:
    try:
        Probe.model_validate({"name": SECRET_TEXT})
    except ValidationError as exc:
        raising.error = exc

    answer = _post(bench, b'{"name": "a"}')

    assert answer.status_code == 500
    assert SECRET_TEXT not in answer.text


def test_retry_after_is_whole_seconds_in_the_header_and_exact_in_the_body(
    bench: Bench, raising: Raising
) -> None:
    raising.error = StoreUnavailable("away", retry_after_s=1.25)

    answer = _post(bench, b'{"name": "a"}')

    assert answer.headers["Retry-After"] == "2"
    assert answer.json["retry_after_s"] == 1.25


def test_fields_of_an_error_are_told_and_replace_nothing(bench: Bench, raising: Raising) -> None:
    raising.error = TemplateNotFound(
        "none", fields={"nearest": [{"template_name": "a"}], "success": True, "error": "x"}
    )

    answer = _post(bench, b'{"name": "a"}')

    assert answer.json["nearest"] == [{"template_name": "a"}]
    assert (answer.json["success"], answer.json["error"]) == (False, "none")


@pytest.mark.parametrize("word", TRAP_WORDS)
def test_words_that_a_client_misreads_are_in_no_error(
    bench: Bench, raising: Raising, word: str
) -> None:
    for error in (
        Conflict(f"a row named X{word.upper()}X"),
        Conflict("moved", fields={"nearest": [f"x{word}x"]}),
        Conflict("moved", fields={f"x{word}": 1}),
    ):
        raising.error = error
        answer = _post(bench, b'{"name": "a"}')

        assert answer.status_code == 409
        assert not has_trap_word(answer.text)
    unknown = _post(bench, json.dumps({"name": "a", f"x{word}x": 1}))
    assert not has_trap_word(unknown.text)


def test_405_says_what_is_taken(bench: Bench) -> None:
    answer = bench.ask("GET", "/probe", "call")

    assert answer.status_code == 405
    assert "POST" in answer.headers["Allow"]
    assert answer.json is not None
    assert answer.json["error_code"] == "method_not_allowed"


def test_a_route_that_says_nothing_is_closed(bench: Bench) -> None:
    for who in ("call", "admin", "service"):
        assert bench.ask("POST", "/silent", who).status_code == 403


# --- headers ----------------------------------------------------------------------------------


def test_a_clients_request_id_is_used_where_it_can_be(bench: Bench) -> None:
    good = bench.ask("GET", "/health", None, headers={"X-Request-Id": "abc-1.2_3"})

    assert good.headers["X-Request-Id"] == "abc-1.2_3"


@pytest.mark.parametrize("bad", ["", "a b", "x" * 65, "é", "a\tb", "nan", "xINFx", "a;b", "<b>"])
def test_a_request_id_that_cannot_stand_in_a_log_line_is_replaced(bench: Bench, bad: str) -> None:
    answer = bench.ask("GET", "/health", None, headers={"X-Request-Id": bad})

    assert answer.headers["X-Request-Id"] != bad
    assert len(answer.headers["X-Request-Id"]) == 32


def test_answers_that_used_prompts_say_which(bench: Bench) -> None:
    revision_now = bench.prompts.held().snapshot.revision
    bench.prompts.level = 1

    answer = _post(bench, b'{"name": "a"}')

    assert answer.headers["X-GW-Revision"] == str(revision_now)
    assert answer.headers["X-GW-Fallback-Level"] == "1"
    assert "X-GW-Revision" not in bench.ask("GET", "/api/me").headers


@pytest.mark.parametrize(("given_revision", "status"), [("1", 200), ("999999", 503)])
def test_a_least_revision_is_asked_of_the_cache(
    bench: Bench, given_revision: str, status: int
) -> None:
    answer = bench.ask(
        "POST", "/probe", "call", {"name": "a"}, headers={"X-GW-Min-Revision": given_revision}
    )

    assert answer.status_code == status


@pytest.mark.parametrize("bad", ["", "x", "-1", "1.5", "1" * 19, "٣"])
def test_a_least_revision_that_is_none_is_400(bench: Bench, bad: str) -> None:
    answer = bench.client.post(
        "/probe",
        json={"name": "a"},
        headers={"Authorization": f"Bearer {bench.secrets['call']}"},
        environ_overrides={"HTTP_X_GW_MIN_REVISION": bad.encode().decode("latin-1")},
    )

    assert answer.status_code == 400


def test_every_answer_has_the_security_headers(bench: Bench) -> None:
    for path in ("/health", "/", "/api/rules", "/no-such-route"):
        headers = bench.ask("GET", path).headers

        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/probe", "/functions/v1/probe"])
def test_browsers_of_any_origin_may_call_function_routes(bench: Bench, path: str) -> None:
    preflight = bench.client.options(
        path,
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, x-client-info, apikey, content-type",
        },
    )
    refused = bench.ask("POST", path, None, {"name": "a"})
    done = bench.ask("POST", path, "call", {"name": "a"})

    assert preflight.status_code == 200
    allowed = preflight.headers["Access-Control-Allow-Headers"]
    for name in ("authorization", "x-client-info", "apikey", "content-type"):
        assert name in allowed
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert refused.status_code == 401
    assert done.status_code == 200
    for answer in (preflight, refused, done):
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers


def test_pages_of_other_origins_may_not_read_the_administration(bench: Bench) -> None:
    for method, path in (("OPTIONS", "/api/keys"), ("GET", "/api/keys"), ("GET", "/health")):
        answer = bench.ask(method, path, headers={"Origin": "https://evil.example"})

        assert not [name for name in answer.headers.keys() if name.startswith("Access-Control")]


def test_function_routes_are_there_with_the_prefix_and_without(bench: Bench) -> None:
    rules = {rule.rule for rule in bench.app.url_map.iter_rules()}

    for rule in ("/probe", "/refresh-prompt-cache"):
        assert {rule, f"/functions/v1{rule}"} <= rules
    assert "/functions/v1/health" not in rules


def test_two_apps_do_not_share_their_counters(
    make_database: MakeDatabase, tmp_path: Path, bench: Bench
) -> None:
    other = Bench(make_database("sqlite"), tmp_path)
    bench.ask("GET", "/api/me")

    assert 'route="/api/me"' in bench.ask("GET", "/metrics").text
    assert 'route="/api/me"' not in other.ask("GET", "/metrics").text


def test_made_up_methods_and_routes_make_no_new_counters(bench: Bench) -> None:
    for number in range(20):
        bench.ask(f"MADE{number}", "/health")
        bench.ask("GET", f"/made-up/{number}")

    told = bench.ask("GET", "/metrics").text

    assert "MADE" not in told
    assert "made-up" not in told
    assert 'method="other"' in told


def test_a_field_that_is_no_json_does_not_make_the_error_another_one(
    bench: Bench, raising: Raising
) -> None:
    raising.error = Conflict("moved", fields={"at": NOW, "parts": {1, 2}})

    answer = _post(bench, b'{"name": "a"}')

    assert answer.status_code == 409
    assert answer.json["at"].startswith("2026-11-26")

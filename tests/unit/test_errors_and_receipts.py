"""What a client can rely on: error codes and texts, keys, places in the queue, and proofs."""

from __future__ import annotations

import ast
import hashlib
import json
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, abort, g
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.exceptions import default_exceptions

from worker import errors
from worker.config import KEY_NAMES, REPOSITORY, read_keys
from worker.errors import (
    Busy,
    ConfigError,
    ContextTooLong,
    Draining,
    EngineLost,
    EngineUnavailable,
    InvalidRequest,
    ModelUnavailable,
    NotFound,
    Relayed,
    TooLarge,
    Unauthorized,
    WorkerError,
    has_trap_word,
)
from worker.front import admission as admission_module
from worker.front import drain as drain_module
from worker.front import errors as front_errors
from worker.front.admission import Admission
from worker.front.auth import LEVELS, Gate, Level
from worker.front.drain import Drainer
from worker.protocol.link import failed
from worker.protocol.messages import Failed
from worker.receipt import canonical_json, ids_sha256, messages_sha256, text_sha256

ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, WorkerError) and kind is not Relayed
]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ERRORS)
def test_an_errors_code_is_a_word_that_no_client_misreads(kind: type[WorkerError]) -> None:
    assert kind.code.replace("_", "").isalpha()
    assert kind.code == kind.code.lower()
    assert not has_trap_word(kind.code)


@pytest.mark.parametrize("kind", ERRORS)
def test_an_errors_status_is_one_of_an_error(kind: type[WorkerError]) -> None:
    assert 400 <= kind.status < 600


def test_every_code_has_one_meaning() -> None:
    codes = [kind.code for kind in ERRORS if kind is not WorkerError]

    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_that_a_client_can_get_is_documented(kind: type[WorkerError]) -> None:
    documented = (REPOSITORY / "docs" / "http-api.md").read_text("utf-8")

    if kind not in (ConfigError, errors.Cancelled):  # the process does not start; nobody reads it
        assert f"`{kind.code}`" in documented


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("inf", True),
        ("more INFormation", True),
        ("maintenaNce", True),
        ("Content Policy", True),
        ("inappropriate", True),
        ("the probability tensor", True),
        ("in f", False),
        ("probability of a tensor", False),
        ("", False),
    ],
)
def test_a_trap_word_is_found_anywhere_in_any_casing(text: str, found: bool) -> None:
    assert has_trap_word(text) == found


def _messages(tree: ast.Module) -> list[tuple[int, str]]:
    """Literal texts that are handed to a WorkerError, and where."""
    names = {kind.__name__ for kind in ERRORS} - {"ConfigError"}  # that one ends the process
    return [
        (part.lineno, part.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in names
        for argument in call.args
        for part in ast.walk(argument)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def test_no_text_of_an_error_has_a_word_that_a_client_misreads() -> None:
    sources = sorted((REPOSITORY / "worker").rglob("*.py"))
    texts = {
        f"{path.relative_to(REPOSITORY)}:{line}": text
        for path in sources
        for line, text in _messages(ast.parse(path.read_text("utf-8")))
    }

    assert len(texts) > 50
    assert {where: text for where, text in texts.items() if has_trap_word(text)} == {}


def test_an_overlong_prompt_is_told_with_both_counts() -> None:
    error = ContextTooLong(prompt_tokens=40_000, context_tokens=32_768)

    assert (error.status, error.code) == (413, "context_overflow")
    assert "40000" in str(error)
    assert "32768" in str(error)
    assert isinstance(error, TooLarge)


def test_a_lost_engine_is_an_engine_that_is_not_available() -> None:
    assert issubclass(EngineLost, EngineUnavailable)
    assert EngineLost.code != EngineUnavailable.code


@pytest.mark.parametrize("retry_after_s", [None, 3.0])
def test_an_error_that_crossed_a_process_border_is_the_same_error(
    retry_after_s: float | None,
) -> None:
    event = failed("r", ModelUnavailable("files are missing", retry_after_s=retry_after_s))

    error = front_errors.relayed(event)

    assert isinstance(event, Failed)
    assert (error.status, error.code) == (503, "model_unavailable")
    assert (str(error), error.retry_after_s) == ("files are missing", retry_after_s)


# --- errors as HTTP answers --------------------------------------------------------------------


def client(fail: Callable[[], Any]) -> FlaskClient:
    """An app whose one route fails like this."""
    app = Flask("test")
    front_errors.register(app)

    @app.before_request
    def begin() -> None:
        g.request_id = "r-1"

    @app.get("/")
    def route() -> Any:
        return fail()

    return app.test_client()


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def test_an_error_is_answered_in_the_one_shape_that_clients_know() -> None:
    answer = client(raising(NotFound("there is no job with this id"))).get("/")

    assert answer.status_code == 404
    assert answer.get_json() == {
        "success": False,
        "error": "there is no job with this id",
        "error_code": "not_found",
        "request_id": "r-1",
    }


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (1.2, "2"), (60.0, "60")])
def test_retry_after_is_whole_seconds_and_never_too_soon(seconds: float, header: str) -> None:
    answer = client(raising(Busy("full", retry_after_s=seconds))).get("/")

    assert (answer.status_code, answer.headers["Retry-After"]) == (429, header)


def test_an_error_that_would_come_again_has_no_retry_after() -> None:
    answer = client(raising(InvalidRequest("no"))).get("/")

    assert "Retry-After" not in answer.headers


def test_a_missing_key_says_which_kind_of_key() -> None:
    answer = client(raising(Unauthorized("no key"))).get("/")

    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("status", sorted(default_exceptions))
def test_what_flask_itself_refuses_has_the_same_shape(status: int) -> None:
    answer = client(lambda: abort(status)).get("/")

    said = answer.get_json()
    assert answer.status_code == status
    assert (said["success"], said["request_id"]) == (False, "r-1")
    assert said["error"]
    assert said["error_code"]
    assert not has_trap_word(answer.get_data(as_text=True))


def test_a_route_that_is_not_there_has_the_same_shape() -> None:
    answer = client(raising(NotFound("unused"))).get("/elsewhere")

    assert (answer.status_code, answer.get_json()["error_code"]) == (404, "not_found")


def test_a_wrong_method_says_which_are_right() -> None:
    answer = client(raising(NotFound("unused"))).post("/")

    assert answer.status_code == 405
    assert answer.get_json()["error_code"] == "method_not_allowed"
    assert "GET" in answer.headers["Allow"]


def test_a_bug_is_a_bare_500() -> None:
    answer = client(raising(KeyError("secret of a user"))).get("/")

    assert answer.status_code == 500
    assert answer.get_json()["error_code"] == "internal_error"
    assert "secret" not in answer.get_data(as_text=True)
    assert "Traceback" not in answer.get_data(as_text=True)


@pytest.mark.parametrize("text", ["/data/finance/model is missing", "logits are NaN"])
def test_a_text_with_a_word_that_a_client_misreads_stays_in_the_log(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client(raising(ModelUnavailable(text))).get("/")

    assert answer.get_json()["error"] == (
        "the request failed; the worker's log has the reason under this id"
    )
    assert answer.get_json()["error_code"] == "model_unavailable"
    assert text in caplog.text


# --- keys --------------------------------------------------------------------------------------

RIGHT, WRONG = "Bearer key-one", "Bearer key-three"


@pytest.mark.parametrize(
    ("keys", "keyless", "level", "header", "passes"),
    [
        # Without keys everything is open.
        ((), False, Level.ADMIN, None, True),
        ((), False, Level.INFERENCE, WRONG, True),
        # Open routes are open to anybody.
        (("key-one",), False, Level.OPEN, None, True),
        (("key-one",), False, Level.OPEN, WRONG, True),
        # With keys, a key is needed.
        (("key-one",), False, Level.INFERENCE, None, False),
        (("key-one",), False, Level.ADMIN, None, False),
        (("key-one",), False, Level.INFERENCE, RIGHT, True),
        (("key-one",), False, Level.ADMIN, RIGHT, True),
        (("key-one",), False, Level.INFERENCE, WRONG, False),
        (("key-one",), False, Level.ADMIN, WRONG, False),
        # Keyless inference opens inference alone, and to no wrong key.
        (("key-one",), True, Level.INFERENCE, None, True),
        (("key-one",), True, Level.INFERENCE, RIGHT, True),
        (("key-one",), True, Level.INFERENCE, WRONG, False),
        (("key-one",), True, Level.ADMIN, None, False),
        # Every configured key is good.
        (("key-two", "key-one"), False, Level.ADMIN, RIGHT, True),
        (("key-one", "key-two"), False, Level.ADMIN, "Bearer key-two", True),
    ],
)
def test_a_caller_passes_by_level_and_key(
    keys: tuple[str, ...], keyless: bool, level: Level, header: str | None, passes: bool
) -> None:
    gate = Gate(keys, keyless)

    if passes:
        gate.check(level, header)
    else:
        with pytest.raises(Unauthorized):
            gate.check(level, header)


@pytest.mark.parametrize("header", ["bearer key-one", "BEARER key-one", "Bearer  key-one "])
def test_a_scheme_is_read_in_any_casing(header: str) -> None:
    Gate(("key-one",), False).check(Level.ADMIN, header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "key-one",
        "Basic key-one",
        "Bearer KEY-ONE",
        "Bearer key-on",
        "Bearer key-onee",
        "Bearer key-one key-one",
        "Bearer \udcff",
        "Bearer clé",
    ],
    ids=ascii,
)
def test_a_header_that_is_not_exactly_the_key_is_refused(header: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        Gate(("key-one",), False).check(Level.ADMIN, header)

    assert "key-one" not in str(caught.value)


def test_a_key_that_was_set_with_space_around_it_can_be_used() -> None:
    # As a file's content is, or what a web form was given.
    gate = Gate(read_keys({KEY_NAMES[0]: " key-one\n"}), False)

    gate.check(Level.ADMIN, "Bearer key-one")


def test_only_health_is_open() -> None:
    open_areas = {area for area, level in LEVELS.items() if level is Level.OPEN}

    assert open_areas == {"health"}


# --- places ------------------------------------------------------------------------------------


class FakeTime:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(admission_module, "time", fake)
    monkeypatch.setattr(drain_module, "time", fake)
    return fake


def refused(places: Admission) -> Busy:
    with pytest.raises(Busy) as caught:
        places.enter()
    return caught.value


def test_places_are_given_until_there_are_none() -> None:
    places = Admission(2)
    slots = [places.enter(), places.enter()]

    error = refused(places)

    assert str(error) == "2 requests are running or waiting, at most 2 may"
    assert places.taken == 2
    slots[0].leave(served=True)
    assert places.enter()


def test_a_place_is_freed_once() -> None:
    places = Admission(2)
    slot = places.enter()
    places.enter()

    slot.leave(served=True)
    slot.leave(served=True)
    slot.leave(served=False)

    assert places.taken == 1


def test_before_any_answer_a_guess_says_when_to_come_again(clock: FakeTime) -> None:
    places = Admission(1)
    places.enter()

    assert refused(places).retry_after_s == 2.0


def test_the_time_between_answers_says_when_to_come_again(clock: FakeTime) -> None:
    places = Admission(1)
    for _ in range(40):
        slot = places.enter()
        clock.now += 8.0
        slot.leave(served=True)
        clock.now += 500.0  # nobody came; that says nothing about how long a request takes
    places.enter()

    assert refused(places).retry_after_s == pytest.approx(8.0, abs=0.1)


def test_of_requests_that_wait_for_each_other_each_counts_its_own_part(clock: FakeTime) -> None:
    places = Admission(40)
    slots = [places.enter() for _ in range(40)]
    for slot in slots:
        clock.now += 3.0
        slot.leave(served=True)
    for _ in range(40):
        places.enter()

    assert refused(places).retry_after_s == pytest.approx(3.0, abs=0.1)


def test_a_request_that_was_not_served_teaches_nothing(clock: FakeTime) -> None:
    places = Admission(1)
    slot = places.enter()
    clock.now += 100.0
    slot.leave(served=False)
    places.enter()

    assert refused(places).retry_after_s == 2.0


def test_many_threads_take_no_more_places_than_there_are() -> None:
    places = Admission(5)
    taken: list[bool] = []

    def take() -> None:
        try:
            places.enter()
        except Busy:
            taken.append(False)
        else:
            taken.append(True)

    threads = [threading.Thread(target=take) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert taken.count(True) == 5


# --- draining ----------------------------------------------------------------------------------


def test_a_front_takes_work_until_it_drains(clock: FakeTime) -> None:
    drainer = Drainer()
    drainer.refuse_new_work()

    drainer.begin(60.0)

    assert drainer.draining
    with pytest.raises(Draining):
        drainer.refuse_new_work()


def test_a_draining_front_says_when_another_may_answer(clock: FakeTime) -> None:
    drainer = Drainer()
    drainer.begin(60.0)
    clock.now += 25.0
    drainer.begin(60.0)  # the first one counts

    with pytest.raises(Draining) as caught:
        drainer.refuse_new_work()

    assert caught.value.retry_after_s == 35.0
    clock.now += 100.0
    assert drainer.retry_after_s == 1.0


# --- receipts ----------------------------------------------------------------------------------


def test_messages_are_hashed_as_the_json_that_the_documentation_describes() -> None:
    messages = [("system", "Sei knapp."), ("user", 'ein "roter" Würfel 👍\n')]

    digest = messages_sha256(messages)

    text = (
        '[{"content":"Sei knapp.","role":"system"},'
        '{"content":"ein \\"roter\\" Würfel 👍\\n","role":"user"}]'
    )
    assert digest == hashlib.sha256(text.encode("utf-8")).hexdigest()


def test_the_order_of_messages_is_part_of_their_hash() -> None:
    one, two = ("user", "a"), ("assistant", "b")

    assert messages_sha256([one, two]) != messages_sha256([two, one])


def test_messages_may_be_hashed_from_an_iterator() -> None:
    messages = [("user", "a")]

    assert messages_sha256(iter(messages)) == messages_sha256(messages)


def test_a_text_is_hashed_as_utf_8() -> None:
    assert text_sha256("Würfel") == hashlib.sha256(b"W\xc3\xbcrfel").hexdigest()
    # SHA-256 of nothing, FIPS 180-2.
    assert text_sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_ids_are_hashed_as_little_endian_32_bit_numbers(ids: list[int]) -> None:
    data = b"".join(one.to_bytes(4, "little") for one in ids)

    assert ids_sha256(ids) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("ids", [[-1], [2**32]])
def test_what_is_no_id_is_not_hashed(ids: list[int]) -> None:
    with pytest.raises(struct.error):
        ids_sha256(ids)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON)
def test_canonical_json_is_json_that_says_the_same(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@settings(max_examples=200, deadline=None)
@given(value=st.dictionaries(st.text(max_size=3), st.integers(), min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))

    assert canonical_json(turned) == canonical_json(value)


def test_canonical_json_is_utf_8_without_spaces_or_escapes_of_letters() -> None:
    value = {"b": [1, 2.5, None], "a": "Würfel 👍 \u2028", "c": {"y": True, "x": "\n"}}

    assert canonical_json(value).decode("utf-8") == (
        '{"a":"Würfel 👍 \u2028","b":[1,2.5,null],"c":{"x":"\\n","y":true}}'
    )

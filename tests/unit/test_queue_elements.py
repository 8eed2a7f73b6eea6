"""What lies in a list of jobs, in every shape that producers have stored it in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import has_trap_word
from worker.queues.elements import (
    MAX_ELEMENT_BYTES,
    MAX_LAYERS,
    MalformedElement,
    decode_element,
    job_id_of,
)

JOB = {"id": "7f9c", "type": "sdxl_image_high", "prompt": 'a "red" cat \\ Ünï 🐈', "user_id": "u"}
OTHER = {"job_id": "81d0", "job_type": "video_fast", "prompt": "", "config": {"seed": 0}}


def text(value: Any) -> str:
    return json.dumps(value)


ENCODINGS = {
    "an object": text(JOB),
    "a data object with a text": text({"data": text(JOB)}),
    "an array with a text": text([text(JOB)]),
    "a text": text(text(JOB)),
    "a data object with an object": text({"data": JOB}),
    "an array with an object": text([JOB]),
    "a text of an array with a text": text(text([text(JOB)])),
    "a data object with an array": text({"data": [text(JOB)]}),
    "an array with a data object": text([{"data": text(JOB)}]),
    "data in data": text({"data": {"data": text({"data": JOB})}}),
    "an object with spaces and not ASCII": f"\n {json.dumps(JOB, ensure_ascii=False, indent=2)} \n",
}


@pytest.mark.parametrize("stored", ENCODINGS.values(), ids=ENCODINGS)
def test_every_encoding_of_a_job_is_the_job(stored: str) -> None:
    bodies = decode_element(stored.encode())

    assert bodies == [JOB]


@pytest.mark.parametrize(
    "stored",
    [
        text([JOB, OTHER]),
        text([text(JOB), text(OTHER)]),
        text([{"data": text(JOB)}, text([OTHER])]),
        text({"data": [[JOB], [[text(OTHER)]]]}),
    ],
)
def test_an_array_of_jobs_is_these_jobs_in_order(stored: str) -> None:
    bodies = decode_element(stored.encode())

    assert bodies == [JOB, OTHER]


def test_an_object_with_more_than_data_is_a_job() -> None:
    body = {"data": "{}", "id": "1"}

    bodies = decode_element(text(body).encode())

    assert bodies == [body]


def test_the_texts_inside_a_job_stay_texts() -> None:
    body = {"id": "1", "prompt": text(JOB), "metadata": {"data": text(OTHER)}}

    bodies = decode_element(text([text(body)]).encode())

    assert bodies == [body]


def test_numbers_keep_their_kind_and_their_digits() -> None:
    stored = b'{"seed": 9007199254740993, "steps": 25.0, "scale": 7.5, "small": -0.0, "big": 1e300}'

    (body,) = decode_element(stored)

    assert repr(body["seed"]) == "9007199254740993"
    assert [repr(body[key]) for key in ("steps", "scale", "small", "big")] == [
        "25.0",
        "7.5",
        "-0.0",
        "1e+300",
    ]


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "text": text,
    "array": lambda value: [value],
    "data": lambda value: {"data": value},
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(
    body=st.dictionaries(st.text(max_size=8), VALUES, max_size=5),
    wrappings=st.lists(st.sampled_from(sorted(WRAPPINGS)), max_size=MAX_LAYERS),
    ascii_only=st.booleans(),
)
def test_any_body_in_any_wrapping_is_the_body(
    body: dict[str, Any], wrappings: list[str], ascii_only: bool
) -> None:
    value: Any = body | {"id": "1"}  # a body of `data` alone is a wrapping
    for wrapping in wrappings:
        value = WRAPPINGS[wrapping](value)

    bodies = decode_element(json.dumps(value, ensure_ascii=ascii_only).encode())

    assert bodies == [body | {"id": "1"}]
    assert text(bodies) == text([body | {"id": "1"}])  # 1 is not 1.0, nor True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | VALUES.map(lambda value: text(value).encode()))
def test_any_element_is_jobs_or_malformed(element: bytes) -> None:
    try:
        bodies = decode_element(element)
    except MalformedElement as problem:
        assert problem.reason
    else:
        assert bodies and all(type(body) is dict for body in bodies)


# --- malformed ---------------------------------------------------------------------------------


def wrapped(times: int) -> bytes:
    value: Any = JOB
    for _ in range(times):
        value = [value]
    return text(value).encode()


def padded(size: int) -> bytes:
    return text(JOB).encode().ljust(size)


@pytest.mark.parametrize("element", [wrapped(MAX_LAYERS), padded(MAX_ELEMENT_BYTES)])
def test_an_element_at_its_bounds_is_read(element: bytes) -> None:
    assert decode_element(element) == [JOB]


MALFORMED = {
    "nothing": (b"", "is not JSON at character 0"),
    "a word": (b"cat", "is not JSON at character 0"),
    "half an object": (b'{"id": "1"', "is not JSON at character 10"),
    "two objects": (b"{} {}", "is not JSON at character 3"),
    "a text that is not JSON": (b'["{"]', "is not JSON at character 1"),
    "a byte order mark": (b'\xef\xbb\xbf{"id": "1"}', "is not JSON at character 0"),
    "null": (b"null", "where a job should be"),
    "a number": (b"5", "where a job should be"),
    "a boolean in a text": (b'"true"', "where a job should be"),
    "an empty array": (b"[]", "array in it is empty"),
    "an empty array beside a job": (b'[{"id": "1"}, []]', "array in it is empty"),
    "a job beside a number": (b'[{"id": "1"}, 5]', "where a job should be"),
    "data that is null": (b'{"data": null}', "where a job should be"),
    "the same key twice": (b'{"prompt": "a", "prompt": "b"}', "the same key twice"),
    "the same key twice inside": (b'{"config": {"seed": 1, "seed": 1}}', "the same key twice"),
    "data twice": (b'{"data": "{}", "data": "{}"}', "the same key twice"),
    "not a number": (b'{"seed": NaN}', "a constant that JSON does not have"),
    "without end": (b'{"seed": -Infinity}', "a constant that JSON does not have"),
    "beyond a float": (b'{"seed": 1e999}', "larger than a float"),
    "below a float": (b'{"seed": -1e999}', "larger than a float"),
    "a whole number beyond a float": (b'{"seed": 1%s}' % (b"0" * 400), "larger than a float"),
    "ten thousand digits": (b'{"seed": %s}' % (b"9" * 10_000), "larger than a float"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 from byte 12 on"),
    "UTF-8 of half a pair": (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8 from byte 12 on"),
    "a control character": (b'{"prompt": "\x01"}', "is not JSON at character 12"),
    "wrapped too often": (wrapped(MAX_LAYERS + 1), f"wrapped more than {MAX_LAYERS} times"),
    "very deep": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "very deep in a job": (
        b'{"id": "1", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "nested too deeply",
    ),
    "too large": (padded(MAX_ELEMENT_BYTES + 1), f"has {MAX_ELEMENT_BYTES + 1} bytes"),
}


@pytest.mark.parametrize(("element", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_element_is_refused_with_the_reason(element: bytes, reason: str) -> None:
    with pytest.raises(MalformedElement) as caught:
        decode_element(element)

    assert reason in caught.value.reason
    assert str(caught.value) == caught.value.reason


@pytest.mark.parametrize(("element", "_reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_reason_is_short_and_has_no_word_that_a_client_misreads(
    element: bytes, _reason: str
) -> None:
    with pytest.raises(MalformedElement) as caught:
        decode_element(element)

    assert len(caught.value.reason) < 100
    assert not has_trap_word(caught.value.reason)


@pytest.mark.parametrize(
    "element",
    [
        b'["secret words"]',
        b'{"secret words": 1, "secret words": 2}',
        b'{"prompt": "secret words", "seed": NaN}',
        b'{"prompt": "secret words \xff"}',
        b'{"prompt": "secret words"',
    ],
)
def test_a_reason_holds_nothing_that_the_user_wrote(element: bytes) -> None:
    with pytest.raises(MalformedElement) as caught:
        decode_element(element)

    assert "secret" not in caught.value.reason


# --- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "job_id"),
    [
        ({"id": "a", "job_id": "b"}, "a"),
        ({"job_id": "b"}, "b"),
        ({"id": None, "job_id": "b"}, "b"),
        ({"id": "", "job_id": "b"}, "b"),
        ({"id": ["a"], "job_id": "b"}, "b"),
        ({"id": 5}, "5"),
        ({"id": 0}, "0"),
        ({"id": True}, None),
        ({"id": 1.5}, None),
        ({"id": "\ud800"}, None),
        ({"id": "\ud800", "job_id": "b"}, "b"),
        ({"prompt": "a"}, None),
        ({}, None),
    ],
)
def test_a_bodys_id_is_found_where_it_has_one(body: dict[str, Any], job_id: str | None) -> None:
    assert job_id_of(body) == job_id

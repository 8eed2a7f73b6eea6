"""Whatever JSON arrives, the answer is JSON in a known shape, and never a bug.

The engines answer everything at once, so nothing here may be slow or end with a 5xx.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from tests.fakes import ChatPort, MediaPort
from tests.http.answers import ASK, free_of_traps, refused

UNICODE = st.text(max_size=12)
# Half pairs of surrogates too: JSON can escape them, and they are no Unicode text.
TEXTS = UNICODE | st.sampled_from(["\ud800", "a\udfff", "\0"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1e308, -0.0, 2**63, 2**64, 10**400, "", "user", "1024x1024", "qwen_base"])
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": UNICODE},
        optional={"name": VALUES},
    ),
    min_size=1,
    max_size=3,
)


def bodies(known: list[str], good: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Any JSON; objects with the keys that a route knows; good ones with one of these, and good
    ones with keys that nobody knows."""
    wild = st.fixed_dictionaries({}, optional=dict.fromkeys([*known, *good], VALUES))
    whole = st.fixed_dictionaries(good)
    one = st.dictionaries(st.sampled_from(known), VALUES, max_size=1)
    strangers = st.dictionaries(TEXTS, VALUES, max_size=2)
    return VALUES | wild | st.builds(lambda own, new: new | own, whole, one | strangers)


CHAT = bodies(
    [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "stop",
        "seed",
        "model",
        "stream",
        "sfw_mode",
        "deadline_s",
    ],
    {"messages": MESSAGES},
)
JOBS = bodies(
    [
        "id",
        "job_id",
        "type",
        "job_type",
        "model",
        "negative_prompt",
        "config",
        "metadata",
        "num_images",
        "steps",
        "guidance_scale",
        "seed",
        "size",
        "resolution",
        "width",
        "height",
        "frames",
        "fps",
        "scheduler",
        "sample_shift",
        "image",
        "loras",
    ],
    {"prompt": UNICODE},
)
COMPLETIONS = bodies(
    ["model", "options"],
    {
        "inputs": UNICODE,
        "parameters": st.none()
        | st.dictionaries(
            st.sampled_from(
                ["max_new_tokens", "do_sample", "temperature", "return_full_text", "stop", "stream"]
            ),
            VALUES,
        ),
    },
)

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,  # a run of this tier gives the same result twice
    # One port for all examples is meant: that none of them spoils the next is part of the test.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def post(port: ChatPort, route: str, body: Any) -> TestResponse:
    return port.client.post(route, data=json.dumps(body), content_type="application/json")


def check(answer: TestResponse, text_key: str) -> None:
    """The answer is a success with `text_key`, a stream, or a refusal in the known shape."""
    if answer.status_code >= 300:
        assert answer.status_code in (400, 413, 422), answer.text
        refused(answer, answer.status_code, answer.get_json()["error_code"])
    elif answer.mimetype == "text/event-stream":
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.content_type == "application/json"
        assert isinstance(answer.get_json()[text_key], str)


@pytest.mark.parametrize(
    ("route", "text_key"),
    [
        ("/chat", "response"),
        ("/enhance", "enhanced_prompt"),
        ("/debug/render", "prompt_ids_sha256"),
    ],
)
def test_any_body_to_the_chat_port_is_served_or_refused(
    chat: ChatPort, route: str, text_key: str
) -> None:
    @EXAMPLES
    @given(CHAT)
    def every(body: Any) -> None:
        check(post(chat, route, body), text_key)

    every()

    assert chat.admission.taken == 0
    assert post(chat, route, ASK).status_code == 200


def test_any_completion_to_the_media_port_is_served_or_refused(
    make_media: Callable[..., MediaPort],
) -> None:
    port = make_media(media={"max_waiting": 10_000})
    port.media.goes_away()

    @EXAMPLES
    @given(COMPLETIONS)
    def every(body: Any) -> None:
        answer = post(port, "/generate", body)
        check(answer, "generated_text" if answer.status_code == 200 else "job_id")

    every()

    assert post(port, "/generate", {"inputs": "x"}).status_code == 200


def test_any_job_to_the_media_port_is_accepted_or_refused(
    make_media: Callable[..., MediaPort],
) -> None:
    port = make_media(media={"max_waiting": 10_000})
    port.media.goes_away()  # accepted jobs stay queued

    @EXAMPLES
    @given(JOBS)
    def every(body: Any) -> None:
        answer = post(port, "/generate", body)
        if answer.status_code == 409:  # an id that an earlier example has used
            refused(answer, 409, "conflict")
        else:
            check(answer, "generated_text" if answer.status_code == 200 else "job_id")

    every()

    assert post(port, "/generate", {"prompt": "x"}).status_code == 202


@pytest.mark.parametrize("route", ["/chat", "/debug/render", "/memory/load"])
def test_any_bytes_to_the_chat_port_are_refused_or_understood(chat: ChatPort, route: str) -> None:
    @EXAMPLES
    @given(st.binary(max_size=40))
    def every(raw: bytes) -> None:
        answer = chat.client.post(route, data=raw, content_type="application/json")
        assert answer.status_code < 500
        assert answer.content_type == "application/json"
        assert answer.status_code == 200 or free_of_traps(answer.data)

    every()


@pytest.mark.parametrize("header", ["Authorization", "X-Request-Id", "Prefer", "Idempotency-Key"])
def test_any_header_is_refused_or_understood(
    make_media: Callable[..., MediaPort], header: str
) -> None:
    port = make_media(keys=("k-1",), access={"keyless_inference": True})

    @EXAMPLES
    @given(st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=300))
    def every(value: str) -> None:
        answer = port.client.post("/generate", json={"prompt": 5}, headers={header: value})
        refused(answer, answer.status_code, answer.get_json()["error_code"])
        assert answer.status_code in (400, 401)

    every()

"""Who may call what: keys, the switch for keyless inference, probes; where keys never appear."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
from flask import Flask

from tests.fakes import ChatPort, MediaPort
from tests.http.answers import ASK, refused
from worker.config import KEY_NAMES, read_keys

KEY = "k-3f9a51c2"
OTHER = "k-77b0e4d8"
RIGHT = {"Authorization": f"Bearer {KEY}"}
WRONG = {"Authorization": f"Bearer {KEY}x"}

Route = tuple[str, str]  # method, path

OPEN: list[Route] = [("GET", "/health"), ("GET", "/worker/info")]
CHAT_OPEN: list[Route] = [*OPEN, ("GET", "/enhancement/info")]
CHAT_INFERENCE: list[Route] = [
    ("POST", "/chat"),
    ("POST", "/enhance"),
    ("POST", "/enhance/sdxl"),
    ("POST", "/enhance/universal"),
    ("POST", "/enhance/wan"),
    ("POST", "/generate"),
]
MEDIA_INFERENCE: list[Route] = [
    ("POST", "/generate"),
    ("GET", "/jobs/j1"),
    ("DELETE", "/jobs/j1"),
    ("GET", "/jobs/j1/events"),
    ("GET", "/jobs/j1/preview"),
    ("GET", "/jobs/j1/assets/0"),
    ("GET", "/jobs/j1/assets/0/thumbnail"),
    ("GET", "/status"),
]
MEMORY: list[Route] = [
    ("GET", "/memory/status"),
    ("POST", "/memory/load"),
    ("POST", "/memory/unload"),
]
PLAN: list[Route] = [("POST", "/plan"), ("GET", "/explain/j1")]
CHAT_ADMIN: list[Route] = [
    *MEMORY,
    *PLAN,
    ("POST", "/debug/render"),
    ("GET", "/debug/model"),
    ("GET", "/metrics"),
]
MEDIA_ADMIN: list[Route] = [*MEMORY, *PLAN, ("GET", "/debug/env"), ("GET", "/metrics")]


def call(port: ChatPort, route: Route, headers: dict[str, str] | None = None) -> int:
    """The status of a plain call."""
    method, path = route
    json = (ASK | {"prompt": "x"}) if method == "POST" else None
    with port.client.open(path, method=method, json=json, headers=headers) as answer:
        return answer.status_code


def routes_of(app: Flask) -> set[Route]:
    """Every method and path of the app, with the parameters that the lists above have."""
    return {
        (method, re.sub(r"<(job_id|about)>", "j1", rule.rule).replace("<int:index>", "0"))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }


def test_the_lists_of_this_file_name_every_route(
    make_chat: Callable[..., ChatPort], make_media: Callable[..., MediaPort]
) -> None:
    chat, media = make_chat(), make_media()

    assert routes_of(chat.app) == {*CHAT_OPEN, *CHAT_INFERENCE, *CHAT_ADMIN}
    assert routes_of(media.app) == {*OPEN, ("GET", "/"), *MEDIA_INFERENCE, *MEDIA_ADMIN}


# --- without keys --------------------------------------------------------------------------------


def test_without_keys_everything_on_the_chat_port_is_open(
    make_chat: Callable[..., ChatPort],
) -> None:
    port = make_chat(access={"keyless_inference": False})

    statuses = [
        call(port, route, headers)
        for route in (*CHAT_OPEN, *CHAT_INFERENCE, *CHAT_ADMIN)
        for headers in (None, {"Authorization": "Bearer whatever"}, {"Authorization": "Basic eA"})
    ]

    assert set(statuses) == {200}


def test_without_keys_everything_on_the_media_port_is_open(
    make_media: Callable[..., MediaPort],
) -> None:
    port = make_media(access={"keyless_inference": False})

    statuses = [call(port, route) for route in (*OPEN, *MEDIA_INFERENCE, *MEDIA_ADMIN)]

    assert set(statuses) == {200, 202, 404}


# --- with keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize("headers", [None, WRONG, RIGHT])
@pytest.mark.parametrize("route", OPEN)
def test_health_and_info_are_open_to_everybody(
    make_chat: Callable[..., ChatPort],
    make_media: Callable[..., MediaPort],
    route: Route,
    headers: dict[str, str] | None,
    keyless: bool,
) -> None:
    access = {"keyless_inference": keyless}
    chat, media = make_chat(keys=(KEY,), access=access), make_media(keys=(KEY,), access=access)

    statuses = [call(chat, route, headers), call(media, route, headers)]

    assert statuses == [200, 200]


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize("route", [*CHAT_INFERENCE, *CHAT_ADMIN])
def test_a_wrong_key_is_refused_everywhere_on_the_chat_port(
    make_chat: Callable[..., ChatPort], route: Route, keyless: bool
) -> None:
    port = make_chat(keys=(OTHER, KEY), access={"keyless_inference": keyless})

    method, path = route
    answer = port.client.open(path, method=method, json=ASK, headers=WRONG)

    refused(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert port.link.sent == []
    assert call(port, route, RIGHT) == 200


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize("route", [*MEDIA_INFERENCE, *MEDIA_ADMIN])
def test_a_wrong_key_is_refused_everywhere_on_the_media_port(
    make_media: Callable[..., MediaPort], route: Route, keyless: bool
) -> None:
    port = make_media(keys=(KEY,), access={"keyless_inference": keyless})

    method, path = route
    answer = port.client.open(path, method=method, json={"prompt": "x"}, headers=WRONG)

    refused(answer, 401, "unauthorized")
    assert port.desk.journal.counts()["queued"] == 0
    assert call(port, route, RIGHT) in (200, 202, 404)


@pytest.mark.parametrize("route", CHAT_INFERENCE)
def test_the_profile_decides_about_keyless_chat(
    make_chat: Callable[..., ChatPort], route: Route
) -> None:
    allowed = make_chat(keys=(KEY,), access={"keyless_inference": True})
    denied = make_chat(keys=(KEY,), access={"keyless_inference": False})

    statuses = call(allowed, route), call(denied, route)

    assert statuses == (200, 401)
    assert denied.link.sent == []


@pytest.mark.parametrize(("keyless", "statuses"), [(True, {200, 202, 404}), (False, {401})])
@pytest.mark.parametrize("route", MEDIA_INFERENCE)
def test_the_profile_decides_about_keyless_jobs(
    make_media: Callable[..., MediaPort], route: Route, keyless: bool, statuses: set[int]
) -> None:
    port = make_media(keys=(KEY,), access={"keyless_inference": keyless})

    assert call(port, route) in statuses


@pytest.mark.parametrize("route", CHAT_ADMIN)
def test_administration_of_the_chat_port_needs_a_key_even_where_inference_does_not(
    make_chat: Callable[..., ChatPort], route: Route
) -> None:
    port = make_chat(keys=(KEY,), access={"keyless_inference": True})

    statuses = call(port, route), call(port, route, RIGHT)

    assert statuses == (401, 200)


@pytest.mark.parametrize("route", MEDIA_ADMIN)
def test_administration_of_the_media_port_needs_a_key_even_where_inference_does_not(
    make_media: Callable[..., MediaPort], route: Route
) -> None:
    port = make_media(keys=(KEY,), access={"keyless_inference": True})

    statuses = call(port, route), call(port, route, RIGHT)

    assert statuses == (401, 200)


def test_every_configured_key_opens_the_same_doors(make_chat: Callable[..., ChatPort]) -> None:
    env = {name: f"key-of-{name}" for name in KEY_NAMES} | {"UNRELATED_API_KEY": "other-key"}
    port = make_chat(keys=read_keys(env), access={"keyless_inference": False})

    statuses = {
        name: call(port, ("POST", "/chat"), {"Authorization": f"Bearer {key}"})
        for name, key in env.items()
    }

    assert statuses == {
        "WAN_WORKER_API_KEY": 200,
        "CHAT_WORKER_API_KEY": 200,
        "SDXL_WORKER_API_KEY": 200,
        "UNRELATED_API_KEY": 401,
    }


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_variable_is_no_key(make_chat: Callable[..., ChatPort], blank: str) -> None:
    keys = read_keys({"WAN_WORKER_API_KEY": blank, "CHAT_WORKER_API_KEY": KEY})
    port = make_chat(keys=keys, access={"keyless_inference": False})

    statuses = [
        call(port, ("POST", "/chat"), {"Authorization": value})
        for value in ("Bearer ", "Bearer", f"Bearer {blank}".strip(), "")
    ]

    assert keys == (KEY,)
    assert statuses == [401] * 4


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY} "])
def test_a_key_with_space_around_it_can_be_used(
    make_chat: Callable[..., ChatPort], value: str
) -> None:
    """A secret that comes from a file often ends in a line break, which no header can hold."""
    keys = read_keys({"CHAT_WORKER_API_KEY": value})
    port = make_chat(keys=keys, access={"keyless_inference": False})

    assert call(port, ("POST", "/chat"), RIGHT) == 200


@pytest.mark.parametrize("header", [f"{word} {KEY}" for word in ("Bearer", "bearer", "BEARER")])
def test_the_scheme_is_taken_in_any_casing(make_chat: Callable[..., ChatPort], header: str) -> None:
    port = make_chat(keys=(KEY,), access={"keyless_inference": False})

    assert call(port, ("POST", "/chat"), {"Authorization": header}) == 200


@pytest.mark.parametrize(
    "header",
    [
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY},{OTHER}",
        "Bearer",
        "Bearer undefined",
        "Bearer \xff\xfe",
        f"Token {KEY}",
        "",
    ],
)
def test_any_other_header_is_refused(make_chat: Callable[..., ChatPort], header: str) -> None:
    port = make_chat(keys=(KEY,), access={"keyless_inference": True})

    answer = port.client.post("/chat", json=ASK, headers={"Authorization": header})

    refused(answer, 401, "unauthorized")
    assert port.link.sent == []


def test_a_key_is_asked_for_before_anything_of_the_body_is_read(
    make_chat: Callable[..., ChatPort],
) -> None:
    port = make_chat(keys=(KEY,), access={"keyless_inference": False})

    answer = port.client.post("/chat", data=b"{", content_type="text/plain")

    refused(answer, 401, "unauthorized")


# --- probes --------------------------------------------------------------------------------------

CHAT_PROBES = ["/chat", "/enhance", "/api/chat", "/generate"]
MEDIA_PROBES = [
    "/wan/generate",
    "/wan/image",
    "/image",
    "/generate",
    "/api/generate",
    "/v1/generate",
    "/sdxl/generate",
    "/sdxl/image",
]


@pytest.mark.parametrize("headers", [None, WRONG])
@pytest.mark.parametrize("path", CHAT_PROBES)
def test_a_probe_of_a_chat_route_needs_no_key(
    make_chat: Callable[..., ChatPort], path: str, headers: dict[str, str] | None
) -> None:
    port = make_chat(keys=(KEY,), access={"keyless_inference": False})

    answer = port.client.options(path, headers=headers)

    served = path in ("/chat", "/enhance", "/generate")
    assert answer.status_code == (200 if served else 404)
    assert not served or "POST" in answer.headers["Allow"]


@pytest.mark.parametrize("headers", [None, WRONG])
@pytest.mark.parametrize("path", MEDIA_PROBES)
def test_a_probe_of_a_media_route_needs_no_key(
    make_media: Callable[..., MediaPort], path: str, headers: dict[str, str] | None
) -> None:
    port = make_media(keys=(KEY,), access={"keyless_inference": False})

    answer = port.client.options(path, headers=headers)

    assert answer.status_code == (200 if path == "/generate" else 404)


@pytest.mark.parametrize("path", ["/status", "/info", "/api/status"])
def test_the_other_info_routes_that_clients_try_are_refused_as_unknown(
    make_chat: Callable[..., ChatPort], path: str
) -> None:
    port = make_chat(keys=(KEY,), access={"keyless_inference": False})

    refused(port.client.get(path), 404, "not_found")


# --- where keys never appear ---------------------------------------------------------------------


def test_no_answer_header_or_log_line_holds_a_key(
    make_chat: Callable[..., ChatPort],
    make_media: Callable[..., MediaPort],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("WAN_WORKER_API_KEY", KEY)
    chat = make_chat(keys=(KEY, OTHER))
    media = make_media(keys=(KEY, OTHER))
    tries = [RIGHT, WRONG, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}]

    seen = []
    for port, routes in ((chat, routes_of(chat.app)), (media, routes_of(media.app))):
        for method, path in sorted(routes):
            for headers in tries:
                body = (ASK | {"prompt": "x"}) if method == "POST" else None
                answer = port.client.open(path, method=method, json=body, headers=headers)
                seen.append(f"{answer.headers}\n{answer.text}")

    assert len(seen) > 100
    assert not [text for text in seen if KEY in text or OTHER in text]
    assert "/chat" in caplog.text
    assert KEY not in caplog.text
    assert OTHER not in caplog.text


def test_a_bug_while_a_key_is_used_does_not_log_it(
    make_chat: Callable[..., ChatPort], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    port = make_chat(keys=(KEY,))
    port.link.breaks = RuntimeError("a bug")

    answer = port.client.post("/debug/render", json=ASK, headers=RIGHT)

    refused(answer, 500, "internal_error")
    assert "a bug" in caplog.text
    assert KEY not in caplog.text

"""Pictures that jobs begin from: whose they are, and which paths are none."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, Invalid
from gateway.jobs.references import (
    KEYS,
    CrossUserReference,
    StorageSigner,
    prepare,
)
from gateway.jobs.request import JobInput
from tests.gateway.flow_parts import OTHER, USER

OWN = f"user-library/{USER}/a picture (1).png"
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def signed(path: str) -> str:
    return f"https://store.example.org/signed/{path}?token=t"


def prepared(path: str, sign: Any = signed, where: str = "root") -> Any:
    if where == "root":
        asked = JobInput(job_type="sdxl_image_fast", reference_image_url=path)
        return prepare(asked, USER, sign).reference_image_url
    asked = JobInput(job_type="video_fast", metadata={where: path})
    return prepare(asked, USER, sign).metadata[where]


@pytest.mark.parametrize("where", ["root", *KEYS])
def test_a_path_of_ones_own_is_signed(where: str) -> None:
    assert prepared(OWN, where=where) == signed(OWN)


@pytest.mark.parametrize("where", ["root", *KEYS])
def test_another_users_path_is_refused(where: str) -> None:
    with pytest.raises(CrossUserReference) as caught:
        prepared(f"workspace-temp/{OTHER}/a.png", where=where)

    assert (caught.value.status, caught.value.code) == (403, "CROSS_USER_REFERENCE")
    assert caught.value.fields == {"code": "CROSS_USER_REFERENCE"}
    assert OTHER not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        f"user-library/{USER}x/a.png",
        f"user-library/x{USER}/a.png",
        f"user-library/{USER.upper()}/a.png",
        f"user-library/{USER}-/{USER}/a.png",
        f"user-library/{OTHER}/{USER}/a.png",
    ],
)
def test_a_folder_that_only_looks_like_ones_own_is_anothers(path: str) -> None:
    with pytest.raises(CrossUserReference):
        prepared(path)


@pytest.mark.parametrize(
    "path",
    [
        f"user-library/{USER}/../{OTHER}/a.png",
        f"user-library/./{USER}/a.png",
        f"user-library/../user-library/{USER}/a.png",
        f"user-library//{USER}/a.png",
        f"user-library/{USER}//a.png",
        f"user-library/{USER}/",
        f"user-library/{USER}",
        "user-library/",
        "user-library",
        f"/user-library/{USER}/a.png",
        f"user-library/{USER}/%2e%2e/{OTHER}/a.png",
        f"user-library/{USER}/%2E%2E%2F{OTHER}/a.png",
        f"user-library/{USER}\\..\\{OTHER}\\a.png",
        f"user-library\\{USER}\\a.png",
        f"user-library/{USER}/a.png?x=1",
        f"user-library/{USER}/a.png#x",
        f"user-library/{USER}/a\n.png",
        f"user-library/{USER}/a\0.png",
        f"secrets/{USER}/a.png",
        f"USER-LIBRARY/{USER}/a.png",
        f"{USER}/a.png",
        f"user-library/{USER}/{'a' * 256}",
        "http:/pictures.example.org/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "//pictures.example.org/a.png",
        " https://pictures.example.org/a.png",
        "ftp://pictures.example.org/a.png",
    ],
)
@pytest.mark.parametrize("where", ["root", "start_reference_url"])
def test_what_is_no_path_and_no_url_is_refused(path: str, where: str) -> None:
    with pytest.raises(Invalid):
        prepared(path, where=where)


def test_a_reference_has_an_end() -> None:
    with pytest.raises(Invalid):
        prepared("https://pictures.example.org/" + "a" * 4096)


@pytest.mark.parametrize("url", ["https://pictures.example.org/a.png", "HTTP://Example.org/b"])
def test_a_url_stays_as_it_is(url: str) -> None:
    assert prepared(url) == url


@pytest.mark.parametrize("sign", [None, lambda _path: None])
def test_where_nobody_signs_the_path_stays(sign: Any) -> None:
    assert prepared(OWN, sign) == OWN
    assert prepared(OWN, sign, "end_reference_url") == OWN


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("name", KEYS)
def test_an_empty_reference_is_none(name: str, empty: str | None) -> None:
    asked = JobInput(job_type="video_fast", reference_image_url=empty, metadata={name: empty})

    done = prepare(asked, USER, signed)

    assert done.reference_image_url is None
    assert not done.metadata[name]


@pytest.mark.parametrize("value", [5, ["a"], {"url": "x"}, True])
def test_a_reference_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(Invalid):
        prepare(JobInput(job_type="video_fast", metadata={KEYS[1]: value}), USER, signed)


@given(
    st.lists(
        st.sampled_from([USER, OTHER, "..", ".", "", "%2e", "\\", "a.png", "user-library", "é"]),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["user-library", "workspace-temp", "other"]),
)
@settings(max_examples=300, **PATIENT)
def test_only_plain_paths_below_ones_own_folder_are_ever_signed(
    segments: list[str], bucket: str
) -> None:
    seen: list[str] = []

    try:
        prepared("/".join([bucket, *segments]), seen.append)
    except GatewayError:
        assert seen == []
        return

    (path,) = seen
    assert path.startswith((f"user-library/{USER}/", f"workspace-temp/{USER}/"))
    assert not {"", ".", ".."} & set(path.split("/"))
    assert "%" not in path
    assert "\\" not in path


# --- the store that signs -----------------------------------------------------------------------


class Store:
    """Answers as a project's storage does, or as it is told."""

    def __init__(self, answer: httpx.Response | Exception) -> None:
        self.answer = answer
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def signer(self) -> StorageSigner:
        return StorageSigner("https://p.example.org/", "key", httpx.MockTransport(self))


def test_the_store_is_asked_for_an_hour() -> None:
    store = Store(httpx.Response(200, json={"signedURL": "/object/sign/x?token=t"}))

    url = store.signer()(OWN)

    (request,) = store.seen
    assert request.url.raw_path == (
        f"/storage/v1/object/sign/user-library/{USER}/a%20picture%20%281%29.png".encode()
    )
    assert request.content in (b'{"expiresIn":3600}', b'{"expiresIn": 3600}')
    assert request.headers["Authorization"] == "Bearer key"
    assert url == "https://p.example.org/storage/v1/object/sign/x?token=t"


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(400, json={"error": "not found"}),
        httpx.Response(500, json={"signedURL": "/object/x"}),
        httpx.Response(302, headers={"Location": "http://elsewhere"}, json={"signedURL": "/x"}),
        httpx.Response(200, json={"signedURL": None}),
        httpx.Response(200, json=["/object/x"]),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, content=b"\xff\xfe"),
        httpx.ConnectError("gone"),
        httpx.ReadTimeout("late"),
    ],
)
def test_a_store_that_does_not_sign_leaves_the_path(answer: httpx.Response | Exception) -> None:
    assert prepared(OWN, Store(answer).signer()) == OWN

"""Reading a provider's list: what goes in, what is refused, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.models import faults
from gateway.models.exchange import Exchange
from gateway.models.faults import ProviderError
from gateway.models.listing import (
    BUILT_IN,
    MAX_CHARS,
    MAX_NUMBER,
    MAX_ROWS,
    Listing,
    read_rows,
    rows_of,
    slug,
)
from gateway.models.lists import ListFetcher
from gateway.values.rows import Provider
from tests.gateway import lying_provider as lying
from tests.gateway.lying_provider import LyingProvider, answers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


def read(*rows: Any, keys_are_ids: bool = False) -> Listing:
    return read_rows(rows, keys_are_ids=keys_are_ids)


def fetch(base_url: str | None, kind: str = "openai", deadline_s: float = 5.0) -> Listing:
    fetcher = ListFetcher(Exchange(private_allowed=True), lambda _: None, deadline_s)
    return fetcher(Provider(id=1, name="local", kind=kind, base_url=base_url))


def refused(provider: LyingProvider, reply: lying.Reply, deadline_s: float = 5.0) -> str:
    provider.lists(reply)
    with pytest.raises(ProviderError) as caught:
        fetch(provider.base_url, deadline_s=deadline_s)
    assert "SECRET" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("key", ["llms", "models", "data", None])
def test_each_form_of_a_list_is_read(key: str | None) -> None:
    rows = [{"id": 28, "name": "Claude 3.7 Sonnet", "other": 1}]

    found = rows_of(rows if key is None else {key: rows, "count": 1})

    assert found == rows


@pytest.mark.parametrize("document", [{}, 7, "x", None, {"data": {}}, {"data": [], "models": []}])
def test_what_is_no_list_is_refused_whole(document: Any) -> None:
    with pytest.raises(ProviderError) as caught:
        rows_of(document)

    assert caught.value.reason == faults.BROKEN


def test_numbers_as_ids_are_decimal_texts_and_keys_are_made_of_names() -> None:
    listing = read({"id": 35, "name": "Gemini 2.5 Flash-Lite", "capabilities": ["vision"]})

    (row,) = listing.rows
    assert (row.external_id, row.model_key) == ("35", "gemini-2.5-flash-lite")
    assert row.capabilities == {"vision": True}
    assert listing.is_complete and listing.errors == ()


def test_ids_that_are_names_are_the_keys_of_an_openai_provider() -> None:
    listing = read({"id": "gryphe/mythomax-l2-13b", "context_length": 4096}, keys_are_ids=True)

    (row,) = listing.rows
    assert (row.model_key, row.model_name) == ("gryphe/mythomax-l2-13b",) * 2
    assert row.capabilities == {"context_length": 4096}


def test_the_built_in_mapping_has_the_five_models_by_their_ids() -> None:
    assert [(row.external_id, row.model_name) for row in BUILT_IN.rows] == [
        ("28", "Claude 3.7 Sonnet"),
        ("25", "Claude 3.5 Sonnet"),
        ("30", "Claude Opus 4.1"),
        ("35", "Gemini 2.5 Flash-Lite"),
        ("40", "GPT-4o"),
    ]
    assert all(row.model_key == slug(row.model_name) for row in BUILT_IN.rows)
    assert {row.external_id for row in BUILT_IN.rows} == BUILT_IN.ids


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": 7}, "name is no text"),
    ({"name": ""}, "name has 0 characters"),
    ({"name": "x" * (MAX_CHARS + 1)}, "name has 201 characters"),
    ({"name": "a\x00b"}, "control character"),
    ({"name": "a\u202eb"}, "control character"),
    ({"name": " a"}, "space at an end"),
    ({"name": "\ud800"}, "control character"),
    ({"model_key": []}, "model_key is no text"),
    ({"capabilities": 7}, "neither an object nor a list"),
    ({"capabilities": [7]}, "neither an object nor a list"),
    ({"capabilities": {"a": float("inf")}}, "number above"),
    ({"capabilities": {"a": MAX_NUMBER * 2}}, "number above"),
    ({"capabilities": {"a": "\x00"}}, "control character"),
    ({"capabilities": {"a\n": 1}}, "control character"),
    ({"capabilities": {"a": "x" * 5000}}, "at most 4096"),
    ({"capabilities": {"a": [[[[[[1]]]]]]}}, "nested deeper"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_a_bad_row_is_an_error_with_its_id_and_the_others_go_in(
    fields: dict[str, Any], said: str
) -> None:
    listing = read({"id": "a"}, {"id": "b", **fields}, {"id": "c"})

    assert [row.external_id for row in listing.rows] == ["a", "c"]
    (error,) = listing.errors
    assert error.id == "b" and said in error.reason
    assert listing.ids == {"a", "b", "c"} and listing.is_complete


@pytest.mark.parametrize(
    "raw",
    [
        7,
        None,
        [],
        {},
        {"id": None},
        {"id": True},
        {"id": -1},
        {"id": 1.5},
        {"id": ""},
        {"id": "a\nb"},
        {"id": "x" * 201},
    ],
)
def test_a_row_without_a_readable_id_leaves_open_what_is_gone(raw: Any) -> None:
    listing = read({"id": "a"}, raw)

    assert [row.external_id for row in listing.rows] == ["a"]
    assert not listing.is_complete
    assert listing.errors[0].id is None and listing.errors[0].reason.startswith("row 2: ")


def test_an_id_that_is_listed_twice_is_said_and_the_first_counts() -> None:
    listing = read({"id": "1", "name": "a"}, {"id": 1, "name": "b"})

    assert [row.model_name for row in listing.rows] == ["a"]
    assert [error.id for error in listing.errors] == ["1"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(JSON | st.fixed_dictionaries({"id": JSON}, optional={"name": JSON}), max_size=8))
def test_any_rows_are_either_in_or_an_error(rows: list[Any]) -> None:
    listing = read_rows(rows, keys_are_ids=False)

    assert len(listing.rows) + len(listing.errors) == len(rows)
    assert len({row.external_id for row in listing.rows}) == len(listing.rows)
    for row in listing.rows:
        for text in (row.external_id, row.model_name, row.model_key):
            assert 1 <= len(text) <= MAX_CHARS and text.isprintable()


@pytest.mark.parametrize(
    ("name", "key"), [("GPT-4o", "gpt-4o"), ("Modèle Été", "modele-ete"), ("模型", "")]
)
def test_keys_are_of_plain_letters(name: str, key: str) -> None:
    assert slug(name) == key


# --- over HTTP --------------------------------------------------------------------------------


def test_all_pages_are_one_list() -> None:
    with LyingProvider() as provider:
        provider.lists(lying.pages([{"id": "a"}], [{"id": "b/ü"}], [{"id": "c"}]))

        listing = fetch(provider.base_url)

    assert [row.external_id for row in listing.rows] == ["a", "b/ü", "c"]
    assert [asked.path for asked in provider.asked] == [
        "/v1/models",
        "/v1/models?after_id=a",
        "/v1/models?after_id=b%2F%C3%BC",
    ]


def test_a_model_that_moved_between_pages_is_listed_twice_and_counts_once() -> None:
    with LyingProvider() as provider:
        provider.lists(
            lying.pages([{"id": "a"}, {"id": "b"}], [{"id": "b"}, {"id": "c"}], last_ids=["b", "c"])
        )

        listing = fetch(provider.base_url)

    assert [row.external_id for row in listing.rows] == ["a", "b", "c"]
    assert [error.id for error in listing.errors] == ["b"]


def test_a_list_of_a_catalogue_provider_is_at_its_own_address() -> None:
    with LyingProvider() as provider:
        provider.replies["/v1/llms"] = answers({"llms": [{"id": 40, "name": "GPT-4o"}]})

        listing = fetch(f"{provider.base_url}/llms", "catalogue")

    assert [(row.external_id, row.model_key) for row in listing.rows] == [("40", "gpt-4o")]


def test_a_catalogue_without_an_address_has_the_built_in_mapping() -> None:
    assert fetch(None, "catalogue") is BUILT_IN


def test_a_worker_has_no_list() -> None:
    with pytest.raises(ProviderError):
        fetch(None, "worker")


def test_a_list_that_cannot_be_trusted_is_refused_whole() -> None:
    row = {"id": "a"}
    cases = {
        lying.status(401): faults.UNAUTHORIZED,
        lying.status(429): faults.BUSY,
        lying.status(500): faults.SERVER_ERROR,
        lying.status(302, {"Location": "/v1/other"}): faults.REDIRECT,
        lying.cuts(b'{"data": [{"id": "a"}]}'): faults.BROKEN,
        lying.raw(b"<html>"): faults.BROKEN,
        lying.raw(b"[" * 50_000): faults.BROKEN,
        lying.too_much(256 << 20): faults.TOO_LARGE,
        answers({"data": "none"}): faults.BROKEN,
        answers({"data": [row], "has_more": True}): faults.BROKEN,
        answers({"data": [row], "has_more": True, "last_id": 7}): faults.BROKEN,
        answers({"data": [row], "next_page_token": "x"}): faults.BROKEN,
        answers({"data": [row], "has_more": True, "last_id": "a"}): faults.BROKEN,
        answers([{"id": number} for number in range(MAX_ROWS + 1)]): faults.TOO_LARGE,
        lying.in_turn(
            answers({"data": [row], "has_more": True, "last_id": "a"}), lying.status(500)
        ): faults.SERVER_ERROR,
    }
    with LyingProvider() as provider:
        for reply, reason in cases.items():
            assert refused(provider, reply) == reason


def test_pages_without_an_end_are_given_up() -> None:
    with LyingProvider() as provider:
        provider.lists(lying.pages(*([{"id": str(number)}] for number in range(60))))

        with pytest.raises(ProviderError) as caught:
            fetch(provider.base_url)

    assert caught.value.reason == faults.TOO_LARGE
    assert len(provider.asked) == 40


@pytest.mark.parametrize("reply", [lying.hangs, lying.drips, lying.drips_headers])
def test_the_deadline_is_over_all_pages(reply: lying.Reply) -> None:
    with LyingProvider() as provider:
        first = answers({"data": [{"id": "a"}], "has_more": True, "last_id": "a"})

        assert refused(provider, lying.in_turn(first, reply), deadline_s=0.3) == faults.TIMEOUT

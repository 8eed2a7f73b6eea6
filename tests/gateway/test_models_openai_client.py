"""The client of OpenAI-compatible endpoints, against a server that speaks the interface or lies."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.models import faults
from gateway.models.addresses import read_url
from gateway.models.exchange import Exchange
from gateway.models.faults import ProviderError, shown
from gateway.models.openai_client import MAX_ANSWER_BYTES, OpenAiClient, ProviderAnswer
from gateway.models.provider_keys import may_be_sent
from gateway.values.assembly import Message, ModelChoice
from tests.gateway import lying_provider as lying
from tests.gateway.lying_provider import LyingProvider, answers, completion

MESSAGES = (Message("system", "You write prompts."), Message("user", "a red boat — é\n "))
SECRETS = {"LOCAL_API_KEY": "sk-12345", "BAD_API_KEY": "sk-1\r\nX-More: 1"}


@pytest.fixture(scope="module")
def server() -> Iterator[LyingProvider]:
    with LyingProvider() as provider:
        yield provider


@pytest.fixture
def provider(server: LyingProvider) -> LyingProvider:
    server.asked.clear()
    server.replies.clear()
    return server


@pytest.fixture(scope="module")
def exchange() -> Exchange:
    return Exchange(private_allowed=True)


@pytest.fixture
def client(exchange: Exchange) -> OpenAiClient:
    return OpenAiClient(exchange, SECRETS.get)


def choice(base_url: str | None, secret_ref: str | None = None) -> ModelChoice:
    return ModelChoice(
        model_key="tiny-key",
        provider="local",
        kind="openai",
        external_id="tiny",
        base_url=base_url,
        secret_ref=secret_ref,
        source="default",
    )


def complete(
    client: OpenAiClient,
    provider: LyingProvider,
    params: dict[str, Any] | None = None,
    *,
    secret_ref: str | None = None,
    deadline_s: float = 5.0,
) -> ProviderAnswer:
    return client.complete(
        choice(provider.base_url, secret_ref),
        MESSAGES,
        params or {},
        deadline_s=deadline_s,
        request_id="r-1",
    )


def failure(client: OpenAiClient, provider: LyingProvider, **more: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        complete(client, provider, **more)
    return caught.value


def test_messages_and_parameters_are_sent_as_they_are(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(answers(completion()))
    params = {
        "temperature": 0.0,
        "top_p": 0.9,
        "max_tokens": 62,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.25,
        "stop": ["\n"],
        "seed": 7,
    }

    complete(client, provider, params)

    assert provider.asked[0].json == {
        "model": "tiny",
        "messages": [{"role": one.role, "content": one.content} for one in MESSAGES],
        "stream": False,
        **params,
    }
    assert provider.asked[0].headers["x-request-id"] == "r-1"
    assert "authorization" not in provider.asked[0].headers


def test_parameters_without_a_name_in_the_interface_are_listed_and_not_sent(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(answers(completion()))

    answer = complete(client, provider, {"top_k": 5, "seed": None, "sfw_mode": True, "top_p": 1.0})

    assert answer.unsupported == ("sfw_mode", "top_k")
    assert set(provider.asked[0].json) == {"model", "messages", "stream", "top_p"}


@pytest.mark.parametrize("text", ["", " a\n\n", "<|im_end|>", "é—\u200b\x00", "x" * 100_000])
def test_the_text_is_taken_byte_for_byte(
    client: OpenAiClient, provider: LyingProvider, text: str
) -> None:
    provider.completes(answers(completion(text)))

    answer = complete(client, provider)

    assert answer.text == text
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("stop", 12, 4)


@pytest.mark.parametrize(
    ("served", "flags"),
    [
        ("tiny", ()),
        ("tiny-2024-08-06", ()),
        ("tiny-20250219", ()),
        ("tiny@main", ()),
        ("tiny-mini", ("other_model",)),
        ("small", ("other_model",)),
        (None, ("model_not_told",)),
        (7, ("model_not_told",)),
    ],
)
def test_the_model_that_answered_is_told_whatever_was_asked_for(
    client: OpenAiClient, provider: LyingProvider, served: Any, flags: tuple[str, ...]
) -> None:
    provider.completes(answers(completion(model=served)))

    answer = complete(client, provider)

    assert answer.served_model == (served if isinstance(served, str) else None)
    assert answer.flags == flags


def test_the_key_is_sent_from_the_variable_that_is_named(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(answers(completion()))

    complete(client, provider, secret_ref="LOCAL_API_KEY")

    assert provider.asked[0].headers["authorization"] == "Bearer sk-12345"


@pytest.mark.parametrize(
    ("secret_ref", "said"),
    [
        ("MISSING_API_KEY", "secret MISSING_API_KEY is not set"),
        ("BAD_API_KEY", "secret BAD_API_KEY has a character that a header cannot carry"),
    ],
)
def test_without_a_usable_key_nothing_is_sent(
    client: OpenAiClient, provider: LyingProvider, secret_ref: str, said: str
) -> None:
    error = failure(client, provider, secret_ref=secret_ref)

    assert (error.reason, str(error)) == (faults.NO_SECRET, said)
    assert not error.counts
    assert provider.asked == []


@pytest.mark.parametrize(
    "name",
    ["GATEWAY_JWT_SECRET", "WAN_WORKER_API_KEY", "SUPABASE_API_KEY", "PATH", "wan_x_API_KEY", ""],
)
def test_other_variables_of_the_environment_cannot_be_sent_away(
    provider: LyingProvider, exchange: Exchange, name: str
) -> None:
    client = OpenAiClient(exchange, lambda _: "a value")

    error = failure(client, provider, secret_ref=name)

    assert error.reason == faults.NO_SECRET
    assert provider.asked == []
    assert not may_be_sent(name)


@pytest.mark.parametrize(
    ("code", "reason", "counts"),
    [
        (301, faults.REDIRECT, True),
        (307, faults.REDIRECT, True),
        (400, faults.REJECTED, False),
        (401, faults.UNAUTHORIZED, True),
        (403, faults.UNAUTHORIZED, True),
        (404, faults.UNKNOWN_MODEL, True),
        (408, faults.TIMEOUT, True),
        (413, faults.REJECTED, False),
        (429, faults.BUSY, True),
        (500, faults.SERVER_ERROR, True),
        (503, faults.SERVER_ERROR, True),
    ],
)
def test_each_status_is_a_typed_error_without_the_providers_words(
    client: OpenAiClient, provider: LyingProvider, code: int, reason: str, counts: bool
) -> None:
    provider.completes(lying.status(code, {"Location": f"{provider.base_url}/models"}))

    error = failure(client, provider)

    assert (error.reason, error.provider_status, error.counts) == (reason, code, counts)
    assert "SECRET" not in f"{error} {error.fields}"
    assert len(provider.asked) == 1


@pytest.mark.parametrize(
    ("header", "expected"), [("7", 7.0), ("999999", 3600.0), ("soon", None), ("-1", None)]
)
def test_a_busy_providers_wait_is_passed_on_within_bounds(
    client: OpenAiClient, provider: LyingProvider, header: str, expected: float | None
) -> None:
    provider.completes(lying.status(429, {"Retry-After": header}))

    error = failure(client, provider)

    assert error.retry_after_s == expected


@pytest.mark.parametrize("reply", [lying.hangs, lying.drips, lying.drips_headers])
def test_the_deadline_holds_over_all_reads(
    client: OpenAiClient, provider: LyingProvider, reply: lying.Reply
) -> None:
    provider.completes(reply)

    error = failure(client, provider, deadline_s=0.2)

    assert error.reason == faults.TIMEOUT


def test_a_body_that_is_cut_is_no_answer(client: OpenAiClient, provider: LyingProvider) -> None:
    provider.completes(lying.cuts(json.dumps(completion()).encode()))

    assert failure(client, provider).reason == faults.BROKEN


def test_a_body_above_the_bound_is_not_read_to_its_end(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(lying.too_much(64 * MAX_ANSWER_BYTES))

    assert failure(client, provider).reason == faults.TOO_LARGE


def test_a_compressed_body_is_refused(client: OpenAiClient, provider: LyingProvider) -> None:
    provider.completes(answers(completion(), headers={"Content-Encoding": "gzip"}))

    assert failure(client, provider).reason == faults.BROKEN


@pytest.mark.parametrize(
    "document",
    [
        [],
        "text",
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [7]},
        {"choices": [{}]},
        {"choices": [{"message": []}]},
        completion(None),
        completion(["a", "b"]),
        completion(7),
        completion({"text": "a"}),
        completion("\ud800"),
    ],
)
def test_another_shape_is_no_answer(
    client: OpenAiClient, provider: LyingProvider, document: Any
) -> None:
    provider.completes(answers(document))

    assert failure(client, provider).reason == faults.BROKEN


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"choices": NaN}', b"9" * 5000]
)
def test_what_is_not_json_is_no_answer(
    client: OpenAiClient, provider: LyingProvider, body: bytes
) -> None:
    provider.completes(lying.raw(body))

    assert failure(client, provider).reason == faults.BROKEN


def test_an_error_with_status_200_is_an_error(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(answers({"error": {"code": 502, "message": "x"}, **completion()}))

    assert failure(client, provider).reason == faults.SERVER_ERROR


def test_wrong_types_beside_the_text_are_left_out(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    usage = {"prompt_tokens": "12", "completion_tokens": True}
    provider.completes(answers(completion(finish_reason=["stop"], usage=usage)))

    answer = complete(client, provider)

    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == (None,) * 3


def refuses(param: str, code: str = "unsupported_parameter") -> lying.Reply:
    # The text quotes a prompt: what it says must not count.
    said = f"{param}: use 'max_completion_tokens'"
    return answers({"error": {"param": param, "code": code, "message": said}}, 400)


def test_a_model_that_wants_the_other_limit_gets_it_and_is_remembered(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(lying.in_turn(refuses("max_tokens"), answers(completion())))

    first = complete(client, provider, {"max_tokens": 62})
    second = complete(client, provider, {"max_tokens": 63})

    assert first.unsupported == second.unsupported == ()
    assert [asked.json.get("max_tokens") for asked in provider.asked] == [62, None, None]
    assert [asked.json.get("max_completion_tokens") for asked in provider.asked] == [None, 62, 63]


def test_a_parameter_that_the_endpoint_refuses_is_left_out_and_listed(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(
        lying.in_turn(refuses("temperature", "unsupported_value"), answers(completion()))
    )

    answer = complete(client, provider, {"temperature": 0.7, "top_p": 0.9})

    assert answer.unsupported == ("temperature",)
    assert provider.asked[1].json["top_p"] == 0.9
    assert "temperature" not in provider.asked[1].json


@pytest.mark.parametrize("param", ["messages", "model", "temperature", "seed", "", "max_tokens"])
def test_an_endpoint_that_refuses_what_was_not_sent_is_asked_once(
    client: OpenAiClient, provider: LyingProvider, param: str
) -> None:
    provider.completes(refuses(param))

    error = failure(client, provider, params={"top_p": 0.9})

    assert error.reason == faults.REJECTED
    assert len(provider.asked) == 1


def test_a_refusal_counts_for_later_only_when_the_endpoint_then_answered(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    provider.completes(lying.in_turn(refuses("top_p"), lying.status(500), answers(completion())))
    failure(client, provider, params={"top_p": 0.9})

    answer = complete(client, provider, {"top_p": 0.9})

    assert answer.unsupported == ()
    assert ["top_p" in asked.json for asked in provider.asked] == [True, False, True]


def test_an_endpoint_that_refuses_everything_in_turn_is_given_up(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    names = ("temperature", "top_p", "seed", "stop", "presence_penalty")
    provider.completes(lying.in_turn(*map(refuses, names)))

    error = failure(client, provider, params=dict.fromkeys(names, 1))

    assert error.reason == faults.REJECTED
    assert len(provider.asked) == 4


def test_the_deadline_is_over_all_tries(client: OpenAiClient, provider: LyingProvider) -> None:
    provider.completes(lying.in_turn(refuses("top_p"), lying.hangs))

    error = failure(client, provider, params={"top_p": 0.9}, deadline_s=0.3)

    assert error.reason == faults.TIMEOUT


def test_nobody_listening_is_unreachable(client: OpenAiClient) -> None:
    with LyingProvider() as gone:
        pass

    assert failure(client, gone).reason == faults.UNREACHABLE


def test_a_parameter_that_is_no_json_is_refused_before_anything_is_sent(
    client: OpenAiClient, provider: LyingProvider
) -> None:
    error = failure(client, provider, params={"temperature": float("nan")})

    assert error.reason == faults.REJECTED
    assert provider.asked == []


def test_private_addresses_and_http_need_the_operators_leave(provider: LyingProvider) -> None:
    strict = OpenAiClient(Exchange(), SECRETS.get)

    assert failure(strict, provider).reason == faults.ADDRESS
    for url in (f"https://127.0.0.1:{provider.port}/v1", f"https://localhost:{provider.port}/v1"):
        with pytest.raises(ProviderError) as caught:
            strict.complete(choice(url), MESSAGES, {}, deadline_s=5.0, request_id="r")
        assert caught.value.reason == faults.ADDRESS
    assert provider.asked == []


def test_a_certificate_that_nobody_signed_is_unreachable(provider: LyingProvider) -> None:
    client = OpenAiClient(Exchange(private_allowed=True), SECRETS.get)

    with pytest.raises(ProviderError) as caught:
        client.complete(
            choice(f"https://127.0.0.1:{provider.port}/v1"),
            MESSAGES,
            {},
            deadline_s=5.0,
            request_id="r",
        )

    assert caught.value.reason == faults.UNREACHABLE


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/v1",
        "file:///etc/passwd",
        "https://",
        "https:///v1",
        "https://user:pass@a/v1",
        "https://a:99999/v1",
        "https://a:x/v1",
        "https://a/v1#x",
        "https://a\\b/v1",
        "https://a /v1",
        "https://é/v1",
        "https://a/" + "x" * 3000,
    ],
)
def test_a_base_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(ProviderError) as caught:
        read_url(url, private_allowed=True)

    assert caught.value.reason == faults.ADDRESS


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    exchange = Exchange(resolve=lambda _host, _port: ["8.8.8.8", "10.0.0.1"])
    client = OpenAiClient(exchange, SECRETS.get)

    with pytest.raises(ProviderError) as caught:
        client.complete(
            choice("https://api.example.com/v1"), MESSAGES, {}, deadline_s=5.0, request_id="r"
        )

    assert caught.value.reason == faults.ADDRESS


def test_a_look_up_that_never_ends_is_left_behind() -> None:
    release = threading.Event()

    def resolve(_host: str, _port: int) -> list[str]:
        release.wait()
        return []

    client = OpenAiClient(Exchange(resolve=resolve), SECRETS.get)

    with pytest.raises(ProviderError) as caught:
        client.complete(
            choice("https://api.example.com/v1"), MESSAGES, {}, deadline_s=0.1, request_id="r"
        )
    release.set()

    assert caught.value.reason == faults.TIMEOUT


@pytest.mark.parametrize("name", ["nano-banana", "Inferno", "a\nb", "finance-llm"])
def test_names_with_a_trap_word_are_not_in_errors(name: str) -> None:
    assert shown(name) == "(name withheld)"


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(), prompt=st.text(st.characters()))
def test_any_text_comes_back_and_any_prompt_arrives(
    client: OpenAiClient, provider: LyingProvider, text: str, prompt: str
) -> None:
    provider.asked.clear()
    provider.completes(answers(completion(text)))

    answer = client.complete(
        choice(provider.base_url),
        [Message("user", prompt)],
        {},
        deadline_s=5.0,
        request_id="r",
    )

    assert answer.text == text
    assert provider.asked[0].json["messages"] == [{"role": "user", "content": prompt}]

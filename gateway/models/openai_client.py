"""A chat completion at any endpoint that speaks OpenAI's interface, as it answered.

The request has exactly the messages and the parameters that this interface has a name for; what it
cannot carry is listed in the answer. The text is the answer's, byte for byte. Which model the
endpoint says it ran is part of the answer, whatever was asked for.

Interface: platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from gateway.models import faults
from gateway.models.exchange import Exchange, Reply, read_json
from gateway.models.faults import ProviderError, shown
from gateway.models.provider_keys import authorization
from gateway.values.assembly import Message, ModelChoice

MAX_ANSWER_BYTES = 4 << 20
MAX_RETRY_AFTER_S = 3600.0

# Names that the interface shares with ours. Not sent, and listed: top_k, min_p,
# repetition_penalty and others, which some servers take and others refuse or drop without a word.
PARAMETERS = (
    "temperature",
    "top_p",
    "max_tokens",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
)
# OpenAI's reasoning models refuse max_tokens as an unsupported parameter, and take this one.
_NEW_LIMIT = "max_completion_tokens"
# error.code of a 400 that is about one parameter, named in error.param.
_NOT_KNOWN = frozenset({"unsupported_parameter", "unsupported_value", "unknown_parameter"})
MAX_TRIES = 4  # the first, and one for each parameter that the endpoint says it does not know
MAX_REMEMBERED = 1000

# A name with a date or a revision behind it is the same model: gpt-4o-2024-08-06, name@main.
_SAME_MODEL = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8})|@[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderAnswer:
    """What an endpoint answered."""

    text: str
    served_model: str | None  # in its own words; None: it does not say
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    unsupported: tuple[str, ...]  # parameters that were not sent, or that it refused
    flags: tuple[str, ...]  # other_model, model_not_told

    @staticmethod
    def model_flags(asked: str, served: str | None) -> tuple[str, ...]:
        """What is to be said about the model that answered."""
        if served is None:
            return ("model_not_told",)
        rest = served.removeprefix(asked)
        same = served == asked or (rest != served and _SAME_MODEL.fullmatch(rest) is not None)
        return () if same else ("other_model",)


class OpenAiClient:
    """Asks endpoints. Owner of what changes, the parameters that a model has refused: its lock;
    any thread."""

    def __init__(
        self,
        exchange: Exchange,
        secret: Callable[[str], str | None],
        clock: Callable[[], float] = time.monotonic,
    ):
        """secret: the value of an environment variable, None where it is not set."""
        self._exchange = exchange
        self._secret = secret
        self._clock = clock
        self._lock = Lock()
        # Base URL and external id → parameters by the name they were sent under.
        self._refused: dict[tuple[str, str], frozenset[str]] = {}

    def complete(
        self,
        choice: ModelChoice,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        deadline_s: float,
        request_id: str,
    ) -> ProviderAnswer:
        """One completion, within `deadline_s` over all tries. Raises ProviderError."""
        if choice.base_url is None:
            raise ProviderError(
                faults.ADDRESS, f"provider {shown(choice.provider)} has no base URL"
            )
        headers = {
            "Content-Type": "application/json",
            **authorization(choice.secret_ref, self._secret),
        }
        if request_id.isascii() and request_id.isprintable():
            headers["X-Request-ID"] = request_id
        url = f"{choice.base_url.rstrip('/')}/chat/completions"
        place = (choice.base_url, choice.external_id)
        ends = self._clock() + deadline_s
        with self._lock:
            known = self._refused.get(place, frozenset())
        refused = known
        for _ in range(MAX_TRIES):
            body, unsupported = _body(choice.external_id, messages, params, refused)
            reply = self._exchange.send(
                "POST",
                url,
                headers=headers,
                content=body,
                deadline_s=ends - self._clock(),
                max_bytes=MAX_ANSWER_BYTES,
            )
            unknown = _unknown_parameter(reply, params, refused)
            if unknown is not None:
                refused = refused | {unknown}
                continue
            answer = _answer(reply, choice.external_id, unsupported)
            if refused != known:  # and was right, since the endpoint has answered
                self._remember(place, refused)
            return answer
        raise ProviderError(
            faults.REJECTED,
            f"the provider refused {len(refused)} parameters, one after the other",
            provider_status=reply.status,
        )

    def _remember(self, place: tuple[str, str], refused: frozenset[str]) -> None:
        with self._lock:
            if len(self._refused) >= MAX_REMEMBERED:
                self._refused.clear()  # only costs a refused request for each, once more
            self._refused[place] = refused


def _body(
    model: str, messages: Sequence[Message], params: Mapping[str, Any], refused: frozenset[str]
) -> tuple[bytes, tuple[str, ...]]:
    """The request, and the names of the parameters that are not in it. A None is no parameter."""
    sent: dict[str, Any] = {}
    unsupported = []
    for name, value in params.items():
        if value is None:
            continue
        under = _NEW_LIMIT if name == "max_tokens" and name in refused else name
        if name not in PARAMETERS or under in refused:
            unsupported.append(name)
        else:
            sent[under] = value
    request = {
        "model": model,
        "messages": [{"role": one.role, "content": one.content} for one in messages],
        **sent,
        "stream": False,
    }
    try:
        # Escaped to ASCII: a lone half of a surrogate pair is sent as the escape it came as.
        body = json.dumps(request, ensure_ascii=True, allow_nan=False).encode("ascii")
    except (ValueError, TypeError) as exc:
        raise ProviderError(faults.REJECTED, "a parameter is not a JSON value") from exc
    return body, tuple(sorted(unsupported))


def _unknown_parameter(
    reply: Reply, params: Mapping[str, Any], refused: frozenset[str]
) -> str | None:
    """The name of a sent parameter that the endpoint says it does not know; None: no such word."""
    if reply.status not in (400, 422):
        return None
    try:
        error = read_json(reply.body).get("error")
    except (ProviderError, AttributeError):
        return None  # another kind of answer; its status tells enough
    if not isinstance(error, dict):
        return None
    code, name = error.get("code"), error.get("param")
    if code not in _NOT_KNOWN or not isinstance(name, str) or name in refused:
        return None
    was_sent = params.get("max_tokens" if name == _NEW_LIMIT else name) is not None
    return name if was_sent and name in (*PARAMETERS, _NEW_LIMIT) else None


def _answer(reply: Reply, asked: str, unsupported: tuple[str, ...]) -> ProviderAnswer:
    raise_for_status(reply)
    document = read_json(reply.body)
    if not isinstance(document, dict):
        raise _broken("a JSON object")
    if document.get("error"):  # some send errors of what is behind them with status 200
        raise ProviderError(
            faults.SERVER_ERROR,
            "the provider answered 200 with an error in it",
            provider_status=reply.status,
        )
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _broken("a list `choices` with an object in it")
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise _broken("a text in choices[0].message.content")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise _broken("a text that UTF-8 can write") from exc
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    served = _name(document.get("model"), 200)
    return ProviderAnswer(
        text=text,
        served_model=served,
        finish_reason=_name(choices[0].get("finish_reason"), 40),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        unsupported=unsupported,
        flags=ProviderAnswer.model_flags(asked, served),
    )


def raise_for_status(reply: Reply) -> None:
    """Raises ProviderError unless the status is 2xx."""
    status = reply.status
    if 200 <= status < 300:
        return
    reason, what = faults.REJECTED, "refused the request"
    if 300 <= status < 400:
        reason, what = faults.REDIRECT, "redirects, which is not followed; correct its base URL"
    elif status in (401, 403):
        reason, what = faults.UNAUTHORIZED, "does not take the key"
    elif status == 404:
        reason, what = faults.UNKNOWN_MODEL, "does not know the model or the route"
    elif status == 408:
        reason, what = faults.TIMEOUT, "gave up waiting"
    elif status == 429:
        reason, what = faults.BUSY, "is busy, or its quota is used up"
    elif not 400 <= status < 500:
        reason, what = faults.SERVER_ERROR, "failed"
    waits = reason in (faults.BUSY, faults.SERVER_ERROR)
    raise ProviderError(
        reason,
        f"the provider {what} (status {status})",
        provider_status=status,
        retry_after_s=_retry_after_s(reply) if waits else None,
    )


def _retry_after_s(reply: Reply) -> float | None:
    """The header's seconds; a date in it is not read."""
    raw = reply.headers.get("retry-after", "")
    if not (raw.isascii() and raw.isdecimal() and len(raw) <= 9):
        return None
    return min(float(raw), MAX_RETRY_AFTER_S)


def _broken(expected: str) -> ProviderError:
    return ProviderError(faults.BROKEN, f"the provider's answer has not {expected}")


def _name(value: Any, longest: int) -> str | None:
    good = isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()
    return value if good else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None

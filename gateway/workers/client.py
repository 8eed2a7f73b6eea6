"""One HTTP client for all workers: keys, request ids, deadlines, and a bound on what comes back."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore
import httpx

from gateway.config import Settings
from gateway.errors import ConfigError, Invalid, has_trap_word
from gateway.network.addresses import Resolver, system_addresses
from gateway.workers.network import CheckedNetwork, CheckedTransport, until
from gateway.workers.urls import AddressPolicy, parse_worker_url

CONNECT_S = 2.0
MAX_CONNECTIONS = 128  # more than a gateway's request threads; a request waits for one at most
# An answer of 131,072 tokens, the most a worker writes, is below a megabyte of text.
MAX_ANSWER_BYTES = 8 << 20
MAX_REPORT_BYTES = 256 << 10  # of /health and /worker/info
# No worker's word may put a caller off for longer.
MAX_RETRY_AFTER_S = 3600.0

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What a worker may call an error; anything else of it is not shown to our callers.
_CODE = re.compile(r"[a-z][a-z0-9_]{0,59}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, whole."""

    status: int
    body: bytes = field(repr=False)
    ms: float  # from the call to the last byte
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def object(self) -> dict[str, Any] | None:
        """The body as a JSON object; None if it is none."""
        return _json_object(self.body)

    @property
    def error_code(self) -> str | None:
        """The worker's own word for its error, where it is one that can be shown."""
        code = (self.object() or {}).get("error_code")
        if not isinstance(code, str) or not _CODE.fullmatch(code) or has_trap_word(code):
            return None
        return code


class CallFailed(Exception):
    """No whole answer came. Never leaves this package."""

    def __init__(self, outcome: str, text: str, *, may_have_run: bool, ms: float):
        """outcome: refused | unreachable | timeout | dropped | too_large.

        may_have_run: whether the worker may have got the request: False only where not a byte of
        it was sent.
        """
        super().__init__(text)
        self.outcome = outcome
        self.may_have_run = may_have_run
        self.ms = ms


@dataclass(frozen=True, slots=True)
class Keys:
    """What is sent as Bearer to each kind of worker. Never logged."""

    chat: str | None = field(default=None, repr=False)
    media: str | None = field(default=None, repr=False)


class WorkerClient:
    """Calls workers. Any thread; one for a process, made after a fork, closed at its end."""

    def __init__(
        self,
        policy: AddressPolicy,
        keys: Keys,
        *,
        resolve: Resolver = system_addresses,
        clock: Callable[[], float] = time.monotonic,
        network: httpcore.NetworkBackend | None = None,
    ):
        self._keys = keys
        self._clock = clock
        self.network = CheckedNetwork(policy, resolve, network, clock)
        self._client = httpx.Client(
            transport=CheckedTransport(self.network, max_connections=MAX_CONNECTIONS),
            trust_env=False,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "verbatim-gateway",
            },
        )

    def get(self, url: str, *, deadline: float, request_id: str | None = None) -> Answer:
        """GET an open route, without a key: a prober's old key must not make a worker look dead.

        deadline: monotonic seconds. Raises CallFailed.
        """
        return self._call("GET", url, None, None, deadline, request_id, {}, MAX_REPORT_BYTES)

    def post(
        self,
        url: str,
        body: Mapping[str, Any],
        *,
        kind: str,
        deadline: float,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """POST JSON. kind: chat | media, whose key is sent. Raises CallFailed, and Invalid for a
        body that is no JSON in UTF-8, such as a lone surrogate."""
        key = self._keys.chat if kind == "chat" else self._keys.media
        more = headers or {}
        return self._call("POST", url, body, key, deadline, request_id, more, MAX_ANSWER_BYTES)

    def close(self) -> None:
        self._client.close()

    def _call(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        key: str | None,
        deadline: float,
        request_id: str | None,
        more: Mapping[str, str],
        max_bytes: int,
    ) -> Answer:
        started = self._clock()
        headers = dict(more)
        if request_id is not None:
            headers["X-Request-Id"] = request_id
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = encode(body)

        def failed(outcome: str, text: str, *, may_have_run: bool) -> CallFailed:
            ms = (self._clock() - started) * 1000
            return CallFailed(outcome, text, may_have_run=may_have_run, ms=ms)

        left_s = deadline - started
        if left_s <= 0:
            raise failed("timeout", "no time was left to ask", may_have_run=False)
        connect_s = min(CONNECT_S, left_s)
        timeout = httpx.Timeout(left_s, connect=connect_s, pool=connect_s)
        try:
            with (
                until(deadline),
                self._client.stream(
                    method, url, content=content, headers=headers, timeout=timeout
                ) as answer,
            ):
                raw = bytearray()
                for piece in answer.iter_raw():
                    raw += piece
                    if len(raw) > max_bytes:
                        raise failed(
                            "too_large",
                            f"the answer has more than {max_bytes} bytes",
                            may_have_run=True,
                        )
        except Invalid as exc:
            raise failed("refused", str(exc), may_have_run=False) from exc
        except (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.PoolTimeout) as exc:
            raise failed(
                "unreachable", f"no connection within {connect_s:.3g} s", may_have_run=False
            ) from exc
        except httpcore.TimeoutException as exc:
            raise failed("timeout", f"no answer within {left_s:.3g} s", may_have_run=True) from exc
        except (httpcore.NetworkError, httpcore.RemoteProtocolError) as exc:
            raise failed("dropped", "the connection was cut", may_have_run=True) from exc
        return Answer(
            status=answer.status_code,
            body=bytes(raw),
            ms=(self._clock() - started) * 1000,
            retry_after_s=_retry_after_s(answer.headers.get("Retry-After"), bytes(raw)),
        )


def make_client(settings: Settings) -> WorkerClient:
    """The client of these settings. Raises InvalidRequest for a static URL that is none, and
    ConfigError for a key that no header can carry."""
    section = settings.section
    static = [parse_worker_url(url) for url in (*section.chat_workers, *section.media_workers)]
    policy = AddressPolicy(section.private_workers, frozenset(url.place for url in static))
    return WorkerClient(
        policy,
        Keys(
            _key(settings, "CHAT_WORKER_API_KEY", "WAN_WORKER_API_KEY"),
            _key(settings, "WAN_WORKER_API_KEY", "SDXL_WORKER_API_KEY", "CHAT_WORKER_API_KEY"),
        ),
    )


def _key(settings: Settings, *names: str) -> str | None:
    key = settings.secret(*names)
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        # Checked here, because the library's own error would quote it.
        raise ConfigError(f"the first key of {', '.join(names)} has a character that is no part "
                          "of a key, such as a line's end")  # fmt: skip
    return key


def encode(body: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8. Raises Invalid for what is none: a lone surrogate, a number too large."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (UnicodeEncodeError, ValueError) as exc:
        raise Invalid("a text has half of a surrogate pair in it, or a number is none") from exc


def clean_request_id(request_id: str, suffix: str = "") -> str:
    """An id that a worker honours: 1 to 128 letters, digits, dots, dashes or underscores."""
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", request_id)[: 128 - len(suffix)]
    made = f"{kept or 'gateway'}{suffix}"
    return made if _ID.fullmatch(made) else "gateway"


def _json_object(raw: bytes) -> dict[str, Any] | None:
    """An object of strict JSON; None for anything else, and for a text that UTF-8 cannot hold:
    half of a surrogate pair would break whoever writes it on."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        value = json.loads(raw, parse_constant=refuse)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # also bytes that are no UTF-8
        return None
    return value if isinstance(value, dict) else None


def _retry_after_s(header: str | None, raw: bytes) -> float | None:
    """Seconds, the finer number of the body first."""
    finer = (_json_object(raw) or {}).get("retry_after_s") if header is not None else None
    if isinstance(finer, int | float) and not isinstance(finer, bool):
        value = float(finer) if math.isfinite(finer) else None
    else:
        value = float(header) if header is not None and header.isdecimal() else None
    return None if value is None else min(max(value, 0.0), MAX_RETRY_AFTER_S)

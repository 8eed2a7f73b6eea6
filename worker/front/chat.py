"""Chat and enhancement: messages in, text out, nothing added. Three routes, one computation."""

from __future__ import annotations

import itertools
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, g, request
from flask.typing import ResponseReturnValue

from worker.catalog import Catalog, ModelSpec
from worker.config import Chat, Limits
from worker.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MessagesRequired,
    OutOfRange,
    TooLarge,
    WorkerError,
)
from worker.front import errors
from worker.front.admission import MAX_ASKING, Admission
from worker.front.bodies import read_json
from worker.front.schemas import SchemaCheck
from worker.jsonvalues import (
    above_zero,
    keep_alive_s,
    real_number,
    refuse_lone_surrogates,
    shown_key,
    whole_number,
    within,
)
from worker.protocol.link import HungUp, Link, Mailbox
from worker.protocol.messages import (
    ChatMessage,
    ChatPlanned,
    Failed,
    Generate,
    Generated,
    Message,
    PlanChat,
    Render,
    Rendered,
    Sampling,
    Token,
)
from worker.receipt import ids_sha256, messages_sha256

ROLES = ("system", "user", "assistant")
MAX_TOKENS = 131_072  # more than the longest context of the catalog's models
DEFAULT_MAX_TOKENS = 512  # of /chat; /enhance has its own
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SCHEMA_CHARS = 65_536
# Seeds that this worker draws fit a signed 32-bit column and JavaScript's numbers, so that any
# client can send them back. Seeds that arrive may use all 64 bits of the generator's key.
DRAWN_SEED_BITS = 31
# A proxy cuts an answer whose first byte takes 100 s; after this long a stream begins with
# comments while the request waits for its turn.
STREAM_STARTS_S = 20.0
COMMENT_EVERY_S = 15.0
# How much longer than its deadline the front waits for an engine that should have answered.
ENGINE_GRACE_S = 5.0

# Of the program that turns prompts into messages; this one has no prompt logic.
GATEWAY_ROUTE = "/functions/v1/enhance-prompt"

_COMPLETION_KEYS = {
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
    "deadline_s",
}
KNOWN_KEYS = {
    *_COMPLETION_KEYS,
    "messages",
    "model",
    "stream",
    "sfw_mode",
    "deterministic",
    "response_format",
    "keep_alive",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What /chat, /generate and /enhance have in common. docs/http-api.md#chat."""

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None  # the raw-completion dialect: no messages, no template
    model: ModelSpec
    sampling: Sampling
    schema: str | None = None  # JSON Schema that the answer must follow
    stream: bool = False
    deterministic: bool = False
    sfw_mode: bool = False
    keep_alive_s: float | None = None  # seconds that the model leaves last; None: its own
    deadline_s: float
    ignored: tuple[str, ...] = ()


class ChatParser:
    """Bodies to requests, within the limits of the profile. Immutable."""

    def __init__(self, catalog: Catalog, chat: Chat, limits: Limits):
        self._catalog = catalog
        self._chat = chat
        self._limits = limits

    def parse(self, body: Any, *, max_tokens: int) -> ChatRequest:
        """max_tokens: the route's default.

        Unknown keys are listed in `ignored`, never refused: clients in the field send a dozen we
        do not use. Raises InvalidRequest, TooLarge, OutOfRange or Unsupported.
        """
        if not isinstance(body, dict) or not body:
            raise InvalidRequest("the body must be a JSON object with a messages list")
        messages, extra = self._messages(body.get("messages"))
        stream = _flag(body, "stream")
        ignored = sorted({shown_key(key) for key in body if key not in KNOWN_KEYS} | extra)
        return ChatRequest(
            messages=messages,
            model=self._model(body.get("model")),
            sampling=_sampling(body, max_tokens),
            schema=_schema(body.get("response_format")),
            stream=stream,
            deterministic=self._deterministic(body),
            sfw_mode=_flag(body, "sfw_mode"),
            keep_alive_s=keep_alive_s(body.get("keep_alive")),
            deadline_s=self._deadline(body, stream),
            ignored=tuple(ignored),
        )

    def parse_completion(self, body: dict[str, Any]) -> tuple[ChatRequest, bool]:
        """The `{inputs, parameters}` dialect: the request, and whether to return the prompt too."""
        inputs = body.get("inputs")
        if not isinstance(inputs, str):
            raise InvalidRequest("inputs must be a string")
        self._check_text("inputs", inputs, len(inputs))
        parameters = body.get("parameters")
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict):
            raise InvalidRequest("parameters must be an object")
        mapped = {key: value for key, value in parameters.items() if key in _COMPLETION_KEYS}
        overridden = []
        if parameters.get("max_new_tokens") is not None:
            overridden += ["max_tokens"] if "max_tokens" in mapped else []
            mapped["max_tokens"] = parameters["max_new_tokens"]
        if parameters.get("do_sample") is not None and not _flag(parameters, "do_sample"):
            overridden += ["temperature"] if "temperature" in mapped else []
            mapped["temperature"] = 0
        used = {"max_new_tokens", "do_sample", "return_full_text", *mapped}
        ignored = [shown_key(key) for key in body if key not in ("inputs", "parameters", "model")]
        ignored += [f"parameters.{shown_key(key)}" for key in parameters if key not in used]
        ignored += [f"parameters.{key}" for key in overridden]
        name = body.get("model")
        parsed = ChatRequest(
            prompt=inputs,
            model=self._model(name) if name is not None else self._completion_model(),
            sampling=_sampling(mapped, 150),
            deterministic=self._chat.deterministic,
            deadline_s=self._deadline(mapped, stream=False),
            ignored=tuple(sorted(ignored)),
        )
        return parsed, _flag(parameters, "return_full_text")

    def _messages(self, value: Any) -> tuple[tuple[ChatMessage, ...], set[str]]:
        if not isinstance(value, list) or not value:
            raise InvalidRequest("messages must be a non-empty array of {role, content} objects")
        if len(value) > self._limits.messages:
            raise TooLarge(f"{len(value)} messages; allowed: at most {self._limits.messages}")
        messages = []
        extra: set[str] = set()
        chars = 0
        for index, item in enumerate(value):
            if not isinstance(item, dict) or "role" not in item or "content" not in item:
                raise InvalidRequest(f"messages[{index}] must be an object with role and content")
            role, content = item["role"], item["content"]
            if role not in ROLES:
                raise InvalidRequest(f"messages[{index}].role must be one of {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise InvalidRequest(f"messages[{index}].content must be a string")
            chars += len(content)
            self._check_text(f"messages[{index}].content", content, chars)
            messages.append(ChatMessage(role, content))
            extra |= {
                f"messages[].{shown_key(key)}" for key in item if key not in ("role", "content")
            }
        return tuple(messages), extra

    def _check_text(self, name: str, text: str, total_chars: int) -> None:
        if total_chars > self._limits.prompt_chars:
            raise TooLarge(
                f"the texts have more than {self._limits.prompt_chars} characters together, "
                "the most this worker takes"
            )
        refuse_lone_surrogates(name, text)

    def _model(self, name: Any) -> ModelSpec:
        if name is None:
            return self._catalog.default("chat")
        if not isinstance(name, str):
            raise InvalidRequest("model must be a string")
        return self._catalog.find(name)

    def _completion_model(self) -> ModelSpec:
        """Raw completion is a base model's work where there is one."""
        named = [spec for spec in self._catalog.specs if is_base(spec)]
        return named[0] if named else self._catalog.default("chat")

    def _deterministic(self, body: dict[str, Any]) -> bool:
        if body.get("deterministic") is None:
            return self._chat.deterministic
        return _flag(body, "deterministic")

    def _deadline(self, body: dict[str, Any], stream: bool) -> float:
        most = self._chat.stream_deadline_s if stream else self._chat.deadline_s
        deadline_s = real_number("deadline_s", body.get("deadline_s"), most)
        return above_zero("deadline_s", deadline_s, most)


class ChatService:
    """Runs requests on the chat engine and puts the answers together. Any thread."""

    def __init__(self, link: Link, admission: Admission, observe: Callable[[Generated], None]):
        """observe: told of every answer that is complete."""
        self._link = link
        self._admission = admission
        self._observe = observe
        self._asking = Admission(MAX_ASKING)
        self._schemas = SchemaCheck()
        self._numbers = itertools.count(1)

    def begin(self, parsed: ChatRequest, request_id: str) -> Generation:
        """Submit a request. The caller must `close` it.

        Raises Busy, EngineUnavailable, or Unsupported for a schema that cannot be enforced.
        """
        self._link.require_connected()
        if parsed.schema is not None:
            self._schemas.check(parsed.schema)
        ends_s, begins_s = self._expected()
        if begins_s is not None and begins_s > parsed.deadline_s:
            raise Busy(
                f"requests that came before keep the engine busy for about {begins_s:.0f} s, "
                f"longer than this one's deadline of {parsed.deadline_s:g} s",
                retry_after_s=begins_s - parsed.deadline_s,
            )
        slot = self._admission.enter(ends_s)
        ticket = f"{request_id}#{next(self._numbers)}"  # unique, whatever ids clients choose
        message = Generate(
            request_id=ticket,
            model=parsed.model.id,
            messages=parsed.messages,
            prompt=parsed.prompt,
            sampling=parsed.sampling,
            schema=parsed.schema,
            stream=parsed.stream,
            deterministic=parsed.deterministic,
            keep_alive_s=parsed.keep_alive_s,
            deadline_s=parsed.deadline_s,
        )
        try:
            mailbox = self._link.submit(message)
        except BaseException:
            slot.leave(served=False)
            raise
        return Generation(self._link, mailbox, slot, parsed.deadline_s, self._observe)

    def _expected(self) -> tuple[float | None, float | None]:
        """Seconds until the engine's first answer ends and until a new request would begin, as it
        said; None where it cannot say."""
        view = self._link.view
        gauges = view.state.gauges if view.state is not None else {}
        age_s = time.monotonic() - view.seen_at
        ends_ms, begins_ms = gauges.get("first_end_ms"), gauges.get("begin_ms")
        return (
            max(0.0, ends_ms / 1000 - age_s) if ends_ms else None,
            max(0.0, begins_ms / 1000 - age_s) if begins_ms else None,
        )

    def render(self, parsed: ChatRequest, request_id: str) -> Rendered:
        """The prompt that `parsed` would run, as text and ids."""
        message = Render(
            request_id=f"{request_id}#{next(self._numbers)}",
            model=parsed.model.id,
            messages=parsed.messages,
            prompt=parsed.prompt,
        )
        reply = self._asked(message, parsed.deadline_s)
        assert isinstance(reply, Rendered)
        return reply

    def plan(self, parsed: ChatRequest, request_id: str) -> ChatPlanned:
        """What `parsed` would take, without running it. Raises as `begin`, and what the engine
        refuses it with."""
        if parsed.schema is not None:
            self._schemas.check(parsed.schema)
        message = PlanChat(
            request_id=f"{request_id}#{next(self._numbers)}",
            model=parsed.model.id,
            messages=parsed.messages,
            prompt=parsed.prompt,
            max_tokens=parsed.sampling.max_tokens,
            deterministic=parsed.deterministic,
        )
        reply = self._asked(message, parsed.deadline_s)
        assert isinstance(reply, ChatPlanned)
        return reply

    def _asked(self, message: Message, timeout_s: float) -> Message:
        self._link.require_connected()
        with self._asking.place():
            return ask(self._link, message, timeout_s)


class Generation:
    """A request on the engine, for the one thread that answers it."""

    def __init__(
        self,
        link: Link,
        mailbox: Mailbox,
        slot: Admission.Slot,
        deadline_s: float,
        observe: Callable[[Generated], None],
    ):
        self._observe = observe
        self._link = link
        self._mailbox = mailbox
        self._slot = slot
        self._deadline_s = deadline_s
        self._ends = time.monotonic() + deadline_s + ENGINE_GRACE_S
        self._done = False
        self._closed = False

    def wait(self, timeout_s: float, client: socket.socket | None) -> Token | Generated | None:
        """The next event, None after `timeout_s`.

        Raises what the engine raised, Cancelled when the client hung up, DeadlineExceeded when
        the engine should have answered and did not.
        """
        left_s = self._ends - time.monotonic()
        try:
            event = self._mailbox.wait(min(timeout_s, left_s), client)
        except HungUp as exc:
            raise Cancelled("the client hung up") from exc
        if event is None and left_s <= timeout_s:
            raise DeadlineExceeded(f"not complete within the deadline of {self._deadline_s:g} s")
        if isinstance(event, Failed):
            self._done = True
            raise errors.relayed(event)
        if isinstance(event, Generated):
            self._done = True
            self._observe(event)
        assert event is None or isinstance(event, Token | Generated)
        return event

    def result(self, client: socket.socket | None) -> Generated:
        """Wait for the end of the whole answer."""
        while True:
            event = self.wait(self._deadline_s + ENGINE_GRACE_S, client)
            if isinstance(event, Generated):
                return event

    def close(self) -> None:
        """Stop the engine's work if it is not done, and free the place. Once is enough."""
        if self._closed:
            return
        self._closed = True
        if not self._done:
            self._link.cancel(self._mailbox.request_id)
        self._link.release(self._mailbox)
        self._slot.leave(served=self._done)


def ask(link: Link, message: Message, timeout_s: float) -> Message:
    """Send a request that has one answer and wait for it; it is taken back when that takes too
    long. Raises what the engine raised."""
    mailbox = link.submit(message)
    try:
        reply = mailbox.wait(timeout_s + ENGINE_GRACE_S)
        if reply is None:
            link.cancel(mailbox.request_id)
    finally:
        link.release(mailbox)
    if isinstance(reply, Failed):
        raise errors.relayed(reply)
    if reply is None:
        raise DeadlineExceeded(f"the engine did not answer within {timeout_s:g} s")
    return reply


def blueprint(parser: ChatParser, chat: ChatService, stats: ChatStats) -> Blueprint:
    """POST /chat, /generate and /enhance, the last under four names."""
    bp = Blueprint("chat", __name__)

    def answer(text_key: str, max_tokens: int) -> ResponseReturnValue:
        body = read_json(request)
        if text_key == "enhanced_prompt":
            refuse_bare_prompt(body)
        parsed = parser.parse(body, max_tokens=max_tokens)
        stats.count(parsed)
        client = request.environ.get("gunicorn.socket")
        generation = chat.begin(parsed, g.request_id)
        if parsed.stream:
            return _stream(generation, parsed, text_key, client)
        try:
            return answer_body(generation.result(client), parsed, text_key, g.request_id)
        finally:
            generation.close()

    @bp.post("/chat")
    @bp.post("/generate")
    def chat_route() -> ResponseReturnValue:
        return answer("response", max_tokens=DEFAULT_MAX_TOKENS)

    @bp.post("/enhance")
    @bp.post("/enhance/sdxl")
    @bp.post("/enhance/wan")
    @bp.post("/enhance/universal")
    def enhance_route() -> ResponseReturnValue:
        return answer("enhanced_prompt", max_tokens=200)  # this route never says "response"

    return bp


def refuse_bare_prompt(body: Any) -> None:
    """Raise MessagesRequired for a prompt without messages: which system message and which limits
    it needs is decided by the program that calls, never here."""
    if not isinstance(body, dict) or body.get("messages") is not None:
        return
    bare = [key for key in ("prompt", "original_prompt") if isinstance(body.get(key), str)]
    if bare:
        raise MessagesRequired(
            f"{bare[0]} came without messages, and this worker runs only messages as they are; "
            f"send this body to POST {GATEWAY_ROUTE} of the prompt gateway (port 7862), which "
            "makes them, or send messages"
        )


def debug_blueprint(parser: ChatParser, chat: ChatService) -> Blueprint:
    """POST /debug/render: the exact prompt of a body, running nothing."""
    bp = Blueprint("debug", __name__)

    @bp.post("/debug/render")
    def render_route() -> ResponseReturnValue:
        body = read_json(request)
        if isinstance(body, dict) and "inputs" in body:
            parsed, _ = parser.parse_completion(body)
        else:
            parsed = parser.parse(body, max_tokens=DEFAULT_MAX_TOKENS)
        rendered = chat.render(parsed, g.request_id)
        messages = [(message.role, message.content) for message in parsed.messages]
        return {
            "success": True,
            "request_id": g.request_id,
            "model": parsed.model.id,
            "template": rendered.template,
            "prompt": rendered.text,
            "prompt_ids": rendered.ids,
            "prompt_tokens": len(rendered.ids),
            "context_tokens": rendered.context_tokens,
            "tokenizer_sha256": rendered.tokenizer_sha256,
            "prompt_ids_sha256": ids_sha256(rendered.ids),
            "messages_sha256": messages_sha256(messages) if messages else None,
            "ignored": list(parsed.ignored),
        }

    return bp


class ChatStats:
    """Counts that clients read in /health. Counters only; a lost update would cost one count."""

    def __init__(self) -> None:
        self.sfw_requests = 0
        self.base_model_uses = 0
        self.instruct_model_uses = 0

    def count(self, parsed: ChatRequest) -> None:
        self.sfw_requests += parsed.sfw_mode
        if is_base(parsed.model):
            self.base_model_uses += 1
        else:
            self.instruct_model_uses += 1


def is_base(spec: ModelSpec) -> bool:
    """Whether clients know this model as the base (not instruction-tuned) one."""
    return "qwen_base" in (spec.id, *spec.aliases)


def answer_body(
    done: Generated, parsed: ChatRequest, text_key: str, request_id: str
) -> dict[str, Any]:
    """The JSON of a finished answer: the contract's keys, then the proof."""
    engine_info: dict[str, Any] = {
        "model_name": parsed.model.display_name,
        "inference_engine": "pure",
        "active_model_type": "base" if is_base(parsed.model) else "instruct",
    }
    body: dict[str, Any] = {
        "success": True,
        text_key: done.text,
        "generation_time": round(done.prefill_s + done.decode_s, 4),
        "tokens_generated": done.completion_tokens,
        "model_info": engine_info,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "request_id": request_id,
        "timings": {
            "queue_s": round(done.queue_s, 4),
            "prefill_s": round(done.prefill_s, 4),
            "decode_s": round(done.decode_s, 4),
        },
        "receipt": {
            "request_id": request_id,
            **done.receipt,
            "ignored": list(parsed.ignored),
        },
    }
    if done.stop_string is not None:
        body["stop_string"] = done.stop_string
    if parsed.sfw_mode:
        body["sfw_mode"] = True
    if parsed.sfw_mode or text_key == "enhanced_prompt":
        engine_info["sfw_mode"] = parsed.sfw_mode
    return body


def _stream(
    generation: Generation, parsed: ChatRequest, text_key: str, client: socket.socket | None
) -> Response:
    """Server-sent events. What fails before the first event still gets its own status."""
    try:
        first = generation.wait(STREAM_STARTS_S, client)
    except BaseException:
        generation.close()
        raise
    request_id = g.request_id
    error_body = errors.body  # bound while the request's context is there

    def events() -> Iterator[str]:
        event = first
        index = 0
        try:
            while True:
                match event:
                    case None:
                        yield ": waiting\n\n"
                    case Token():
                        if event.text:
                            yield sse({"index": index, "text": event.text})
                            index += 1
                    case Generated():
                        yield sse(
                            {"done": True, **answer_body(event, parsed, text_key, request_id)}
                        )
                        yield "data: [DONE]\n\n"
                        return
                event = generation.wait(COMMENT_EVERY_S, client)
        except Cancelled:
            return
        except WorkerError as exc:
            yield sse(error_body(exc.code, str(exc)))
        finally:
            generation.close()

    answer = sse_response(events())
    # A stream that is closed before its first piece was asked for never enters `events`.
    answer.call_on_close(generation.close)
    return answer


def sse(data: dict[str, Any]) -> str:
    """One server-sent event with a JSON object."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def sse_response(events: Iterator[str]) -> Response:
    """A stream of events that no proxy holds back."""
    from flask import stream_with_context

    answer = Response(stream_with_context(events), mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-cache"
    answer.headers["X-Accel-Buffering"] = "no"
    return answer


def _sampling(body: dict[str, Any], max_tokens: int) -> Sampling:
    seed = whole_number("seed", body.get("seed"), None)
    if seed is None:
        seed = secrets.randbits(DRAWN_SEED_BITS)
    return Sampling(
        max_tokens=within(
            "max_tokens",
            whole_number("max_tokens", body.get("max_tokens"), max_tokens),
            1,
            MAX_TOKENS,
        ),
        temperature=_real(body, "temperature", 0.7, 0.0, 2.0),
        top_p=above_zero("top_p", real_number("top_p", body.get("top_p"), 0.9), 1.0),
        top_k=_optional_whole(body, "top_k", -1, 10_000_000),
        min_p=_optional_real(body, "min_p", 0.0, 1.0),
        repetition_penalty=_optional_real(body, "repetition_penalty", 0.01, 10.0),
        presence_penalty=_optional_real(body, "presence_penalty", -2.0, 2.0),
        frequency_penalty=_optional_real(body, "frequency_penalty", -2.0, 2.0),
        stop=_stops(body.get("stop")),
        seed=within("seed", seed, 0, 2**64 - 1),
    )


def _schema(value: Any) -> str | None:
    """The schema of a response_format, in OpenAI's shapes, as JSON text; None for text.

    Its keys stay in their order: an answer has its properties in it.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type":"object"}'
    if kind != "json_schema":
        raise InvalidRequest("response_format.type must be text, json_object or json_schema")
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequest("response_format.json_schema.schema must be an object: a JSON Schema")
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("response_format.json_schema.schema is no JSON: a number is too large "
                             "or it is too deep") from exc  # fmt: skip
    if len(text) > MAX_SCHEMA_CHARS:
        raise TooLarge(
            f"the schema has {len(text)} characters; allowed: at most {MAX_SCHEMA_CHARS}"
        )
    refuse_lone_surrogates("response_format", text)
    return text


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise OutOfRange(f"stop has {len(stops)} strings; allowed: at most {MAX_STOPS}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise OutOfRange(
                f"a stop string has {len(stop)} characters; allowed: 1 to {MAX_STOP_CHARS}"
            )
        refuse_lone_surrogates("stop", stop)
    return tuple(stops)


def _real(body: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    return float(within(name, real_number(name, body.get(name), default), least, most))


def _optional_real(body: dict[str, Any], name: str, least: float, most: float) -> float | None:
    if body.get(name) is None:
        return None
    return _real(body, name, 0.0, least, most)


def _optional_whole(body: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = whole_number(name, body.get(name), None)
    return None if value is None else int(within(name, value, least, most))


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false")
    return value

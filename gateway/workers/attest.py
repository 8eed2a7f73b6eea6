"""Whether a worker ran what it was sent: its receipt, recomputed from our side. Pure.

What is checked, against what was sent and never against what the worker says it got:

- a receipt is there, and carries the id of this very request (an earlier answer's does not);
- `messages_sha256` is the hash of the messages that were sent;
- `model` is the model that was asked for, or the worker lists the asked name among its aliases;
  weights, tokenizer and template are those that it lists for it;
- every sampling parameter in effect is the one sent, or the API's default where none was sent;
  the seed, the schema and the exactness likewise; `ignored` names nothing that was sent;
- `prompt_ids_sha256` and `prompt_tokens` are what we compute from the same tokenizer and template
  where we have the file, and else what this worker's weights, tokenizer and template gave for the
  same messages before;
- the counts and the finish reason of the answer are those of its receipt.

What cannot be seen: a worker that runs something else and writes the receipt of what was asked,
consistently, hashes and counts included. Nothing here proves that weights are what their hash says,
that the ids were really run with these parameters, or that the text is what the ids decode to.
Where the gateway lacks the tokenizer's file, an ids hash that is false from the first time on is
not seen either, because there is nothing to hold it against. Against such a worker only another
one helps that runs the same request with the same seed.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.prompts.digest import messages_sha256
from gateway.values.assembly import Message

# Of /chat and /generate; /enhance has 200 (docs/http-api.md, Chat).
MAX_TOKENS = 512
_DEFAULTS: Mapping[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "stop": None,
}
# Values that mean the same as null: off.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "stop": ([],),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request as it went to a worker."""

    request_id: str  # of this attempt alone
    messages: tuple[Message, ...]
    params: Mapping[str, Any] = field(default_factory=dict)  # as sent, without nulls
    max_tokens: int = MAX_TOKENS  # the route's default


@dataclass(frozen=True, slots=True)
class PromptIds:
    """Token ids of a prompt, as their hash and number."""

    sha256: str
    count: int

    @classmethod
    def of(cls, ids: Sequence[int]) -> PromptIds:
        """ids: 0 … 2**32 - 1 each; hashed as little-endian unsigned 32-bit integers."""
        return cls(hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest(), len(ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as a worker lists it (/worker/info). None: it does not say, or not yet."""

    id: str
    aliases: tuple[str, ...] = ()
    weights: str | None = None
    tokenizer_sha256: str | None = None
    template: str | None = None

    def answers_to(self, name: str) -> bool:
        """In any casing, as the worker takes names."""
        return name.lower() in {one.lower() for one in (self.id, *self.aliases)}


@dataclass(frozen=True, slots=True)
class Mismatch:
    code: str  # the receipt's field: "messages_sha256", "sampling.top_k", … or "no_receipt"
    detail: str = ""  # numbers and beginnings of hashes, for the log; never a text


@dataclass(frozen=True, slots=True)
class Attestation:
    ok: bool
    mismatches: tuple[Mismatch, ...] = ()

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(one.code for one in self.mismatches)


def attest(
    sent: Sent,
    answer: Mapping[str, Any],
    *,
    served: ServedModel | None = None,
    expected_ids: PromptIds | None = None,
) -> Attestation:
    """answer: the JSON object that came, with its receipt.

    served: the model that the receipt names, as the worker lists it; None, or another one, where
    that is not known: then only the asked name itself will do.
    expected_ids: computed here, or seen before; None: unknown.
    """
    receipt = answer.get("receipt")
    if not isinstance(receipt, dict):
        return Attestation(False, (Mismatch("no_receipt"),))
    found = (
        *_identity(sent, receipt),
        *_model(sent, receipt, served),
        *_sampling(sent, receipt),
        *_ids(receipt, expected_ids),
        *_ignored(sent, receipt),
        *_counts(sent, answer, receipt),
    )
    return Attestation(not found, found)


def _identity(sent: Sent, receipt: dict[str, Any]) -> Iterator[Mismatch]:
    if receipt.get("request_id") != sent.request_id:
        yield Mismatch("request_id", "the receipt is of another request")
    digest = messages_sha256(sent.messages)
    if receipt.get("messages_sha256") != digest:
        yield _differs("messages_sha256", digest, receipt.get("messages_sha256"))


def _model(sent: Sent, receipt: dict[str, Any], served: ServedModel | None) -> Iterator[Mismatch]:
    ran, asked = receipt.get("model"), sent.params.get("model")
    if not isinstance(ran, str) or not ran:
        yield Mismatch("model", "the receipt names none")
        return
    if served is not None and served.id != ran:
        served = None
    if asked is not None and ran.lower() != str(asked).lower():
        if served is None or not served.answers_to(str(asked)):
            yield Mismatch("model", "the receipt's model does not go by the name that was asked")
    for name in ("weights", "tokenizer_sha256", "template"):
        listed = getattr(served, name, None)
        if not isinstance(receipt.get(name), str):
            yield Mismatch(name, "not in the receipt")
        elif listed is not None and receipt[name] != listed:
            yield _differs(name, listed, receipt.get(name))


def _sampling(sent: Sent, receipt: dict[str, Any]) -> Iterator[Mismatch]:
    params = sent.params
    sampling = receipt.get("sampling")
    if not isinstance(sampling, dict):
        yield Mismatch("sampling", "not in the receipt")
        return
    wanted = {"max_tokens": sent.max_tokens, **_DEFAULTS}
    wanted |= {name: params[name] for name in wanted if params.get(name) is not None}
    for name, value in wanted.items():
        if name not in sampling or not _same(_plain(name, value), _plain(name, sampling[name])):
            yield _differs(f"sampling.{name}", value, sampling.get(name))
    for name in sampling:
        if name not in wanted and sampling[name] is not None:
            # A parameter that we do not know is in effect.
            yield Mismatch("sampling.unknown", "one that was not sent is in effect")
    seed = receipt.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int):
        yield Mismatch("seed", "not in the receipt")
    elif params.get("seed") is not None and seed != params["seed"]:
        yield _differs("seed", params["seed"], seed)
    schema = _schema_sha256(params.get("response_format"))
    if receipt.get("schema_sha256") != schema:
        yield _differs("schema_sha256", schema, receipt.get("schema_sha256"))
    if (wants := params.get("deterministic")) is not None:
        exactness = "bit" if wants else "close"
        if receipt.get("exactness") != exactness:
            yield _differs("exactness", exactness, receipt.get("exactness"))


def _ids(receipt: dict[str, Any], expected: PromptIds | None) -> Iterator[Mismatch]:
    digest, count = receipt.get("prompt_ids_sha256"), receipt.get("prompt_tokens")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        yield Mismatch("prompt_ids_sha256", "not in the receipt")
    elif expected is not None and digest != expected.sha256:
        yield _differs("prompt_ids_sha256", expected.sha256, digest)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        yield Mismatch("prompt_tokens", "not in the receipt")
    elif expected is not None and count != expected.count:
        yield _differs("prompt_tokens", expected.count, count)


def _ignored(sent: Sent, receipt: dict[str, Any]) -> Iterator[Mismatch]:
    ignored = receipt.get("ignored")
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        yield Mismatch("ignored", "not in the receipt")
        return
    mine = {"messages", *sent.params}
    # "messages[].name" and "parameters.x" are keys inside of what was sent.
    lost = sorted({name for name in ignored if re.split(r"[.\[]", name)[0] in mine})
    if lost:
        yield Mismatch("ignored", f"{len(lost)} of the keys that were sent")


def _counts(sent: Sent, answer: Mapping[str, Any], receipt: dict[str, Any]) -> Iterator[Mismatch]:
    for outer, inner in (
        ("prompt_tokens", "prompt_tokens"),
        ("tokens_generated", "completion_tokens"),
        ("finish_reason", "finish_reason"),
    ):
        if not _same(answer.get(outer), receipt.get(inner)):
            yield _differs(f"answer.{outer}", receipt.get(inner), answer.get(outer))
    most = sent.params.get("max_tokens") or sent.max_tokens
    made = receipt.get("completion_tokens")
    if isinstance(made, bool) or not isinstance(made, int) or not 0 <= made <= most:
        yield _differs("completion_tokens", f"0 to {most}", made)


def _schema_sha256(wanted: Any) -> str | None:
    """As a receipt has it: of the schema as JSON text, keys in their order."""
    if not isinstance(wanted, Mapping) or wanted.get("type") not in ("json_object", "json_schema"):
        return None
    schema: Any = {"type": "object"}
    if wanted["type"] == "json_schema":
        schema = (wanted.get("json_schema") or {}).get("schema")
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(name: str, value: Any) -> Any:
    """One spelling for values that mean the same."""
    if name == "stop" and isinstance(value, str):
        value = [value]
    elif name == "stop" and isinstance(value, tuple):
        value = list(value)
    return None if any(_same(value, off) for off in _OFF.get(name, ())) else value


def _same(left: Any, right: Any) -> bool:
    """Equal, and not as `True == 1` is."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def _differs(code: str, wanted: Any, found: Any) -> Mismatch:
    def shown(value: Any) -> str:
        if isinstance(value, str):
            return value[:12] if _SHA256.fullmatch(value) else f"a text of {len(value)}"
        if value is None or isinstance(value, int | float):
            return str(value)[:24]
        return type(value).__name__

    return Mismatch(code, f"expected {shown(wanted)}, found {shown(found)}")

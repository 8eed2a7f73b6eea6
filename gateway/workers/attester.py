"""Holds answers against what is known besides them: the worker's list of models, our own
tokenizers, and the hashes that came for the same messages before."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any, Protocol

from gateway.prompts.digest import messages_sha256
from gateway.values.assembly import Message
from gateway.workers.attest import Attestation, PromptIds, Sent, ServedModel, attest
from gateway.workers.chatml import TEMPLATE

log = logging.getLogger(__name__)

CAPACITY = 4096  # prompts that are remembered, about 500 bytes each

# Weights, tokenizer, template and messages, as hashes and names.
Key = tuple[str, str, str, str]


class PromptTokenizer(Protocol):
    """A ChatML tokenizer whose file we have (gateway/workers/chatml.py)."""

    @property
    def sha256(self) -> str:
        """Of its tokenizer.json."""

    def ids(self, messages: Iterable[Message]) -> list[int]: ...


class Lists(Protocol):
    """gateway/workers/served.py, for what is used here."""

    def model(self, worker_url: str, model_id: object, deadline: float) -> ServedModel | None: ...

    def refresh(self, worker_url: str, deadline: float) -> object: ...


class SeenIds:
    """Prompt ids by what they were made of, the last CAPACITY. Changed under the lock; any thread.

    The first one stays: a worker that changes its hashes is caught at each change.
    """

    def __init__(self, capacity: int = CAPACITY):
        self._capacity = capacity
        self._lock = Lock()
        self._seen: OrderedDict[Key, PromptIds] = OrderedDict()

    def get(self, key: Key) -> PromptIds | None:
        with self._lock:
            found = self._seen.get(key)
            if found is not None:
                self._seen.move_to_end(key)
            return found

    def add(self, key: Key, ids: PromptIds) -> None:
        with self._lock:
            self._seen.setdefault(key, ids)
            while len(self._seen) > self._capacity:
                self._seen.popitem(last=False)

    def __len__(self) -> int:
        with self._lock:
            return len(self._seen)


class Attester:
    """Attests answers. Keeps only `SeenIds`, which locks itself; any thread."""

    def __init__(
        self,
        lists: Lists,
        tokenizers: Iterable[PromptTokenizer] = (),
        seen: SeenIds | None = None,
    ):
        """tokenizers: of ChatML models whose files are here; matched to receipts by their hash."""
        self._lists = lists
        self._tokenizers = {one.sha256: one for one in tokenizers}
        self._seen = seen or SeenIds()

    def check(
        self, sent: Sent, answer: Mapping[str, Any], worker_url: str, deadline: float
    ) -> Attestation:
        """deadline: monotonic seconds, for asking the worker what it serves."""
        receipt = answer.get("receipt")
        if not isinstance(receipt, dict):
            return self._logged(attest(sent, answer), sent, worker_url)
        key = _key(sent, receipt)
        expected = self._expected(key, sent)
        served = self._lists.model(worker_url, receipt.get("model"), deadline)
        result = attest(sent, answer, served=served, expected_ids=expected)
        if set(result.codes) & {"weights", "tokenizer_sha256", "template"}:
            # The list may be of before the worker was restarted with another model.
            self._lists.refresh(worker_url, deadline)
            served = self._lists.model(worker_url, receipt.get("model"), deadline)
            result = attest(sent, answer, served=served, expected_ids=expected)
        if result.ok and key is not None and expected is None:
            ids = PromptIds(receipt["prompt_ids_sha256"], receipt["prompt_tokens"])
            self._seen.add(key, ids)
        return self._logged(result, sent, worker_url)

    def _expected(self, key: Key | None, sent: Sent) -> PromptIds | None:
        if key is None:
            return None
        _, tokenizer_sha256, template, _ = key
        tokenizer = self._tokenizers.get(tokenizer_sha256)
        if template == TEMPLATE and tokenizer is not None:
            return PromptIds.of(tokenizer.ids(sent.messages))
        return self._seen.get(key)

    def _logged(self, result: Attestation, sent: Sent, worker_url: str) -> Attestation:
        if not result.ok:
            told = "; ".join(f"{one.code} {one.detail}".strip() for one in result.mismatches)
            log.error("worker %s, request %s: %s", worker_url, sent.request_id, told)
        return result


def _key(sent: Sent, receipt: Mapping[str, Any]) -> Key | None:
    """None where the receipt does not say what its ids were made with."""
    made_with = [receipt.get(name) for name in ("weights", "tokenizer_sha256", "template")]
    if not all(isinstance(one, str) for one in made_with):
        return None
    weights, tokenizer, template = map(str, made_with)
    return (weights[:100], tokenizer[:100], template[:100], messages_sha256(sent.messages))

"""One generation from its message to its receipt."""

from __future__ import annotations

from typing import Any

from worker.engine.chat.arrivals import too_late
from worker.engine.chat.model import LanguageModel
from worker.engine.chat.sampling import Sampler
from worker.engine.chat.scheduler import TokenSequence
from worker.engine.chat.stop import StopScanner
from worker.engine.chat.tokenizer import TextDecoder
from worker.engine.host import Ticket
from worker.errors import ContextTooLong, InvalidRequest, OutOfDeviceMemory, WorkerError
from worker.protocol.messages import Generate, Generated
from worker.receipt import ids_sha256, messages_sha256, text_sha256


def answer_tokens(prompt_tokens: int, max_tokens: int, context_tokens: int) -> int:
    """That an answer may have at most. Raises InvalidRequest and ContextTooLong."""
    if not prompt_tokens:
        raise InvalidRequest("the prompt has no tokens, so there is nothing to continue")
    room = context_tokens - prompt_tokens
    if room < 1:
        raise ContextTooLong(prompt_tokens=prompt_tokens, context_tokens=context_tokens)
    return min(room, max_tokens)


class Request:
    """A `Generate` in work: its tokens, its text, its times. Engine thread only.

    Times are monotonic seconds.
    """

    def __init__(self, ticket: Ticket, message: Generate, model: LanguageModel, arrived: float):
        """Raises InvalidRequest, ContextTooLong or Unsupported."""
        self.ticket = ticket
        self.message = message
        self.model = model
        self.arrived = arrived
        self.ends = arrived + message.deadline_s
        _, prompt_ids, self.template = model.reader.read(message.messages, message.prompt)
        limit = answer_tokens(len(prompt_ids), message.sampling.max_tokens, model.context_tokens)
        self.sequence = TokenSequence(
            prompt_ids, limit,
            deterministic=message.deterministic, block_tokens=model.block_tokens,
        )  # fmt: skip
        grammar = model.reader.grammar(message.schema) if message.schema is not None else None
        self.sampler = Sampler(message.sampling, prompt_ids, grammar)
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.started = 0.0  # of its first pass
        self.first_token = 0.0
        self._decoder = TextDecoder()
        self._stops = StopScanner(message.sampling.stop)
        self._text: list[str] = []

    def too_late(self) -> WorkerError:
        """What it is told when its deadline has passed: whether it only waited for room."""
        model, sequence, deadline_s = self.model, self.sequence, self.message.deadline_s
        needed_bytes = model.pool_bytes_for(sequence)
        if needed_bytes <= model.pool_bytes:
            return too_late(deadline_s)
        return OutOfDeviceMemory(
            f"{self.message.model}: {sequence.prompt_tokens} tokens and up to {sequence.limit} of "
            f"an answer take {_mib(needed_bytes)} of the KV pool, of which others left "
            f"{_mib(model.pool_bytes)} of {_mib(model.whole_pool_bytes)}; the rest did not come "
            f"back within the deadline of {deadline_s:g} s",
            retry_after_s=5,
        )

    @property
    def completion_ids(self) -> list[int]:
        """Without the end token."""
        return self.sequence.ids[self.sequence.prompt_tokens :]

    def take(self, token: int) -> str:
        """Add a token; returns the new text that may be shown. May set `finish_reason`."""
        self.completion_tokens += 1
        reader, sequence = self.model.reader, self.sequence
        if token in reader.end_ids:
            text = self._finish("stop")
        else:
            sequence.ids.append(token)
            text = self._stops.feed(self._decoder.feed(reader.tokenizer.token_bytes(token)))
            if self._stops.found is not None:
                self.finish_reason = "stop"
            elif self.completion_tokens == sequence.limit:  # seen here, so no pass is wasted
                text += self._finish("length")
        self._text.append(text)
        return text

    def result(self, now: float) -> Generated:
        """The end of the request; its `finish_reason` is set."""
        assert self.finish_reason is not None
        return Generated(
            request_id=self.ticket.request_id,
            text="".join(self._text),
            finish_reason=self.finish_reason,
            stop_string=self._stops.found,
            prompt_tokens=self.sequence.prompt_tokens,
            completion_tokens=self.completion_tokens,
            receipt=self._receipt(),
            queue_s=self.started - self.arrived,
            prefill_s=self.first_token - self.started,
            decode_s=now - self.first_token,
        )

    def _finish(self, reason: str) -> str:
        """What was held back: an unfinished character, the beginning of a stop string."""
        text = self._stops.feed(self._decoder.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.found is not None else reason
        return text

    def _receipt(self) -> dict[str, Any]:
        message, sampling, model = self.message, self.message.sampling, self.model
        source = (
            {"prompt_sha256": text_sha256(message.prompt)}
            if message.prompt is not None
            else {"messages_sha256": messages_sha256((m.role, m.content) for m in message.messages)}
        )
        return {
            "model": message.model,
            "weights": model.weights,
            "tokenizer_sha256": model.reader.tokenizer.sha256,
            "template": self.template,
            **source,
            "prompt_ids_sha256": ids_sha256(self.sequence.ids[: self.sequence.prompt_tokens]),
            "completion_ids_sha256": ids_sha256(self.completion_ids),
            "prompt_tokens": self.sequence.prompt_tokens,
            "prompt_tokens_cached": self.sequence.cached,
            "completion_tokens": self.completion_tokens,
            "context_tokens": model.context_tokens,
            "finish_reason": self.finish_reason,
            "sampling": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "repetition_penalty": sampling.repetition_penalty,
                "presence_penalty": sampling.presence_penalty,
                "frequency_penalty": sampling.frequency_penalty,
                "stop": list(sampling.stop),
            },
            "schema_sha256": None if message.schema is None else text_sha256(message.schema),
            "seed": sampling.seed,
            "exactness": "bit" if message.deterministic else "close",
        }


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"

"""The chat engine: one request at a time, one token a step.

The interface is the one that batching will fill: `submit` and `cancel` between steps, `step` does
one round. Exactness does not depend on what waits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.catalog import Catalog, ModelSpec
from worker.engine.answers import answer, quietly
from worker.engine.chat.model import LanguageModel, PromptReader
from worker.engine.chat.sampling import Sampler
from worker.engine.chat.stop import StopScanner
from worker.engine.chat.tokenizer import TextDecoder
from worker.engine.host import Outbox, Report, Ticket
from worker.engine.residents import Residents
from worker.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    WorkerError,
)
from worker.protocol.messages import (
    Generate,
    Generated,
    LoadModel,
    Message,
    Render,
    Rendered,
    Token,
    UnloadModel,
    failed,
)
from worker.receipt import ids_sha256, messages_sha256, text_sha256

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    ticket: Ticket
    message: Message
    arrived: float  # monotonic


class _Running:
    """A request that is being generated."""

    def __init__(self, ticket: Ticket, message: Generate, model: LanguageModel, arrived: float):
        self.ticket = ticket
        self.message = message
        self.model = model
        self.reader = reader = model.reader
        self.arrived = arrived
        self.ends = arrived + message.deadline_s
        _, self.prompt_ids, self.template = reader.read(message.messages, message.prompt)
        self.room = reader.context_tokens - len(self.prompt_ids)
        if not self.prompt_ids:
            raise InvalidRequest("the prompt has no tokens, so there is nothing to continue")
        if self.room < 1:
            raise ContextTooLong(
                prompt_tokens=len(self.prompt_ids), context_tokens=reader.context_tokens
            )
        self.limit = min(self.room, message.sampling.max_tokens)
        self.sampler = Sampler(message.sampling, self.prompt_ids)
        self.decoder = TextDecoder()
        self.stops = StopScanner(message.sampling.stop)
        self.ids: list[int] = []
        self.text: list[str] = []
        self.cache: Any = None
        self.started = 0.0
        self.first_token = 0.0

    def take(self, token: int) -> str:
        """Remember a token that is not the end; return the text it completes."""
        self.ids.append(token)
        return self._show(self.decoder.feed(self.reader.tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """The last text: an unfinished character, and what a stop string held back."""
        if self.stops.found is not None:
            return ""
        return self._show(self.decoder.finish()) + self._remember(self.stops.finish())

    def _show(self, text: str) -> str:
        return self._remember(self.stops.feed(text))

    def _remember(self, text: str) -> str:
        self.text.append(text)
        return text


class ChatEngine:
    """Causal language models on one device.

    Thread-confined: every method runs on the engine thread (worker/engine/host.py).
    """

    def __init__(
        self,
        catalog: Catalog,
        preload: Sequence[str],
        device: torch.device,
        state_dir: Path,
        outbox: Outbox,
        clock: Callable[[], float] = time.monotonic,
    ):
        """preload: catalog ids that are loaded before the first request."""
        self._device = device
        self._state_dir = state_dir
        self._outbox = outbox
        self._clock = clock
        self._readers: dict[str, PromptReader] = {}
        self._models: Residents[LanguageModel] = Residents(
            catalog.specs, device, self._load, lambda: outbox.publish(self.report())
        )
        self._preload = deque(preload)
        self._waiting: deque[_Waiting] = deque()
        self._running: _Running | None = None
        self._requests_served = 0
        self._tokens_generated = 0

    # --- what the host calls -------------------------------------------------------------------

    def submit(self, ticket: Ticket, message: Message) -> None:
        """Take a request; every answer and error goes to the outbox."""
        if isinstance(message, Render):
            self._answer(ticket, lambda: self._render(message))
            return
        self._waiting.append(_Waiting(ticket, message, self._clock()))

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request, running or waiting; unknown ones are done already."""
        error = Cancelled("the client has gone")
        if self._running is not None and self._running.ticket == ticket:
            self._fail(ticket, error)
            self._running = None
            return
        for waiting in list(self._waiting):
            if waiting.ticket == ticket:
                self._waiting.remove(waiting)
                self._fail(ticket, error)

    def step(self) -> bool:
        """Do one round: load a model, begin a request, or make one token. False when idle."""
        if self._preload:
            model_id = self._preload.popleft()
            quietly(lambda: self._models.ensure(model_id))
        elif self._running is not None:
            self._advance(self._running)
        elif self._waiting:
            self._begin(self._waiting.popleft())
        else:
            return False
        return True

    def report(self) -> Report:
        """Status, models and counts, for the state that fronts see."""
        return self._models.report(
            more_to_load=bool(self._preload),
            active=int(self._running is not None),
            waiting=len(self._waiting),
            counters={
                "requests_served": self._requests_served,
                "tokens_generated": self._tokens_generated,
            },
        )

    # --- requests ------------------------------------------------------------------------------

    def _begin(self, waiting: _Waiting) -> None:
        ticket, message = waiting.ticket, waiting.message
        match message:
            case Generate():
                if not self._answer(
                    ticket, lambda: self._prefill(ticket, message, waiting.arrived)
                ):
                    self._running = None
            case LoadModel():
                self._answer(ticket, lambda: self._models.load_for(message))
            case UnloadModel():
                self._answer(ticket, lambda: self._models.unload_for(message))
            case _:
                log.error("the chat engine does not take %s", type(message).__name__)
                self._fail(ticket, InvalidRequest("the chat engine does not take this message"))

    def _prefill(self, ticket: Ticket, message: Generate, arrived: float) -> None:
        if self._clock() > arrived + message.deadline_s:
            raise _too_late(message.deadline_s)
        model = self._models.ensure(message.model)
        running = _Running(ticket, message, model, arrived)
        running.started = self._clock()
        logits, running.cache = model.start(running.prompt_ids)
        running.first_token = self._clock()
        self._running = running
        self._take(running, running.sampler.sample(logits))

    def _advance(self, running: _Running) -> None:
        def one_token() -> None:
            if self._clock() > running.ends:
                raise _too_late(running.message.deadline_s)
            logits, running.cache = running.model.step(running.ids[-1], running.cache)
            self._take(running, running.sampler.sample(logits))

        if not self._answer(running.ticket, one_token):
            self._running = None

    def _take(self, running: _Running, token: int) -> None:
        """Emit what a token means: text, or the end."""
        self._tokens_generated += 1
        if token in running.reader.end_ids:
            self._finish(running, "stop", completion_tokens=len(running.ids) + 1)
            return
        text = running.take(token)
        count = len(running.ids)
        self._send(
            running.ticket,
            Token(request_id=running.ticket.request_id, text=text, completion_tokens=count),
        )
        if running.stops.found is not None:
            self._finish(running, "stop", completion_tokens=count)
        elif count == running.limit:  # checked here, so no forward pass is wasted
            self._finish(running, "length", completion_tokens=count)

    def _finish(self, running: _Running, reason: str, *, completion_tokens: int) -> None:
        tail = running.finish()
        if running.stops.found is not None:
            reason = "stop"
        if tail:
            self._send(
                running.ticket,
                Token(
                    request_id=running.ticket.request_id,
                    text=tail,
                    completion_tokens=completion_tokens,
                ),
            )
        now = self._clock()
        self._requests_served += 1
        self._send(
            running.ticket,
            Generated(
                request_id=running.ticket.request_id,
                text="".join(running.text),
                finish_reason=reason,
                stop_string=running.stops.found,
                prompt_tokens=len(running.prompt_ids),
                completion_tokens=completion_tokens,
                receipt=self._receipt(running, reason, completion_tokens),
                queue_s=running.started - running.arrived,
                prefill_s=running.first_token - running.started,
                decode_s=now - running.first_token,
            ),
        )
        self._running = None

    def _receipt(self, running: _Running, reason: str, completion_tokens: int) -> dict[str, Any]:
        message, sampling = running.message, running.message.sampling
        source = (
            {"prompt_sha256": text_sha256(message.prompt)}
            if message.prompt is not None
            else {"messages_sha256": messages_sha256((m.role, m.content) for m in message.messages)}
        )
        return {
            "model": message.model,
            "weights": running.model.weights,
            "tokenizer_sha256": running.reader.tokenizer.sha256,
            "template": running.template,
            **source,
            "prompt_ids_sha256": ids_sha256(running.prompt_ids),
            "completion_ids_sha256": ids_sha256(running.ids),
            "prompt_tokens": len(running.prompt_ids),
            "completion_tokens": completion_tokens,
            "context_tokens": running.reader.context_tokens,
            "finish_reason": reason,
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
            "seed": sampling.seed,
            "exactness": "bit",
        }

    def _render(self, message: Render) -> Rendered:
        reader = self._reader(message.model)
        text, ids, template = reader.read(message.messages, message.prompt)
        return Rendered(
            request_id=message.request_id,
            text=text,
            ids=ids,
            template=template,
            tokenizer_sha256=reader.tokenizer.sha256,
            context_tokens=reader.context_tokens,
        )

    def _load(self, spec: ModelSpec) -> LanguageModel:
        return LanguageModel(spec, self._device, self._state_dir, self._reader(spec.id))

    def _reader(self, model_id: str) -> PromptReader:
        if model_id not in self._readers:
            self._readers[model_id] = PromptReader(self._models.spec(model_id))
        return self._readers[model_id]

    # --- answers -------------------------------------------------------------------------------

    def _answer(self, ticket: Ticket, work: Callable[[], Message | None]) -> bool:
        return answer(self._outbox, ticket, work)

    def _fail(self, ticket: Ticket, error: WorkerError) -> None:
        self._send(ticket, failed(ticket.request_id, error))

    def _send(self, ticket: Ticket, message: Message) -> None:
        self._outbox.send(ticket, message)


def _too_late(deadline_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"not complete within the deadline of {deadline_s:g} s")

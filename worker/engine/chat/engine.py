"""The chat engine: continuous batching.

A step is one forward pass: the scheduler plans it, the runner computes it, a token is drawn for
every sequence that is computed to its end, and what the tokens mean is sent.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from worker.catalog import Catalog, ModelSpec
from worker.engine.answers import answer
from worker.engine.chat.arrivals import Arrival, Arrivals
from worker.engine.chat.forecast import Answer, Forecast
from worker.engine.chat.model import LanguageModel
from worker.engine.chat.outlook import Outlook
from worker.engine.chat.passes import Logits, Pass, Passes
from worker.engine.chat.plans import planned
from worker.engine.chat.prompts import Prompts
from worker.engine.chat.request import Request
from worker.engine.chat.residency import Residency
from worker.engine.chat.scheduler import Piece
from worker.engine.chat.turns import Turns
from worker.engine.host import Outbox, Report, Ticket
from worker.engine.leases import Leases
from worker.engine.residents import Residents
from worker.errors import Cancelled, InvalidRequest, WorkerError
from worker.protocol.messages import (
    ChatPlanned,
    Generate,
    LoadModel,
    Message,
    ModelChanged,
    PlanChat,
    Render,
    Token,
    Tokens,
    UnloadModel,
    failed,
)
from worker.protocol.transport import Peer
from worker.vram.planner import Sizer
from worker.vram.sizes import Peaks

log = logging.getLogger(__name__)

# Totals of the engine's report. sequences_in_passes / passes is the mean batch;
# prompt_tokens_cached / prompt_tokens the share that the prefix cache saved.
COUNTERS = (
    "requests_served",
    "tokens_generated",
    "prompt_tokens",
    "prompt_tokens_cached",
    "passes",
    "sequences_in_passes",
    "tokens_computed",
    "passes_retried",
)


class ChatEngine:
    """Causal language models on one device, each with its own batch.

    Thread-confined: every method runs on the engine thread (worker/engine/host.py).
    """

    def __init__(
        self,
        catalog: Catalog,
        preload: Sequence[str],
        device: torch.device,
        state_dir: Path,
        outbox: Outbox,
        leases: Leases,
        peaks: Peaks,
        *,
        kv_bytes: int,
        max_running: int,
        compiles: bool,
        pinned: Sequence[str] = (),
        pinned_deterministic: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """preload: catalog ids that are loaded before the first request. kv_bytes, max_running:
        of each model. compiles: whether models are compiled, in the background, once all of
        `preload` are loaded. pinned: system prompts that are computed when a model is loaded and
        stay cached, in the lane that `pinned_deterministic` says."""
        self._outbox = outbox
        self._leases = leases
        self._clock = clock
        self._prompts = Prompts(catalog.specs)

        def load(spec: ModelSpec) -> LanguageModel:
            return LanguageModel(
                spec, device, state_dir, self._prompts.reader(spec.id),
                kv_bytes=kv_bytes, max_running=max_running,
            )  # fmt: skip

        self._models: Residents[LanguageModel] = Residents(
            catalog.specs, device, load, lambda: outbox.publish(self.report()), wake=outbox.wake
        )
        self._sizer = Sizer(peaks, device.type, kv_bytes=kv_bytes, max_running=max_running)
        self._residency = Residency(
            catalog.specs, self._models, device, leases, self._sizer, clock,
            preload=preload, compiled=state_dir / "compiled" if compiles else None,
            pinned=pinned, pinned_deterministic=pinned_deterministic,
        )  # fmt: skip
        self._arrivals = Arrivals()
        self._turns = Turns()
        self._counters = Counter[str]()
        self._passes = Passes(self._turns, self._end, self._counters)
        self._outlook = Outlook(max_running)

    # --- what the host calls -------------------------------------------------------------------

    def submit(self, ticket: Ticket, message: Message) -> None:
        """Take a request; every answer and error goes to the outbox."""
        if self._leases.take(message):
            return
        if isinstance(message, Render):
            self._answer(ticket, lambda: self._prompts.render(message))
            return
        if isinstance(message, PlanChat):
            self._answer(ticket, lambda: self._planned(message))
            return
        arrived = self._clock() if ticket.received is None else ticket.received
        self._arrivals.add(Arrival(ticket, message, arrived))

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request, running or waiting; unknown ones are done already."""
        error = Cancelled("the client has gone")
        if (request := self._turns.of_ticket(ticket)) is not None:
            self._end(request, error)
        for arrival in self._arrivals:
            if arrival.ticket == ticket:
                self._arrivals.remove(arrival)
                self._fail(ticket, error)
        self._residency.give_up_all_but(self._arrivals.models())

    def step(self) -> bool:
        """Do one round: bring a model, or one forward pass of one model. False when idle."""
        if not self._leases.connected:
            return False
        if self._residency.bring_the_first():
            return True
        self._residency.compile_one()
        began = self._arrivals.begin(self._begun)
        self._end_what_is_late()
        self._make_room()
        turn = self._schedule()
        if turn is None:
            return began or self._residency.pin_one()
        logits = self._forward(turn)
        tokens = self._sample(turn, logits)
        self._emit(turn, tokens)
        return True

    def finish(self) -> None:
        """Everything that can be said has been said."""

    def report(self) -> Report:
        """Status, models and counts, for the state that fronts see."""
        models = self._models.loaded()
        running = sum(model.scheduler.running for model in models)
        expected = self._expected()
        return self._models.report(
            more_to_load=self._residency.is_starting,
            active=running,
            waiting=len(self._arrivals) + len(self._turns) - running,
            counters={name: self._counters[name] for name in COUNTERS},
            gauges={
                "kv_blocks": sum(model.pool.count for model in models),
                "kv_blocks_used": sum(model.pool.used for model in models),
                "kv_blocks_cached": sum(model.pool.cached for model in models),
                "sequences_parked": sum(model.scheduler.parked for model in models),
                "first_end_ms": round(expected.first_end_s * 1000),
                "begin_ms": round(expected.begin_s * 1000),
                "models_compiled": sum(model.forward.compiled for model in models),
                **self._residency.gauges(),
            },
        )

    def _expected(self) -> Forecast:
        return self._outlook.expected(
            [model.scheduler for model in self._models.loaded()],
            self._arrivals, self._turns.models, self._clock(),
        )  # fmt: skip

    def _planned(self, message: PlanChat) -> ChatPlanned:
        name = message.model
        return planned(
            message, self._prompts.reader(name), self._sizer.chat_pool(self._models.spec(name)),
            self._models.get(name) if name in self._models else None,
            self._outlook, self._expected().begin_s,
        )  # fmt: skip

    # --- a step ----------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """For requests that are too long for a pool which was shrunk for others."""
        for model_id, model in self._residency.here():
            lane, too_long = self._residency.lane(model_id), model.scheduler.too_long
            if not too_long:
                lane.give_up_room()
            elif lane.leaving:  # there is no room to be had: they wait for its return instead
                for sequence in reversed(too_long):
                    self._put_back(self._turns.of(sequence))
            else:
                first = too_long[0]
                request_id = self._turns.of(first).message.request_id
                grow = partial(self._residency.make_room, model_id, first, request_id)
                self._passes.alone(first, grow)

    def _schedule(self) -> Pass | None:
        """The next model that can compute, and what; None where there is nothing to do."""
        began = self._clock()
        turn = self._turns.next()
        return None if turn is None else Pass(*turn, began)

    def _forward(self, turn: Pass) -> Logits:
        self._passes.move(turn.model, turn.plan)
        now = self._clock()
        for piece in turn.pieces:
            request = self._turns.of(piece.sequence)
            request.started = request.started or now
        return self._passes.forward(turn.model, turn.pieces)

    def _sample(self, turn: Pass, logits: Logits) -> list[tuple[Piece, int]]:
        return self._passes.sample(turn.model, logits)

    def _emit(self, turn: Pass, drawn: Sequence[tuple[Piece, int]]) -> None:
        """Send what the tokens of a pass mean: text, together for each peer, and then ends."""
        now = self._clock()
        # Models take turns, so for each of them a pass lasts as long as one of all of them.
        self._outlook.after_pass(
            (now - turn.began) * self._turns.models,
            turn.prompt_tokens, len(turn.pieces), turn.context,
        )  # fmt: skip
        texts: dict[Peer, list[Token]] = {}
        ended = []
        for piece, token in drawn:
            request = self._turns.of(piece.sequence)
            text = self._take(request, token, now)
            if request.message.stream and (text or request.finish_reason is None):
                texts.setdefault(request.ticket.peer, []).append(
                    Token(
                        request_id=request.ticket.request_id,
                        text=text,
                        completion_tokens=request.completion_tokens,
                    )
                )
            if request.finish_reason is not None:
                ended.append(request)
        for peer, tokens in texts.items():
            self._send(Ticket(peer, ""), Tokens(tokens=tuple(tokens)))
        for request in ended:
            self._counters["requests_served"] += 1
            self._outlook.after_answer(
                Answer(
                    request.completion_tokens, request.sequence.limit,
                    first_s=request.first_token - request.started,
                    rest_s=now - request.first_token,
                )
            )  # fmt: skip
            self._send(request.ticket, request.result(now))
            self._forget(request)

    def _take(self, request: Request, token: int, now: float) -> str:
        if not request.completion_tokens:
            request.first_token = now
            self._counters["prompt_tokens"] += request.sequence.prompt_tokens
            self._counters["prompt_tokens_cached"] += request.sequence.cached
        self._counters["tokens_generated"] += 1
        return request.take(token)

    # --- requests begin and end ------------------------------------------------------------------

    def _begun(self, arrival: Arrival, held: bool) -> bool:
        """Whether a message is done with, or begun. held: an earlier one of its model waits."""
        message, ticket = arrival.message, arrival.ticket
        match message:
            case Generate():
                if held:
                    self._residency.also_waits(message.model, message.request_id)
                    return False
                return self._begun_if_here(arrival, message.model, partial(self._begin, arrival))
            case LoadModel():
                if held or self._computes(message.model):
                    return False
                return self._begun_if_here(
                    arrival, message.model, partial(self._loaded, arrival, message)
                )
            case UnloadModel():
                if held or self._computes(message.model) or self._models.coming == message.model:
                    return False
                self._answer(ticket, partial(self._unload, message))
            case _:
                log.error("the chat engine does not take %s", type(message).__name__)
                error = InvalidRequest("the chat engine does not take this message")
                self._fail(ticket, error)
        return True

    def _begun_if_here(
        self, arrival: Arrival, model_id: str, begin: Callable[[], Message | None]
    ) -> bool:
        here = True

        def work() -> Message | None:
            nonlocal here
            if (error := arrival.too_late(self._clock())) is not None:
                raise error
            here = self._residency.is_here(model_id, arrival.ticket.request_id, arrival.pool_bytes)
            return begin() if here else None

        self._answer(arrival.ticket, work)
        return here

    def _begin(self, arrival: Arrival) -> None:
        message = arrival.message
        assert isinstance(message, Generate)
        model = self._models.ensure(message.model)
        if self._turns.add(Request(arrival.ticket, message, model, arrival.arrived)):
            self._residency.lane(message.model).use(busy=True)

    def _loaded(self, arrival: Arrival, message: LoadModel) -> Message:
        changed = self._residency.lane(message.model).here_since >= arrival.arrived
        return ModelChanged(
            request_id=message.request_id, model=message.model, changed=changed,
            seconds=self._clock() - arrival.arrived,
        )  # fmt: skip

    def _unload(self, message: UnloadModel) -> Message:
        reply = self._models.unload_for(message)
        self._residency.unloaded(message.model)
        return reply

    def _computes(self, model_id: str) -> bool:
        return any(request.message.model == model_id for request in self._turns)

    def _end_what_is_late(self) -> None:
        now = self._clock()
        for request in self._turns:
            if now > request.ends:
                self._end(request, request.too_late())
        for arrival in self._arrivals:  # for its model
            if (error := arrival.too_late(now)) is not None:
                self._arrivals.remove(arrival)
                self._fail(arrival.ticket, error)
        self._residency.give_up_all_but(self._arrivals.models())

    def _put_back(self, request: Request) -> None:
        needed_bytes = request.model.pool_bytes_for(request.sequence)
        self._arrivals.put_back(
            Arrival(request.ticket, request.message, request.arrived, pool_bytes=needed_bytes)
        )
        self._forget(request)

    def _end(self, request: Request, error: WorkerError) -> None:
        self._fail(request.ticket, error)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if self._turns.remove(request):
            self._residency.rests(request.message.model, request.message.keep_alive_s)

    # --- answers -------------------------------------------------------------------------------

    def _answer(self, ticket: Ticket, work: Callable[[], Message | None]) -> bool:
        return answer(self._outbox, ticket, work)

    def _fail(self, ticket: Ticket, error: WorkerError) -> None:
        self._send(ticket, failed(ticket.request_id, error))

    def _send(self, ticket: Ticket, message: Message) -> None:
        self._outbox.send(ticket, message)

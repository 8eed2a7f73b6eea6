"""The chat engine: continuous batching.

A step is one forward pass: the scheduler plans it, the runner computes it, a token is drawn for
every sequence that is computed to its end, and what the tokens mean is sent.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from worker.catalog import Catalog, ModelSpec
from worker.engine.answers import answer, quietly
from worker.engine.chat.forecast import Forecast, Pace, Work, forecast
from worker.engine.chat.forward import Forward
from worker.engine.chat.lane import Lane
from worker.engine.chat.model import LanguageModel, PromptReader
from worker.engine.chat.request import Request
from worker.engine.chat.sampling import NotANumber, draw
from worker.engine.chat.scheduler import Piece, Plan, TokenSequence
from worker.engine.device import translated
from worker.engine.host import Outbox, Report, Ticket
from worker.engine.leases import Leases
from worker.engine.residents import Residents
from worker.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    WorkerError,
)
from worker.log import request_scope
from worker.protocol.messages import (
    Generate,
    LoadModel,
    Message,
    ModelChanged,
    Render,
    Rendered,
    Token,
    Tokens,
    UnloadModel,
    Yield,
    failed,
)
from worker.protocol.transport import Peer
from worker.vram.planner import KV, WEIGHTS, ChatBytes, Sizer
from worker.vram.sizes import Peaks

log = logging.getLogger(__name__)

T = TypeVar("T")
FORECAST_EVERY_S = 0.1
COMPILE_AFTER_S = 20.0  # that a model has been here
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


@dataclass(frozen=True, slots=True)
class _Waiting:
    ticket: Ticket
    message: Message
    arrived: float  # monotonic


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
        self._device = device
        self._state_dir = state_dir
        self._outbox = outbox
        self._leases = leases
        self._kv_bytes = kv_bytes
        self._max_running = max_running
        self._compiles = compiles
        self._pinned = tuple(pinned)
        self._pinned_deterministic = pinned_deterministic
        self._clock = clock
        self._readers: dict[str, PromptReader] = {}
        self._models: Residents[LanguageModel] = Residents(
            catalog.specs, device, self._load, lambda: outbox.publish(self.report()),
            wake=outbox.wake,
        )  # fmt: skip
        self._preload = deque(preload)
        self._of_the_start = frozenset(preload)
        self._compiling: Forward | None = None
        self._sizer = Sizer(peaks, device.type, kv_bytes=kv_bytes, max_running=max_running)
        self._lanes = {
            spec.id: Lane(
                spec, partial(self._sizes, spec), leases, self,
                host_copy=LanguageModel.parks(device),
            )
            for spec in catalog.specs
        }  # fmt: skip
        self._arrived: deque[_Waiting] = deque()
        self._requests: dict[Ticket, Request] = {}
        self._of_sequence: dict[TokenSequence, Request] = {}
        self._turns: deque[LanguageModel] = deque()  # models with work, next one first
        self._counters = Counter[str]()
        self._pace = Pace()
        self._forecast = Forecast()
        self._forecast_until = 0.0

    # --- what the host calls -------------------------------------------------------------------

    def submit(self, ticket: Ticket, message: Message) -> None:
        """Take a request; every answer and error goes to the outbox."""
        if self._leases.take(message):
            return
        if isinstance(message, Render):
            self._answer(ticket, lambda: self._render(message))
            return
        arrived = self._clock() if ticket.received is None else ticket.received
        self._arrived.append(_Waiting(ticket, message, arrived))

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request, running or waiting; unknown ones are done already."""
        error = Cancelled("the client has gone")
        if ticket in self._requests:
            self._end(self._requests[ticket], error)
        for waiting in list(self._arrived):
            if waiting.ticket == ticket:
                self._arrived.remove(waiting)
                self._fail(ticket, error)
        self._give_up_unwanted_lanes()

    def step(self) -> bool:
        """Do one round: bring a model, or one forward pass of one model. False when idle."""
        if not self._leases.connected:
            return False
        if self._preload and self._brought_before_the_first_request():
            return True
        self._compile_what_is_loaded()
        began = self._begin_what_arrived()
        self._end_what_is_late()
        if not self._turns:
            return began
        started = self._clock()
        model, plan = self._next_turn()
        if not plan:
            return began
        self._move(model, plan)
        drawn = self._compute(model, plan.pieces)
        prompt_tokens = sum(p.end - p.begin for p in plan.pieces if not p.sequence.decoding)
        # Models take turns, so for each of them a pass lasts as long as one of all of them.
        seconds = (self._clock() - started) * len(self._turns)
        self._pace = self._pace.after_pass(seconds, prompt_tokens)
        self._emit(drawn)
        return True

    def finish(self) -> None:
        """Everything that can be said has been said."""

    def report(self) -> Report:
        """Status, models and counts, for the state that fronts see."""
        models = self._models.loaded()
        running = sum(model.scheduler.running for model in models)
        expected = self._expected()
        return self._models.report(
            more_to_load=bool(self._preload),
            active=running,
            waiting=len(self._arrived) + len(self._requests) - running,
            counters={name: self._counters[name] for name in COUNTERS},
            gauges={
                "kv_blocks": sum(model.pool.count for model in models),
                "kv_blocks_used": sum(model.pool.used for model in models),
                "kv_blocks_cached": sum(model.pool.cached for model in models),
                "sequences_parked": sum(model.scheduler.parked for model in models),
                "first_end_ms": round(expected.first_end_s * 1000),
                "begin_ms": round(expected.begin_s * 1000),
                "models_compiled": sum(model.forward.compiled for model in models),
                **self._on_device(),
            },
        )

    def _on_device(self) -> dict[str, int]:
        """Bytes that are held, and those of them that are reserved for passes and lie idle."""
        held = reserved = 0
        for name, lane in self._lanes.items():
            if lane.is_declared:
                held += self.held_bytes(lane.weights) + self.held_bytes(lane.kv)
                if name in self._models and self._models.get(name).pool.count:
                    reserved += lane.sizes.pass_peak
        return {"device_bytes_held": held, "device_bytes_reserved": reserved}

    def give_back(self, order: Yield) -> int | None:
        """What the broker asks for: bytes of a pool, or of a model on which nothing runs."""
        model_id, part = order.tenant.rsplit(".", 1)
        lane = self._lanes[model_id]
        if lane.granted or model_id not in self._models:  # it is being brought, or is not there
            return self.held_bytes(order.tenant)
        model = self._models.get(model_id)
        if order.kind in ("shrink", "grow"):
            self._resize(lane, model, order)
        elif not any(model.scheduler):
            self._take_away(lane, part)
        elif order.wait:
            lane.leaving = True
            return None
        return self.held_bytes(order.tenant)

    def held_bytes(self, tenant: str) -> int:
        """What is there now, by the model itself."""
        model_id, part = tenant.rsplit(".", 1)
        if model_id not in self._models:
            return 0
        model, sizes = self._models.get(model_id), self._lanes[model_id].sizes
        if part == WEIGHTS:
            return sizes.weights if model.on_device else 0
        return model.pool_bytes + sizes.pass_peak if model.pool.count else 0

    # --- where models are ------------------------------------------------------------------------

    def _brought_before_the_first_request(self) -> bool:
        """Whether something was done for the models that are loaded at start."""
        lane = self._lanes[self._preload[0]]
        if not lane.here:
            quietly(partial(lane.want, "start"))  # says so when it was refused
        if lane.granted:
            quietly(partial(self._bring, lane))
        if lane.wanted:
            return False  # for its lease, or while it is loaded
        self._preload.popleft()
        return True

    def _is_here(self, model_id: str, request_id: str) -> bool:
        """Whether a model can compute; asks for what it lacks. Raises what bringing it raises."""
        lane = self._lanes[model_id]
        if lane.here and not lane.leaving:
            return True
        if lane.leaving:
            return False
        if self._models.coming is not None and not lane.is_declared:
            return False  # to find its sizes a model is built, and only one may be at a time
        lane.want(request_id)
        if lane.granted:
            self._bring(lane)
        return lane.here

    def _bring(self, lane: Lane) -> None:
        """Put a model where its lease says, or begin to: loading goes on beside the passes of
        other models. Raises what loading raises."""
        model_id = lane.spec.id
        began = self._clock()
        there = model_id in self._models and self._models.get(model_id).on_device
        try:
            model = self._models.ensure_soon(model_id)
            if model is None:
                lane.loading_since = lane.loading_since or began
                return
            model.wake()
            woken = self._clock()
            had_a_pool = model.pool.count > 0
            model.resize(lane.pool_bytes())
            resized = self._clock()
            if not had_a_pool:
                model.pin(self._pinned, deterministic=self._pinned_deterministic)
        except Exception as exc:
            lane.loading_since = None
            if not isinstance(exc, torch.OutOfMemoryError):  # else its copy in host memory is good
                self._models.drop(model_id)
            if isinstance(exc, ModelUnavailable):
                self._models.broken(model_id, str(exc))
            lane.failed()
            for tenant in (lane.weights, lane.kv):  # also of what was there before
                self._leases.gave(tenant, self.held_bytes(tenant))
            raise
        weights_s = 0.0 if there else woken - (lane.loading_since or began)
        lane.loading_since = None
        lane.arrived(model.pool_bytes, now=resized, weights_s=weights_s, pool_s=resized - woken)

    def _take_away(self, lane: Lane, part: str) -> None:
        """A tenant leaves the device. Nothing runs on the model."""
        model = self._models.get(lane.spec.id)
        if part == KV:
            model.resize(0)
        elif model.can_park:
            model.park()
        else:
            self._models.drop(lane.spec.id)
            self._leases.gave(lane.kv, 0)  # the pool went with the object
        lane.left()

    def _resize(self, lane: Lane, model: LanguageModel, order: Yield) -> None:
        """Another size for a pool; at least what the longest of its sequences may need."""
        wanted = max(order.held_bytes - lane.sizes.pass_peak, model.needed_pool_bytes)
        if order.kind == "shrink":
            model.resize(min(model.pool_bytes, wanted))
            return
        model.resize(wanted)
        if not any(model.scheduler):  # what was pinned may have gone, or had no room before
            model.pin(self._pinned, deterministic=self._pinned_deterministic)

    def _unloaded(self, model_id: str) -> None:
        """By hand: the memory goes back, and the lease with it."""
        lane = self._lanes[model_id]
        lane.left()
        if lane.is_declared:
            for tenant in (lane.weights, lane.kv):
                self._leases.gave(tenant, 0)

    def _give_up_unwanted_lanes(self) -> None:
        wanted = {waiting.message.model for waiting in self._arrived}  # type: ignore[attr-defined]
        for model_id, lane in self._lanes.items():
            if not lane.wanted or model_id in wanted or model_id in self._preload:
                continue
            if self._models.coming == model_id:  # it has the memory until it is loaded
                quietly(partial(self._bring, lane))
            else:
                lane.give_up()

    def _sizes(self, spec: ModelSpec) -> ChatBytes:
        """Raises ModelUnavailable."""
        self._models.require_files(spec.id)
        return self._sizer.chat(spec)

    # --- requests ------------------------------------------------------------------------------

    def _begin_what_arrived(self) -> bool:
        """Messages in order of arrival; one that waits for its model, or changes it, holds back
        later ones of it."""
        later: deque[_Waiting] = deque()
        held: set[str] = set()
        began = False
        while self._arrived:
            waiting = self._arrived.popleft()
            begun = self._began(waiting, held)
            began |= begun
            if not begun:
                held.add(waiting.message.model)  # type: ignore[attr-defined]
                later.append(waiting)
        self._arrived = later
        return began

    def _began(self, waiting: _Waiting, held: set[str]) -> bool:
        """Whether a message is done with, or begun; one of a model in `held` has to wait."""
        message, ticket = waiting.message, waiting.ticket
        match message:
            case Generate():
                if message.model in held:
                    self._tell_that_it_waits(message)
                    return False
                return self._begun_if_here(waiting, message.model, partial(self._begin, waiting))
            case LoadModel():
                if not self._is_free(message.model, held):
                    return False
                return self._begun_if_here(
                    waiting, message.model, partial(self._loaded, waiting, message)
                )
            case UnloadModel():
                if self._models.coming == message.model or not self._is_free(message.model, held):
                    return False
                self._answer(ticket, partial(self._unload, message))
            case _:
                log.error("the chat engine does not take %s", type(message).__name__)
                error = InvalidRequest("the chat engine does not take this message")
                self._fail(ticket, error)
        return True

    def _begun_if_here(
        self, waiting: _Waiting, model_id: str, begin: Callable[[], Message | None]
    ) -> bool:
        here = True

        def work() -> Message | None:
            nonlocal here
            self._require_time(waiting)
            here = self._is_here(model_id, waiting.ticket.request_id)
            return begin() if here else None

        self._answer(waiting.ticket, work)
        return here

    def _tell_that_it_waits(self, message: Generate) -> None:
        lane = self._lanes[message.model]
        if lane.wanted and not lane.granted:
            lane.also(message.request_id)

    def _loaded(self, waiting: _Waiting, message: LoadModel) -> Message:
        changed = self._lanes[message.model].here_since >= waiting.arrived
        return ModelChanged(
            request_id=message.request_id, model=message.model, changed=changed,
            seconds=self._clock() - waiting.arrived,
        )  # fmt: skip

    def _unload(self, message: UnloadModel) -> Message:
        reply = self._models.unload_for(message)
        self._unloaded(message.model)
        return reply

    def _is_free(self, model_id: str, held: set[str]) -> bool:
        return model_id not in held and all(
            request.message.model != model_id for request in self._requests.values()
        )

    def _require_time(self, waiting: _Waiting) -> None:
        """Raises DeadlineExceeded for a request whose time is over before it begins."""
        message = waiting.message
        if isinstance(message, Generate):
            if self._clock() > waiting.arrived + message.deadline_s:
                raise _too_late(message.deadline_s)

    def _begin(self, waiting: _Waiting) -> None:
        message = waiting.message
        assert isinstance(message, Generate)
        model = self._models.ensure(message.model)
        request = Request(waiting.ticket, message, model, waiting.arrived)
        self._requests[waiting.ticket] = request
        self._of_sequence[request.sequence] = request
        model.scheduler.add(request.sequence)
        if model not in self._turns:
            self._turns.append(model)
            self._lanes[message.model].use(busy=True)

    def _end_what_is_late(self) -> None:
        now = self._clock()
        for request in [one for one in self._requests.values() if now > one.ends]:
            self._end(request, _too_late(request.message.deadline_s))
        for waiting in list(self._arrived):  # for its model
            message = waiting.message
            if isinstance(message, Generate) and now > waiting.arrived + message.deadline_s:
                self._arrived.remove(waiting)
                self._fail(waiting.ticket, _too_late(message.deadline_s))
        self._give_up_unwanted_lanes()

    def _next_turn(self) -> tuple[LanguageModel, Plan]:
        """The next model that can compute, and its pass; an empty one where all wait for room."""
        for _ in range(len(self._turns)):
            model = self._turns[0]
            self._turns.rotate(-1)
            if plan := model.scheduler.plan():
                break
        return model, plan

    def _move(self, model: LanguageModel, plan: Plan) -> None:
        """Park and resume; a sequence whose keys and values cannot be moved fails alone."""
        for sequence, blocks in plan.park:
            self._alone(sequence, partial(model.runner.park, sequence, blocks))
        for sequence in plan.resume:
            self._alone(sequence, partial(model.runner.resume, sequence))
        plan.pieces = [piece for piece in plan.pieces if piece.sequence in self._of_sequence]

    def _compute(self, model: LanguageModel, pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
        """One pass: the next token of each sequence that is computed to its end."""
        if not pieces:
            return []
        now = self._clock()
        for piece in pieces:
            request = self._of_sequence[piece.sequence]
            request.started = request.started or now
        try:
            with translated():
                drawn = self._pass(model, pieces)
        except WorkerError as exc:
            log.warning(
                "a pass over %d sequences failed (%s); computing each of them alone",
                len(pieces),
                exc,
            )
            self._counters["passes_retried"] += 1
            drawn = {}
            for piece in pieces:
                drawn |= self._alone(piece.sequence, partial(self._pass, model, [piece])) or {}
        tokens = []
        for piece, token in drawn.items():
            if isinstance(token, NotANumber):
                # Zero times a NaN is one: it would reach whoever has these blocks next.
                model.runner.wipe(model.scheduler.distrust(piece.sequence))
            else:
                model.scheduler.computed(piece)
            if isinstance(token, WorkerError):
                self._end(self._of_sequence[piece.sequence], token)
            elif token is not None:
                tokens.append((piece, token))
        self._counters["passes"] += 1
        self._counters["sequences_in_passes"] += len(pieces)
        self._counters["tokens_computed"] += sum(piece.end - piece.begin for piece in drawn)
        return tokens

    def _pass(
        self, model: LanguageModel, pieces: Sequence[Piece]
    ) -> dict[Piece, int | WorkerError | None]:
        """Forward and draw; None for a piece that does not reach its sequence's end."""
        logits = model.runner.run(pieces)
        found: dict[Piece, int | WorkerError | None] = dict.fromkeys(pieces)
        sampled = [piece for piece in pieces if piece.samples]
        if sampled:
            samplers = [self._of_sequence[piece.sequence].sampler for piece in sampled]
            found |= zip(sampled, draw(torch.stack(logits), samplers), strict=True)
        return found

    def _alone(self, sequence: TokenSequence, work: Callable[[], T]) -> T | None:
        """Work for one sequence; when it raises, that sequence's request ends and no other."""
        request = self._of_sequence[sequence]
        try:
            with request_scope(request.ticket.request_id), translated():
                return work()
        except WorkerError as exc:
            self._end(request, exc)
            return None

    def _emit(self, drawn: Sequence[tuple[Piece, int]]) -> None:
        """Send what the tokens of a pass mean: text, together for each peer, and then ends."""
        texts: dict[Peer, list[Token]] = {}
        ended = []
        now = self._clock()
        for piece, token in drawn:
            request = self._of_sequence[piece.sequence]
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
            self._pace = self._pace.after_answer(request.completion_tokens, request.sequence.limit)
            self._send(request.ticket, request.result(now))
            self._forget(request)

    def _take(self, request: Request, token: int, now: float) -> str:
        if not request.completion_tokens:
            request.first_token = now
            self._counters["prompt_tokens"] += request.sequence.prompt_tokens
            self._counters["prompt_tokens_cached"] += request.sequence.cached
        self._counters["tokens_generated"] += 1
        return request.take(token)

    def _end(self, request: Request, error: WorkerError) -> None:
        self._fail(request.ticket, error)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        model = request.model
        del self._requests[request.ticket], self._of_sequence[request.sequence]
        model.runner.forget(request.sequence)
        model.scheduler.remove(request.sequence)
        if not any(model.scheduler):
            self._turns.remove(model)
            model.pool.check()
            assert model.pool.used == 0, "blocks are used by no sequence"
            self._rests(self._lanes[request.message.model], request.message.keep_alive_s)

    def _rests(self, lane: Lane, keep_alive_s: float | None) -> None:
        """Nothing runs on a model any more. keep_alive_s: as its last request wished."""
        lane.use(busy=False, keep_alive_s=keep_alive_s)
        if lane.leaving:
            for part in (lane.weights, lane.kv):
                if self._leases.is_wanted(part) is not None:
                    if lane.spec.id in self._models:
                        self._take_away(lane, part.rsplit(".", 1)[1])
                    self._leases.gave(part, self.held_bytes(part))

    def _expected(self) -> Forecast:
        """Of all models together: as exact as the places of the fullest one allow."""
        now = self._clock()
        if now >= self._forecast_until:
            self._forecast_until = now + FORECAST_EVERY_S
            running: list[Work] = []
            waiting = [_new_work(one.message) for one in self._arrived]
            for model in self._models.loaded():
                for index, sequence in enumerate(model.scheduler):
                    group = running if index < model.scheduler.running else waiting
                    group.append(_work(sequence))
            places = self._max_running * max(1, len(self._turns))
            self._forecast = forecast(running, waiting, places, self._pace)
        return self._forecast

    def _compile_what_is_loaded(self) -> None:
        """One model at a time: those of the start first, another once it has been here a while,
        because compiling takes a core for seconds and the model may leave again."""
        # On a card the time goes into the kernels' launches, which CUDA graphs save.
        if not self._compiles or self._device.type != "cpu" or self._preload:
            return
        if self._compiling is not None and self._compiling.is_compiling:
            return
        now = self._clock()
        for name, lane in self._lanes.items():
            stays = name in self._of_the_start or now - lane.here_since >= COMPILE_AFTER_S
            if lane.here and stays:
                forward = self._models.get(name).forward
                forward.compile_in_background(self._state_dir / "compiled")
                if forward.is_compiling:
                    self._compiling = forward
                    return

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
        return LanguageModel(
            spec,
            self._device,
            self._state_dir,
            self._reader(spec.id),
            kv_bytes=self._kv_bytes,
            max_running=self._max_running,
        )

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


def _work(sequence: TokenSequence) -> Work:
    done = len(sequence.ids) - sequence.prompt_tokens
    left = 0 if done else sequence.prompt_tokens - sequence.computed
    return Work(prompt_tokens=left, done=done, allowed=sequence.limit)


def _new_work(message: Message) -> Work:
    allowed = message.sampling.max_tokens if isinstance(message, Generate) else 1
    return Work(prompt_tokens=0, done=0, allowed=allowed)


def _too_late(deadline_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"not complete within the deadline of {deadline_s:g} s")

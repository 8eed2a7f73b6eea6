"""Enhancement: a short prompt in, the finished prompt for an image or video model out.

Tuple → messages → model → receipt checked → fitted to the encoder's limit. What comes in is never
given back as if it were enhanced: without an answer there is an error, or, where the caller allows
its own words, those with the strategy `original_fallback` and the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from gateway.cache.holder import Held
from gateway.content.detect import detect
from gateway.errors import GatewayError, Invalid, NotFound, PromptRefused
from gateway.flows.call import Assemble, Call, LogSink, Models, PromptSource
from gateway.flows.fit import Fitted, fit
from gateway.flows.record import Record, recording
from gateway.flows.refusing import refuse, refuse_answer
from gateway.flows.trace import held_json, steps_json, trace_json
from gateway.models.runner import Answer
from gateway.prompts.mode import decide_mode
from gateway.prompts.variables import find_character
from gateway.values.assembly import Assembled, AssembleRequest, Counters, Step
from gateway.values.rows import NSFW, Snapshot

ROUTE = "/enhance"  # of our worker
COMPRESSION = "compression"  # the use case whose template shortens an answer
MODIFY = "modify"  # the use case whose template is the whole answer, without a model
# What the strategy says of the prompts it used, by fallback level: names that clients know.
STRATEGIES = ("template_db", "template_cached", "template_emergency")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnhanceInput:
    """An enhancement as it is asked for."""

    prompt: str
    target_model: str  # sdxl | wan | universal | a provider model's key
    media: str  # image | video
    job_type: str  # as the caller named it, for the answer
    format: str
    quality: str = "fast"  # fast | high
    content_mode: str | None = None
    character_id: str | None = None
    tags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None  # which language model; None: the default
    params: Mapping[str, Any] = field(default_factory=dict)
    # What becomes the answer without a model: an exact copy's earlier prompt.
    exact_copy: str | None = None
    is_exact_copy: bool = False
    is_modify: bool = False  # keep the reference's subject, change what the prompt says
    allow_original: bool = False  # the caller takes its own words where no model answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Enhanced:
    """The finished prompt and everything that is said about it."""

    original: str
    prompt: str
    strategy: str
    metadata: Mapping[str, Any]
    trace: Mapping[str, Any]
    template_name: str
    content_mode: str
    execution_time_ms: float
    held: Held

    def body(self) -> dict[str, Any]:
        """As the edge function answers, and the trace."""
        return {
            "success": True,
            "original_prompt": self.original,
            "enhanced_prompt": self.prompt,
            "enhancement_strategy": self.strategy,
            "enhancement_metadata": dict(self.metadata),
            "trace": dict(self.trace),
        }


class Enhancer:
    """Holds the parts and no state of requests; any thread."""

    def __init__(
        self,
        prompts: PromptSource,
        assemble: Assemble,
        counters: Counters,
        models: Models,
        log: LogSink,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        """clock: monotonic seconds. wall: aware times, for the log."""
        self._prompts = prompts
        self._assemble = assemble
        self._counters = counters
        self._models = models
        self._log = log
        self._clock = clock
        self._wall = wall

    def enhance(self, asked: EnhanceInput, call: Call) -> Enhanced:
        """Raises what resolution, the model and its worker raise; PromptRefused for any of the
        texts, the answer's included."""
        with recording(self._log, call, self._clock, self._wall) as record:
            if not asked.prompt.strip() and not (asked.is_exact_copy or asked.is_modify):
                raise Invalid("the prompt is empty; send the text to be enhanced")
            held = self._prompts.held(call.min_revision)
            record.held(held)
            refuse([asked.prompt, asked.exact_copy or "", *asked.tags, *asked.variables.values()])
            if asked.is_exact_copy:
                return self._copied(asked, call, held)
            try:
                return self._resolved(asked, call, held, record)
            except PromptRefused:
                raise
            except GatewayError as exc:
                if not asked.allow_original:
                    raise
                record.flag("original_fallback", exc.code)
                return self._original(asked, call, held, exc)

    # --- the ways to an answer -----------------------------------------------------------------

    def _resolved(self, asked: EnhanceInput, call: Call, held: Held, record: Record) -> Enhanced:
        request = self._request(asked, call)
        assembled = self._assemble(held.snapshot, request)
        record.assembled(held, request, assembled)
        if asked.is_modify:
            return self._modified(asked, call, held, assembled, record)
        answers = [self._ask(assembled, call)]
        record.answered(answers[0])
        if assembled.effective().get("second_pass"):
            # In the mode that was decided: the detector would judge the model's words, not the
            # caller's.
            following = replace(
                request, prompt=answers[0].text, explicit_mode=assembled.content_mode
            )
            again = self._assemble(held.snapshot, following)
            answers.append(self._ask(again, call))
            record.answered(answers[-1])
        shorter: list[Answer] = []

        def ask_shorter(text: str, limit: int) -> str | GatewayError:
            try:
                answer = self._shorten(text, limit, asked, call, held, assembled.content_mode)
            except PromptRefused:
                raise
            except GatewayError as exc:
                # There is an answer, and it can be cut; the steps say why it was.
                record.flag("compression_not_asked", exc.code)
                return exc
            shorter.append(answer)
            return answer.text

        fitted = fit(answers[-1].text, assembled, self._counters, ask_shorter)
        for answer in shorter:
            record.answered(answer)
        refuse_answer(assembled, _brought(asked), fitted.text)
        record.fitted(fitted.tokens, fitted.compressed)
        flags = [*held.flags, *(flag for one in (*answers, *shorter) for flag in one.flags)]
        trace = trace_json(held, assembled, [*answers, *shorter], fitted.steps, flags)
        record.trace = trace
        strategy = STRATEGIES[held.level]
        return self._finish(asked, call, held, fitted, strategy, trace, assembled, answers[-1])

    def _modified(
        self, asked: EnhanceInput, call: Call, held: Held, assembled: Assembled, record: Record
    ) -> Enhanced:
        """The user message of the `modify` template is the finished prompt; no model is asked."""
        text, strategy = assembled.messages[-1].content, "reference_modify_with_prompt"
        if not asked.prompt.strip():
            # Nothing follows what the template ends its own words with.
            text, strategy = text.rstrip(" ,;"), "reference_modify_base_only"
        fitted = fit(text, assembled, self._counters, None)
        refuse_answer(assembled, _brought(asked), fitted.text)
        record.fitted(fitted.tokens, fitted.compressed)
        trace = trace_json(held, assembled, (), fitted.steps, held.flags)
        record.trace = trace
        return self._finish(asked, call, held, fitted, strategy, trace, assembled, None)

    def _copied(self, asked: EnhanceInput, call: Call, held: Held) -> Enhanced:
        text = asked.exact_copy if asked.exact_copy is not None else asked.prompt
        return self._plain(
            asked,
            call,
            held,
            text,
            "skip_for_exact_copy",
            {"exact_copy_mode": True, "template_name": "skip", "token_count": 0},
            Step(step="mode", outcome="exact_copy", why="an exact copy takes no new prompt"),
        )

    def _original(
        self, asked: EnhanceInput, call: Call, held: Held, error: GatewayError
    ) -> Enhanced:
        return self._plain(
            asked,
            call,
            held,
            asked.prompt,
            "original_fallback",
            {
                "template_name": "none",
                "model_used": "none",
                "fallback_reason": error.code,
                "fallback_error": str(error),
            },
            Step(step="fallback", outcome="original", why=str(error), detail={"code": error.code}),
        )

    # --- parts ---------------------------------------------------------------------------------

    def _request(self, asked: EnhanceInput, call: Call) -> AssembleRequest:
        caller = call.caller
        return AssembleRequest(
            prompt=asked.prompt,
            target_model=asked.target_model,
            job_type=asked.media,
            use_case=MODIFY if asked.is_modify else "enhancement",
            explicit_mode=asked.content_mode,
            user_mode=caller.content_mode,
            may_use_nsfw=caller.may_use_nsfw,
            character_id=asked.character_id,
            quality=asked.quality,
            user_tier=caller.tier,
            tags=asked.tags,
            variables=asked.variables,
            model=asked.model,
            task="enhancement",
            params=asked.params,
            user_id=caller.user_id,
        )

    def _ask(self, assembled: Assembled, call: Call) -> Answer:
        now = self._clock()
        params = {
            name: value for name, value in assembled.effective().items() if name != "second_pass"
        }
        return self._models.run(
            assembled.models,
            assembled.messages,
            params,
            deadline_s=call.began + call.deadline_s - now,
            request_id=call.request_id,
            now=now,
            route=ROUTE,
        )

    def _shorten(
        self, text: str, limit: int, asked: EnhanceInput, call: Call, held: Held, mode: str
    ) -> Answer:
        """The model's shorter version, in the mode that was decided. Raises TemplateNotFound where
        there is no template for it."""
        request = replace(
            self._request(asked, call),
            prompt=text,
            use_case=COMPRESSION,
            variables={**asked.variables, "limit": str(limit)},
            explicit_mode=mode,
            character_id=None,
            params={},
        )
        return self._ask(self._assemble(held.snapshot, request), call)

    def _finish(
        self,
        asked: EnhanceInput,
        call: Call,
        held: Held,
        fitted: Fitted,
        strategy: str,
        trace: Mapping[str, Any],
        assembled: Assembled,
        answer: Answer | None,
    ) -> Enhanced:
        live = assembled.template.live
        is_modify = asked.is_modify
        metadata = {
            "template_name": "modify_flow" if is_modify else assembled.template.template_name,
            "template_version": live.version,
            "content_mode": assembled.content_mode,
            "mode_source": assembled.mode_source,
            "model_used": answer.model_key if answer else "none",
            "model_source": answer.source if answer else None,
            "model_fallback": answer.fallback if answer else False,
            "token_count": fitted.tokens,
            "token_limit": fitted.limit,
            "tokens_exact": fitted.is_exact,
            "compression_applied": fitted.compressed,
            "negative_prompt": assembled.negative,
        }
        return self._whole(asked, call, held, fitted.text, strategy, metadata, trace)

    def _plain(
        self,
        asked: EnhanceInput,
        call: Call,
        held: Held,
        text: str,
        strategy: str,
        metadata: Mapping[str, Any],
        step: Step,
    ) -> Enhanced:
        trace = {**held_json(held), "flags": list(held.flags), "steps": steps_json([step])}
        defaults = {
            "content_mode": mode_of(held.snapshot, self._request(asked, call)),
            "token_count": self._counters.of(None).count(text),
            "model_used": "none",
            "compression_applied": False,
        }
        metadata = {**defaults, **metadata}
        return self._whole(asked, call, held, text, strategy, metadata, trace)

    def _whole(
        self,
        asked: EnhanceInput,
        call: Call,
        held: Held,
        text: str,
        strategy: str,
        metadata: Mapping[str, Any],
        trace: Mapping[str, Any],
    ) -> Enhanced:
        elapsed_ms = (self._clock() - call.began) * 1000
        original = len(asked.prompt)
        whole = {
            "original_length": original,
            "enhanced_length": len(text),
            "expansion_percentage": f"{len(text) / original * 100:.1f}" if original else "0.0",
            "job_type": asked.job_type,
            "format": asked.format,
            "quality": asked.quality,
            **metadata,
            "fallback_level": held.level,
            "cache_hit": held.cache_hit,
            "execution_time_ms": round(elapsed_ms, 3),
        }
        return Enhanced(
            original=asked.prompt,
            prompt=text,
            strategy=strategy,
            metadata=whole,
            trace=trace,
            template_name=str(metadata["template_name"]),
            content_mode=whole["content_mode"],
            execution_time_ms=elapsed_ms,
            held=held,
        )


def mode_of(snapshot: Snapshot, request: AssembleRequest) -> str:
    """The mode of a request that no template is resolved for, by the rules of resolution."""
    try:
        character = find_character(snapshot, request)
    except NotFound:  # not there for this user, so it says nothing
        character = None
    return decide_mode(request, character, detect).content_mode


def _brought(asked: EnhanceInput) -> list[str]:
    return [asked.prompt, *asked.tags, *asked.variables.values()]


def explicit_mode(content_type: str | None, nsfw_optimization: bool | None) -> str | None:
    """What a request says of its mode: `contentType` first, else the switch where it is on. Off, it
    says nothing: that is what clients send by default."""
    if content_type is not None:
        return content_type
    return NSFW if nsfw_optimization else None


def target_of(job_type: str | None, target_model: str | None) -> tuple[str, str]:
    """(target model, image | video) of a request: its own target, else by the job type's name."""
    named = (job_type or "").lower()
    is_video = "video" in named or "wan" in named
    target = target_model or ("wan" if is_video else "sdxl")
    return target, "video" if is_video or target == "wan" else "image"

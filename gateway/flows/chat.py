"""The playground's chat: a turn of a conversation in, the model's turn out.

The answer is the model's, byte for byte. History and characters are the gateway's; the worker gets
finished messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gateway.access.caller import owner
from gateway.flows.call import Assemble, Call, LogSink, Models, PromptSource
from gateway.flows.record import recording
from gateway.flows.refusing import refuse, refuse_answer
from gateway.flows.trace import trace_json
from gateway.store.conversations import append, turns
from gateway.store.database import Database
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import NSFW

ROUTE = "/chat"  # of our worker
TARGET = "qwen_instruct"
HISTORY_TURNS = 12  # what the function whose role this is sends


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatInput:
    """A user's turn."""

    conversation_id: str
    message: str
    use_case: str = "playground"
    context_type: str = "general"
    content_mode: str | None = None
    character_id: str | None = None
    tags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    system_override: str | None = None
    model: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


class Chat:
    """Holds the parts and no state of requests; any thread."""

    def __init__(
        self,
        prompts: PromptSource,
        assemble: Assemble,
        models: Models,
        database: Database,
        log: LogSink,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._prompts = prompts
        self._assemble = assemble
        self._models = models
        self._database = database
        self._log = log
        self._clock = clock
        self._wall = wall

    def say(self, asked: ChatInput, call: Call) -> dict[str, Any]:
        """The answer's body. Both turns are kept once the model has answered, and neither before:
        a turn that failed may be sent again."""
        user_id = owner(call.caller)
        with recording(self._log, call, self._clock, self._wall) as record:
            held = self._prompts.held(call.min_revision)
            record.held(held)
            with self._database.reading() as connection:
                history = turns(connection, asked.conversation_id, user_id, HISTORY_TURNS)
            texts = [turn.content for turn in history if turn.role == "user"]
            refuse([*texts, asked.message, asked.system_override or "", *asked.variables.values()])
            request = AssembleRequest(
                prompt=asked.message,
                target_model=TARGET,
                job_type="chat",
                use_case=asked.use_case,
                explicit_mode=asked.content_mode,
                user_mode=call.caller.content_mode,
                may_use_nsfw=call.caller.may_use_nsfw,
                character_id=asked.character_id,
                user_tier=call.caller.tier,
                tags=asked.tags,
                variables=asked.variables,
                history=history,
                system_override=asked.system_override,
                model=asked.model,
                task="chat",
                params=asked.params,
                user_id=user_id,
            )
            assembled = self._assemble(held.snapshot, request)
            record.assembled(held, request, assembled)
            now = self._clock()
            answer = self._models.run(
                assembled.models,
                assembled.messages,
                assembled.effective(),
                deadline_s=call.began + call.deadline_s - now,
                request_id=call.request_id,
                now=now,
                route=ROUTE,
            )
            record.answered(answer)
            refuse_answer(assembled, [asked.message], answer.text)
            flags = [*held.flags, *answer.flags]
            trace = record.trace = trace_json(held, assembled, [answer], (), flags)
            with self._database.transaction() as connection:
                append(
                    connection,
                    asked.conversation_id,
                    user_id,
                    asked.character_id,
                    asked.message,
                    answer.text,
                    call.request_id,
                    self._wall(),
                )
            template = assembled.template
            return {
                "success": True,
                "response": answer.text,
                "conversation_id": asked.conversation_id,
                "generation_time": round(answer.model_ms),  # ms, as this function always gave it
                "context_type": asked.context_type,
                "content_tier": assembled.content_mode,
                "nsfw_enforce": assembled.content_mode == NSFW,
                "template_meta": {
                    "id": template.id,
                    "name": template.template_name,
                    "version": template.live.version,
                    "origin": "override" if assembled.system_override else "template",
                },
                "prompt_template_name": template.template_name,
                # Nothing is rewritten after the model, so there is nothing to diagnose.
                "enforcement_diagnostics": {"persona": None, "nsfw_qa": None, "format": None},
                "model_provider": answer.provider,
                "model_used": answer.model_key,
                "finish_reason": answer.finish_reason,
                "trace": dict(trace),
            }

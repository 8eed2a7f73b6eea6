"""What one request leaves in the log, gathered while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from gateway.cache.holder import Held
from gateway.errors import GatewayError
from gateway.flows.call import Call, LogSink
from gateway.models.runner import Answer
from gateway.prompts.replay import request_to_json, used_objects
from gateway.values.assembly import Assembled, AssembleRequest
from gateway.values.logentry import LogBody, LogEntry


class Record:
    """Belongs to the thread of its request."""

    def __init__(self, call: Call, keeps_bodies: bool):
        self._call = call
        self._keeps_bodies = keeps_bodies
        self._values: dict[str, Any] = {}
        self._flags: list[str] = []
        self._resolved: tuple[Held, AssembleRequest, Assembled] | None = None
        self._answer: str | None = None
        self.trace: Mapping[str, Any] = {}

    def flag(self, *names: str) -> None:
        self._flags += [name for name in names if name not in self._flags]

    def held(self, held: Held) -> None:
        self.flag(*held.flags)
        self._values |= {
            "fallback_level": held.level,
            "config_revision": held.snapshot.revision,
            "snapshot_age_ms": held.age_ms,
            "cache_hit": held.cache_hit,
        }

    def assembled(self, held: Held, request: AssembleRequest, assembled: Assembled) -> None:
        self._resolved = (held, request, assembled)
        self._values |= {
            "template_id": assembled.template.id or None,
            "template_name": assembled.template.template_name,
            "template_version": assembled.template.live.version,
            "rule_ids": assembled.rule_ids,
            "character_id": assembled.character.id if assembled.character else None,
            "content_mode": assembled.content_mode,
            "mode_source": assembled.mode_source,
            "tokens_in": assembled.prompt_tokens,
            "messages_sha256": assembled.messages_sha256,
        }

    def answered(self, answer: Answer) -> None:
        """The model's answer. Asked twice, the times add up and the last model is named."""
        self.flag(*answer.flags)
        if answer.fallback:
            self.flag("model_fallback")
        self._answer = answer.text
        receipt = answer.receipt or {}
        self._values |= {
            "model_key": answer.model_key,
            "model_source": answer.source,
            "tokens_out": answer.completion_tokens,
            "worker_ms": self._sum("worker_ms", answer.worker_ms),
        }
        if isinstance(receipt.get("prompt_ids_sha256"), str):
            self._values.setdefault("prompt_ids_sha256", receipt["prompt_ids_sha256"])

    def _sum(self, name: str, more: float | None) -> float | None:
        known: float | None = self._values.get(name)
        return more if known is None else known + (more or 0.0)

    def fitted(self, target_tokens: int, compressed: bool) -> None:
        self._values |= {"target_tokens": target_tokens, "compressed": compressed}

    def entry(self, now: float, at: datetime, status: int, error_code: str | None) -> LogEntry:
        """now: monotonic seconds at the end; at: the same moment on the wall's clock."""
        return LogEntry(
            request_id=self._call.request_id,
            created_at=at,
            endpoint=self._call.endpoint,
            execution_time_ms=(now - self._call.began) * 1000,
            status=status,
            error_code=error_code,
            user_id=self._call.caller.user_id,
            job_id=self._call.job_id,
            flags=tuple(self._flags),
            body=self._body() if self._keeps_bodies else None,
            **self._values,
        )

    def _body(self) -> LogBody | None:
        if self._resolved is None:
            return None
        held, request, assembled = self._resolved
        return LogBody(
            request=request_to_json(request),
            messages=assembled.messages,
            answer=self._answer,
            trace=self.trace,
            objects=used_objects(held.snapshot, request, assembled),
        )


@contextmanager
def recording(
    sink: LogSink, call: Call, clock: Callable[[], float], wall: Callable[[], datetime]
) -> Iterator[Record]:
    """A record that is written at the end, however that comes."""
    record = Record(call, sink.keeps_bodies)
    status, code = 200, None
    try:
        yield record
    except GatewayError as exc:
        status, code = exc.status, exc.code
        raise
    except Exception:
        status, code = 500, GatewayError.code
        raise
    finally:
        sink.add(record.entry(clock(), wall(), status, code))

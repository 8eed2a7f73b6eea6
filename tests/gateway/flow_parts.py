"""What flows and jobs are tested with: the shipped configuration, real tokenizers, and models,
prompts and a log that do as they are told."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import update
from werkzeug.test import TestResponse

from gateway.access.caller import Caller, Scope
from gateway.cache.holder import Held
from gateway.config import GatewaySection, Settings
from gateway.content.emergency import load_emergency, load_seeds
from gateway.errors import GatewayError, RevisionNotReached
from gateway.flows.call import Call
from gateway.flows.chat import Chat
from gateway.flows.enhance import EnhanceInput, Enhancer
from gateway.front import functions
from gateway.front import jobs as job_routes
from gateway.front import workers as worker_routes
from gateway.front.app import API_ROUTES, FUNCTION_ROUTES
from gateway.jobs.desk import JobDesk
from gateway.jobs.request import JobInput
from gateway.jobs.signatures import Signatures
from gateway.models import faults
from gateway.models.cooldown import Cooldowns
from gateway.models.faults import ProviderError
from gateway.models.runner import Answer, Attempt, ModelRunner
from gateway.prompts.assemble import assemble
from gateway.store.database import Database, open_database
from gateway.store.jobs import find_job, job_of
from gateway.store.seed import seed
from gateway.store.tables import jobs
from gateway.tokens.counters import TokenCounters
from gateway.values.assembly import Message, ModelChoice
from gateway.values.logentry import LogEntry
from gateway.values.rows import Snapshot
from gateway.workers.service import make_workers
from tests.gateway.front_parts import Bench, FakePrompts

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
USER = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
OTHER = "7f9619ff-8b86-4011-b42d-00c04fc964ff"
ORLA, DARIO = (f"6f1c2f0e-7b5e-4c55-9d0e-2a0c6a5b1e0{n}" for n in (1, 2))  # sfw, nsfw
MODELS = Path(__file__).parents[2] / "models"
TOKENIZERS = {
    "clip": MODELS / "demo-image" / "tokenizer",
    "umt5": MODELS / "demo-video" / "tokenizer",
    "qwen": MODELS / "demo-chat",
}
PROMPT = "a swordfish on a blue plate"
FINISHED = "a swordfish on a blue plate, studio light, 85mm lens"

# Put together only when a test runs, so that no file holds such a sentence.
THEME, MINOR = "an erotic scene", "somebody 12 years old"


@functools.cache
def shipped() -> Snapshot:
    """The configuration of the package, as if a database had it at revision 7."""
    return replace(load_emergency(), revision=7)


@functools.cache
def counters() -> TokenCounters:
    return TokenCounters(TOKENIZERS)


def resolve(snapshot: Snapshot, request: Any) -> Any:
    return assemble(snapshot, request, counters())


class FixedPrompts:
    """Always the same configuration, at the level and with the error of a test."""

    def __init__(self, snapshot: Snapshot | None = None, level: int = 0):
        self.snapshot = snapshot or shipped()
        self.level = level
        self.flags: tuple[str, ...] = ()
        self.error: Exception | None = None

    def held(self, min_revision: int | None = None) -> Held:
        if self.error is not None:
            raise self.error
        if min_revision is not None and self.snapshot.revision < min_revision:
            raise RevisionNotReached("this revision is not here yet", retry_after_s=1.0)
        return Held(
            snapshot=self.snapshot,
            level=self.level,
            verified_at=0.0,
            age_ms=2.5,
            flags=self.flags,
        )


@dataclass(frozen=True)
class Asked:
    """One question to a model."""

    choices: tuple[ModelChoice, ...]
    messages: tuple[Message, ...]
    params: Mapping[str, Any]
    route: str
    deadline_s: float


@dataclass
class FakeModels:
    """Gives the texts or raises the errors of `replies` in their order; the last one again and
    again."""

    replies: list[str | Exception] = field(default_factory=lambda: [FINISHED])
    changes: Mapping[str, Any] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def run(
        self,
        choices: Sequence[ModelChoice],
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        deadline_s: float,
        request_id: str,
        now: float,
        route: str = "/chat",
    ) -> Answer:
        self.asked.append(Asked(tuple(choices), tuple(messages), params, route, deadline_s))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return replace(answer(reply, choices[0]), **self.changes)


def answer(text: str, choice: ModelChoice) -> Answer:
    return Answer(
        text=text,
        model_key=choice.model_key,
        source=choice.source,
        provider=choice.provider,
        served_model="demo-chat",
        receipt={"prompt_ids_sha256": "ab" * 32},
        attestation=None,
        worker_attempts=(),
        worker_url="http://worker",
        worker_ms=4.0,
        model_ms=5.0,
        attempts=(
            Attempt(
                model_key=choice.model_key,
                provider=choice.provider,
                source=choice.source,
                outcome="answered",
            ),
        ),
        fallback=False,
        unsupported=(),
        flags=(),
        prompt_tokens=40,
        completion_tokens=12,
        finish_reason="stop",
    )


@dataclass
class KeptLog:
    keeps_bodies: bool = True
    entries: list[LogEntry] = field(default_factory=list)

    def add(self, entry: LogEntry) -> None:
        self.entries.append(entry)


@dataclass
class Ticking:
    """A clock that goes on by a millisecond each time that it is read."""

    now: float = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def caller(**changes: Any) -> Caller:
    values: dict[str, Any] = {
        "kind": "user",
        "name": "somebody",
        "scopes": frozenset({Scope.CALL}),
        "user_id": USER,
        "may_use_nsfw": True,
        **changes,
    }
    return Caller(**values)


def call(who: Caller | None = None, **changes: Any) -> Call:
    values: dict[str, Any] = {
        "caller": who or caller(),
        "request_id": "r-1",
        "endpoint": "enhance-prompt",
        "began": 100.0,
        "deadline_s": 85.0,
        **changes,
    }
    return Call(**values)


@dataclass
class EnhanceBench:
    """An enhancer with everything that it was given."""

    prompts: FixedPrompts = field(default_factory=FixedPrompts)
    models: FakeModels = field(default_factory=FakeModels)
    log: KeptLog = field(default_factory=KeptLog)
    clock: Callable[[], float] = field(default_factory=Ticking)

    def enhancer(self) -> Enhancer:
        return Enhancer(
            self.prompts, resolve, counters(), self.models, self.log, self.clock, lambda: NOW
        )

    def enhance(self, by: Call | None = None, **fields: Any) -> Any:
        return self.enhancer().enhance(asked(**fields), by or call())

    def refused(self, kind: type[GatewayError], by: Call | None = None, **fields: Any) -> Any:
        """The error of an enhancement that must fail so."""
        try:
            done = self.enhance(by, **fields)
        except kind as exc:
            assert type(exc) is kind
            return exc
        raise AssertionError(f"an answer came instead: {done.strategy}")


def asked(**fields: Any) -> EnhanceInput:
    values: dict[str, Any] = {
        "prompt": PROMPT,
        "target_model": "sdxl",
        "media": "image",
        "job_type": "sdxl_image_fast",
        "format": "image",
        **fields,
    }
    return EnhanceInput(**values)


# --- jobs ---------------------------------------------------------------------------------------

OWN_SECRET, SHARED_SECRET = "own-secret-of-the-gateway-0123456789", "shared-secret"


@dataclass
class KeptQueue:
    """A list in memory; with `error` it takes nothing."""

    error: Exception | None = None
    pushed: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def push(self, list_name: str, element: Mapping[str, Any]) -> int:
        if self.error is not None:
            raise self.error
        self.pushed.append((list_name, dict(element)))
        return len(self.pushed)

    def close(self) -> None:
        pass


@dataclass
class TakingWorkers:
    """Workers that take every job over HTTP; with `error` none."""

    worker_url: str = "http://worker:7860"
    error: Exception | None = None
    posted: list[dict[str, Any]] = field(default_factory=list)

    def post_generate(
        self, body: Mapping[str, Any], *, worker_type: str, deadline_s: float, request_id: str
    ) -> TakingWorkers:
        if self.error is not None:
            raise self.error
        self.posted.append(dict(body))
        return self


@dataclass
class DeskBench:
    """A desk with everything that it was given."""

    database: Database
    enhancing: EnhanceBench = field(default_factory=EnhanceBench)
    queue: KeptQueue | None = field(default_factory=KeptQueue)
    media: TakingWorkers = field(default_factory=TakingWorkers)
    sign: Callable[[str], str | None] | None = None
    now: datetime = NOW

    def desk(self, **more: Any) -> JobDesk:
        return JobDesk(
            self.database,
            self.enhancing.prompts,
            self.enhancing.enhancer(),
            self.queue,
            self.media,
            Signatures(OWN_SECRET, SHARED_SECRET),
            self.sign,
            "http://gateway:7862",
            clock=Ticking(),
            wall=lambda: self.now,
            **more,
        )

    def queue_job(self, by: Call | None = None, **fields: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"job_type": "sdxl_image_fast", "prompt": PROMPT, **fields}
        asked = JobInput(**values)
        return self.desk().queue_job(asked, by or call(endpoint="queue-job"))

    def callback(self, body: Mapping[str, Any], *, webhook: bool = False) -> dict[str, Any]:
        """As a worker sends it, signed."""
        raw = json.dumps(body).encode()
        secret = SHARED_SECRET
        if webhook:
            named = str(body.get("job_id") or body.get("jobId"))
            secret = Signatures(OWN_SECRET, None).secret_of(named)
        signature = sign(secret, raw)
        given = (None, signature) if webhook else (signature, None)
        return self.desk().callback(raw, body, *given)

    def row(self, job_id: str) -> dict[str, Any]:
        with self.database.reading() as connection:
            found = find_job(connection, job_id)
        assert found is not None
        return dict(found)

    def assets(self, job_id: str) -> list[dict[str, Any]]:
        with self.database.reading() as connection:
            return list(job_of(connection, job_id, self.row(job_id)["user_id"])["assets"])

    def in_status(self, status: str, **values: Any) -> str:
        """A new job's id, in that status."""
        job_id = str(self.queue_job()["jobId"])
        with self.database.transaction() as connection:
            connection.execute(
                update(jobs).where(jobs.c.id == job_id).values(status=status, **values)
            )
        return job_id


def sign(secret: str, raw: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()


# --- over HTTP ----------------------------------------------------------------------------------


class Routes(Bench):
    """The whole app over a seeded SQLite database, with real workers' pools. `log` and `queue` are
    in memory."""

    def __init__(self, folder: Path, migrated_sqlite: Path, *worker_urls: str) -> None:
        path = folder / "gateway.sqlite3"
        shutil.copy(migrated_sqlite, path)
        database = open_database(f"sqlite:///{path}")
        seed(database, load_seeds(), "qwen_instruct", frozenset())
        section = GatewaySection(
            chat_workers=worker_urls,
            media_workers=worker_urls,
            private_workers=True,
            public_url="http://gateway:7862",
        )
        settings = Settings(
            section=section,
            state_dir=folder,
            models_dir=MODELS,
            database_url="",
            environment={},
        )
        self.workers = make_workers(settings, database)
        self.log = KeptLog()
        self.queue: KeptQueue | None = KeptQueue()
        prompts = FakePrompts(database)
        models = ModelRunner(self.workers.pool, NoProviders(), NeverResting())
        clock = self.clock
        enhancer = Enhancer(prompts, resolve, counters(), models, self.log, clock)
        chat = Chat(prompts, resolve, models, database, self.log, clock)
        self.desk = JobDesk(
            database,
            prompts,
            enhancer,
            self.queue,
            self.workers.media,
            Signatures(OWN_SECRET, SHARED_SECRET),
            None,
            settings.public_url,
            clock=clock,
        )
        super().__init__(
            database,
            folder,
            (
                *FUNCTION_ROUTES,
                functools.partial(functions.blueprint, enhancer=enhancer, chat=chat),
                functools.partial(job_routes.function_blueprint, desk=self.desk),
                lambda _: worker_routes.function_blueprint(self.workers),
            ),
            (
                *API_ROUTES,
                functools.partial(functions.enhance_blueprint, enhancer=enhancer),
                functools.partial(job_routes.blueprint, desk=self.desk),
            ),
        )

    def clock(self) -> float:
        return self.elapsed_s

    def close(self) -> None:
        self.workers.client.close()
        self.database.dispose()

    def call_back(self, raw: bytes, signature: str | None, header: str) -> TestResponse:
        headers = {"Content-Type": "application/json"}
        if signature is not None:
            headers[header] = signature
        return self.client.post("/functions/v1/job-callback", data=raw, headers=headers)


class NeverResting(Cooldowns):
    """So that failures of one test do not reach the next."""

    def unavailable(self, now: float) -> Mapping[str, str]:
        return {}


class NoProviders:
    """Providers that have no keys, so that none is asked."""

    def complete(self, *_: Any, **__: Any) -> Any:
        raise ProviderError(faults.NO_SECRET, "its key is not set")


def without(snapshot: Snapshot, **use: str) -> Snapshot:
    """Without the templates that have all of these values."""
    kept = tuple(
        one
        for one in snapshot.templates
        if not all(getattr(one, name) == value for name, value in use.items())
    )
    return replace(snapshot, templates=kept)

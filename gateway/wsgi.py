"""Puts the gateway together inside its gunicorn worker. Raising here ends it with exit code 3,
which tells a supervisor that starting again cannot help."""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flask import Flask
from prometheus_client import CollectorRegistry

from gateway.access.gate import Gate
from gateway.access.keys import make_first_key
from gateway.access.tokens import verifier
from gateway.cache.prompts import Prompts
from gateway.config import Settings
from gateway.content.emergency import load_emergency, load_seeds
from gateway.errors import ConfigError, StoreUnavailable
from gateway.flows.chat import Chat
from gateway.flows.enhance import Enhancer
from gateway.front import functions, jobs, log_routes
from gateway.front import workers as worker_routes
from gateway.front.app import API_ROUTES, FUNCTION_ROUTES, create_app
from gateway.front.revision import Telling
from gateway.front.services import Services
from gateway.jobs.desk import JobDesk
from gateway.jobs.queues import queue_of
from gateway.jobs.references import signer_of
from gateway.jobs.signatures import Signatures, own_secret
from gateway.logs.metrics import LogMetrics
from gateway.logs.retention import Retention
from gateway.logs.writer import LogWriter
from gateway.models.cooldown import Cooldowns
from gateway.models.exchange import Exchange
from gateway.models.lists import ListFetcher
from gateway.models.openai_client import OpenAiClient
from gateway.models.refresh import SyncResults
from gateway.models.refresher import Refresher
from gateway.models.runner import ModelRunner
from gateway.prompts.assemble import assemble
from gateway.store.database import Database, open_database
from gateway.store.migration import is_current, migrate
from gateway.store.seed import seed
from gateway.tokens.counters import TokenCounters
from gateway.workers.service import WorkersService, make_workers

log = logging.getLogger(__name__)

PREPARE_AGAIN_S = 5.0
LOG_S = 2.0  # of a stop, for the last entries
CLOSE = "gateway_close"  # in the app's extensions: what ends its threads


def build(settings: Settings) -> Flask:
    """The app with everything behind it started. Must run after a fork: it starts threads."""
    section, clock, wall = settings.section, time.monotonic, _wall
    database = open_database(settings.database_url)
    prepared = prepare(settings, database)
    files = tokenizer_files(settings)
    counters = TokenCounters(files)
    counters.load_all()  # a broken file must show at the start
    registry = CollectorRegistry()
    prompts = Prompts(
        settings.database_url,
        settings.state_dir,
        load_emergency,
        max_unverified_s=section.max_unverified_s,
        listen_url=settings.secret("GATEWAY_LISTEN_URL"),
        url=settings.public_url,
    )
    prompts.start()
    workers = make_workers(settings, database, files)
    workers.start()
    exchange = Exchange(private_allowed=section.private_workers)
    models = ModelRunner(workers.pool, OpenAiClient(exchange, settings.secret), Cooldowns(), clock)
    refresher = Refresher(
        database,
        ListFetcher(exchange, settings.secret),
        instance_id=prompts.instance_id,
        every_s=section.refresh_every_s,
        started=wall(),
        random01=random.random,
    )
    logs = LogWriter(database, section.logs, registry)
    logs.start()
    gate = Gate(database, service_keys(settings), verifier(settings, clock), wall, clock)
    gate.warm()
    services = Services(
        settings=settings,
        database=database,
        gate=gate,
        prompts=prompts,
        counters=counters,
        refresh_models=functools.partial(_refresh, refresher),
        metrics=LogMetrics(database, wall),
        workers_seen=functools.partial(workers_seen, workers),
        wall=wall,
        clock=clock,
        registry=registry,
    )
    resolve = functools.partial(assemble, counters=counters)
    told = Telling(prompts)
    enhancer = Enhancer(told, resolve, counters, models, logs)
    chat = Chat(told, resolve, models, database, logs)
    desk = JobDesk(
        database,
        told,
        enhancer,
        queue_of(settings),
        workers.media,
        Signatures(
            _callback_secret(settings),
            settings.secret("JOB_CALLBACK_SECRET"),
        ),
        signer_of(settings),
        settings.public_url,
        sdxl_enabled=settings.secret("SDXL_QUEUE_ENABLED") != "false",
    )
    app = create_app(
        services,
        (
            *FUNCTION_ROUTES,
            functools.partial(functions.blueprint, enhancer=enhancer, chat=chat),
            functools.partial(jobs.function_blueprint, desk=desk),
            lambda _services: worker_routes.function_blueprint(workers),
        ),
        (
            *API_ROUTES,
            functools.partial(functions.enhance_blueprint, enhancer=enhancer),
            functools.partial(jobs.blueprint, desk=desk),
            log_routes.blueprint,
        ),
    )
    if not prepared:
        _thread("prepare", functools.partial(_prepare_later, settings, database, prompts, gate))
    stop = threading.Event()
    _thread("jobs", functools.partial(desk.run, stop))
    _thread("refresh", functools.partial(refresher.run, stop))
    _thread("retention", Retention(database, section.logs, stop=stop).run)
    app.extensions[CLOSE] = functools.partial(_close, stop, workers, logs, prompts, database)
    return app


def _close(
    stop: threading.Event,
    workers: WorkersService,
    logs: LogWriter,
    prompts: Prompts,
    database: Database,
) -> None:
    """End what `build` started: what is to be logged is written first, since the rest may hang on a
    worker or a database that is away, and there are seconds only."""
    stop.set()
    logs.stop(LOG_S)
    threading.Thread(target=workers.close, name="close workers", daemon=True).start()
    prompts.stop()
    database.dispose()


def check_settings(settings: Settings) -> None:
    """Raise ConfigError for settings that are half there, before anything listens. The host is
    not asked: every route but /health needs a key or a signature, wherever it listens."""
    queue_of(settings)
    verifier(settings, time.monotonic)


def check(settings: Settings) -> int:
    """Look at settings, files and database, and say how they are. Exit code 0 or 1."""
    check_settings(settings)
    load_emergency()
    for name, exact in TokenCounters(tokenizer_files(settings)).load_all().items():
        print(f"tokenizer {name}: {'exact' if exact else 'no files, tokens are estimated'}")
    database = open_database(settings.database_url)
    try:
        current = is_current(database)
    except StoreUnavailable as exc:
        print(f"database: {exc}")
        return 1
    finally:
        database.dispose()
    print(f"database: {'ready' if current else 'is migrated at the next start'}")
    return 0


def prepare(settings: Settings, database: Database) -> bool:
    """Tables, seeds and the first key, where they are not there. False: the database does not
    answer, and the gateway serves what it knows until it does."""
    try:
        migrate(database)
        secrets = frozenset(name for name, value in settings.environment.items() if value)
        seed(database, load_seeds(), settings.section.default_model, secrets)
        make_first_key(database, settings.state_dir, _wall())
    except StoreUnavailable as exc:
        log.error("the database is not ready: %s; it is tried again", exc)
        return False
    return True


def _callback_secret(settings: Settings) -> str | None:
    """None where it cannot be kept: prompts are served all the same, and jobs are refused."""
    given = settings.secret("GATEWAY_CALLBACK_SECRET")
    if given is not None:
        return given
    try:
        return own_secret(settings.state_dir)
    except ConfigError as exc:
        log.error("no jobs are taken: %s", exc)
        return None


def tokenizer_files(settings: Settings) -> Mapping[str, Path]:
    """Paths by tokenizer name; relative ones are in the models folder."""
    return {name: settings.models_dir / path for name, path in settings.section.tokenizers.items()}


def service_keys(settings: Settings) -> tuple[str, ...]:
    """The keys that workers and functions of the same project hold."""
    names = ("SUPABASE_SERVICE_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    found = (settings.environment.get(name, "").strip() for name in names)
    return tuple(dict.fromkeys(key for key in found if key))


def workers_seen(workers: WorkersService) -> Mapping[str, Any]:
    """By worker type: how many are known, and how many were healthy when last looked at."""
    health = workers.monitor.known()
    seen: dict[str, dict[str, int]] = {}
    for worker in workers.registry.known():
        counts = seen.setdefault(worker.worker_type, {"known": 0, "healthy": 0})
        counts["known"] += 1
        found = health.get(worker.url)
        counts["healthy"] += found is not None and found.is_healthy
    return seen


def _refresh(refresher: Refresher, *, provider: str, actor: str, confirmed: bool) -> SyncResults:
    return refresher.refresh_now(provider, _wall(), actor=actor, confirmed=confirmed)


def _prepare_later(settings: Settings, database: Database, prompts: Prompts, gate: Gate) -> None:
    while not prepare(settings, database):
        time.sleep(PREPARE_AGAIN_S)
    prompts.wake()
    gate.warm()
    log.info("the database is ready")


def _thread(name: str, target: Any) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()


def _wall() -> datetime:
    return datetime.now(UTC)

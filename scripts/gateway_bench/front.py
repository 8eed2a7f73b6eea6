"""The same assembly through the whole front: key, body, revision check, JSON of all its steps.

POST /api/dry-run by a test client on one core, over SQLite, with the configuration in the database
and the cache as it runs. No network and no worker: what is measured is what the gateway does.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient
from prometheus_client import CollectorRegistry
from sqlalchemy import insert

from gateway.cache.prompts import Prompts
from gateway.content.emergency import load_emergency, load_seeds
from gateway.front.app import create_app
from gateway.store.database import Database, open_database
from gateway.store.migration import migrate
from gateway.store.seed import seed
from gateway.store.tables import prompt_rule_tags, prompt_rules
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import Rule
from gateway_bench.overhead import WARM_UP, a_request, configuration, counters_of
from gateway_bench.staleness import quantile
from tests.gateway.front_parts import Bench

TAKEN = ("prompt", "target_model", "job_type", "use_case", "explicit_mode", "user_mode", "quality")


def measure(
    models: Path, *, requests: int, rules: int, progress: Callable[[], None]
) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    wall_ms, cpu_ms = [], []
    with served(models, rules) as (client, secret):
        chance = random.Random(0)
        snapshot = configuration(rules)
        for number in range(WARM_UP + requests):
            body = json.dumps({"request": body_of(a_request(snapshot, chance))})
            wall, cpu = time.perf_counter(), time.thread_time()
            answer = client.post(
                "/api/dry-run",
                data=body,
                content_type="application/json",
                headers={"Authorization": f"Bearer {secret}"},
            )
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            if answer.status_code != 200:
                raise RuntimeError(f"the front answered {answer.status_code}: {answer.text[:500]}")
            if number >= WARM_UP:
                wall_ms.append(wall * 1000)
                cpu_ms.append(cpu * 1000)
                progress()
    wall_ms.sort()
    cpu_ms.sort()
    return {
        "route": "POST /api/dry-run",
        "requests": requests,
        "rules": rules,
        "p50_ms": quantile(wall_ms, 0.5),
        "p99_ms": quantile(wall_ms, 0.99),
        "cpu_p50_ms": quantile(cpu_ms, 0.5),
        "cpu_p99_ms": quantile(cpu_ms, 0.99),
    }


@contextmanager
def served(models: Path, rules: int) -> Iterator[tuple[FlaskClient, str]]:
    """A client of an app over a seeded database with as many rules, and the key of an editor."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder / 'gateway.sqlite3'}"
        database = open_database(url)
        stack.callback(database.dispose)
        migrate(database)
        seed(database, load_seeds(), "qwen_instruct", frozenset())
        add_rules(database, configuration(rules).rules)
        prompts = Prompts(url, folder / "state", load_emergency)
        prompts.start()
        stack.callback(prompts.stop)
        bench = Bench(database, folder)
        services = replace(
            bench.services,
            prompts=prompts,
            counters=counters_of(models),
            registry=CollectorRegistry(),  # that of the bench has its own app's counts
        )
        yield create_app(services).test_client(), bench.secrets["editor"]


def add_rules(database: Database, rules: tuple[Rule, ...]) -> None:
    """Those that the seeds have not."""
    kept = {one.name for one in fields(Rule)} - {"id", "tags", "match"}
    known = {one.name for one in load_seeds().rules}
    with database.transaction() as connection:
        for rule in rules:
            if rule.name in known:
                continue
            row = {name: one for name, one in asdict(rule).items() if name in kept}
            made = connection.execute(insert(prompt_rules).values(**row, match=dict(rule.match)))
            assert made.inserted_primary_key is not None
            for tag in rule.tags:
                connection.execute(
                    insert(prompt_rule_tags).values(rule_id=made.inserted_primary_key[0], tag=tag)
                )


def body_of(request: AssembleRequest) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(request, name) for name in TAKEN}
    return {**values, "tags": list(request.tags), "user_negative": request.user_negative}

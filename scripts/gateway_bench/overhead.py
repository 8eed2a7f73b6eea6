"""What the gateway adds to a request: resolve, rules, render, count, model chain. One core.

The configuration is the twelve templates of the emergency file with rules of five kinds added, up
to the number asked for. Every prompt is another one, so what is counted is not remembered from the
request before.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from gateway.content.emergency import load_emergency
from gateway.prompts.assemble import assemble
from gateway.tokens.counters import TokenCounters
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import MODES, UNIVERSAL, Rule, Snapshot
from gateway_bench.staleness import quantile

WARM_UP = 500
USE_CASES = ("enhancement", "generation", "chat", "playground")
WORDS = (
    "a lighthouse keeper at dusk rain on the glass brass lamp old harbour fishing boats nets gulls "
    "a red bicycle under chestnut trees long shadows quiet street open window curtains steam tea "
    "mountain hut snow wooden door lantern footprints pale sky blue hour wide lens soft light grain"
).split()

Progress = Callable[[], None]


@dataclass(slots=True)
class Measured:
    requests: int
    templates: int
    rules: int
    tokenizers: dict[str, bool]  # name → counts exactly
    wall_ms: list[float]
    cpu_ms: list[float]
    applied: list[int]
    tokens: list[int]

    def row(self) -> dict[str, Any]:
        wall, cpu = sorted(self.wall_ms), sorted(self.cpu_ms)
        return {
            "requests": self.requests,
            "templates": self.templates,
            "rules": self.rules,
            "rules_applied_mean": round(mean(self.applied), 1),
            "prompt_tokens_mean": round(mean(self.tokens), 1),
            "tokenizers": self.tokenizers,
            "p50_ms": quantile(wall, 0.5),
            "p99_ms": quantile(wall, 0.99),
            "worst_ms": round(wall[-1], 3),
            "cpu_p50_ms": quantile(cpu, 0.5),
            "cpu_p99_ms": quantile(cpu, 0.99),
        }


def measure(models: Path, *, requests: int, rules: int, progress: Progress) -> Measured:
    """models: the folder with demo-chat, demo-image and demo-video."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    counters = counters_of(models)
    exact = counters.load_all()
    snapshot = configuration(rules)
    chance = random.Random(0)
    asked = [a_request(snapshot, chance) for _ in range(WARM_UP + requests)]
    for one in asked[:WARM_UP]:
        assemble(snapshot, one, counters)
    found = Measured(requests, len(snapshot.templates), len(snapshot.rules), exact, [], [], [], [])
    for one in asked[WARM_UP:]:
        wall, cpu = time.perf_counter(), time.thread_time()
        done = assemble(snapshot, one, counters)
        found.cpu_ms.append((time.thread_time() - cpu) * 1000)
        found.wall_ms.append((time.perf_counter() - wall) * 1000)
        found.applied.append(len(done.rule_ids))
        found.tokens.append(done.prompt_tokens)
        progress()
    return found


def counters_of(models: Path) -> TokenCounters:
    return TokenCounters(
        {
            "qwen": models / "demo-chat",
            "clip": models / "demo-image",
            "umt5": models / "demo-video",
        }
    )


def configuration(rules: int) -> Snapshot:
    """The emergency file's twelve templates, with rules added until there are `rules`."""
    base = load_emergency()
    base = replace(
        base,
        templates=tuple(
            one
            for one in base.templates
            if one.target_model != UNIVERSAL and one.use_case in USE_CASES
        ),
    )
    targets = sorted({one.target_model for one in base.templates})
    chance = random.Random(1)
    first = max((one.id for one in base.rules), default=0) + 1
    added = [
        Rule(
            id=first + number,
            name=f"measured {number}",
            rule_type=("prepend", "append")[number % 2],
            slot=("system", "system", "user", "negative")[number % 4],
            body=(
                "Keep every object and colour.",
                "{% if character_name is defined %}Speak as {{ character_name }}.{% endif %}",
                "Light number {{ prompt | length }}: soft, from the side.",
                "Mind the mood, the place and the hour.",
                "One plain sentence more.",
            )[number % 5],
            match={
                "target_model": chance.choice(targets),
                **({"content_mode": chance.choice(MODES)} if number % 3 else {}),
                **({"quality": "high"} if number % 7 == 0 else {}),
            },
            tags=("night",) if number % 4 == 0 else (),
            priority=number % 11,
            exclusive_group=f"group {number % 20}" if number % 2 else None,
            max_tokens=60 if number % 6 == 0 else None,
            is_optional=number % 3 == 0,
        )
        for number in range(max(0, rules - len(base.rules)))
    ]
    ordered = sorted((*base.rules, *added), key=lambda one: (one.priority, one.id))
    return replace(base, rules=tuple(ordered))


def a_request(snapshot: Snapshot, chance: random.Random) -> AssembleRequest:
    """One of the configuration's templates, with a prompt of its own."""
    template = chance.choice(snapshot.templates)
    return AssembleRequest(
        prompt=" ".join(chance.choices(WORDS, k=chance.randint(5, 40))),
        target_model=template.target_model,
        job_type=template.job_type,
        use_case=template.use_case,
        explicit_mode=chance.choice((None, template.content_mode)),
        user_mode=template.content_mode,
        quality=chance.choice(("fast", "high")),
        tags=chance.choice(((), ("night",))),
        user_negative=chance.choice(("", "hands, blurry")),
    )

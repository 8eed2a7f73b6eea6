"""bench: how long resolutions take with this configuration, in this process, on one core."""

from __future__ import annotations

import argparse
import statistics
import time

from rich.console import Console
from rich.table import Table

from gateway.prompts.assemble import assemble
from gateway.store.database import Database
from gateway.store.loading import load_snapshot
from gateway.values.assembly import AssembleRequest
from gateway.values.rows import Template

PROMPT = "a lighthouse on a cliff in a storm, seen from the sea"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="time resolutions of this configuration")
    parser.add_argument("--requests", type=int, default=2000, help="of each template")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace, database: Database) -> int:
    with database.reading() as connection:
        snapshot = load_snapshot(connection)
    console = Console()
    table = Table("template", "requests", "p50 ms", "p99 ms", "max ms")
    active = [one for one in snapshot.templates if one.is_active]
    for template in active:
        request = _request(template)
        times_ms = []
        for _ in range(args.requests):
            began = time.perf_counter()
            assemble(snapshot, request, args.counters)
            times_ms.append((time.perf_counter() - began) * 1000)
        cuts = statistics.quantiles(times_ms, n=100)
        shown = (cuts[49], cuts[98], max(times_ms))
        table.add_row(
            template.template_name, str(args.requests), *(f"{value:.3f}" for value in shown)
        )
    console.print(table)
    rules = sum(one.is_active for one in snapshot.rules)
    console.print(f"revision {snapshot.revision}, {len(active)} templates, {rules} rules")
    return 0


def _request(template: Template) -> AssembleRequest:
    return AssembleRequest(
        prompt=PROMPT,
        target_model=template.target_model,
        job_type=template.job_type,
        use_case=template.use_case,
        explicit_mode=template.content_mode,
        variables={name: "a word" for name in template.live.variables},
        task="chat" if template.job_type == "chat" else "enhancement",
    )

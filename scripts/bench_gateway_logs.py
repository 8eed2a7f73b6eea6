"""How long questions to the gateway's log take with a million rows, on SQLite and PostgreSQL.

    python scripts/bench_gateway_logs.py                     as benchmarks/gateway-logs.json has it
    python scripts/bench_gateway_logs.py --rows 50000 --engine sqlite

Fills a database of its own with rows over 90 days, then asks for pages with every filter and some
pairs of filters, values drawn by how often they occur; then numbers of the last hours, the average
query over the view enhancement_logs, writing through LogWriter with texts, and retention of
100,000 rows. PostgreSQL is TEST_POSTGRES_URL, else 127.0.0.1:5432 as user postgres, else a private
server if initdb and pg_ctl are there, else left out.

Prints a table for each engine and writes all numbers. Exit codes: 0 measured, whether the goal
(p95 of every list ≤ 200 ms) is met or not; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from rich import box
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from bench_gateway import machine  # noqa: E402
from gateway.config import Logs  # noqa: E402
from gateway.logs.metrics import LogMetrics  # noqa: E402
from gateway.logs.queries import (  # noqa: E402
    Filters,
    body_of,
    cursor_of,
    list_rows,
    one_row,
)
from gateway.logs.retention import Retention  # noqa: E402
from gateway.logs.writer import LogWriter  # noqa: E402
from gateway.prompts.digest import messages_sha256  # noqa: E402
from gateway.prompts.replay import config_object  # noqa: E402
from gateway.store.database import Database, open_database  # noqa: E402
from gateway.store.migration import migrate  # noqa: E402
from gateway.values.assembly import Message  # noqa: E402
from gateway.values.logentry import ConfigObject, LogBody, LogEntry  # noqa: E402
from gateway.values.rows import Rule  # noqa: E402
from tests.gateway.postgres import Server, find_server  # noqa: E402

GOAL_MS = 200.0
DAYS = 90
TEMPLATES = [f"template_{number}" for number in range(12)]
ENDPOINTS = ["/functions/v1/enhance-prompt", "/enhance/sdxl", "/enhance/wan", "/playground-chat"]
MODELS = ["qwen_instruct", "mythomax", "claude", "gemini", "gpt"]
USERS = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(2000)]
ERRORS = {"worker_busy": 300, "worker_timeout": 60, "prompt_refused": 30, "template_fault": 1}
FLAGS = {"prompts_unverified": 300, "model_fallback": 200, "original_fallback": 20, "mismatch": 1}
OF = 10_000  # rows of which so many have that error or flag

LOGS = (
    "id", "created_at", "request_id", "user_id", "endpoint", "template_id", "template_name",
    "template_version", "rule_ids", "model_key", "model_source", "content_mode", "mode_source",
    "fallback_level", "config_revision", "snapshot_age_ms", "tokens_in", "tokens_out",
    "compressed", "execution_time_ms", "worker_ms", "cache_hit", "flags", "messages_sha256",
    "status", "error_code",
)  # fmt: skip
BODIES = ("request_id", "created_at", "request", "messages", "answer", "trace", "config_refs")
FLAG_ROWS = ("flag", "created_at", "log_id")

Question = Callable[[Any], object]


class Rows:
    """Random rows of one seed; the same for every engine."""

    def __init__(self, count: int, end: datetime) -> None:
        self.count = count
        self.end = end
        self._begin = end - timedelta(days=DAYS)
        self._step = timedelta(days=DAYS) / count
        self.flags: list[tuple[Any, ...]] = []  # of the rows that `logs` gave

    def at(self, number: int) -> datetime:
        return self._begin + self._step * number

    def request_id(self, number: int) -> str:
        # Scattered over the index, as random ones are (Knuth's multiplicative hash).
        return f"{(number + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"

    def logs(self) -> Iterator[tuple[Any, ...]]:
        draw = random.Random(7)
        for number in range(self.count):
            error = _rare(draw, ERRORS)
            flag = _rare(draw, FLAGS)
            template = int(draw.paretovariate(1.2)) % len(TEMPLATES)
            level = draw.random()
            took = draw.lognormvariate(7, 0.6)
            if flag:
                self.flags.append((flag, self.at(number), number + 1))
            yield (
                number + 1, self.at(number), self.request_id(number), _user(draw),
                draw.choices(ENDPOINTS, (60, 25, 10, 5))[0], template + 1, TEMPLATES[template],
                draw.randint(1, 9), "[3,14,15]", draw.choices(MODELS, (70, 20, 6, 3, 1))[0],
                "default", draw.choice(("sfw", "nsfw")), "explicit",
                2 if level < 0.0005 else int(level < 0.01), 100 + number // 5000,
                draw.random() * 900, draw.randint(150, 900), draw.randint(20, 160),
                draw.random() < 0.2, took, took * 0.97, draw.random() < 0.995,
                json.dumps([flag] if flag else []), draw.randbytes(32).hex(),
                503 if error else 200, error,
            )  # fmt: skip

    def bodies(self, newest: int) -> Iterator[tuple[Any, ...]]:
        body = entry("", self.end).body
        assert body is not None
        messages = json.dumps([{"role": m.role, "content": m.content} for m in body.messages])
        texts = (json.dumps(body.request), messages, body.answer, json.dumps(body.trace), "[]")
        for number in range(max(0, self.count - newest), self.count):
            yield (self.request_id(number), self.at(number), *texts)


def _rare(draw: random.Random, chances: dict[str, int]) -> str | None:
    place = draw.randrange(OF)
    for name, share in chances.items():
        if place < share:
            return name
        place -= share
    return None


def _user(draw: random.Random) -> str:
    return USERS[int(draw.paretovariate(1.1)) % len(USERS)]


OBJECTS = tuple(
    ConfigObject(content_hash=one.content_hash, kind=one.kind, body=one.body)
    for one in (
        config_object(
            "rule",
            Rule(id=number, name=f"r{number}", rule_type="append", slot="system", body="w " * 40),
        )
        for number in range(12)
    )
)


def entry(request_id: str, at: datetime) -> LogEntry:
    messages = (Message("system", "Describe. " * 120), Message("user", "a harbour at dawn " * 4))
    return LogEntry(
        request_id=request_id,
        created_at=at,
        endpoint=ENDPOINTS[0],
        execution_time_ms=1400.0,
        template_name=TEMPLATES[0],
        user_id=USERS[0],
        model_key=MODELS[0],
        messages_sha256=messages_sha256(messages),
        body=LogBody(
            request={"prompt": messages[1].content, "target_model": "sdxl", "job_type": "image"},
            messages=messages,
            answer="A harbour " * 30,
            trace={"steps": [{"step": "rule", "why": "matched " * 8} for _ in range(25)]},
            objects=OBJECTS,
        ),
    )


# --- filling ----------------------------------------------------------------------------------


def fill_sqlite(path: str, rows: Rows, bodies: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -400000")

    def put(table: str, columns: tuple[str, ...], values: Iterator[tuple[Any, ...]]) -> None:
        places = ", ".join("?" * len(columns))
        named = ", ".join(columns)
        connection.executemany(
            f"INSERT INTO {table} ({named}) VALUES ({places})",
            (
                tuple(
                    one.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
                    if isinstance(one, datetime)
                    else one
                    for one in row
                )
                for row in values
            ),
        )

    with connection:
        put("prompt_logs", LOGS, rows.logs())
        put("prompt_log_flags", FLAG_ROWS, iter(rows.flags))
        put("prompt_log_bodies", BODIES, rows.bodies(bodies))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def fill_postgres(url: str, rows: Rows, bodies: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        for table, columns, values in (
            ("prompt_logs", LOGS, rows.logs()),
            ("prompt_log_flags", FLAG_ROWS, iter(rows.flags)),
            ("prompt_log_bodies", BODIES, rows.bodies(bodies)),
        ):
            named = ", ".join(columns)
            with connection.cursor().copy(f"COPY {table} ({named}) FROM STDIN") as copy:
                for row in values:
                    copy.write_row(row)
        connection.execute(
            "SELECT setval(pg_get_serial_sequence('prompt_logs', 'id'), max(id)) FROM prompt_logs"
        )
        # As autovacuum leaves a table that has grown.
        connection.execute("VACUUM ANALYZE")


# --- questions --------------------------------------------------------------------------------


def questions(rows: Rows, draw: random.Random) -> dict[str, Question]:
    """By name; each call draws its values anew."""

    def page(make: Callable[[], dict[str, Any]], limit: int = 50) -> Question:
        return lambda connection: list_rows(connection, Filters(**make()), limit)

    def some_time(days: float) -> dict[str, Any]:
        since = rows.at(draw.randrange(rows.count))
        return {"since": since, "until": since + timedelta(days=days)}

    def deep(make: Callable[[], dict[str, Any]]) -> Question:
        def ask(connection: Any) -> object:
            number = draw.randrange(rows.count)
            cursor = cursor_of(rows.at(number), number + 1)
            return list_rows(connection, Filters(**make()), 50, cursor)

        return ask

    def template() -> dict[str, Any]:
        return {"template_name": draw.choice(TEMPLATES)}

    def error() -> dict[str, Any]:
        return {"error_code": draw.choice(list(ERRORS))}

    return {
        "no filter": page(dict),
        "no filter, 200 rows": page(dict, 200),
        "any page by cursor": deep(dict),
        "a day": page(lambda: some_time(1)),
        "template": page(template),
        "template, any page": deep(template),
        "template, a day": page(lambda: {**template(), **some_time(1)}),
        "user": page(lambda: {"user_id": _user(draw)}),
        "user, any page": deep(lambda: {"user_id": _user(draw)}),
        "user without rows": page(lambda: {"user_id": "nobody"}),
        "endpoint": page(lambda: {"endpoint": draw.choice(ENDPOINTS)}),
        "model": page(lambda: {"model_key": draw.choice(MODELS)}),
        "error": page(error),
        "error, a week": page(lambda: {**error(), **some_time(7)}),
        "level 0": page(lambda: {"fallback_level": 0}),
        "level 1": page(lambda: {"fallback_level": 1}),
        "level 2": page(lambda: {"fallback_level": 2}),
        "flag": page(lambda: {"flags": (draw.choice(list(FLAGS)),)}),
        "flag, any page": deep(lambda: {"flags": (draw.choice(list(FLAGS)),)}),
        "flag without rows": page(lambda: {"flags": ("never",)}),
        "request": page(lambda: {"request_id": rows.request_id(draw.randrange(rows.count))}),
        "template and error": page(lambda: {**template(), **error()}),
        "template and user": page(lambda: {**template(), "user_id": _user(draw)}),
        "template and model": page(lambda: {**template(), "model_key": draw.choice(MODELS)}),
        "template and flag": page(lambda: {**template(), "flags": (draw.choice(list(FLAGS)),)}),
        "endpoint and model": page(
            lambda: {"endpoint": draw.choice(ENDPOINTS), "model_key": draw.choice(MODELS)}
        ),
        "template and level 2": page(lambda: {**template(), "fallback_level": 2}),
        "endpoint and error": page(lambda: {"endpoint": draw.choice(ENDPOINTS), **error()}),
    }  # fmt: skip


def measure(
    database: Database, rows: Rows, times: int, bodies: int, console: Console
) -> list[dict[str, Any]]:
    draw = random.Random(11)
    # What each question costs on this machine at this load whatever it asks.
    floor = timed(database, lambda connection: connection.execute(text("SELECT 1")).all(), times)
    found = [{"question": "SELECT 1", **floor}]
    for name, ask in questions(rows, draw).items():
        found.append({"question": name, "is_list": True, **timed(database, ask, times)})
    newest = max(0, rows.count - bodies)

    def one(connection: Any) -> object:
        request_id = rows.request_id(draw.randrange(newest, rows.count))
        return one_row(connection, request_id), body_of(connection, request_id)

    found.append({"question": "one row with texts", **timed(database, one, times)})
    few = max(3, times // 10)
    metrics = LogMetrics(database, lambda: rows.end)
    for hours in (24.0, 24.0 * DAYS):
        name = f"numbers of {hours:g} hours"
        took = timed(database, _numbers_of(metrics, hours), few)
        found.append({"question": name, **took})
    since = rows.end - timedelta(hours=24)
    average = text(
        "SELECT template_name, AVG(execution_time_ms), AVG(fallback_level) FROM enhancement_logs"
        " WHERE created_at > :since GROUP BY template_name"
    )
    shown = since if database.is_postgres else since.strftime("%Y-%m-%d %H:%M:%S")
    took = timed(database, lambda c: c.execute(average, {"since": shown}).all(), few)
    found.append({"question": "averages by template of 24 hours", **took})
    return found


def _numbers_of(metrics: LogMetrics, hours: float) -> Question:
    return lambda _connection: metrics.summary(hours)


def timed(database: Database, ask: Question, times: int) -> dict[str, Any]:
    took, cpu = [], []
    for _ in range(times):
        began, cpu_began = time.perf_counter(), time.thread_time()
        with database.reading() as connection:
            ask(connection)
        took.append((time.perf_counter() - began) * 1000)
        cpu.append((time.thread_time() - cpu_began) * 1000)
    took.sort()
    cpu.sort()
    p95 = max(0, -(-times * 95 // 100) - 1)
    return {
        "times": times,
        "p50_ms": round(took[times // 2], 2),
        "p95_ms": round(took[p95], 2),
        "max_ms": round(took[-1], 2),
        # Of this process: all of the work on SQLite, on PostgreSQL only what is not its server's.
        "cpu_p95_ms": round(cpu[p95], 2),
    }


def append(database: Database, rows: Rows, number: int) -> dict[str, Any]:
    """Entries with texts through the writer, onto what is there already."""
    writer = LogWriter(database, Logs(), max_entries=number, max_bytes=1 << 30)
    process_began = time.process_time()
    entries = [entry(f"appended-{one}", rows.end) for one in range(number)]
    began, cpu_began = time.perf_counter(), time.thread_time()
    for one in entries:
        writer.add(one)
    queued = time.thread_time() - cpu_began
    writer.start()
    is_done = writer.flush(300)
    took = time.perf_counter() - began
    writer.stop()
    return {
        "entries": number,
        "add_cpu_us": round(queued / number * 1e6, 1),
        "entries_per_s": round(number / took) if is_done else None,
        "cpu_us": round((time.process_time() - process_began) / number * 1e6, 1),
        "dropped": writer.counts.dropped,
    }


def retain(database: Database, rows: Rows, due: int) -> dict[str, Any]:
    now = rows.at(due) + timedelta(days=60)
    retention = Retention(database, Logs(row_days=60, body_days=60), wall=lambda: now)
    began = time.perf_counter()
    removed = retention.tick(now)
    took = time.perf_counter() - began
    return {
        "rows": removed.rows,
        "bodies": removed.bodies,
        "seconds": round(took, 1),
        "rows_per_s": round(removed.rows / took),
    }


# --- the whole --------------------------------------------------------------------------------


def run_engine(
    url: str, fill: Callable[[Rows, int], None], args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    database = open_database(url)
    migrate(database)
    rows = Rows(args.rows, datetime.now(UTC).replace(microsecond=0))
    began = time.perf_counter()
    fill(rows, args.bodies)
    filled = time.perf_counter() - began
    engine = "postgresql" if database.is_postgres else "sqlite"
    console.print(f"{engine}: {args.rows} rows in {filled:.0f} s")
    record: dict[str, Any] = {
        "engine": engine,
        "rows": args.rows,
        "bodies": args.bodies,
        "fill_s": round(filled, 1),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "questions": measure(database, rows, args.times, args.bodies, console),
        "append": append(database, rows, args.append),
        "retention": retain(database, rows, args.rows // 10),
    }
    database.dispose()
    record["goal_met"] = all(
        one["p95_ms"] <= GOAL_MS for one in record["questions"] if one.get("is_list")
    )
    show(record, console)
    return record


def show(record: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{record['engine']}, {record['rows']} rows, ms",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for name in ("question", "times", "p50", "p95", "max", "cpu p95"):
        table.add_column(name, justify="left" if name == "question" else "right")
    for one in record["questions"]:
        keys = ("question", "times", "p50_ms", "p95_ms", "max_ms", "cpu_p95_ms")
        table.add_row(*(str(one[key]) for key in keys))
    console.print(table)
    word = "met" if record["goal_met"] else "missed"
    console.print(
        f"p95 of every list ≤ {GOAL_MS:g} ms: {word}; load {record['load_average']} before"
    )
    console.print(f"append {record['append']}")
    console.print(f"retention {record['retention']}")


def run_postgres(server: Server, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    name = server.create()
    url = server.url_of(name)
    plain = url.replace("postgresql+psycopg", "postgresql")
    try:
        return run_engine(
            url, lambda rows, bodies: fill_postgres(plain, rows, bodies), args, console
        )
    finally:
        server.drop(name)


def main() -> int:
    args = _arguments()
    console = Console()
    record: dict[str, Any] = {**machine(), "engines": []}
    if args.engine != "postgresql":
        with tempfile.TemporaryDirectory(prefix="gateway-logs-") as folder:
            path = f"{folder}/gateway.sqlite3"
            record["engines"].append(
                run_engine(
                    f"sqlite:///{path}",
                    lambda rows, bodies: fill_sqlite(path, rows, bodies),
                    args,
                    console,
                )
            )
    if args.engine != "sqlite":
        with find_server() as server:
            if server is None:
                console.print("no PostgreSQL: left out")
            else:
                record["engines"].append(run_postgres(server, args, console))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("sqlite", "postgresql"), help="measure one of them")
    parser.add_argument("--rows", type=_count, default=1_000_000)
    parser.add_argument("--bodies", type=_count, default=50_000, help="newest rows with texts")
    parser.add_argument("--times", type=_count, default=60, help="each question is asked (60)")
    parser.add_argument("--append", type=_count, default=5_000, help="entries that are written")
    parser.add_argument(
        "--json",
        type=Path,
        default=REPOSITORY / "benchmarks" / "gateway-logs.json",
        help="where numbers are written (benchmarks/gateway-logs.json)",
    )
    return parser.parse_args()


def _count(raw: str) -> int:
    if not raw.isdecimal() or int(raw) < 1:
        raise argparse.ArgumentTypeError(f"{raw!r} is no number from 1")
    return int(raw)


if __name__ == "__main__":
    sys.exit(main())

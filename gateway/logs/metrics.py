"""The log of the last hours in numbers.

How many there were is exact. Everything else is of the newest SAMPLE rows of these hours, so that
the time is bounded however many there are; up to that many it is exact as well, and the answer
says which it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select

from gateway.store.database import Database
from gateway.store.tables import prompt_logs

# The p95 of so many lies between the p94.5 and the p95.5 of all in 19 of 20 cases (binomial), and
# they take a quarter of a second of processor time (scripts/bench_gateway_logs.py).
SAMPLE = 10_000
MOST_NAMES = 200  # of templates, models, error codes

COLUMNS = (
    "template_name",
    "model_key",
    "error_code",
    "status",
    "fallback_level",
    "execution_time_ms",
    "worker_ms",
    "tokens_in",
    "tokens_out",
    "compressed",
    "cache_hit",
)
_EMPTY: Mapping[str, Sequence[Any]] = {name: () for name in COLUMNS}


class LogMetrics:
    """Without state; any thread."""

    def __init__(self, database: Database, wall: Callable[[], datetime]):
        self._database = database
        self._wall = wall

    def summary(self, hours: float) -> Mapping[str, Any]:
        """JSON values. Raises StoreUnavailable."""
        since = self._wall() - timedelta(hours=hours)
        is_recent = prompt_logs.c.created_at >= since
        with self._database.reading() as connection:
            total = connection.execute(
                select(func.count()).select_from(prompt_logs).where(is_recent)
            ).scalar_one()
            newest = (
                select(*(prompt_logs.c[name] for name in (*COLUMNS, "created_at")))
                .where(is_recent)
                .order_by(prompt_logs.c.created_at.desc(), prompt_logs.c.id.desc())
                .limit(SAMPLE)
            )
            found = connection.execute(newest).all()
        return {
            "hours": hours,
            "executions": total,
            "sample": {
                "rows": len(found),
                "is_exact": len(found) == total,
                "since": found[-1].created_at.isoformat() if found else None,
            },
            **summed([row[:-1] for row in found]),
        }


def summed(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Numbers of these rows, each with the values of COLUMNS in their order."""
    by_template: dict[str, list[Sequence[Any]]] = defaultdict(list)
    for row in rows:
        by_template[row[0] or ""].append(row)
    largest = sorted(by_template.items(), key=lambda one: (-len(one[1]), one[0]))
    columns = _columns(rows)
    levels = Counter(columns["fallback_level"])
    return {
        **_numbers(columns),
        "fallback_levels": {str(level): levels.get(level, 0) for level in (0, 1, 2)},
        "errors": _counts(columns["error_code"]),
        "models": _counts(columns["model_key"]),
        "templates": [
            {"template_name": name or None, **_numbers(_columns(own))}
            for name, own in largest[:MOST_NAMES]
        ],
    }


def _columns(rows: Sequence[Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    # By column, since to ask each row for each value takes several times as long.
    return dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else _EMPTY


def _numbers(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    hits = [one for one in columns["cache_hit"] if one is not None]
    return {
        "count": len(columns["status"]),
        "failed": sum(status >= 400 for status in columns["status"]),
        "compressed": sum(map(bool, columns["compressed"])),
        "execution_time_ms": spread(columns["execution_time_ms"]),
        "worker_ms": spread(columns["worker_ms"]),
        # Of the requests that asked the cache; None: none did.
        "hit_rate": round(sum(hits) / len(hits), 6) if hits else None,
        "fallback_level_mean": _mean(columns["fallback_level"]),
        "tokens_in": sum(filter(None, columns["tokens_in"])),
        "tokens_out": sum(filter(None, columns["tokens_out"])),
    }


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and percentiles (the smallest value that so many are not above) of those there are."""
    known = sorted(one for one in values if one is not None)
    return {
        "mean": _mean(known),
        "p50": _percentile(known, 50),
        "p95": _percentile(known, 95),
        "max": round(known[-1], 3) if known else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    if not ordered:
        return None
    return round(ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 3)


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common(MOST_NAMES))

"""Numbers of the last hours: the same as by hand, and bounded."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.logs import metrics as metrics_module
from gateway.logs.metrics import LogMetrics, spread
from gateway.store.database import Database
from tests.gateway.log_parts import NOW, entry, write

HOUR_S = 3600.0


def test_the_numbers_are_those_of_the_rows(database: Database) -> None:
    write(
        database,
        *(
            entry(
                f"a{n}",
                n,
                template_name="a",
                execution_time_ms=float(n + 1),
                worker_ms=float(n),
                tokens_in=10,
                tokens_out=2,
                model_key="qwen_instruct",
                cache_hit=n != 0,
            )
            for n in range(20)
        ),
        entry("b", template_name="b", status=503, error_code="worker_busy", fallback_level=2),
        entry("old", 3 * HOUR_S, template_name="a", execution_time_ms=9999.0),
    )

    told = LogMetrics(database, lambda: NOW).summary(2)

    assert (told["hours"], told["executions"], told["count"]) == (2, 21, 21)
    assert told["sample"]["is_exact"] is True
    assert told["errors"] == {"worker_busy": 1}
    assert told["failed"] == 1
    assert told["models"] == {"qwen_instruct": 20}
    assert told["fallback_levels"] == {"0": 20, "1": 0, "2": 1}
    assert (told["tokens_in"], told["tokens_out"]) == (200, 40)
    assert told["hit_rate"] == 0.95
    first, second = told["templates"]
    assert (first["template_name"], first["count"]) == ("a", 20)
    assert first["execution_time_ms"] == {"mean": 10.5, "p50": 10.0, "p95": 19.0, "max": 20.0}
    assert first["worker_ms"]["mean"] == 9.5
    assert (second["template_name"], second["fallback_level_mean"]) == ("b", 2.0)
    assert second["worker_ms"] == {"mean": None, "p50": None, "p95": None, "max": None}
    assert second["hit_rate"] is None


def test_without_rows_there_is_nothing_and_no_error(database: Database) -> None:
    told = LogMetrics(database, lambda: NOW).summary(24)

    assert (told["executions"], told["count"], told["templates"]) == (0, 0, [])
    assert told["sample"] == {"rows": 0, "is_exact": True, "since": None}
    assert told["fallback_levels"] == {"0": 0, "1": 0, "2": 0}


def test_of_more_rows_than_the_sample_the_newest_are_taken_and_it_is_said(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "SAMPLE", 5)
    write(database, *(entry(f"r{n}", n, execution_time_ms=float(n)) for n in range(12)))

    told = LogMetrics(database, lambda: NOW).summary(1)

    assert (told["executions"], told["count"]) == (12, 5)
    assert told["sample"]["is_exact"] is False
    assert told["sample"]["since"] == "2026-11-26T11:59:56+00:00"
    assert told["execution_time_ms"]["max"] == 4.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_values_that_so_many_are_not_above(values: list[float]) -> None:
    told = spread(values)

    ordered = sorted(values)
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        value = told[name]
        assert value is not None
        reached = [one for one in ordered if round(one, 3) <= value]
        assert len(reached) >= share * len(values)
        below = [one for one in ordered if round(one, 3) < value]
        assert len(below) < share * len(values)
    assert told["mean"] == pytest.approx(statistics.fmean(values), abs=1e-3)

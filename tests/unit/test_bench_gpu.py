"""That the benchmark of a card runs, with stand-ins for the card and a model of no size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import tests.card
from worker.config import REPOSITORY
from worker.engine.chat.graphs import PassGraphs
from worker.vram.phases import PAGE_TOKENS


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    module = importlib.import_module("bench_gpu")
    monkeypatch.setattr(module, "SMALL", {3: (32, 2, 48, 4, 2)})
    monkeypatch.setattr(module, "CONTEXT", 300)
    monkeypatch.setattr(module, "block_tokens", lambda *_: PAGE_TOKENS)
    for name in ("reads_pages", "can_attend"):
        monkeypatch.setattr(module, name, lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", tests.card.varlen_attn)
    monkeypatch.setattr(PassGraphs.__init__, "__kwdefaults__", {"recorder": tests.card.Tapes})
    return module


@pytest.mark.timeout(300)
def test_every_row_of_a_card_is_measured_and_written(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "found" / "gpu.json"
    arguments = ["--size", "3", "--device", "cpu", "--rounds", "1", "--only", "G1", "ways", "G4"]

    assert bench.main([*arguments, "--json", str(path)]) == 0

    record = json.loads(path.read_text())
    assert record["left_out"] == []
    assert record["limits"]["copy_gb_per_s"] > 0
    rows = {(row["goal"], row["what"]): row for row in record["rows"]}
    assert [goal for goal, _ in rows] == ["G1", *[""] * 6, "G4"]
    assert {row.get("way") for row in record["rows"]} == {
        None, "recorded", "over pages", "gathered"
    }  # fmt: skip
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in record["rows"])
    assert 0 < rows["G1", "decode, one sequence"]["of_the_limit"]


def test_what_would_begin_after_the_budget_is_left_out_and_said(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    arguments = ["--size", "3", "--device", "cpu", "--rounds", "1", "--budget-s", "-1"]

    assert bench.main([*arguments, "--json", str(path)]) == 0

    record = json.loads(path.read_text())
    assert record["rows"] == []
    assert [one.split(":")[0] for one in record["left_out"]] == ["G1", "ways", "G4", "G2", "G3"]
    assert "G1 is left out" in capsys.readouterr().out


def test_a_goal_is_met_by_the_median_if_no_round_is_far_below(bench: Any) -> None:
    def met(*ratios: float) -> bool:
        row = bench._row("G2", "", "", [(1.0, one) for one in ratios], unit="tok/s", amount=100.0)
        return bool(row["met"])

    assert met(4.0, 4.5, 3.6)
    assert not met(4.0, 4.5, 3.5)
    assert not met(3.9, 3.9, 4.5)

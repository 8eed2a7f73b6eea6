#!/usr/bin/env python
"""How often the content detector and the refusal check are right, on frozen prompts.

    python scripts/evaluate_detector.py [--json benchmarks/detector.json] [--misses]

Prints a table for each. The parts: development, which the lists were made with; held_out, written
before the lists, in other patterns; fresh, written after them; last, written after what held_out
and fresh had shown was changed. Each but the first was measured before its misses were looked at
(FIRST). Cases of the refusal check are named by number, not printed. Exits with 1 when a goal is
missed on any part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from gateway.content.detect import detect  # noqa: E402
from gateway.content.refusal import refusal  # noqa: E402

DATA = REPOSITORY / "tests" / "gateway" / "data"
PROMPTS = DATA / "detector_prompts.tsv"
CASES = DATA / "refusal_cases.json"
PARTS = ("development", "held_out", "fresh", "last")
# Recall and precision (refusal: recall and false refusals) when a part was measured for the first
# time, before anything was changed because of what it missed. That is what to expect of prompts
# nobody has seen; the figures of today are only kept from falling.
FIRST = {
    "detector": {"held_out": (0.9883, 0.9912), "fresh": (0.9412, 0.8889), "last": (0.9737, 0.9867)},
    "refusal": {"held_out": (0.9792, 0.0), "fresh": (0.8788, 0.0), "last": (0.9375, 0.0)},
}
RECALL, PRECISION = 0.99, 0.97  # the goals of the detector
REFUSED, FALSELY = 0.99, 0.02  # of the refusal check: recall at least, false refusals at most


@dataclass(frozen=True, slots=True)
class Prompt:
    part: str  # one of PARTS
    label: str  # sfw | nsfw
    text: str


@dataclass(frozen=True, slots=True)
class Case:
    part: str
    group: str  # minors | people | harmless
    number: int  # in its part and group
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Counts of one part."""

    hits: int
    missed: int
    false: int
    right: int  # harmless and taken for it

    @property
    def recall(self) -> float:
        return self.hits / (self.hits + self.missed)

    @property
    def precision(self) -> float:
        return self.hits / (self.hits + self.false)

    @property
    def false_rate(self) -> float:
        return self.false / (self.false + self.right)


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    rows = path.read_text("utf-8").split("\n")
    return [Prompt(*row.split("\t")) for row in rows if row and not row.startswith("#")]


def read_cases(path: Path = CASES) -> list[Case]:
    """Every case, put together as the file's `about` says."""
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    cases: list[Case] = []
    for group in ("minors", "people"):
        for part in PARTS:
            made = _made(document[group][part], document["themes"], document["frames"])
            cases += [Case(part, group, number, texts) for number, texts in enumerate(made)]
    for part in PARTS:
        for number, text in enumerate(document["harmless"][part]):
            cases.append(Case(part, "harmless", number, (text,)))
    return cases


def _made(
    subjects: Sequence[str], themes: Sequence[str], frames: Sequence[Sequence[str]]
) -> Iterator[tuple[str, ...]]:
    for at, subject in enumerate(subjects):
        for turn, step in enumerate((0, 5, 11)):
            theme = themes[(at + step) % len(themes)]
            frame = frames[(at + turn) % len(frames)]
            yield tuple(text.format(subject=subject, theme=theme) for text in frame)


def score_detector(prompts: Sequence[Prompt], part: str) -> tuple[Score, list[str]]:
    counts = {"hits": 0, "missed": 0, "false": 0, "right": 0}
    wrong = []
    for prompt in prompts:
        if prompt.part != part:
            continue
        found = detect(prompt.text)
        if prompt.label == "nsfw":
            key = "hits" if found.mode == "nsfw" else "missed"
        else:
            key = "false" if found.mode == "nsfw" else "right"
        counts[key] += 1
        if key in ("missed", "false"):
            because = f"  {list(found.terms)}" if found.terms else ""
            wrong.append(f"{key:7}{prompt.text}{because}")
    return Score(**counts), wrong


def score_refusal(cases: Sequence[Case], part: str) -> tuple[Score, list[str]]:
    counts = {"hits": 0, "missed": 0, "false": 0, "right": 0}
    wrong = []
    for case in cases:
        if case.part != part:
            continue
        found = refusal(case.texts)
        if case.group == "harmless":
            key = "false" if found else "right"
        else:
            key = "hits" if found else "missed"
        counts[key] += 1
        if key in ("missed", "false"):
            wrong.append(f"{key:7}{case.group} {case.number}")
    return Score(**counts), wrong


def microseconds(prompts: Sequence[Prompt]) -> dict[str, float]:
    """Median and 99th percentile of `detect` and `refusal` for one prompt, after the first call."""
    found = {}
    for name, call in (("detect", detect), ("refusal", lambda text: refusal((text,)))):
        call("first")
        took = []
        for prompt in prompts:
            best = float("inf")  # of three: what other programs took of the core is not ours
            for _ in range(3):
                began = time.perf_counter()
                call(prompt.text)
                best = min(best, time.perf_counter() - began)
            took.append(best * 1e6)
        took.sort()
        found[f"{name}_p50_us"] = round(took[len(took) // 2], 1)
        found[f"{name}_p99_us"] = round(took[len(took) * 99 // 100], 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--misses", action="store_true", help="print what was judged wrongly")
    arguments = parser.parse_args()
    prompts, cases = read_prompts(), read_cases()
    report: dict[str, Any] = {}
    is_met = True
    for title, path, scored in (
        ("detector", PROMPTS, [score_detector(prompts, part) for part in PARTS]),
        ("refusal", CASES, [score_refusal(cases, part) for part in PARTS]),
    ):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{title}, {path.name} {sha256[:12]}")
        print(f"  {'part':12} {'to find':>8} {'harmless':>9} {'recall':>8} {'precision':>10}"
              f" {'false':>7}")  # fmt: skip
        report[title] = {"file": path.name, "sha256": sha256}
        for part, (score, wrong) in zip(PARTS, scored, strict=True):
            print(
                f"  {part:12} {score.hits + score.missed:8} {score.false + score.right:9}"
                f" {score.recall:8.4f} {score.precision:10.4f} {score.false_rate:7.4f}"
            )
            report[title][part] = {
                "to_find": score.hits + score.missed,
                "harmless": score.false + score.right,
                "recall": round(score.recall, 4),
                "precision": round(score.precision, 4),
                "false_rate": round(score.false_rate, 4),
                "first_measured": FIRST[title].get(part),
                "wrong": wrong,
            }
            if title == "detector":
                is_met &= score.recall >= RECALL and score.precision >= PRECISION
            else:
                is_met &= score.recall >= REFUSED and score.false_rate <= FALSELY
            if arguments.misses:
                print("".join(f"    {line}\n" for line in wrong), end="")
    report["timing"] = microseconds(prompts)
    print("  ".join(f"{name} {value}" for name, value in report["timing"].items()))
    if arguments.json is not None:
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        arguments.json.write_text(text, "utf-8")
    if not is_met:
        print("a goal is missed", file=sys.stderr)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

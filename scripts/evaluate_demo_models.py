"""Measure the demo models on prompts that no training has seen; print a table and write JSON.

    python scripts/evaluate_demo_models.py                        all three, the published counts
    python scripts/evaluate_demo_models.py --only image --count 30 --sheets state/sheets

The figures in models/*/README.md come from this script. What the models are measured with: the
text checks of demo_models/chat_checks.py and the shape finder of demo_models/checkers.py.

Exit codes: 0 every goal is met; 1 one is missed; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
COUNTS = {"chat": 500, "image": 300, "video": 200}

# (model, path in its figures, what it is, bound, whether more is better)
GOALS: tuple[tuple[str, str, str, float, bool], ...] = (
    ("chat", "greedy.keeps", "objects, colours, numbers of the prompt survive", 0.97, True),
    ("chat", "greedy.style", "image or video words as asked", 0.97, True),
    ("chat", "greedy.ended", "ends by itself", 0.99, True),
    ("chat", "greedy.no_contradiction", "nothing added contradicts the prompt", 0.95, True),
    ("chat", "sampled.keeps", "the same at temperature 0.7", 0.97, True),
    ("chat", "sampled.style", "the same at temperature 0.7", 0.97, True),
    ("chat", "sampled.ended", "the same at temperature 0.7", 0.99, True),
    ("chat", "sampled.no_contradiction", "the same at temperature 0.7", 0.95, True),
    ("image", "right", "shapes, colours, places, sizes, background right", 0.90, True),
    ("image", "negative_prompt.shows_the_colour_with_negative",
     "shows a colour that the negative prompt names", 0.02, False),
    ("image", "seconds_a_picture_median", "seconds a picture, 15 steps", 3.0, False),
    ("video", "direction_right", "moves as asked", 0.90, True),
    ("video", "pinned.start", "error of the pinned first frame", 0.08, False),
    ("video", "pinned.end", "error of the pinned last frame", 0.08, False),
    ("video", "pinned.both", "error of both pinned frames", 0.08, False),
    ("video", "seconds_a_clip_median", "seconds a clip, 25 steps", 8.0, False),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    import torch
    from rich.console import Console

    from demo_models.quiet import quiet_libraries

    torch.set_num_threads(options.threads)
    quiet_libraries()
    console = Console()
    names = options.only or list(COUNTS)
    report: dict[str, Any] = _previous(options.json) if options.only else {}
    try:
        for name in names:
            count = options.count or COUNTS[name]
            console.print(f"{name}: {count} held-out prompts …")
            started = time.monotonic()
            report[name] = MEASURES[name](options.models_dir / f"demo-{name}", count, options)
            report[name]["took_s"] = round(time.monotonic() - started, 1)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    report["machine"] = _machine(options.threads)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if _show(report, names, console) else 1


def _chat(folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    from demo_models.chat_checks import evaluate_chat

    return evaluate_chat(folder, count, seed=options.seed)


def _image(folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    from demo_models.image_checks import evaluate_image, picture_sheet

    figures, painted = evaluate_image(folder, count, seed=options.seed)
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
        picture_sheet(painted[:24]).save(options.sheets / "pictures.png")
        failures = [one for one in painted if one.wrong]
        if failures:
            picture_sheet(failures[:24]).save(options.sheets / "picture-failures.png")
    return figures


def _video(folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    from demo_models.video_checks import evaluate_video

    return evaluate_video(folder, count, seed=options.seed, sheets=options.sheets)


MEASURES: dict[str, Callable[[Path, int, argparse.Namespace], dict[str, Any]]] = {
    "chat": _chat,
    "image": _image,
    "video": _video,
}


def _show(report: dict[str, Any], names: Sequence[str], console: Any) -> bool:
    """Print the goals beside what was measured; True when all that were measured are met."""
    from rich.table import Table

    table = Table(title="Demo models, held-out prompts")
    for column in ("model", "what", "goal", "measured", ""):
        table.add_column(column, justify="right" if column in ("goal", "measured") else "left")
    good = True
    for name, path, what, bound, more in GOALS:
        if name not in names:
            continue
        value: Any = report[name]
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        met = value is not None and (value >= bound if more else value <= bound)
        good = good and met
        sign = "≥" if more else "≤"
        table.add_row(
            f"demo-{name}", f"{what} ({path})", f"{sign} {bound}",
            "not measured" if value is None else f"{value}", "met" if met else "missed",
        )  # fmt: skip
    console.print(table)
    return good


def _machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        **{name: version(name) for name in ("torch", "transformers", "diffusers")},
    }


def _previous(file: Path | None) -> dict[str, Any]:
    """With --only, the other models' figures stay in the file."""
    if file is None or not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_bytes())
    return content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(COUNTS), help="this model only; may be repeated"
    )
    parser.add_argument(
        "--count", type=int, help="prompts a model (default: 500 chat, 300 image, 200 video)"
    )
    parser.add_argument("--seed", type=int, default=7, help="of prompts and pictures (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=REPOSITORY / "models",
        metavar="DIR",
        help="where the model folders are (default: models)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here, such as "
        "benchmarks/demo-models.json",
    )  # fmt: skip
    parser.add_argument(
        "--sheets", type=Path, metavar="DIR", help="write contact sheets of pictures and clips here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

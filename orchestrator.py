#!/usr/bin/env python3
"""Start, watch and stop Verbatim: chat on one port, images and videos on the other.

  python orchestrator.py                      start with the profile that fits this machine
  python orchestrator.py --profile demo       start with a profile of configs/, or one by path
  python orchestrator.py --check              check profile, catalog, files of models and adapters,
                                              and the gateway; start nothing
  python orchestrator.py plan [--memory 24GiB] [--job TYPE --size WxH ...]
                                              what jobs take on the device, and whether they fit
  python orchestrator.py status [--json]      show what runs
  python orchestrator.py stop                 drain, then stop

Exit codes:
  0  stopped as asked; check passed
  1  unexpected error, or running work was cut short by the stop
  2  wrong command line
  3  the profile, the catalog or an environment override is wrong
  4  --check: model files are missing or damaged; plan: they are missing and of unknown size
  5  already running, or a port is taken
  6  status, stop: no orchestrator runs with this state folder
  7  plan: a job does not fit
  8  --check: model files are good, and the gateway's own check is not
"""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from worker import log
from worker.config import load_settings, parse_size, read_keys
from worker.errors import (
    ConfigError,
    InvalidRequest,
    ModelUnavailable,
    OutOfRange,
    Unsupported,
    WorkerError,
)
from worker.supervisor import check, control, planning
from worker.supervisor.budget import budget_of
from worker.supervisor.daemon import AlreadyRunning, run
from worker.vram.probe import first_card
from worker.vram.ways import EXACTNESS

EXIT_ERROR, EXIT_USAGE, EXIT_CONFIG, EXIT_FILES, EXIT_RUNNING, EXIT_NO_FIT = 1, 2, 3, 4, 5, 7
EXIT_GATEWAY = 8


def main() -> int:
    args = _arguments()
    errors = Console(stderr=True)
    try:
        if args.command in ("status", "stop"):
            return control.run(args.command, os.environ, as_json=args.json)
        card = first_card()
        settings = load_settings(args.profile or check.choose_profile(card), os.environ)
        if args.command == "plan":
            budget = budget_of(settings, card, args.memory)
            asked = planning.Asked(
                args.job, args.size, args.frames, args.images, args.exactness,
                args.reference, tuple(args.lora), args.jobs,
            )  # fmt: skip
            fits = planning.show(planning.Planner(settings, budget), asked, budget, Console())
            return 0 if fits else EXIT_NO_FIT
        keys = read_keys(os.environ)
        chat, media = check.validate(settings, keys)
        if args.check:
            console = Console()
            findings = check.look(settings, chat, media, console)
            gateway = check.ask_gateway(settings, os.environ)
            check.show_plan(settings, findings, gateway, keys, card, console)
            if any(one.problems for one in findings):
                return EXIT_FILES
            return 0 if gateway is None or gateway.is_good else EXIT_GATEWAY
        log.set_up_file("orchestrator", settings.state_dir / "logs" / "orchestrator.log")
        return 0 if run(settings, os.environ) else 1
    except ConfigError as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_CONFIG
    except AlreadyRunning as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_RUNNING
    except (InvalidRequest, OutOfRange, Unsupported) as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_USAGE
    except ModelUnavailable as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_FILES
    except WorkerError as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_ERROR


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", choices=("start", "plan", "status", "stop"), default="start"
    )
    parser.add_argument("--profile", metavar="NAME|PATH", help="default: what fits this machine")
    parser.add_argument("--check", action="store_true", help="check everything and start nothing")
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--memory", type=_bytes, metavar="SIZE", help="of the device; default: this machine's"
    )
    plan.add_argument("--job", metavar="TYPE", help="chat or a job type; default: one of each kind")
    plan.add_argument("--size", type=_size, metavar="WxH", help="pixels; default: the model's own")
    plan.add_argument("--frames", type=int, metavar="N", help="of a video; default: the model's")
    plan.add_argument("--images", type=int, metavar="N", help="of a job; default: 1")
    plan.add_argument(
        "--reference",
        choices=dict.fromkeys(one for kind in planning.REFERENCES.values() for one in kind),
        help="what a picture is for. Images: image (begin from it), copy, style, character; "
        "videos: image (what the film shows), first, last, both (its frames)",
    )
    plan.add_argument(
        "--lora", metavar="ID", action="append", default=[], help="of the catalog; may be repeated"
    )
    plan.add_argument(
        "--jobs", type=int, metavar="N", help="so many of these image jobs share a batch"
    )
    plan.add_argument(
        "--exactness", choices=EXACTNESS, help="least that will do; default: the profile's"
    )
    parser.add_argument("--json", action="store_true", help="status: print JSON")
    return parser.parse_args()


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT in pixels, such as 832x480")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Start, watch and stop Verbatim: chat on one port, images and videos on the other.

  python orchestrator.py                      start with the profile that fits this machine
  python orchestrator.py --profile demo       start with a profile of configs/, or one by path
  python orchestrator.py --check              check profile, catalog and model files; start nothing
  python orchestrator.py status [--json]      show what runs
  python orchestrator.py stop                 drain, then stop

Exit codes:
  0  stopped as asked; check passed
  1  unexpected error, or running work was cut short by the stop
  2  wrong command line
  3  the profile, the catalog or an environment override is wrong
  4  --check: model files are missing or damaged
  5  already running, or a port is taken
  6  status, stop: no orchestrator runs with this state folder
"""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from worker import log
from worker.config import load_settings, read_keys
from worker.errors import ConfigError
from worker.supervisor import check, control
from worker.supervisor.daemon import AlreadyRunning, run
from worker.vram.probe import first_card

EXIT_CONFIG, EXIT_FILES, EXIT_RUNNING = 3, 4, 5


def main() -> int:
    args = _arguments()
    errors = Console(stderr=True)
    try:
        if args.command in ("status", "stop"):
            return control.run(args.command, os.environ, as_json=args.json)
        card = first_card()
        settings = load_settings(args.profile or check.choose_profile(card), os.environ)
        keys = read_keys(os.environ)
        chat, media = check.validate(settings, keys)
        if args.check:
            console = Console()
            findings = check.look(settings, chat, media, console)
            check.show_plan(settings, findings, keys, card, console)
            return EXIT_FILES if any(one.problems for one in findings) else 0
        log.set_up_file("orchestrator", settings.state_dir / "logs" / "orchestrator.log")
        return 0 if run(settings, os.environ) else 1
    except ConfigError as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_CONFIG
    except AlreadyRunning as exc:
        errors.print(f"{exc}", style="red", markup=False, soft_wrap=True)
        return EXIT_RUNNING


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("start", "status", "stop"), default="start")
    parser.add_argument("--profile", metavar="NAME|PATH", help="default: what fits this machine")
    parser.add_argument("--check", action="store_true", help="check everything and start nothing")
    parser.add_argument("--json", action="store_true", help="status: print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

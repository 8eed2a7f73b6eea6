"""Start one front: `python -m worker.front chat|media --profile PATH`.

Runs gunicorn with configs/gunicorn.conf.py in this process. Started and watched by
orchestrator.py; of no use alone.
"""

from __future__ import annotations

import argparse
import os
import sys

from gunicorn.app.wsgiapp import WSGIApplication

from worker import log
from worker.config import CONFIGS
from worker.front.wsgi import NAME_VARIABLE, PROFILE_VARIABLE
from worker.lifeline import die_with_parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("chat", "media"))
    parser.add_argument("--profile", required=True)
    args = parser.parse_args()
    die_with_parent()
    log.set_up(f"front {args.name}")
    os.environ[NAME_VARIABLE] = args.name
    os.environ[PROFILE_VARIABLE] = args.profile
    sys.argv = [
        "gunicorn",
        "--config",
        str(CONFIGS / "gunicorn.conf.py"),
        "worker.front.wsgi:build()",
    ]
    WSGIApplication("%(prog)s", prog="gunicorn").run()


if __name__ == "__main__":
    main()

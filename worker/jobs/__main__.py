"""Start the job runner: `python -m worker.jobs --profile PATH`.

Started and watched by orchestrator.py; of no use alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

import setproctitle

from worker import log as worker_log
from worker.config import load_settings
from worker.errors import ConfigError, JournalUnavailable
from worker.jobs.service import RunnerService
from worker.lifeline import die_with_any_thread, die_with_parent

EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; the supervisor starts a new one

log = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", required=True)
    args = parser.parse_args()
    setproctitle.setproctitle("verbatim runner")
    worker_log.set_up("runner")
    die_with_parent()
    die_with_any_thread()
    try:
        settings = load_settings(args.profile, os.environ)
        service = RunnerService(settings, os.environ)
        signal.signal(signal.SIGTERM, lambda *_: service.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the orchestrator decides when to stop
        service.run()
        # Senders and look-ups that hang are left behind; whatever they do is done again.
        logging.shutdown()
        os._exit(0)
    except ConfigError as exc:
        log.critical("%s", exc)
        return 3  # as gunicorn does for an app that cannot start: trying again cannot help
    except JournalUnavailable as exc:
        log.critical("%s", exc)
        return EXIT_TRY_AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(main())

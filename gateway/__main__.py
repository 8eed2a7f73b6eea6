#!/usr/bin/env python3
"""The prompt gateway: decides what is sent to workers, and says why.

  python -m gateway                        run on port 7862 with SQLite in state/gateway
  python -m gateway serve --profile FILE   run with the [gateway] table of a profile
  python -m gateway check                  settings, files and database; runs nothing
  python -m gateway export [FILE]          the configuration as one document
  python -m gateway import FILE            take over a document; --dry-run says what would change
  python -m gateway keys list|create|revoke
  python -m gateway users list|create|set
  python -m gateway verify                 audit chain, hashes, emergency file, replay of the log
  python -m gateway replay REQUEST_ID      assemble a logged request again and compare
  python -m gateway bench                  how long a resolution takes on this configuration

The database is GATEWAY_DATABASE_URL, else SQLite in GATEWAY_STATE_DIR, else in VERBATIM_STATE_DIR.

Exit codes: 0 done · 1 something is wrong, which is shown · 2 wrong command line · 3 wrong settings,
or a file that is not as it must be · 4 import: the result is not the document's snapshot
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gateway import log
from gateway.cli import benching, configuration, people, verification
from gateway.config import REPOSITORY, Settings, read_settings
from gateway.errors import ConfigError, GatewayError
from gateway.lifeline import die_with_supervisor

EXIT_ERROR, EXIT_CONFIG = 1, 3


def main() -> int:
    args = _arguments()
    try:
        settings = read_settings(_profile(args.profile), os.environ)
        if args.command in (None, "serve"):
            return _serve(settings)
        return _command(args, settings)
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_CONFIG
    except GatewayError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_ERROR


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", help="a profile of configs/ by name, or a file", metavar="P")
    commands = parser.add_subparsers(dest="command")
    serve = commands.add_parser("serve", help="run")
    # Also behind the command, where a supervisor puts it.
    serve.add_argument("--profile", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    commands.add_parser("check", help="look at settings, files and database")
    for part in (configuration, people, verification, benching):
        part.add(commands)
    return parser.parse_args()


def _profile(name: str | None) -> Path | None:
    if name is None:
        return None
    return Path(name) if "/" in name or name.endswith(".toml") else _shipped(name)


def _shipped(name: str) -> Path:
    path = REPOSITORY / "configs" / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"there is no profile {name} in {path.parent}; give a file's path")
    return path


def _serve(settings: Settings) -> int:
    from gateway.server import Server
    from gateway.wsgi import check_settings

    log.set_up()
    die_with_supervisor()
    check_settings(settings)
    sys.argv = ["gateway"]  # gunicorn reads it, too
    Server(settings).run()
    return 0


def _command(args: argparse.Namespace, settings: Settings) -> int:
    from gateway.store.database import open_database
    from gateway.tokens.counters import TokenCounters
    from gateway.wsgi import check, tokenizer_files

    if args.command == "check":
        return check(settings)
    database = open_database(settings.database_url)
    args.counters = TokenCounters(tokenizer_files(settings))
    args.settings = settings
    try:
        done: int = args.run(args, database)
        return done
    finally:
        database.dispose()


if __name__ == "__main__":
    sys.exit(main())

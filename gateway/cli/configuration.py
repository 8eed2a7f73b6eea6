"""export and import: the configuration as one document that people and programs compare."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gateway.errors import ConfigError
from gateway.prompts.language import check_template
from gateway.store.database import Database
from gateway.store.importing import import_document
from gateway.store.portable import export_document, from_bytes, to_bytes

ACTOR = "command line"
EXIT_NOT_EXACT = 4


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser("export", help="write the configuration to a file")
    export.add_argument("file", nargs="?", default="-", help="default: standard output")
    export.set_defaults(run=run_export)
    take = commands.add_parser("import", help="take over a configuration, and say what differs")
    take.add_argument("file", help="as export writes it; - is standard input")
    take.add_argument(
        "--dry-run", action="store_true", help="say what would change, change nothing"
    )
    take.set_defaults(run=run_import)


def run_export(args: argparse.Namespace, database: Database) -> int:
    with database.reading() as connection:
        document = export_document(connection)
    content = to_bytes(document)
    if args.file == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        _write(Path(args.file), content)
    print(f"snapshot {document['snapshot_hash']}", file=sys.stderr)
    return 0


def run_import(args: argparse.Namespace, database: Database) -> int:
    done = import_document(
        database,
        from_bytes(_read(args.file)),
        actor=ACTOR,
        dry_run=args.dry_run,
        check_text=check_template,
    )
    print(done.text())
    said = "would be" if args.dry_run else "is"
    print(f"snapshot {said} {done.snapshot_hash}", file=sys.stderr)
    if not done.is_exact:
        print("this is not the document's snapshot: see the lines with =", file=sys.stderr)
        return EXIT_NOT_EXACT
    return 0


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as exc:
        raise ConfigError(f"{name} cannot be read: {exc.strerror}") from exc


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}") from exc

"""verify and replay: whether what the database says of the past is still what it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, select

from gateway.content.emergency import load_emergency
from gateway.errors import ConfigError, NotFound, StoreUnavailable
from gateway.logs.queries import body_of
from gateway.logs.replay import newest_with_texts, replay_logged
from gateway.store.audit import verify_audit
from gateway.store.database import Database
from gateway.store.loading import load_snapshot
from gateway.store.tables import templates
from gateway.store.versions import stored_versions
from gateway.values.assembly import Counters
from gateway.values.rows import Snapshot

REPLAYS = 1000
SHOWN = 20  # faults of one check
EXIT_WRONG = 1


@dataclass(frozen=True, slots=True)
class Checked:
    """What one check looked at and what it found wrong."""

    name: str
    looked_at: str
    faults: tuple[str, ...] = ()


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser("verify", help="audit log, hashes, emergency file, replays")
    verify.add_argument(
        "--replays",
        type=_number,
        default=REPLAYS,
        metavar="N",
        help=f"newest requests with texts that are assembled again ({REPLAYS})",
    )
    verify.set_defaults(run=run_verify)
    again = commands.add_parser("replay", help="assemble a request of the log again and compare")
    again.add_argument("request_id")
    again.set_defaults(run=run_replay)


def run_verify(args: argparse.Namespace, database: Database) -> int:
    found = [
        _with(database, check_audit),
        _with(database, check_versions),
        _with(database, check_emergency),
        check_replays(database, args.counters, args.replays),
    ]
    _show(found)
    return EXIT_WRONG if any(one.faults for one in found) else 0


def run_replay(args: argparse.Namespace, database: Database) -> int:
    with database.reading() as connection:
        found = replay_logged(connection, args.request_id, args.counters)
    print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    return 0 if found.same else EXIT_WRONG


def check_audit(connection: Connection) -> Checked:
    state = verify_audit(connection)
    faults = [f"row {state.broken_id}: {state.reason}"] if state.broken_id is not None else []
    return Checked("audit log", f"{state.rows} rows, head {state.head[:12]}", tuple(faults))


def check_versions(connection: Connection) -> Checked:
    """The hash of every version of every template is that of its content."""
    count, faults = 0, []
    for template_id in connection.scalars(select(templates.c.id).order_by(templates.c.id)).all():
        try:
            count += len(stored_versions(connection, template_id))
        except StoreUnavailable as exc:
            faults.append(f"template {template_id}: {exc}")
    return Checked("versions of templates", f"{count} good versions", tuple(faults))


def check_emergency(connection: Connection) -> Checked:
    """The emergency file can be read and has a template for every case that is active."""
    try:
        return emergency_covers(load_snapshot(connection), load_emergency())
    except (ConfigError, StoreUnavailable) as exc:
        return Checked("emergency file", "nothing", (str(exc),))


def emergency_covers(snapshot: Snapshot, emergency: Snapshot) -> Checked:
    """A template for every active tuple of `snapshot`: of the tuple itself; a universal one would
    say something else."""
    wanted = [one for one in snapshot.templates if one.is_active]
    missing = [one for one in wanted if emergency.template(*one.tuple4) is None]
    return Checked(
        "emergency file",
        f"{len(wanted)} active cases",
        tuple(f"no template for {' / '.join(one.tuple4)}" for one in missing),
    )


def check_replays(database: Database, counters: Counters, most: int) -> Checked:
    with database.reading() as connection:
        ids = newest_with_texts(connection, most)
    faults, count = [], 0
    for request_id in ids:
        # Each in a transaction of its own: a long one keeps both engines from cleaning up.
        with database.reading() as connection:
            try:
                found = replay_logged(connection, request_id, counters)
            except NotFound:
                if body_of(connection, request_id) is not None:
                    faults.append(f"{request_id}: there are texts and no row")
                continue  # else retention took it in the meantime
        count += 1
        if not found.same:
            why = found.differences[0] if found.differences else "the hashes differ"
            faults.append(f"{request_id}: {why}")
    return Checked("replay of the log", f"{count} requests", tuple(faults))


def _with(database: Database, check: Callable[[Connection], Checked]) -> Checked:
    with database.reading() as connection:
        return check(connection)


def _show(found: Sequence[Checked]) -> None:
    console = Console()
    table = Table("check", "looked at", "found", box=box.SIMPLE_HEAD)
    for one in found:
        table.add_row(
            one.name, one.looked_at, f"{len(one.faults)} faults" if one.faults else "good"
        )
    console.print(table)
    for one in found:
        for fault in one.faults[:SHOWN]:
            console.print(f"{one.name}: {fault}", markup=False, highlight=False)
        if len(one.faults) > SHOWN:
            console.print(f"{one.name}: and {len(one.faults) - SHOWN} more")


def _number(raw: str) -> int:
    if not raw.isascii() or not raw.isdecimal() or len(raw) > 9:
        raise argparse.ArgumentTypeError("it is a number from 0")
    return int(raw)

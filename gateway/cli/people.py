"""keys and users: who may call, and what they may see."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.table import Table

from gateway.access.caller import Scope, parse_scopes
from gateway.access.keys import create_key, list_keys, revoke_key
from gateway.access.users import create_user, list_users, set_user
from gateway.store.database import Database

MOST = 1000  # rows of a list


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True)
    keys.add_parser("list", help="names, scopes and dates; never a key").set_defaults(run=run_keys)
    make = keys.add_parser("create", help="make a key and print it, once")
    make.add_argument("name")
    make.add_argument("--scope", action="append", required=True, choices=list(Scope))
    make.add_argument("--user", metavar="ID", help="whose jobs and conversations it sees")
    make.add_argument("--days", type=float, metavar="N", help="it ends after N days")
    make.set_defaults(run=run_create_key)
    revoke = keys.add_parser("revoke", help="switch a key off for good")
    revoke.add_argument("id", type=int)
    revoke.set_defaults(run=run_revoke)
    users = commands.add_parser("users", help="people").add_subparsers(required=True)
    users.add_parser("list").set_defaults(run=run_users)
    person = users.add_parser("create", help="make a user and print the id")
    person.add_argument("--id", help="a UUID; default: a new one")
    _user_fields(person)
    person.set_defaults(run=run_create_user)
    change = users.add_parser("set", help="change a user")
    change.add_argument("id")
    _user_fields(change)
    change.set_defaults(run=run_set_user)


def _user_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--email")
    parser.add_argument("--tier", help="what rules and parameters may ask for")
    parser.add_argument("--mode", choices=("sfw", "nsfw"), help="the user's own setting")
    for name, said in (
        ("nsfw", "may use nsfw templates"),
        ("admin", "may administer"),
        ("active", "may call at all"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=said)


def run_keys(args: argparse.Namespace, database: Database) -> int:
    with database.reading() as connection:
        found = list_keys(connection, limit=MOST)
    table = Table("id", "name", "begins with", "scopes", "user", "last used", "state")
    now = datetime.now(UTC)
    for key in found:
        table.add_row(
            str(key.id),
            key.name,
            key.prefix,
            " ".join(sorted(key.scopes)),
            key.user_id or "",
            f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never",
            "works" if key.is_active(now) else "revoked" if key.revoked_at else "expired",
        )
    Console().print(table)
    return 0


def run_create_key(args: argparse.Namespace, database: Database) -> int:
    now = datetime.now(UTC)
    with database.transaction() as connection:
        _, key = create_key(
            connection,
            name=args.name,
            scopes=parse_scopes(args.scope),
            now=now,
            user_id=args.user,
            expires_at=now + timedelta(days=args.days) if args.days is not None else None,
        )
    print(key)
    return 0


def run_revoke(args: argparse.Namespace, database: Database) -> int:
    with database.transaction() as connection:
        key = revoke_key(connection, args.id, datetime.now(UTC))
    print(f"key {key.id} ({key.name}) is revoked; processes that run see it within seconds")
    return 0


def run_users(args: argparse.Namespace, database: Database) -> int:
    with database.reading() as connection:
        found = list_users(connection, limit=MOST)
    table = Table("id", "email", "tier", "mode", "nsfw", "admin", "active")
    for user in found:
        flags = (user.may_use_nsfw, user.is_admin, user.is_active)
        table.add_row(
            user.id,
            user.email or "",
            user.tier,
            user.content_mode or "",
            *("yes" if flag else "no" for flag in flags),
        )
    Console().print(table)
    return 0


def run_create_user(args: argparse.Namespace, database: Database) -> int:
    with database.transaction() as connection:
        user = create_user(connection, user_id=args.id, now=datetime.now(UTC), values=_given(args))
    print(user.id)
    return 0


def run_set_user(args: argparse.Namespace, database: Database) -> int:
    with database.transaction() as connection:
        set_user(connection, args.id, _given(args), datetime.now(UTC))
    print("changed; processes that run see it within seconds")
    return 0


def _given(args: argparse.Namespace) -> dict[str, object]:
    """What the command line says, by column."""
    columns = {
        "email": args.email,
        "tier": args.tier,
        "content_mode": args.mode,
        "may_use_nsfw": args.nsfw,
        "is_admin": args.admin,
        "is_active": args.active,
    }
    return {name: value for name, value in columns.items() if value is not None}

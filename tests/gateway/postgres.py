"""A PostgreSQL for tests: one of our own, else one that runs, else none.

Looked for in this order: TEST_POSTGRES_URL; the programs initdb and pg_ctl, with which a private
server is started in a temporary folder; 127.0.0.1:5432 as user postgres without a password. A
private one need not bring anything to the disk, and so makes and drops databases much faster.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy.engine import make_url

LOCAL = "postgresql://postgres@127.0.0.1:5432/postgres"
START_S = 30


@dataclass(frozen=True)
class Server:
    """A server on which tests may make and drop databases of their own."""

    url: str  # of libpq, of a database to connect to for that

    def create(self, template: str | None = None) -> str:
        """Make a database; its name."""
        name = f"gateway_test_{uuid.uuid4().hex[:16]}"
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)
        return name

    def drop(self, name: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )

    def url_of(self, name: str) -> str:
        """SQLAlchemy URL of one of its databases."""
        url = make_url(self.url).set(drivername="postgresql+psycopg", database=name)
        return url.render_as_string(hide_password=False)


@contextmanager
def find_server() -> Iterator[Server | None]:
    """The server to test with; None where there is none. A private one ends with the block."""
    if given := os.environ.get("TEST_POSTGRES_URL"):
        url = make_url(given).set(drivername="postgresql").render_as_string(hide_password=False)
        # What was asked for and does not answer is an error, not a reason to take another.
        psycopg.connect(url, connect_timeout=5).close()
        yield Server(url)
    elif (programs := _programs()) is not None:
        with _private(programs) as url:
            yield Server(url)
    elif _answers(LOCAL):
        yield Server(LOCAL)
    else:
        yield None


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl; the newest version where there are several."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        key=lambda path: int(path.parts[-3]) if path.parts[-3].isdecimal() else 0,
        reverse=True,
    )
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path))
    return next((one.parent for one in found if (one.parent / "pg_ctl").exists()), None)


@contextmanager
def _private(programs: Path) -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="gateway-postgres-"))
    user = _unprivileged()
    if user is not None:
        shutil.chown(folder, user)
    data = str(folder / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(programs / program), *arguments],
            user=user,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "LC_ALL": "C"},
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=4 * START_S,
        )

    try:
        run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        # Nothing of a test outlives its server, so nothing needs to reach the disk.
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(folder / "log")
        run("pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "-t", str(START_S), "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> str | None:
    """Whom to run the server as: PostgreSQL refuses root. None: as ourselves."""
    if os.geteuid() != 0:
        return None
    names = {one.pw_name for one in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)

"""`orchestrator.py status` and `stop`, from another terminal."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

import msgspec
from rich.console import Console

from worker.config import state_dir
from worker.protocol.control import ask_orchestrator
from worker.protocol.messages import StatusQuery, StatusReport, StopQuery
from worker.supervisor.view import table

EXIT_NOT_RUNNING = 6
ANSWER_S = 2.0


def run(command: str, environment: Mapping[str, str], *, as_json: bool) -> int:
    """Do `status` or `stop`; returns the exit code."""
    folder = state_dir(environment)
    query = StatusQuery if command == "status" else StopQuery
    report = ask_orchestrator(folder, query(request_id=uuid.uuid4().hex), ANSWER_S)
    console = Console()
    if not isinstance(report, StatusReport):
        Console(stderr=True).print(
            f"no orchestrator runs with the state folder {folder}", soft_wrap=True
        )
        return EXIT_NOT_RUNNING
    if as_json:
        console.print_json(msgspec.json.encode(report).decode())
    else:
        console.print(
            f"{report.status}, profile {report.profile}, pid {report.pid}, "
            f"up {report.uptime_s:.0f} s"
        )
        console.print(table(report.children))
    if command == "stop":
        with console.status("draining"):
            asked = StatusQuery(request_id=uuid.uuid4().hex)
            while ask_orchestrator(folder, asked, ANSWER_S) is not None:
                time.sleep(0.2)
        console.print("stopped")
    return 0

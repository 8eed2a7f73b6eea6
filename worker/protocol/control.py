"""Questions to the orchestrator, from a terminal or from a front."""

from __future__ import annotations

import time
from pathlib import Path

import zmq

from worker.protocol.messages import (
    ExplainQuery,
    LedgerQuery,
    Message,
    PlanQuery,
    StatusQuery,
    StopQuery,
)
from worker.protocol.transport import Client, Connected, Disconnected, socket_path

ORCHESTRATOR = "orchestrator"
Query = StatusQuery | StopQuery | ExplainQuery | PlanQuery | LedgerQuery


def ask_orchestrator(state_dir: Path, query: Query, timeout_s: float) -> Message | None:
    """Ask the orchestrator of this state folder; None when none answers in time. Any thread."""
    if not socket_path(state_dir, ORCHESTRATOR).exists():
        return None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    client = Client(context, socket_path(state_dir, ORCHESTRATOR))
    poller = zmq.Poller()
    for target in client.poll_targets:
        poller.register(target, zmq.POLLIN)
    ends = time.monotonic() + timeout_s
    try:
        while (left_s := ends - time.monotonic()) > 0:
            poller.poll(max(1, round(left_s * 1000)))
            while (event := client.receive()) is not None:
                if isinstance(event, Connected):
                    client.answer_connected(query)
                elif isinstance(event, Disconnected):
                    return None
                elif getattr(event, "request_id", None) == query.request_id:
                    return event
        return None
    finally:
        client.close()

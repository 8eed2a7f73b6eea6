"""How an engine answers one request: what the work returns, or the error it raises."""

from __future__ import annotations

import logging
from collections.abc import Callable

from worker.engine.device import translated
from worker.engine.host import Outbox, Ticket
from worker.errors import WorkerError
from worker.log import request_scope
from worker.protocol.messages import Message, failed

log = logging.getLogger(__name__)


def answer(outbox: Outbox, ticket: Ticket, work: Callable[[], Message | None]) -> bool:
    """Run `work` and send its message, if it has one, or its error. False after an error."""
    try:
        with request_scope(ticket.request_id), translated():
            reply = work()
    except WorkerError as exc:
        if exc.status >= 500:
            with request_scope(ticket.request_id):
                log.error("%s", exc)
        outbox.send(ticket, failed(ticket.request_id, exc))
        return False
    if reply is not None:
        outbox.send(ticket, reply)
    return True


def quietly(work: Callable[[], object]) -> None:
    """Run `work` that nobody waits for; what it raises is in the log and in the models' states."""
    try:
        with translated():
            work()
    except WorkerError as exc:
        log.error("%s", exc)

"""A child must not outlive its parent, even when the parent is killed with SIGKILL."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time

log = logging.getLogger(__name__)

EXIT_THREAD_LOST = 70  # EX_SOFTWARE of sysexits.h
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
# Set by the process that starts a child, to its own pid.
PARENT_VARIABLE = "VERBATIM_PARENT_PID"


def die_with_parent(parent: int | None = None) -> None:
    """Arrange that this process is killed when the process that started it ends.

    parent: its pid; None takes it from PARENT_VARIABLE. Linux tells us through the kernel at
    once; elsewhere a thread looks once a second.
    """
    expected = parent or int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(expected,), name="lifeline", daemon=True).start()
    if os.getppid() != expected:  # it died before we were bound to it
        os._exit(1)


def die_with_any_thread() -> None:
    """Arrange that an exception which ends a thread ends the process, after it was logged.

    Our threads own sockets and jobs; a process that lost one would look alive and answer nobody.
    The supervisor starts a new one.
    """

    def end(problem: threading.ExceptHookArgs) -> None:
        name = problem.thread.name if problem.thread is not None else "unknown"
        exception = problem.exc_value
        log.critical("thread %s ended by an error; so does this process", name, exc_info=exception)
        logging.shutdown()
        os._exit(EXIT_THREAD_LOST)

    threading.excepthook = end


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

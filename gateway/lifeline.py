"""A process that was started by a supervisor must not outlive it, even when that is killed."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time

log = logging.getLogger(__name__)

# Set by a supervisor that starts us, to its own pid; without it we run alone.
PARENT_VARIABLE = "VERBATIM_PARENT_PID"
EXIT_THREAD_LOST = 70  # EX_SOFTWARE of sysexits.h
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_supervisor() -> None:
    """Be killed when the supervisor ends, where there is one."""
    if os.environ.get(PARENT_VARIABLE):
        die_with(int(os.environ[PARENT_VARIABLE]))


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends: at once on Linux, where
    the kernel tells, within a second elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()
    if os.getppid() != parent:  # it ended before we were bound to it
        os._exit(1)


def die_with_any_thread() -> None:
    """An exception that ends a thread ends the process, after it was logged: without its replica
    loop or its log writer it would look alive and serve what is old. The master starts another."""

    def end(problem: threading.ExceptHookArgs) -> None:
        name = problem.thread.name if problem.thread is not None else "unknown"
        log.critical("thread %s ended; so does this process", name, exc_info=problem.exc_value)
        logging.shutdown()
        os._exit(EXIT_THREAD_LOST)

    threading.excepthook = end


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

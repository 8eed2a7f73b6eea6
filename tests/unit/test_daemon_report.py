"""What the orchestrator says of its children's memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

from worker.supervisor.daemon import rss_bytes

# A process with one of its own, which says when that is there.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdout=-1, stdin=-1)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""


def test_a_child_is_counted_with_its_own_children_and_apart_from_others() -> None:
    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    with started() as first, started() as second:
        assert first.stdout is not None and second.stdout is not None
        grandchild, _ = int(first.stdout.readline()), second.stdout.readline()
        for pid in (first.pid, grandchild):  # so that both looks see the same
            os.kill(pid, signal.SIGSTOP)

        found = rss_bytes([first.pid, 1])

        own = psutil.Process(first.pid).memory_info().rss
        below = psutil.Process(grandchild).memory_info().rss
        assert own > 1 << 20 and below > 1 << 20
        assert found == {first.pid: own + below, 1: 0}  # 1 is no child of ours
        first.kill()
        second.kill()
    assert rss_bytes([first.pid]) == {first.pid: 0}
